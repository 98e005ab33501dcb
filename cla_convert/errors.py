"""Errors a user can act on: what happened, why, how to fix it. Anything else is a bug and keeps its traceback."""

from enum import IntEnum


class ExitCode(IntEnum):
    """Process exit codes of the command line (documented in docs/cli.md)."""

    OK = 0
    BUG = 1
    USAGE = 2
    INPUT = 3
    GATE = 4
    INTERRUPTED = 130
    NO_READER = 141


class ClaError(Exception):
    """A problem that is not a bug: printed as what / why / how to fix, without a traceback."""

    exit_code = ExitCode.INPUT

    def __init__(self, what: str, why: str = "", fix: str = "") -> None:
        self.what, self.why, self.fix = what, why, fix
        super().__init__("\n".join(filter(None, (what, why, fix))))


class UsageError(ClaError):
    """The command line or the recipe is wrong."""

    exit_code = ExitCode.USAGE


class InputError(ClaError):
    """A model, file or folder was refused before any work began (or the environment cannot do the work)."""

    exit_code = ExitCode.INPUT


class NotFiniteError(InputError):
    """Weights, or what a model makes of a text, are NaN or infinite."""


class TrainingError(ClaError):
    """Uptraining had to stop (loss not finite, disk full); the last good checkpoint is kept."""

    exit_code = ExitCode.INPUT


class QualityGate(ClaError):
    """The model is worse than the recipe's margin allows, or nothing was measured; all results are written."""

    exit_code = ExitCode.GATE


class Interrupted(ClaError):
    """Stopped by the user; a checkpoint is saved and `fix` says how to resume."""

    exit_code = ExitCode.INTERRUPTED


class Stopped(BaseException):
    """A signal asks to stop at once, wherever the work is.

    No `Exception`: code on the way, libraries' too, would take it for a failure of what it calls, and go on.
    """


def first_line(error: BaseException) -> str:
    """What an error of a library says, in a line; the name of its type where it says nothing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]


def did_you_mean(word: str, choices: list[str]) -> str:
    """Return ` Did you mean 'x'?` for the closest of `choices`, whatever their case, or an empty string."""
    from difflib import get_close_matches

    lowered = {choice.lower(): choice for choice in reversed(choices)}
    close = get_close_matches(word.lower(), list(reversed(lowered)), n=1, cutoff=0.6)
    return f" Did you mean {lowered[close[0]]!r}?" if close else ""
