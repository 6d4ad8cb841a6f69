"""The explorer's server, real, over sockets: what it answers is what the library computes, and hostile requests cost it nothing."""

from __future__ import annotations

import base64
import contextlib
import http.client
import io
import json
import re
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import periplus
from periplus import AdversarialConfig, AutoencoderConfig, UsageError, cli
from periplus.explorer import export, jobs, safety
from periplus.explorer.terrain import Terrain, figure_size, mean_metric, packed, principal_axes, unpacked

uvicorn = pytest.importorskip("uvicorn", reason="the explorer needs the extra 'web'")
pytest.importorskip("starlette", reason="the explorer needs the extra 'web'")

MIB = 2**20


@pytest.fixture(scope="session")
def vae(tmp_path_factory: pytest.TempPathFactory, digits: periplus.ImageData) -> Path:
    """A small autoencoder of digits, three dimensions."""
    folder = tmp_path_factory.mktemp("explorer") / "vae"
    config = AutoencoderConfig("vae", latent_dim=3, hidden=16, depth=1, beta=0.1, max_steps=60, batch_size=64, precision="float32")
    periplus.train(config, digits, folder)
    return folder


@pytest.fixture(scope="session")
def gan(tmp_path_factory: pytest.TempPathFactory, digits: periplus.ImageData) -> Path:
    """A convolutional generator of digits with batch norm, hardly trained."""
    folder = tmp_path_factory.mktemp("explorer") / "gan"
    periplus.train(AdversarialConfig("gan", architecture="conv", latent_dim=4, max_steps=3, batch_size=32, precision="float32"), digits, folder)
    return folder


