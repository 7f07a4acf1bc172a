"""The verb `merge`: weights of several models of one shape, averaged or interpolated."""

import argparse
from pathlib import Path

from megatron_encdec.platform import device
from megatron_encdec.platform.errors import UserError

DESCRIPTION = """\
Make one model of several of one shape: the weighted mean of their weights, or their spherical interpolation (SLERP).
Good for the branches of a decay, for the last checkpoints of a run, for an encoder with the decoder it came from.

  megatron-encdec merge runs/a runs/b runs/mean                          two runs, half and half
  megatron-encdec merge runs/a@800 runs/a@900 runs/a@1000 runs/mean      checkpoints of one run
  megatron-encdec merge models/enc models/llama models/mixed --weights 0.7,0.3 --method slerp

Runs make a run directory with a checkpoint of step 0 and no optimizer: export it, or train on from it as from an
import. OUT counts as trained with the first run's objective: `export` chooses its class by it.
Hugging Face directories make one, with config, tokenizer and all else of the first. To merge a run with a Hugging Face
model, export the run first. Tensors are read in pieces, so a model need not fit into memory.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `merge`."""
    parser.add_argument("models", nargs="+", metavar="MODEL", help="RUN_DIR[@STEP], or Hugging Face directories")
    parser.add_argument("out", metavar="OUT", help="directory to make; has its name only when everything is done; must "
                        "not exist, or be empty")
    parser.add_argument("--weights", metavar="W,W,...", help="a number for each model, e.g. 0.7,0.3; scaled to a sum "
                        "of 1 (default: all equal)")
    parser.add_argument("--method", choices=("mean", "slerp"), default="mean",
                        help="slerp: of two models, each tensor along the arc between its two directions")


def run(arguments: argparse.Namespace) -> int:
    """Run the verb; the exit code."""
    device.choose("cpu")  # before megatron.core is imported
    from megatron_encdec.engine.integrity import split_step
    from megatron_encdec.interop.merge_directories import merge_directories
    from megatron_encdec.interop.merge_runs import merge_runs
    from megatron_encdec.interop.merging import Recipe

    try:
        weights = [float(word) for word in arguments.weights.split(",")] if arguments.weights else None
    except ValueError:
        raise UserError(f"--weights {arguments.weights}: numbers with commas between them, e.g. 0.7,0.3") from None
    for model in arguments.models:
        if Path(arguments.out).resolve().is_relative_to(Path(split_step(model)[0]).resolve()):
            raise UserError(f"{arguments.out}: is inside {model}, one of the models; name a directory beside it")
    models, recipe = arguments.models, Recipe.of(arguments.method, weights, len(arguments.models))
    make = merge_directories if _are_directories(models) else merge_runs
    for line in make(models, Path(arguments.out), recipe):
        print(line)
    return 0


def _are_directories(models: list[str]) -> bool:
    """Whether they are of Hugging Face; refused where some are and some are not."""
    kinds = [(Path(model) / "config.json").is_file() for model in models]
    if any(kinds) and not all(kinds):
        run, other = models[kinds.index(False)], models[kinds.index(True)]
        raise UserError(f"{run}: no Hugging Face directory, as {other} is; export the run first "
                        f"(megatron-encdec export {run} OUT), or import the other")
    return all(kinds)
