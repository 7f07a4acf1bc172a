"""Hugging Face tensors as the boxes of a checkpoint, one at a time: no model is ever whole in memory.

    1. `Conversion(...)`       checks every name and shape against the name table; nothing is read yet
    2. `share(rank, ranks)`    the units that one rank reads and writes, by size, so that all have about as much
    3. `box(unit)`             read, joined, and handed on as a box of the checkpoint

A unit is one trunk tensor of one layer, or some rows of a vocabulary table, so memory is that of the largest layer
tensor or `TABLE_BYTES`, whichever is more. The rows of a mask that was added, or never trained, are the mean of the
table's rows (mask_token.py); in a bias over the vocabulary it goes the way of the embeddings.
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from megatron_encdec.engine.boxes import Box
from megatron_encdec.engine.integrity import fair_shares
from megatron_encdec.interop.mask_token import Mask
from megatron_encdec.interop.names import VOCABULARY, Row, check_names, expand, tied_names
from megatron_encdec.interop.source_files import TensorFiles
from megatron_encdec.model.config import ModelConfig
from megatron_encdec.model.trunk import normal_slice
from megatron_encdec.platform.errors import UserError

TABLE_BYTES = 64 << 20
UNTRAINED = 0.01  # a row's norm relative to the mean norm: below it, training never touched it
_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.")
_BUFFERS = re.compile(r"(^|\.)rotary_emb\.inv_freq$")  # old checkpoints store what follows from the config


@dataclass(frozen=True)
class Unit:
    """A trunk tensor, or rows `start` .. `stop` - 1 of it, and what it is made of."""

    ours: str
    theirs: tuple[str, ...]  # as the files have them
    row: Row
    start: int
    stop: int
    bytes: int


class Conversion:
    """From `files` to the trunk of `model`, whose vocabulary may have more rows than their `source_rows`: the mask's.

    rows: the family's name table. new_head: the files have no language-model head; what is not there of it is drawn.
    `dropped`: tensors that have no place in a trunk and are left out (a task's head, by `new_head` alone).
    """

    def __init__(self, files: TensorFiles, model: ModelConfig, rows: Sequence[Row], source_rows: int, mask: Mask,
                 known_rows: int, new_head: bool = False):
        self.files, self.model, self.mask = files, model, mask
        self._source_rows, self._known_rows = source_rows, known_rows
        prefix = "" if any(name.startswith("model.") for name in files.places) else "model."  # a body saved alone
        source = replace(model, vocabulary_size=source_rows)
        self._table = [(ours, tuple(name.removeprefix(prefix) for name in theirs), row)
                       for ours, theirs, row in expand(source, rows)]
        head, self._embeddings = (name.removeprefix(prefix) for name in tied_names(rows))
        self.dropped = self._check(head, source, new_head)
        stored = {files.places[name].dtype for _, theirs, _ in self._table for name in theirs if name in files.places}
        # fp32 where they are mixed, so that nothing is rounded
        self.dtype = stored.pop() if len(stored) == 1 else torch.float32

    def _check(self, head: str, source: ModelConfig, new_head: bool) -> list[str]:
        """Refuse what is missing, has no place, or has the wrong shape; returns the names that are left out."""
        places = self.files.places
        expected = {name: shape for _, theirs, row in self._table
                    for name, shape in zip(theirs, row.shapes(source), strict=True)}
        found, dropped = {name for name in places if not _BUFFERS.search(name)}, []
        if source.tied_embeddings and head in found:
            self._check_tied(head, self._embeddings)
            found.discard(head)
        if new_head:
            of_head = {name for _, theirs, row in self._table if row.head for name in theirs}
            body = {name.removeprefix("model.").partition(".")[0] for name in expected.keys() - of_head} | {"model"}
            dropped = sorted(name for name in found - expected.keys() if name.partition(".")[0] not in body)
            found -= set(dropped)
            expected = {name: shape for name, shape in expected.items() if name in found or name not in of_head}
        check_names(found, expected, f"{self.files.files[0].parent}: what config.json describes")
        for name, shape in expected.items():
            if places[name].shape != shape:
                raise UserError(f"{places[name].file}: {name} has the shape {list(places[name].shape)}, config.json "
                                f"asks for {list(shape)}")
        return dropped

    def _check_tied(self, head: str, embedding: str) -> None:
        places = self.files.places
        same = embedding in places and places[head].shape == places[embedding].shape and all(
            torch.equal(self.files.read(head, *rows), self.files.read(embedding, *rows))
            for rows in _row_ranges(places[head].shape[0], places[head].bytes))
        if not same:
            raise UserError(f"{places[head].file}: {head} differs from {embedding}, but config.json has "
                            "tie_word_embeddings true; with false there both are taken as they are, as transformers "
                            "takes them")

    def share(self, rank: int, ranks: int) -> list[Unit]:
        units = {(unit.ours, unit.start): unit for unit in self._units()}
        sizes = {key: unit.bytes for key, unit in units.items()}
        return [units[key] for key in fair_shares(sizes, ranks)[rank]]

    def _units(self) -> Iterator[Unit]:
        rows = self.model.padded_vocabulary_size
        for ours, theirs, row in self._table:
            shapes = row.shapes(self.model)
            if row.layout is VOCABULARY:
                row_bytes = math.prod(shapes[0][1:]) * self.dtype.itemsize
                for start, stop in _row_ranges(rows, rows * row_bytes):
                    yield Unit(ours, theirs, row, start, stop, (stop - start) * row_bytes)
            else:
                yield Unit(ours, theirs, row, 0, 0, sum(map(math.prod, shapes)) * self.dtype.itemsize)

    def box(self, unit: Unit) -> Box:
        if unit.row.layout is VOCABULARY:
            values = self._table_rows(unit)
            shape = (self.model.padded_vocabulary_size, *values.shape[1:])
        elif unit.theirs[0] not in self.files.places:
            (shape,) = unit.row.shapes(self.model)
            values = self._drawn(unit.ours, shape, 0, shape[0])
        else:
            values = unit.row.layout.join(tuple(map(self.files.read, unit.theirs)), self.model)
            shape = tuple(values.shape)
        key, shape, offset = placed(unit.ours, self.model, shape, unit.start)
        values = values[None] if len(shape) > values.dim() else values
        return Box(key, shape, offset, values.to(self.dtype).contiguous())

    def _table_rows(self, unit: Unit) -> torch.Tensor:
        """Rows `start` .. of a vocabulary table: theirs, the mask's, zeros; drawn ones of a head that is not there."""
        (name,), there = unit.theirs, min(unit.stop, self._source_rows)
        width = unit.row.shapes(self.model)[0][1:]
        if name not in self.files.places:
            return self._drawn(unit.ours, (self.model.padded_vocabulary_size, *width), unit.start, unit.stop)
        rows = [self.files.read(name, unit.start, there)] if there > unit.start else []
        rows.append(torch.zeros(unit.stop - max(there, unit.start), *width, dtype=self.files.places[name].dtype))
        values, mask = torch.cat(rows), self.mask.id
        if mask is not None and unit.start <= mask < unit.stop and (row := self._mask_row(name)) is not None:
            values[mask - unit.start] = row
        return values

    def _drawn(self, ours: str, shape: tuple[int, ...], start: int, stop: int) -> torch.Tensor:
        """Rows `start` .. `stop` - 1 of a part of the head that is not there, as random weights begin."""
        if len(shape) == 1:
            return torch.full((stop - start,), 0.0 if ours.endswith(".bias") else self.model.initial_norm)
        drawn = normal_slice(0, ours, shape, (start, 0), (stop - start, shape[1]))
        return torch.from_numpy(drawn).mul_(self.model.init_std)

    def _mask_row(self, name: str) -> torch.Tensor | None:
        """What stands in the mask's row of the table `name` instead of theirs; None where theirs stays."""
        if self.mask.kind in ("own", "none"):
            return None
        width = self.files.places[name].shape[1:]
        if not width and self._mask_row(self._embeddings) is None:
            return None
        mask, total, norms = self.mask.id, torch.zeros(width, dtype=torch.float64), 0.0
        known = min(self._known_rows, self._source_rows)
        for start, stop in _row_ranges(known, known * math.prod(width) * 4):
            values = self.files.read(name, start, stop).float()
            total += values.sum(dim=0, dtype=torch.float64)
            norms += values.flatten(1).norm(dim=1).double().sum().item() if width else 0.0
        trained = UNTRAINED * norms / known
        if width and mask < self._known_rows and self.files.read(name, mask, mask + 1).float().norm() >= trained:
            return None
        return (total / known).to(self.files.places[name].dtype)

    def replaced_rows(self) -> dict[str, torch.Tensor]:
        """Table name in the name table -> their own row where the mask's stands now: what an exact way back needs."""
        mask, found = self.mask.id, {}
        for _, (name, *_), row in self._table:
            if (row.layout is VOCABULARY and mask is not None and mask < self._source_rows
                    and name in self.files.places and self._mask_row(name) is not None):
                found[row.theirs[0]] = self.files.read(name, mask, mask + 1)[0]
        return found


def placed(ours: str, model: ModelConfig, shape: tuple[int, ...],
           start: int) -> tuple[str, tuple[int, ...], tuple[int, ...]]:
    """Where rows from `start` on of the trunk tensor `ours`, of `shape`, lie in a checkpoint, which stacks layers:
    (key, global shape, offset)."""
    layer, offset = _LAYER.match(ours), (start, *[0] * (len(shape) - 1))
    if not layer:
        return ours, shape, offset
    return ours.replace(f".{layer[1]}.", ".", 1), (model.num_layers, *shape), (int(layer[1]), *offset)


def _row_ranges(rows: int, size: int) -> list[tuple[int, int]]:
    """`rows` rows of `size` bytes in all, cut into ranges of at most `TABLE_BYTES`."""
    step = max(1, rows // math.ceil(max(size, 1) / TABLE_BYTES))
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]
