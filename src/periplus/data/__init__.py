"""The data room: sets of small images, from names or from paths.

`images` has the noun (`ImageData`) and the door (`load_data`), `formats` parses bytes that cannot be trusted, and
`sources` knows the named sets, their mirrors and their digests, `composites` makes a set from another. Importing this room
imports torch, numpy and the standard library only; scikit-learn, SciPy and Pillow are imported by the few functions that need them.
"""

from periplus.data.images import ImageData, load_data
from periplus.data.sources import FileStatus, Source, SourceInfo, fetch, list_sources, verify

__all__ = ["FileStatus", "ImageData", "Source", "SourceInfo", "fetch", "list_sources", "load_data", "verify"]
