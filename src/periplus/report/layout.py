"""From blocks to what a renderer needs: inline text parsed, everything numbered, references resolved, figures checked.

Both renderings read the dictionary made here and do nothing but set it, so the PDF and the page agree by construction, and
hostile text is dealt with in one place: after `clean` it is a list of runs whose text the renderers only ever print.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from periplus.errors import DataError, UsageError
from periplus.report.blocks import (
    MARKS,
    Answers,
    Block,
    Cell,
    Command,
    Equation,
    Figure,
    Finding,
    Heading,
    KeyNumbers,
    Paragraph,
    Pseudocode,
    Report,
    Settings,
    Table,
)

Run = dict[str, Any]

INLINE = re.compile(
    r"\\(?P<escaped>[\\$*`\[])"
    r"|\$(?P<math>[^$]+)\$"
    r"|`(?P<code>(?:[^`\\]|\\.)+)`"
    r"|\*(?!\s)(?P<emph>(?:[^*$\\]|\\.|\$[^$]+\$)+)(?<!\s)\*"
    r"|\[@(?P<ref>[\w:.+-]+)\]",
    re.DOTALL,
)
# [sign or relation] integer part, then from the decimal point on; what follows may be an interval, a unit, a mark
NUMBER = re.compile(r"\s*([<>≈~≤≥]?\s*[+\-−]?\d[\d\u2009\u202f,]*)((?:\.\d+)?(?:[^\d\w].*|[eE%×].*)?)", re.DOTALL)
LEADING = 160  # letters of a paragraph that is kept on the page of what it leads to
BRIEF = 24  # letters of the longest value of settings that are set in two columns
WHOLE = 30  # letters of a cell that begins with a number, and is set on one line
DASHES = {"", "-", "–", "—"}
MINUS = re.compile(r"(?<![\w.\-])-(?=[\d∞]|ln\b|E\b)|(?<=\s)-(?=\s)")  # before a number or between spaces, not in a range or a name
CLOSING = re.compile(r"[.,;:!?)\]’'%]+")
UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ufeff\ufffe\uffff\ud800-\udfff]")
SUPPLEMENTS = {Figure: "Figure", Table: "Table", Pseudocode: "Algorithm", Equation: "equation"}
PICTURES = {".svg": "image/svg+xml", ".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg"}


def clean(text: object) -> str:
    """The text without what would break a page: control characters, lone surrogates and direction overrides become U+FFFD."""
    return UNPRINTABLE.sub("\ufffd", str(text))


def pieces(word: str) -> list[str]:
    """Where a word may be broken: nowhere in a short one; in a long path or hash after punctuation, or anywhere at last."""
    if len(word) <= 28:
        return [word]
    return re.findall(r"[^/_=,.:;\-\\]{1,12}[/_=,.:;\-\\]?|[/_=,.:;\-\\]", word)


def code_lines(text: object) -> list[list[list[str]]]:
    """Code as lines of words of pieces; a line breaks between words first, inside a long word if it must."""
    return [[pieces(word) for word in line.split(" ")] for line in clean(text).replace("\t", "    ").split("\n")]


class Inline:
    """The inline parser of one report: it knows what `[@label]` may refer to, and where chapters begin."""

    def __init__(self, targets: dict[str, tuple[str, str]], chapters: dict[str, str] | None = None) -> None:
        self.targets = targets
        self.chapters = chapters or {}

    def __call__(self, text: object) -> list[Run]:
        """Runs of text, long words, mathematics, emphasis, code and references."""
        return punctuated(list(self.runs(clean(text))))

    def runs(self, text: str) -> Iterator[Run]:
        """The same, of text that is clean already."""
        pending = ""
        position = 0
        for match in INLINE.finditer(text):
            pending += MINUS.sub("\u2212", text[position : match.start()])
            position = match.end()
            if match["escaped"]:
                pending += match["escaped"]
                continue
            yield from words(pending)
            pending = ""
            if match["math"]:
                yield {"kind": "math", "source": mathematics(match["math"]), "tail": ""}
            elif match["code"]:
                literal = re.sub(r"\\([\\$*`\[])", r"\1", match["code"])
                yield {"kind": "code", "text": literal, "lines": code_lines(literal)}
            elif match["emph"]:
                yield {"kind": "emph", "runs": punctuated(list(self.runs(match["emph"])))}
            else:
                if match["ref"] not in self.targets:
                    raise UsageError(f"report: nothing is labelled {match['ref']!r}, which is referred to in {text[:60]!r}")
                shown, anchor = self.targets[match["ref"]]
                yield {"kind": "ref", "text": shown, "target": anchor}
        yield from words(pending + MINUS.sub("\u2212", text[position:]))


def punctuated(runs: list[Run]) -> list[Run]:
    """The runs with what must follow a formula on its line, a full stop say, as its `tail`: browsers would begin a line with it."""
    for run, following in zip(runs, runs[1:], strict=False):
        if run["kind"] == "math" and following["kind"] in ("text", "long"):
            run["tail"] = (CLOSING.match(following["text"]) or [""])[0]
            following["text"] = following["text"][len(run["tail"]) :]
            if "pieces" in following:
                following["pieces"] = pieces(following["text"])
    return [run for run in runs if run.get("text") != "" or run["kind"] == "code"]


def words(text: str) -> Iterator[Run]:
    """Plain text, with words too long for a line set apart."""
    for part in re.split(r"(\S{29,})", text):
        if len(pieces(part)) > 1 and not re.search(r"\s", part):
            yield {"kind": "long", "text": part, "pieces": pieces(part)}
        elif part:
            yield {"kind": "text", "text": part}


def mathematics(source: str) -> str:
    """The source of an equation, refused when it could leave mathematics: `#` would start code, `$` would end it."""
    source = clean(source).strip()
    if not source or re.search(r"[#$]|//|/\*", source):
        raise UsageError(f"report: not an equation: {source!r} (it is empty or holds #, $ or a comment)")
    return source


def flat(runs: Sequence[Run]) -> str:
    """The text of runs without marks, for titles of documents and descriptions of pictures."""
    told = (flat(run["runs"]) if "runs" in run else str(run.get("text", run.get("source", ""))) + run.get("tail", "") for run in runs)
    return "".join(told)


def lay_out(report: Report, root: str | os.PathLike[str]) -> dict[str, Any]:
    """Everything the renderers set, as JSON values.

    Raises `UsageError` for text that refers to nothing or mathematics that is none, `DataError` for a figure that is not there.
    """
    sections = [report.summary_blocks, *(chapter.blocks for chapter in report.chapters)]
    positions, targets = number([block for blocks in sections for block in blocks])
    following = iter(positions)  # the sections below are set in the order in which they were numbered
    for position, reference in enumerate(report.references, 1):
        add_target(targets, reference.label, f"[{position}]", f"ref-{position}")
    inline = Inline(targets, {chapter.key: chapter_anchor(position) for position, chapter in enumerate(report.chapters, 1)})
    root = Path(root).resolve()

    def set_blocks(blocks: Sequence[Block]) -> list[dict[str, Any]]:
        told = [set_block(block, next(following), inline, root) for block in blocks]
        for block, shown, after in zip(blocks, told, [*blocks, None][1:], strict=True):
            if isinstance(block, Paragraph):  # a short line that leads to something stays with it
                shown["leads"] = after is not None and not isinstance(after, (Paragraph, Heading)) and len(block.text) < LEADING
        return side_by_side(told)

    return {
        "title": inline(report.title),
        "plain_title": flat(inline(report.title)),
        "subtitle": inline(report.subtitle),
        "author_names": [clean(name) for name in report.authors],
        "people": people(report),
        "summary": set_blocks(report.summary_blocks),
        "chapters": [
            {
                "key": clean(chapter.key),
                "title": inline(chapter.title),
                "plain_title": flat(inline(chapter.title)),
                "anchor": chapter_anchor(position),
                "question": inline(chapter.question),
                "blocks": set_blocks(chapter.blocks),
            }
            for position, chapter in enumerate(report.chapters, 1)
        ],
        "environment": settings(report.environment),
        "references": [
            {"anchor": f"ref-{position}", "number": position, "text": inline(reference.text)}
            for position, reference in enumerate(report.references, 1)
        ],
    }


def people(report: Report) -> list[dict[str, Any]]:
    """Who wrote the report, with whom, in how many hours; what was not given is not shown."""
    given = {
        "Author" if len(report.authors) == 1 else "Authors": ", ".join(report.authors),
        "Collaborators": ", ".join(report.collaborators),
        "Hours spent": "" if report.hours is None else str(report.hours),
    }
    return [{"name": name, "text": list(words(clean(text)))} for name, text in given.items() if text.strip()]


def number(blocks: Sequence[Block]) -> tuple[list[int | None], dict[str, tuple[str, str]]]:
    """The number of each block (None for kinds that have none), and what each label shows and points to.

    A block may be shown again, in the summary and in its chapter, say: its label then points to the last place.
    """
    positions: list[int | None] = []
    targets: dict[str, tuple[str, str]] = {}
    labelled: dict[str, Block] = {}
    counts = dict.fromkeys(SUPPLEMENTS, 0)
    for block in blocks:
        if not isinstance(block, (Figure, Table, Pseudocode, Equation)):
            positions.append(None)
            continue
        kind = type(block)
        counts[kind] += 1
        positions.append(counts[kind])
        if block.label:
            if labelled.setdefault(block.label, block) == block:
                targets.pop(block.label, None)
            shown = f"({counts[kind]})" if kind is Equation else f"{SUPPLEMENTS[kind]} {counts[kind]}"
            add_target(targets, block.label, shown, anchor_of(block, counts[kind]))
    return positions, targets


def add_target(targets: dict[str, tuple[str, str]], label: str, shown: str, anchor: str) -> None:
    """Let `label` be referred to; refused when something else has it."""
    if label in targets:
        raise UsageError(f"report: two things are labelled {label!r}")
    targets[label] = (shown, anchor)


def chapter_anchor(position: int) -> str:
    """The name of the place where a chapter begins."""
    return f"chapter-{position}"


def anchor_of(block: Block, position: int) -> str:
    """The name of the place where a numbered block stands, the same in both renderings."""
    return f"{type(block).__name__.lower()}-{position}"


def set_block(block: Block, position: int | None, inline: Inline, root: Path) -> dict[str, Any]:
    """One block as a dictionary with a `kind`."""
    common: dict[str, Any] = {"kind": type(block).__name__}
    if position is not None:
        common |= {"number": position, "anchor": anchor_of(block, position)}
    match block:
        case Paragraph(text) | Heading(text):
            return common | {"text": inline(text)}
        case Finding(text):
            return common | {"paragraphs": [inline(part) for part in text.split("\n")]}
        case Answers(rows):
            return common | {"rows": [{"key": clean(key), "anchor": inline.chapters.get(key, ""), "text": inline(text)} for key, text in rows]}
        case Equation(source):
            return common | {"source": mathematics(source)}
        case Pseudocode(title, lines):
            depths = [(len(line) - len(line.lstrip(" "))) // 2 for line in lines]
            numbered = [{"depth": depth, "text": inline(line.strip())} for depth, line in zip(depths, lines, strict=True)]
            return common | {"title": inline(title), "lines": numbered}
        case Figure():
            if not 0 < block.width <= 1:
                raise UsageError(f"Figure {position} ({block.path}): width {block.width} is not in (0, 1]")
            path = picture(block, position, root)
            caption = inline(block.caption)
            again = code_lines(block.command) if block.command else None
            alt = clean(block.alt) or flat(caption)
            return common | {"path": path, "caption": caption, "command": again, "alt": alt, "width": block.width}
        case Table():
            again = code_lines(block.command) if block.command else None
            return common | {"caption": inline(block.caption), "command": again, "columns": columns(block, inline)}
        case KeyNumbers(rows):
            return common | {"rows": [{"value": inline(value), "text": inline(text)} for value, text in rows]}
        case Settings(rows):
            return common | {"rows": settings(rows), "short": all(len(value) <= BRIEF for _, value in rows)}
        case Command(text):
            return common | {"lines": code_lines(text)}
    raise UsageError(f"report: {type(block).__name__} is no block")


def settings(rows: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
    """Names and values as code."""
    return [{"name": code_lines(name), "value": code_lines(value)} for name, value in rows]


def picture(figure: Figure, position: int | None, root: Path) -> str:
    """The path of a figure's file relative to the root, after checking that it is one that can be set."""
    name = f"Figure {position} ({figure.path})"
    path = (root / figure.path).resolve()
    if not path.is_relative_to(root):
        raise DataError(f"{name}: the file lies outside {root}")
    if not path.is_file():
        raise DataError(f"{name}: there is no such file in {root}")
    if path.suffix.lower() not in PICTURES:
        raise DataError(f"{name}: pictures are {', '.join(PICTURES)}")
    head = path.read_bytes()[:1024]
    if not {".svg": b"<svg" in head, ".png": head.startswith(b"\x89PNG")}.get(path.suffix.lower(), head.startswith(b"\xff\xd8")):
        raise DataError(f"{name}: the file is not a {path.suffix[1:].upper()} picture (truncated or empty?)")
    return str(PurePosixPath(path.relative_to(root)))


