"""The verb `study`: a controlled study as one file: its plan, its runs, its report."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from megatron_encdec.platform.errors import UserError, add_stopped_code, choose_stopped_code
from megatron_encdec.platform.json_text import json_text
from megatron_encdec.platform.signals import interrupts_end_the_process

DESCRIPTION = """\
A controlled study of many models as one file, and what its results say.

  megatron-encdec study plan STUDY.yaml                         what would be trained, and what it costs; trains nothing
  megatron-encdec study run STUDY.yaml --jobs 2                 train, export, score, report; the same command goes on
  megatron-encdec study report RESULTS --output report          tables, figures and a page from results
  megatron-encdec study advise --size 610m --budget 100B        what to try, and which results say so

`megatron-encdec study plan --help` explains the file; --help after the other three, what they do.
"""
STUDY = """\
A STUDY.yaml names a base config and the models to compare, by recipes in the way of arXiv 2507.00994:

  base: base.yaml                                     a pretraining config: data, batch, optimizer, schedule
  output: work_dirs/study                             everything the study makes
  models: ["610m-mlm{20,40}-42k", 610m-clm-10k-mlm40-42k]     the last number of a name is its steps in all
  finetune: {config: finetune.yaml}                   optional: score them

Further keys: seeds, checkpoints, cpt, resources, executor, slurm (docs/study.md).
"""
PLAN = """\
Print the tree of a study's runs: what models have in common is one stretch, trained once; steps, tokens and GPU-hours
one by one and shared; what is done and what is to do. Needs neither data nor tokenizer nor a GPU.

  megatron-encdec study plan examples/study_paper.yaml
  megatron-encdec study plan STUDY.yaml --json                  for programs
  megatron-encdec study plan STUDY.yaml --picture tree.svg      the tree as a figure (or .png)

"""
RUN = """\
Do what the plan says: train each stretch once, export each model, fine-tune it, write the report. Killed at any
moment, the same command goes on; jobs that still run are found again. Ctrl-C or SIGTERM has all jobs save and ends.

  megatron-encdec study run STUDY.yaml --jobs 2
  megatron-encdec study run STUDY.yaml --executor slurm

A stretch that fails stops only what depends on it. Checkpoints that nothing needs any more are deleted.

"""
ADVISE = """\
For a size and a budget: which share of CLM, which mask ratio, which fine-tuning rates to try, with the numbers that
say so and what is not known. The evidence is the paper's, or trees of your own results.

  megatron-encdec study advise --size 610m --budget 100B
  megatron-encdec study advise --size tiny --budget 5M work_dirs/study_tiny/results
"""
REPORT = """\
Read trees of fine-tuning results and write what they come to, in the paper's way: for each seed the learning rate
with the best validation score, then mean and interval (1.96 * std / sqrt(n)) of those test scores over seeds.

  megatron-encdec study report STUDY.yaml                       to OUTPUT/report
  megatron-encdec study report results --output report
  megatron-encdec study report ours theirs --output report --reference 610m-mlm40-42k

