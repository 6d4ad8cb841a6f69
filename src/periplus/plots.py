"""Figures: one look for all, legible in grey print, the same bytes from the same numbers.

Colours are those of Okabe and Ito (distinguishable with every common colour blindness); whatever a colour tells, a line style, a
marker or a hatch tells too. Curves are SVG with text as paths (no fonts needed to read them); images themselves are the business of
`periplus.pictures`. The size is that of a printed column, so the letters in a figure are as large as
its caption's.

Every function takes plain arrays, writes its file whole or not at all, and returns its path. matplotlib is imported when needed,
by its object interface: no pyplot, no backend chosen, and its settings are as they were when a function returns.
"""

from __future__ import annotations

import io
import math
import os
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

from periplus.errors import UsageError
from periplus.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PathLike = str | os.PathLike[str]

COLUMN = 6.3  # inches: the text width of the report
# Okabe-Ito, darkest first, so that the first few also differ in grey; yellow is left out: it vanishes on white
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
DASHES: tuple[Any, ...] = ("-", (0, (5, 1.6)), (0, (1.4, 1.2)), (0, (6, 1.5, 1.4, 1.5)), (0, (3, 1.2)), (0, (8, 2)), "-")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
HATCHES = ("", "////", "....", "xxxx", "----", "\\\\\\\\", "++++")

STYLE: dict[str, Any] = {
    "font.family": "STIXGeneral",  # comes with matplotlib: the same letters on every machine
    "mathtext.fontset": "stix",
    "font.size": 9,
    "axes.labelsize": 9,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "legend.fontsize": 8.5,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.edgecolor": "#444444",
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e3e3e3",
    "grid.linewidth": 0.5,
    "legend.frameon": False,
    "legend.handlelength": 2.6,
    "lines.linewidth": 1.5,
    "hatch.linewidth": 0.6,
    "svg.hashsalt": "periplus",
    "svg.fonttype": "path",
    "path.simplify": True,
}
_SETTINGS = threading.Lock()  # matplotlib's settings are global: one figure at a time


def save_svg(draw: Callable[[Figure], None], path: PathLike, width: float = COLUMN, height: float = 2.6) -> Path:
    """Call `draw(figure)` in the house style, whatever style the user has set, and write the figure as SVG (sizes in inches)."""
    import matplotlib
    from matplotlib.figure import Figure

    buffer = io.BytesIO()
    with _SETTINGS, matplotlib.rc_context():
        matplotlib.rcdefaults()  # leaves the backend alone; rc_context puts the user's settings back
        matplotlib.rcParams.update(cast(Any, STYLE))
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure)
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return write_atomically(path, buffer.getvalue())


# ---- curves --------------------------------------------------------------------------------------------------------------------


def training_curves(
    runs: Sequence[Mapping[str, Any]],
    path: PathLike,
    panels: Mapping[str, str] | None = None,
    x_label: str = "optimiser steps",
    log: Sequence[str] = (),
    window: int = 1,
) -> Path:
    """What was logged while training, a panel per series; every run a thin line, the mean of the runs of one label a thick one.

    Each run is `{"label": str, "steps": (T,), "series": {name: (T,)}}`; runs of one label are seeds of one model. `panels`
    chooses the series and gives the text of their axes, with the unit; those named in `log` get a logarithmic axis. `window` > 1
    draws running means over so many values (say so in the caption). A run whose values stop being finite ends in a cross, and
    from there its group has no mean: a collapse is shown, not averaged away.
    """
    if not runs:
        raise UsageError("training_curves: no runs")
    panels = panels or {name: name for name in runs[0]["series"]}
    labels = list(dict.fromkeys(run["label"] for run in runs))

    def draw(figure: Figure) -> None:
        axes = figure.subplots(rows, across, squeeze=False).flat
        for axis, (name, y_label) in zip(axes, panels.items(), strict=False):
            for index, label in enumerate(labels):
                group = [_curve(run, name, window) for run in runs if run["label"] == label and name in run["series"]]
                if group:
                    _seeds(axis, group, label, index)
            axis.set_xlabel(x_label)
            axis.set_ylabel(y_label)
            _few_ticks(axis, [steps for run in runs if name in run["series"] for steps in run["steps"]])
            if name in log:
                axis.set_yscale("log")
                _plain_log_ticks(axis)
            axis.margins(x=0.01)
        for axis in list(axes)[len(panels) :]:
            axis.set_visible(False)
        _legend(figure)

    across = min(2, len(panels))
    rows = math.ceil(len(panels) / across)
    return save_svg(draw, path, height=0.35 + 1.9 * rows)


