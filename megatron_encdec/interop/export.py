"""A checkpoint as a Hugging Face model directory: stock classes, compared, complete or absent.

    1. `find`            the checkpoint, its config and tokenizer
    2. `choose`          the class, by objective and family or by wish
    3. destination       nothing there, an empty directory, or an earlier export (the same one: nothing to do)
    4. weights, config, tokenizer, model card into a directory beside OUT
    5. verification      loaded back with the Auto class, every key, logits against the trunk
    6. rename

An import that nothing was trained for goes back as it came, with its own config, tokenizer files and rows: what was
added for an MLM phase, a mask token and its row, has no place in what the model was before.
"""

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from megatron_encdec.interop import hugging_face
from megatron_encdec.interop.card import about_head, about_length, about_window, model_card
from megatron_encdec.interop.families import check_fits, choose
from megatron_encdec.interop.families.family import Target
from megatron_encdec.interop.hugging_face import DTYPES, FILE_SIZE
from megatron_encdec.interop.importing import REPLACED_ROWS
from megatron_encdec.interop.names import Tensors, canonical_weights, to_hugging_face
from megatron_encdec.interop.source import Source, find, whole_trunk
from megatron_encdec.interop.source_config import read_source
from megatron_encdec.interop.source_files import copy_tokenizer_files, read_object
from megatron_encdec.interop.tokenizer_files import about_empty_texts, special_ids, write_tokenizer
from megatron_encdec.model.flops import spared_flops, training_flops, whole_pairs
from megatron_encdec.platform.errors import UserError
from megatron_encdec.rundir.files import fsync_tree, replace_durably, write_json_atomic
from megatron_encdec.training.stretches import by_phase, tokens_between

RECORD = "export.json"
_NO_TOKENIZER = "there is no tokenizer with it"
Made = tuple[object, Tensors, list[str], int | None]  # config, tensors, remarks, the token whose rows were replaced


def export(run: str, out: str | Path, as_: str = "auto", dtype: str = "auto", force: bool = False,
           say: Callable[[str], None] = print, file_size: str = FILE_SIZE) -> float | None:
    """Write the checkpoint `RUN_DIR[@STEP]` to the directory `out` as a stock Hugging Face model; the largest
    difference of its logits from the trunk's, None where `out` is that export already.

    The arguments are those of the verb (export_command.py). Raises `UserError` for a mistake, `ParityError` where the
    result would not compute what the trunk computes; `out` is then as it was.
    """
    source = find(run)
    imported, model = source.imported, source.model
    target = choose(as_, source.state.objective, model, imported and imported["as"])
    if dtype == "auto":
        dtype = imported["dtype"] if imported else "fp32"
    if dtype not in DTYPES:
        raise UserError(f"--dtype {dtype}: not one of auto, {', '.join(DTYPES)}")
    if not _goes_back(source, target):
        check_fits(target, model, source.tokenizer)
    out, state, tokenizer = Path(os.path.realpath(out)), source.state, source.tokenizer
    record = {"format": 1, "history_hash": state.history_hash, "step": state.step, "as": target.name, "dtype": dtype,
              "tokenizer_fingerprint": state.tokenizer_fingerprint,
              "special_ids": tokenizer and {"mask": tokenizer.mask_id, "eod": tokenizer.eod_id}}
    if _is_there(out, record, force):
        say(f"{out}: is the export of {source.checkpoint.name} as {target.model_class} in {dtype} already")
        return None

    work = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(work, ignore_errors=True)  # of an export that was killed
    work.mkdir(parents=True)
    try:
        difference = _write(work, source, target, dtype, file_size, say)
        write_json_atomic(work / RECORD, {**record, "run": _about(source), "files": _files(work)})
        for name in _files(work):  # safetensors leaves its files to their owner alone
            (work / name).chmod((work / RECORD).stat().st_mode)
        fsync_tree(work)
        _put_in_place(work, out)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    say(f"{out}: {target.model_class}, {target.attention} attention, {dtype}; logits differ from the trunk's by at "
        f"most {difference:.2g}")
    return difference


def _goes_back(source: Source, target: Target) -> bool:
    """Whether `target` is what `source` was imported from."""
    imported = source.imported
    return bool(imported) and (imported["as"], imported["architecture"]) == (target.name, target.model_class)


def _about(source: Source) -> dict:
    """What the run did up to there, for studies: its phases, of `total` steps planned; counters; FLOPs with attention
    over whole windows, and where a part was frozen the targets spread evenly. A phase is `decayed` where its learning
    rate, after the warm-up, ended below half of the peak."""
    state, config, phases, pairs, spared = source.state, source.config, [], np.zeros(2), 0.0
    for parts in by_phase(source.done):
        one, end = parts[-1], min(parts[-1].end, state.step)
        phases.append({"name": one.objective.short_name(), "objective": one.objective.to_yaml(),
                       "start": one.phase_start, "end": end,
                       "decayed": one.has_decayed(end)})
        tokens = tokens_between(parts, 0, end)
        its_pairs = sum(whole_pairs(share * tokens, one.data.sequence_length, part.attention,
                                    config.model.sliding_window) for share, part in one.objective.shares())
        pairs = pairs + its_pairs
        spared += spared_flops(config.model, tokens, its_pairs, state.targets * tokens / state.tokens, one.freeze)
    flops = training_flops(config.model, state.tokens, pairs, state.targets) - spared
    return {"size": config.model.preset, "seed": config.run.seed, "parameters": config.model.parameter_count(),
            "phases": phases, "total": config.run.total.steps, "samples": state.samples, "tokens": state.tokens,
            "targets": state.targets, "flops": flops}


