"""A checkpoint as a Hugging Face model directory: stock classes, compared, complete or absent.

    1. `find`            the checkpoint, its config and tokenizer
    2. `choose`          the class, by objective and family or by wish; `way_back` where it is an import's own
    3. destination       nothing there, an empty directory, or an earlier export (the same one: nothing to do)
    4. weights, config, tokenizer, model card into a directory beside OUT
    5. verification      loaded back with the Auto class, every key, logits against the trunk
    6. rename
"""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_encdec.interop.card import model_card
from megatron_encdec.interop.families import Target
from megatron_encdec.interop.hugging_face import SHARD, load_model, write_model
from megatron_encdec.interop.names import canonical_weights, to_hugging_face
from megatron_encdec.interop.parity import check_logits
from megatron_encdec.interop.pooling import about_empty_texts, write_pooling
from megatron_encdec.interop.source import Source, find, whole_trunk
from megatron_encdec.interop.targets import check_fits, choose, hugging_face_config
from megatron_encdec.interop.tokenizer_files import bos_id, write_tokenizer
from megatron_encdec.interop.way_back import WayBack, way_back
from megatron_encdec.platform.errors import UserError
from megatron_encdec.rundir.files import fsync_directory, replace_durably, write_json_atomic

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
RECORD = "export.json"


@dataclass(frozen=True)
class Export:
    """What `export` did; `difference` of logits at most, None where the export was there already."""

    path: Path
    model_class: str
    difference: float | None


def export(run: str, out: str | Path, as_: str = "auto", dtype: str = "auto", force: bool = False,
           say: Callable[[str], None] = print, shard_size: str = SHARD) -> Export:
    """Write the checkpoint `RUN_DIR[@STEP]` to the directory `out` as a stock Hugging Face model.

    `as_`: auto (by the objective of that step and the trunk's family), or a name of `families.TARGETS`. `dtype` of
    the weights: fp32, bf16, fp16; auto is fp32, and what it came in for an import. `force` replaces another export at
    `out`. `shard_size`: of a safetensors file at most. Raises `UserError` for a mistake, `ParityError` where the
    result would not compute what the trunk computes; `out` is then as it was.
    """
    source = find(run)
    model, imported = source.config.model, source.imported
    target = choose(as_, source.state.objective, model, imported and imported["as"])
    home = way_back(source, target)
    if dtype == "auto":
        dtype = imported["dtype"] if imported else "fp32"
    if dtype not in DTYPES:
        raise UserError(f"--dtype {dtype}: not one of auto, {', '.join(DTYPES)}")
    if home is None:
        check_fits(target, model, source.tokenizer)
    out, record = Path(os.path.realpath(out)), _record(source, target, dtype)
    if _is_there(out, record, force):
        say(f"{out}: is the export of {source.checkpoint.name} as {target.model_class} in {dtype} already")
        return Export(out, target.model_class, None)

    work = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(work, ignore_errors=True)  # of an export that was killed
    work.mkdir(parents=True)
    try:
        difference = _write(work, source, target, home, dtype, shard_size, say)
        write_json_atomic(work / RECORD, {**record, "files": _files(work)})
        _make_durable(work)
        _put_in_place(work, out)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    say(f"{out}: {target.model_class}, {target.attention} attention, {dtype}; logits differ from the trunk's by at "
        f"most {difference:.2g}")
    return Export(out, target.model_class, difference)


def _record(source: Source, target: Target, dtype: str) -> dict:
    tokenizer = source.tokenizer
    return {"format": 1, "history_hash": source.state.history_hash, "step": source.state.step,
            "as": target.name, "dtype": dtype, "tokenizer_fingerprint": source.state.tokenizer_fingerprint,
            "special_ids": tokenizer and {"mask": tokenizer.mask_id, "eod": tokenizer.eod_id}}


def _is_there(out: Path, record: dict, force: bool) -> bool:
    """Whether `out` is this very export; `UserError` where it is something else, not to be overwritten."""
    if not out.exists():
        return False
    if not out.is_dir():
        raise UserError(f"{out}: is a file; name a directory")
    if not any(out.iterdir()):
        return False
    try:
        found = json.loads((out / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UserError(f"{out}: holds other files and no export of ours; name another directory") from None
    files = found.pop("files", None) if isinstance(found, dict) else None
    if found == record:
        return True
    if files is not None and (foreign := sorted(set(_files(out)) - {RECORD, *files})):
        raise UserError(f"{out}: holds {foreign[0]} beside an export, which no export wrote; move it away, or name "
                        "another directory")
    if not force:
        raise UserError(f"{out}: holds another export (step {found.get('step')}, as {found.get('as')}, "
                        f"{found.get('dtype')}); name another directory, or replace it with --force")
    return False


@torch.no_grad()
def _write(work: Path, source: Source, target: Target, home: WayBack | None, dtype: str, shard_size: str,
           say: Callable[[str], None]) -> float:
    """Everything but the record into `work`; the largest difference of logits."""
    model, tokenizer = source.config.model, source.tokenizer
    say(f"loading {source.checkpoint}" + (" (fp32 masters)" if source.has_masters else ""))
    with whole_trunk(source) as trunk:
        for parameter in trunk.parameters():  # what is compared is what is written
            parameter.copy_(parameter.to(DTYPES[dtype]))
        say(f"writing {target.model_class}, {model.parameter_count():,} parameters")
        if home is not None:
            config, remarks = home.config, home.write_files(work)
            weights = home.weights(canonical_weights(trunk))
        else:
            length = max(source.config.data.sequence_length, model.max_positions or 0)
            remarks = write_tokenizer(tokenizer, work, length) if tokenizer else ["there is no tokenizer with it"]
            config = hugging_face_config(target, model, source.config.data.sequence_length, tokenizer,
                                         tokenizer and bos_id(tokenizer))
            weights = to_hugging_face(canonical_weights(trunk), model, target.family.names)
        weights = {name: tensor.to(DTYPES[dtype]) for name, tensor in weights.items()}
        write_model(target, config, weights, work, shard_size)
        del weights
        if home is not None:
            home.write_generation(work)
        if target.is_encoder:
            write_pooling(work, model.hidden_size, config.max_position_embeddings)
            remarks += about_empty_texts(work)
        (work / "README.md").write_text(model_card(source, target, dtype, remarks), encoding="utf-8")
        for remark in remarks:
            say(f"note: {remark}")
        say("comparing with the trunk")
        apart = home.replaced_token if home is not None else None
        return check_logits(trunk, load_model(target, work), target.attention, apart)


def _files(directory: Path) -> list[str]:
    """Names of the files in it and below, as they are written in its record."""
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if not path.is_dir())


def _make_durable(directory: Path) -> None:
    mode = (directory / RECORD).stat().st_mode  # safetensors leaves its files to their owner alone
    for entry in sorted(directory.rglob("*")):
        if entry.is_dir():
            fsync_directory(entry)
            continue
        entry.chmod(mode)
        with open(entry, "rb") as handle:
            os.fsync(handle.fileno())
    fsync_directory(directory)


def _put_in_place(work: Path, out: Path) -> None:
    """Rename; an earlier export makes way first, and is deleted when the new one stands."""
    grave = out.with_name(f".{out.name}.old")
    shutil.rmtree(grave, ignore_errors=True)
    if out.exists() and any(out.iterdir()):
        os.replace(out, grave)
    replace_durably(work, out)
    shutil.rmtree(grave, ignore_errors=True)
