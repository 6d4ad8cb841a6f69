"""Named sets: downloads against a local server that breaks in every way we know of, and digests of what is on disk."""

import hashlib
import http.server
import os
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from periplus.data import fetch, list_sources, load_data, sources, verify
from periplus.data.sources import Recipe, Source, SourceFile
from periplus.errors import DataError

REAL = Path(os.environ.get("PERIPLUS_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")
BODY = np.random.default_rng(0).integers(0, 256, 300_000, dtype=np.uint8).tobytes()
OTHER = BODY[:1000] + b"?" + BODY[1001:]


@dataclass
class Server:
    """A web server on 127.0.0.1 that serves `files` by path, and misbehaves as told."""

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    cuts: list[int] = field(default_factory=list)  # for each request in turn, cut the connection after that many bytes
    ranges: bool = True
    announce: bool = True  # send Content-Length
    asked: list[tuple[str, str | None]] = field(default_factory=list)
    lie: bool = False  # answer a range request with another range


@pytest.fixture
def server() -> Iterator[Server]:
    state = Server()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            wanted = self.headers.get("Range")
            state.asked.append((self.path, wanted))
            body = state.files.get(self.path)
            if body is None:
                return self.send_error(404)
            start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and state.ranges else 0
            if start >= len(body):
                return self.send_error(416)
            self.send_response(206 if wanted and state.ranges else 200)
            if wanted and state.ranges:
                start += 7 * state.lie
                self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
            if state.announce:
                self.send_header("Content-Length", str(len(body) - start))
            self.end_headers()
            cut = state.cuts.pop(0) if state.cuts else len(body)
            self.wfile.write(body[start : start + cut])
            if cut < len(body) - start:
                self.wfile.flush()
                self.connection.shutdown(socket.SHUT_RDWR)

        def log_message(self, *_: object) -> None:
            pass

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{httpd.server_address[1]}"
    threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield state
    httpd.shutdown()
    httpd.server_close()


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No real data, no real cache, and no proxy between us and 127.0.0.1."""
    monkeypatch.delenv("PERIPLUS_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def toy(server: Server, monkeypatch: pytest.MonkeyPatch) -> Source:
    """A set of one file, `toy.bin`, whose only mirror is the local server."""
    file = SourceFile("toy.bin", len(BODY), hashlib.sha256(BODY).hexdigest(), ("train",))
    toy = Source("toy", (("train", 1),), (1, 1, 1), (), "none", "none", (file,), (server.url + "/good/",))
    monkeypatch.setitem(sources.SOURCES, "toy", toy)
    server.files = {"/good/toy.bin": BODY, "/bad/toy.bin": OTHER, "/long/toy.bin": BODY + b"more", "/short/toy.bin": BODY[:-1]}
    return toy


def dead_url() -> str:
    """An address where nothing listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}/"


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file() and path.name not in (".lock", "toy.bin"))


def test_fetch_downloads_once_into_the_cache_and_reports_progress(toy: Source, server: Server, tmp_path: Path):
    seen: list[tuple[str, int, int]] = []
    (path,) = fetch("toy", progress=lambda *step: seen.append(step))
    assert path == tmp_path / "cache" / "periplus" / "toy" / "toy.bin" and path.read_bytes() == BODY
    assert seen[-1] == ("toy.bin", len(BODY), len(BODY)) and [step[1] for step in seen] == sorted(step[1] for step in seen)
    assert fetch("toy") == [path] and len(server.asked) == 1 and leftovers(tmp_path) == []


def test_fetch_into_root_wins_over_the_cache(toy: Source, tmp_path: Path):
    assert fetch("toy", root=tmp_path / "here") == [tmp_path / "here" / "toy" / "toy.bin"]
    assert not (tmp_path / "cache").exists()


def test_a_cut_download_is_resumed_where_it_stopped(toy: Source, server: Server, tmp_path: Path):
    server.cuts = [100_000, 50_000]
    (path,) = fetch("toy", root=tmp_path)
    assert path.read_bytes() == BODY
    assert [wanted for _, wanted in server.asked] == [None, "bytes=100000-", "bytes=150000-"]


