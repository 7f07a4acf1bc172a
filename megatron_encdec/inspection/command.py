"""The verb `inspect`: one sub-command for each thing that can be looked into.

A module a thing: `examine(arguments)` gives a report, which `--json` prints as it is and `print_report` in words.
"""

import argparse
import importlib
import sys
from pathlib import Path

from megatron_encdec.platform.errors import UserError
from megatron_encdec.platform.json_text import json_text

DESCRIPTION = """\
Look into what a run reads and writes. Nothing is changed, and no GPU is needed.

  megatron-encdec inspect data corpora/docs --tokenizer corpora/tokenizer --objective mlm:0.4
  megatron-encdec inspect run runs/biphasic                phases, losses, speed against the unigram entropy
  megatron-encdec inspect run runs/biphasic runs/mlm       several runs side by side
  megatron-encdec inspect run runs/biphasic --page out/    the same as a page: curves, time line, data
  megatron-encdec inspect run CONFIG.yaml --sample 0 9000  what the trainer reads at these samples
  megatron-encdec inspect data corpora/docs --verify       is every byte still what was written?
  megatron-encdec inspect checkpoint runs/biphasic@1000    what stands in a checkpoint
"""
DATA = """\
Statistics of a .bin/.idx pair, and windows of it as a model sees them.

With --tokenizer some windows are decoded, each document ending in a visible mark. With --objective they
show what must be predicted: [MASK:word] is a mask with the word under it, [RANDOM:x:word] a word replaced
by x, [KEPT:word] a word left as it is and predicted all the same; for clm, [NO TARGET:word] is a position
whose next token is not predicted, the last of each document and of the window.

The windows are samples 0, 1, ... of a run on this data alone, with data.seed, data.sequence_length and
isolate_documents=true. `inspect run CONFIG --sample I` shows the samples of a run as it is configured.

--verify reads all of the data and compares the hash of every shard with the manifest's; of data without a
manifest with PREFIX.fingerprint.json, which the first look at it writes. Exit 2 names the bytes that differ.
"""
RUN = """\
The closing table of a run, from its metrics.jsonl: per phase the steps, tokens, targets, losses and speed;
validation losses by objective at each phase's end; and the unigram entropy of the training data, the loss
of a model that knows token frequencies only. A phase that has learnt anything else ends below it.

Several runs are put side by side by their final validation losses, with what differs between them.

--page DIR writes DIR/index.html, one file that needs no network: losses, learning rate, gradient norm, speed, phases,
checkpoints, resumes and changes on the time line, sources and their epochs; several runs over each other. Its figures
are beside it as PNG, its tables as CSV. It can be drawn of a run under way, and again later.

With --sample one CONFIG.yaml or run directory is enough, trained or not: each sample number is shown as the
trainer reads it, with step, phase and objective, where it comes from, and its text. [END OF DOCUMENT] is where a
document ends, [END OF SEGMENT] where attention ends without that; marks of objectives as in `inspect data`.
"""
CHECKPOINT = """\
A checkpoint's run_state.json in words, and its size on disk. RUN_DIR alone means the newest checkpoint.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Sub-commands and options of `inspect`."""
    things = parser.add_subparsers(dest="thing", metavar="data|run|checkpoint", required=True)

    def thing(name: str, summary: str, description: str) -> argparse.ArgumentParser:
        return things.add_parser(name, help=summary, description=description, formatter_class=parser.formatter_class)

    add = thing("data", "token files: statistics and decoded windows", DATA).add_argument
    add("prefix", metavar="PREFIX", help="of PREFIX.bin and PREFIX.idx, as preprocess --output")
    add("--tokenizer", metavar="PATH", help="the tokenizer that wrote the data; without it, statistics only")
    add("--mask-token", metavar="TOKEN", help="the mask, where the tokenizer names none")
    add("--eod-token", metavar="TOKEN", help="end of document (default: the tokenizer's own)")
    add("--objective", metavar="NAME", help="clm, mlm, mlm:0.4 or '{name: mlm, mask_fraction: 0.8, ...}': "
        "show what it hides and predicts")
    add("--samples", type=int, default=2, metavar="N", help="windows to show (default: 2)")
    add("--sequence-length", type=int, default=128, metavar="S", help="tokens of a window (default: 128)")
    add("--seed", type=int, default=1234, metavar="N", help="data.seed: order and masks (default: 1234)")
    add("--verify", action="store_true", help="read every byte and compare it with what was recorded")

    runs = thing("run", "a run's phases and losses; runs side by side; samples as the trainer reads them", RUN)
    runs.set_defaults(overrides=[])
    add = runs.add_argument
    add("runs", nargs="+", metavar="RUN_DIR",
        help="run directory (run.dir of the config); with --sample also CONFIG.yaml and dotted.key=value")
    add("--sample", nargs="+", action="extend", default=[], metavar="I", help="show these samples, numbered from 0")
    add("--model", nargs="+", action="extend", default=[], metavar="DIR",
        help="exported models to name below the table (one run only)")
    add("--page", metavar="DIR", help="write a page with curves into this folder (needs matplotlib)")

    add = thing("checkpoint", "a checkpoint: step, counters, topology", CHECKPOINT).add_argument
    add("checkpoint", metavar="RUN_DIR[@STEP]", help="run directory, and which step of it")
    add("--tensors", action="store_true", help="list the tensors: global shape, dtype, size (no tensor is loaded)")
    for child in things.choices.values():
        child.add_argument("--json", action="store_true", help="print one JSON object, floats in full")


