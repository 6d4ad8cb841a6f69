"""Routes of the explorer: a page, and what it asks for, as JSON.

    GET    /                      the page; /explorer.css, /network.js, ... its parts, from a fixed list
    GET    /api/runs              what every run is
    GET    /api/axes              ?run                   principal directions
    GET    /api/samples           ?run&count&seed        codes and images
    GET    /api/images            ?run&first&count&label images to choose from
    POST   /api/decode            {run, codes}           images of codes
    POST   /api/invert            multipart `file` (and run, negative), or JSON {run, index} or {run, image}: a job
    POST   /api/path              {run, codes: [a, b], images: [a, b]}: a job
    POST   /api/reconstruct       {image}                every autoencoder's reconstructions, over their rates
    GET    /api/jobs/ID           ?after=VERSION         progress; waits a while for news
    DELETE /api/jobs/ID           stop it

Everything that computes does so in threads, few at a time; the loop itself only waits.
"""

from __future__ import annotations

import asyncio
import json
import math
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any, TypeVar

import torch
from anyio import to_thread
from starlette.applications import Starlette
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from torch import Tensor

from periplus.errors import PeriplusError, UsageError
from periplus.explorer.jobs import Desk, Job, QueueFull
from periplus.explorer.parts import PARTS, page_part
from periplus.explorer.safety import Gate, Refused, read_image
from periplus.explorer.terrain import Terrain, packed, unpacked
from periplus.locating import Targets, has_encoder

#: Codes of one request, images of a gallery or of samples.
CODES, PICTURES = 64, 60
#: Seconds that a short computation may take, and one that is kept once it is made; computations at once; seconds that a question waits for news.
SHORT, FIRST, AT_ONCE, NEWS = 10.0, 60.0, 4, 5.0
#: How far a code may be from the origin: far beyond any law of codes, and finite.
FARTHEST = 1e3

T = TypeVar("T")
Endpoint = Callable[[Request], Awaitable[Response]]


def build_app(terrains: Sequence[Terrain], host: str = "127.0.0.1", token: str | None = None) -> Gate:
    """The whole server as an ASGI application.

    Args:
        terrains: the runs, the one to open first. host: what it will be bound to. token: what requests must carry, or None.
    """
    return Gate(Explorer(terrains).starlette(), host, token)