def test_a_download_cut_for_good_is_resumed_by_the_next_call_and_by_another_mirror(toy: Source, server: Server, tmp_path: Path):
    server.cuts = [100_000, 0]
    with pytest.raises(DataError, match="connection closed after 100,000 of 300,000 bytes"):
        fetch("toy", root=tmp_path)
    assert leftovers(tmp_path) == [".toy.bin.part"] and not (tmp_path / "toy" / "toy.bin").exists()
    server.asked.clear()
    server.files["/second/toy.bin"] = BODY
    fetch("toy", root=tmp_path, mirrors=[dead_url(), server.url + "/second"])
    assert server.asked == [("/second/toy.bin", "bytes=100000-")] and leftovers(tmp_path) == []


@pytest.mark.parametrize("announce", [True, False])
def test_a_server_that_ignores_ranges_starts_over(toy: Source, server: Server, tmp_path: Path, announce: bool):
    server.ranges, server.announce, server.cuts = False, announce, [100_000]
    assert fetch("toy", root=tmp_path)[0].read_bytes() == BODY
    assert [wanted for _, wanted in server.asked] == [None, "bytes=100000-"]


def test_a_part_file_of_other_bytes_is_thrown_away(toy: Source, server: Server, tmp_path: Path):
    (tmp_path / "toy").mkdir()
    for beginning in (b"x" * 1000, OTHER, BODY + b"beyond"):
        (tmp_path / "toy" / ".toy.bin.part").write_bytes(beginning)
        (path,) = fetch("toy", root=tmp_path)
        assert path.read_bytes() == BODY and leftovers(tmp_path) == []
        path.unlink()


def test_a_lying_range_is_not_pasted_in(toy: Source, server: Server, tmp_path: Path):
    server.lie, server.cuts = True, [100_000]
    assert fetch("toy", root=tmp_path)[0].read_bytes() == BODY
    assert [wanted for _, wanted in server.asked] == [None, "bytes=100000-", None]


@pytest.mark.parametrize(
    ("first", "reason"), [("bad", "published SHA-256"), ("long", "300,004 bytes"), ("short", "299,999 bytes"), ("none", "HTTP 404")]
)
def test_a_wrong_first_mirror_gives_way_to_the_second(toy: Source, server: Server, tmp_path: Path, first: str, reason: str):
    assert fetch("toy", root=tmp_path, mirrors=[f"{server.url}/{first}/", f"{server.url}/good/"])[0].read_bytes() == BODY
    assert [path for path, _ in server.asked] == [f"/{first}/toy.bin", "/good/toy.bin"] and leftovers(tmp_path) == []
    with pytest.raises(DataError, match=reason):
        fetch("toy", root=tmp_path / "again", mirrors=[f"{server.url}/{first}/"])