def _few_ticks(axis: Axes, steps: Sequence[float]) -> None:
    """Ticks at whole steps, none twice; of a single step, one tick."""
    from matplotlib.ticker import MaxNLocator

    axis.xaxis.set_major_formatter("{x:,.0f}" if all(float(step).is_integer() for step in steps) or np.ptp(steps) > 4 else "{x:.4g}")
    if len(set(steps)) == 1:
        axis.set_xticks([steps[0]])
    elif np.ptp(steps) > 1:
        axis.xaxis.set_major_locator(MaxNLocator(nbins="auto", integer=True, steps=[1, 2, 2.5, 5, 10]))


def _curve(run: Mapping[str, Any], name: str, window: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    steps, values = np.asarray(run["steps"], float), np.asarray(run["series"][name], float)
    if steps.shape != values.shape or steps.ndim != 1:
        raise UsageError(f"training_curves: {name} of {run['label']} has shape {values.shape} for steps of shape {steps.shape}")
    if 1 < window <= len(values):
        values = np.convolve(values, np.full(window, 1 / window), "valid")
        steps = steps[window - 1 :]
    return steps, values


def _seeds(axis: Axes, group: Sequence[tuple[NDArray[np.float64], NDArray[np.float64]]], label: str, index: int) -> None:
    colour, dashes, marker = (cycle[index % len(cycle)] for cycle in (COLOURS, DASHES, MARKERS))
    for steps, values in group:
        if len(group) > 1:
            axis.plot(steps, values, color=colour, linewidth=0.6, alpha=0.45)
        finite = np.flatnonzero(np.isfinite(values))
        if len(finite) and finite[-1] < len(values) - 1:
            axis.plot(steps[finite[-1]], values[finite[-1]], marker="x", color=colour, markersize=6, markeredgewidth=1.6)
    # seeds may have been logged at different steps: their mean lives where all of them do
    first, last = max(steps[0] for steps, _ in group), min(steps[-1] for steps, _ in group)
    grid = np.unique(np.concatenate([steps for steps, _ in group]))
    grid = grid[(grid >= first) & (grid <= last)]
    mean = np.mean([np.interp(grid, steps, values) for steps, values in group], axis=0)
    name = f"{label} (mean of {len(group)} seeds)" if len(group) > 1 else label
    every = max(1, len(grid) // 7)
    offset = (index * every) // 3  # markers of curves that lie on each other do not
    style = {"linestyle": dashes, "marker": marker, "markevery": (offset, every), "markersize": 4}
    axis.plot(grid, mean, color=colour, label=name, **style)


def _plain_log_ticks(axis: Axes, name: str = "y") -> None:
    """0.5, 1, 2 instead of powers of ten where an axis spans few of them."""
    from matplotlib.ticker import LogLocator, NullLocator

    low, high = getattr(axis, f"get_{name}lim")()
    if low > 0 and high / low < 1e3:
        ruler = getattr(axis, f"{name}axis")
        ruler.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ruler.set_minor_locator(NullLocator())
        ruler.set_major_formatter("{x:g}")


def _legend(figure: Figure, columns: int = 3) -> None:
    """One legend for all panels, above them; what is filled before what is a line."""
    handles = {label: handle for axis in figure.axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    order = sorted(handles, key=lambda label: not hasattr(handles[label], "patches"))
    figure.legend([handles[label] for label in order], order, loc="outside upper left", ncols=columns)


# ---- lines, in panels ----------------------------------------------------------------------------------------------------------


def lines(panels: Sequence[Mapping[str, Any]], path: PathLike, height: float = 2.9, columns: int = 3) -> Path:
    """Curves side by side in panels, under one legend: what has one label looks the same in every panel.

    Each panel is `{"x_label": str, "y_label": str, "curves": [...], "levels": [...], "x_log": bool, "y_log": bool, "y_most": float}`, where no value
    can be above `y_most`, a share's 100 %, say, and the axis ends there; a curve
    `{"label": str, "x": (N,), "y": (N,)}` with the ends of intervals as `low` and `high` (N,) where there are any, and `plain` for a line
    without markers; a level `{"label": str, "y": float}`, a horizontal line to hold the curves against. Values that are not finite,
    or not positive on a logarithmic axis, are gaps.
    """
    if not panels or not all(panel["curves"] for panel in panels):
        raise UsageError("lines: a panel without curves")
    labels = list(dict.fromkeys(curve["label"] for panel in panels for curve in panel["curves"]))
    levels = list(dict.fromkeys(level["label"] for panel in panels for level in panel.get("levels", ())))

    def draw(figure: Figure) -> None:
        for axis, panel in zip(figure.subplots(1, len(panels), squeeze=False).flat, panels, strict=True):
            for name in ("x", "y"):
                if panel.get(f"{name}_log"):
                    getattr(axis, f"set_{name}scale")("log")
            for curve in panel["curves"]:
                _line(axis, curve, labels.index(curve["label"]), bool(panel.get("y_log")))
            for level in panel.get("levels", ()):
                look = LEVELS[levels.index(level["label"]) % len(LEVELS)]
                axis.axhline(level["y"], color="#444444", linewidth=1.0, linestyle=look, label=level["label"], zorder=1)
            axis.set_xlabel(panel["x_label"])
            axis.set_ylabel(panel["y_label"])
            most = panel.get("y_most", math.inf)
            if axis.get_ylim()[1] > most:
                axis.set_ylim(top=most)
                for drawn in axis.lines:
                    drawn.set_clip_on(False)  # markers at the end are drawn whole
            if panel.get("y_log"):
                _plain_log_ticks(axis)
            if panel.get("x_log"):
                axis.xaxis.set_minor_formatter("")
                _plain_log_ticks(axis, "x")
        _legend(figure, columns)

    return save_svg(draw, path, height=height)


LEVELS: tuple[Any, ...] = ((0, (4, 2)), (0, (1, 1.5)), (0, (7, 2, 1.5, 2)))


def _line(axis: Axes, curve: Mapping[str, Any], index: int, log: bool) -> None:
    colour, dashes, marker = (cycle[index % len(cycle)] for cycle in (COLOURS, DASHES, MARKERS))
    x, y = np.asarray(curve["x"], float), np.asarray(curve["y"], float)
    if x.shape != y.shape or x.ndim != 1:
        raise UsageError(f"lines: {curve['label']} has x of shape {x.shape} and y of shape {y.shape}")
    y = np.where(np.isfinite(y) & ((y > 0) | (not log)), y, np.nan)
    style: dict[str, Any] = {"color": colour, "linestyle": dashes, "label": curve["label"]}
    style |= {} if curve.get("plain") else {"marker": marker, "markersize": 4}
    if "low" not in curve:
        axis.plot(x, y, **style)
        return
    ends = [np.asarray(curve[end], float) for end in ("low", "high")]
    spread = np.maximum(0, np.nan_to_num([y - ends[0], ends[1] - y]))
    if log:
        spread[0] = np.minimum(spread[0], 0.9 * np.nan_to_num(y))  # an interval that reaches below 0 would leave the page
    axis.errorbar(x, y, spread, elinewidth=0.8, capsize=2, **style)


def densities(panels: Sequence[Mapping[str, Any]], edges: ArrayLike, path: PathLike, x_label: str, reference: ArrayLike | None = None) -> Path:
    """Histograms side by side on common axes, as steps filled in grey; `reference` is drawn as a line in each.

    Each panel is `{"title": str, "density": (N,)}` over bins with the given edges (N + 1,); so is the reference, `density` alone.
    """
    bins = np.asarray(edges, float)
    shapes = [np.asarray(panel["density"]).shape for panel in panels]
    if not panels or any(shape != (len(bins) - 1,) for shape in shapes):
        raise UsageError(f"densities: every density must have shape ({len(bins) - 1},), not {shapes}")

    def draw(figure: Figure) -> None:
        for axis, panel in zip(figure.subplots(1, len(panels), sharex=True, sharey=True, squeeze=False).flat, panels, strict=True):
            axis.stairs(panel["density"], bins, fill=True, color="#c9c9c9", label="drawn")
            axis.stairs(panel["density"], bins, color="#777777", linewidth=0.5)
            if reference is not None:
                axis.stairs(np.asarray(reference, float), bins, color=COLOURS[0], linewidth=1.2, baseline=None, label="limit")
            axis.set_title(panel["title"])
            axis.set_xlabel(x_label)
        figure.axes[0].set_ylabel("density")
        _legend(figure)

    return save_svg(draw, path, height=2.2)


# ---- bars ----------------------------------------------------------------------------------------------------------------------


def class_bars(
    shares: Mapping[str, Mapping[str, ArrayLike]],
    path: PathLike,
    classes: Sequence[str] | None = None,
    reference: ArrayLike | None = None,
) -> Path:
    """How often each class was recognised among the samples of each run, with intervals, against an even spread.

    `shares` maps a run's label to `{"share": (C,), "low": (C,), "high": (C,)}`, shares in [0, 1], the interval's ends optional.
    `reference` (C,), the shares of the training set, say, is drawn as a tick over each class.
    """
    if not shares:
        raise UsageError("class_bars: no runs")
    tables = {label: {name: np.asarray(value, float) * 100 for name, value in entry.items()} for label, entry in shares.items()}
    count = len(next(iter(tables.values()))["share"])
    if any(value.shape != (count,) for entry in tables.values() for value in entry.values()):
        raise UsageError(f"class_bars: every share, low and high must have shape ({count},)")
    names = [str(name) for name in (classes if classes is not None else range(count))]

    def draw(figure: Figure) -> None:
        axis = figure.subplots()
        width = 0.8 / len(tables)
        places = np.arange(count)
        for index, (label, entry) in enumerate(tables.items()):
            colour, hatch = COLOURS[index % len(COLOURS)], HATCHES[index % len(HATCHES)]
            x = places + (index - (len(tables) - 1) / 2) * width
            # every second run is light with hatches of its colour: full against hatched survives grey print
            fill = "white" if hatch else colour
            look: dict[str, Any] = {"facecolor": fill, "edgecolor": colour, "hatch": hatch, "linewidth": 0.7}
            axis.bar(x, entry["share"], width * 0.88, label=label, **look)
            if "low" in entry and "high" in entry:
                spread = np.maximum(0, [entry["share"] - entry["low"], entry["high"] - entry["share"]])
                axis.errorbar(x, entry["share"], spread, fmt="none", ecolor="black", elinewidth=0.8, capsize=1.6, capthick=0.8)
        if reference is not None:
            ticks = np.asarray(reference, float) * 100
            axis.hlines(ticks, places - 0.45, places + 0.45, color="#444444", linewidth=1.4, label="training set")
        even = f"even spread ({100 / count:.3g} %)"
        axis.axhline(100 / count, color="#444444", linewidth=0.9, linestyle=(0, (4, 2)), label=even)
        axis.set_xticks(places, names)
        axis.set_xlabel("recognised class")
        axis.set_ylabel("share of samples / %")
        axis.set_ylim(bottom=0)
        axis.set_xlim(-0.6, count - 0.4)
        axis.grid(False, axis="x")
        axis.tick_params(axis="x", length=0)
        _legend(figure, columns=5)

    return save_svg(draw, path, height=2.3)


# ---- rate and distortion -------------------------------------------------------------------------------------------------------


def raised(text: str) -> str:
    """The text with its powers of ten, 10⁴ say, as mathematics: the letters of figures have few raised digits."""
    return re.sub(r"10([⁻⁰¹²³⁴⁵⁶⁷⁸⁹]+)", lambda match: f"$10^{{{match[1].translate(LOWERED)}}}$", text)


LOWERED = str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")


def rate_distortion(
    curves: Sequence[Mapping[str, Any]], path: PathLike, x_label: str = "rate / nats", y_label: str = "distortion / nats", height: float = 2.7
) -> Path:
    """Distortion against rate, a curve for each model: means over seeds with intervals, single seeds as small marks, points with their names.

    Each curve is `{"label": str, "points": [...]}` and each point `{"name": str, "rate": told, "distortion": told, "seeds": [...]}`,
    where `told` is `{"mean": float, "low": float | None, "high": float | None}` and a seed is (rate, distortion). A name, the beta of
    the point, is written beside it; curves are drawn from the lowest rate to the highest.
    """
    if not curves or not all(curve["points"] for curve in curves):
        raise UsageError("rate_distortion: a curve without points")

    every = [point for curve in curves for point in curve["points"]]
    last = max(float(point["rate"]["mean"]) for point in every)
    extent = tuple(float(np.ptp([point[name]["mean"] for point in every])) or 1.0 for name in ("rate", "distortion"))

    def draw(figure: Figure) -> None:
        axis = figure.subplots()
        for index, curve in enumerate(curves):
            colour, dashes, marker = (cycle[index % len(cycle)] for cycle in (COLOURS, DASHES, MARKERS))
            points = sorted(curve["points"], key=lambda point: float(point["rate"]["mean"]))
            x, y = ([float(point[name]["mean"]) for point in points] for name in ("rate", "distortion"))
            style: dict[str, Any] = {"xerr": _half_widths(points, "rate"), "yerr": _half_widths(points, "distortion")}
            style |= {"color": colour, "linestyle": dashes, "marker": marker, "markersize": 4.5, "elinewidth": 0.8, "capsize": 2}
            axis.errorbar(x, y, label=curve["label"], **style)
            for point in points:
                if len(point["seeds"]) > 1:
                    rates, distortions = zip(*point["seeds"], strict=True)
                    axis.plot(rates, distortions, linestyle="", marker=".", markersize=3, color=colour, alpha=0.6)
            # above and to the right of a falling convex curve there is room; every second curve is named below
            offset, align = ((5, 4), ("left", "bottom")) if index % 2 == 0 else ((-5, -4), ("right", "top"))
            places = list(zip(x, y, strict=True))
            for place, name in _point_names(places, [point["name"] for point in points], extent):
                side = "right" if place[0] > last - 0.06 * extent[0] else align[0]  # no name leaves the figure
                axis.annotate(raised(name), place, textcoords="offset points", xytext=offset, ha=side, va=align[1], fontsize=7, color=colour)
        axis.set_xlabel(x_label)
        axis.set_ylabel(y_label)
        axis.margins(0.08)
        _legend(figure)

    return save_svg(draw, path, height=height)


def _point_names(places: Sequence[tuple[float, float]], names: Sequence[str], extent: Sequence[float]) -> list[tuple[tuple[float, float], str]]:
    """Where the names of points (x, y) are written: those that lie on each other, within some per cent of the extent of x and y, share a place."""
    found: list[tuple[tuple[float, float], str]] = []
    for place, name in zip(places, names, strict=True):
        near = found and abs(place[0] - found[-1][0][0]) < 0.015 * extent[0] and abs(place[1] - found[-1][0][1]) < 0.05 * extent[1]
        joined = ", ".join(word for word in (found[-1][1], name) if word) if near else name
        found = [*found[:-1], (found[-1][0], joined)] if near else [*found, (place, joined)]
    return found


def _half_widths(points: Sequence[Mapping[str, Any]], name: str) -> NDArray[np.float64]:
    """(2, P): how far the intervals reach below and above the means; 0 where there is none."""
    ends = [[point[name]["mean"] if point[name][end] is None else point[name][end] for point in points] for end in ("low", "high")]
    widths: NDArray[np.float64] = np.abs(np.asarray(ends, float) - np.asarray([point[name]["mean"] for point in points], float))
    return widths


# ---- many searches of one thing ------------------------------------------------------------------------------------------------


def search_ends(things: Sequence[Mapping[str, Any]], kinds: Sequence[str], path: PathLike, x_label: str, y_label: str) -> Path:
    """Where the searches of each thing ended, sorted, a mark for each by its kind; beside them levels to hold them against.

    Each thing is `{"name": str, "values": (S,), "kinds": (S,), "levels": {label: float}}`; `kinds` gives the order of the marks. The axis is
    logarithmic where the values, all positive, span more than a factor of 20.
    """
    if not things or any(np.shape(thing["values"]) != np.shape(thing["kinds"]) for thing in things):
        raise UsageError("search_ends: a kind for every value of every thing is needed")
    values = np.concatenate([np.asarray([*thing["values"], *thing.get("levels", {}).values()], float) for thing in things])
    found = [kind for kind in kinds if any(kind in thing["kinds"] for thing in things)]
    levels = list(dict.fromkeys(label for thing in things for label in thing.get("levels", {})))

    def draw(figure: Figure) -> None:
        axis = figure.subplots()
        for place, thing in enumerate(things):
            order = np.argsort(np.asarray(thing["values"], float), kind="stable")
            x = place + np.linspace(-0.36, 0.36, len(order)) if len(order) > 1 else np.array([float(place)])
            y, told = np.asarray(thing["values"], float)[order], np.asarray(thing["kinds"])[order]
            for index, kind in enumerate(found):
                rows = told == kind
                fill = COLOURS[index % len(COLOURS)] if index % 2 == 0 else "white"
                style: dict[str, Any] = {"marker": MARKERS[index % len(MARKERS)], "markersize": 3.6, "markerfacecolor": fill}
                axis.plot(x[rows], y[rows], linestyle="", markeredgecolor=COLOURS[index % len(COLOURS)], markeredgewidth=0.8, label=kind, **style)
            for label, value in thing.get("levels", {}).items():
                dashes = LEVELS[levels.index(label) % len(LEVELS)]
                axis.hlines(value, place - 0.42, place + 0.42, color="#444444", linewidth=1.0, linestyles=dashes, label=label)
        if (values > 0).all() and values.max() > 20 * values.min():
            axis.set_yscale("log")
            _plain_log_ticks(axis)
        axis.set_xticks(range(len(things)), [str(thing["name"]) for thing in things])
        axis.set_xlim(-0.6, len(things) - 0.4)
        axis.grid(False, axis="x")
        axis.tick_params(axis="x", length=0)
        axis.set_xlabel(x_label)
        axis.set_ylabel(y_label)
        _legend(figure)

    return save_svg(draw, path, height=3.1)


def paired_dots(groups: Sequence[Mapping[str, Any]], path: PathLike, x_label: str, y_label: str, levels: Mapping[str, float] | None = None) -> Path:
    """Values of the same things in several groups, thing by thing on one vertical line, in the order of the first group's values.

    Each group is `{"label": str, "y": (P,)}`, values that are not finite are left out; `levels` are horizontal lines by their labels.
    """
    table = np.array([np.asarray(group["y"], float) for group in groups])
    if table.ndim != 2 or not table.size:
        raise UsageError(f"paired_dots: groups of values (P,) of equal length are needed, not {[np.shape(group['y']) for group in groups]}")
    table = np.where(np.isfinite(table), table, np.nan)[:, np.argsort(table[0], kind="stable")]
    x = np.arange(1, table.shape[1] + 1)

    def draw(figure: Figure) -> None:
        axis = figure.subplots()
        shown = np.isfinite(table).any(0)
        axis.vlines(x[shown], np.nanmin(table[:, shown], 0), np.nanmax(table[:, shown], 0), color="#c9c9c9", linewidth=0.8, zorder=1)
        for index, (group, y) in enumerate(zip(groups, table, strict=True)):
            colour = COLOURS[index % len(COLOURS)]
            fill = colour if index % 2 == 0 else "white"
            axis.plot(
                x, y, linestyle="", marker=MARKERS[index % len(MARKERS)], markersize=4.5, color=colour, markerfacecolor=fill, label=group["label"]
            )
        for index, (label, value) in enumerate((levels or {}).items()):
            axis.axhline(value, color="#444444", linewidth=1.0, linestyle=LEVELS[index % len(LEVELS)], label=label, zorder=1)
        axis.set_xlim(0.2, len(x) + 0.8)
        axis.set_xticks(x if len(x) <= 30 else x[:: len(x) // 15])
        axis.grid(False, axis="x")
        axis.tick_params(axis="x", length=0)
        axis.set_xlabel(x_label)
        axis.set_ylabel(y_label)
        _legend(figure)

    return save_svg(draw, path, height=2.9)


def trade_off(groups: Sequence[Mapping[str, Any]], path: PathLike, x_label: str, y_label: str) -> Path:
    """What is had for what: points with a word each, joined within a group, with whiskers along y.

    Each group is `{"label": str, "x": (P,), "y": (P,), "errors": (P,) half-widths, "words": (P,)}`.
    """
    if not groups or any(len({np.shape(group[name]) for name in ("x", "y", "errors", "words")}) != 1 for group in groups):
        raise UsageError("trade_off: x, y, errors and words of equal length are needed for every group")
    every = {name: np.concatenate([np.asarray(group[name], float) for group in groups]) for name in ("x", "y")}
    log = bool(every["x"].min() > 0 and every["x"].max() > 3 * every["x"].min())
    extent = (float(np.ptp(np.log(every["x"]) if log else every["x"])), float(np.ptp(every["y"])))

    def draw(figure: Figure) -> None:
        axis = figure.subplots()
        for index, group in enumerate(groups):
            colour = COLOURS[index % len(COLOURS)]
            style: dict[str, Any] = {"marker": MARKERS[index % len(MARKERS)], "markersize": 5, "color": colour, "linewidth": 0.8}
            fill = colour if index % 2 == 0 else "white"
            axis.errorbar(group["x"], group["y"], group["errors"], capsize=2, label=group["label"], markerfacecolor=fill, **style)
            offset = (5, 4) if index % 2 == 0 else (5, -11)  # the words of the next group stand below theirs
            scaled = np.log(group["x"]) if log else np.asarray(group["x"], float)
            for (x, y), words in _point_names(list(zip(scaled.tolist(), group["y"], strict=True)), group["words"], extent):
                axis.annotate(words, (math.exp(x) if log else x, y), textcoords="offset points", xytext=offset, fontsize=7, color="#444444")
        if log:
            axis.set_xscale("log")
            _plain_log_ticks(axis, "x")
        axis.margins(x=0.12)  # room for the words
        axis.set_xlabel(x_label)
        axis.set_ylabel(y_label)
        _legend(figure)

    return save_svg(draw, path, height=2.9)
