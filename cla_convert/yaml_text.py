"""YAML as recipes have it: no key twice, dates are text, and what is wrong is said with its line in our own words."""

import re
from typing import Any, NamedTuple

import yaml


class Mistake(Exception):
    """Text that is not the YAML of a recipe: where, why and how to mend it."""

    def __init__(self, line: int | None, why: str, fix: str) -> None:
        self.line, self.why, self.fix = line, why, fix
        super().__init__(why)


def parse(text: str) -> Any:
    """The value of a YAML text. Raises Mistake."""
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        raise _without_space(text, error) or _explained(error) from error
    except yaml.YAMLError as error:  # characters that no YAML may hold
        at = getattr(error, "position", None)
        line = text.count("\n", 0, at) + 1 if isinstance(at, int) else None
        raise Mistake(line, "A control character stands here, which YAML does not allow.", "Remove it.") from error
    except RecursionError as error:
        raise Mistake(None, "Lists or sections lie too deep in each other.", "Write it flatter.") from error


class Lines(NamedTuple):
    """Where a setting stands."""

    name: int
    value: int
    """Where its value begins: often further down."""


def lines_of(text: str) -> dict[str, Lines]:
    """The lines of every key and list item of a text that `parse` takes, by its dotted name: `data.sources.0.path`."""
    found: dict[str, Lines] = {}

    def walk(node: yaml.Node | None, prefix: str) -> None:
        if isinstance(node, yaml.MappingNode):
            parts = [(key.value, key, value) for key, value in node.value]
        elif isinstance(node, yaml.SequenceNode):
            parts = [(number, item, item) for number, item in enumerate(node.value)]
        else:
            return
        for name, at, value in parts:
            found[f"{prefix}{name}"] = Lines(at.start_mark.line + 1, value.start_mark.line + 1)
            walk(value, f"{prefix}{name}.")

    walk(yaml.compose(text, Loader=yaml.SafeLoader), "")
    return found


class _Loader(yaml.SafeLoader):
    """PyYAML's own, but a name is text and may stand once only in a section: of two values the first would be lost."""

    yaml_implicit_resolvers = {  # noqa: RUF012  (PyYAML's way: no recipe has dates, and a 13th month is an error there)
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_mapping_node(self, anchor: Any) -> Any:
        """A section. Raises Mistake for a name that is no text, or that it has twice."""
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            line = key.start_mark.line + 1
            _check_name(key, line)
            if key.value in lines:
                why = f"`{key.value}` was given in line {lines[key.value]} already."
                raise Mistake(line, why, "Remove one of the two.")
            lines[key.value] = line
        return node

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        """A value. Raises Mistake for a number that Python does not read."""
        try:
            return super().construct_object(node, deep)
        except ValueError as error:
            fix = "Write it shorter, or in quotes if it is text."
            raise Mistake(node.start_mark.line + 1, "A number cannot be read.", fix) from error


def _check_name(key: yaml.ScalarNode, line: int) -> None:
    """Raise Mistake for a name that YAML takes for something else than text, or that begins with what looks blank."""
    if key.tag not in ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"):
        fix = "Put it into quotes, or give the name of a setting."
        raise Mistake(line, f"The name `{key.value}` is a number, nothing or a yes or no to YAML.", fix)
    if key.style is None and key.value != key.value.strip():
        why = "It begins or ends with a character that looks blank and is none to YAML."
        raise Mistake(line, why, "Remove it; indent with ordinary spaces.")


_NO_SPACE = re.compile(r"\s*(?:- )?[A-Za-z_]\w*:[^\s/\\]")
"""`name:value`; no address, and no path of Windows."""


def _without_space(text: str, error: yaml.MarkedYAMLError) -> Mistake | None:
    """The line without a space after its colon that begins what PyYAML did not understand: it joins with the next."""
    mark = error.problem_mark
    if mark is None or not any(words in (error.problem or "") for words in _JOINED):
        return None
    found, lines = None, text.split("\n")[: mark.line + 1]
    for number, line in reversed(list(enumerate(lines, 1))):
        if _NO_SPACE.match(line):
            found = number
        elif line.partition("#")[0].strip() and number <= mark.line:
            break
    return Mistake(found, "A space is missing after the colon.", "Write `name: value`.") if found else None


_JOINED = ("mapping values are not allowed", "could not find expected ':'", "expected <block end>")


def _explained(error: yaml.MarkedYAMLError) -> Mistake:
    """What PyYAML found, in words for people who do not know its grammar."""
    problem, mark = error.problem or "", error.problem_mark or error.context_mark
    opened = error.context_mark.line + 1 if error.context_mark else None
    line = mark.line + 1 if mark else None
    for beginning, (why, fix, at_opening) in _MEANINGS.items():
        if beginning in problem:
            return Mistake(opened if at_opening else line, why, fix)
    column = f" at column {mark.column + 1}" if mark else ""
    return Mistake(line, f"This line is not understood{column}.", "Write `name: value`, and text with marks in quotes.")


_QUOTE = "Put the value into quotes: name: 'value'."
_CLOSE = "Close it, and put a comma between its parts."
_COLUMN = "Begin all lines of a section in the same column, two spaces further in than its name."
_MEANINGS: dict[str, tuple[str, str, bool]] = {
    "character '\\t'": ("It is indented with a tab.", "Use spaces: two for each level.", False),
    "cannot start any token": ("A value begins with a mark that YAML keeps for itself.", _QUOTE, False),
    "mapping values are not allowed": ("A second `: ` stands in a value, or the line is indented too far.",
                                       f"{_QUOTE} {_COLUMN}", False),
    "unexpected end of stream": ("A quotation mark that opens here is never closed.", "Close it.", True),
    "document separator": ("A quotation mark that opens here is never closed.", "Close it.", True),
    "expected ',' or '}'": ("A `{` that opens here is not closed.", _CLOSE, True),
    "expected ',' or ']'": ("A `[` that opens here is not closed.", _CLOSE, True),
    "expected the node content": ("A value is missing, or a bracket is not closed.", "Give it, or close it.", False),
    "expected <block end>": ("It begins in another column than the lines it belongs with.", _COLUMN, False),
    "could not find expected ':'": ("It is not of the form `name: value`.", "Give both, with a space between.", True),
    "sequence entries are not allowed": ("A list item stands where none can.",
                                         "Begin the list in a line of its own, below its name.", False),
    "undefined alias": ("A value that begins with `*` names another one, which is not there.", _QUOTE, False),
    "a constructor for the tag": ("A value that begins with `!` has a meaning of its own in YAML.", _QUOTE, False),
    "another document": ("`---` begins a second recipe.", "Keep one recipe in a file.", False),
    "unhashable key": ("A name is a list or a section.", "Use text as a name, and quotes around what has brackets.",
                       False),
}  # fmt: skip
"""Of PyYAML's words: what they mean, how to mend it, and whether the mistake is where a bracket or quote opens."""
