"""The nouns of a report: what a chapter may say, as plain frozen values that go through JSON and back.

A chapter of `periplus study` turns measured numbers into these blocks; `pdf` and `html` are two renderings of the same blocks.
Nothing here knows about fonts, files or HTML.

**Inline text.** The fields marked *inline* are plain text with four marks, and nothing else is markup:

    $norm(z)_2$      mathematics, in typst's notation
    *word*           emphasis (in pseudocode: a keyword, set bold)
    `name`           code
    [@label]         a reference to the `Equation`, `Figure`, `Table`, `Pseudocode` or `Reference` of that label

A backslash before one of ``\\ $ * ` [`` makes it literal. Text that a user gave (a folder's name, a label) goes through `plain`
or `code` first; the fields marked *literal* need no such care. Literal and inline text alike can never be executed.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

from periplus.errors import UsageError

MARKS = "\\$*`["
Cell = str | int | float | None


def plain(text: object) -> str:
    """A user's string, escaped so that inline text shows it as it is."""
    return re.sub(r"[\\$*`\[]", lambda match: "\\" + match.group(), str(text))


def code(text: object) -> str:
    """A user's string as inline code, whatever it contains."""
    return f"`{plain(text)}`" if str(text) else ""


@dataclass(frozen=True)
class Paragraph:
    """Prose (*inline*)."""

    text: str


@dataclass(frozen=True)
class Heading:
    """A heading inside a chapter (*inline*)."""

    text: str


@dataclass(frozen=True)
class Equation:
    """A displayed, numbered equation in typst's mathematics; `label` is what `[@label]` refers to."""

    typst: str
    label: str | None = None


@dataclass(frozen=True)
class Pseudocode:
    """Numbered lines (*inline*), indented by their leading spaces, two to a level."""

    title: str
    lines: tuple[str, ...]
    label: str | None = None


@dataclass(frozen=True)
class Figure:
    """A picture below the report's root (.svg, .png or .jpg; *literal* path), with the *literal* command that makes it again.

    `width` is a share of the column in (0, 1]; consecutive figures whose widths add up to at most 1 stand side by side.
    """

    path: str
    caption: str
    command: str | None = None
    alt: str = ""
    width: float = 1.0
    label: str | None = None


@dataclass(frozen=True)
class Table:
    """Rows of *inline* cells under a header that names the units.

    `align` holds one of left, center, right or decimal per column; without it, columns of numbers are aligned on the decimal
    point and others to the left. A cell written `*0.61*` stays aligned and is set bold. None is shown as a dash.
    """

    header: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    caption: str
    command: str | None = None
    align: tuple[str, ...] | None = None
    label: str | None = None

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.header):
                raise UsageError(f"table {self.caption!r}: a row has {len(row)} cells under {len(self.header)} headers")
        if self.align is not None and len(self.align) != len(self.header):
            raise UsageError(f"table {self.caption!r}: {len(self.align)} alignments for {len(self.header)} columns")
        if unknown := set(self.align or ()) - {"left", "center", "right", "decimal"}:
            raise UsageError(f"table {self.caption!r}: unknown alignment {sorted(unknown)[0]!r}")


@dataclass(frozen=True)
class Finding:
    """A conclusion computed from the data (*inline*), set apart from the prose; a line break begins a new paragraph of it."""

    text: str


@dataclass(frozen=True)
class KeyNumbers:
    """A few numbers to read first: rows of (value, what it is), both *inline*; the value is set large."""

    rows: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Answers:
    """The answers in short, for the first page: rows of (a chapter's *literal* key, *inline* text), each linked to its chapter."""

    rows: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Settings:
    """What was run: rows of *literal* (name, value)."""

    rows: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Command:
    """A command line to type (*literal*)."""

    text: str


Block = Paragraph | Heading | Equation | Pseudocode | Figure | Table | Finding | KeyNumbers | Answers | Settings | Command


@dataclass(frozen=True)
class Reference:
    """An entry of the list of references (*inline*), cited as `[@label]`."""

    label: str
    text: str


@dataclass(frozen=True)
class Chapter:
    """The answer to one question of the sheet: `key` is its number (2a), title and question are *inline*."""

    key: str
    title: str
    question: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Report:
    """A whole report: title and subtitle *inline*; authors, collaborators, hours and environment (name, value) *literal*."""

    title: str
    subtitle: str = ""
    authors: tuple[str, ...] = ()
    collaborators: tuple[str, ...] = ()
    hours: str | float | None = None
    summary_blocks: tuple[Block, ...] = ()
    chapters: tuple[Chapter, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()
    references: tuple[Reference, ...] = ()


NOUNS: dict[str, type[Any]] = {noun.__name__: noun for noun in (*get_args(Block), Reference, Chapter, Report)}


def to_data(value: Any) -> Any:
    """Blocks, chapters and reports as JSON values: objects with a `kind`, lists for tuples."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: to_data(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {"kind": type(value).__name__, **fields}
    if isinstance(value, (list, tuple)):
        return [to_data(item) for item in value]
    return value


def from_data(value: Any) -> Any:
    """The inverse of `to_data`; an unknown kind or field is a `UsageError` that names it."""
    if isinstance(value, list):
        return tuple(from_data(item) for item in value)
    if not isinstance(value, Mapping):
        return value
    kind = value.get("kind")
    if kind not in NOUNS:
        raise UsageError(f"report data: unknown kind of block {kind!r}")
    try:
        return NOUNS[kind](**{key: from_data(item) for key, item in value.items() if key != "kind"})
    except TypeError as error:
        raise UsageError(f"report data: {kind}: {error}") from None
