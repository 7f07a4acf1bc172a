"""The account of a preprocessing run: nothing is lost between input and manifest.

    1. `ChunkAccount`                  a worker's: what became of the documents of one chunk
    2. `Tally.named(account, chunk)`   with file names and line numbers, as the journal keeps it
    3. `Tally.add(record)`             summed over the chunks; `on_error: stop` stops here
    4. `Tally.facts(split)`            what the manifest says
"""

from dataclasses import asdict, dataclass, field

import numpy as np

from megatron_encdec.platform.errors import UserError
from megatron_encdec.text.chunks import Chunk
from megatron_encdec.text.manifest import LOSSES, TRAIN, Skipped

EXAMPLES_KEPT = 3  # of documents skipped for one reason
SUMMED = ("bytes_in", "characters", *LOSSES)


@dataclass
class Account:
    """A chunk's documents in one split, and what the tokenizer lost of them (`manifest.LOSSES`)."""

    documents: int = 0
    tokens: int = 0
    bytes_in: int = 0
    characters: int = 0
    sha256: str = ""  # of the ids
    special_tokens_in_text: int = 0
    unknown_tokens: int = 0
    dropped_characters: int = 0


@dataclass
class ChunkAccount:
    """A worker's answer. `skipped`: reason -> (count, bytes, first (file, line)s)."""

    number: int
    consumed: int
    lines: int = 0
    unproven: int = 0  # cuts inside long documents that the tokenizer does not make by itself
    splits: dict[str, Account] = field(default_factory=dict)
    skipped: dict[str, tuple[int, int, list[tuple[int, int]]]] = field(default_factory=dict)
    lengths: dict[str, np.ndarray] = field(default_factory=dict)  # tokens of each document; not in the journal


class Tally:
    """Sums over finished chunks: `chunks`, `consumed` (bytes on disk), `bytes_in` (decompressed), `unproven`."""

    def __init__(self, splits, on_error: str = "count"):
        self.chunks = self.consumed = self.bytes_in = self.unproven = 0
        self._line = 0  # of the file under way, where the next chunk begins
        self._stop = on_error == "stop"
        self._splits = {split: dict.fromkeys(SUMMED, 0) for split in splits}
        self._skipped: dict[str, Skipped] = {}

    def named(self, account: ChunkAccount, chunk: Chunk) -> dict:
        """`account` as plain data, its examples as "file:line"; `line` is where the next chunk's lines begin."""
        base = 0 if chunk.first else self._line

        def place(file: int, line: int) -> str:
            return f"{chunk.names[file]}:{line + (0 if chunk.kind == 'texts' else base)}"

        record = asdict(account) | {"line": base + account.lines}
        del record["lengths"]
        record["skipped"] = {reason: (count, size, [place(*where) for where in first])
                             for reason, (count, size, first) in account.skipped.items()}
        if account.skipped:
            where, reason = min((first[0], reason) for reason, (_, _, first) in account.skipped.items())
            record["first_skipped"] = f"{place(*where)}: {reason}"
        return record

    def add(self, record: dict) -> None:
        """Count a chunk. Raises `UserError` at the first skipped document where that is wanted."""
        if self._stop and record["skipped"]:
            raise UserError(f"{record['first_skipped']}: this document cannot be used; mend it, or leave out "
                            "--on-error stop to count such documents and go on")
        self.chunks += 1
        self.consumed += record["consumed"]
        self.unproven += record["unproven"]
        self._line = record["line"]
        for split, sums in self._splits.items():
            for key in sums:
                sums[key] += record["splits"][split][key]
            self.bytes_in += record["splits"][split]["bytes_in"]
        for reason, (count, size, examples) in record["skipped"].items():
            self._skipped[reason] = add_skipped(self._skipped.get(reason), Skipped(count, tuple(examples)))
            self._splits[TRAIN]["bytes_in"] += size
            self.bytes_in += size

    def skipped(self) -> dict[str, Skipped]:
        """By reason, sorted."""
        return dict(sorted(self._skipped.items()))

    def facts(self, split: str) -> dict:
        """What a manifest says of the documents of `split`; skipped ones are counted with the train split."""
        train = split == TRAIN
        return {**self._splits[split], "skipped": self.skipped() if train else {},
                "unproven_cuts": self.unproven if train else 0}


def add_skipped(before: Skipped | None, more: Skipped) -> Skipped:
    """Both together, with the first few examples."""
    if before is None:
        return more
    return Skipped(before.count + more.count, (*before.examples, *more.examples)[:EXAMPLES_KEPT])
