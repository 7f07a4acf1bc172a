"""A Hugging Face directory as a run directory with a checkpoint at step 0: complete or absent.

    RUN_DIR/
      config.yaml                 model, tokenizer, sequence length; data and phases are the user's to add
      checkpoints/step_00000000/  the weights in the dtype that they came in, no optimizer
      tokenizer/                  with its mask token (mask_token.py)
      source/                     config.json, generation_config.json, tokenizer as they came: the exact way back

    1. `read_source`, `TensorFiles`, `Conversion`   everything that can be refused, before anything is written
    2. tokenizer and mask                           into a directory beside RUN_DIR
    3. weights                                      every rank reads and writes its share, a tensor at a time
    4. rename

Any number of ranks gives the same checkpoint, and any topology loads it.
"""

import os
import shlex
import shutil
import sys
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
import yaml
from safetensors.torch import save_file

from megatron_encdec.engine.boxes import Box
from megatron_encdec.engine.checkpoint import RunState, versions
from megatron_encdec.engine.saver import Saver
from megatron_encdec.interop.conversion import Conversion
from megatron_encdec.interop.hugging_face import DTYPES
from megatron_encdec.interop.mask_token import KINDS, Mask, choose_mask, write_with_mask
from megatron_encdec.interop.source import groups
from megatron_encdec.interop.source_config import SourceModel, read_source
from megatron_encdec.interop.source_files import TensorFiles, check_files, copy_tokenizer_files
from megatron_encdec.interop.tokenizer_files import tokenizer_remarks
from megatron_encdec.model.config import ModelConfig
from megatron_encdec.objectives.base import of_attention
from megatron_encdec.platform import distributed, schema
from megatron_encdec.platform.distributed import Control
from megatron_encdec.platform.errors import AgreedError, UserError
from megatron_encdec.platform.progress import Progress
from megatron_encdec.rundir.directories import begin_directory, check_free, finish_directory, workplace
from megatron_encdec.rundir.files import sha256_file, write_atomic
from megatron_encdec.rundir.lineage import history_hash
from megatron_encdec.text.tokenizer import AS_OPTION, load_tokenizer
from megatron_encdec.text.tokenizer_models import find_model_file

USUAL_LENGTH = 2048  # tokens of a window, where the model has as many positions
REPLACED_ROWS = "replaced_rows.safetensors"
_SECONDS_TO_WRITE = 3600


@dataclass(frozen=True)
class Wish:
    """What the user said."""

    mask: str = "auto"  # or none, or a token
    tokenizer: str | None = None  # another than the directory's own
    eod_token: str | None = None
    ignore: Collection[str] = ()
    new_head: bool = False


@dataclass(frozen=True)
class _Prepared:
    """What rank 0 tells the others: everything about the model but its tensors."""

    model: ModelConfig
    mask: Mask
    known_rows: int
    tokenizer: str | None = None  # fingerprint
    eod_token: str | None = None
    remarks: tuple[str, ...] = ()


def import_model(directory: str | Path, run: str | Path, wish: Wish | None = None,
                 say: Callable[[str], None] = print) -> Path:
    """Make the run directory `run` of the model in `directory`; its checkpoint. Collective over the ranks there are.

    Raises `UserError` naming what is wrong or not supported; `run` is then not there.
    """
    directory, run, wish = Path(directory), Path(os.path.normpath(run)), wish or Wish()
    work = workplace(run, "import")
    with groups():
        rank, ranks, control = dist.get_rank(), dist.get_world_size(), Control(_SECONDS_TO_WRITE)
        try:
            prepared = control.from_first(lambda: _prepare(work, directory, run, wish))
            source, conversion = _open(directory, wish, prepared)
            state = _run_state(source, conversion, prepared, wish, control)
            tell = say if rank == 0 else lambda _line: None
            saver = Saver(work / "checkpoints", None, None, keep=1, asynchronous=False)
            event = saver.save_boxes(state, _with_progress(conversion, conversion.share(rank, ranks), rank == 0))
            if event.error:
                raise AgreedError(f"{directory}: {event.error}")
            control.from_first(lambda: _finish(work, run, conversion, prepared))
            _tell(run, source, conversion, prepared, event.seconds_total, tell)
        finally:
            if rank == 0:
                shutil.rmtree(work, ignore_errors=True)
    return run / "checkpoints" / event.path.name


def _open(directory: Path, wish: Wish, prepared: _Prepared | None = None) -> tuple[SourceModel, Conversion]:
    """The model in `directory`, checked by its config and the headers of its weights; without a mask at first."""
    source = read_source(directory, wish.ignore)
    if not source.is_whole and not wish.new_head:
        new = "its embeddings, to which it is tied" if source.model.head_is_embeddings else "a new, random one"
        raise UserError(f"{directory / 'config.json'}: {source.architecture} has no language-model head; with "
                        f"--new-head its body is imported under {new}, and a task's head is left out")
    rows = source.model.vocabulary_size
    prepared = prepared or _Prepared(source.model, Mask("none"), rows)
    files = TensorFiles(directory, source.content.get("transformers_weights"))
    return source, Conversion(files, prepared.model, source.target.family.rows, rows, prepared.mask,
                              prepared.known_rows, wish.new_head)


def _prepare(work: Path, directory: Path, run: Path, wish: Wish) -> _Prepared:
    """Everything that can be refused, then tokenizer and mask in `work`; rank 0 alone."""
    check_free(run)
    source, _ = _open(directory, wish)
    remarks = check_files(directory, wish.ignore)
    begin_directory(run, "import")
    (work / "source").mkdir()
    (work / "tokenizer").mkdir()
    for name in ("config.json", "generation_config.json"):
        if (directory / name).is_file():
            shutil.copyfile(directory / name, work / "source" / name)
    copy_tokenizer_files(directory, work / "source")
    prepared = _with_tokenizer(work, directory, source, wish)
    return replace(prepared, remarks=(*remarks, *prepared.remarks))


