"""Reports: the same bytes twice, hostile text shown and never executed, errors that name what is wrong."""

from __future__ import annotations

import html.parser
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from periplus import pictures
from periplus.errors import DataError, PeriplusError, UsageError
from periplus.report import (
    Answers,
    Block,
    Chapter,
    Command,
    Equation,
    Figure,
    Finding,
    Heading,
    KeyNumbers,
    Paragraph,
    Pseudocode,
    Reference,
    Report,
    Settings,
    Table,
    code,
    from_data,
    plain,
    to_data,
    write_html,
    write_pdf,
)
from periplus.report.layout import Inline, flat, lay_out

HOSTILE = [
    "#let x=1 $",
    "</script><script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "`*[@nothing]*` \\$x$ \\",
    '#eval("panic()") #panic("executed") @label <label> = Heading',
    "{{ 7*7 }} {% raw %} &amp; &lt;",
    "/* comment */ // comment",
]
ODD = ["\u202eevil\u202c", "bell\x07null\x00", "lone \udcff surrogate", "データ 😀", "w" * 400, "a\nb\tc", ""]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    pictures.image_grid(np.arange(2 * 64, dtype=np.uint8).reshape(2, 1, 8, 8), tmp_path / "figures" / "grid.png")
    return tmp_path


def report_with(*blocks: Block, **fields: object) -> Report:
    return Report("Title", chapters=(Chapter("2a", "Chapter", "Question?", blocks),), **fields)  # type: ignore[arg-type]


def every_block(text: str) -> Report:
    """A report with `text` in every field that may hold a user's string."""
    shown = plain(text)
    blocks: tuple[Block, ...] = (
        Paragraph(shown + " and " + code(text)),
        Heading(shown),
        Equation("x + lambda EE [(norm(nabla D(hat(x)))_2 - 1)^2]", "eq"),
        Pseudocode(shown, (shown, "  " + shown)),
        Figure("figures/grid.png", shown, text, text, 0.5),
        Figure("figures/grid.png", shown, text, text, 0.5),
        Table((shown, "loss / nats"), ((shown, "-1.25 ± 0.5"), (None, 3)), shown, text),
        Finding(shown),
        KeyNumbers(((shown, shown),)),
        Answers(((text, shown),)),
        Settings(((text, text),)),
        Command(text),
        Paragraph("$x$ in [@eq], see [@ref]"),
    )
    chapter = Chapter(text, shown, shown, blocks)
    return Report(shown, shown, (text,), (text,), text, blocks[:1], (chapter,), ((text, text),), (Reference("ref", shown),))


