"""The command line: one verb, one call.

Exit 0 on success, and where work was stopped in good order (or --stopped-exit-code); 2 on a user's mistake (one line);
130 on Ctrl-C; 1 otherwise.
"""

import argparse
import importlib
import sys

from megatron_encdec import __version__
from megatron_encdec.platform.errors import UserError, exit_code
from megatron_encdec.platform.signals import interrupts_end_the_process

# verb -> (module with add_arguments and run, what `--help` says of it)
VERBS = {
    "preprocess": ("megatron_encdec.text.command", "text -> indexed token files (.bin/.idx) and a manifest"),
    "pretrain": ("megatron_encdec.training.command", "run the phases of a config, or continue them"),
    "export": ("megatron_encdec.interop.export_command", "a checkpoint -> a stock Hugging Face model directory"),
    "import": ("megatron_encdec.interop.import_command", "a Hugging Face model directory -> a run to train on from"),
    "merge": ("megatron_encdec.interop.merge_command", "weights of several models of one shape, averaged"),
    "finetune": ("megatron_encdec.finetune.command", "exported models -> scores on labelled sets, rates x seeds"),
    "evaluate": ("megatron_encdec.finetune.evaluate_command", "models as they are -> scores on tasks of mteb"),
    "study": ("megatron_encdec.study.command", "many models in one file: plan, run, report, advise"),
    "inspect": ("megatron_encdec.inspection.command", "look into data, a run, or a checkpoint"),
    "doctor": ("megatron_encdec.inspection.doctor", "versions, device, backends; what is missing and how to get it"),
}


def parser_of(verb: str | None) -> argparse.ArgumentParser:
    """The whole parser; of the verbs `verb` alone has its options, so that no other one is imported."""
    parser = argparse.ArgumentParser(
        prog="megatron-encdec", description="Text-encoder pretraining on Megatron-core; the objective changes mid-run.")
    parser.add_argument("--version", action="version", version=__version__)
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name, (module, summary) in VERBS.items():
        child = verbs.add_parser(name, help=summary, description=summary,
                                 formatter_class=argparse.RawDescriptionHelpFormatter)
        if name == verb:  # import only what this call needs
            with interrupts_end_the_process():
                module = importlib.import_module(module)
            child.description = getattr(module, "DESCRIPTION", summary)
            module.add_arguments(child)
    return parser


def _parse(parser: argparse.ArgumentParser, argv: list[str]) -> argparse.Namespace:
    """Parse; overrides (`dotted.key=value`) may stand anywhere among the options."""
    arguments, rest = parser.parse_known_args(argv)
    if rest:
        if not hasattr(arguments, "overrides") or any(word.startswith("-") or "=" not in word for word in rest):
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        arguments.overrides += rest
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Run `megatron-encdec` with `argv`; the exit code."""
    return exit_code(_run, sys.argv[1:] if argv is None else argv)


def _run(argv: list[str]) -> int:
    for word in argv:
        if not word.isascii() and any("\ud800" <= character <= "\udfff" for character in word):
            raise UserError(f"{word!r}: not UTF-8; rename the file, or call this in a UTF-8 locale")
    arguments = _parse(parser_of(argv[0] if argv and argv[0] in VERBS else None), argv)
    return importlib.import_module(VERBS[arguments.verb][0]).run(arguments)
