"""A pull as the user sees it: a block of lines that change on a terminal, else a line per event."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, TextIO

from protos.theseus.engine.v1 import images_pb2 as pb
from services.cli import docker_config, table
from services.cli.engine import LONG_DEADLINE_S
from services.cli.names import familiar, split
from services.common.errors import Internal

if TYPE_CHECKING:
    from collections.abc import Iterable

    from services.cli.engine import Engine

_WORDS = {
    "waiting": "Waiting",
    "fetching": "Downloading",
    "fetched": "Download complete",
    "unpacking": "Extracting",
    "done": "Pull complete",
    "exists": "Already exists",
}
_BAR_WIDTH = 30


async def pull(
    engine: Engine,
    reference: str,
    *,
    platform: str = "",
    out: TextIO = sys.stdout,
    quiet: bool = False,
) -> pb.Image:
    """Pull an image and show how it goes.

    Raises:
        TheseusError: the engine could not.
    """
    request = pb.PullImageRequest(
        reference=reference,
        platform=platform,
        credentials=await docker_config.credentials_for(reference),
    )
    display = _Display(out) if out.isatty() else _Lines(out)
    image: pb.Image | None = None
    fetched_any = False
    with engine.failures():
        async for response in engine.images.Pull(request, timeout=LONG_DEADLINE_S):
            if not quiet:
                display.show(response.layers)
            fetched_any |= any(layer.status not in ("exists", "done") for layer in response.layers)
            if response.HasField("image"):
                image = response.image
    if image is None:
        raise Internal(f"the engine ended the pull of {reference} without an image")
    if not quiet:
        state = "Downloaded newer image for" if fetched_any else "Image is up to date for"
        out.write(f"Digest: {image.digest}\nStatus: {state} {_tagged(reference)}\n")
    out.flush()
    return image


def _tagged(reference: str) -> str:
    repository, tag, digest = split(familiar(reference))
    return f"{repository}@{digest}" if digest else f"{repository}:{tag or 'latest'}"


class _Lines:
    """One line each time that a layer comes to another step."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._seen: dict[str, str] = {}

    def show(self, layers: Iterable[pb.LayerProgress]) -> None:
        for layer in layers:
            if self._seen.get(layer.name) != layer.status:
                self._seen[layer.name] = layer.status
                words = _WORDS.get(layer.status, layer.status)
                self._out.write(f"{_name(layer)}: {words}\n")
        self._out.flush()


class _Display(_Lines):
    """One line for each layer, written over again in place."""

    _height = 0

    def show(self, layers: Iterable[pb.LayerProgress]) -> None:
        lines = [f"{_name(layer)}: {self._state(layer)}" for layer in layers]
        if self._height:
            self._out.write(f"\x1b[{self._height}A")
        self._out.writelines(f"\x1b[2K{line}\n" for line in lines)
        self._height = max(self._height, len(lines))
        self._out.flush()

    def _state(self, layer: pb.LayerProgress) -> str:
        words = _WORDS.get(layer.status, layer.status)
        if layer.status not in ("fetching", "unpacking"):
            return words
        if not layer.total_bytes:
            return f"{words}  {table.size(layer.current_bytes)}"
        filled = _BAR_WIDTH * min(layer.current_bytes, layer.total_bytes) // layer.total_bytes
        bar = ("=" * filled + ">")[:_BAR_WIDTH].ljust(_BAR_WIDTH)
        return (
            f"{words.ljust(11)} [{bar}] "
            f"{table.size(layer.current_bytes)}/{table.size(layer.total_bytes)}"
        )


def _name(layer: pb.LayerProgress) -> str:
    return table.short(layer.name) if ":" in layer.name else layer.name
