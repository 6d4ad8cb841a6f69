"""What strangers may send, and how little of it is believed.

A server on one's own machine can be reached by every page that one's browser shows. What keeps such pages out:

    host        a name that an attacker points at 127.0.0.1 (DNS rebinding) is not ours: 421
    origin      requests that another site's page sends carry its origin: 403
    token       needed wherever the server listens beyond loopback, compared in constant time: 401
    body        at most BODY bytes, counted while they arrive, with or without content-length, within BODY_SECONDS: 413, 408
    images      formats of a list, at most SIDE x SIDE pixels by the header, before a pixel is decoded: 415, 413, 422
    policy      pages may load what this server gives and nothing else; no inline script, no frames

Bodies are read here, whole, before a route sees them: what is behind this gate has no way to wait for a slow or endless sender.
"""

from __future__ import annotations

import asyncio
import hmac
import io
import ipaddress
import json
import secrets
import socket
from collections.abc import Mapping
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import parse_qs, urlsplit

import numpy as np
import torch
from torch import Tensor

from periplus.data import formats

#: Bytes of a request's body, seconds that it may take to arrive, bodies read at once.
BODY, BODY_SECONDS, BODIES = 2 * 2**20, 15.0, 32
#: Pixels along a side of an image, and the formats that are decoded.
SIDE = 1024
FORMATS = ("PNG", "JPEG", "GIF", "BMP", "WEBP")
COOKIE = "periplus-token"
LOOPBACK = ("localhost", "127.0.0.1", "::1")

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "x-frame-options": "DENY",
    "permissions-policy": "camera=(), microphone=(), geolocation=()",
    "cache-control": "no-store",
}


class Refused(Exception):
    """A request is answered with this status and one sentence."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


def is_loopback(host: str) -> bool:
    """Whether a server bound to this name is reached from this machine only."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def new_token() -> str:
    """A token that cannot be guessed."""
    return secrets.token_urlsafe(24)


class Gate:
    """ASGI middleware in front of everything: host, origin, token, body; adds the headers to every answer.

    Args:
        app: what is behind it. host: what the server is bound to. token: asked for where it is not None.
    """

    def __init__(self, app: Any, host: str, token: str | None) -> None:
        self.app, self.host, self.token = app, host, token
        self._bodies = asyncio.Semaphore(BODIES)

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        """One connection."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        guarded = _with_headers(send)
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        try:
            self.check_host(headers.get("host", ""))
            check_origin(headers, scope["method"])
            given = self.check_token(headers, scope)
            body = await self.body(headers, receive)
        except Refused as refused:
            await answer(guarded, refused.status, {"error": str(refused)}, close=True)
            return
        if given is not None and scope["path"] == "/":  # the link that was printed: remembered in a cookie, gone from the address
            cookie = f"{COOKIE}={given}; HttpOnly; SameSite=Strict; Path=/"
            await answer(guarded, 303, {}, extra=[(b"location", b"/"), (b"set-cookie", cookie.encode())])
            return
        await self.app(scope, _replayed(body, receive), guarded)

    async def body(self, headers: Mapping[str, str], receive: Any) -> bytes:
        """A request's body, where it has one; only so many at once."""
        if headers.get("content-length", "0") == "0" and "transfer-encoding" not in headers:
            return b""
        if self._bodies.locked():
            raise Refused(503, "too many requests at once: try again in a few seconds")
        async with self._bodies:
            return await read_body(headers, receive)

    def check_host(self, header: str) -> None:
        """Raise Refused for a Host that is none of ours."""
        try:
            name = urlsplit(f"//{header}").hostname or ""
        except ValueError:
            name = ""
        known = {*LOOPBACK, self.host.strip("[]").lower()}
        if not is_loopback(self.host):
            known.add(socket.gethostname().lower())
            if _is_address(name):  # rebinding needs a name, and the token is asked for as well
                return
        if name not in known:
            raise Refused(421, "this host is not served here: open the address that was printed when the explorer started")

    def check_token(self, headers: Mapping[str, str], scope: Mapping[str, Any]) -> str | None:
        """The token where it came in the address of a request; raises Refused where it is missing or wrong."""
        if self.token is None:
            return None
        query = parse_qs(scope.get("query_string", b"").decode("latin-1")).get("token", [])
        bearer = headers.get("authorization", "")
        candidates = [*query, bearer.removeprefix("Bearer ") if bearer.startswith("Bearer ") else "", headers.get("x-token", ""), _cookie(headers)]
        if not any(hmac.compare_digest(candidate.encode(), self.token.encode()) for candidate in candidates if candidate):
            raise Refused(401, "a token is needed: open the address that was printed when the explorer started")
        return self.token if query else None


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _cookie(headers: Mapping[str, str]) -> str:
    try:
        found = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
    except CookieError:
        return ""
    return found.value if found else ""


