"""Hugging Face tensors as the boxes of a checkpoint, one at a time: no model is ever whole in memory.

    1. `Conversion(...)`       checks every name and shape against the name table; nothing is read yet
    2. `share(rank, ranks)`    the boxes that one rank reads and writes, by size, so that all have about as much
    3. `boxes(units)`          each unit read, joined, and handed on as a `Shard`

A unit is one trunk tensor of one layer, or some rows of a vocabulary table, so memory is that of the largest layer
tensor or `TABLE_BYTES`, whichever is more. The rows of a mask that was added, or never trained, are the mean of the
table's rows (mask_token.py).

Legend: V vocabulary rows, H hidden size.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from megatron_encdec.engine.shards import Shard
from megatron_encdec.interop.mask_token import Mask
from megatron_encdec.interop.names import NameTable, Row, check_names, expand, pad_vocabulary
from megatron_encdec.interop.tensor_files import TensorFiles
from megatron_encdec.model.config import ModelConfig
from megatron_encdec.model.initial import normal_slice
from megatron_encdec.platform.errors import UserError

TABLE_BYTES = 64 << 20
UNTRAINED = 0.01  # a row's norm relative to the mean norm: below it, training never touched it
_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.")
_BODY = ("model.", "layers.", "embed_tokens.", "norm.")
_BUFFERS = re.compile(r"(^|\.)rotary_emb\.inv_freq$")  # old checkpoints store what follows from the config


@dataclass(frozen=True)
class Unit:
    """A trunk tensor, or rows `start` .. `stop` - 1 of it, and what it is made of."""

    ours: str
    theirs: tuple[str, ...]
    row: Row
    start: int
    stop: int
    bytes: int


class Conversion:
    """From `files` to the trunk of `model`, whose vocabulary may have more rows than theirs: the mask's.

    new_head: the files have no language-model head; an untied trunk gets a random one. `dropped`: tensors that have
    no place in a trunk and are left out (a task's head, by `new_head` alone).
    """

    def __init__(self, files: TensorFiles, names: NameTable, model: ModelConfig, source_rows: int, mask: Mask,
                 known_rows: int, new_head: bool = False, seed: int = 0):
        self.files, self.model, self.mask = files, model, mask
        self._source_rows, self._known_rows = source_rows, known_rows
        self._prefix = "" if any(name.startswith("model.") for name in files.places) else "model."
        self._seed = seed
        source = replace(model, vocabulary_size=source_rows)
        self._table = list(expand(names, source))
        self.dropped = self._check(names, source, new_head)
        self.dtype = _dtype(files, [self._there(name) for _, theirs, _ in self._table for name in theirs])

    def _there(self, name: str) -> str:
        """The name in the files; a body saved alone lacks the prefix."""
        return name.removeprefix(self._prefix)

    def _check(self, names: NameTable, source: ModelConfig, new_head: bool) -> list[str]:
        """Refuse what is missing, has no place, or has the wrong shape; names that are left out."""
        expected = {self._there(name): shape for _, theirs, row in self._table
                    for name, shape in zip(theirs, row.shapes(source), strict=True)}
        found = {name for name in self.files.places if not _BUFFERS.search(name)}
        head, embedding = names.tied
        if source.tied_embeddings:
            if head in found:
                self._check_tied(head, self._there(embedding))
            found.discard(head)
        dropped = []
        if new_head:
            dropped = sorted(name for name in found - expected.keys() if not name.startswith(_BODY))
            found -= set(dropped)
            if head not in found:
                expected.pop(head, None)
        where = f"{self.files.files[0].parent}: what config.json describes"
        check_names(found, expected, where)
        for name, shape in expected.items():
            if self.files.places[name].shape != shape:
                raise UserError(f"{self.files.places[name].file}: {name} has the shape "
                                f"{list(self.files.places[name].shape)}, config.json asks for {list(shape)}")
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

    def units(self) -> list[Unit]:
        """All of the work."""
        found = []
        for ours, theirs, row in self._table:
            if row.join is not pad_vocabulary:
                size = sum(self.files.places[self._there(name)].bytes for name in theirs)
                found.append(Unit(ours, theirs, row, 0, 0, size))
                continue
            rows = self.model.padded_vocabulary_size
            row_bytes = self.model.hidden_size * self.dtype.itemsize
            found += [Unit(ours, theirs, row, start, stop, (stop - start) * row_bytes)
                      for start, stop in _row_ranges(rows, rows * row_bytes)]
        return found

    def share(self, rank: int, ranks: int) -> list[Unit]:
        """The units of one rank: the largest first, each to the rank that has least."""
        shares: list[list[Unit]] = [[] for _ in range(ranks)]
        sizes = [0] * ranks
        for unit in sorted(self.units(), key=lambda unit: (-unit.bytes, unit.ours, unit.start)):
            least = sizes.index(min(sizes))
            shares[least].append(unit)
            sizes[least] += unit.bytes
        return sorted(shares[rank], key=lambda unit: (unit.ours, unit.start))

    def boxes(self, units: list[Unit]) -> Iterator[Shard]:
        """The boxes of `units`, each made when it is asked for."""
        for unit in units:
            layer = _LAYER.match(unit.ours)
            if unit.row.join is pad_vocabulary:
                values = self._table_rows(unit)
                shape, offset = (self.model.padded_vocabulary_size, *values.shape[1:]), (unit.start, 0)
            else:
                parts = tuple(self.files.read(self._there(name)) for name in unit.theirs)
                values = unit.row.join(parts, self.model)
                del parts
                shape, offset = tuple(values.shape), (0,) * values.dim()
            key = unit.ours
            if layer:
                key = unit.ours.replace(f".{layer[1]}.", ".", 1)
                shape, offset = (self.model.num_layers, *shape), (int(layer[1]), *offset)
                values = values[None]
            yield Shard(key, shape, offset, values.to(self.dtype).contiguous())
            del values

    def _table_rows(self, unit: Unit) -> torch.Tensor:
        """Rows `start` .. of a vocabulary table: theirs, the mask's, zeros."""
        name, there = self._there(unit.theirs[0]), min(unit.stop, self._source_rows)
        if name not in self.files.places:
            return self._new_head(unit)
        rows = [self.files.read(name, unit.start, there)] if there > unit.start else []
        width = self.model.hidden_size
        rows.append(torch.zeros(unit.stop - max(there, unit.start), width, dtype=self.files.places[name].dtype))
        values = torch.cat(rows)
        mask = self.mask.id
        if mask is not None and unit.start <= mask < unit.stop:
            row = self.mask_row(name)
            if row is not None:
                values[mask - unit.start] = row
        return values

    def mask_row(self, name: str) -> torch.Tensor | None:
        """What stands in the mask's row of the table `name` instead of theirs; None where theirs stays."""
        mask = self.mask.id
        if self.mask.kind in ("own", "none"):
            return None
        mean, mean_norm = self._statistics(name)
        if mask < self._known_rows and self.files.read(name, mask, mask + 1).float().norm() >= UNTRAINED * mean_norm:
            return None
        return mean.to(self.files.places[name].dtype)

    def replaced_rows(self) -> dict[str, torch.Tensor]:
        """Table name in the name table -> their own row where the mask's stands now: what an exact way back needs."""
        mask, found = self.mask.id, {}
        for _, theirs, row in self._table:
            name = self._there(theirs[0])
            if row.join is pad_vocabulary and mask is not None and mask < self._source_rows and (
                    name in self.files.places and self.mask_row(name) is not None):
                found[theirs[0]] = self.files.read(name, mask, mask + 1)[0]
        return found

    def _new_head(self, unit: Unit) -> torch.Tensor:
        """Rows of a random head, as a new trunk would have them."""
        shape = (self.model.padded_vocabulary_size, self.model.hidden_size)
        drawn = normal_slice(self._seed, unit.ours, shape, (unit.start, 0), (unit.stop - unit.start, shape[1]))
        return torch.from_numpy(drawn).mul_(self.model.init_std)

    def _statistics(self, name: str) -> tuple[torch.Tensor, float]:
        """Mean [H] of the known tokens' rows, and the mean of their norms."""
        total, norms = torch.zeros(self.model.hidden_size, dtype=torch.float64), 0.0
        rows = min(self._known_rows, self._source_rows)
        for start, stop in _row_ranges(rows, rows * self.model.hidden_size * 4):
            values = self.files.read(name, start, stop).float()
            total += values.sum(dim=0, dtype=torch.float64)
            norms += values.norm(dim=1).double().sum().item()
        return total / rows, norms / rows


def _row_ranges(rows: int, size: int) -> list[tuple[int, int]]:
    """`rows` rows of `size` bytes in all, cut into ranges of at most `TABLE_BYTES`."""
    step = max(1, rows // math.ceil(max(size, 1) / TABLE_BYTES))
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]


def _dtype(files: TensorFiles, names: list[str]) -> torch.dtype:
    """What all tensors are stored in; fp32 where they are mixed, so that nothing is rounded."""
    found = {files.places[name].dtype for name in names if name in files.places}
    return found.pop() if len(found) == 1 else torch.float32
