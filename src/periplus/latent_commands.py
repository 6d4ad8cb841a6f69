"""`periplus invert RUN` and `periplus path RUN`: codes of images, and the cheapest paths found between them.

Both write a folder: everything that was found as JSON with the command that makes it, codes or points as safetensors, and pictures made from these.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from tyro.conf import Positional, arg

from periplus.commands import Common
from periplus.errors import UsageError
from periplus.files import write_atomically

if TYPE_CHECKING:
    from torch import Tensor

    from periplus.inversion import Inversion
    from periplus.locating import Targets
    from periplus.passages import Passages
    from periplus.runs import Run

#: Images in the picture of an inversion, and distinct minima of each in it.
PICTURED, MINIMA = 20, 6
#: Pairs side by side in a figure of costs.
PANELS = 2
FRAMES, MILLISECONDS = 32, 60
#: Searches of more images than this are kept chunk by chunk.
KEPT_ABOVE = 32


@dataclass(frozen=True, kw_only=True)
class Locating(Common):
    """Options of both commands: a run, its images, and how codes are searched."""

    folder: Annotated[Positional[Path], arg(metavar="RUN", help="A run folder.")]
    classes: Annotated[tuple[str, ...], arg(help="Choose images of these classes, by name or number.")] = ()
    files: Annotated[tuple[Path, ...], arg(help="Image files instead of images of the data; resized to the run's size.")] = ()
    split: Annotated[str, arg(help="Of the data: test (held-out images where there is no such split), train, ...")] = "test"
    data_root: Annotated[Path | None, arg(help="Where named sets are looked for first; else $PERIPLUS_DATA, else the cache.")] = None
    starts: Annotated[int, arg(help="Searches per image; an encoder's guess is one more.")] = 16
    seed: Annotated[int, arg(help="Of the starts.")] = 0
    device: Annotated[str, arg(help="cpu, cuda or auto.")] = "cpu"

    @property
    def command(self) -> str:
        """What was typed."""
        return shlex.join(["periplus", *sys.argv[1:]])

    def check_sources(self, **options: object) -> None:
        """Raise UsageError where images are chosen in two ways."""
        given = [f"--{name}" for name, value in {"classes": self.classes, "files": self.files, **options}.items() if value]
        if len(given) > 1:
            raise UsageError(f"{' and '.join(given)} choose images in different ways: give one of them")


# ---- invert ---------------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Invert(Locating):
    """Find codes z* = argmin ||G(z) - x||^2 of images, from many starts each, with a certificate for every endpoint."""

    n: Annotated[int, arg(help="How many: the first n images of the split, or of each class.")] = 10
    all: Annotated[bool, arg(help="All images of the split (or of the classes). What was searched is kept: the same command goes on with it.")] = (
        False
    )
    domain: Annotated[Literal["ball", "free", "prior"], arg(help="Where codes may lie: |z| <= radius, anywhere, or with a weight on |z|^2.")] = "ball"
    radius: Annotated[float | None, arg(help="Of the ball; by default what holds 0.999 of the codes that the decoder was trained on.")] = None
    prior_weight: Annotated[float | None, arg(help="Domain prior: the factor of |z|^2.")] = None
    keep: Annotated[Literal["all", "best"], arg(help="best drops starts that lag behind early: faster, and says less about minima.")] = "all"
    out: Annotated[Path | None, arg(help="The folder to write to. Default: RUN/inversion")] = None

    def run(self) -> None:
        """Search; write inversion.json, codes.safetensors and inversion.png; print the table and the answers."""
        from periplus.console import note, table
        from periplus.locating import Search, count, inversion_record, locate
        from periplus.runs import load_run

        if self.all and self.files:
            raise UsageError("--all and --files choose images in different ways: give one of them")
        if self.domain == "prior" and self.prior_weight is None:
            raise UsageError("--domain prior needs --prior-weight, the factor of |z|^2 in what is minimised")
        self.check_sources()
        check_out(self.out)
        run = load_run(self.folder, self.device)
        targets = self.targets(run)
        search = Search(self.starts, self.domain, self.radius, self.prior_weight, self.keep, self.seed)
        out = self.out or self.folder / "inversion"
        kept = out / "parts" if self.all or len(targets) > KEPT_ABOVE else None
        if kept is not None:
            note(f"finished images are kept in {kept}: stop at any time, and the same command goes on")
        with Countdown(f"inverting {count(len(targets), 'image')}") as display:
            inversion = locate(run, targets, search, kept, display)
        record = inversion_record(run, targets, inversion, search)
        whole = write_inversion(run, targets, inversion, record, out, self.command)
        if kept is not None:
            shutil.rmtree(kept)  # all of it is in codes.safetensors now, and the next search may be another one
        if self.json:
            self.tell(whole)
            return
        table(*inversion_table(whole), title=f"{self.folder}: {whole['starts']} starts per image; squared errors, summed over pixels")
        print("\n".join([*whole["statements"], *(str(out / name) for name in whole["files"])]))

    def targets(self, run: Run) -> Targets:
        """The images that the options choose."""
        from periplus.console import note
        from periplus.locating import choose, class_numbers, count, images_of, read_files

        if self.files:
            return read_files(run, self.files)
        data = images_of(run, self.split, self.data_root)
        targets = choose(data, None if self.all else self.n, self.classes)
        wanted = self.n * (len(class_numbers(data, self.classes)) if self.classes else 1)
        if not self.all and len(targets) < wanted:
            split = "held out" if data.split.endswith("held-out") else f"in {data.name} ({data.split})"
            found = count(len(targets), "image") + " of these classes" * bool(self.classes)
            note(f"{wanted:,} were asked for, but {found} are {split}: all are inverted")
        return targets


def check_out(out: Path | None) -> None:
    """Raise UsageError, before anything is searched, for an --out that cannot be a folder."""
    for place in (out, *out.parents) if out is not None else ():
        if place.exists():
            if not place.is_dir():
                raise UsageError(f"--out is {out}: {place} is a file, and a folder is needed")
            return


def write_inversion(run: Run, targets: Targets, inversion: Inversion, record: dict[str, Any], out: Path, command: str) -> dict[str, Any]:
    """Write an inversion's files; returns what inversion.json holds."""
    names = ["inversion.json", "codes.safetensors", "inversion.png"]
    whole = write_record(out, "inversion.json", names, record, command)
    write_tensors(out / "codes.safetensors", {"images": targets.images, **inversion.tensors()}, command)
    draw_inversion(run, targets, inversion, whole, out / "inversion.png", command)
    return whole