def side_by_side(blocks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Consecutive figures that fit beside each other become one row."""
    rows: list[dict[str, Any]] = []
    for block in blocks:
        last = rows[-1] if rows else {}
        if block["kind"] != "Figure":
            rows.append(block)
        elif last.get("kind") == "Row" and sum(figure["width"] for figure in last["figures"]) + block["width"] <= 1 + 1e-9:
            last["figures"].append(block)
        else:
            rows.append({"kind": "Row", "figures": [block]})
    return rows


def columns(table: Table, inline: Inline) -> list[dict[str, Any]]:
    """The columns of a table: header, alignment, cells; the cells of decimal columns split at the decimal point."""
    result = []
    for index, header in enumerate(table.header):
        cells = [set_cell(row[index], inline) for row in table.rows]
        align = table.align[index] if table.align else guess(cells)
        long = any(len(flat(cell["text"])) > 40 for cell in cells)
        column = {"header": inline(header), "align": align, "cells": cells, "before": 0, "after": 0, "long": long}
        if align == "decimal":
            # widths in digits, for the page, a minus sign counted as two: the PDF measures instead
            column["before"] = max((len(cell["before"].replace("\u2212", "--")) for cell in cells if cell["before"]), default=0)
            column["after"] = max((len(cell["after"]) for cell in cells if cell["before"]), default=0)
        result.append(column)
    return result


def guess(cells: Sequence[dict[str, Any]]) -> str:
    """The alignment of a column that was given none."""
    numbers = [cell for cell in cells if cell["before"]]
    return "decimal" if numbers and all(cell["before"] or flat(cell["text"]) in DASHES for cell in cells) else "left"


def set_cell(value: Cell, inline: Inline) -> dict[str, Any]:
    """A cell's text, and for a number what stands before its decimal point and what from there on; `whole`: it must not be broken into lines."""
    text = "–" if value is None or value in ("", "-") else clean(value)
    bare = re.fullmatch(r"\*([^*]+)\*", text)
    match = NUMBER.fullmatch(bare[1] if bare else text)
    if not match or any(mark in match[0] for mark in MARKS.replace("[", "")):
        return {"text": inline(text), "before": "", "after": "", "strong": False, "whole": False}
    before, after = (part.replace("-", "\u2212") if part[:1] == "-" else part for part in match.groups())
    return {"text": inline(text), "before": before, "after": after, "strong": bool(bare), "whole": len(text) <= WHOLE}
