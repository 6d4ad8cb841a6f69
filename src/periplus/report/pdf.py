"""The report as a PDF, set by typst: offline, with typst's own fonts, and byte for byte the same from the same report."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from periplus.errors import PeriplusError, UsageError
from periplus.files import write_atomically
from periplus.report.blocks import Report
from periplus.report.layout import lay_out

ALONE = {
    "equation": b'#eval(json(bytes(sys.inputs.data)), mode: "math")',
    "figure": b'#image("/" + json(bytes(sys.inputs.data)))',
}


def write_pdf(report: Report, path: str | os.PathLike[str], root: str | os.PathLike[str]) -> Path:
    """Write `report`, whose figures lie below the folder `root`, as a PDF to `path`, whole or not at all.

    Raises `DataError` naming a figure that is missing or broken, `UsageError` naming an equation that is none.
    """
    data = lay_out(report, root)
    template = resources.files("periplus.report").joinpath("report.typ").read_bytes()
    return write_atomically(path, compile_typst(template, data, Path(root).resolve(), "pdf"))


def compile_typst(template: bytes, data: Any, root: Path, form: Literal["pdf", "svg"]) -> Any:
    """Compile a template with `data`; a failure is traced to the equation or figure that caused it."""
    import typst

    def attempt(source: bytes, value: Any) -> Any:
        inputs = {"data": json.dumps(value)}
        compiler = typst.Compiler(source, root=root, ignore_system_fonts=True, sys_inputs=inputs)
        # PDF 1.5: from 1.6 on typst writes an entry of its tags (Suspects) that poppler's tools complain of; nothing else differs
        return compiler.compile(format=form, pdf_standards=["1.5"]) if form == "pdf" else compiler.compile(format=form)

    try:
        return attempt(template, data)
    except typst.TypstError as error:
        for kind, value in suspects(data):
            try:
                attempt(ALONE[kind], value)
            except typst.TypstError as cause:
                raise UsageError(f"report: {kind} {value!r}: {one_line(cause.message)}") from None
        raise PeriplusError(f"report: typst: {one_line(error.message)}") from None


def suspects(data: Any) -> Iterator[tuple[str, str]]:
    """Everything in the laid-out report that could fail on its own: equations by source, figures by path."""
    if isinstance(data, dict):
        if "source" in data:
            yield "equation", data["source"]
        elif "path" in data:
            yield "figure", data["path"]
        for value in data.values():
            yield from suspects(value)
    elif isinstance(data, list):
        for value in data:
            yield from suspects(value)


def one_line(message: str) -> str:
    """An error's message without line breaks."""
    return " ".join(message.split())
