"""The verb `pretrain`: run a config, or continue it; the same command again resumes."""

import argparse

from megatron_encdec.platform import device
from megatron_encdec.platform.distributed import RankEnvironment, check_parallel_sizes
from megatron_encdec.platform.errors import UserError
from megatron_encdec.training.config import load_config

DESCRIPTION = """\
Train a trunk through the phases of CONFIG. Where run.dir holds a checkpoint the run continues from it, so the
same command starts a run, resumes it after any end, and says so when nothing is left to do.

  megatron-encdec pretrain examples/biphasic_tiny.yaml
  megatron-encdec pretrain CONFIG run.dir=runs/a optimizer.lr=1e-3 phases.1.objective=mlm:0.3
  megatron-encdec pretrain CONFIG --nproc 4 parallel.tensor=2          four local ranks, tensor parallel by two
  torchrun --nproc-per-node 8 -m megatron_encdec pretrain CONFIG       one of several nodes
  srun megatron-encdec pretrain CONFIG                                 a Slurm task a rank
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `pretrain`."""
    parser.description = DESCRIPTION
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("config", metavar="CONFIG.yaml", help="config of the run")
    parser.add_argument("overrides", nargs="*", metavar="dotted.key=value",
                        help="set a key of the config; list items by number: phases.0.steps=100")
    parser.add_argument("--nproc", type=int, metavar="N", help="start N ranks on this machine")
    parser.add_argument("--until", type=int, metavar="STEP",
                        help="stop after this step with a checkpoint, as a cluster's time limit would")
    parser.add_argument("--dry-run", action="store_true",
                        help="print the resolved config, the phases in tokens, parameters and memory; train nothing")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto",
                        help="default: a GPU if there is one")


def run(arguments: argparse.Namespace) -> int:
    """Run the verb; the exit code."""
    device.choose(arguments.device)
    config = load_config(arguments.config, arguments.overrides)
    if arguments.until is not None and arguments.until < 1:
        raise UserError(f"--until {arguments.until}: a step number of 1 or more")
    if arguments.nproc is not None and arguments.nproc < 1:
        raise UserError(f"--nproc {arguments.nproc}: at least one rank")

    # One process looks at config, tokenizer and data before any rank starts: a mistake is said once.
    from megatron_encdec.training.plan import describe, make_plan

    plan = make_plan(config, arguments.nproc)
    parallel = plan.config.parallel
    if arguments.dry_run:
        ranks = arguments.nproc or RankEnvironment.read().world_size
        print(describe(plan, check_parallel_sizes(ranks, parallel.tensor, parallel.pipeline)))
        return 0
    if arguments.nproc is not None and arguments.nproc > 1:
        from megatron_encdec.platform.launcher import launch

        return launch(_arguments_of_a_rank(arguments), arguments.nproc)

    from megatron_encdec.platform import distributed
    from megatron_encdec.training.loop import train

    if config.run.deterministic:
        device.use_deterministic_kernels()
    topology = distributed.initialize(parallel.tensor, parallel.pipeline)
    train(plan, topology, arguments.until)
    distributed.shutdown()
    return 0


def _arguments_of_a_rank(arguments: argparse.Namespace) -> list[str]:
    """The same command for one rank."""
    until = ["--until", str(arguments.until)] if arguments.until else []
    return ["pretrain", arguments.config, *arguments.overrides, *until, "--device", arguments.device]