def test_a_body_without_end_stops_at_the_declared_size(toy: Source, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    server.announce, server.files["/long/toy.bin"] = False, BODY + bytes(20 * 2**20)
    lengths: list[int] = []
    real = sources._from_mirror

    def watched(url: str, part: Path, *rest: object) -> None:
        try:
            real(url, part, *rest)  # type: ignore[arg-type]
        finally:
            lengths.append(part.stat().st_size if part.exists() else 0)

    seen: list[int] = []
    monkeypatch.setattr(sources, "_from_mirror", watched)
    with pytest.raises(DataError, match="sends more than the 300,000 bytes"):
        fetch("toy", root=tmp_path, mirrors=[f"{server.url}/long/"], progress=lambda name, done, total: seen.append(done))
    assert max(seen) <= len(BODY) and lengths == [0] and leftovers(tmp_path) == []


def test_a_silent_mirror_is_given_up(toy: Source, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sources, "TIMEOUT", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        mirrors = [f"http://127.0.0.1:{silent.getsockname()[1]}/", f"{server.url}/good/"]
        assert fetch("toy", root=tmp_path, mirrors=mirrors)[0].read_bytes() == BODY
        began = time.monotonic()
        with pytest.raises(DataError, match="no answer in 0.2 s"):
            fetch("toy", root=tmp_path / "b", mirrors=mirrors[:1])
        assert time.monotonic() - began < 3


def test_offline_the_message_tells_what_to_do(toy: Source, tmp_path: Path):
    dead = [dead_url(), "ftp://example.org/"]
    with pytest.raises(DataError) as caught:
        fetch("toy", root=tmp_path, mirrors=dead)
    message = str(caught.value)
    assert "\n" not in message and message.startswith("toy: cannot download toy.bin (")
    for words in (*dead, "refused", "not an http", "300,000 bytes", hashlib.sha256(BODY).hexdigest(), "set PERIPLUS_DATA", "toy/toy.bin"):
        assert words in message
    assert str(tmp_path / "toy" / "toy.bin") in message


def test_a_folder_that_cannot_be_written_is_named(toy: Source, tmp_path: Path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match="cannot be written") as caught:
        fetch("toy", root=tmp_path / "file")
    assert str(tmp_path / "file" / "toy" / "toy.bin") in str(caught.value)


def test_eight_fetches_at_once_download_once(toy: Source, server: Server, tmp_path: Path):
    results: list[bytes] = []
    threads = [threading.Thread(target=lambda: results.append(fetch("toy", root=tmp_path)[0].read_bytes())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [BODY] * 8 and len(server.asked) == 1 and leftovers(tmp_path) == []


def test_without_locks_part_files_are_not_shared(toy: Source, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sources, "fcntl", None)
    test_eight = [threading.Thread(target=fetch, args=("toy", tmp_path)) for _ in range(4)]
    for thread in test_eight:
        thread.start()
    for thread in test_eight:
        thread.join()
    assert (tmp_path / "toy" / "toy.bin").read_bytes() == BODY and leftovers(tmp_path) == []


def test_verify_and_fetch_repair_a_damaged_file(toy: Source, tmp_path: Path):
    assert [status.status for status in verify("toy", tmp_path)] == ["missing"]
    (path,) = fetch("toy", root=tmp_path)
    assert [(status.path, status.status) for status in verify("toy", tmp_path)] == [(path, "ok")]
    path.write_bytes(OTHER)
    (status,) = verify("toy", tmp_path)
    assert status.status == "damaged" and status.actual == hashlib.sha256(OTHER).hexdigest() != status.expected
    with pytest.raises(DataError, match="delete it and load again"):
        sources.files_of_split("toy", "train", tmp_path)
    fetch("toy", root=tmp_path)
    assert verify("toy", tmp_path)[0].status == "ok" and verify("digits") == []


def test_folders_are_searched_in_order(toy: Source, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    places = [tmp_path / "root", tmp_path / "env", tmp_path / "cache" / "periplus"]
    monkeypatch.setenv("PERIPLUS_DATA", str(places[1]))
    for place in reversed(places):
        (place / "toy").mkdir(parents=True)
        (place / "toy" / "toy.bin").write_bytes(BODY)
        assert sources.files_of_split("toy", "train", places[0]) == [place / "toy" / "toy.bin"]
    assert server.asked == []


def test_what_the_environment_lacks_goes_to_the_cache(toy: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PERIPLUS_DATA", str(tmp_path / "read-only"))
    assert sources.files_of_split("toy", "train") == [tmp_path / "cache" / "periplus" / "toy" / "toy.bin"]
    assert not (tmp_path / "read-only").exists()


def test_list_sources_tells_what_is_there(toy: Source, tmp_path: Path):
    before = {info.source.name: info for info in list_sources(tmp_path)}
    assert list(before)[:4] == ["digits", "mnist", "fashion-mnist", "binarized-mnist"]
    assert before["digits"].embedded and before["toy"].found is None
    fetch("toy", root=tmp_path)
    assert {info.source.name: info.found for info in list_sources(tmp_path)}["toy"] == tmp_path / "toy"
    for info in before.values():
        assert info.source.licence and info.source.citation and info.source.splits


def test_a_set_made_from_another_is_where_that_one_is(toy: Source, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sources.SOURCES, "made", Source("made", (("train", 7),), (3, 1, 1), (), "as toy", "none", made_from="toy"))
    assert {info.source.name: (info.found, info.embedded) for info in list_sources(tmp_path)}["made"] == (None, False)
    assert [status.status for status in verify("made", tmp_path)] == ["missing"]
    assert fetch("made", root=tmp_path) == [tmp_path / "toy" / "toy.bin"] == sources.files_of_split("made", "train", tmp_path)
    assert {info.source.name: info.found for info in list_sources(tmp_path)}["made"] == tmp_path / "toy"
    assert verify("made", tmp_path) == verify("toy", tmp_path)
    with pytest.raises(DataError, match="made: unknown split 'valid'; it has train"):
        sources.files_of_split("made", "valid", tmp_path)


def test_a_recipe_makes_the_packed_file_from_text_or_matlab(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from scipy.io import savemat

    bits = {split: np.random.default_rng(n).integers(0, 2, (n + 2, 784), dtype=np.uint8) for n, split in enumerate(("train", "valid", "test"))}
    arrays = {split: np.packbits(rows, axis=1) for split, rows in bits.items()}
    sources._write_npz(tmp_path / "expected.npz", arrays)
    made = sources.digest(tmp_path / "expected.npz")
    recipes = []
    for reader in ("mat", "amat"):
        files = []
        for split, rows in bits.items():
            name = f"binarized_mnist_{split}.amat"
            if reader == "amat":
                body = "".join(" ".join(map(str, row)) + "\n" for row in rows).encode()
            else:
                savemat(tmp_path / "x.mat", {"X": rows})
                body = (tmp_path / "x.mat").read_bytes()
            server.files[f"/{reader}/{name}"] = body
            files.append(SourceFile(name, len(body), hashlib.sha256(body).hexdigest(), (split,)))
        recipes.append(Recipe(f"{server.url}/{reader}/", tuple(files), reader, made))  # type: ignore[arg-type]
    broken = replace(recipes[0], base=dead_url())
    for number, chosen in enumerate(([recipes[0]], [recipes[1]], [broken, recipes[1]])):
        monkeypatch.setitem(sources.SOURCES, "binarized-mnist", replace(sources.BINARIZED_MNIST, recipes=tuple(chosen)))
        root = tmp_path / str(number)
        data = load_data("binarized-mnist", "valid", root=root)
        assert np.array_equal(data.images.flatten(1).numpy(), bits["valid"] * 255)
        assert [path.name for path in (root / "binarized-mnist").iterdir() if path.name != ".lock"] == ["binarized_mnist.npz"]
    monkeypatch.setitem(sources.SOURCES, "binarized-mnist", replace(sources.BINARIZED_MNIST, recipes=(replace(recipes[0], makes="0" * 64),)))
    with pytest.raises(DataError, match="what is made from it is not binarized_mnist.npz"):
        fetch("binarized-mnist", root=tmp_path / "wrong")


@pytest.fixture
def real() -> Path:
    if not (REAL / "binarized-mnist" / "binarized_mnist.npz").is_file():
        pytest.skip(f"no real data at {REAL}: set PERIPLUS_DATA to a folder that has mnist/ and binarized-mnist/")
    return REAL


def test_the_real_files_have_the_digests_that_we_publish(real: Path):
    for name in ("mnist", "fashion-mnist", "binarized-mnist"):
        for status, file in zip(verify(name, real), sources.SOURCES[name].files, strict=True):
            assert (status.status, status.path.stat().st_size) == ("ok", file.size)


def test_the_real_packed_set_comes_out_of_its_recipe(real: Path, tmp_path: Path):
    """The published text of the test split and what a recipe makes have the digests that `sources` expects."""
    with np.load(real / "binarized-mnist" / "binarized_mnist.npz", allow_pickle=False) as archive:
        arrays = {split: archive[split] for split in ("train", "valid", "test")}
    sources._write_npz(tmp_path / "made.npz", arrays)
    assert sources.digest(tmp_path / "made.npz") == sources.BINARIZED_MNIST.recipes[0].makes
    text = np.full((10000, 2 * 784), ord(" "), np.uint8)
    text[:, ::2] = np.unpackbits(arrays["test"], axis=1) + ord("0")
    text[:, -1] = ord("\n")
    (tmp_path / "test.amat").write_bytes(text.tobytes())
    file = sources.BINARIZED_MNIST.recipes[1].files[2]
    assert sources.digest(tmp_path / "test.amat") == file.sha256 and text.size == file.size
    assert np.array_equal(np.packbits(sources._read_amat(tmp_path / "test.amat"), axis=1), arrays["test"])


def test_a_named_set_is_downloaded_when_missing_and_only_the_split_asked_for(
    real: Path, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    names = ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz")
    server.files = {f"/{name}": (real / "mnist" / name).read_bytes() for name in names}
    monkeypatch.setitem(sources.SOURCES, "mnist", replace(sources.MNIST, mirrors=(dead_url(), server.url)))
    data = load_data("mnist", "test", root=tmp_path)
    assert torch.equal(data.images, load_data("mnist", "test", root=real).images)
    assert sorted(path for path, _ in server.asked) == [f"/{name}" for name in names]
