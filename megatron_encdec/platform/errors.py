"""The kinds of failure the command line tells apart."""


class UserError(Exception):
    """A mistake the user can mend: printed as one line, exit code 2, no traceback.

    The message names the file, key or line, the value found, and what to do instead.
    """


class IntegrityError(UserError):
    """Data or a checkpoint on disk is not what its own records say (truncated, altered, missing)."""


class AgreedError(UserError):
    """A `UserError` that all ranks raise together: rank 0 alone prints it."""


class RunFailed(Exception):
    """Training cannot go on, and not by a mistake in the command: printed without a traceback, exit code 1.

    All ranks raise it together; rank 0 alone prints it.
    """