class Server:
    """`periplus explore` in a process of its own."""

    def __init__(self, *words: object) -> None:
        command = [sys.executable, "-m", "periplus", "explore", *map(str, words), "--port", "0", "--json"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        told = "".join(iter(lambda: self.process.stdout.readline(), "}\n")) + "}"  # type: ignore[union-attr]
        self.address = json.loads(told)["address"]
        self.port = int(re.search(r":(\d+)/", self.address)[1])  # type: ignore[index]

    def ask(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None, host: str | None = None) -> Answer:
        return ask(self.port, method, path, body, headers, host)

    def peak(self) -> int:
        """The most memory that it ever had, in bytes; 0 where the system does not tell."""
        if not Path("/proc/self/status").exists():
            return 0
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        return 1024 * int(re.search(r"VmHWM:\s+(\d+)", text)[1])  # type: ignore[index]

    def follow(self, job: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """The frames of a job, and how it ended."""
        frames, after = [], -1
        for _ in range(600):
            record = self.ask("GET", f"/api/jobs/{job}?after={after}").json
            after = record["version"]
            if record["frame"]:
                frames.append(record["frame"])
            if record["state"] in ("done", "failed", "stopped"):
                return frames, record
        raise AssertionError("the job did not end")


class Answer:
    """Status, headers and body."""

    def __init__(self, response: http.client.HTTPResponse) -> None:
        self.status, self.headers, self.body = response.status, {k.lower(): v for k, v in response.getheaders()}, response.read()

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def ask(port: int, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None, host: str | None = None) -> Answer:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    headers = dict(headers or {})
    if isinstance(body, dict | list):
        body = json.dumps(body)
        headers.setdefault("Content-Type", "application/json")
    connection.putrequest(method, path, skip_host=True)
    connection.putheader("Host", host or f"127.0.0.1:{port}")
    content = body.encode() if isinstance(body, str) else body
    if content is not None:
        connection.putheader("Content-Length", str(len(content)))
    for name, value in headers.items():
        connection.putheader(name, value)
    connection.endheaders()
    if content is not None:
        with contextlib.suppress(OSError):  # refused while it was being sent: the answer is there
            connection.send(content)
    answer = Answer(connection.getresponse())
    connection.close()
    return answer


def form(content: bytes, name: str = "file", filename: str = "x.png", **fields: str) -> tuple[bytes, dict[str, str]]:
    """A multipart form with one file."""
    mark = "----------periplus"
    parts = [f'--{mark}\r\nContent-Disposition: form-data; name="{key}"\r\n\r\n{value}\r\n'.encode() for key, value in fields.items()]
    head = f'--{mark}\r\nContent-Disposition: form-data; name="{name}"; filename="{filename}"\r\nContent-Type: image/png\r\n\r\n'
    body = b"".join([*parts, head.encode(), content, f"\r\n--{mark}--\r\n".encode()])
    return body, {"Content-Type": f"multipart/form-data; boundary={mark}"}


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def server(vae: Path, gan: Path) -> Iterator[Server]:
    server = Server(vae, gan)
    yield server
    server.process.terminate()
    assert server.process.wait(20) == 130
    assert "Traceback" not in server.process.stderr.read()  # type: ignore[union-attr]


# ---- what it answers is what the library computes ------------------------------------------------------------------------------------------


def test_the_page_is_served_with_a_strict_policy_and_no_inline_script(server: Server) -> None:
    answer = server.ask("GET", "/")
    policy = answer.headers["content-security-policy"]
    assert answer.status == 200 and "default-src 'none'" in policy and "script-src 'self'" in policy and "unsafe" not in policy
    html = answer.body.decode()
    assert not re.search(r"<script(?![^>]*src=)|<style|\son\w+=|style=|https?://", html), "nothing inline, nothing from elsewhere"
    for name in re.findall(r'(?:src|href)="([^"#:]+)"', html):
        part = server.ask("GET", f"/{name}")
        assert part.status == 200 and part.headers["x-content-type-options"] == "nosniff"
        assert not re.search(rb"https?://(?!www\.w3\.org/2000/svg)|\beval\(|innerHTML", part.body), name


def test_runs_say_what_they_are_and_no_paths(server: Server, vae: Path) -> None:
    answer = server.ask("GET", "/api/runs")
    first, second = answer.json["runs"]
    assert (first["model"], first["latent_dim"], first["shape"], first["autoencoder"]) == ("vae", 3, [1, 8, 8], True)
    assert (second["model"], second["autoencoder"]) == ("gan", False) and first["images"] == 297
    assert str(vae.parent) not in answer.body.decode()


def test_decoding_is_the_runs_own_to_half_a_level(server: Server, vae: Path) -> None:
    run = periplus.load_run(vae)
    codes = run.sample_codes(5)
    found = server.ask("POST", "/api/decode", {"codes": codes.tolist()}).json["images"]
    shown = torch.stack([unpacked(image, (1, 8, 8)) for image in found]).float() / 255
    assert float((shown - run.decode(codes)).abs().max()) <= 0.51 / 255
    sampled = server.ask("GET", "/api/samples?count=7&seed=3").json
    assert sampled["images"] == packed(run.decode(torch.tensor(sampled["codes"]))) and len(sampled["codes"]) == 7


def test_the_gallery_is_the_held_out_images_class_by_class(server: Server) -> None:
    data = periplus.load_data("digits", "test")
    found = server.ask("GET", "/api/images?first=1&count=4&label=3").json
    assert found["labels"] == ["3"] * 4 and found["total"] == int((data.labels == 3).sum())
    assert found["images"] == packed(data.images[found["index"]])


def test_an_inversion_is_that_of_the_library_and_is_watched_on_the_way(server: Server, vae: Path) -> None:
    begun = server.ask("POST", "/api/invert", {"index": 4}).json
    data = periplus.load_data("digits", "test")
    assert begun["image"] == packed(data.images[4:5])[0]
    frames, ended = server.follow(begun["job"])
    assert ended["state"] == "done" and frames and frames[0]["kinds"] == ["unfinished"] * 17  # 16 and the encoder's guess
    assert min(frames[-1]["errors"]) <= min(frames[0]["errors"]) * (1 + 1e-6)
    result, run = ended["result"], periplus.load_run(vae)
    from periplus.locating import Search, locate, pick

    truth = locate(run, pick(data, [4]), Search())
    assert result["errors"] == pytest.approx(truth.all_error[0].tolist(), rel=1e-4)
    assert min(result["errors"]) == pytest.approx(float(truth.error[0]), rel=1e-5)
    away = (run.decode(torch.tensor(result["minima"][0]["code"])) - data.images[4].float() / 255).square().sum()
    assert float(away) == pytest.approx(result["minima"][0]["error"], rel=1e-3)


def test_an_upload_is_resized_and_searched(server: Server) -> None:
    pixels = np.zeros((40, 40, 3), np.uint8)
    pixels[8:32, 18:22] = 255
    content, headers = form(png(pixels))
    begun = server.ask("POST", "/api/invert", content, headers).json
    image = unpacked(begun["image"], (1, 8, 8)).float()
    assert image[0, 3, 3] > 100 and image[0, 0, 0] == 0
    turned, headers = form(png(pixels), negative="1")
    assert torch.equal(unpacked(server.ask("POST", "/api/invert", turned, headers).json["image"], (1, 8, 8)).float(), 255 - image)
    assert server.follow(begun["job"])[1]["state"] == "done"


def test_a_path_is_cheaper_than_the_line_and_dearer_than_its_bound(server: Server, vae: Path) -> None:
    data, run = periplus.load_data("digits", "test"), periplus.load_run(vae)
    mean, _ = run.encode(data.images[:2])
    asked = {"codes": mean.tolist(), "images": packed(data.images[:2])}
    frames, ended = server.follow(server.ask("POST", "/api/path", asked).json["job"])
    told = ended["result"]
    assert told["lower_bound"] <= told["cost"] <= told["straight_cost"] * (1 + 1e-6) and frames[0]["stage"] in ("rough", "done")
    truth = periplus.minimal_path(run.decode, mean[:1], mean[1:], data.images[:1], data.images[1:2])
    assert told["cost"] == pytest.approx(float(truth.cost), rel=2e-3)
    for name, whole in (("line", told["straight_cost"]), ("path", told["cost"])):
        curve = told[name]
        assert np.trapezoid(curve["price"], curve["length"]) * told["image_distance"] == pytest.approx(whole, rel=5e-3)
        assert curve["codes"][0] == pytest.approx(mean[0].tolist(), abs=1e-5) and curve["codes"][-1] == pytest.approx(mean[1].tolist(), abs=1e-5)


def test_a_ladder_of_rates_ends_at_the_reconstruction(server: Server, vae: Path) -> None:
    data, run = periplus.load_data("digits", "test"), periplus.load_run(vae)
    (told,) = server.ask("POST", "/api/reconstruct", {"image": packed(data.images[:1])[0]}).json["runs"]
    mean, log_scale = run.encode(data.images[:1])
    assert told["rate"] == pytest.approx(float(run.channel.rate(mean, log_scale)), rel=1e-5)
    rates = [step["rate"] for step in told["steps"]]
    assert rates == sorted(rates) and rates[0] == 0 and rates[-1] == pytest.approx(told["rate"]) and told["steps"][-1]["kept"] == 3
    assert told["steps"][-1]["image"] == packed(run.decode(mean))[0] and told["steps"][0]["image"] == packed(run.decode(torch.zeros(1, 3)))[0]


def test_a_job_can_be_stopped(server: Server) -> None:
    begun = server.ask("POST", "/api/invert", {"index": 7, "run": 1}).json
    server.ask("DELETE", f"/api/jobs/{begun['job']}")
    _, ended = server.follow(begun["job"])
    assert ended["state"] == "stopped" and ended["result"] is None


# ---- hostile requests ----------------------------------------------------------------------------------------------------------------------


def bomb(side: int) -> bytes:
    """A PNG of side x side grey pixels in a few kilobytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(bytes(side + 1)) for _ in range(side)) + packer.flush()
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


HOSTILE_FILES = {
    "no image": (b"just text, no image at all", 415),
    "nothing": (b"", 422),
    "a torn image": (png(np.zeros((32, 32), np.uint8))[:50], 422),
    "a bomb": (bomb(5000), 413),
    "a page": (b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>", 415),
}


@pytest.mark.parametrize("name", HOSTILE_FILES)
def test_what_is_no_small_image_is_refused(server: Server, name: str) -> None:
    content, status = HOSTILE_FILES[name]
    answer = server.ask("POST", "/api/invert", *form(content))
    assert answer.status == status and answer.json["error"] and "Traceback" not in answer.body.decode()


HOSTILE_BODIES: list[tuple[str, str, Any, dict[str, str], int]] = [
    ("POST", "/api/decode", "{" * 1000, {"Content-Type": "application/json"}, 400),
    ("POST", "/api/decode", "[" * 200_000, {"Content-Type": "application/json"}, 400),
    ("POST", "/api/decode", {"codes": [[0, 0]]}, {}, 400),
    ("POST", "/api/decode", {"codes": [[0, 0, 1e30]]}, {}, 400),
    ("POST", "/api/decode", '{"codes": [[0, 0, NaN]]}', {"Content-Type": "application/json"}, 400),
    ("POST", "/api/decode", {"codes": [[0, 0, "1"]]}, {}, 400),
    ("POST", "/api/decode", {"codes": [[0, 0, 0]] * 65}, {}, 400),
    ("POST", "/api/decode", {"codes": [[0, 0, 0]], "run": -1}, {}, 400),
    ("POST", "/api/decode", {"codes": [[0, 0, 0]], "run": 1e400}, {}, 400),
    ("POST", "/api/decode", "codes=1", {"Content-Type": "text/plain"}, 415),
    ("POST", "/api/invert", "hello", {"Content-Type": "text/plain"}, 415),
    ("POST", "/api/invert", "hello", {"Content-Type": "multipart/form-data"}, 400),
    ("POST", "/api/invert", {"index": 10**9}, {}, 400),
    ("POST", "/api/invert", {"image": "AAAA"}, {}, 400),
    ("POST", "/api/invert", {"image": "not base64 at all!"}, {}, 400),
    ("POST", "/api/path", {"codes": [[0, 0, 0]], "images": []}, {}, 400),
    ("GET", "/api/images?first=-1", None, {}, 400),
    ("GET", "/api/samples?count=100000000", None, {}, 400),
    ("GET", "/api/jobs/nobody", None, {}, 404),
    ("GET", "/../../etc/passwd", None, {}, 404),
    ("GET", "/%2e%2e/%2e%2e/etc/passwd", None, {}, 404),
    ("GET", "/..%2fapp.py", None, {}, 404),
    ("GET", "/index.html", None, {}, 404),
    ("GET", "/%00", None, {}, 404),
    ("DELETE", "/api/decode", None, {}, 405),
    ("POST", "/api/decode", {"codes": [[0, 0, 0]]}, {"Origin": "http://evil.example"}, 403),
    ("POST", "/api/decode", {"codes": [[0, 0, 0]]}, {"Sec-Fetch-Site": "cross-site"}, 403),
]


@pytest.mark.parametrize("method, path, body, headers, status", HOSTILE_BODIES)
def test_what_makes_no_sense_is_refused(server: Server, method: str, path: str, body: Any, headers: dict[str, str], status: int) -> None:
    answer = server.ask(method, path, body, headers)
    assert answer.status == status and "root:" not in answer.body.decode() and answer.json["error"]


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "", "[::1", "0.0.0.0"])
def test_other_hosts_are_not_served(server: Server, host: str) -> None:
    answer = server.ask("GET", "/", host=host or " ")
    assert answer.status in (400, 421) and b"<html" not in answer.body
    assert server.ask("GET", "/", host=f"localhost:{server.port}").status == 200


def test_a_body_that_is_too_long_is_refused_before_it_is_read(server: Server) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as line:
        line.sendall(f"POST /api/invert HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {10**12}\r\n\r\n".encode())
        assert line.recv(100).startswith(b"HTTP/1.1 413")


def test_a_chunked_body_without_end_is_cut_off(server: Server) -> None:
    before, sent = server.peak(), 0
    chunk = b"10000\r\n" + bytes(0x10000) + b"\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as line:
        line.sendall(b"POST /api/invert HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\nContent-Type: image/png\r\n\r\n")
        try:
            while sent < 64 * MIB:
                line.sendall(chunk)
                sent += len(chunk)
        except OSError:
            pass  # it hung up
        assert sent < 32 * MIB
        with contextlib.suppress(ConnectionResetError):  # the answer may be lost with the connection: that it was cut off is what counts
            assert line.recv(100).startswith(b"HTTP/1.1 413")
    assert server.peak() - before < 16 * MIB and server.ask("GET", "/").status == 200


def test_two_hundred_at_once_leave_it_alive_and_small(server: Server) -> None:
    content, headers = form(png(np.random.default_rng(0).integers(0, 255, (700, 700), np.uint8)))
    before = server.peak()
    with ThreadPoolExecutor(200) as crowd:
        waiting = [crowd.submit(status_of, server, content, headers) for _ in range(200)]
        found = [one.result() for one in waiting]
    assert set(found) <= {200, 429, 503} and 200 in found and {429, 503} & set(found), sorted(set(found))
    assert server.peak() - before < 400 * MIB
    deadline = time.monotonic() + 30
    while server.ask("POST", "/api/decode", {"codes": [[0, 0, 0]]}).status != 200:
        assert time.monotonic() < deadline


def status_of(server: Server, content: bytes, headers: dict[str, str]) -> int:
    for _ in range(20):
        try:
            return server.ask("POST", "/api/invert", content, headers).status
        except (ConnectionError, http.client.HTTPException, TimeoutError):  # the backlog was full: a client tries again
            time.sleep(0.1)
    return 503


# ---- beyond loopback -----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def guarded(vae: Path) -> Iterator[int]:
    """A server bound (so it believes) to every address, with a token; its port."""
    from periplus.explorer.app import build_app

    app = build_app([Terrain(periplus.load_run(vae))], "0.0.0.0", "the-token")
    server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
    line = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [line]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield line.getsockname()[1]
    server.should_exit = True
    thread.join(10)


def test_a_token_is_needed_beyond_loopback(guarded: int) -> None:
    assert ask(guarded, "GET", "/").status == 401 and ask(guarded, "GET", "/?token=wrong").status == 401
    assert ask(guarded, "GET", "/api/runs", headers={"Cookie": "periplus-token=wrong"}).status == 401
    welcome = ask(guarded, "GET", "/?token=the-token")
    assert welcome.status == 303 and "HttpOnly" in welcome.headers["set-cookie"] and "SameSite=Strict" in welcome.headers["set-cookie"]
    for headers in ({"Cookie": "periplus-token=the-token"}, {"Authorization": "Bearer the-token"}, {"X-Token": "the-token"}):
        assert ask(guarded, "GET", "/api/runs", headers=headers).status == 200
    assert ask(guarded, "GET", "/?token=the-token", host="evil.example").status == 421
    assert ask(guarded, "GET", "/api/runs", headers={"X-Token": "the-token"}, host="192.0.2.1:80").status == 200


@pytest.mark.parametrize(
    ("host", "local"), [("127.0.0.1", True), ("localhost", True), ("::1", True), ("0.0.0.0", False), ("::", False), ("lab", False)]
)
def test_which_hosts_are_this_machine(host: str, local: bool) -> None:
    assert safety.is_loopback(host) is local


# ---- jobs ----------------------------------------------------------------------------------------------------------------------------------


def test_a_full_desk_refuses_and_recovers() -> None:
    desk, gate = jobs.Desk(), threading.Event()
    taken = [desk.submit(lambda job: {"done": gate.wait(20)}) for _ in range(jobs.WORKERS)]
    while any(job.state == "queued" for job in taken):
        time.sleep(0.01)
    waiting = [desk.submit(lambda job: {}) for _ in range(jobs.WAITING)]
    with pytest.raises(jobs.QueueFull):
        desk.submit(lambda job: {})
    waiting[0].cancel()
    gate.set()
    while not all(job.ended for job in [*taken, *waiting]):
        time.sleep(0.01)
    assert [job.state for job in waiting] == ["stopped"] + ["done"] * (jobs.WAITING - 1)


def test_a_job_ends_when_its_time_is_over_or_nobody_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    def forever(job: jobs.Job) -> dict[str, Any]:
        decode = job.watched(lambda z: z)
        while True:
            decode(torch.zeros(1))

    for name, said in (("LONGEST", "stopped after"), ("ABANDONED", "nobody was watching")):
        with monkeypatch.context() as short:
            short.setattr(jobs, "LONGEST", 5.0)
            short.setattr(jobs, name, 0.05)
            job = jobs.Job(forever)
            job.run()
            assert job.state == "stopped" and said in job.message


def test_what_fails_is_told_in_a_sentence_without_stopping_the_worker() -> None:
    def fail(job: jobs.Job) -> dict[str, Any]:
        raise UsageError("too blue")

    desk = jobs.Desk()
    failed = desk.submit(fail)
    fine = desk.submit(lambda job: {"x": 1})
    while not (failed.ended and fine.ended):
        time.sleep(0.01)
    assert (failed.state, failed.message, fine.result) == ("failed", "too blue", {"x": 1})


# ---- directions, drawings ------------------------------------------------------------------------------------------------------------------


def test_the_metric_of_a_linear_decoder_is_its_gram_matrix() -> None:
    matrix = torch.randn(10, 3, generator=torch.Generator().manual_seed(0))
    found = mean_metric(lambda z: (z @ matrix.T).view(-1, 1, 2, 5), torch.randn(4, 3))
    assert torch.allclose(found, (matrix.T @ matrix).double(), rtol=1e-5)


def test_a_step_along_a_direction_changes_the_image_as_much_as_is_said(vae: Path) -> None:
    """To first order, averaged over codes, E|G(z + h v) - G(z)|^2 / h^2 is the eigenvalue; later directions change the image less."""
    run = periplus.load_run(vae)
    axes = principal_axes(run, 3)
    codes, step = run.sample_codes(32), 1e-2
    for k in range(3):
        v = axes.directions[k].float()
        changed = ((run.decode(codes + step * v) - run.decode(codes - step * v)) / (2 * step)).double().flatten(1).square().sum(1).mean().sqrt()
        assert float(changed) == pytest.approx(float(axes.change[k]), rel=2e-2)
    assert torch.allclose(axes.duals @ axes.directions.T, torch.eye(3, dtype=torch.float64), atol=1e-9)
    assert axes.change.tolist() == sorted(axes.change.tolist(), reverse=True) and float(axes.share.sum()) == pytest.approx(1)


def test_the_size_of_a_figure() -> None:
    images = torch.zeros(3, 1, 20, 20, dtype=torch.uint8)
    images[:, 0, 5:15, 8:12] = 255
    assert figure_size(images) == 0.5 and figure_size(torch.zeros(2, 1, 4, 4, dtype=torch.uint8)) == 1.0


# ---- the exported page ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["vae", "gan"])
def test_exported_layers_compute_what_the_decoder_does(which: str, request: pytest.FixtureRequest) -> None:
    run = periplus.load_run(request.getfixturevalue(which))
    layers, error = export.export_layers(run)
    assert error < 0.1 / 255 and layers[-1]["kind"] == "sigmoid"
    first = layers[0]
    weight = np.frombuffer(base64.b64decode(first["weight"]), "<i2").reshape(first["out"], first["in"])
    assert np.abs(weight).max(1).tolist() == [32767] * first["out"], "every row uses all of its bits"


def test_a_decoder_that_cannot_be_exported_is_refused(vae: Path) -> None:
    run = periplus.load_run(vae)
    run.decoder.body[1] = torch.nn.Softplus()  # type: ignore[index]
    with pytest.raises(UsageError, match="Softplus cannot be exported"):
        export.export_layers(run)


def test_the_exported_page_is_one_file_that_may_load_nothing(vae: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["explore", str(vae), "--export", str(tmp_path / "page.html"), "--images", "2", "--json"])
    told = json.loads(capsys.readouterr().out)
    assert stop.value.code == 0 and told["images"] == 2 and told["paths"] == 1 and told["bytes"] < 8 * MIB
    html = (tmp_path / "page.html").read_text("utf-8")
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', html)[1]  # type: ignore[index]
    assert policy.startswith("default-src 'none'") and "unsafe" not in policy
    for tag in ("script", "style"):
        inline = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        assert [f"{tag}-src '{export.digest(text)}'" in policy for text in inline] == [True]
    assert not re.search(r'(?:src|href)="(?!#)', html), "nothing is loaded"
    page = json.loads(re.search(r'id="embedded">(.*?)</script>', html, re.DOTALL)[1])  # type: ignore[index]
    assert {record["label"] for record in page["gallery"]} == {"0", "1"}
    path = page["paths"][0]["told"]
    assert path["lower_bound"] <= path["cost"] <= path["straight_cost"] * (1 + 1e-6)


# ---- the command ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--port", "70000"], "--port is 70000"),
        (["--export", "page.txt"], "the name must end in .html"),
        (["--token", "a b"], "--token must be printable"),
        (["--export", "page.html", "--images", "99"], "--images is 99"),
    ],
)
def test_options_that_cannot_be_served_are_one_line(vae: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["explore", str(vae), *words])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and said in error and len(error.splitlines()) == 1


def test_a_port_in_use_is_told(vae: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(SystemExit) as stop:
        cli.main(["explore", str(vae), "--port", str(taken.getsockname()[1])])
    assert stop.value.code == 2 and "cannot listen on 127.0.0.1" in capsys.readouterr().err


def test_without_the_extra_it_says_how_to_get_it(vae: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(SystemExit) as stop:
        cli.main(["explore", str(vae)])
    assert stop.value.code == 2 and "pip install 'periplus[web]'" in capsys.readouterr().err


# ---- in a browser --------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """The system's Chromium, without a window."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("no chromium, chromium-browser or google-chrome on this machine: the explorer's page is not driven")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(chromium: Any) -> Iterator[Any]:
    """A page that fails its test where a script does, or where it asks for anything elsewhere."""
    context = chromium.new_context(viewport={"width": 1280, "height": 900}, color_scheme="light")
    page, wrong = context.new_page(), []
    page.set_default_timeout(60_000)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" and "status of 415" not in message.text else None)
    page.on("request", lambda request: None if re.match(r"(http://127\.0\.0\.1|file:|data:|blob:)", request.url) else wrong.append(request.url))
    yield page
    context.close()
    assert not wrong


def opened(page: Any, address: str) -> Any:
    page.goto(address)
    page.locator("body[data-ready=true]").wait_for()
    return page


def pixels(page: Any, selector: str, shape: tuple[int, ...] = (1, 8, 8)) -> torch.Tensor:
    """What a canvas shows, in [0, 1]: its first channel."""
    script = """(canvas) => Array.from(canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data.filter((_, k) => k % 4 === 0))"""
    return torch.tensor(page.locator(selector).evaluate(script)).view(shape).float() / 255


def decoded(page: Any, selector: str, run: periplus.Run) -> torch.Tensor:
    """The run's own image of the code that a canvas says it shows."""
    return run.decode(torch.tensor(json.loads(page.locator(selector).get_attribute("data-code"))))


def moves_between(page: Any, run: periplus.Run) -> None:
    """Both pictures follow the drag, and show what the run decodes, to 1/255."""
    slider, shown = page.locator("#along"), []
    slider.scroll_into_view_if_needed()
    box = slider.bounding_box()
    page.mouse.move(box["x"] + 9, box["y"] + box["height"] / 2)
    page.mouse.down()
    for part in (0.05, 0.5, 0.95):
        page.mouse.move(box["x"] + part * box["width"], box["y"] + box["height"] / 2, steps=4)
        settle(page)
        for name in ("#view-line", "#view-path"):
            assert float((pixels(page, name) - decoded(page, name, run)).abs().max()) <= 1 / 255
        shown.append(pixels(page, "#view-path"))
    page.mouse.up()
    assert all(float((a - b).abs().max()) > 0.05 for a, b in zip(shown, shown[1:], strict=False)), "the picture did not change"


def settle(page: Any) -> None:
    """Wait until what was asked for last is shown."""
    page.wait_for_timeout(250)


def names_missing(page: Any) -> list[str]:
    """What can be operated but has no name for a screen reader."""
    return page.evaluate(  # type: ignore[no-any-return]
        """[...document.querySelectorAll('button, select, input, canvas[role], [role=application]')].filter((one) => one.offsetParent !== null
           && !(one.getAttribute('aria-label') || one.textContent.trim() || one.labels?.length)).map((one) => one.outerHTML.slice(0, 120))"""
    )


@pytest.mark.browser
def test_choose_two_images_watch_them_and_drag_along_the_path(server: Server, vae: Path, page: Any) -> None:
    opened(page, server.address)
    run, data = periplus.load_run(vae), periplus.load_data("digits", "test")
    page.locator(".slot").nth(0).locator(".gallery button").nth(2).click()
    page.locator(".slot").nth(1).locator(".gallery button").nth(5).click()
    page.locator(".slot").nth(0).locator(".start").nth(16).wait_for()  # a picture of each start
    assert torch.equal(pixels(page, ".slot:nth-child(1) .target"), data.images[2].float() / 255)
    page.locator("#path-status", has_text="Done").wait_for()
    moves_between(page, run)
    totals = [float(one.get_attribute("data-value")) for one in page.locator("#totals b").all()]
    assert totals[0] * (1 + 1e-6) >= totals[1] >= totals[2] > 0
    page.locator(".slot").nth(0).locator(".status", has_text="Done").wait_for()
    page.locator("#go-a").click()
    settle(page)
    assert float((pixels(page, "#here") - decoded(page, "#here", run)).abs().max()) <= 1 / 255
    page.locator("#rates-a").click()
    page.locator(".rung").nth(2).wait_for()
    assert not names_missing(page)


@pytest.mark.browser
def test_draw_and_upload(server: Server, page: Any) -> None:
    opened(page, server.address)
    page.locator(".slot").nth(0).locator(".draw").click()
    box = page.locator("#sheet").bounding_box()
    page.mouse.move(box["x"] + 140, box["y"] + 40)
    page.mouse.down()
    page.mouse.move(box["x"] + 140, box["y"] + 240, steps=5)
    page.mouse.up()
    page.locator("#use-drawing").click()
    page.locator(".slot").nth(0).locator(".start").first.wait_for()
    drawn = pixels(page, ".slot:nth-child(1) .target")[0]
    assert drawn[:, 3:5].mean() > 0.4 and drawn[:, [0, 1, 6, 7]].max() < 0.05 and drawn.mean(1).min() > 0.05, f"no bar in the middle: {drawn}"
    grey = np.zeros((64, 64), np.uint8)
    grey[:32] = 200
    page.locator(".slot").nth(1).locator("input[type=file]").set_input_files({"name": "half.png", "mimeType": "image/png", "buffer": png(grey)})
    page.locator(".slot").nth(1).locator(".start").first.wait_for()
    shown = pixels(page, ".slot:nth-child(2) .target")[0]
    assert torch.allclose(shown[:3], torch.tensor(200 / 255), atol=0.02) and float(shown[5:].max()) < 0.02
    page.locator(".slot").nth(1).locator("input[type=file]").set_input_files({"name": "x.png", "mimeType": "image/png", "buffer": b"no image"})
    page.locator("#trouble", has_text="no image of a known format").wait_for()
    page.locator(".slot").nth(0).locator(".stop").click()


@pytest.mark.browser
def test_with_the_keyboard_alone(server: Server, vae: Path, page: Any) -> None:
    opened(page, server.address)
    run, keys = periplus.load_run(vae), page.keyboard

    def tab_to(selector: str) -> None:
        for _ in range(80):
            keys.press("Tab")
            if page.evaluate(f"document.activeElement.matches({json.dumps(selector)})"):
                return
        raise AssertionError(f"Tab never reaches {selector}")

    tab_to("#theme")
    keys.press("Enter")
    assert page.evaluate("document.documentElement.dataset.theme") == "light"
    tab_to("#pad")
    before = pixels(page, "#here")
    for _ in range(4):
        keys.press("Shift+ArrowRight")
    settle(page)
    assert float((pixels(page, "#here") - before).abs().max()) > 0.02
    assert float((pixels(page, "#here") - decoded(page, "#here", run)).abs().max()) <= 1 / 255
    tab_to("#axis-0")
    before = pixels(page, "#here")
    keys.press("Home")
    settle(page)
    assert float((pixels(page, "#here") - before).abs().max()) > 0.02
    tab_to(".slot:nth-child(1) .draw")
    keys.press("Enter")
    keys.press("Space")
    for key in ("ArrowUp",) * 10 + ("ArrowRight",) * 8:
        keys.press(key)
    tab_to("#use-drawing")
    keys.press("Enter")
    page.locator(".slot").nth(0).locator(".start").first.wait_for()
    tab_to(".slot:nth-child(2) .gallery button")
    keys.press("ArrowRight")
    keys.press("Enter")
    assert page.locator(".slot").nth(1).locator(".gallery button").nth(1).get_attribute("aria-pressed") == "true"
    page.locator("#path-status", has_text="Done").wait_for()
    tab_to("#along")
    for _ in range(5):
        keys.press("PageUp")
    settle(page)
    assert float(page.locator("#along").input_value()) > 0
    assert float((pixels(page, "#view-path") - decoded(page, "#view-path", run)).abs().max()) <= 1 / 255


@pytest.mark.browser
@pytest.mark.parametrize(("width", "scheme"), [(390, "dark"), (768, "light"), (1280, "dark")])
def test_it_fits_every_width_and_follows_the_colour_scheme(server: Server, page: Any, width: int, scheme: str) -> None:
    page.set_viewport_size({"width": width, "height": 844})
    page.emulate_media(color_scheme=scheme)
    opened(page, server.address)
    page.locator(".slot").nth(0).locator(".gallery button").first.click()
    page.locator(".slot").nth(0).locator(".start").first.wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", paper)[:3])) < 200) == (scheme == "dark")
    page.locator("#theme").click()
    page.locator("#theme").click()  # as the system, light, dark
    assert sum(map(int, re.findall(r"\d+", page.evaluate("getComputedStyle(document.body).backgroundColor"))[:3])) < 200


def draw_stroke(page: Any, slot: int, at: int) -> None:
    """A stroke on a clean sheet, used as the image of a slot."""
    page.locator(".slot").nth(slot).locator(".draw").click()
    page.locator("#clear-drawing").click()
    box = page.locator("#sheet").bounding_box()
    page.mouse.move(box["x"] + at, box["y"] + 60)
    page.mouse.down()
    page.mouse.move(box["x"] + 140, box["y"] + 220, steps=4)
    page.mouse.up()
    page.locator("#use-drawing").click()


@pytest.mark.browser
def test_the_exported_page_does_the_same_without_a_server(vae: Path, page: Any, tmp_path: Path) -> None:
    run = periplus.load_run(vae)
    export.write_page(Terrain(run), tmp_path / "page.html", 2, "periplus explore RUN --export page.html")
    opened(page, (tmp_path / "page.html").as_uri())
    for slot in range(2):
        page.locator(".slot").nth(slot).locator(".gallery button").nth(slot).click()
    page.locator("#path-status", has_text="(converged)").wait_for()  # the one that the program found
    moves_between(page, run)
    kept = float(page.locator("#totals b").nth(1).get_attribute("data-value"))
    page.locator(".slot").nth(0).locator(".status", has_text="certified").wait_for()
    draw_stroke(page, 0, 60)
    page.locator(".slot").nth(0).locator(".status", has_text="does not certify").wait_for()
    page.locator("#path-status", has_text="found in this page").wait_for()
    moves_between(page, run)
    line, path, bound = (float(one.get_attribute("data-value")) for one in page.locator("#totals b").all())
    assert line * (1 + 1e-3) >= path >= bound > 0 and path != kept
    assert not names_missing(page)


#: Press the first slot's Stop as soon as it is to be seen beside eight starts: a driver outside of the page may come when the race is over.
PRESS_STOP = """() => {
    const slot = document.querySelector(".slot"), stop = slot.querySelector(".stop");
    new MutationObserver(() => { if (!stop.hidden && slot.querySelectorAll(".start").length > 7) stop.click(); })
        .observe(slot, {childList: true, subtree: true, attributes: true});
}"""


@pytest.mark.browser
def test_a_convolutional_generator_decodes_in_the_browser(gan: Path, page: Any, tmp_path: Path) -> None:
    run = periplus.load_run(gan)
    export.write_page(Terrain(run), tmp_path / "page.html", 0, "periplus explore RUN --export page.html")
    opened(page, (tmp_path / "page.html").as_uri())
    for sample in (3, 5):
        page.locator("#samples button").nth(sample).click()
        settle(page)
        assert float((pixels(page, "#here") - decoded(page, "#here", run)).abs().max()) <= 1 / 255
    page.evaluate(PRESS_STOP)
    draw_stroke(page, 0, 60)
    page.locator(".slot").nth(0).locator(".status", has_text="Stopped: best error so far").wait_for()
