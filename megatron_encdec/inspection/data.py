"""`inspect data PREFIX`: what is in a .bin/.idx pair, in numbers and, with a tokenizer, in words.

    1. `describe(prefix)`     statistics, with what the manifest adds
    2. `windows(...)`         the first samples as text, with what an objective does to them
    3. `unigram_entropy(...)` what a model that knows nothing but token frequencies would lose per token, in nats

Token files are streamed. Legend: L lengths that occur, V vocabulary, E document ends, P tokens of a piece.
"""

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_encdec.data.config import DataConfig, SourceConfig
from megatron_encdec.data.fingerprint import verify
from megatron_encdec.data.samples import Samples
from megatron_encdec.data.store import TokenStore
from megatron_encdec.inspection.tables import number, print_facts, print_table, say, size
from megatron_encdec.inspection.windows import indented, marks_of, show
from megatron_encdec.objectives.base import Objective, Vocabulary
from megatron_encdec.platform.errors import IntegrityError, UserError
from megatron_encdec.platform.schema import parse_yaml, to_dict
from megatron_encdec.text.manifest import check_files
from megatron_encdec.text.tokenizer import AS_OPTION, Tokenizer, load_tokenizer, require_mask

PERCENTILES = (5, 25, 50, 75, 95)
ENDS_PIECE = 1 << 24  # tokens whose document ends are looked up at once
PIECE = 1 << 20  # tokens read at once
SAMPLE_ABOVE = 200_000_000  # tokens of a source; of more than that, about that many are counted


def examine(arguments: argparse.Namespace) -> dict:
    """Statistics of the pair `arguments.prefix`, and its first samples where a tokenizer is given."""
    prefix = arguments.prefix
    for suffix in (".bin", ".idx", ".manifest.json"):  # what a shell completes
        prefix = prefix.removesuffix(suffix)
    verified = verify(prefix) if arguments.verify else None  # first: looking at the data may renew its record
    found = {**describe(prefix), "verified": verified}
    return {**found, "windows": windows(arguments, found) if arguments.tokenizer and arguments.samples else []}


def describe(prefix: str) -> dict:
    """Statistics, with what the manifest adds. Raises IntegrityError where files are missing or disagree."""
    manifest = check_files(prefix)
    store = TokenStore(prefix)
    lengths_L, documents_L = document_lengths(store)
    found = {
        "prefix": prefix, "documents": store.documents, "tokens": store.tokens, "dtype": store.dtype.name,
        "bytes": sum(Path(f"{prefix}{suffix}").stat().st_size for suffix in (".bin", ".idx")),
        "fingerprint": store.fingerprint, "empty_documents": store.documents - int(documents_L.sum()),
        "document_lengths": length_statistics(lengths_L, documents_L), "manifest": manifest is not None}
    if manifest is None:
        return found
    return {**found, "bytes_in": manifest.bytes_in,
            "bytes_per_token": manifest.bytes_in / max(1, store.tokens),
            "characters_per_token": manifest.characters / max(1, store.tokens),
            "skipped": to_dict(manifest.skipped), "losses": manifest.losses(), "tokenizer": to_dict(manifest.tokenizer),
            "settings": to_dict(manifest.settings)}


def windows(arguments: argparse.Namespace, report: dict) -> list[dict]:
    """The first `arguments.samples` samples of the data as a run would read them, as text with marks."""
    tokenizer = load_tokenizer(arguments.tokenizer, arguments.mask_token, arguments.eod_token, AS_OPTION)
    if report["manifest"]:
        tokenizer.check_wrote(report["prefix"], report["tokenizer"]["fingerprint"], "--tokenizer")
    length = arguments.sequence_length
    if report["tokens"] < length:
        raise UserError(f"{arguments.prefix}: {report['tokens']:,} tokens, less than one window of "
                        f"--sequence-length {length}")
    try:
        config = DataConfig([SourceConfig(report["prefix"])], seed=arguments.seed, sequence_length=length)
    except ValueError as error:
        raise UserError(f"inspect data: --{str(error).replace('_', '-', 1)}") from None
    samples, objective = Samples(config), None
    if arguments.objective:
        objective = Objective.from_yaml(parse_yaml(arguments.objective, "--objective"), "--objective")
        if objective.hides:
            require_mask(tokenizer)
        objective.check(Vocabulary.of(tokenizer), "--objective")
    return [_window(samples, index, objective, tokenizer) for index in range(arguments.samples)]


def _window(samples: Samples, index: int, objective: Objective | None, tokenizer: Tokenizer) -> dict:
    sample, length = samples.sample(index), samples.sequence_length
    if sample.tokens_S.min() < 0 or sample.tokens_S.max() >= tokenizer.vocabulary_size:
        raise UserError(f"--tokenizer {tokenizer.path}: has {tokenizer.vocabulary_size} tokens, the data "
                        f"holds the id {sample.tokens_S.max()}; name the tokenizer that wrote the data")
    objective = objective and objective.at(1, 1).of_sample(samples.seed, index)
    labelled = objective.apply(sample, samples.seed, Vocabulary.of(tokenizer)) if objective else None
    marks = marks_of(objective, labelled, sample, tokenizer) if objective else {}
    document_ends = samples.stores[0].document_ends(sample.window * length, length)
    return {"sample": index, "epoch": sample.epoch, "window": sample.window, "tokens": length,
            "segments": len(sample.segment_ends_E), "targets": len(labelled.positions_N) if labelled else None,
            "text": show(tokenizer, sample.tokens_S, document_ends, marks)}


