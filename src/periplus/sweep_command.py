"""`periplus sweep MODEL`: every field of the configuration takes one value or several."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_type_hints

import tyro
from tyro.conf import arg

from periplus.commands import Common, Preset, attribute_documents, preset_config, value_of, without_none
from periplus.config import MODELS, NOT_FOR, AutoencoderConfig, Config, nearest
from periplus.errors import UsageError

#: Options that a resumed sweep takes from its folder where they are left out.
STORED = ("data", "image_size", "preset", "seeds", "images")


@dataclass(frozen=True, kw_only=True)
class SweepOptions(Common):
    """Options of `periplus sweep` beside those of the configuration."""

    data: Annotated[str, arg(help="A named set (as in periplus data list), an .npz, an IDX file or a folder of images.")]
    out: Annotated[Path, arg(help="The folder to make: cells/, sweep.json, sweep.csv, curve.svg.")]
    seeds: Annotated[int, arg(help="Runs of each point: seeds 0, 1, ...")] = 3
    engine: Annotated[
        Literal["auto", "processes", "stacked"],
        arg(
            help="processes: a child process for each cell. stacked: all cells as one program (mlp and linear autoencoders that differ in beta and "
            "seed; mlp adversarial models that differ in penalty weight, step sizes and seed). auto: stacked where that can be done and the networks "
            "are small or on a GPU."
        ),
    ] = "auto"
    workers: Annotated[int | None, arg(help="Cells trained at once, one thread each, or threads of the stacked program; default: the cores.")] = None
    images: Annotated[int, arg(help="Autoencoders: images of each split to measure on, at most.")] = 10_000
    image_size: Annotated[int | None, arg(help="Resize images to squares of so many pixels.")] = None
    data_root: Annotated[Path | None, arg(help="Where named sets are looked for first; else $PERIPLUS_DATA, else the cache.")] = None
    preset: Annotated[Preset, arg(help="As for 'periplus train'.")] = "default"
    resume: Annotated[bool, arg(help="Go on with the sweep in --out; options left out are those of the sweep.")] = False
    dry_run: Annotated[bool, arg(help="Print the cells and their commands, and write nothing.")] = False

    def sweep(self) -> Any:
        """The sweep among the options."""
        from periplus.sweeps import Sweep

        base = preset_config(self.model, self.preset)  # type: ignore[attr-defined]
        names = [f.name for f in dataclasses.fields(base) if f.name not in ("model", "seed")]
        values = {name: getattr(self, name) for name in names if getattr(self, name, ())}
        kept = {f.name for f in dataclasses.fields(Sweep)} & set(vars(self))
        return Sweep(base, values=values, **{name: getattr(self, name) for name in kept - {"values", "base"}})

    def run(self) -> None:
        """Make the sweep; print its table."""
        sweep = self.sweep()
        if self.dry_run:
            cells = sweep.cells(1)
            record = [{"name": cell.name, "path": cell.path, "command": cell.command} for cell in cells]
            self.tell(record, "\n".join(f"{cell.name}: {cell.command}" for cell in cells) + f"\n{len(cells)} cells; nothing was written")
            return
        from periplus.console import table
        from periplus.sweeps import make_sweep, table_rows

        results = make_sweep(sweep, shlex.join(["periplus", *sys.argv[1:]]))
        if self.json:
            self.tell(results)
            return
        unit = ", nats" if MODELS[sweep.base.model] is AutoencoderConfig else ""
        table(*table_rows(results), title=f"{self.out}: means over seeds ± half the 95 % interval{unit}")
        names = [name for name in ("sweep.json", "sweep.csv", "curve.svg") if (self.out / name).exists()]
        print("\n".join(str(self.out / name) for name in names))


def sweep_options(argv: Sequence[str]) -> type[SweepOptions]:
    """The options of one model's sweeps as a dataclass; of a sweep that is resumed, with its own values as defaults."""
    model = argv[0]
    if model not in MODELS:
        raise UsageError(f"unknown model '{model}'{nearest(model, MODELS)}: known are {', '.join(MODELS)}")
    stored: dict[str, Any] = {}
    if "--resume" in argv and (out := value_of(argv, "--out")) is not None:
        from periplus.sweeps import stored_settings

        stored = stored_settings(Path(out)) or {}
        if stored and stored.get("model") != model:
            raise UsageError(f"{out} is a sweep of '{stored.get('model')}', not '{model}'")
    base = preset_config(model, value_of(argv, "--preset") or stored.get("preset") or "default")
    return _options_from(base, stored)


def _options_from(base: Config, stored: dict[str, Any]) -> type[SweepOptions]:
    kind = type(base)
    hints, documents = get_type_hints(kind), attribute_documents(kind)
    own = get_type_hints(SweepOptions, include_extras=True)
    fields: list[Any] = [(name, own[name], dataclasses.field(default=stored[name])) for name in STORED if name in stored]
    for f in dataclasses.fields(kind):
        if f.name in (*NOT_FOR[base.model], "seed"):
            continue
        if f.name == "model":
            fields.append(("model", Annotated[str, tyro.conf.Suppress], dataclasses.field(default=base.model)))
            continue
        hint: Any = without_none(hints[f.name])
        if f.name == "rate":  # a vae's: echo has only one
            hint = Literal["prior", "marginal"]
        if f.name == "architecture":  # one's own modules come through Python
            hint = Literal[tuple(a for a in get_args(hint) if a != "custom")]
        default = getattr(base, f.name)
        told = documents.get(f.name, "") + ("" if default is None else f" By default {default}.")
        values = tuple(stored.get("values", {}).get(f.name, ()))
        fields.append((f.name, Annotated[tuple[hint, ...], arg(help=told)], dataclasses.field(default=values)))
    made = dataclasses.make_dataclass("SweepOptions", fields, bases=(SweepOptions,), frozen=True, kw_only=True)
    made.__doc__ = f"Train '{base.model}' for every combination of the values given, times the seeds, and put the cells side by side."
    return made