A tree is what `finetune` writes: TREE/<model>/<SC|TC|QA|IR>/<dataset>/lr<LR>_sd<seed>/results.json, baselines under
TREE/baselines. DIR gets index.html (one file, opens without a network), report.md, tables/*.csv and figures/*.png.
Runs that failed or are missing are listed, and never averaged away. The same results give the same bytes.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Sub-commands and options of `study`."""
    things = parser.add_subparsers(dest="thing", metavar="plan|run|report|advise", required=True)

    def command(name: str, summary: str, description: str) -> argparse.ArgumentParser:
        return things.add_parser(name, help=summary, description=description,
                                 formatter_class=argparse.RawDescriptionHelpFormatter)

    plan = command("plan", "the tree of a study's runs, and what it costs", PLAN + STUDY)
    plan.add_argument("--json", action="store_true", help="for programs")
    plan.add_argument("--picture", metavar="FILE", type=Path, help="the tree as a figure, .svg or .png")
    run = command("run", "train, export, fine-tune and report what a study plans", RUN + STUDY)
    run.add_argument("--executor", choices=("local", "slurm"), help="where jobs run (default: the study's, else local)")
    run.add_argument("--jobs", type=int, default=1, metavar="N", help="jobs at a time on this machine (default: 1)")
    run.add_argument("--keep-all", action="store_true", help="delete no checkpoint")
    add_stopped_code(run)
    for child in (plan, run):
        child.add_argument("study", metavar="STUDY.yaml", help="base, output, models, ...")
        child.add_argument("overrides", nargs="*", metavar="dotted.key=value", help="set a key of the study")
    advise = command("advise", "what to try for a size and a budget, and what says so", ADVISE)
    advise.add_argument("--size", required=True, metavar="SIZE", help="a preset, such as 610m")
    advise.add_argument("--budget", required=True, metavar="TOKENS", help="input tokens, such as 100B or 5e9")
    advise.add_argument("trees", nargs="*", metavar="TREE", type=Path, help="own results (default: the paper's)")
    report = command("report", "tables, figures and a page from results", REPORT)
    add = report.add_argument
    add("trees", nargs="+", metavar="STUDY.yaml|TREE", type=Path,
        help="a study, or trees of results, which are read as one")
    add("--output", metavar="DIR", type=Path, help="where the report goes (default for a study: OUTPUT/report)")
    add("--reference", metavar="MODEL",
        help="compare every model with this one (default: every pair, shown up to six models)")


def run(arguments: argparse.Namespace) -> int:
    """Run the verb; the exit code."""
    return {"plan": _plan, "run": _run, "report": _report, "advise": _advise}[arguments.thing](arguments)


def plan_of(study: Path, overrides: Sequence[str] = ()):
    """The plan of the study file."""
    with interrupts_end_the_process():
        from megatron_encdec.platform import device
        from megatron_encdec.study.config import load_study
        from megatron_encdec.study.plan import plan_study

    device.choose("auto")
    return plan_study(load_study(study, overrides))


def _plan(arguments: argparse.Namespace) -> int:
    plan = plan_of(arguments.study, arguments.overrides)
    from megatron_encdec.study.local import is_running
    from megatron_encdec.study.store import Status, Store

    status = Status(plan, Store(Path(plan.study.output)))
    jobs = status.store.output / "jobs" / "stretches"
    states = status.states([branch.id for branch in status.stretches if is_running(jobs / branch.id)])
    if arguments.picture:
        from megatron_encdec.study.tree_figure import write_picture

        write_picture(plan, states, arguments.picture)
    text = json_text(plan.as_dict(states), 2) if arguments.json else plan.text(states)
    print("\n".join([text, *([] if arguments.json else status.notes)]))
    return 0


def _run(arguments: argparse.Namespace) -> int:
    choose_stopped_code(arguments.stopped_exit_code)
    if arguments.jobs < 1:
        raise UserError(f"--jobs {arguments.jobs}: at least one")
    plan = plan_of(arguments.study, arguments.overrides)
    from megatron_encdec.platform.device import visible_gpus
    from megatron_encdec.study.driver import Driver
    from megatron_encdec.study.local import LocalExecutor
    from megatron_encdec.study.slurm import SlurmExecutor

    slurm = (arguments.executor or plan.study.executor) == "slurm"
    executor = SlurmExecutor(plan.study.slurm) if slurm else LocalExecutor(arguments.jobs, visible_gpus())
    return Driver(plan, executor, arguments.keep_all).run()


def _advise(arguments: argparse.Namespace) -> int:
    from megatron_encdec.model.config import PRESETS
    from megatron_encdec.platform.schema import one_of
    from megatron_encdec.study.advice import advise

    one_of(tuple(PRESETS), arguments.size, "--size")
    print("\n".join(advise(arguments.size, _tokens_of(arguments.budget), arguments.trees)))
    return 0


def _tokens_of(text: str) -> float:
    """`100B` -> 1e11."""
    number, unit = (text[:-1], text[-1].lower()) if text[-1:].isalpha() else (text, "")
    try:
        tokens = float(number) * {"": 1, "k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}[unit]
    except (ValueError, KeyError):
        tokens = 0.0
    if not 0 < tokens < float("inf"):
        raise UserError(f"--budget {text}: a number of tokens, such as 100B, 500M or 5e9")
    return tokens


def _report(arguments: argparse.Namespace) -> int:
    with interrupts_end_the_process():
        from megatron_encdec.study.report import report, report_study

    first, *more = arguments.trees
    if first.is_file() and not more:
        report_study(plan_of(first), arguments.output, arguments.reference)
        return 0
    if arguments.output is None:
        raise UserError("--output DIR: where the report goes")
    report(arguments.trees, arguments.output, arguments.reference)
    return 0
