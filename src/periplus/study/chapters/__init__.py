"""The chapters, in the order of the sheet. To add one, write a file here with a `QUESTION` (see periplus.study.question) and list it below."""

from periplus.study.chapters import gan, penalty
from periplus.study.question import Question

CHAPTERS: tuple[Question, ...] = (gan.QUESTION, penalty.QUESTION)
