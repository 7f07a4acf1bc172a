"""The verb `evaluate`: models as they are on tasks of mteb, those that have no results yet."""

import argparse
from pathlib import Path

from megatron_encdec.finetune.command import how_it_ended, sweep_of
from megatron_encdec.finetune.config import ModelSource
from megatron_encdec.finetune.fingerprints import revision_of
from megatron_encdec.finetune.frozen import FrozenRun
from megatron_encdec.finetune.mteb_tasks import DEFAULT, expand
from megatron_encdec.finetune.results_tree import FINISHED, record_model, state_of
from megatron_encdec.platform.errors import UserError, add_stopped_code, choose_stopped_code
from megatron_encdec.platform.optional import require

DESCRIPTION = f"""\
Evaluate models as they are, by their embeddings, through the library mteb: what is finished is kept, the same command
goes on after a kill, and `study report RESULTS` shows the scores beside fine-tuned ones.

  megatron-encdec evaluate models/encoder models/minilm                 {DEFAULT}, from the hub
  megatron-encdec evaluate encoder --tasks STSBenchmark SciFact --data copies         without the hub
  megatron-encdec evaluate encoder --tasks my/beir_folder my/similarity               tasks of your own

MODEL is a directory of transformers (mean pooling) or sentence-transformers (its own pooling and prompts), or
NAME=DIRECTORY, where NAME is its name in the results. Which folders are tasks: docs/finetune.md.
"""
FUNCTION = "megatron_encdec.finetune.frozen:evaluate_one"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `evaluate`."""
    parser.add_argument("models", nargs="+", metavar="MODEL", help="a directory, or NAME=DIRECTORY")
    parser.add_argument("--tasks", nargs="+", default=[DEFAULT], metavar="TASK",
                        help=f"tasks and benchmarks of mteb, and folders (default: {DEFAULT})")
    parser.add_argument("--results", default="results", metavar="TREE", help="tree of results (default: results)")
    parser.add_argument("--data", metavar="FOLDER", help="copies of the hub's data sets: FOLDER/<name on the hub>")
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="texts at a time (default: 32)")
    parser.add_argument("--workers", type=int, metavar="N", help="tasks at a time (default: one for each GPU, else 1)")
    parser.add_argument("--retry-failed", action="store_true", help="evaluate failed tasks again")
    add_stopped_code(parser)
    parser.add_argument("--dry-run", action="store_true", help="say what there is to do; run nothing")


def run(arguments: argparse.Namespace) -> int:
    """Run the verb; the exit code."""
    choose_stopped_code(arguments.stopped_exit_code)
    for name in ("batch_size", "workers"):
        if (value := getattr(arguments, name)) is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')}: expected a number from 1, found {value}")
    if arguments.data is not None and not Path(arguments.data).is_dir():
        raise UserError(f"--data {arguments.data}: no such folder")
    models = _models(arguments.models)
    require("mteb", "evaluate")
    tasks = expand(arguments.tasks)
    runs = [FrozenRun(path, name, revision, task, arguments.results, arguments.data, arguments.batch_size)
            for name, (path, revision) in models.items() for task in tasks]
    for one in runs:
        one.check()
    states = [state_of(one.directory) for one in runs]
    todo = sum(state != FINISHED for state in states)
    print(f"{arguments.results}: {len(runs)} runs ({len(models)} models × {len(tasks)} tasks): "
          f"{len(runs) - todo} finished, {todo} not", flush=True)
    if arguments.dry_run:
        return 0
    for name, (path, _) in models.items():
        record_model(Path(arguments.results), name, Path(path))
    sweep = sweep_of(runs, FUNCTION, todo, arguments.workers, arguments.retry_failed, without_gpu=1)
    return how_it_ended(arguments.results, sweep.run())


def _models(words: list[str]) -> dict[str, tuple[str, str]]:
    """name -> (directory, revision)."""
    found: dict[str, tuple[str, str]] = {}
    for word in words:
        name, _, path = ("", "", word) if Path(word).is_dir() else word.rpartition("=")
        try:
            source = ModelSource(path, name or None)
        except ValueError as error:
            raise UserError(f"MODEL {word}: {error}") from None
        if source.label in found:
            raise UserError(f"MODEL {word}: two models have the name {source.label}; give NAME=DIRECTORY")
        found[source.label] = path, revision_of(path)
    return found
