"""The verb `finetune`: run the sweep that a config lists, or what is left of it."""

import argparse
import shlex
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_encdec.finetune.config import FinetuneRun, load_config
from megatron_encdec.finetune.fingerprints import made_of
from megatron_encdec.finetune.results_tree import (
    FAILED,
    FINISHED,
    RECORD,
    SETTINGS,
    read_json,
    record_model,
    state_of,
)
from megatron_encdec.finetune.rows import files_of
from megatron_encdec.finetune.sweep import Outcome, Sweep
from megatron_encdec.platform.children import available_cores
from megatron_encdec.platform.errors import RunFailed, UserError, add_stopped_code, choose_stopped_code, code_of
from megatron_encdec.platform.optional import INSTALL, has_gpu_driver, is_available
from megatron_encdec.platform.schema import to_dict

DESCRIPTION = """\
Fine-tune models on labelled sets: every learning rate and seed of the config's grid, each a run with a folder of its
own under `results`. A finished run is never repeated, one that was killed is: the same command goes on.

  megatron-encdec finetune CONFIG.yaml
  megatron-encdec finetune CONFIG.yaml grid.learning_rates=[5e-5] grid.seeds=[0]      one run is a sweep of one
  megatron-encdec finetune CONFIG.yaml --workers 4                                    four processes at a time
  megatron-encdec study report RESULTS --output report                                what it comes to

A dataset of the config has `name`, `family` (SC, TC, QA, IR), `train`, `test` and, optionally, `validation` (files:
.jsonl .csv .tsv .parquet .conll; or splits of `hub`), `columns` (our names: the file's) and `labels` (SC, TC: all
labels in order; else those of the training file). All keys and what files may hold: docs/finetune.md.

SIGTERM or Ctrl-C ends the runs in hand; they begin again with the next call. A run that failed has its reason in
failure.json, and is tried again only with --retry-failed. The same command twice at once shares the runs.
"""
FUNCTION = "megatron_encdec.finetune.run:run_one"
# What may differ between a finished run and the one asked for: speed, what is saved, names and places of folders.
_FREE = {"model": {"path", "name", "series"}, "dataset": {"local"},
         "training": {"micro_batch_size", "retrieval_micro_batch_size", "checkpoint_every", "save_model", "onnx"}}