def draw_inversion(run: Run, targets: Targets, inversion: Inversion, record: dict[str, Any], path: Path, command: str | None = None) -> None:
    """Targets, best reconstructions and the other certified minima, lowest error first, with errors, kinds and shares of the starts."""
    import torch

    from periplus.locating import percent
    from periplus.pictures import captioned_rows

    rows, captions, labels = [], [], []
    for index in range(min(len(targets), PICTURED)):
        told = record["images"][index]
        others = [minimum for minimum in inversion.minima(index) if not torch.equal(minimum.z, inversion.z[index])][:MINIMA]
        with torch.no_grad():
            decoded = run.decode(torch.stack([inversion.z[index], *(minimum.z for minimum in others)])).clamp(0, 1).cpu()
        rows.append(torch.cat([targets.images[index : index + 1].float() / 255, decoded]).numpy())
        ends = [(told["error"], told["kind"], told["best_share"]), *((m.error, m.kind.name.lower(), m.frequency) for m in others)]
        captions.append(["", *(f"{error:.3g}\n{kind}, {percent(share)}" for error, kind, share in ends)])
        labels.append(targets.names[index] if told["label"] is None else f"{targets.names[index]} ({told['label']})")
    header = ["x", "G(z*)", "other minima"][: max(map(len, rows))]
    captioned_rows(rows, captions, path, labels, header, command=command)


