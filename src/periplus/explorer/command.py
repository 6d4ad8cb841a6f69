"""`periplus explore RUN...`: a page in the browser, or with --export one file of it."""

from __future__ import annotations

import shlex
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional, arg

from periplus.commands import Common
from periplus.errors import UsageError

if TYPE_CHECKING:
    from periplus.explorer.terrain import Terrain

#: Connections that are served at once; what comes beyond is told to come again (503).
CONNECTIONS = 64
MOST_RUNS = 12


@dataclass(frozen=True, kw_only=True)
class Explore(Common):
    """Move in a latent space: samples, directions, images located live, straight and least-cost paths, in a page of your browser.

    Several autoencoders side by side reconstruct an image at their different rates.
    """

    folders: Annotated[Positional[tuple[Path, ...]], arg(metavar="RUN...", help="Run folders; the first one is opened first.")]
    host: Annotated[str, arg(help="Where to listen. Anything but this machine itself needs a token; one is made where none is given.")] = "127.0.0.1"
    port: Annotated[int, arg(help="Where to listen; 0 takes a free one.")] = 8765
    token: Annotated[str | None, arg(help="What requests must carry.")] = None
    export: Annotated[Path | None, arg(help="Write one HTML file that works without a server, and stop.")] = None
    images: Annotated[int, arg(help="With --export: test images in the file; all passages between them are computed.")] = 6
    split: Annotated[str, arg(help="Of the images to choose from: test (held-out images where there is no such split), train, ...")] = "test"
    data_root: Annotated[Path | None, arg(help="Where named sets are looked for first; else $PERIPLUS_DATA, else the cache.")] = None
    seed: Annotated[int, arg(help="Of starts and paths.")] = 0
    device: Annotated[str, arg(help="cpu, cuda or auto.")] = "cpu"

    def run(self) -> None:
        """Serve until interrupted, or export."""
        if not 1 <= len(self.folders) <= MOST_RUNS:
            raise UsageError(f"{len(self.folders)} run folders were given: from 1 to {MOST_RUNS} are needed")
        if self.token is not None and not (self.token and self.token.isascii() and self.token.isprintable() and not set(self.token) & set(' ;,"\\')):
            raise UsageError("--token must be printable ASCII, without spaces, quotes, commas and semicolons")
        terrains = self.terrains()
        if self.export is not None:
            self.write(terrains)
        else:
            self.serve(terrains)

    def terrains(self) -> list[Terrain]:
        """The runs, opened. Raises UsageError for runs of other image sizes."""
        from periplus.explorer.terrain import Terrain
        from periplus.runs import load_run

        runs = [load_run(folder, self.device) for folder in self.folders]
        for run in runs:
            if run.image_shape != runs[0].image_shape:
                raise UsageError(f"{run.path} has images of {run.image_shape}, {runs[0].path} of {runs[0].image_shape}: explore them separately")
            _ = run.decoder  # a run that cannot be decoded is told before anything is served
        return [Terrain(run, self.split, self.data_root, self.seed) for run in runs]

    def write(self, terrains: list[Terrain]) -> None:
        """The single file."""
        from periplus.console import note
        from periplus.explorer.export import write_page

        assert self.export is not None
        if self.export.suffix not in (".html", ".htm"):
            raise UsageError(f"--export is {self.export}: the name must end in .html")
        told = write_page(terrains[0], self.export, self.images, shlex.join(["periplus", *sys.argv[1:]]), None if self.json else note)
        self.tell(told, f"{self.export}: {told['bytes'] / 2**20:.1f} MiB, {told['images']} images, {told['paths']} paths; open it in any browser")

    def serve(self, terrains: list[Terrain]) -> None:
        """Until interrupted."""
        try:
            import python_multipart  # noqa: F401 - what starlette reads forms with
            import uvicorn

            from periplus.explorer.app import build_app
        except ImportError as error:
            raise UsageError(f"the explorer needs packages that are not installed ({error.name}): pip install 'periplus[web]'") from None
        from periplus.explorer.safety import is_loopback, new_token

        sys.setswitchinterval(5e-4)  # a search in one thread must not make a picture in another wait
        token = self.token or (None if is_loopback(self.host) else new_token())
        listening = listen(self.host, self.port)
        port = listening.getsockname()[1]
        shown = f"[{self.host}]" if ":" in self.host else self.host
        address = f"http://{shown}:{port}/" + (f"?token={token}" if token else "")
        config = uvicorn.Config(
            build_app(terrains, self.host, token),
            log_level="warning",
            access_log=False,
            limit_concurrency=CONNECTIONS,
            timeout_keep_alive=5,
            timeout_graceful_shutdown=2,
            server_header=False,
            ws="none",
        )
        self.tell({"address": address}, f"{address}   (Ctrl-C stops it)")
        sys.stdout.flush()
        server = uvicorn.Server(config)
        server.run(sockets=[listening])


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises UsageError, before anything is said, where it cannot be had."""
    if not 0 <= port <= 65535:
        raise UsageError(f"--port is {port}: a number from 0 to 65535 is needed")
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(place)
        listening.listen(128)
    except OSError as error:
        raise UsageError(f"cannot listen on {host}, port {port} ({error.strerror or error}): choose another --host or --port") from None
    return listening