def _with_tokenizer(work: Path, directory: Path, source: SourceModel, wish: Wish) -> _Prepared:
    path, rows = wish.tokenizer or directory, source.model.vocabulary_size
    if wish.tokenizer is None and find_model_file(path) is None:
        return _Prepared(source.model, Mask("none"), rows, remarks=(
            "there is no tokenizer in the directory: name one with --tokenizer to train with this import",))
    tokenizer = load_tokenizer(path, None, wish.eod_token, AS_OPTION)
    if tokenizer.vocabulary_size > rows:
        raise UserError(f"{path}: its tokens go up to id {tokenizer.vocabulary_size - 1}, the model has {rows} rows "
                        "(vocab_size): it is another model's, or tokens were added without resizing the embeddings")
    remarks = [] if wish.tokenizer else tokenizer_remarks(directory, tokenizer, source.content)
    mask, known = choose_mask(tokenizer, wish.mask), tokenizer.vocabulary_size
    tokenizer, mask = write_with_mask(tokenizer, mask, work / "tokenizer")
    if mask.kind != "none":
        remarks.append(f"mask token {mask.token!r} (id {mask.id}): {KINDS[mask.kind]}")
    elif tokenizer.mask_id is None:
        remarks.append("no mask token, as was wished: an MLM phase needs one")
    else:
        remarks.append(f"the mask token {tokenizer.token(tokenizer.mask_id)!r} stays the tokenizer's")
    model = replace(source.model, vocabulary_size=max(rows, tokenizer.vocabulary_size))
    return _Prepared(model, mask, known, tokenizer.fingerprint, tokenizer.token(tokenizer.eod_id), tuple(remarks))


def _run_state(source: SourceModel, conversion: Conversion, prepared: _Prepared, wish: Wish,
               control: Control) -> RunState:
    """run_state.json: a state that nothing was trained for, determined by the files it came from."""
    rank, ranks, files = dist.get_rank(), dist.get_world_size(), conversion.files
    hashed = control.gathered({file.name: sha256_file(file) for file in files.files[rank::ranks]})
    weights = dict(sorted((name, digest) for part in hashed for name, digest in part.items()))
    mask = {"kind": prepared.mask.kind, "id": prepared.mask.id}
    history = {"step": 0, "imported": {"weights": weights, "mask": mask}, "model": prepared.model.identity(),
               "phases": []}
    topology = distributed.Topology(ranks, rank, 1, 1, ranks, 0, 0, rank)
    dtype = next(name for name, dtype in DTYPES.items() if dtype == conversion.dtype)
    return RunState(
        step=0, phase=0, phase_name="import", objective=of_attention(source.target.attention), samples=0, tokens=0,
        targets=0, history_hash=history_hash(history), history=history, data_fingerprints=[],
        tokenizer_fingerprint=prepared.tokenizer, topology=topology.as_dict(), versions=versions(),
        imported={"as": source.target.name, "architecture": source.architecture, "weights": weights, "mask": mask,
                  "vocabulary_size": source.model.vocabulary_size, "dtype": dtype, "ignore": list(wish.ignore)})


def _with_progress(conversion: Conversion, units: list, active: bool) -> Iterator[Box]:
    """The boxes of `units`, and how far this rank's share is where that takes a while."""
    done = 0
    with Progress("import", sum(unit.bytes for unit in units), active, stream=sys.stdout) as shown:
        for unit in units:
            yield conversion.box(unit)
            done += unit.bytes
            shown.update(done, f"{done / 1e9:.2f} GB")


def _finish(work: Path, run: Path, conversion: Conversion, prepared: _Prepared) -> None:
    """Everything but the weights, then the name."""
    model = prepared.model
    config = {
        "run": {"dir": str(run)},
        "tokenizer": {"path": str(run / "tokenizer"), "mask_token": prepared.mask.token,
                      "eod_token": prepared.eod_token},
        "data": {"sequence_length": min(USUAL_LENGTH, model.max_positions or USUAL_LENGTH)},
        "model": {key: value for key, value in schema.to_dict(model).items() if value not in (None, [])}}
    if model.rope_scaling is not None:
        config["model"]["rope_scaling"] = model.rope_scaling.given
    write_atomic(work / "config.yaml", yaml.safe_dump(config, sort_keys=False))
    if rows := conversion.replaced_rows():
        save_file(rows, work / "source" / REPLACED_ROWS)
    finish_directory(work, run)


def _tell(run: Path, source: SourceModel, conversion: Conversion, prepared: _Prepared, seconds: float,
          say: Callable[[str], None]) -> None:
    remarks, found = [*source.remarks, *conversion.files.remarks, *prepared.remarks], conversion.dtype
    asked, dtype = source.config.dtype, str(found).removeprefix("torch.")
    if isinstance(asked, torch.dtype) and torch.promote_types(asked, found) != asked:
        remarks.append(f"the weights are taken as they are stored, in {dtype}; transformers would round them to "
                       f"{str(asked).removeprefix('torch.')}, which config.json names")
    if conversion.dropped:
        remarks.append(f"left out: {', '.join(conversion.dropped)}")
    for remark in remarks:
        say(f"note: {remark}")
    say(f"{run}: {source.architecture}, {prepared.model.parameter_count():,} parameters in {dtype}, {seconds:.1f} s")
    keys = (f"run.from.path={run}", "run.from.state=weights", f"model.run={run}", f"tokenizer.path={run / 'tokenizer'}")
    say(f"train on from it with {' '.join(map(shlex.quote, keys))}")
