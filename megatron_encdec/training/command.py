"""The verb `pretrain`: run a config, or continue it; the same command again resumes."""

import argparse
import time

from megatron_encdec.engine.integrity import split_step
from megatron_encdec.platform.errors import UserError, add_stopped_code, choose_stopped_code, stopped_code
from megatron_encdec.platform.launcher import (
    Nodes,
    add_node_arguments,
    check_srun,
    launch,
    read_nodes,
    started,
    where_ranks_meet,
)
from megatron_encdec.platform.ranks import RankEnvironment
from megatron_encdec.platform.signals import StopSignals

DESCRIPTION = """\
Train a trunk through the phases of CONFIG. Where run.dir holds a checkpoint the run continues from it, so the
same command starts a run, resumes it after any end, and says so when nothing is left to do. A run.dir that holds
another run, or checkpoints that no file `latest` names, is refused.

  megatron-encdec pretrain examples/biphasic_tiny.yaml
  megatron-encdec pretrain CONFIG run.dir=runs/a optimizer.lr=1e-3 phases.1.objective=mlm:0.3
  megatron-encdec pretrain CONFIG --nproc 4 parallel.tensor=2          four local ranks, tensor parallel by two
  megatron-encdec pretrain CONFIG --nnodes 2 --node-rank 0 --nproc 8 --master HOST      one of two nodes; HOST: node 0
  srun --ntasks-per-node 1 megatron-encdec pretrain CONFIG             one task per node: it starts a rank per GPU
                                                                       (or --nproc of them)
  srun --ntasks-per-node 8 megatron-encdec pretrain CONFIG             one task per GPU: each is a rank
  torchrun --nproc-per-node 8 -m megatron_encdec pretrain CONFIG       works too
  megatron-encdec pretrain CONFIG run.dir=runs/b --fork runs/a@500     a branch: runs/a as it was after step 500

The value of a key that wants a string, such as a path, is taken as it stands; any other is YAML. If a directory has the
very name runs/a@500, it is used. For step 500 of runs/a write runs/a/@500.

SIGTERM, SIGUSR1 or SIGUSR2, to the command or to any rank, saves and ends with exit code 0 (or that of
--stopped-exit-code); a second one ends at once.
What is done cannot change: a config with another past is refused, with what differs. What is still to come may.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `pretrain`."""
    parser.add_argument("config", metavar="CONFIG.yaml", help="config of the run")
    parser.add_argument("overrides", nargs="*", metavar="dotted.key=value",
                        help="set a key of the config; list items by number: phases.0.steps=100")
    parser.add_argument("--nproc", type=int, metavar="N", help="start N ranks on this machine; with --nnodes on each "
                        "(default there: one a GPU)")
    add_node_arguments(parser)
    parser.add_argument("--until", type=int, metavar="STEP",
                        help="save after STEP and end; the same command without it goes on")
    parser.add_argument("--time-limit", metavar="TIME",
                        help="save and end in time, e.g. 3h30m, 90s, 02:30:00; exit code 0 (or "
                        "--stopped-exit-code)")
    add_stopped_code(parser)
    parser.add_argument("--profile", metavar="STEPS",
                        help="a torch profiler trace of these steps, e.g. 10 or 10..12, under profile/ of the run")
    parser.add_argument("--live", action="store_true", help="a curve of the phase's loss in the progress line")
    parser.add_argument("--fork", metavar="RUN_DIR[@STEP]",
                        help="begin as a continuation of another run (= run.from); give a new run.dir")
    parser.add_argument("--fallback", action="store_true",
                        help="where the newest checkpoint is damaged or not known, continue from the newest intact one")
    parser.add_argument("--dry-run", action="store_true",
                        help="print the resolved config, the phases in tokens, parameters and memory; train nothing")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto",
                        help="default: a GPU if there is one")


def run(arguments: argparse.Namespace) -> int:
    """Run the verb; the exit code."""
    choose_stopped_code(arguments.stopped_exit_code)
    if arguments.dry_run:
        return _dry_run(arguments)
    began = started() or time.time()
    with StopSignals(second_ends=True) as signals:  # from here on nothing ends a rank between two steps
        check_srun(arguments.nproc, arguments.nnodes)
        nodes = _nodes(arguments)
        if nodes is None:
            return _rank(arguments, began, signals)
        party = nodes.party(_name(arguments))
        with party.telling():
            _plan(arguments, nodes.world_size, nodes.node == 0)
        met = party.meet(where_ranks_meet(), signals)
    if signals.received:
        print("stopped before any rank was started; nothing was to be saved")
        return stopped_code()
    of_a_rank = argparse.Namespace(**{**vars(arguments), "nproc": None, "nnodes": None})
    return launch(run, (of_a_rank,), nodes, began, import_what_ranks_need, met)


