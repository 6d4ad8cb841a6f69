"""Write docs/api.md from the docstrings of the front door: `python docs/make_api.py`. A test compares the file with what this makes.

Names are those of `periplus.__all__`; what else the pages of the documentation mention is listed by room. Docstrings are shown as they are written.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path

import periplus

API = Path(__file__).with_name("api.md")
#: Behind the front door: the public names of these rooms, in the order of their lectures.
ROOMS = ("channels", "information", "objectives", "metrics", "inversion", "paths", "evaluation", "scoring")
HEAD = """# Python interface

Made from the docstrings by `python docs/make_api.py`; do not edit. Rates are in nats per example; distortions and squared errors are sums over
pixels. A *decoder* is any callable from codes (..., d) to images (..., C, H, W).
"""


def signature(thing: object) -> str:
    """How it is called, annotations as they are written; defaults that are objects by their name, without an address."""
    try:
        told = inspect.signature(thing)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return ""
    shown = []
    for parameter in told.parameters.values():
        changes = {"annotation": written(parameter.annotation), "default": parameter.default}
        if hasattr(parameter.default, "__qualname__") and parameter.default is not inspect.Parameter.empty:
            changes["default"] = _Shown(parameter.default.__qualname__)
        elif " at 0x" in repr(parameter.default) or "<factory>" in repr(parameter.default):
            changes["default"] = _Shown("...")
        shown.append(parameter.replace(**changes))
    return str(told.replace(parameters=shown, return_annotation=written(told.return_annotation)))


def written(annotation: object) -> object:
    """An annotation as it stands in the source, without the quotes of a string."""
    return _Shown(annotation) if isinstance(annotation, str) else annotation


class _Shown:
    """What is to be printed as it is."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text


def entry(name: str, thing: object, level: int) -> Iterator[str]:
    """Heading, signature, docstring; of a class, its public methods and properties as well."""
    yield f"{'#' * level} `{name}`\n"
    lines = [] if isinstance(thing, type) and issubclass(thing, Exception) else [f"{name}{signature(thing)}\n"]
    document = inspect.getdoc(thing) or ""
    if isinstance(thing, type):
        document = document if thing.__dict__.get("__doc__") else ""
        for method, value in vars(thing).items():
            inner = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
            if not method.startswith("_") and inspect.isfunction(inner) and inspect.getdoc(inner):
                lines.append(f"{name}.{method}" + ("" if isinstance(value, property) else signature(inner)))
                lines.append(indented(inspect.getdoc(inner) or "") + "\n")
    yield "\n".join(["```text", *lines[:1], *([document, ""] if document else []), *lines[1:]]).rstrip() + "\n```\n"


def indented(text: str) -> str:
    """Four spaces before every line that is not empty."""
    return "\n".join(f"    {line}" if line else "" for line in text.splitlines())


def own_names(module: object) -> list[str]:
    """Public functions and classes that a room defines or lists, in the order of the source, those of the front door left out."""
    listed = getattr(module, "__all__", None)
    if listed is None:
        home = module.__name__  # type: ignore[attr-defined]
        listed = [n for n, v in vars(module).items() if not n.startswith("_") and getattr(v, "__module__", None) == home and callable(v)]
    front = {id(getattr(periplus, name)) for name in periplus.__all__}
    return [name for name in listed if callable(getattr(module, name)) and id(getattr(module, name)) not in front]


def api() -> str:
    """The whole page."""
    parts = [HEAD, "\n## `periplus`, the front door\n"]
    for name in periplus.__all__:
        parts += entry(f"periplus.{name}", getattr(periplus, name), 3)
    for room in ROOMS:
        module = importlib.import_module(f"periplus.{room}")
        lecture = inspect.getdoc(module) or ""
        parts += [f"\n## `periplus.{room}`\n", f"```text\n{lecture}\n```\n"]
        for name in own_names(module):
            if inspect.getdoc(getattr(module, name)):
                parts += entry(f"{room}.{name}", getattr(module, name), 3)
    return "\n".join(parts)


if __name__ == "__main__":
    from periplus.files import write_atomically

    write_atomically(API, api())
    print(API.name)
