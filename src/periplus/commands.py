"""What the commands do: one frozen dataclass each, its fields the options, its `run` the work.

Heavy libraries are imported inside `run`, so that `--help` and usage errors answer at once.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_type_hints

import tyro
from tyro.conf import Positional, arg

from periplus.config import MODELS, NOT_FOR, AdversarialConfig, AutoencoderConfig, Config, config_for, nearest
from periplus.errors import UsageError

if TYPE_CHECKING:
    from periplus.data import ImageData
    from periplus.runs import Run
    from periplus.training import Plan

#: Classes that a dry run names.
NAMED_CLASSES = 10
PRESETS: dict[str, Callable[[str], Config]] = {
    "default": lambda model: config_for(model),
    "sheet": lambda model: AdversarialConfig.sheet(model),  # type: ignore[arg-type]
    "paper": lambda model: AutoencoderConfig.paper(model=model),
    "stacked": lambda model: AdversarialConfig.stacked(model),  # type: ignore[arg-type]
}
Preset = Literal["default", "sheet", "paper", "stacked"]


@dataclass(frozen=True)
class Common:
    """Options of every command."""

    json: Annotated[bool, arg(help="Print one JSON document on stdout.")] = False
    debug: Annotated[bool, arg(help="Show tracebacks.")] = False

    def tell(self, record: Any, text: str | None = None) -> None:
        """The outcome: JSON with --json, else the text."""
        if self.json:
            print(json.dumps(record, indent=2, default=str))
        elif text is not None:
            print(text)


# ---- train ----------------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Train(Common):
    """Options of `periplus train` beside those of the configuration."""

    data: Annotated[str, arg(help="A named set (as in periplus data list), an .npz, an IDX file or a folder of images.")]
    out: Annotated[Path, arg(help="The run folder to make.")]
    image_size: Annotated[int | None, arg(help="Resize images to squares of so many pixels.")] = None
    data_root: Annotated[Path | None, arg(help="Where named sets are looked for first; else $PERIPLUS_DATA, else the cache.")] = None
    preset: Annotated[
        Preset,
        arg(
            help="sheet (gan, wgan-gp, rpgan): the course sheet's setting, learning rate 1e-4, 100 epochs, 1:1. paper (vae, echo): architecture and "
            "protocol of the echo paper, 200 epochs. stacked (gan, wgan-gp, rpgan): for --data stacked-mnist, convolutions, 50 epochs."
        ),
    ] = "default"
    resume: Annotated[bool, arg(help="Go on with the run in --out; options left out are those of the run.")] = False
    threads: Annotated[int | None, arg(help="Threads of one operation; part of what makes a run repeatable to the bit.")] = None
    allow_other_threads: Annotated[bool, arg(help="Resume with another thread count, giving up the same bits.")] = False
    dry_run: Annotated[bool, arg(help="Say what would be done, and write nothing.")] = False
    fast_dev_run: Annotated[bool, arg(help="Three steps through every part of the machinery, to see that all of it works.")] = False

    def config(self) -> Config:
        """The configuration among the options."""
        kind = MODELS[self.model]  # type: ignore[attr-defined]
        config = kind(**{f.name: getattr(self, f.name) for f in dataclasses.fields(kind) if hasattr(self, f.name)})
        if self.fast_dev_run:
            config = dataclasses.replace(config, max_steps=3, log_every=1, sample_every=2, checkpoint_every=2)
        return config

    def run(self) -> None:
        """Train, with progress; say where the run is."""
        import torch

        from periplus.console import TrainingDisplay, note, warn
        from periplus.data import load_data
        from periplus.runs import CONFIG, describe_data
        from periplus.training import check_vacant, is_finished, plan, train

        if self.threads is not None:
            if self.threads < 1:
                raise UsageError(f"--threads is {self.threads}: at least 1 is needed")
            torch.set_num_threads(self.threads)
        check_vacant(self.out, self.resume)  # before the data are read, which may take a while
        config = self.config()
        data = load_data(self.data, root=self.data_root, image_size=self.image_size)
        decided = plan(config, data)
        if self.dry_run:
            self.tell(dataclasses.asdict(decided), f"{describe_images(decided, data)}\n{describe_plan(decided, self.out)}")
            return
        if self.resume and not (self.out / CONFIG).exists():
            note(f"nothing to resume in {self.out}: starting")
        finished = self.resume and is_finished(self.out, decided, describe_data(data, self.data))
        if not (finished or self.json):
            note(f"{config.model} on {data.name}: {decided.steps} steps of {config.batch_size} images, {decided.config.device}")
        with TrainingDisplay(f"{config.model} {self.out}") as display:
            run = train(
                config,
                data,
                self.out,
                source=self.data,
                resume=self.resume,
                allow_other_threads=self.allow_other_threads,
                on_progress=display,
                warn=warn,
            )
        last = run.metrics[-1] if run.metrics else {}
        outcome = f"{self.out} is finished: {run.step} steps were done; nothing was changed" if finished else f"{self.out}: {run.step} steps done"
        self.tell({"run": str(self.out), "step": run.step, "steps": decided.steps, "metrics": last}, outcome)


def train_options(argv: Sequence[str]) -> type[Train]:
    """The options of one model as a dataclass, with the defaults of that model, of the preset, or of the run that is resumed."""
    model = argv[0]
    if model not in MODELS:
        raise UsageError(f"unknown model '{model}'{nearest(model, MODELS)}: known are {', '.join(MODELS)}")
    defaults = preset_config(model, value_of(argv, "--preset") or "default")
    # an estimator or a sigma depends on other options: these defaults are left to `resolve`
    changes = {k: v for k, v in defaults.defaults.items() if getattr(defaults, k) is None and k not in ("estimator", "sigma")}
    data: Any = dataclasses.MISSING
    if "--resume" in argv and (out := value_of(argv, "--out")) is not None:
        from periplus.training import stored_config

        if (stored := stored_config(out)) is not None:
            defaults, data = stored
            changes = {}
            if defaults.model != model:
                raise UsageError(f"{out} was trained as '{defaults.model}', not '{model}'")
    return _options_from(dataclasses.replace(defaults, **changes), data)


def preset_config(model: str, preset: str) -> Config:
    """A model's configuration by preset. Raises UsageError where the preset is not for this kind of model."""
    kinds = {"sheet": AdversarialConfig, "paper": AutoencoderConfig, "stacked": AdversarialConfig}
    if preset not in PRESETS:
        raise UsageError(f"--preset is '{preset}': use one of {', '.join(PRESETS)}")
    if not issubclass(MODELS[model], kinds.get(preset, MODELS[model])):
        raise UsageError(f"--preset {preset} is not for '{model}': it is for {', '.join(m for m, kind in MODELS.items() if kind is kinds[preset])}")
    return PRESETS[preset](model)