def _is_there(out: Path, record: dict, force: bool) -> bool:
    """Whether `out` is this very export; `UserError` where it is something else, not to be overwritten."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; name a directory")
    if not out.exists() or not any(out.iterdir()):
        return False
    try:
        found = read_object(out / RECORD)
    except UserError:
        found = {}
    if not found:
        raise UserError(f"{out}: holds other files and no export of ours; name another directory")
    files, _ = found.pop("files", None), found.pop("run", None)
    if found == record:
        return True
    if files is not None and (foreign := sorted(set(_files(out)) - {RECORD, *files})):
        raise UserError(f"{out}: holds {foreign[0]} beside an export, which no export wrote; move it away, or name "
                        "another directory")
    if not force:
        raise UserError(f"{out}: holds another export (step {found.get('step')}, as {found.get('as')}, "
                        f"{found.get('dtype')}); name another directory, or replace it with --force")
    return False


@torch.no_grad()
def _write(work: Path, source: Source, target: Target, dtype: str, file_size: str,
           say: Callable[[str], None]) -> float:
    """Everything but the record into `work`; the largest difference of logits."""
    model = source.model
    say(f"loading {source.checkpoint}" + (" (fp32 masters)" if source.has_masters else ""))
    with whole_trunk(source) as trunk:
        for parameter in trunk.parameters():  # what is compared is what is written
            parameter.copy_(parameter.to(DTYPES[dtype]))
        say(f"writing {target.model_class}, {model.parameter_count():,} parameters")
        back = _goes_back(source, target)
        make = _as_it_came if back else _as_target
        config, weights, remarks, apart = make(work, source, target, canonical_weights(trunk))
        weights = {name: tensor.to(DTYPES[dtype]) for name, tensor in weights.items()}
        hugging_face.write_model(target, config, weights, work, file_size)
        del weights
        own = source.run / "source" / "generation_config.json"
        if back and own.is_file():
            shutil.copyfile(own, work / own.name)
        if target.is_encoder:
            length = config.max_position_embeddings if back or not source.done else source.sequence_length
            hugging_face.write_pooling(work, model.hidden_size, length)
            remarks += about_length(length, config.max_position_embeddings)
            remarks += about_empty_texts(work) + about_head(source, target)
            remarks += about_window(source, target)
        (work / "README.md").write_text(model_card(source, target, dtype, remarks), encoding="utf-8")
        for remark in remarks:
            say(f"note: {remark}")
        say("comparing with the trunk")
        return hugging_face.check_logits(trunk, hugging_face.load_model(target, work), target.attention, apart)


def _as_target(work: Path, source: Source, target: Target, weights: Tensors) -> Made:
    """Tokenizer into `work`, the trunk's `weights` as `target`."""
    model, tokenizer, length = source.model, source.tokenizer, source.sequence_length
    remarks = [_NO_TOKENIZER]
    if tokenizer is not None:
        remarks = write_tokenizer(tokenizer, work, max(length, model.max_positions or 0))
    config = hugging_face.hugging_face_config(target, model, length, tokenizer, tokenizer and special_ids(tokenizer))
    return config, to_hugging_face(weights, model, target.family.rows), remarks, None


def _as_it_came(work: Path, source: Source, target: Target, weights: Tensors) -> Made:
    """The same of an import, with as many rows as there were."""
    imported, directory = source.imported, source.run / "source"
    config = read_source(directory, imported["ignore"]).config
    remarks = [] if copy_tokenizer_files(directory, work) else [_NO_TOKENIZER]
    model, mask = replace(source.model, vocabulary_size=imported["vocabulary_size"]), imported["mask"]["id"]
    found = to_hugging_face(weights, model, target.family.rows)
    rows = load_file(directory / REPLACED_ROWS) if (directory / REPLACED_ROWS).is_file() else {}
    for name, row in rows.items():
        found[name] = found[name].clone()
        found[name][mask] = row.to(found[name].dtype)
    return config, found, remarks, mask if rows else None


def _files(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if not path.is_dir())


def _put_in_place(work: Path, out: Path) -> None:
    """Rename; an earlier export makes way first, and is deleted when the new one stands."""
    grave = out.with_name(f".{out.name}.old")
    shutil.rmtree(grave, ignore_errors=True)
    if out.exists() and any(out.iterdir()):
        os.replace(out, grave)
    replace_durably(work, out)
    shutil.rmtree(grave, ignore_errors=True)
