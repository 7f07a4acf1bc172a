"""The account of a preprocessing run, summed over its chunks: nothing is lost between input and manifest.

    1. `named(account, chunk)`   a worker's account with file names and line numbers, as the journal keeps it
    2. `add(record)`             sum it up; `on_error: stop` stops here
    3. `manifest(split, ...)`    what the manifest says
"""

from dataclasses import asdict

from megatron_encdec.platform.errors import UserError
from megatron_encdec.text import manifest as manifests
from megatron_encdec.text.chunks import Chunk
from megatron_encdec.text.encode import EXAMPLES_KEPT, TRAIN, ChunkAccount
from megatron_encdec.text.indexed import IndexedWriter
from megatron_encdec.text.losses import Losses
from megatron_encdec.text.manifest import Manifest, Skipped


class Tally:
    """Sums over finished chunks: `chunks`, `consumed` (bytes on disk), `bytes_in` (decompressed)."""

    def __init__(self, splits, on_error: str = "count"):
        self.chunks = self.consumed = self.bytes_in = self.unproven = 0
        self._line = 0  # of the file under way, where the next chunk begins
        self._stop = on_error == "stop"
        self._splits = {split: {"bytes_in": 0, "characters": 0, **asdict(Losses())} for split in splits}
        self._skipped: dict[str, tuple[int, list[str]]] = {}

    def named(self, account: ChunkAccount, chunk: Chunk) -> dict:
        """`account` as plain data, its examples as "file:line"; `line` is where the next chunk's lines begin."""
        base = 0 if chunk.first else self._line
        record = account.record()
        record["line"] = base + account.lines

        def place(file: int, line: int) -> str:
            return f"{chunk.names[file]}:{line + (0 if chunk.kind == 'texts' else base)}"

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
            before, kept = self._skipped.get(reason, (0, []))
            self._skipped[reason] = (before + count, [*kept, *examples][:EXAMPLES_KEPT])
            self._splits[TRAIN]["bytes_in"] += size
            self.bytes_in += size

    def skipped(self) -> dict[str, Skipped]:
        """By reason: how many documents, the first few as "file:line"."""
        return {reason: Skipped(count, tuple(examples))
                for reason, (count, examples) in sorted(self._skipped.items())}

    def manifest(self, split: str, output: IndexedWriter, tokenizer: manifests.TokenizerRecord,
                 settings: manifests.Settings, inputs: tuple, encoder: manifests.EncoderRecord) -> Manifest:
        """Finish `output` and describe it; skipped documents are counted with the train split."""
        return manifests.describe(output.finish(), output.dtype.name, **self._splits[split],
                                  skipped=self.skipped() if split == TRAIN else {}, tokenizer=tokenizer,
                                  settings=settings, inputs=inputs, encoder=encoder,
                                  unproven_cuts=self.unproven if split == TRAIN else 0)