def _options_from(defaults: Config, data: Any) -> type[Train]:
    kind = type(defaults)
    hints, documents = get_type_hints(kind), attribute_documents(kind)
    fields: list[Any] = []
    if data is not dataclasses.MISSING:
        fields.append(("data", get_type_hints(Train, include_extras=True)["data"], dataclasses.field(default=data)))
    for f in dataclasses.fields(kind):
        if f.name in NOT_FOR[defaults.model]:
            continue
        default = getattr(defaults, f.name)
        hint: Any = hints[f.name] if default is None else without_none(hints[f.name])
        if f.name == "model":  # the word after 'train' says it
            hint = Annotated[hint, tyro.conf.Suppress]
        if f.name == "rate":  # a vae's: echo has only one
            hint = Literal["prior", "marginal"]
        if f.name == "architecture":  # one's own modules come through Python
            hint = Literal[tuple(a for a in get_args(hint) if a != "custom" or default == "custom")]
        fields.append((f.name, Annotated[hint, arg(help=documents.get(f.name, ""))], dataclasses.field(default=default)))
    made = dataclasses.make_dataclass("TrainOptions", fields, bases=(Train,), frozen=True, kw_only=True)
    made.__doc__ = f"Train '{defaults.model}' into a run folder that can be resumed, sampled and reported on."
    return made


def without_none(hint: Any) -> Any:
    """X of X | None."""
    rest = [h for h in get_args(hint) if h is not type(None)]
    return rest[0] if len(rest) == 1 and type(None) in get_args(hint) else hint


