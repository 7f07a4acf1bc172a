"""The verb `study`: fine-tuned results -> tables, figures and a page."""

import argparse
from pathlib import Path

from megatron_encdec.platform.signals import interrupts_end_the_process

REPORT = """\
Read trees of fine-tuning results and write what they come to, in the paper's way: for each seed the learning rate
with the best validation score, then mean and interval (1.96 * std / sqrt(n)) of those test scores over seeds.

  megatron-encdec study report results --output report
  megatron-encdec study report ours theirs --output report --reference 610m-mlm40-42k

A tree is what `finetune` writes: TREE/<model>/<SC|TC|QA|IR>/<dataset>/lr<LR>_sd<seed>/results.json, baselines under
TREE/baselines. DIR gets index.html (one file, opens without a network), report.md, tables/*.csv and figures/*.png.
Runs that failed or are missing are listed, and never averaged away. The same results give the same bytes.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Sub-commands and options of `study`."""
    things = parser.add_subparsers(dest="thing", metavar="report", required=True)
    report = things.add_parser("report", help="tables, figures and a page from trees of fine-tuning results",
                               description=REPORT, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = report.add_argument
    add("trees", nargs="+", metavar="TREE", type=Path, help="a tree of results; several are read as one")
    add("--output", required=True, metavar="DIR", type=Path, help="where the report goes")
    add("--reference", metavar="MODEL",
        help="compare every model with this one (default: every pair, shown up to six models)")


def run(arguments: argparse.Namespace) -> int:
    """Run the verb; the exit code."""
    with interrupts_end_the_process():
        from megatron_encdec.study.report import report

    report(arguments.trees, arguments.output, arguments.reference)
    return 0
