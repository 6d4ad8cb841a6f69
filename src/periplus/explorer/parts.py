"""The files of the page, by name: what the server gives, and what the exported file holds."""

from __future__ import annotations

from importlib import resources

#: Name in the address, and its kind; scripts in the order in which they need one another.
PARTS = {
    "explorer.css": "text/css",
    "network.js": "text/javascript",
    "server.js": "text/javascript",
    "drawing.js": "text/javascript",
    "charts.js": "text/javascript",
    "explorer.js": "text/javascript",
}


def page_part(name: str) -> str:
    """A file of the page."""
    return resources.files("periplus.explorer").joinpath("page", name).read_text("utf-8")