def inversion_table(record: dict[str, Any]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and rows of the printed table; at most PICTURED images."""
    from periplus.locating import percent

    header = ("image", "error", "rms", "kind", "minima (images)", "starts at z*", "certified", "|z*|")
    rows: list[tuple[str, ...]] = [
        (
            short(image),
            f"{image['error']:.4g}",
            f"{image['rms']:.3f}",
            image["kind"],
            f"{image['distinct']} ({image['distinct_images']})",
            percent(image["best_share"]),
            percent(image["certified_share"]),
            f"{image['norm']:.2f}",
        )
        for image in record["images"][:PICTURED]
    ]
    return header, rows + [("...",) * len(header)] * (len(record["images"]) > len(rows))


def short(image: dict[str, Any]) -> str:
    """An image in a narrow column: its position and class, or its file's name."""
    return str(image["name"]) if image["label"] is None else f"{image['index']} ({image['label']})"


# ---- path -----------------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class FindPath(Locating):
    """Find the cheapest path between the codes of two images, with what no path can undercut, and show it."""

    n: Annotated[int, arg(help="How many pairs: of the first images of the split, or of two --classes.")] = 4
    pairs: Annotated[tuple[str, ...], arg(help="Positions in the split, such as 0,5 2,7")] = ()
    segments: Annotated[int, arg(help="Straight pieces of a path.")] = 64
    norm: Annotated[Literal["length", "energy"], arg(help="length: U = int c |Z'| dt. energy: U = int c |Z'|^2 dt.")] = "length"
    alternatives: Annotated[int, arg(help="How many of the best minima of an image may be an end; 1: only the best code.")] = 3
    steps: Annotated[int, arg(help="Images in the strip.")] = 11
    gif: Annotated[bool, arg(help="Write a looping animation of each path.")] = False
    judge: Annotated[bool, arg(help="Judge the run by its first --n held-out pairs instead: scores, ends, realism along the paths.")] = False
    out: Annotated[Path | None, arg(help="The folder to write to. Default: RUN/paths")] = None

    def run(self) -> None:
        """Search; write path.json, points.safetensors, strips, costs and animations; print the table and the answers."""
        from periplus.console import table
        from periplus.locating import Search, count, locate
        from periplus.passages import passage_record, price
        from periplus.runs import load_run

        self.check_sources(pairs=self.pairs)
        check_out(self.out)
        for name, least in (("segments", 1), ("alternatives", 1), ("steps", 2)):
            if getattr(self, name) < least:
                raise UsageError(f"--{name} is {getattr(self, name)}: at least {least} is needed")
        wanted = parse_pairs(self.pairs)
        run = load_run(self.folder, self.device)
        if self.judge:
            self.tell_judgement(run)
            return
        targets, pairs = self.chosen(run, wanted)
        search = Search(self.starts, seed=self.seed)
        with Countdown(f"inverting {count(len(targets), 'image')}") as located:
            inversion = locate(run, targets, search, on_progress=located)
        settings: dict[str, Any] = {"segments": self.segments, "norm": self.norm, "alternatives": self.alternatives}
        with Countdown(f"searching {count(len(pairs), 'path')}") as priced:
            passages = price(run, targets, pairs, search, inversion=inversion, on_progress=priced, **settings)
        record = passage_record(run, passages, search, **settings)
        out = self.out or self.folder / "paths"
        whole = write_passages(run, passages, record, out, self.command, steps=self.steps, gif=self.gif)
        if self.json:
            self.tell(whole)
            return
        table(*passage_table(whole), title=f"{self.folder}: U ({self.norm}) of straight line, spherical interpolation and path")
        print("\n".join([*whole["statements"], *(str(out / name) for name in whole["files"])]))

    def tell_judgement(self, run: Run) -> None:
        """Write judge.json and print what it says."""
        from periplus.locating import Search, count, images_of
        from periplus.path_judge import judge_paths

        if self.pairs or self.classes or self.files or self.gif or self.norm != "length":
            raise UsageError(
                "--judge takes the first --n pairs of a split in the length reading, and draws nothing: "
                "leave out --pairs, --classes, --files, --gif and --norm"
            )
        data = images_of(run, self.split, self.data_root)
        search = Search(self.starts, keep="best", seed=self.seed)
        with Countdown(f"judging {count(self.n, 'path')}: inverting its ends") as located:
            record = judge_paths(run, data, self.n, search, segments=self.segments, on_progress=located)
        whole = write_record(self.out or self.folder / "paths", "judge.json", ["judge.json"], record, self.command)
        if self.json:
            self.tell(whole)
            return
        print("\n".join([*whole["statements"], str((self.out or self.folder / "paths") / "judge.json")]))

    def chosen(self, run: Run, wanted: list[tuple[int, int]]) -> tuple[Targets, list[tuple[int, int]]]:
        """The images and pairs that the options choose."""
        from periplus.locating import images_of, read_files
        from periplus.passages import chosen_pairs, class_pairs, file_pairs, first_pairs

        if self.files:
            return file_pairs(read_files(run, self.files))
        data = images_of(run, self.split, self.data_root)
        if wanted:
            return chosen_pairs(data, wanted)
        return class_pairs(data, self.classes, self.n) if self.classes else first_pairs(data, self.n)


def parse_pairs(words: Sequence[str]) -> list[tuple[int, int]]:
    """0,5 2,7 as [(0, 5), (2, 7)]. Raises UsageError that names the word."""
    found = []
    for word in words:
        if not (match := re.fullmatch(r"(\d+),(\d+)", word)):
            raise UsageError(f"--pairs has '{word}': two positions with a comma between them are needed, such as 0,5")
        if int(match[1]) == int(match[2]):
            raise UsageError(f"--pairs has '{word}': a path needs two different images")
        found.append((int(match[1]), int(match[2])))
    return found


def write_passages(
    run: Run, passages: Passages, record: dict[str, Any], out: Path, command: str, *, steps: int = 11, gif: bool = False
) -> dict[str, Any]:
    """Write the files of paths; returns what path.json holds."""
    count = len(passages.pairs)
    strips = [f"pair-{k + 1}.png" for k in range(count)]
    costs = [f"cost-{k + 1}.svg" for k in range(-(-count // PANELS))]
    films = [f"pair-{k + 1}.gif" for k in range(count)] if gif else []
    whole = write_record(out, "path.json", ["path.json", "points.safetensors", *strips, *costs, *films], record, command)
    write_tensors(out / "points.safetensors", passage_tensors(passages), command)
    draw_strips(run, passages, whole, [out / name for name in strips], steps, command)
    draw_costs(run, passages, whole, [out / name for name in costs])
    draw_films(run, passages, [out / name for name in films], command)
    return whole


def passage_tensors(passages: Passages) -> dict[str, Tensor]:
    """Nodes of the path (P, N+1, d), and the images (P, C, H, W) in [0, 1] at its ends."""
    found = {"points": passages.path.points, "image_a": passages.images(0), "image_b": passages.images(1)}
    return {name: tensor.cpu().contiguous() for name, tensor in found.items()}


def draw_strips(run: Run, passages: Passages, record: dict[str, Any], paths: Sequence[Path], steps: int, command: str | None = None) -> None:
    """For each pair the straight line, spherical interpolation and the path, from image to image, at equal steps of length."""
    from periplus.passages import CURVES, images_along
    from periplus.pictures import morph_strip

    rows = {curve: images_along(run, passages, curve, steps).cpu().numpy() for curve in CURVES}
    for k, path in enumerate(paths):
        pair = record["pairs"][k]
        scores = (pair["straight_score"], pair["spherical_score"], pair["score"])
        labels = [curve if score is None else f"{curve}, U~ {score:.2f}" for curve, score in zip(CURVES, scores, strict=True)]
        ends = (passages.images(end)[k].numpy() for end in (0, 1))
        morph_strip(next(ends), [rows[curve][k] for curve in CURVES], next(ends), path, labels, command=command)


def draw_costs(run: Run, passages: Passages, record: dict[str, Any], paths: Sequence[Path]) -> None:
    """c / Dist^2 against the length gone, for the three curves of each pair."""
    from periplus.passages import CURVES, cost_along
    from periplus.plots import lines

    curves = {curve: [part.cpu().numpy() for part in cost_along(run, passages, curve)] for curve in CURVES}
    panels = [
        {
            "x_label": f"length in z, {pair['a']['name']} to {pair['b']['name']}",
            "y_label": "" if k % PANELS else "c / Dist²",
            "curves": [{"label": curve, "x": length[k], "y": cost[k], "plain": True} for curve, (cost, length) in curves.items()],
            "levels": [{"label": "least possible", "y": 0.5}],
        }
        for k, pair in enumerate(record["pairs"])
    ]
    for number, path in enumerate(paths):
        lines(panels[number * PANELS : (number + 1) * PANELS], path, height=2.4, columns=4)


def draw_films(run: Run, passages: Passages, paths: Sequence[Path], command: str | None = None) -> None:
    """Each path there and back, for ever."""
    from periplus.passages import images_along
    from periplus.pictures import animation

    if not paths:
        return
    frames = images_along(run, passages, "path", FRAMES).cpu().numpy()
    for k, path in enumerate(paths):
        animation([*frames[k], *frames[k][-2:0:-1]], path, MILLISECONDS, command=command)


def passage_table(record: dict[str, Any]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and rows of the printed table."""
    header = ("pair", "line", "sphere", "path", "bound", "gap", "U~", "status", "minima")
    rows = []
    for pair in record["pairs"]:
        gap, score = ("-" if pair[name] is None else f"{pair[name]:{form}}" for name, form in (("gap", ".0%"), ("score", ".2f")))
        costs = (f"{pair[name]:.4g}" for name in ("straight_cost", "spherical_cost", "cost", "lower_bound"))
        rows.append((f"{short(pair['a'])}, {short(pair['b'])}", *costs, gap, score, pair["status"], str(pair["minima"])))
    return header, rows


# ---- files, and time left -------------------------------------------------------------------------------------------------------------------


def write_record(out: Path, name: str, files: Sequence[str], record: dict[str, Any], command: str) -> dict[str, Any]:
    """Write a record with its command, commit and files, after removing the files of the record that it replaces; returns what was written."""
    from periplus.machine import commit

    with suppress(OSError, ValueError, AttributeError):
        for old in json.loads((out / name).read_text(encoding="utf-8")).get("files", ()):
            if Path(old).name == old and old != name:
                (out / old).unlink(missing_ok=True)
    whole = {"command": command, "measured_at": commit(), "files": list(files), **record}
    write_atomically(out / name, json.dumps(whole, indent=1) + "\n")
    return whole


def write_tensors(path: Path, tensors: dict[str, Tensor], command: str) -> None:
    """Write tensors as safetensors, with their command."""
    from safetensors.torch import save

    write_atomically(path, save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, {"command": command}))


class Countdown:
    """Progress of something counted: a line with the time left that is rewritten on a terminal, plain lines elsewhere. Call with (done, all)."""

    def __init__(self, title: str) -> None:
        self.title = title
        self._began = self._last = time.monotonic()
        self._watched = sys.stderr.isatty()
        self._width = 0

    def __enter__(self) -> Self:
        self._show(self.title)
        return self

    def __exit__(self, *_: object) -> None:
        if self._watched:
            print(file=sys.stderr)

    def __call__(self, done: int, total: int) -> None:
        from periplus.console import PLAIN_INTERVAL, duration

        now = time.monotonic()
        left = f"{duration((now - self._began) / done * (total - done))} left" if done < total else f"in {duration(now - self._began)}"
        if self._watched or (done < total and now - self._last > PLAIN_INTERVAL):
            self._last = now
            self._show(f"{self.title}: {done:,} done, {left}")

    def _show(self, words: str) -> None:
        if self._watched:  # what an earlier, longer line left is covered
            print(f"\r{words:<{self._width}}", end="", file=sys.stderr, flush=True)
            self._width = len(words)
        else:
            print(words, file=sys.stderr, flush=True)