_PATHS = ("train", "validation", "test", "documents", "beir", "mined_by", "reranked_by")
MOST_WORKERS = 8  # without GPUs, a core each: two such runs at once end sooner than one after the other on both cores


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `finetune`."""
    parser.add_argument("config", metavar="CONFIG.yaml", help="models, datasets, grid and protocol")
    parser.add_argument("overrides", nargs="*", metavar="dotted.key=value", help="set a key of the config")
    parser.add_argument("--workers", type=int, metavar="N",
                        help="runs at a time (= sweep.workers; default: one for each GPU, else for each core, up to "
                             f"{MOST_WORKERS})")
    parser.add_argument("--retry-failed", action="store_true", help="run failed runs again (= sweep.retry_failed)")
    parser.add_argument("--onnx", action="store_true",
                        help="save the models, as ONNX too (= training.save_model=true training.onnx=true)")
    add_stopped_code(parser)
    parser.add_argument("--dry-run", action="store_true", help="say what there is to do; run nothing")


def run(arguments: argparse.Namespace) -> int:
    """Run the verb; the exit code."""
    choose_stopped_code(arguments.stopped_exit_code)
    workers = [] if arguments.workers is None else [f"sweep.workers={arguments.workers}"]
    retry = ["sweep.retry_failed=true"] if arguments.retry_failed else []
    onnx = ["training.save_model=true", "training.onnx=true"] if arguments.onnx else []
    config = load_config(arguments.config, [*arguments.overrides, *workers, *retry, *onnx])
    runs = config.runs()
    states = [state_of(run.directory) for run in runs]
    finished, failed = states.count(FINISHED), states.count(FAILED)
    todo = len(runs) - finished - (0 if config.sweep.retry_failed else failed)
    print(f"{config.results}: {len(runs)} runs ({len(config.all_models)} models × {len(config.datasets)} datasets × "
          f"{len(config.grid.learning_rates)} learning rates × {len(config.grid.seeds)} seeds): {finished} finished, "
          f"{failed} failed, {todo} to do")
    made: dict[tuple, dict[str, str]] = {}  # by model, set and what it is trained on: what runs would be made of now
    for one, state in zip(runs, states, strict=True):
        if state == FINISHED:
            _check_settings(one)
            key = one.directory.parent, one.dataset.train_set
            if key not in made:
                made[key] = made_of(one)
            _check_contents(one, made[key])
    if arguments.dry_run:
        return 0
    for model in config.all_models:
        if model.weights == "pretrained":
            record_model(Path(config.results), model.label, Path(model.path), model.series)
    if todo and not is_available("nemo_automodel"):
        raise UserError(f"finetune needs the package nemo_automodel; install it: {INSTALL['nemo_automodel']}")
    sweep = sweep_of(runs, FUNCTION, todo, config.sweep.workers, config.sweep.retry_failed, MOST_WORKERS)
    return how_it_ended(config.results, sweep.run())


def _check_settings(run: FinetuneRun) -> None:
    """A finished run that other settings have made is refused: its scores would be taken for those asked for. Where
    files and models lie is not compared."""
    path = run.directory / SETTINGS
    if not path.is_file():
        return
    then, now = read_json(path), to_dict(run)
    for part, free in _FREE.items():
        for key in sorted(then.get(part, {}).keys() & now[part].keys() - free):
            old, new = (_without_places(key, one) for one in (then[part][key], now[part][key]))
            if old != new:
                raise UserError(f"{path}: the results there were made with {part}.{key}={old!r}, asked for is {new!r}; "
                                "give `results` another folder, or delete that one")


def _without_places(key: str, value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_places(name, one) for name, one in value.items()}
    return Path(value).name if key in _PATHS and value else value


def _check_contents(run: FinetuneRun, now: dict[str, str]) -> None:
    """The same of a finished run whose files had other contents than `now`, as far as they are still there."""
    path = run.directory / RECORD
    then = read_json(path).get("made_of", {}) if path.is_file() else {}
    if changed := [what for what in sorted(then.keys() & now.keys()) if then[what] != now[what]]:
        names = {role: file.name for role, file in files_of(run.dataset).items()} | {"model": run.model.path}
        what = changed[0]
        raise UserError(f"{path}: the results there were made with other contents of {names.get(what, what)} ({what}: "
                        f"{then[what][:8]}, now {now[what][:8]}); give `results` another folder, or delete that one")


def sweep_of(runs: Sequence[Any], function: str, todo: int, workers: int | None, retry_failed: bool,
             without_gpu: int) -> Sweep:
    """The sweep over `runs`, of which `todo` are left; says how it is spread. workers: None is one for each GPU, else
    for each core, up to `without_gpu`."""
    if not todo:
        return Sweep(runs, function)
    gpus, cores = [], available_cores()
    if has_gpu_driver():
        from megatron_encdec.platform.device import visible_gpus  # imports torch

        gpus = visible_gpus()
    workers = min(todo, workers or len(gpus) or min(without_gpu, cores))
    threads = max(1, cores // workers)
    where = f"{len(gpus)} GPU{'s' * (len(gpus) != 1)}" if gpus else f"{threads} of {cores} cores each"
    print(f"{workers} worker{'s' * (workers != 1)}, {where}", flush=True)
    return Sweep(runs, function, workers, gpus, threads, retry_failed)


def how_it_ended(results: str, outcome: Outcome) -> int:
    """Say how the sweep ended whose tree is `results`; the exit code."""
    if outcome.stopped_by is not None:
        print(f"stopped by {signal.Signals(outcome.stopped_by).name}: {outcome.finished} of {outcome.total} runs are "
              "finished; the same command goes on")
        return code_of(outcome.stopped_by)
    if outcome.mistakes:
        raise UserError(f"{'; '.join(outcome.mistakes)}  ({outcome.left} of {outcome.total} runs are left; the same "
                        "command goes on)")
    if outcome.failed:
        raise RunFailed(f"{len(outcome.failed)} of {outcome.total} runs failed, the first ({outcome.failed[0][0]}): "
                        f"{outcome.failed[0][1]}  (--retry-failed runs them again)")
    print(f"all {outcome.total} runs are finished: megatron-encdec study report "
          f"{shlex.quote(results)} --output report")
    return 0
