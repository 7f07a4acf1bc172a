"""Finished outputs put together into one: the machines' parts of a corpus, or corpora of the same tokenizer.

    1. read the manifests; refuse what does not belong together, naming both
    2. copy `.bin` after `.bin` (no token is decoded, no shard hashed again), join the indices
    3. write the manifest: sums, all inputs, the parts' sizes, whose shard hashes stay as they are

Parts made with `--shard i/n` have to be all n of the same inputs, in order; then `.bin` and `.idx` are, byte for byte,
what one machine would have written.
"""

import dataclasses
import shutil
from collections.abc import Sequence
from operator import attrgetter
from pathlib import Path

from megatron_encdec.platform.errors import UserError
from megatron_encdec.text import finish
from megatron_encdec.text import manifest as manifests
from megatron_encdec.text.encode import EXAMPLES_KEPT, TRAIN, VALIDATION
from megatron_encdec.text.indexed import IndexedWriter
from megatron_encdec.text.manifest import Manifest, Skipped
from megatron_encdec.text.partial import PartialRun


def merge(prefixes: Sequence[str | Path], output_prefix: str | Path) -> Manifest:
    """Write the outputs at `prefixes`, in this order, to `output_prefix` (validation splits too); its manifest.

    Raises `UserError` where a part has no manifest, was written with another tokenizer or other settings, or where
    shards are missing, repeated or out of order.
    """
    names = {"": [str(prefix) for prefix in prefixes]}
    first = _read(names[""])
    if first[0].settings.validation_percent:
        names[f".{VALIDATION}"] = [f"{prefix}.{VALIDATION}" for prefix in prefixes]
    if Path(output_prefix).is_dir() or Path(output_prefix).resolve() in [Path(name).resolve() for name in names[""]]:
        raise UserError(f"--output {output_prefix}: is a directory or one of the parts; name another prefix")
    sources = {suffix: (first if not suffix else _read(parts), parts) for suffix, parts in names.items()}
    free = shutil.disk_usage(_existing(Path(output_prefix))).free
    needed = sum(part.bin_bytes + 2 * part.idx_bytes for parts, _ in sources.values() for part in parts)
    if needed > free:
        raise UserError(f"--output {output_prefix}: needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free there")
    if not any(part.documents for part in first):
        raise UserError(f"--merge: {', '.join(names[''])} hold no document")
    try:
        return _merge(sources, output_prefix, {"merge": names})
    except OSError as error:
        place = str(error.filename or output_prefix)
        part = any(place in (f"{name}.bin", f"{name}.idx") for parts in names.values() for name in parts)
        raise UserError(f"{place}: cannot {'read this part' if part else 'write the output'}: "
                        f"{error.strerror or error}") from None


def _merge(sources: dict, output_prefix: str | Path, plan: dict) -> Manifest:
    with PartialRun(output_prefix, plan) as partial:
        done = {suffix[1:] or TRAIN: (Path(f"{output_prefix}{suffix}"),
                                      _write(f"{output_prefix}{suffix}", suffix[1:] or TRAIN, *parts, partial))
                for suffix, parts in sources.items()}
        finish.publish(partial.folder, {name: prefix for name, (prefix, _) in done.items()},
                       {name: manifest for name, (_, manifest) in done.items()})
        partial.remove()
    return done[TRAIN][1]


def _existing(path: Path) -> Path:
    return next(parent for parent in path.absolute().parents if parent.exists())


def _read(prefixes: list[str]) -> list[Manifest]:
    parts = []
    for prefix in prefixes:
        part = manifests.check_files(prefix)
        if part is None:
            raise UserError(f"{prefix}: has no manifest, so it cannot be merged; write it with preprocess")
        for what in ("tokenizer.fingerprint", "tokenizer.eod_id", "dtype", "shard_bytes"):
            mine, others = (attrgetter(what)(one) for one in (part, parts[0] if parts else part))
            if mine != others:
                raise UserError(f"{prefix}: {what} is {mine}, of {prefixes[0]} it is {others}; preprocess both alike")
        if parts and _of_all(part) != _of_all(parts[0]):
            raise UserError(f"{prefix}: its settings {_of_all(part)} are not those of {prefixes[0]}, "
                            f"{_of_all(parts[0])}; preprocess both alike")
        parts.append(part)
    _check_shards(prefixes, parts)
    return parts


def _of_all(part: Manifest) -> manifests.Settings:
    return dataclasses.replace(part.settings, shard="1/1")


def _check_shards(prefixes: list[str], parts: list[Manifest]) -> None:
    shards = [part.settings.shard for part in parts]
    counts = {shard.partition("/")[2] for shard in shards} - {"1"}
    if not counts:
        return
    expected = [f"{i}/{len(parts)}" for i in range(1, len(parts) + 1)]
    if shards != expected:
        raise UserError(f"--merge: these are the shards {', '.join(shards)}; give all of {', '.join(sorted(counts))} "
                        "once, in order")
    for prefix, part in zip(prefixes, parts, strict=True):
        if part.inputs != parts[0].inputs:
            raise UserError(f"{prefix}: is a shard of other inputs than {prefixes[0]} (or they changed in between); "
                            "preprocess them again")


def _write(prefix: str, name: str, parts: list[Manifest], prefixes: list[str], partial: PartialRun) -> Manifest:
    """The parts one behind the other as NAME.bin and NAME.idx in the folder."""
    with IndexedWriter(prefix, parts[0].dtype, partial.folder, name) as writer:
        writer.cut()
        for part, source in zip(parts, prefixes, strict=True):
            writer.append_part(source, part.shards)
            writer.tokens += part.tokens
        files = writer.finish()
    sharded = parts[0].settings.shard != "1/1"
    inputs = parts[0].inputs if sharded else tuple(record for part in parts for record in part.inputs)
    encoders = {part.encoder for part in parts}
    return manifests.describe(
        files, parts[0].dtype, bytes_in=sum(part.bytes_in for part in parts),
        characters=sum(part.characters for part in parts), skipped=_skipped(parts), tokenizer=parts[0].tokenizer,
        settings=_of_all(parts[0]), inputs=inputs, encoder=parts[0].encoder if len(encoders) == 1 else None,
        parts=tuple(size for part in parts for size in part.parts or (part.bin_bytes,) if size),
        unproven_cuts=sum(part.unproven_cuts for part in parts),
        **{loss: sum(part.losses()[loss] for part in parts) for loss in parts[0].losses()})


def _skipped(parts: list[Manifest]) -> dict[str, Skipped]:
    reasons = sorted({reason for part in parts for reason in part.skipped})
    return {reason: Skipped(sum(part.skipped[reason].count for part in parts if reason in part.skipped),
                            tuple(example for part in parts if reason in part.skipped
                                  for example in part.skipped[reason].examples)[:EXAMPLES_KEPT])
            for reason in reasons}