def value_of(argv: Sequence[str], name: str) -> str | None:
    """The value of an option among raw words, in either spelling (--out X, --out=X)."""
    for i, word in enumerate(argv):
        if word == name and i + 1 < len(argv):
            return argv[i + 1]
        if word.startswith(f"{name}="):
            return word.split("=", 1)[1]
    return None


def attribute_documents(cls: type) -> dict[str, str]:
    """The strings under a dataclass's fields, by field, for the help."""
    body = ast.parse(inspect.getsource(cls)).body[0].body  # type: ignore[attr-defined]
    found = {}
    for node, following in zip(body, body[1:], strict=False):
        if isinstance(node, ast.AnnAssign) and isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
            found[node.target.id] = str(following.value.value)  # type: ignore[union-attr]
    return found


def describe_images(decided: Plan, data: ImageData) -> str:
    """What was read, as a dry run prints it: images to train on and held out, their shape, their classes, and what was odd."""
    shown = ", ".join(data.classes[:NAMED_CLASSES]) + (f", ... ({len(data.classes):,} in all)" if len(data.classes) > NAMED_CLASSES else "")
    classes = "no classes" if data.labels is None else f"classes {shown}"
    shape = " x ".join(map(str, data.shape)) + (f" ({data.remark})" if data.remark else "")
    held_out = len(data) - decided.training_images
    return f"read {data.name}: {decided.training_images:,} images to train on + {held_out:,} held out, {shape}, {classes}"


def describe_plan(decided: Plan, out: Path) -> str:
    """What a dry run prints."""
    parameters = ", ".join(f"{k} {v:,}" for k, v in decided.parameters.items())
    values = "\n".join(f"  {k} = {v}" for k, v in dataclasses.asdict(decided.config).items() if v is not None)
    return (
        f"would train into {out}: {decided.steps} steps on {decided.training_images} images; trainable parameters: {parameters}\n{values}\n"
        "nothing was written"
    )


# ---- sample ---------------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Sample(Common):
    """Draw samples from a run."""

    folder: Annotated[Positional[Path], arg(metavar="RUN", help="A run folder.")]
    n: Annotated[int, arg(help="How many.")] = 64
    out: Annotated[Path | None, arg(help="A .png grid, or an .npz with 'images' (N, C, H, W). Default: RUN/samples.png")] = None
    seed: Annotated[int, arg(help="Of the codes: the same seed gives the same images.")] = 0
    columns: Annotated[int | None, arg(help="Of the grid; 10 by default.")] = None
    last: Annotated[bool, arg(help="Sample the last generator instead of the averaged one (EMA).")] = False
    device: Annotated[str, arg(help="cpu, cuda or auto.")] = "cpu"

    def run(self) -> None:
        """Write the file and say so."""
        from periplus.pictures import save_images
        from periplus.runs import load_run

        if self.columns is not None and self.columns < 1:
            raise UsageError(f"--columns is {self.columns}: at least 1 is needed")
        run = load_run(self.folder, self.device, ema=not self.last)
        out = self.out or self.folder / "samples.png"
        images = run.sample(self.n, self.seed)
        save_images(images.cpu(), out, self.columns)
        record = {"run": str(self.folder), "step": run.step, "n": self.n, "seed": self.seed, "out": str(out)}
        self.tell(record, f"{out}: {self.n} samples of {self.folder} at step {run.step}")