def run(arguments: argparse.Namespace) -> int:
    """Run the sub-command; the exit code."""
    name = _module_for_run(arguments) if arguments.thing == "run" else arguments.thing
    if name == "data":
        _require(arguments.tokenizer or not arguments.objective,
                 "inspect data: --objective needs --tokenizer, the one that wrote the data")
        _require(arguments.samples >= 0, f"inspect data: --samples {arguments.samples} is negative")
    module = importlib.import_module(f"megatron_encdec.inspection.{name}")
    report = module.examine(arguments)
    if name == "run" and arguments.page:
        from megatron_encdec.inspection.run_page import write_page

        written = write_page(arguments.runs, Path(arguments.page), report.get("remarks", ()))
        report["page"] = [str(Path(arguments.page) / path) for path in written]
    if arguments.json:
        is_unicode = (sys.stdout.encoding or "utf-8").lower().startswith("utf")
        print(json_text(report, 2, ascii_only=not is_unicode))
    else:
        module.print_report(report)
    return 0


def _module_for_run(arguments: argparse.Namespace) -> str:
    """Tells runs, sample numbers and overrides apart, wherever they stand among the options."""
    models, sample = arguments.model, arguments.sample
    if not sample:
        runs = arguments.runs + arguments.overrides  # directories may have = in their names
        changes = [run for run in runs if "=" in run and not Path(run).exists()]
        _require(not changes, f"inspect run: {' '.join(changes)}: a config is changed only with --sample")
        _require(not models or len(runs) == 1,
                 "inspect run: --model goes with one run; leave it out to compare several")
        arguments.runs = runs
        return "run"
    path, *changes = arguments.runs + [word for word in sample if "=" in word] + arguments.overrides
    others = [word for word in changes if "=" not in word]
    numbers = [word for word in sample if "=" not in word]
    strange = [word for word in numbers if not (word.isascii() and word.isdigit())]
    _require(not others, f"inspect run: --sample looks at one run, found {path} and {' '.join(others)}")
    _require(not strange, f"inspect run: --sample {' '.join(strange)}: expected a sample number of 0 or more, or "
             "dotted.key=value")
    _require(numbers, "inspect run: --sample needs a sample number, e.g. --sample 0")
    _require(not models and not arguments.page, f"inspect run: {'--model' if models else '--page'} goes with the table "
             "of a run, not with --sample")
    arguments.runs, arguments.overrides, arguments.sample = [path], changes, [int(word) for word in numbers]
    return "sample"


def _require(condition: object, message: str) -> None:
    if not condition:
        raise UserError(message)
