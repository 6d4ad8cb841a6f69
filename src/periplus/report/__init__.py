"""Reports: blocks of plain values, rendered as a PDF and as one self-contained page.

>>> report = Report("Two generators", chapters=(Chapter("2a", "A GAN", "Train one.", (Paragraph("Here is $z$."),)),))
>>> write_pdf(report, "report.pdf", root=".")   # doctest: +SKIP
>>> write_html(report, "report.html", root=".")   # doctest: +SKIP

Neither matplotlib nor typst nor jinja2 is imported before it is needed.
"""

from periplus.report.blocks import (
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
)
from periplus.report.html import write_html
from periplus.report.pdf import write_pdf

__all__ = [
    "Answers",
    "Block",
    "Chapter",
    "Command",
    "Equation",
    "Figure",
    "Finding",
    "Heading",
    "KeyNumbers",
    "Paragraph",
    "Pseudocode",
    "Reference",
    "Report",
    "Settings",
    "Table",
    "code",
    "from_data",
    "plain",
    "to_data",
    "write_html",
    "write_pdf",
]
