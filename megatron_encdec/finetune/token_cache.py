"""Tokens of texts, made by whichever run needs them first: RESULTS/.tokens/<key>.npz, shared by all runs of a tree.

    1. the key is a hash of the tokenizer, the options and the texts themselves: another file, prefix or tokenizer gives
       another key, so nothing that is there can be wrong, and no file is ever changed
    2. a file that is there and whole is read; else the texts are tokenized, and the file is complete or absent

Workers that want the same texts at the same time each make them, on a core of their own, which takes no longer than
waiting would. Whoever deletes the folder loses nothing but time. Legend of shapes: N texts, T tokens of all of them.
"""

import contextlib
import hashlib
import io
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import orjson
import tokenizers

from megatron_encdec.rundir.files import write_atomic

FOLDER = ".tokens"  # a report passes over names that start with a point
# What reading a damaged file may raise: zipfile takes flipped bits for other methods, versions and passwords.
_DAMAGED = (OSError, ValueError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)
_IDS, _LENGTHS, _OFFSETS = "input_ids", "lengths", "offset_mapping"


class TokenCache:
    """What `tokenizer` (a fast one of transformers) makes of texts, kept under `folder`."""

    def __init__(self, tokenizer, folder: Path):
        self._tokenizer, self._folder = tokenizer, folder
        self._base = hashlib.sha256(orjson.dumps([type(tokenizer).__name__, tokenizers.__version__,
                                                  tokenizer.backend_tokenizer.to_str()]))

    def __call__(self, texts: Sequence[str], special: bool, offsets: bool = False) -> dict[str, list]:
        """`input_ids` [N][T], and `offset_mapping` [N][T] pairs where asked for. special: with the tokens that the
        tokenizer adds."""
        digest = self._base.copy()
        digest.update(orjson.dumps([special, offsets, list(texts)]))
        path = self._folder / f"{digest.hexdigest()}.npz"
        if (kept := _read(path, {_IDS, _OFFSETS} if offsets else {_IDS})) is not None:
            return kept
        made = self._tokenizer(list(texts), add_special_tokens=special, return_offsets_mapping=offsets, verbose=False)
        kept = {name: made[name] for name in (_IDS, _OFFSETS) if name in made}
        with contextlib.suppress(OSError):  # a full disk: the next run makes them again
            self._folder.mkdir(parents=True, exist_ok=True)
            write_atomic(path, _packed(kept))
        return kept


def _packed(found: dict[str, list]) -> bytes:
    rows = found[_IDS]
    arrays = {_LENGTHS: np.array([len(row) for row in rows], np.int64),
              _IDS: np.array([one for row in rows for one in row], np.int32)}
    if _OFFSETS in found:
        arrays[_OFFSETS] = np.array([one for row in found[_OFFSETS] for one in row], np.int32).reshape(-1, 2)
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def _read(path: Path, wanted: set[str]) -> dict[str, list] | None:
    """What is kept at `path`; None where that is not there, or damaged (a checksum of each array is in it)."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        lengths = arrays.pop(_LENGTHS)
    except _DAMAGED:
        return None
    if arrays.keys() != wanted:
        return None
    ends = np.cumsum(lengths).tolist()
    starts = [0, *ends[:-1]]
    found = {}
    for name, values in arrays.items():
        flat = [tuple(one) for one in values.tolist()] if name == _OFFSETS else values.tolist()
        found[name] = [flat[start:end] for start, end in zip(starts, ends, strict=True)]
    return found
