"""The archive of a study: report, figures, results and configurations with a manifest; weights when asked for. The bytes follow from the contents."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tarfile
import zipfile
from pathlib import Path

from periplus.errors import UsageError
from periplus.files import write_atomically
from periplus.runs import load_run

PATTERNS = (
    "report.pdf",
    "report.html",
    "results.json",
    "figures/*",
    "stages/*.json",
    *(f"{place}/*/{name}" for place in ("runs", "variants") for name in ("config.toml", "env.json", "metrics.jsonl", "timing.jsonl")),
    "sweeps/*/*.json",
    "sweeps/*/sweep.csv",
    "sweeps/*/curve.svg",
    "sweeps/*/cells/*/config.toml",
    "sweeps/*/cells/*/env.json",
    "sweeps/*/cells/*/evaluation.json",
    "sweeps/*/cells/*/metrics.jsonl",
)
#: The folders of runs, whose newest checkpoints are the weights.
RUNS = ("runs/*", "variants/*", "sweeps/*/cells/*")
EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest time a zip can hold: archives of equal contents are equal


def write_archive(folder: Path, form: str, weights: bool = False) -> Path:
    """Write `folder`/NAME.zip or NAME.tar.gz, NAME being the folder's own. Raises UsageError for another form, RunError for broken weights."""
    patterns = (*PATTERNS, *(newest_checkpoints(folder) if weights else ()))
    files = {str(p.relative_to(folder)): p.read_bytes() for pattern in patterns for p in sorted(folder.glob(pattern)) if p.is_file()}
    manifest = {name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()} for name, content in files.items()}
    files["MANIFEST.json"] = (json.dumps(manifest, indent=1) + "\n").encode()
    name = folder.resolve().name
    packers = {"zip": zip_bytes, "tar.gz": tar_bytes}
    if form not in packers:
        raise UsageError(f"--archive is '{form}': use zip or tar.gz")
    return write_atomically(folder / f"{name}.{form}", packers[form](name, files))


def newest_checkpoints(folder: Path) -> list[str]:
    """Patterns of the newest good checkpoint of every run below a study's folder."""
    runs = [path.parent for place in RUNS for path in sorted(folder.glob(f"{place}/config.toml"))]
    return [f"{load_run(run).checkpoint.path.relative_to(folder)}/*" for run in runs]


def zip_bytes(name: str, files: dict[str, bytes]) -> bytes:
    """The files under one folder, as a zip."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for path, content in files.items():
            archive.writestr(zipfile.ZipInfo(f"{name}/{path}", EPOCH), content, zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


def tar_bytes(name: str, files: dict[str, bytes]) -> bytes:
    """The files under one folder, as a gzip-compressed tar."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for path, content in files.items():
            entry = tarfile.TarInfo(f"{name}/{path}")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return gzip.compress(buffer.getvalue(), mtime=0)