class Explorer:
    """What the routes share: runs, jobs, the parts of the page."""

    def __init__(self, terrains: Sequence[Terrain]) -> None:
        self.terrains = list(terrains)
        self.desk = Desk()
        self.parts = {name: (page_part(name), kind) for name, kind in PARTS.items()}
        self.page = page_part("index.html")
        self._turns = asyncio.Semaphore(AT_ONCE)

    def starlette(self) -> Starlette:
        """The routes."""
        routes = [
            Route("/", self.index),
            Route("/{part}", self.part),
            Route("/api/runs", self.runs),
            Route("/api/axes", self.axes),
            Route("/api/samples", self.samples),
            Route("/api/images", self.images),
            Route("/api/decode", self.decode, methods=["POST"]),
            Route("/api/invert", self.invert, methods=["POST"]),
            Route("/api/path", self.path, methods=["POST"]),
            Route("/api/reconstruct", self.reconstruct, methods=["POST"]),
            Route("/api/jobs/{job}", self.job),
            Route("/api/jobs/{job}", self.cancel, methods=["DELETE"]),
        ]
        handlers: dict[Any, Any] = {
            Refused: _refused,
            QueueFull: _busy,
            PeriplusError: _unusable,
            MultiPartException: _unreadable,
            HTTPException: _other,
            Exception: _unexpected,
        }
        return Starlette(routes=routes, exception_handlers=handlers, lifespan=self._lifespan)

    @asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        threading.Thread(target=self.warm, daemon=True).start()
        yield
        self.desk.close()

    def warm(self) -> None:
        """Compute what the first visitor will ask for."""
        for terrain in self.terrains:
            with suppress(Exception):  # told to whoever asks for what failed
                terrain.warm()

    async def quickly(self, work: Callable[[], T], seconds: float = SHORT) -> T:
        """A short computation in a thread: few at once, and none is waited for too long."""
        try:
            async with asyncio.timeout(seconds), self._turns:
                return await to_thread.run_sync(work, abandon_on_cancel=True)
        except TimeoutError:
            raise Refused(503, "the machine is busy: try again in a few seconds") from None

    def terrain(self, value: Any) -> Terrain:
        """A run by its number. Raises Refused."""
        number = _integer(value, "run", 0, len(self.terrains) - 1)
        return self.terrains[number]

    # ---- the page ----------------------------------------------------------------------------------------------------------------------------

    async def index(self, request: Request) -> Response:
        return Response(self.page, media_type="text/html")

    async def part(self, request: Request) -> Response:
        if (found := self.parts.get(request.path_params["part"])) is None:
            raise Refused(404, "there is no such page")
        return Response(found[0], media_type=found[1])

    # ---- short questions ---------------------------------------------------------------------------------------------------------------------

    async def runs(self, request: Request) -> Response:
        return JSONResponse({"runs": await self.quickly(lambda: [terrain.about() for terrain in self.terrains], FIRST)})

    async def axes(self, request: Request) -> Response:
        terrain = self.terrain(request.query_params.get("run", 0))
        return JSONResponse(await self.quickly(lambda: terrain.axes.record(), FIRST))

    async def samples(self, request: Request) -> Response:
        terrain, query = self.terrain(request.query_params.get("run", 0)), request.query_params
        count, seed = _integer(query.get("count", 24), "count", 1, PICTURES), _integer(query.get("seed", 0), "seed", 0, 2**31)
        return JSONResponse(await self.quickly(lambda: terrain.samples(count, seed)))

    async def images(self, request: Request) -> Response:
        terrain, query = self.terrain(request.query_params.get("run", 0)), request.query_params
        first, count = _integer(query.get("first", 0), "first", 0, 2**31), _integer(query.get("count", 24), "count", 1, PICTURES)
        label = _integer(query["label"], "label", 0, 2**31) if query.get("label") else None
        return JSONResponse(await self.quickly(lambda: terrain.gallery(first, count, label)))

    async def decode(self, request: Request) -> Response:
        asked = await _json(request)
        terrain = self.terrain(asked.get("run", 0))
        codes = _codes(asked.get("codes"), terrain.latent_dim, CODES)
        return JSONResponse({"images": await self.quickly(lambda: terrain.decode(codes))})

    async def reconstruct(self, request: Request) -> Response:
        asked = await _json(request)
        autoencoders = [terrain for terrain in self.terrains if has_encoder(terrain.run)]
        image = _image(asked.get("image"), self.terrains[0])
        found = await self.quickly(lambda: [terrain.ladder(image) for terrain in autoencoders])
        return JSONResponse({"runs": sorted(found, key=lambda record: float(record["rate"]))})

    # ---- long work ---------------------------------------------------------------------------------------------------------------------------

    async def invert(self, request: Request) -> Response:
        terrain, targets = await self.wanted(request)
        job = self.desk.submit(lambda job: race(terrain, targets, job))
        label = targets.labels[0]
        return JSONResponse({"job": job.id, "image": packed(targets.images)[0], "name": targets.names[0], "label": label})

    async def wanted(self, request: Request) -> tuple[Terrain, Targets]:
        """The run and the image that are asked for. Raises Refused."""
        kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
        if kind == "application/json":
            asked = await _json(request)
            terrain = self.terrain(asked.get("run", 0))
            if "index" in asked:
                index = _integer(asked["index"], "index", 0, 2**31)
                return terrain, await self.quickly(lambda: terrain.target(index))
            return terrain, terrain.own(_image(asked.get("image"), terrain), "drawn")
        if kind != "multipart/form-data":
            raise Refused(415, "send an image as multipart/form-data with the field 'file', or JSON")
        async with request.form(max_files=1, max_fields=4, max_part_size=1024) as form:
            terrain, file = self.terrain(form.get("run", 0)), form.get("file")
            if not isinstance(file, UploadFile):
                raise Refused(400, "the form has no file in the field 'file'")
            content = await file.read()
            image = await self.quickly(lambda: read_image(content, terrain.run.image_shape))
            if form.get("negative") == "1":
                image = 255 - image
            return terrain, terrain.own(image, "uploaded")

    async def path(self, request: Request) -> Response:
        asked = await _json(request)
        terrain = self.terrain(asked.get("run", 0))
        codes = _codes(asked.get("codes"), terrain.latent_dim, 2)
        images = asked.get("images")
        if len(codes) != 2 or not isinstance(images, list) or len(images) != 2:
            raise Refused(400, "a path needs two codes and two images")
        ends = (_image(images[0], terrain), _image(images[1], terrain))
        if bool((ends[0] == ends[1]).all()):
            raise Refused(400, "both images are the same: a path needs two different ones")

        def work(job: Job) -> dict[str, Any]:
            return terrain.passage((codes[0], codes[1]), ends, job.watched(terrain.run.decode), job.report)

        return JSONResponse({"job": self.desk.submit(work).id})

    async def job(self, request: Request) -> Response:
        found = self.find(request)
        after = _integer(request.query_params.get("after", -1), "after", -1, 2**31)
        waited = 0.0
        while found.version <= after and not found.ended and waited < NEWS:
            found.record()  # somebody is watching
            await asyncio.sleep(0.02)
            waited += 0.02
        return JSONResponse(found.record())

    async def cancel(self, request: Request) -> Response:
        found = self.find(request)
        found.cancel()
        return JSONResponse(found.record())

    def find(self, request: Request) -> Job:
        """The job of a request. Raises Refused."""
        found = self.desk.find(request.path_params["job"])
        if found is None:
            raise Refused(404, "there is no such job (any more)")
        return found


