"""Text that is no text: halves of characters, which JSON can hold and UTF-8 cannot."""

import re
from typing import Any

from .console import warn_once

_HALF = re.compile("[\ud800-\udfff]")


def replaced(value: Any, where: str) -> Any:
    """A string, or the strings within a JSON value, with U+FFFD for every half; a warning says so once for `where`."""
    if isinstance(value, dict):
        return {replaced(key, where): replaced(item, where) for key, item in value.items()}
    if isinstance(value, list):
        return [replaced(item, where) for item in value]
    if not isinstance(value, str) or value.isascii() or not _HALF.search(value):
        return value
    warn_once(f"{where} holds halves of characters (lone surrogates, as cut text in JSON has them): read as U+FFFD")
    return _HALF.sub("\ufffd", value)
