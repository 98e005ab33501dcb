"""The command line. Each verb parses, calls one stage and prints its result; heavy imports happen inside the verbs."""

import atexit
import gc
import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

from ..console import data, debug, fail, mute, opened, unmute
from ..environment import ECHO, cache_folder, command_line, launched, rank, stop_signals, world_size
from ..errors import ClaError, ExitCode, InputError, Interrupted, Stopped
from ..refusals import is_refusal, refusal
from .app import app
from .words import CLICK_ERROR, check_words, explained, help_of

from . import inspect, convert, verify, chat, uptrain, run, eval, bench, report, recipes, cache  # isort: skip  (as in --help)

__all__ = [
    "app", "bench", "cache", "chat", "convert", "eval", "inspect", "main", "recipes", "report", "run", "uptrain",
    "verify",
]  # fmt: skip


_OF_CONVERSION = (
    "accelerate", "datasets", "gguf", "jinja2", "lm_eval", "matplotlib", "pyarrow", "pydantic", "scipy"
)  # fmt: skip
"""Imports of what the extra `convert` installs."""


def main() -> None:
    """Entry point: run the app and turn errors into what / why / how to fix and an exit code."""
    atexit.register(gc.freeze)  # Python would look through all that torch brings for garbage at its end: seconds
    opened()
    leads = rank() == 0
    for number in stop_signals():
        # One that waits for the first cannot run a handler, and has nothing to lose.
        signal.signal(number, _interrupt if leads else signal.SIG_DFL)
    try:
        if not leads:
            mute()
        _run()
    except Stopped:
        if debug():
            raise
        interrupted = Interrupted("Interrupted", fix=f"What is finished is whole. To resume: {command_line()}")
        # Who launched this says so itself; and who speaks is not known before all have met, which they do not any more.
        if not launched() and (world_size() == 1 or _speaks()):
            fail(interrupted)
        sys.exit(interrupted.exit_code)
    finally:
        _heed_no_more()  # Python, which now ends, would show what a handler raises


def _run() -> None:
    alone = world_size() == 1
    try:
        check_words(sys.argv[1:])
        if not {"-h", "--help", "--version"} & set(sys.argv):
            _check_here()
        sys.exit(app(prog_name="cla-convert", standalone_mode=False))
    except SystemExit as ended:
        # click ends with 1, which would say a bug, where whoever read the output has gone (`| head`).
        sys.exit(ExitCode.NO_READER if isinstance(ended.__context__, BrokenPipeError) else ended.code)
    except CLICK_ERROR as error:
        if text := help_of(error):
            data(text)
            sys.exit(ExitCode.USAGE)
        mistake = explained(error)
        if alone or _speaks():
            fail(mistake)
        sys.exit(mistake.exit_code)
    except (ClaError, OSError) as error:
        if debug() or not (isinstance(error, ClaError) or is_refusal(error)):
            raise
        error = error if isinstance(error, ClaError) else _refused(error)
        if alone or _speaks():
            fail(error)
        sys.exit(error.exit_code)
    except ModuleNotFoundError as error:
        if debug() or error.name is None or error.name.split(".")[0] not in _OF_CONVERSION:
            raise
        missing = InputError(
            f"This needs the package {error.name.split('.')[0]}, which is not installed",
            why="cla-convert alone brings what loads and serves a converted model.",
            fix="pip install 'cla-convert[convert]'",
        )
        if alone or _speaks():
            fail(missing)
        sys.exit(missing.exit_code)
    except Exception:
        if alone or _speaks():
            raise
        sys.exit(ExitCode.BUG)


def _check_here() -> None:
    """Raise InputError in a folder that has been removed: it has no path, and torch does not find its own parts."""
    try:
        Path.cwd()
    except OSError as error:
        raise InputError(
            "The folder that you are in is gone",
            why="It was removed, or made anew, after it was entered.",
            fix='Enter another one; or, if it was made anew, `cd "$PWD"`.',
        ) from error


def _refused(error: OSError) -> InputError:
    """What the system says of a path; of the cache, which nobody named, with what else it may be."""
    told = refusal(error)
    with suppress(InputError):  # no home, and so no cache
        if error.filename is None:
            return told
        path, cache = Path(os.fsdecode(error.filename)).absolute(), cache_folder().absolute()
        if path.is_relative_to(cache) or (cache.is_relative_to(path) and not path.exists()):
            told.fix = "It is for the cache. Let CLA_CONVERT_CACHE name another folder, one that may be written to."
    return told


def _speaks() -> bool:
    """Whether this process, of several that torchrun started, is the first to fail: only that one says why."""
    from ..training.torchrun import first_to_fail

    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun ends all processes once one has failed
    if speaks := first_to_fail():
        unmute()
    return speaks


def _interrupt(number: int, frame: object) -> None:
    """Stop at once; whatever is published is whole. Uptraining replaces this handler by one that saves first."""
    global _heard
    now = time.monotonic()
    if _heard is None:
        _heard = now
        raise Stopped
    if now - _heard > ECHO:  # a second request does not wait for what is being cleared away
        _heed_no_more()
        signal.raise_signal(number)


_heard: float | None = None
"""When a signal asked to stop, in seconds of the monotonic clock."""


def _heed_no_more() -> None:
    for number in stop_signals():
        if signal.getsignal(number) is _interrupt:
            signal.signal(number, signal.SIG_DFL)
