"""The chapters, in the order of the sheet. To add one, write a file here with a `QUESTION` (see periplus.study.question) and list it below."""

from periplus.study.chapters import cheap, echo, echo_rate, extremes, gan, inversion, marginal, paths, penalty, sampling
from periplus.study.question import Question

CHAPTERS: tuple[Question, ...] = (
    extremes.QUESTION,
    marginal.QUESTION,
    echo.QUESTION,
    echo_rate.QUESTION,
    sampling.QUESTION,
    gan.QUESTION,
    penalty.QUESTION,
    inversion.QUESTION,
    paths.QUESTION,
    cheap.QUESTION,
)