def check_origin(headers: Mapping[str, str], method: str) -> None:
    """Raise Refused for what another site's page sent."""
    if method in ("GET", "HEAD"):
        return
    origin = headers.get("origin")
    if headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none") or (
        origin is not None and urlsplit(origin).netloc.lower() != headers.get("host", "").lower()
    ):
        raise Refused(403, "this came from the page of another site")


async def read_body(headers: Mapping[str, str], receive: Any) -> bytes:
    """The whole body. Raises Refused as soon as it is known to be too long or too slow."""
    declared = headers.get("content-length")
    if declared is not None and (not declared.isdecimal() or int(declared) > BODY):
        raise Refused(413, f"a body of {declared[:20]} bytes: at most {BODY} are taken")
    parts, length = [], 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise Refused(400, "the sender left")
                part = message.get("body", b"")
                length += len(part)
                if length > BODY:
                    raise Refused(413, f"the body is longer than {BODY} bytes")
                parts.append(part)
                if not message.get("more_body", False):
                    return b"".join(parts)
    except TimeoutError:
        raise Refused(408, f"the body took longer than {BODY_SECONDS:.0f} seconds") from None


def _replayed(body: bytes, receive: Any) -> Any:
    """A `receive` that gives a body that has been read, then what comes after it."""
    told = False

    async def replay() -> Any:
        nonlocal told
        if not told:
            told = True
            return {"type": "http.request", "body": body, "more_body": False}
        return await receive()

    return replay


def _with_headers(send: Any) -> Any:
    """A `send` that adds HEADERS to every answer."""
    ours = [(name.encode(), value.encode()) for name, value in HEADERS.items()]

    async def guarded(message: Any) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", ()), *ours]}
        await send(message)

    return guarded


async def answer(send: Any, status: int, record: dict[str, Any], close: bool = False, extra: list[tuple[bytes, bytes]] | None = None) -> None:
    """A short JSON answer, without any framework."""
    body = json.dumps(record).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), *(extra or [])]
    await send({"type": "http.response.start", "status": status, "headers": [*headers, (b"connection", b"close")] if close else headers})
    await send({"type": "http.response.body", "body": body})


# ---- images ---------------------------------------------------------------------------------------------------------------------------------


def read_image(content: bytes, shape: tuple[int, int, int]) -> Tensor:
    """An image file's bytes as uint8 (C, H, W) in a run's size and channels. Raises Refused.

    The header is judged before a pixel is decoded: a file that promises more pixels than SIDE x SIDE is not decoded at all.
    """
    from PIL import Image, UnidentifiedImageError

    if not content:
        raise Refused(422, "the file is empty")
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            width, height = image.size
            if max(width, height) > SIDE:
                raise Refused(413, f"the image has {width} x {height} pixels: at most {SIDE} x {SIDE} are taken")
            pixels = np.moveaxis(formats.image_pixels("the image", image), -1, 0)
    except Refused:
        raise
    except UnidentifiedImageError:
        raise Refused(415, f"this is no image of a known format: {', '.join(FORMATS)} are taken") from None
    except Image.DecompressionBombError:
        raise Refused(413, f"the image has more than {SIDE} x {SIDE} pixels") from None
    except Exception as error:  # Pillow's decoders raise nearly everything on broken files; all of it means the same
        reason = " ".join(str(error).split())[:160]
        raise Refused(422, f"the image cannot be read ({type(error).__name__}: {reason})") from None
    return fitted(pixels, shape)


def fitted(pixels: np.ndarray[Any, Any], shape: tuple[int, int, int]) -> Tensor:
    """An image uint8 (1 or 3, H, W) in another size and number of channels; colour becomes luminance where grey is needed."""
    channels, height, width = shape
    found = torch.tensor(formats.resize(np.ascontiguousarray(pixels)[None], (height, width)))[0]
    if channels == 1 and len(found) == 3:
        found = (found * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(0, keepdim=True).round().to(torch.uint8)
    return found.expand(channels, -1, -1).contiguous()
