"""The report as one HTML file that needs nothing else: no network, no script, no font.

Pictures are data URIs, mathematics is drawn by typst as SVG that takes the colour of the text, and the style sheet is the only
thing that the page's content security policy lets in, by its hash. jinja2 escapes every string.
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

from periplus.files import write_atomically
from periplus.report.blocks import Report
from periplus.report.layout import PICTURES, flat, lay_out
from periplus.report.pdf import compile_typst

# Two pages per formula: the formula cut to its size, and a blank one as wide as the formula is deep below the baseline.
# (measure() of a box that also holds a tall strut standing on the baseline gives the strut's height plus that depth.)
FORMULAS = rb"""
#let formulas = json(bytes(sys.inputs.data))
#set page(width: auto, height: auto, margin: 0pt, fill: none)
#set text(font: "Libertinus Serif", size: 10pt)
#show math.equation: set text(font: "New Computer Modern Math")
#for it in formulas {
  let formula = math.equation(block: it.display, eval(it.source, mode: "math"))
  page(formula)
  page(context {
    let depth = measure(box[#box(width: 1pt, height: 200pt)#math.equation(eval(it.source, mode: "math"))]).height - 200pt
    box(width: calc.max(0pt, depth) + 1pt, height: 1pt)
  })
}
"""
SIZE = 10  # points, of the formulas above


def write_html(report: Report, path: str | os.PathLike[str], root: str | os.PathLike[str]) -> Path:
    """Write `report`, whose figures lie below the folder `root`, as one HTML file to `path`, whole or not at all.

    Raises what `write_pdf` raises.
    """
    import jinja2

    root = Path(root).resolve()
    data = lay_out(report, root)
    formulas, symbols = draw_formulas(data, root)
    template = resources.files("periplus.report").joinpath("report.html.j2").read_text("utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["flat"] = flat
    sheet = resources.files("periplus.report").joinpath("report.css").read_text("utf-8") + generated_rules(data, formulas)
    page = environment.from_string(template).render(
        report=data,
        formulas=formulas,
        symbols=symbols,
        picture=lambda name: data_uri(root / name),
        sheet=sheet,
        digest=base64.b64encode(hashlib.sha256(sheet.encode()).digest()).decode(),
    )
    return write_atomically(path, page.encode("utf-8"))


def data_uri(path: Path) -> str:
    """A picture as an address that contains it."""
    return f"data:{PICTURES[path.suffix.lower()]};base64,{base64.b64encode(path.read_bytes()).decode()}"


def draw_formulas(data: Any, root: Path) -> tuple[dict[str, dict[str, Any]], str]:
    """Each formula of the laid-out report as SVG, by a key of its kind and source, and the glyphs that they share."""
    wanted = list(dict.fromkeys(find_formulas(data)))
    if not wanted:
        return {}, ""
    inputs = [{"display": display, "source": source} for display, source in wanted]
    pages = compile_typst(FORMULAS, inputs, root, "svg")
    glyphs: dict[str, str] = {}
    formulas = {}
    for index, (display, source) in enumerate(wanted):
        shape, blank = (page.decode() for page in pages[2 * index : 2 * index + 2])
        _, _, width, height = view_box(shape)
        depth = view_box(blank)[2] - 1
        body = shape[shape.index(">") + 1 : shape.rindex("</svg>")]
        for name, symbol in re.findall(r'<symbol id="([^"]+)"[^>]*>(.*?)</symbol>', body, re.DOTALL):
            glyphs[name] = symbol
        body = re.sub(r"<defs>.*?</defs>", "", body, flags=re.DOTALL)
        body = body.replace("xlink:href", "href").replace(' fill-rule="nonzero"', "")
        body = re.sub(r'(fill|stroke)="#000000"', r'\1="currentColor"', body)
        formulas[formula_key(display, source)] = {
            "class": f"f{index}",
            "source": source,
            "box": f"0 0 {width:g} {height:g}",
            "body": body,
            "rule": f".f{index}{{width:{width / SIZE:.4g}em;height:{height / SIZE:.4g}em"
            + ("" if display else f";vertical-align:{-depth / SIZE:.4g}em")
            + "}",
        }
    symbols = "".join(f'<symbol id="{name}" overflow="visible">{symbol}</symbol>' for name, symbol in glyphs.items())
    return formulas, symbols


def view_box(svg: str) -> tuple[float, ...]:
    """Left, top, width and height in points."""
    match = re.search(r'viewBox="([^"]+)"', svg)
    assert match, "typst's SVG has a viewBox"
    return tuple(float(number) for number in match[1].split())


def formula_key(display: bool, source: str) -> str:
    """What the template looks a formula up by."""
    return ("display " if display else "inline ") + source


def find_formulas(data: Any) -> Iterator[tuple[bool, str]]:
    """(displayed?, source) of every formula in the laid-out report."""
    if isinstance(data, dict):
        if "source" in data:
            yield data["kind"] == "Equation", data["source"]
        for value in data.values():
            yield from find_formulas(value)
    elif isinstance(data, list):
        for value in data:
            yield from find_formulas(value)


def generated_rules(data: Any, formulas: dict[str, dict[str, Any]]) -> str:
    """Rules that depend on the content; the policy forbids style attributes, so they have to be classes."""
    rules = [formula["rule"] for formula in formulas.values()]
    blocks = [block for part in [data["summary"], *(chapter["blocks"] for chapter in data["chapters"])] for block in part]
    columns = [column for block in blocks if block["kind"] == "Table" for column in block["columns"]]
    counts = {count for column in columns for count in (column["before"], column["after"])}
    rules += [f".ch{count}{{width:{count}ch}}" for count in sorted(counts)]
    widths = {round(figure["width"] * 100) for block in blocks if block["kind"] == "Row" for figure in block["figures"]}
    rules += [f".w{width}{{width:{width}%}}" for width in sorted(widths)]
    depths = {line["depth"] for block in blocks if block["kind"] == "Pseudocode" for line in block["lines"]}
    rules += [f".d{depth}{{padding-left:{1 + 1.4 * depth:.4g}em}}" for depth in sorted(depths)]
    return "\n".join(rules) + "\n"
