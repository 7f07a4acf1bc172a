"""Documents to tokens on disk, in parallel, with every document in the output or counted.

    1. list the inputs; load the tokenizer, or train it on them first
    2. if the output is complete for the same inputs, tokenizer and settings: say so, done
    3. choose the encoder on a sample of the text; cut the input into chunks (`text/chunks.py`), which workers encode
    4. append their ids in input order, a journal line each (`text/partial.py`): a killed run goes on after the last one
    5. finish the files, write the manifests last
"""

import os
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path

from megatron_encdec.platform.children import Pool, available_cores
from megatron_encdec.platform.errors import UserError
from megatron_encdec.platform.progress import Progress, short_count
from megatron_encdec.platform.schema import to_dict
from megatron_encdec.text import manifest as manifests
from megatron_encdec.text.chunks import CHUNK_BYTES, Chunk, ChunkAccount, chunks, share_of, slots
from megatron_encdec.text.corpus import REASONS, kind_of
from megatron_encdec.text.documents import LongDocument, read_chunk
from megatron_encdec.text.encode import ids_path, remove_parts
from megatron_encdec.text.encoder import choose_encoder
from megatron_encdec.text.fields import Fields, Selection, listed, selection
from megatron_encdec.text.indexed import IndexedWriter, bin_path, token_dtype
from megatron_encdec.text.inputs import list_files
from megatron_encdec.text.manifest import TRAIN, VALIDATION, EncoderRecord, InputFile, Manifest
from megatron_encdec.text.partial import PartialRun, Tally, remove_left
from megatron_encdec.text.remote import Found, changed, is_remote
from megatron_encdec.text.sampling import keys_there, sample_texts
from megatron_encdec.text.tokenizer import AS_OPTION, Tokenizer, load_tokenizer, train_tokenizer
from megatron_encdec.text.tokenizer_models import find_model_file

REASONS_OF_KEYS = ("missing_key", "not_text", "filtered")  # of `REASONS`, those that a mistyped key gives
TRAINING_BYTES = 2 << 30  # of text for a tokenizer: a vocabulary does not change with more


@dataclass(frozen=True)
class PreprocessSettings:
    """What decides the content, besides inputs and tokenizer, and how it is made."""

    text_key: str | Sequence[str] = "text"  # `a.b`: the key b inside a
    join: str = "\n\n"  # between the texts of several keys
    where: Sequence[str] = ()  # conditions on fields, such as language=en, that all have to hold
    mask_token: str | None = None
    eod_token: str | None = None
    validation_percent: float = 0.0  # P in [0, 100): texts whose hash falls under P go to `PREFIX.validation.*`
    on_error: str = "count"  # documents that cannot be read, or `stop` at the first
    encoder: str | None = None  # `gigatoken`, `tokenizers` or None for the faster one that is proven right
    share: tuple[int, int] = (1, 1)  # (i, n): do the i-th of n parts of the input
    workers: int | None = None  # processes, by default one a core; the output is the same for any number

    @property
    def selection(self) -> Selection:
        """What is taken of each document."""
        return selection(self.text_key, self.join, self.where)

    def check(self, prefix: str | Path) -> None:
        """Raises `UserError` for values that cannot be, and a `prefix` that cannot be written to."""
        if str(prefix).endswith("/") or Path(prefix).is_dir():
            raise UserError(f"--output {prefix}: is a directory; give a prefix such as {Path(prefix) / 'corpus'}")
        if self.workers is not None and self.workers < 1:
            raise UserError(f"--workers {self.workers}: at least 1")
        if not 0 <= self.validation_percent < 100:
            raise UserError(f"--validation-percent {self.validation_percent}: from 0 to below 100")
        index, count = self.share
        if not 1 <= index <= count:
            raise UserError(f"--shard {index}/{count}: the parts are numbered from 1 to {max(count, 1)}")


def preprocess(inputs: Iterable[str | Path], tokenizer_path: str | Path, output_prefix: str | Path,
               train_tokenizer: int | None = None, progress: bool = True, **settings) -> Manifest:
    """Tokenize `inputs` into `output_prefix.bin/.idx/.manifest.json`; returns that manifest. `settings` are the fields
    of `PreprocessSettings`. `train_tokenizer` N: first make a byte-level BPE of N entries in the directory
    `tokenizer_path`, unless there is one. Raises `UserError` for anything the user can mend; a failed run leaves an
    older output as it was, and what it has done for the next one."""
    settings = PreprocessSettings(**settings)
    settings.check(output_prefix)
    files = list_files(inputs)
    if train_tokenizer is not None:
        ensure_tokenizer(files, tokenizer_path, settings.selection, train_tokenizer, progress)
    tokenizer = load_tokenizer(tokenizer_path, settings.mask_token, settings.eod_token, AS_OPTION)
    run = _Run(files, tokenizer, settings, output_prefix)
    if found := run.finished_before():
        remove_left(output_prefix, run.plan)
        _say(progress, f"{output_prefix}: complete already for these inputs and settings; nothing to do")
        return found
    run.refuse_other_share()
    _tell_what_is_replaced(run, progress)
    goes_on = f"the same command continues from {output_prefix}.partial"
    try:
        return _make(run, str(tokenizer_path), progress)
    except OSError as error:
        raise UserError(f"{error.filename or output_prefix}: cannot write the output: {error.strerror or error}; "
                        f"when that is mended, {goes_on}") from None
    except KeyboardInterrupt:
        _say(progress, f"stopped; {goes_on}")
        raise


