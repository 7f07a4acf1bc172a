"""Checkpoints of one shape merged into a run directory, whose checkpoint of step 0 has no optimizer.

    RUN_DIR/
      config.yaml                 model, tokenizer, sequence length; data and phases are the user's to add
      checkpoints/step_00000000/  the merged weights
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import yaml

from megatron_encdec.engine.boxes import STATE_PREFIX, Box
from megatron_encdec.engine.checkpoint import RunState, versions
from megatron_encdec.engine.integrity import check
from megatron_encdec.engine.saver import Saver
from megatron_encdec.engine.storage import read_boxes, stored_dtypes
from megatron_encdec.interop.conversion import placed
from megatron_encdec.interop.families import choose
from megatron_encdec.interop.merging import Recipe, blocks, check_same, check_shapes
from megatron_encdec.interop.names import ROWS, VOCABULARY, Row, expand
from megatron_encdec.interop.source import Source, find, one_rank
from megatron_encdec.platform import schema
from megatron_encdec.platform.errors import UserError
from megatron_encdec.rundir.directories import new_directory
from megatron_encdec.rundir.files import write_atomic
from megatron_encdec.rundir.lineage import history_hash


class RunWeights:
    """A checkpoint's weights, of its fp32 masters where it has some; names and layers as the trunk has them."""

    def __init__(self, source: Source):
        check(source.checkpoint)
        self.source, model = source, source.model
        self._stored = stored_dtypes(source.checkpoint)
        self._rows = {ours: row for ours, _, row in expand(model, _table(source))}
        self.shapes, self.dtypes = {}, {}
        for ours, row in self._rows.items():
            shapes = row.shapes(model)
            rows = model.padded_vocabulary_size if row.layout is VOCABULARY else sum(shape[0] for shape in shapes)
            self.shapes[ours] = (rows, *shapes[0][1:])
            self.dtypes[ours] = self._stored.get(self._key(ours)) or torch.float32

    def _key(self, name: str) -> str:
        key = placed(name, self.source.model, (1,), 0)[0]
        master = f"{STATE_PREFIX}.param.{key}"
        return master if master in self._stored else key

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows `start` .. `stop` - 1, in fp32."""
        _, shape, offset = placed(name, self.source.model, self.shapes[name], start)
        values = torch.empty(stop - start, *self.shapes[name][1:])
        inner = values[None] if len(shape) > values.dim() else values
        read_boxes(self.source.checkpoint, [Box(self._key(name), shape, offset, inner)])
        return values

    def parts(self, name: str) -> torch.Tensor | None:
        """[R]: which of the Hugging Face tensors a row is of; the rows beyond the vocabulary are of none."""
        count = self.shapes[name][0]
        indices = self._rows[name].layout.split(torch.arange(count), self.source.model)
        if len(indices) == 1 and len(indices[0]) == count:
            return None
        parts_R = torch.full((count,), len(indices))
        for number, rows in enumerate(indices):
            parts_R[rows] = number
        return parts_R


def _table(source: Source) -> Sequence[Row]:
    """The tensors as the checkpoint's export has them; where no class holds the trunk, as Llama would."""
    imported = source.imported and source.imported["as"]
    try:
        return choose("auto", source.state.objective, source.model, imported).family.rows
    except UserError:
        return ROWS


def merge_runs(models: Sequence[str], out: Path, recipe: Recipe) -> list[str]:
    """The run directory `out`; lines that say what it is."""
    sources = [find(model) for model in models]
    for one, name in zip(sources[1:], models[1:], strict=True):
        check_same(name, models[0], _about(one), _about(sources[0]))
    weights = [RunWeights(source) for source in sources]
    check_shapes(weights, models)
    first, history = sources[0], {
        "step": 0, "model": sources[0].model.identity(), "phases": [],
        "merged": {**recipe.as_dict(), "of": [{"step": one.state.step, "history_hash": one.state.history_hash}
                                              for one in sources]}}
    with new_directory(out, "merge") as work:
        with one_rank() as topology:
            state = RunState(
                step=0, phase=0, phase_name="merge", objective=first.state.objective, samples=0, tokens=0, targets=0,
                history_hash=history_hash(history), history=history, data_fingerprints=[],
                tokenizer_fingerprint=first.state.tokenizer_fingerprint, topology=topology.as_dict(),
                versions=versions(), merged={**history["merged"], "models": list(models)})
            saver = Saver(work / "checkpoints", None, None, keep=1, asynchronous=False)
            event = saver.save_boxes(state, _boxes(weights, recipe))
        if event.error:
            raise UserError(f"{out}: {event.error}")
        write_atomic(work / "config.yaml", yaml.safe_dump(_config(first, out), sort_keys=False))
    return [f"{out}: {recipe.told(models)}, {first.model.parameter_count():,} parameters; the first's objective "
            f"is {first.state.objective}",
            f"train on from it with run.from.path={out} run.from.state=weights model.run={out}, or export it"]


def _about(source: Source) -> dict:
    """What has to be the same; the tokenizer's fingerprint leaves out special tokens, so the mask is named."""
    return {"model": source.model.identity(), "tokenizer": source.state.tokenizer_fingerprint,
            "mask": source.tokenizer and source.tokenizer.mask_id}


def _boxes(weights: list[RunWeights], recipe: Recipe) -> Iterator[Box]:
    """The merged checkpoint, some rows at a time."""
    model = weights[0].source.model
    for name, shape in weights[0].shapes.items():
        for start, rows in blocks(weights, name, recipe):
            key, whole, offset = placed(name, model, shape, start)
            yield Box(key, whole, offset, rows[None] if len(whole) > rows.dim() else rows)


def _config(first: Source, out: Path) -> dict:
    """config.yaml: the trunk and the tokenizer; data and phases are the user's to add."""
    model, tokenizer = first.model, first.config.tokenizer
    config = {"run": {"dir": str(out)},
              "tokenizer": {**schema.to_dict(tokenizer), "path": os.path.abspath(tokenizer.path)},
              "data": {"sequence_length": first.sequence_length},
              "model": {key: value for key, value in schema.to_dict(model).items() if value not in (None, [])}}
    if model.rope_scaling is not None:
        config["model"]["rope_scaling"] = model.rope_scaling.given
    return config
