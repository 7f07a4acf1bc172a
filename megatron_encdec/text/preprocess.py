"""Documents to tokens on disk, in parallel, with every document in the output or counted.

    1. list the inputs; load the tokenizer, or train it on them first
    2. if the output is complete for the same inputs, tokenizer and settings: say so, done
    3. read batches of raw documents; workers parse, split and encode them (`text/encode.py`)
    4. append the answers in input order, so the bytes do not depend on the number of workers
    5. finish the files, write the manifests last

The documents of the validation split go to `PREFIX.validation.*`, all others to `PREFIX.*`.
"""

import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Self

from megatron_encdec.platform.errors import UserError
from megatron_encdec.text import manifest as manifests
from megatron_encdec.text.corpus import InputFile, RawDocument, iter_documents, iter_raw, list_files
from megatron_encdec.text.encode import TRAIN, VALIDATION, EncodedBatch, EncodeSettings
from megatron_encdec.text.indexed import IndexedWriter, token_dtype
from megatron_encdec.text.manifest import EXAMPLES_KEPT, Manifest, Skipped
from megatron_encdec.text.progress import Progress, short_count
from megatron_encdec.text.tokenizer import Tokenizer, find_model_file, load_tokenizer, train_tokenizer
from megatron_encdec.text.workers import Workers, available_cores

BATCH_BYTES = 1 << 20  # of raw input a worker gets at once ...
BATCH_DOCUMENTS = 4096  # ... or so many documents, whichever comes first


def preprocess(inputs: Iterable[str | Path], tokenizer_path: str | Path, output_prefix: str | Path,
               text_key: str = "text", workers: int | None = None, mask_token: str | None = None,
               eod_token: str | None = None, validation_percent: float = 0.0,
               train_tokenizer: int | None = None, progress: bool = True) -> Manifest:
    """Tokenize `inputs` into `output_prefix.bin/.idx/.manifest.json`; returns that manifest.

    `workers`: processes, by default one a core. `validation_percent` P in [0, 100): documents whose text's
    hash falls under P go to `output_prefix.validation.*`. `train_tokenizer` N: make a byte-level BPE of N
    entries in the directory `tokenizer_path` first, unless it is there already. The output is a function of
    the inputs and these settings, never of `workers`. Raises `UserError` for anything the user can mend; a
    failed run leaves an older output as it was.
    """
    _check_settings(output_prefix, workers, validation_percent)
    files = list_files(inputs)
    if train_tokenizer is not None:
        _ensure_tokenizer(files, tokenizer_path, text_key, train_tokenizer, progress)
    tokenizer = load_tokenizer(tokenizer_path, mask_token, eod_token)
    settings = EncodeSettings(str(tokenizer_path), mask_token, eod_token, text_key, float(validation_percent))
    run = _Run(files, tokenizer, settings, output_prefix)
    if done := run.finished_before():
        _say(progress, f"{output_prefix}: complete already for these inputs and settings; nothing to do")
        return done
    _warn_of_stale_validation(output_prefix, validation_percent)
    with ExitStack() as stack:
        outputs = {split: stack.enter_context(_Output(prefix, token_dtype(tokenizer.vocabulary_size)))
                   for split, prefix in run.prefixes.items()}
        _encode_all(files, settings, outputs, workers or available_cores(), progress)
        return run.publish(outputs)


class _Output:
    """One split's files and accounts while they grow; a context manager."""

    def __init__(self, prefix: Path, dtype):
        self.prefix = prefix
        self.bytes_in = self.characters = 0
        self.skipped: dict[str, tuple[int, list[str]]] = {}
        self.writer = IndexedWriter(prefix, dtype)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception) -> None:
        self.writer.__exit__(*exception)

    def add_part(self, part) -> None:
        self.writer.append(part.tokens_T, part.lengths_N)
        self.bytes_in += part.bytes_in
        self.characters += part.characters

    def add_skipped(self, reason: str, where: str, size: int) -> None:
        count, examples = self.skipped.get(reason, (0, []))
        if len(examples) < EXAMPLES_KEPT:
            examples.append(where)
        self.skipped[reason] = (count + 1, examples)
        self.bytes_in += size


