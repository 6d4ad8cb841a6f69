"""What can go wrong, by what the user can do about it.

Every error that Periplus raises on purpose is one of these. Each carries the exit code of the command line
(`periplus.cli`), and its message is one line that names the file, key or value and what to do.
"""


class PeriplusError(Exception):
    """Base of all errors raised on purpose. `exit_code` is what the command line returns for it."""

    exit_code = 1


class UsageError(PeriplusError, ValueError):
    """An argument, option or configuration key cannot be served (exit code 2)."""

    exit_code = 2


class DataError(PeriplusError, ValueError):
    """A data source is absent, empty, malformed, truncated or unknown (exit code 3)."""

    exit_code = 3


class RunError(PeriplusError):
    """A run folder or a checkpoint fails verification (exit code 4)."""

    exit_code = 4


class NonFiniteError(PeriplusError, ArithmeticError):
    """A loss or a gradient stopped being finite; nothing was updated with it (exit code 5)."""

    exit_code = 5


class Interrupted(KeyboardInterrupt):
    """SIGINT or SIGTERM arrived; the run has left a complete checkpoint (exit code 130)."""

    exit_code = 130