def print_report(report: dict) -> None:
    """Print it in words."""
    print_facts(_facts(report))
    if lengths := report["document_lengths"]:
        print_table("\ndocument lengths in tokens", list(lengths), [[number(value, 1) for value in lengths.values()]],
                    left=0)
    for window in report["windows"]:
        targets = "" if window["targets"] is None else \
            f", {window['targets']} targets ({window['targets'] / window['tokens']:.1%})"
        say(f"sample {window['sample']} (window {window['window']:,} of the data): {window['tokens']} tokens "
            f"in {window['segments']} segment(s){targets}")
        say(indented(window["text"]) + "\n")


def _facts(report: dict) -> list[tuple[str, str]]:
    empty = f", {report['empty_documents']:,} of them empty" if report["empty_documents"] else ""
    facts = [("data", report["prefix"]), ("documents", f"{report['documents']:,}{empty}"),
             ("tokens", f"{report['tokens']:,} ({report['dtype']}, {size(report['bytes'])} with the index)"),
             ("fingerprint", report["fingerprint"])]
    if verified := report["verified"]:
        read = f"{verified['shards']:,} shard(s) and the index, {size(verified['bytes'])}"
        facts.append(("verified", f"nothing to compare with yet: {read}, hashed; kept in {verified['record']}"
                      if verified["new"] else f"{read}: all as {verified['record']} recorded"))
    if not report["manifest"]:
        return [*facts, ("manifest", "none: written by another tool, or a copy without it")]
    tokenizer, settings = report["tokenizer"], report["settings"]
    facts += [
        ("input", f"{size(report['bytes_in'])}, {settings['split']} split, {report['bytes_per_token']:.2f} "
                  f"bytes and {report['characters_per_token']:.2f} characters a token"),
        ("tokenizer", f"{tokenizer['vocabulary_size']:,} tokens, end of document {tokenizer['eod_id']}, mask "
                      f"{'none' if tokenizer['mask_id'] is None else tokenizer['mask_id']}, fingerprint "
                      f"{tokenizer['fingerprint'][:12]}")]
    skipped = [("skipped", f"{reason}: {one['count']:,} document(s), first {', '.join(one['examples'])}")
               for reason, one in report["skipped"].items()]
    lost = [("lost", f"{loss.replace('_', ' ')}: {count:,}") for loss, count in report["losses"].items() if count]
    return facts + (skipped or [("skipped", "nothing")]) + lost


def document_lengths(store: TokenStore) -> tuple[np.ndarray, np.ndarray]:
    """lengths_L ascending, documents_L of that length; empty documents are not among them."""
    found: Counter[int] = Counter()
    previous = 0  # where the document under way began
    for start in range(0, store.tokens, ENDS_PIECE):
        ends_E = start + store.document_ends(start, min(ENDS_PIECE, store.tokens - start))
        if len(ends_E):
            lengths, documents = np.unique(np.diff(ends_E, prepend=previous), return_counts=True)
            found.update(dict(zip(lengths.tolist(), documents.tolist(), strict=True)))
            previous = int(ends_E[-1])
    lengths_L = np.array(sorted(found), dtype=np.int64)
    return lengths_L, np.array([found[length] for length in lengths_L.tolist()], dtype=np.int64)


def length_statistics(lengths_L: np.ndarray, documents_L: np.ndarray) -> dict:
    """Mean, extremes and percentiles (nearest rank) in tokens; empty where there is no document."""
    if not len(lengths_L):
        return {}
    found = np.percentile(lengths_L, PERCENTILES, weights=documents_L, method="inverted_cdf")
    return {"mean": float(np.average(lengths_L, weights=documents_L)), "min": int(lengths_L[0]),
            **{f"p{percent}": int(length) for percent, length in zip(PERCENTILES, found, strict=True)},
            "max": int(lengths_L[-1])}


def count_tokens(store: TokenStore, vocabulary_size: int, limit: int = SAMPLE_ABOVE) -> np.ndarray:
    """counts_V (int64) of at most about `limit` tokens, in pieces spread evenly over the store; IntegrityError where an
    id lies outside the vocabulary."""
    counts_V = np.zeros(vocabulary_size, dtype=np.int64)
    pieces = -(-store.tokens // PIECE)
    kept = pieces if store.tokens <= limit else max(1, limit // PIECE)
    for start in (piece * pieces // kept * PIECE for piece in range(kept)):
        tokens_P = store.read(start, min(PIECE, store.tokens - start))
        outside = (tokens_P < 0) | (tokens_P >= vocabulary_size)
        if outside.any():
            raise IntegrityError(f"{store.prefix}.bin: token {start + int(outside.argmax())} has the id "
                                 f"{tokens_P[outside][0]}, outside the vocabulary of {vocabulary_size}")
        counts_V += np.bincount(tokens_P, minlength=vocabulary_size)
    return counts_V


def unigram_entropy(stores: Sequence[TokenStore], weights: Sequence[float], vocabulary_size: int,
                    limit: int = SAMPLE_ABOVE) -> dict:
    """`nats` of one token drawn as training draws it: a source by its weight, then a token of it. `tokens`: of all
    sources; `counted`: those that were looked at."""
    counted, share_V = 0, np.zeros(vocabulary_size)
    for store, weight in zip(stores, weights, strict=True):
        counts_V = count_tokens(store, vocabulary_size, limit)
        counted += int(counts_V.sum())
        share_V += weight * counts_V / max(1, counts_V.sum())
    share_V /= share_V.sum()
    present_V = share_V[share_V > 0]
    return {"nats": float(-(present_V * np.log(present_V)).sum()), "counted": counted,
            "tokens": sum(store.tokens for store in stores)}