# ---- evaluate -------------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Evaluate(Common):
    """Every measure that fits a run, with what bounds it, into RUN/evaluation.json."""

    folders: Annotated[Positional[tuple[Path, ...]], arg(metavar="RUN", help="Run folders.")]
    data_root: Annotated[Path | None, arg(help="Where named sets are looked for first.")] = None
    seed: Annotated[int, arg(help="Of the codes and of which images are judged.")] = 0
    images: Annotated[int, arg(help="Autoencoders: images of each split, at most.")] = 10_000
    likelihood_images: Annotated[int, arg(help="vae with --rate prior: test images for the log-likelihood; 0 leaves it out.")] = 1000
    samples: Annotated[int, arg(help="Importance samples for each of them.")] = 500
    n: Annotated[int, arg(help="Samples that are scored against as many real images (half of the data at most); 0 leaves that out.")] = 10_000

    def run(self) -> None:
        """Evaluate each run, write its evaluation.json, print the figures."""
        from periplus.console import note, table
        from periplus.evaluation import evaluate, other_split, write_evaluation
        from periplus.runs import load_run

        if not self.folders:
            raise UsageError("periplus evaluate needs at least one RUN folder")
        for name in ("images", "samples"):
            if getattr(self, name) < 2:
                raise UsageError(f"--{name} is {getattr(self, name)}: at least 2 are needed")
        if self.n < 0:
            raise UsageError(f"--n is {self.n}: zero or more is needed")
        if self.likelihood_images < 0:
            raise UsageError(f"--likelihood-images is {self.likelihood_images}: zero or more is needed")
        runs: list[Run] = []
        records: list[dict[str, Any]] = []
        for folder in self.folders:
            run = load_run(folder)
            runs.append(run)
            note(f"evaluating {folder} ({run.config.model}, step {run.step})")
            options: dict[str, Any] = {"seed": self.seed, "images": self.images, "likelihood_images": self.likelihood_images, "samples": self.samples}
            record = evaluate(run, self.data_root, judged=self.n, note=note, **options)
            options["n"] = self.n
            words = ["periplus", "evaluate", str(folder), *(("--data-root", str(self.data_root)) if self.data_root else ())]
            defaults = {f.name: f.default for f in dataclasses.fields(self)}
            words += [word for name, value in options.items() if value != defaults[name] for word in (f"--{name.replace('_', '-')}", str(value))]
            records.append(write_evaluation(run, record, shlex.join(words)))
        if self.json:
            self.tell(records if len(records) > 1 else records[0])
            return
        for run, record in zip(runs, records, strict=True):
            folder = run.path
            named = {split: other_split(run) if split == "test" else split for split in record.get("splits", {"samples": None})}
            table(("measure", *named.values()), evaluation_rows(record), title=str(folder))
            for split, judged in record.get("splits", {}).items():
                for statement in judged["rate"]["statements"]:
                    print(f"{named[split]}: {statement}")
            if record.get("scores"):
                told = record["reference"]
                title = f"{folder}: {told['samples']:,} samples, features of {told['extractor']['name']} (SHA-256 {told['extractor']['sha256'][:12]})"
                table(("score", "samples", "without EMA", "real images (floor)"), score_rows(record), title=title)


#: How scores are called in print.
SCORE_NAMES = {
    "frechet": "Fréchet distance",
    "frechet_random": "Fréchet distance, random features",
    "kernel": "kernel distance",
    "two_sample": "told apart by a classifier",
    "classes": "distance of class shares",
    "smallest_class": "smallest class",
    "copying": "copying, z (below -3: copies)",
    "neighbour_ratio": "nearest / held-out",
}


def score_rows(record: dict[str, Any]) -> list[tuple[str, ...]]:
    """A run's scores as rows for print: value (95 % interval), without averaged weights, and what real images get (lowest to highest block)."""

    def value(found: dict[str, Any] | None) -> str:
        if found is None:
            return "-"
        bounds = f" ({found['low']:.3g} to {found['high']:.3g})" if found.get("low") is not None else ""
        return f"{found['value']:.3g}{bounds}"

    def floor(found: dict[str, Any]) -> str:
        floors = found.get("floors")
        return "-" if not floors else f"{floors[0]:.3g}" if len(floors) == 1 else f"{found['floor']:.3g} ({min(floors):.3g} to {max(floors):.3g})"

    plain = record.get("without_ema") or {}
    rows: list[tuple[str, ...]] = [
        (SCORE_NAMES.get(name, name), value(found), value(plain.get(name)), floor(found)) for name, found in record["scores"].items()
    ]
    limit = record["scores"]["frechet"].get("at_infinity")
    if limit:
        rows.insert(1, ("  at infinitely many samples", value(limit), "-", "0"))
    return rows