class _Run:
    """What determines the output, where it goes, and how it is recognised as done and made visible."""

    def __init__(self, files: list[InputFile], tokenizer: Tokenizer, settings: PreprocessSettings, prefix: str | Path):
        self.files, self.tokenizer, self.settings = files, tokenizer, settings
        self.dtype, self.total_bytes = token_dtype(tokenizer.vocabulary_size), sum(file.size for file in files)
        self.prefixes = manifests.split_prefixes(prefix, settings.validation_percent)
        self._record = manifests.TokenizerRecord(tokenizer.fingerprint, tokenizer.vocabulary_size, tokenizer.eod_id,
                                                 tokenizer.mask_id)
        share = "{}/{}".format(*settings.share)
        taken, percent = str(settings.selection), float(settings.validation_percent)
        self._settings = {split: manifests.Settings(taken, percent, split, share) for split in self.prefixes}
        # What an interrupted run has to agree in to be continued.
        self.plan = {"format": 2, "chunk_bytes": CHUNK_BYTES, "inputs": to_dict(self.files),
                     "tokenizer": self.tokenizer.fingerprint, "dtype": self.dtype.name,
                     "settings": to_dict(self._settings[TRAIN])}

    def finished_before(self) -> Manifest | None:
        """The manifest of a complete output of the same run, if it is there already. Its tokenizer is recorded anew
        where it has another mask now, or a token more, or (in data of earlier versions) is known by its file's bytes
        and not by what it does."""
        try:
            found = {split: manifests.check_files(prefix) for split, prefix in self.prefixes.items()}
        except UserError:
            return None
        for split, there in found.items():
            if there is None or (there.inputs, there.settings) != (tuple(self.files), self._settings[split]):
                return None
            if not self.tokenizer.has_fingerprint(there.tokenizer.fingerprint):
                return None
            if self.settings.on_error == "stop" and there.skipped:
                return None  # counted then; now to be stopped at
        for split, there in found.items():
            if there.tokenizer != self._record:
                found[split] = replace(there, tokenizer=self._record)
                manifests.write(manifests.manifest_path(self.prefixes[split]), found[split])
        return found[TRAIN]

    def refuse_other_share(self) -> None:
        """Raises `UserError` where another part of `--shard` has its finished output under this very name."""
        for prefix in self.prefixes.values():
            path = manifests.manifest_path(prefix)
            try:
                there, ours = manifests.read(prefix).settings.share, self._settings[TRAIN].share
            except UserError:
                continue  # none, or none that can be read
            if there != ours and there.partition("/")[2] == ours.partition("/")[2]:
                raise UserError(f"--output {self.prefixes[TRAIN]}: {path} is of --shard {there}, which --shard {ours} "
                                f"would replace; give each part an output of its own, such as {self.prefixes[TRAIN]}-"
                                f"{ours.partition('/')[0]}, then --merge them")

    def publish(self, output: "_Output", encoder: EncoderRecord) -> Manifest:
        """Refuse empty outputs; bring all to disk; then, and only then, replace what was there before."""
        _check_unchanged(self.files)
        for split, writer in output.writers.items():
            if not writer.documents and self.settings.share[1] == 1:  # one machine's part may be empty
                output.partial.remove()
                raise UserError(self._nothing_to_write(split, output.writers[TRAIN].documents, output.tally))
        written = {split: manifests.describe(writer.finish(), **output.tally.facts(split), tokenizer=self._record,
                                             settings=self._settings[split], inputs=tuple(self.files), encoder=encoder)
                   for split, writer in output.writers.items()}
        output.partial.publish(self.prefixes, written)
        return written[TRAIN]

    def _nothing_to_write(self, split: str, documents: int, tally: Tally) -> str:
        if split == VALIDATION:
            return f"none of {documents} documents fell into the validation split; raise --validation-percent"
        skipped = "; ".join(f"{reason}: {record.count}, first {record.examples[0]} ({REASONS[reason]})"
                            for reason, record in tally.skipped().items())
        by_key = [record.examples[0] for reason, record in tally.skipped().items() if reason in REASONS_OF_KEYS]
        keys = _keys(by_key[0].rpartition(":")[0], self.settings.selection) if by_key else ""
        return f"no document to write to {self.prefixes[TRAIN]}; skipped: {skipped or 'none, input empty'}{keys}"


