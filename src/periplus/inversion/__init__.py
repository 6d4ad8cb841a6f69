"""Inversion: z* = argmin ||G(z) - x||^2 from many starts, each endpoint with a certificate of what it is.

domains        where codes may lie, and the chart in which that is unconstrained
objective      f, its gradient and exact Hessian, row by row
starts         screened draws from the prior, a pure function of (seed, image, start)
descent        batched BFGS
bundle         bundle-Newton: the second-order finish, on kinks and off them
certificates   smooth, kink, boundary, flat; saddle, unfinished, escaped
clusters       which endpoints are one minimum
search         `invert`: all of it
dataset        `invert_dataset`: whole data sets, resumable
"""

from periplus.inversion.certificates import Kind
from periplus.inversion.dataset import invert_dataset
from periplus.inversion.domains import Domain
from periplus.inversion.search import Effort, Snapshot, invert
from periplus.inversion.solution import Inversion, Minimum

__all__ = ["Domain", "Effort", "Inversion", "Kind", "Minimum", "Snapshot", "invert", "invert_dataset"]