def evaluation_rows(record: dict[str, Any]) -> list[tuple[str, ...]]:
    """A run's evaluation as rows for print."""

    def value(found: dict[str, float] | None) -> str:
        return "-" if found is None else f"{found['value']:.3f} ± {found['standard_error']:.3f}"

    splits = record.get("splits")
    if splits is None:
        return [
            ("collapsed", "yes" if record["collapsed"] else "no"),
            ("smallest class", "-" if record["smallest_share"] is None else f"{100 * record['smallest_share']:.1f} %"),
            ("spread, of the data's", f"{record['spread']:.3f}"),
        ]
    judged = list(splits.values())
    rows = [
        ("images", *(f"{s['examples']:,}" for s in judged)),
        ("distortion / nats", *(value(s["distortion"]) for s in judged)),
        ("least possible distortion / nats", *(f"{s['entropy_floor']:.3f}" if "entropy_floor" in s else "-" for s in judged)),
        ("best constant image / nats", *(f"{s['constant_distortion']:.3f}" for s in judged)),
        (f"rate {judged[0]['rate']['formula']['name']} / nats", *(value(s["rate"]["formula"]) for s in judged)),
        ("I(x;z) within / nats", *(f"{s['rate']['interval'][0]:.3f} to {s['rate']['interval'][1]:.3f}" for s in judged)),
        ("ln N / nats", *(f"{s['rate']['ln_n']:.3f}" for s in judged)),
        ("marginal rate / nats", *(value(s["marginal_rate"]) for s in judged)),
        ("KL[q(z) || p(z)] / nats", *(value(s["kl_to_prior"]) for s in judged)),
        ("D + R, bound on -ln p(x) / nats", *(value(s["bound"]) for s in judged)),
        ("active units", *(str(s["active_units"]) for s in judged)),
    ]
    if record["log_likelihood"] is not None:
        told = record["log_likelihood"]
        rows.append((f"ln p(x), {told['samples']} samples, {told['examples']} images / nats", *("-" for _ in judged[1:]), value(told)))
    return [row for row in rows if set(row[1:]) != {"-"}]


# ---- data -----------------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class DataList(Common):
    """List the named data sets and where they are."""

    root: Annotated[Path | None, arg(help="Look here first; else $PERIPLUS_DATA, else the cache.")] = None

    def run(self) -> None:
        """Print the table."""
        from periplus.console import table
        from periplus.data import list_sources

        infos = list_sources(self.root)
        records: list[dict[str, Any]] = [
            {
                "name": i.source.name,
                "splits": dict(i.source.splits),
                "shape": i.source.shape,
                "licence": i.source.licence,
                "made_from": i.source.made_from,
                "found": "embedded" if i.embedded else str(i.found) if i.found else None,
            }
            for i in infos
        ]
        if self.json:
            self.tell(records)
            return
        rows = [(r["name"], ", ".join(f"{k} {v:,}" for k, v in r["splits"].items()), "x".join(map(str, r["shape"])), where(r)) for r in records]
        table(("name", "images", "C x H x W", "where"), rows)


def where(record: dict[str, Any]) -> str:
    """Where a set is, and what it is made from."""
    made = f" (made from {record['made_from']})" if record["made_from"] else ""
    return (record["found"] or "not here: fetch") + made


@dataclass(frozen=True, kw_only=True)
class DataFetch(Common):
    """Download a named data set, checked against its published SHA-256; a broken download is continued."""

    name: Annotated[Positional[str], arg(metavar="NAME", help="As in 'periplus data list'.")]
    root: Annotated[Path | None, arg(help="The data folder to put it in; by default the cache.")] = None

    def run(self) -> None:
        """Fetch and say what is where."""
        from periplus.console import note
        from periplus.data import fetch
        from periplus.data.sources import terminal_progress

        def plain(name: str, done: int, size: int) -> None:
            if done == size:
                note(f"{name}: {size:,} bytes")

        paths = fetch(self.name, self.root, terminal_progress() or plain)
        text = "\n".join(map(str, paths)) or f"{self.name} is embedded: nothing to fetch"
        self.tell({"name": self.name, "files": [str(p) for p in paths]}, text)


@dataclass(frozen=True, kw_only=True)
class DataVerify(Common):
    """Check the files of a named data set against their published SHA-256. Exit code 3 unless all are there and whole."""

    name: Annotated[Positional[str], arg(metavar="NAME", help="As in 'periplus data list'.")]
    root: Annotated[Path | None, arg(help="Look here first; else $PERIPLUS_DATA, else the cache.")] = None

    def run(self) -> None:
        """Print a line per file."""
        from periplus.data import verify
        from periplus.errors import DataError

        statuses = verify(self.name, self.root)
        lines = "\n".join(f"{s.status:<8} {s.path}" for s in statuses) or f"ok       {self.name} (embedded)"
        self.tell([dataclasses.asdict(s) for s in statuses], lines)
        if bad := [s for s in statuses if s.status != "ok"]:
            raise DataError(f"{bad[0].path} is {bad[0].status}: 'periplus data fetch {self.name}' gets a good one")