def _keys(path: str, key: Selection) -> str:
    """What a message says of the keys in the file at `path` where `key` found no text; "" where there are none."""
    way_out = ("name what is there with --text-key and --where" if isinstance(key, Fields) and key.where else
               "name the text's with --text-key")
    return f"; the keys there are {listed(there)}: {way_out}" if (there := keys_there(path)) else ""


def _make(run: _Run, tokenizer_path: str, progress: bool) -> Manifest:
    """Steps 3 to 5."""
    settings = run.settings
    with ExitStack() as stack:
        partial = stack.enter_context(PartialRun(run.prefixes[TRAIN], run.plan))
        run.refuse_other_share()  # again: parts at the same time get the lock one after the other
        if partial.outdated:
            _say(progress, f"note: {partial.folder}: {partial.outdated} chunks were finished, but the input files have "
                 "changed since; starting over")
        # The workers start while we look at the text.
        pool = stack.enter_context(Pool(settings.workers or available_cores()))
        written = partial.left_to_publish(run.prefixes)
        if written and not (settings.on_error == "stop" and written[TRAIN].skipped):
            partial.publish(run.prefixes, written)
            _say(progress, f"{partial.folder}: all chunks were finished; the files have their names now")
            partial.remove()
            return written[TRAIN]
        encoder, why = choose_encoder(run.tokenizer, sample_texts(run.files, settings.selection), settings.encoder)
        _say(progress, f"encoding with {encoder.name} {encoder.version}: {why}")
        pool.begin("megatron_encdec.text.encode:Worker", (
            tokenizer_path, settings.mask_token, settings.eod_token, encoder.name, settings.selection,
            settings.validation_percent, str(partial.folder)))
        writers = {split: stack.enter_context(IndexedWriter(partial.folder, split, run.dtype))
                   for split in run.prefixes}
        output = _Output(partial, writers, Tally(run.prefixes, settings.on_error))
        output.take_back(progress)
        _encode_all(run, pool, output, progress)
        manifest = run.publish(output, encoder)
        partial.remove()
        return manifest


@dataclass
class _Output:
    """The files that grow in the folder of the unfinished run, and the account of what is in them."""

    partial: PartialRun
    writers: dict[str, IndexedWriter]
    tally: Tally

    @property
    def tokens(self) -> int:
        return sum(writer.tokens for writer in self.writers.values())

    def take_back(self, show: bool) -> None:
        """Take back what an interrupted run has finished, as far as its bytes are what its journal says."""
        records = self.partial.finished_chunks() if self.partial.resumed else []
        good = []
        with Progress("check finished chunks", len(records), show) as progress:
            for record in records:
                accounts = {split: record["splits"][split] for split in self.writers}
                counted = {split: (account["tokens"], account["documents"]) for split, account in accounts.items()}
                found = {split: writer.take_back(*counted[split], accounts[split]["sha256"])
                         for split, writer in self.writers.items()}
                if None in found.values():
                    break
                for split, writer in self.writers.items():
                    writer.go_on(*counted[split], found[split])
                good.append(record)
                self.tally.add(record)
                progress.update(len(good), f"{len(good)} of {len(records)}")
        for writer in self.writers.values():
            writer.cut()
        self.partial.keep_records(good)
        if good:
            documents = sum(writer.documents for writer in self.writers.values())
            _say(show, f"{self.partial.folder}: continuing after {len(good)} finished chunks ({documents:,} documents, "
                 f"{short_count(self.tokens)} tokens)")
        if len(good) < len(records):
            _say(show, f"{self.partial.folder}: chunk {len(good)} is damaged; it and {len(records) - len(good) - 1} "
                 "after it are done again")

    def append(self, answer: ChunkAccount, chunk: Chunk) -> None:
        """Add the next chunk's ids, then its line in the journal."""
        record = self.tally.named(answer, chunk)
        self.partial.check()
        for split, writer in self.writers.items():
            writer.append_file(ids_path(self.partial.folder, answer.number, split), answer.lengths[split])
            writer.flush()
        self.tally.add(record)
        self.partial.record(record)
        remove_parts(self.partial.folder, answer.number)