def race(terrain: Terrain, targets: Targets, job: Job) -> dict[str, Any]:
    """An inversion as a job; it makes no more pictures of its progress than somebody can look at."""

    def report(frame: Callable[[], dict[str, Any]]) -> None:
        if job.due():
            job.report(frame())

    return terrain.race(targets, job.watched(terrain.run.decode), report)


# ---- what is sent ---------------------------------------------------------------------------------------------------------------------------


async def _json(request: Request) -> dict[str, Any]:
    """The body as a JSON object. Raises Refused."""
    if request.headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
        raise Refused(415, "send JSON, as application/json")
    try:
        found = json.loads(await request.body())
    except (ValueError, RecursionError):
        raise Refused(400, "the body is not JSON") from None
    if not isinstance(found, dict):
        raise Refused(400, "the body is not a JSON object")
    return found


def _integer(value: Any, name: str, least: int, most: int) -> int:
    try:
        number = int(value)
    except (ValueError, TypeError, OverflowError):
        raise Refused(400, f"{name} must be an integer") from None
    if isinstance(value, float) and value != number or not least <= number <= most:
        raise Refused(400, f"{name} must be an integer from {least} to {most}")
    return number


def _codes(value: Any, latent_dim: int, most: int) -> Tensor:
    """Codes (N, d) of a list of lists of numbers. Raises Refused."""
    if not isinstance(value, list) or not 1 <= len(value) <= most:
        raise Refused(400, f"codes must be a list of 1 to {most} codes")
    for code in value:
        if not isinstance(code, list) or len(code) != latent_dim:
            raise Refused(400, f"a code must be a list of {latent_dim} numbers")
        if not all(isinstance(x, int | float) and math.isfinite(x) and abs(x) <= FARTHEST for x in code):
            raise Refused(400, f"the numbers of a code must lie within {FARTHEST:g} of 0")
    return torch.tensor(value, dtype=torch.float32)


def _image(value: Any, terrain: Terrain) -> Tensor:
    """An image uint8 (C, H, W) of base64. Raises Refused."""
    if not isinstance(value, str):
        raise Refused(400, "an image must be base64 of its pixels")
    try:
        return unpacked(value, terrain.run.image_shape)
    except UsageError as error:
        raise Refused(400, str(error)) from None


# ---- what goes wrong ------------------------------------------------------------------------------------------------------------------------


def _sentence(status: int, text: str, **headers: str) -> Response:
    return JSONResponse({"error": text}, status, headers)


async def _refused(request: Request, error: Any) -> Response:
    return _sentence(error.status, str(error))


async def _busy(request: Request, error: Any) -> Response:
    return _sentence(429, str(error), **{"retry-after": "5"})


async def _unusable(request: Request, error: Any) -> Response:
    return _sentence(400, str(error))


async def _unreadable(request: Request, error: Any) -> Response:
    return _sentence(400, "the form cannot be read")


async def _other(request: Request, error: Any) -> Response:
    return _sentence(error.status_code, "there is no such page" if error.status_code == 404 else str(error.detail))


async def _unexpected(request: Request, error: Any) -> Response:
    return _sentence(500, f"unexpected {type(error).__name__}: please report it")
