"""Finished outputs put together into one: the machines' shares of a corpus, or corpora of the same tokenizer.

    1. read the manifests; refuse what does not belong together, naming both
    2. copy `.bin` after `.bin` (no token is decoded, no shard hashed again), join the indices
    3. write the manifest: sums, all inputs, the parts' sizes, whose shard hashes stay as they are

Shares made with `--shard i/n` have to be all n of the same inputs, in order; then `.bin` and `.idx` are, byte for byte,
what one machine would have written.
"""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from operator import attrgetter
from pathlib import Path

from megatron_encdec.platform.errors import UserError
from megatron_encdec.text import manifest as manifests
from megatron_encdec.text.indexed import IndexedWriter
from megatron_encdec.text.manifest import SUMMED, TRAIN, Manifest, Settings, Skipped, split_prefixes
from megatron_encdec.text.partial import PartialRun


def merge(prefixes: Sequence[str | Path], output_prefix: str | Path) -> Manifest:
    """Write the outputs at `prefixes`, in this order, to `output_prefix` (validation splits too); its manifest. Raises
    `UserError` where a part has no manifest, was written with another tokenizer or other settings, or where shares are
    missing, repeated or out of order."""
    first = _read([str(prefix) for prefix in prefixes])
    percent = first[0].settings.validation_percent
    outputs = split_prefixes(output_prefix, percent)
    names = {split: [str(split_prefixes(prefix, percent)[split]) for prefix in prefixes] for split in outputs}
    if Path(output_prefix).is_dir() or Path(output_prefix).resolve() in [Path(name).resolve() for name in prefixes]:
        raise UserError(f"--output {output_prefix}: is a directory or one of the parts; name another prefix")
    parts = {split: first if split == TRAIN else _read(names[split]) for split in outputs}
    free = shutil.disk_usage(next(parent for parent in Path(output_prefix).absolute().parents if parent.exists())).free
    needed = sum(part.bin_bytes + 2 * part.idx_bytes for some in parts.values() for part in some)
    if needed > free:
        raise UserError(f"--output {output_prefix}: needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free there")
    if not any(part.documents for part in first):
        raise UserError(f"--merge: {', '.join(names[TRAIN])} hold no document")
    try:
        with PartialRun(output_prefix, {"merge": names}) as partial:
            written = {split: _write(partial.folder, split, parts[split], names[split]) for split in outputs}
            partial.publish(outputs, written)
            partial.remove()
    except OSError as error:
        place = str(error.filename or output_prefix)
        part = any(place in (f"{name}.bin", f"{name}.idx") for some in names.values() for name in some)
        raise UserError(f"{place}: cannot {'read this part' if part else 'write the output'}: "
                        f"{error.strerror or error}") from None
    return written[TRAIN]


def _read(prefixes: list[str]) -> list[Manifest]:
    parts: list[Manifest] = []
    for prefix in prefixes:
        part = manifests.check_files(prefix)
        if part is None:
            raise UserError(f"{prefix}: has no manifest, so it cannot be merged; write it with preprocess")
        parts.append(part)
        for what in ("tokenizer.fingerprint", "tokenizer.eod_id", "dtype", "shard_bytes"):
            mine, others = map(attrgetter(what), (part, parts[0]))
            if mine != others:
                raise UserError(f"{prefix}: {what} is {mine}, of {prefixes[0]} it is {others}; preprocess both alike")
        if _of_all(part) != _of_all(parts[0]):
            raise UserError(f"{prefix}: its settings {_of_all(part)} are not those of {prefixes[0]}, "
                            f"{_of_all(parts[0])}; preprocess both alike")
    _check_shares(prefixes, parts)
    return parts


def _of_all(part: Manifest) -> Settings:
    return replace(part.settings, share="1/1")


def _check_shares(prefixes: list[str], parts: list[Manifest]) -> None:
    shares = [part.settings.share for part in parts]
    counts = {share.partition("/")[2] for share in shares} - {"1"}
    if not counts:
        return
    if shares != [f"{i}/{len(parts)}" for i in range(1, len(parts) + 1)]:
        raise UserError(f"--merge: these are the parts {', '.join(shares)}; give all of {', '.join(sorted(counts))} "
                        "once, in order")
    for prefix, part in zip(prefixes, parts, strict=True):
        if part.inputs != parts[0].inputs:
            raise UserError(f"{prefix}: is a part of other inputs than {prefixes[0]} (or they changed in between); "
                            "preprocess them again")


def _write(folder: Path, split: str, parts: list[Manifest], prefixes: list[str]) -> Manifest:
    """The parts one after the other as SPLIT.bin and SPLIT.idx in the folder."""
    with IndexedWriter(folder, split, parts[0].dtype) as writer:
        writer.cut()
        for part, source in zip(parts, prefixes, strict=True):
            writer.append_part(source, part.shards)
        files = writer.finish()
    shared = parts[0].settings.share != "1/1"
    inputs = parts[0].inputs if shared else tuple(record for part in parts for record in part.inputs)
    encoders = {part.encoder for part in parts}
    skipped: dict[str, Skipped] = {}
    for part in parts:
        for reason, record in part.skipped.items():
            skipped[reason] = skipped.get(reason, Skipped(0, ())) + record
    return manifests.describe(
        files, skipped=dict(sorted(skipped.items())), tokenizer=parts[0].tokenizer, settings=_of_all(parts[0]),
        inputs=inputs, encoder=parts[0].encoder if len(encoders) == 1 else None,
        parts=tuple(size for part in parts for size in part.parts or (part.bin_bytes,) if size),
        **{what: sum(getattr(part, what) for part in parts) for what in (*SUMMED, "unproven_cuts")})