def data_options(argv: Sequence[str]) -> type[Common]:
    """The options of `periplus data WORD`."""
    words: dict[str, type[Common]] = {"list": DataList, "fetch": DataFetch, "verify": DataVerify}
    if argv[0] not in words:
        raise UsageError(f"unknown word 'data {argv[0]}'{nearest(argv[0], words)}: known are {', '.join(words)}")
    return words[argv[0]]


# ---- doctor ---------------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Doctor(Common):
    """Say what this machine has, what a run would use of it, and what is missing."""

    def run(self) -> None:
        """Print the findings; exit code 0 whatever they are."""
        from periplus.console import table
        from periplus.doctor import examine

        findings = examine()
        if self.json:
            self.tell([f._asdict() for f in findings])
            return
        table(("", "what", "found"), [("ok" if f.ok else "!!", f.what, f.found) for f in findings])


# ---- report and study -----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Report(Common):
    """Write report.pdf and report.html of one or more runs: settings, curves, samples, and the measures of their kind of model."""

    folders: Annotated[Positional[tuple[Path, ...]], arg(metavar="RUN", help="Run folders.")]
    out: Annotated[Path | None, arg(help="The folder to write to. Default: the run's own folder, for one run.")] = None
    data_root: Annotated[Path | None, arg(help="Where named sets are looked for first.")] = None

    def run(self) -> None:
        """Write both and say where."""
        from periplus.study.reporting import report_runs

        if not self.folders:
            raise UsageError("periplus report needs at least one RUN folder")
        if self.out is None and len(self.folders) > 1:
            raise UsageError("give --out DIR for a report of several runs")
        files = report_runs(self.folders, self.out or self.folders[0], self.data_root)
        self.tell({"files": [str(f) for f in files]}, "\n".join(map(str, files)))


@dataclass(frozen=True, kw_only=True)
class Study(Common):
    """The whole sheet, end to end: trains, measures, and writes report.pdf, report.html, results.json and an archive."""

    data: Annotated[str | None, arg(help="A named set or a path; by default that of the preset.")] = None
    out: Annotated[Path, arg(help="The folder to make.")] = Path("study")
    preset: Annotated[
        Literal["digits", "quick", "sheet"],
        arg(help="digits: minutes on two cores. quick: MNIST. sheet: MNIST with the sheet's settings in full."),
    ] = "digits"
    only: Annotated[tuple[str, ...], arg(help="Chapters to make, such as 2a 2b or 2a,2b. By default all.")] = ()
    seeds: Annotated[int | None, arg(help="Runs of each model; by default that of the preset (3).")] = None
    epochs: Annotated[int | None, arg(help="Passes over the data; by default that of the preset.")] = None
    resume: Annotated[bool, arg(help="Go on with the study in --out; what is done is kept; names, seeds and the like as well.")] = False
    archive: Annotated[Literal["zip", "tar.gz"] | None, arg(help="Bundle report, figures, results and configurations.")] = None
    weights: Annotated[bool, arg(help="Put the weights of all runs into the archive as well.")] = False
    author: Annotated[tuple[str, ...], arg(help="Authors, for the title page.")] = ()
    collaborators: Annotated[tuple[str, ...], arg(help="Collaborators, for the title page.")] = ()
    hours: Annotated[float | None, arg(help="Hours spent, for the title page.")] = None
    image_size: Annotated[int | None, arg(help="Resize images to squares of so many pixels.")] = None
    data_root: Annotated[Path | None, arg(help="Where named sets are looked for first.")] = None
    workers: Annotated[int | None, arg(help="Runs trained at once, one thread each; by default the number of cores.")] = None

    def run(self) -> None:
        """Make the study and say where it is."""
        from periplus.study import Settings, make_study

        names = {f.name for f in dataclasses.fields(Settings)}
        files = make_study(Settings(**{k: v for k, v in vars(self).items() if k in names}), command=shlex.join(["periplus", *sys.argv[1:]]))
        self.tell({"files": [str(f) for f in files]}, "\n".join(map(str, files)))