def _encode_all(run: _Run, pool: Pool, output: _Output, show: bool) -> None:
    tally, tokens_before = output.tally, output.tokens
    first, bytes_before = tally.chunks, tally.bytes_in
    waiting: dict[int, Chunk] = {}
    key, share = run.settings.selection, run.settings.share
    mine = share_of(list(slots(run.files, key)), *share, run.total_bytes)  # a bad Parquet file is refused at once

    def items() -> Iterator[tuple[int, Chunk]]:
        for number, chunk in enumerate(chunks(mine, output.partial.folder, key, first), start=first):
            waiting[number] = chunk
            yield number, chunk

    with Progress("preprocess", run.total_bytes // share[1], show, done=tally.consumed) as progress:
        rate = "nothing left"
        for answer in pool.map_ordered(items()):
            output.append(answer, waiting.pop(answer.number))
            seconds = progress.elapsed()
            rate = (f"{(tally.bytes_in - bytes_before) / 1e6 / seconds:.1f} MB/s · "
                    f"{short_count((output.tokens - tokens_before) / seconds)} tokens/s")
            progress.update(tally.consumed, rate)
        seconds = progress.elapsed()
    _say(show, f"read {(tally.bytes_in - bytes_before) / 1e6:,.1f} MB in {seconds:.1f} s: {rate}, "
         f"{len(pool.children)} workers")


def _check_unchanged(files: list[InputFile]) -> None:
    """Raises `UserError` where a file is not what it was when it was listed, so that it may not be all here."""
    for url in changed([Found(file.path, file.size, file.version) for file in files if is_remote(file.path)]):
        raise UserError(f"{url}: changed while it was read; run again when nothing writes to it")
    for file in files:
        if kind_of(file.path) != "hub" and os.path.exists(file.path):
            status = os.stat(file.path)
            if (status.st_size, status.st_mtime_ns) != (file.size, file.mtime_ns):
                raise UserError(f"{file.path}: changed while it was read; run again when nothing writes to it")


def _tell_what_is_replaced(run: _Run, show: bool) -> None:
    prefix = run.prefixes[TRAIN]
    if not PartialRun(prefix, run.plan).is_publishing:  # else it is this run's own, killed in the middle of that
        for path in filter(Path.exists, map(bin_path, run.prefixes.values())):
            _say(show, f"note: {path} is there, of other inputs or settings; it is replaced when the new one is "
                 "complete")
    stale = manifests.manifest_path(f"{prefix}.{VALIDATION}")
    if VALIDATION not in run.prefixes and stale.exists():
        print(f"note: {stale} is of an earlier run; its documents are now in {prefix} too", file=sys.stderr)


def ensure_tokenizer(files: list[InputFile], path: str | Path, text_key: Selection, vocabulary_size: int,
                     show: bool) -> None:
    """Train the tokenizer at `path` unless one is there: on all documents, of a large input on every n-th."""
    path = Path(path)
    if find_model_file(path):
        _say(show, f"{path}: this tokenizer is there already and is used as it is")
        return
    if path.suffix in (".json", ".model"):
        raise UserError(f"{path}: no such file; a tokenizer is trained into a directory: give its name")
    total = sum(file.size for file in files)
    every = max(1, round(total / TRAINING_BYTES))
    with Progress("train tokenizer", total, show) as progress:
        texts = islice(_all_texts(files, text_key, progress), 0, None, every)
        first = next(texts, None)
        if first is None:  # a tokenizer of bytes alone would be taken by the next command
            raise UserError(f"{path}: no text to train a tokenizer on in {files[0].path}"
                            f"{' and the other files' * (len(files) > 1)}{_keys(files[0].path, text_key)}")
        tokenizer = train_tokenizer(chain([first], texts), vocabulary_size, path)
    few = (f" (the text holds no more; {vocabulary_size} were asked for)"
           if tokenizer.vocabulary_size < vocabulary_size else "")
    which = f", on one document in {every}" if every > 1 else ""
    _say(show, f"{path}: trained a byte-level BPE of {tokenizer.vocabulary_size} entries{few}{which}")


def _all_texts(files: list[InputFile], text_key: Selection, progress: Progress) -> Iterator[str]:
    read = 0
    with tempfile.TemporaryDirectory() as spool:
        for chunk in chunks(slots(files, text_key), Path(spool), text_key):
            for part in read_chunk(chunk, text_key):
                if isinstance(part, LongDocument):
                    yield "".join(part.pieces())
                else:
                    yield from map(bytes.decode, part.texts_D)
            read += chunk.consumed
            progress.update(read, f"{read / 1e6 / progress.elapsed():.1f} MB/s read")
            if chunk.spooled:
                for path in chunk.paths:
                    Path(path).unlink()


def _say(show: bool, message: str) -> None:
    if show:
        print(message, file=sys.stderr, flush=True)