class Page(html.parser.HTMLParser):
    """The tags, attributes and text of a page."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def squeeze(text: str) -> str:
    return re.sub(r"\s", "", text)


def pdf_text(path: Path, order: str = "-raw") -> str:
    if not shutil.which("pdftotext"):
        pytest.skip("pdftotext is not installed")
    return subprocess.run(["pdftotext", order, str(path), "-"], capture_output=True, check=True).stdout.decode()


def test_same_report_same_bytes(root: Path) -> None:
    report = every_block("plain words")
    for write, name in ((write_pdf, "report.pdf"), (write_html, "report.html")):
        first = write(report, root / name, root).read_bytes()
        assert write(report, root / "again" / name, root).read_bytes() == first
    assert sorted(path.name for path in root.iterdir()) == ["again", "figures", "report.html", "report.pdf"]  # no leftovers


def test_bytes_do_not_depend_on_the_folder_or_the_process(root: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = tmp_path_factory.mktemp("elsewhere")
    shutil.copytree(root / "figures", other / "figures")
    report = every_block("plain words")
    (other / "report.json").write_text(json.dumps(to_data(report)))
    script = (
        "import json, sys, periplus.plots; from periplus.report import *; folder = sys.argv[1]; "
        "assert not {'matplotlib', 'typst', 'jinja2', 'PIL'} & set(sys.modules), 'importing is not light'; "
        "report = from_data(json.load(open(folder + '/report.json'))); "
        "write_pdf(report, folder + '/r.pdf', folder); write_html(report, folder + '/r.html', folder)"
    )
    subprocess.run([sys.executable, "-c", script, str(other)], check=True)
    assert write_pdf(report, root / "r.pdf", root).read_bytes() == (other / "r.pdf").read_bytes()
    assert write_html(report, root / "r.html", root).read_bytes() == (other / "r.html").read_bytes()


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_is_shown_and_not_executed_in_html(root: Path, text: str) -> None:
    page = Page(write_html(every_block(text), root / "r.html", root).read_text("utf-8"))
    calm = Page(write_html(every_block("calm"), root / "c.html", root).read_text("utf-8"))
    # the same skeleton as with a harmless string (but for places where a long word may break): nothing was smuggled in
    shape = [(tag, sorted(attributes)) for tag, attributes in page.tags if tag not in ("wbr", "span")]
    assert shape == [(tag, sorted(attributes)) for tag, attributes in calm.tags if tag not in ("wbr", "span")]
    assert "script" not in dict(page.tags)
    assert squeeze(page.text).count(squeeze(text)) == squeeze(calm.text).count("calm")
    assert {attributes["alt"] for tag, attributes in page.tags if tag == "img"} == {text}


def test_hostile_text_is_shown_and_not_executed_in_pdf(root: Path) -> None:
    report = every_block("\n".join(HOSTILE))
    path = write_pdf(report, root / "r.pdf", root)
    assert path.read_bytes().startswith(b"%PDF")
    text = squeeze(pdf_text(path))
    # quotes and hyphens are set as the typographer has them; the chapter's heading alone shows the string in four places
    loose = {0x22: "'", 0x201C: "'", 0x201D: "'", 0x2019: "'"}
    for hostile in HOSTILE:
        assert text.translate(loose).count(squeeze(hostile).translate(loose)) >= 8, hostile


def test_hostile_text_reaches_typst_as_a_value(root: Path) -> None:
    """What the PDF is set from: in it, hostile text is only ever the text of a run."""
    for text in HOSTILE:
        runs = lay_out(report_with(Paragraph(plain(text))), root)["chapters"][0]["blocks"][0]["text"]
        assert {run["kind"] for run in runs} <= {"text", "long"} and flat(runs) == text
        runs = lay_out(report_with(Paragraph(code(text))), root)["chapters"][0]["blocks"][0]["text"]
        assert [run["kind"] for run in runs] == ["code"] and flat(runs) == text


@pytest.mark.parametrize("text", ODD, ids=range(len(ODD)))
def test_odd_characters_break_nothing(root: Path, text: str) -> None:
    report = every_block(text)
    write_pdf(report, root / "r.pdf", root)
    assert "\u202e" not in write_html(report, root / "r.html", root).read_text("utf-8")


def test_html_stands_alone(root: Path) -> None:
    source = write_html(every_block("words"), root / "r.html", root).read_text("utf-8")
    page = Page(source)
    assert not re.search(r"https?:|//\w|url\(|@import|<script|\sstyle=|\son\w+=", re.sub(r"base64,[\w+/=]+", "", source))
    for tag, attributes in page.tags:
        for name in ("src", "href", "xlink:href"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:image/", "#")), (tag, value)
    identities = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(identities) == len(set(identities))
    assert all((attributes["href"] or "")[1:] in identities for _, attributes in page.tags if "href" in attributes)
    policy = next(attributes["content"] for tag, attributes in page.tags if tag == "meta" and "http-equiv" in attributes)
    assert policy and "default-src 'none'" in policy and "unsafe" not in policy


def test_html_is_accessible(root: Path) -> None:
    page = Page(write_html(every_block("words"), root / "r.html", root).read_text("utf-8"))
    assert ("html", {"lang": "en"}) in page.tags
    assert all(attributes.get("alt") for tag, attributes in page.tags if tag == "img")
    assert all(attributes.get("scope") for tag, attributes in page.tags if tag == "th")
    drawn = [attributes for tag, attributes in page.tags if tag == "svg" and attributes.get("role") == "img"]
    assert {attributes["aria-label"] for attributes in drawn} == {"x", "x + lambda EE [(norm(nabla D(hat(x)))_2 - 1)^2]"}
    assert any(tag == "nav" and attributes.get("aria-label") for tag, attributes in page.tags)


def test_all_numbers_of_tables_appear(root: Path) -> None:
    generator = np.random.default_rng(0)
    numbers = [f"{value:.{digits}f}" for digits, value in zip(range(7), generator.normal(scale=1000, size=7), strict=True)]
    numbers += ["1,110.5", "0.41 ± 0.03", "3.2 [2.9, 3.5]", "1e-4", "12.5 %", "<0.001", "*0.5*", "–", "n/a"]
    rows = tuple((text, text, text) for text in numbers)
    table = Table(("number", "again / nats", "right"), rows, "All.", None, ("decimal", "left", "right"))
    expected = [squeeze(text.strip("*").replace("-", "\u2212") if text[0] == "-" else text.strip("*")) for text in numbers]
    shown = squeeze(Page(write_html(report_with(table), root / "r.html", root).read_text("utf-8")).text)
    assert all(text in shown for text in expected)
    shown = squeeze(pdf_text(write_pdf(report_with(table), root / "r.pdf", root)))
    assert all(text in shown for text in expected)


def test_numbers_of_crowded_tables_are_not_broken_and_stay_in_their_column(root: Path) -> None:
    numbers = ("163.3 ± 39.9", "\u22120.001 ± 0.058", "1e4", "1.829 (1.79 to 1.87)")
    header = ("β", *(["KL[q(z) || p(z)]"] * 3), "a long header here", *["short"] * 3)
    rows = tuple(tuple(numbers[(row + column) % 4] for column in range(8)) for row in range(4))
    for align in (None, ("left",) * 8, ("right",) * 8):
        path = write_pdf(report_with(Table(header, rows, "Caption.", None, align)), root / "r.pdf", root)
        lines = [squeeze(line) for line in pdf_text(path, "-layout").splitlines()]
        for row in rows:
            assert squeeze("".join(row)) in lines, row


def test_short_tables_and_findings_are_not_split_over_pages(root: Path) -> None:
    rows = (("beginning", "1.5"), *[("between", "1.5")] * 18, ("ending", "1.5"))
    for lines in range(20, 44, 4):
        blocks = (*[Paragraph("A line.")] * lines, Table(("a", "b"), rows, "Caption."), Finding("Found, " + "and found again, " * 80 + "at last."))
        pages = pdf_text(write_pdf(report_with(*blocks), root / "r.pdf", root)).split("\f")
        assert len({[k for k, page in enumerate(pages) if word in page][0] for word in ("beginning", "ending")}) == 1
        assert len({[k for k, page in enumerate(pages) if word in page][0] for word in ("FINDING", "at last.")}) == 1


def test_one_chapter_without_a_summary_begins_on_the_first_page(root: Path) -> None:
    report = Report("Title", chapters=(Chapter("", "Alone", "Question?", (Paragraph("Words."),)),))
    assert len(pdf_text(write_pdf(report, root / "r.pdf", root)).rstrip("\f").split("\f")) == 1
    assert "Contents" not in pdf_text(root / "r.pdf")


def test_a_summary_of_ten_questions_fits_the_first_page_and_leads_to_its_chapters(root: Path) -> None:
    keys = [f"{part}{letter}" for part in "12" for letter in "abcde"]
    answer = "An answer of three lines at most, with numbers like 12.0 and intervals. " * 4
    blocks = (Paragraph("What this report is. " * 18), KeyNumbers((("12 of 34", "what it is, in some ten words, on three lines"),) * 8))
    report = Report(
        "Title",
        "Subtitle",
        ("An Author",),
        ("A Collaborator",),
        12,
        (*blocks, Answers(tuple((key, f"{answer}End of {key}.") for key in keys))),
        tuple(Chapter(key, "Chapter", "Question?", (Paragraph("Words."),)) for key in keys),
    )
    assert "End of 2e." in pdf_text(write_pdf(report, root / "r.pdf", root)).split("\f")[0]
    page = Page(write_html(report, root / "r.html", root).read_text("utf-8"))
    assert [a["href"] for tag, a in page.tags if tag == "a" and a["href"] == "#chapter-10"] == [
        "#chapter-10"
    ] * 2  # from the contents, from the answer


def test_findings_have_paragraphs_and_numbers_have_minus_signs(root: Path) -> None:
    data = lay_out(report_with(Finding("It is -1.5 (-3 to +2).\nAnd 128-256, gan-0, x - y."), Paragraph("`a -1`")), root)
    finding, paragraph = data["chapters"][0]["blocks"]
    assert [flat(part) for part in finding["paragraphs"]] == ["It is \u22121.5 (\u22123 to +2).", "And 128-256, gan-0, x \u2212 y."]
    assert flat(paragraph["text"]) == "a -1"


def test_a_line_that_leads_to_something_stays_with_it(root: Path) -> None:
    for lines in range(30, 60):
        blocks = (*[Paragraph("A line.")] * lines, Paragraph("The command:"), Command("periplus --help"), Paragraph("After."))
        pages = pdf_text(write_pdf(report_with(*blocks), root / "r.pdf", root)).split("\f")
        assert [("The command:" in page) == ("periplus --help" in page) for page in pages] == [True] * len(pages), lines
    shown = lay_out(report_with(*blocks), root)["chapters"][0]["blocks"]
    assert [block["leads"] for block in shown if block["kind"] == "Paragraph"][-2:] == [True, False]


def test_short_settings_stand_in_two_columns(root: Path) -> None:
    for value, two in (("1", True), ("x" * 40, False)):
        block = lay_out(report_with(Settings(tuple((f"name {k}", value) for k in range(8)))), root)["chapters"][0]["blocks"][0]
        assert block["short"] == two
        lines = pdf_text(
            write_pdf(report_with(Settings(tuple((f"name {k}", value) for k in range(8)))), root / "r.pdf", root), "-layout"
        ).splitlines()
        assert any("name 0" in line and "name 4" in line for line in lines) == two


@pytest.mark.skipif(not shutil.which("pdfinfo"), reason="needs poppler's pdfinfo")
def test_the_pdf_is_tagged_and_nothing_is_objected_to(root: Path) -> None:
    path = write_pdf(every_block("plain words"), root / "r.pdf", root)
    told = subprocess.run(["pdfinfo", path], capture_output=True, text=True, check=True)
    assert not told.stderr and re.search(r"Tagged: +yes", told.stdout) and re.search(r"Title: +plain words", told.stdout)


def test_columns_of_numbers_are_aligned_on_the_point(root: Path) -> None:
    table = Table(("a", "b", "c"), (("1.25", "word", "-3"), ("*10.5 ± 2*", "2", "4e-3"), (None, "3", 12.75)), "Caption")
    first, second, third = lay_out(report_with(table), root)["chapters"][0]["blocks"][0]["columns"]
    assert (first["align"], second["align"], third["align"]) == ("decimal", "left", "decimal")
    assert [(cell["before"], cell["after"]) for cell in first["cells"]] == [("1", ".25"), ("10", ".5 ± 2"), ("", "")]
    assert [cell["strong"] for cell in first["cells"]] == [False, True, False]
    assert [(cell["before"], cell["after"]) for cell in third["cells"]] == [("\u22123", ""), ("4", "e-3"), ("12", ".75")]


def test_inline_marks() -> None:
    inline = Inline({"eq": ("(1)", "equation-1")})
    runs = inline(r"a *b $z^*$ c* `d_e` $x*y$ 3 * 4 * 5 \*no\* [@eq] [f] cost: 5 $ z*")
    assert [run["kind"] for run in runs] == ["text", "emph", "text", "code", "text", "math", "text", "ref", "text"]
    assert [run["kind"] for run in runs[1]["runs"]] == ["text", "math", "text"]
    assert (runs[6]["text"], runs[8]["text"]) == (" 3 * 4 * 5 *no* ", " [f] cost: 5 $ z*")


def test_a_full_stop_stays_with_its_formula(root: Path) -> None:
    inline = Inline({})
    runs = inline("With $x$, and $y$. Or *$z$) at last* or $w$")
    assert [run["tail"] for run in runs if run["kind"] == "math"] == [",", ".", ""] and runs[5]["runs"][0]["tail"] == ")"
    assert flat(runs) == "With x, and y. Or z) at last or w"
    assert [run["kind"] for run in inline("$x$.")] == ["math"]
    page = write_html(report_with(Paragraph("With $x$, and $y$")), root / "r.html", root).read_text("utf-8")
    assert page.count('<span class="nobreak">') == 1 and squeeze(",and") in squeeze(Page(page).text)


def test_numbers_and_references(root: Path) -> None:
    figure = Figure("figures/grid.png", "Shown twice", label="fig")
    report = Report(
        "Title",
        summary_blocks=(figure,),
        chapters=(Chapter("1", "T", "Q", (Paragraph("[@fig], [@e2], [@r2]"), Equation("a"), Equation("b", "e2"), figure)),),
        references=(Reference("r1", "One."), Reference("r2", "Two.")),
    )
    data = lay_out(report, root)
    assert flat(data["chapters"][0]["blocks"][0]["text"]) == "Figure 2, (2), [2]"
    with pytest.raises(UsageError, match="two things are labelled 'e'"):
        lay_out(report_with(Equation("a", "e"), Equation("b", "e")), root)
    with pytest.raises(UsageError, match="nothing is labelled 'none'"):
        lay_out(report_with(Paragraph("[@none]")), root)


@pytest.mark.parametrize("write", [write_pdf, write_html])
def test_broken_figures_are_named(root: Path, write: object) -> None:
    (root / "figures" / "empty.svg").write_bytes(b"")
    (root / "figures" / "text.txt").write_bytes(b"text")
    for name, message in (
        ("figures/missing.svg", "there is no such file"),
        ("../outside.svg", "lies outside"),
        ("figures/empty.svg", "is not a SVG picture"),
        ("figures/text.txt", "pictures are"),
    ):
        (root / "r.pdf").write_bytes(b"before")
        with pytest.raises(DataError, match=message) as caught:
            write(report_with(Figure(name, "Caption")), root / "r.pdf", root)  # type: ignore[operator]
        assert f"Figure 1 ({name})" in str(caught.value)
        assert (root / "r.pdf").read_bytes() == b"before"


def test_truncated_picture_is_named(root: Path) -> None:
    whole = (root / "figures" / "grid.png").read_bytes()
    (root / "figures" / "cut.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(PeriplusError, match=r"figures/cut\.png"):
        write_pdf(report_with(Figure("figures/cut.png", "Caption")), root / "r.pdf", root)


@pytest.mark.parametrize("source", ["unknownname + 1", "frac(", "#panic()", "a $ b", "", "a // b"])
def test_broken_equations_are_named(root: Path, source: str) -> None:
    for write in (write_pdf, write_html):
        with pytest.raises(UsageError, match=re.escape(repr(source))):
            write(report_with(Equation(source)), root / "r", root)


def test_json_round_trip(root: Path) -> None:
    report = every_block("#let x=1 $")
    assert from_data(json.loads(json.dumps(to_data(report)))) == report
    with pytest.raises(UsageError, match="Poem"):
        from_data({"kind": "Poem"})
    with pytest.raises(UsageError, match="colour"):
        from_data({"kind": "Paragraph", "text": "", "colour": "red"})


def test_tables_with_ragged_rows_are_refused() -> None:
    with pytest.raises(UsageError, match="2 cells under 1 headers"):
        Table(("a",), (("1", "2"),), "Caption")
    with pytest.raises(UsageError, match="unknown alignment 'middle'"):
        Table(("a",), (("1",),), "Caption", align=("middle",))


def test_an_empty_report_is_a_report(root: Path) -> None:
    report = Report("Only a title")
    write_pdf(report, root / "r.pdf", root)
    assert "Only a title" in write_html(report, root / "r.html", root).read_text("utf-8")
