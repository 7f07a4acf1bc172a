"""The kinds of failure the command line tells apart, and the exit code of each."""

import argparse
import os
import signal
import sys
from collections.abc import Callable

WARNING = "WARNING: "  # how a note begins that speaks of a probable mistake


class UserError(Exception):
    """A mistake the user can mend: printed as one line, exit code 2, no traceback. The message names the file, key or
    line, the value found, and what to do instead."""

    is_said = False  # whether it has been printed, by this process or by another one to the same place


class IntegrityError(UserError):
    """Data or a checkpoint on disk is not what its own records say (truncated, altered, missing)."""


class Gone(IntegrityError):
    """What was there a moment ago was deleted by the process that it belongs to."""


class AgreedError(UserError):
    """A `UserError` that all ranks raise together: rank 0 alone prints it."""


class RunFailed(Exception):
    """Training cannot go on, and not by a mistake in the command: printed without a traceback, exit code 1. All ranks
    raise it together; rank 0 alone prints it."""

    is_said = False


class ParityError(Exception):
    """A Hugging Face model is not the trunk: a fault of the conversion, never the user's."""


class NotMet(RunFailed):
    """The other processes of the job are not to be found: each one that looks for them says it."""


class Stopped(Exception):
    """A signal to another process of the job ended it while nothing was to be saved: exit code `stopped_code`."""

    is_said = False


_stopped_code = 0


def stopped_code() -> int:
    """Exit code where a signal or a time limit ended the work before its end, in good order."""
    return _stopped_code


def code_of(number: int) -> int:
    """Exit code of a verb that the signal `number` has stopped in good order."""
    return 130 if number == signal.SIGINT else stopped_code()


def choose_stopped_code(code: int) -> None:
    """That of this process from now on, and of those that it forks: `--stopped-exit-code`."""
    global _stopped_code
    if code != 0 and not 3 <= code <= 99:
        raise UserError(f"--stopped-exit-code {code}: a code from 3 to 99; others mean something already")
    _stopped_code = code


def add_stopped_code(parser: argparse.ArgumentParser) -> None:
    """The option of a verb that can be stopped and goes on by the same command."""
    parser.add_argument("--stopped-exit-code", type=int, default=0, metavar="N",
                        help="exit code if a signal (but Ctrl-C: 130) or a time limit stopped it before its end; the "
                             "same command then goes on (default: 0, as if it were finished)")


def say(error: UserError | RunFailed) -> None:
    """Print the line of `error`, once, where it is for this process to do so. What may take long afterwards, such as
    leaving the other ranks, is begun after this: a rank that is late is ended."""
    agreed = isinstance(error, (AgreedError, RunFailed))  # by all ranks: one of them says it
    rank = os.environ.get("RANK")
    if not error.is_said and (not agreed or isinstance(error, NotMet) or rank in (None, "0")):
        print(f"megatron-encdec: {f'rank {rank}: ' if rank and not agreed else ''}{error}", file=sys.stderr)
    error.is_said = True


def as_line(note: str) -> str:
    """A note of a run as it is printed: `note: ...`, or `WARNING: ...` where it begins so."""
    return note if note.startswith(WARNING) else f"note: {note}"


def exit_code(work: Callable[..., int], *arguments) -> int:
    """What `work(*arguments)` returns; where it fails, the failure's line is printed and this is its exit code."""
    try:
        return work(*arguments)
    except (UserError, RunFailed) as error:
        say(error)
        return 2 if isinstance(error, UserError) else 1
    except Stopped as stop:
        if os.environ.get("RANK") in (None, "0") and not stop.is_said:
            print(stop)
        return stopped_code()
    except KeyboardInterrupt:
        print("megatron-encdec: interrupted", file=sys.stderr)
        return 130
