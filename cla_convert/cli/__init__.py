"""The command line. Each verb parses, calls one stage and prints its result; heavy imports happen inside the verbs."""

import signal
import sys

from ..console import debug, fail
from ..environment import command_line
from ..errors import ClaError, InputError, Interrupted
from .app import app

from . import models, training, evaluation, recipes  # isort: skip  (the order of --help)

__all__ = ["app", "evaluation", "main", "models", "recipes", "training"]


def main() -> None:
    """Entry point: run the app and turn errors into what / why / how to fix and an exit code."""
    for signal_number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signal_number, _interrupt)
    try:
        app()
    except (ClaError, PermissionError, FileExistsError, NotADirectoryError) as error:
        if debug():
            raise
        error = error if isinstance(error, ClaError) else InputError(f"A path cannot be used: {error}")
        fail(error)
        sys.exit(error.exit_code)


def _interrupt(number: int, frame: object) -> None:
    """Stop at once; whatever is published is whole. Uptraining replaces this handler by one that saves first."""
    raise Interrupted("Interrupted", fix=f"Nothing half-done is left behind. To resume: {command_line()}")