def run_here(arguments: argparse.Namespace) -> int:
    """All of the run in this process, a notebook's perhaps: what goes wrong is raised, and a signal to stop is heeded
    where this is the main thread."""
    with StopSignals() as signals:
        return _rank(arguments, time.time(), signals)


def _nodes(arguments: argparse.Namespace) -> Nodes | None:
    def gpus() -> int:
        from megatron_encdec.platform import device

        device.choose(arguments.device)
        return len(device.visible_gpus())

    return read_nodes(arguments.nproc, arguments.nnodes, arguments.node_rank, arguments.master, gpus)


def _name(arguments: argparse.Namespace) -> str:
    """What a job is called that was started by hand: its run directory, or config, as the command has it."""
    return next((word for word in reversed(arguments.overrides) if word.startswith("run.dir=")), arguments.config)


def import_what_ranks_need() -> None:
    """What every rank would import for itself: seconds, done once before the fork."""
    import torch._dynamo  # noqa: F401  (torch's optimizers import it in their first step)

    import megatron_encdec.training.execute  # noqa: F401


def _dry_run(arguments: argparse.Namespace) -> int:
    from megatron_encdec.training.dry_run import describe

    if arguments.nnodes is not None:  # any of the nodes will do
        arguments.node_rank, arguments.master = 0, "localhost"
    nodes = _nodes(arguments)
    ranks = nodes.world_size if nodes else RankEnvironment.read().world_size
    print(describe(_config(arguments), ranks, arguments.fallback))
    return 0


def _config(arguments: argparse.Namespace):
    """The config asked for; a mistake in an option is said before anything is read."""
    from megatron_encdec.platform import device
    from megatron_encdec.training.config import load_config
    from megatron_encdec.training.profiling import steps_of
    from megatron_encdec.training.stop import seconds_of

    device.choose(arguments.device)
    if arguments.until is not None and arguments.until < 1:
        raise UserError(f"--until {arguments.until}: a step number of 1 or more")
    seconds_of(arguments.time_limit)
    steps_of(arguments.profile)
    overrides = list(arguments.overrides)
    if arguments.fork is not None:
        path, step = split_step(arguments.fork)
        overrides += [f"run.from.path={path}", f"run.from.step={'' if step is None else step}", "run.from.state=all"]
    return load_config(arguments.config, overrides)


def _plan(arguments: argparse.Namespace, ranks: int, looks: bool):
    """What is to be done by `ranks`; a mistake is said before anything begins. looks: whether this process is the one
    that looks where the run goes on from."""
    from megatron_encdec.training.origin import check_origin
    from megatron_encdec.training.plan import make_plan

    plan = make_plan(_config(arguments), ranks)
    if looks:
        check_origin(plan, arguments.fallback)
    return plan


def _rank(arguments: argparse.Namespace, began: float, signals: StopSignals) -> int:
    """This process's part of the run: all of it, or one rank's."""
    from megatron_encdec.platform import device, distributed
    from megatron_encdec.platform.watchdog import LONG
    from megatron_encdec.training.agreement import agree, identity

    environment = RankEnvironment.read()
    store = distributed.join(_name(arguments), signals)
    with distributed.peers():
        plan = agree(store, environment, lambda: _plan(arguments, environment.world_size, environment.rank == 0),
                     lambda made: identity(made, arguments.until))
        from megatron_encdec.training.execute import Options, execute
        from megatron_encdec.training.profiling import steps_of
        from megatron_encdec.training.stop import seconds_of

        config = plan.config
        if config.run.deterministic:
            device.use_deterministic_kernels()
        options = Options(arguments.until, arguments.fallback, seconds_of(arguments.time_limit), began,
                          steps_of(arguments.profile), arguments.live)
        topology = distributed.initialize(config.parallel.tensor, config.parallel.pipeline,
                                          config.run.hang_timeout + LONG, signals=signals)
        return execute(plan, topology, options, signals)