class _Run:
    """What determines the output, where it goes, and how it is recognised as done and made visible."""

    def __init__(self, files: list[InputFile], tokenizer: Tokenizer, settings: EncodeSettings,
                 prefix: str | Path):
        self.prefixes = {TRAIN: Path(prefix)}
        if settings.validation_percent:
            self.prefixes[VALIDATION] = Path(f"{prefix}.validation")
        self._inputs = tuple(manifests.InputRecord(**asdict(file)) for file in files)
        self._tokenizer = manifests.TokenizerRecord(tokenizer.fingerprint, tokenizer.vocabulary_size,
                                                    tokenizer.eod_id, tokenizer.mask_id)
        self._settings = {split: manifests.Settings(settings.text_key, settings.validation_percent, split)
                          for split in self.prefixes}

    def finished_before(self) -> Manifest | None:
        """The manifest of a complete earlier output of the same run, if there is one."""
        found = {}
        for split, prefix in self.prefixes.items():
            try:
                found[split] = there = manifests.check_files(prefix)
            except UserError:
                return None
            wanted = (self._inputs, self._tokenizer, self._settings[split])
            if there is None or wanted != (there.inputs, there.tokenizer, there.settings):
                return None
        return found[TRAIN]

    def publish(self, outputs: dict[str, _Output]) -> Manifest:
        """Refuse empty outputs; bring all to disk; then, and only then, replace what was there before."""
        for split, output in outputs.items():
            if not output.writer.documents:
                raise UserError(_nothing_to_write(split, outputs))
        written = {split: self._manifest(split, output) for split, output in outputs.items()}
        for output in outputs.values():  # a manifest never stands beside files of another run
            manifests.manifest_path(output.prefix).unlink(missing_ok=True)
        for output in outputs.values():  # nor does an old validation set beside new training data
            output.writer.retract()
        for output in outputs.values():
            output.writer.publish()
        for split in reversed(outputs):
            manifests.write(outputs[split].prefix, written[split])
        return written[TRAIN]

    def _manifest(self, split: str, output: _Output) -> Manifest:
        skipped = {reason: Skipped(count, tuple(examples))
                   for reason, (count, examples) in sorted(output.skipped.items())}
        return manifests.describe(output.writer.finish(), output.writer.dtype.name, bytes_in=output.bytes_in,
                                  characters=output.characters, skipped=skipped, tokenizer=self._tokenizer,
                                  settings=self._settings[split], inputs=self._inputs)


def _encode_all(files: list[InputFile], settings: EncodeSettings, outputs: dict[str, _Output], workers: int,
                show: bool) -> None:
    with (Workers("megatron_encdec.text.encode:make_encoder", (settings,), workers) as pool,
          Progress("preprocess", sum(file.size for file in files), show) as progress):
        consumed = 0
        for answer in pool.map_ordered(_batches(files)):
            _append(answer, outputs)
            consumed += answer.consumed
            bytes_in = sum(output.bytes_in for output in outputs.values())
            tokens = sum(output.writer.tokens for output in outputs.values())
            seconds = progress.elapsed()
            rate = f"{bytes_in / 1e6 / seconds:.1f} MB/s · {short_count(tokens / seconds)} tokens/s"
            progress.update(consumed, rate)
    if consumed:
        _say(show, f"read {bytes_in / 1e6:,.1f} MB in {seconds:.1f} s: {rate}, {workers} workers")


def _append(answer: EncodedBatch, outputs: dict[str, _Output]) -> None:
    for split, part in answer.parts.items():
        outputs[split].add_part(part)
    for reason, where, size in answer.skipped:
        outputs[TRAIN].add_skipped(reason, where, size)


def _batches(files: list[InputFile]) -> Iterator[list[RawDocument]]:
    batch: list[RawDocument] = []
    size = 0
    for file in files:
        for raw in iter_raw(file.path):
            batch.append(raw)
            size += len(raw.data)
            if size >= BATCH_BYTES or len(batch) >= BATCH_DOCUMENTS:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def _ensure_tokenizer(files: list[InputFile], path: str | Path, text_key: str, vocabulary_size: int,
                      show: bool) -> None:
    """Train the tokenizer at `path` on all documents, unless one is there."""
    path = Path(path)
    if find_model_file(path):
        _say(show, f"{path}: this tokenizer is there already and is used as it is")
        return
    if path.suffix in (".json", ".model"):
        raise UserError(f"{path}: no such file; a tokenizer is trained into a directory: give its name")

    def texts(progress: Progress) -> Iterator[str]:
        read = 0
        for file in files:
            for document in iter_documents(file.path, text_key):
                read += document.size
                progress.update(read, f"{read / 1e6 / progress.elapsed():.1f} MB/s read")
                if document.text is not None:
                    yield document.text

    with Progress("train tokenizer", sum(file.size for file in files), show) as progress:
        tokenizer = train_tokenizer(texts(progress), vocabulary_size, path)
    _say(show, f"{path}: trained a byte-level BPE of {tokenizer.vocabulary_size} entries"
         + (f" (the text holds no more; {vocabulary_size} were asked for)"
            if tokenizer.vocabulary_size < vocabulary_size else ""))


def _check_settings(prefix: str | Path, workers: int | None, validation_percent: float) -> None:
    if str(prefix).endswith("/") or Path(prefix).is_dir():
        raise UserError(f"--output {prefix}: is a directory; give a prefix such as {Path(prefix) / 'corpus'}")
    if workers is not None and workers < 1:
        raise UserError(f"--workers {workers}: at least 1")
    if not 0 <= validation_percent < 100:
        raise UserError(f"--validation-percent {validation_percent}: from 0 to below 100")


def _nothing_to_write(split: str, outputs: dict[str, _Output]) -> str:
    if split == VALIDATION:
        return (f"none of {outputs[TRAIN].writer.documents} documents fell into the validation split; raise "
                f"--validation-percent")
    skipped = "; ".join(f"{reason}: {count}, first {examples[0]}"
                        for reason, (count, examples) in outputs[TRAIN].skipped.items())
    return f"no document to write to {outputs[TRAIN].prefix}; skipped: {skipped or 'none, input empty'}"


def _warn_of_stale_validation(prefix: str | Path, validation_percent: float) -> None:
    stale = manifests.manifest_path(f"{prefix}.validation")
    if not validation_percent and stale.exists():
        print(f"note: {stale} is of an earlier run; its documents are now in {prefix} too", file=sys.stderr)


def _say(show: bool, message: str) -> None:
    if show:
        print(message, file=sys.stderr, flush=True)
