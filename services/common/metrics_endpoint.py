"""The endpoint where Prometheus fetches a tier's page of metrics."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from services.common.errors import InvalidArgument

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

_REQUEST_LIMIT_BYTES = 16384
_REQUEST_TIMEOUT_S = 10.0


class MetricsEndpoint:
    """Serves ``GET /metrics`` over HTTP/1.1 on a Unix socket or a TCP address.

    Args:
        address: ``unix:PATH`` or ``HOST:PORT``.
        render: gives the page in the text exposition format.

    Raises:
        InvalidArgument: the address has neither form.
    """

    def __init__(self, address: str, render: Callable[[], Awaitable[bytes]]) -> None:
        self._path: Path | None = None
        self._host, self._port = "", 0
        if address.startswith("unix:"):
            self._path = Path(address.removeprefix("unix:"))
        else:
            host, separator, port = address.rpartition(":")
            if not separator or not host or not port.isdigit() or int(port) > 65535:
                raise InvalidArgument(
                    f"metrics address '{address}' is neither unix:PATH nor HOST:PORT",
                    field="metrics-address",
                )
            self._host, self._port = host.strip("[]"), int(port)
        self._render = render
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        """Listen. A Unix socket that an earlier run left behind is replaced."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)
            self._server = await asyncio.start_unix_server(self._serve, self._path)
        else:
            self._server = await asyncio.start_server(self._serve, self._host, self._port)

    async def stop(self) -> None:
        """Stop listening; a page under way is finished by its own time limit."""
        if self._server is not None:
            self._server.close()
            if self._path is not None:
                self._path.unlink(missing_ok=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            # A peer that is slow, cuts the line or sends garbage harms nobody but itself.
            with suppress(
                ConnectionError,
                TimeoutError,
                asyncio.IncompleteReadError,
                asyncio.LimitOverrunError,
            ):
                async with asyncio.timeout(_REQUEST_TIMEOUT_S):
                    head = await reader.readuntil(b"\r\n\r\n")
                    answer = await self._answer(head)
                    if not writer.is_closing():  # else uvloop's transport refuses it
                        writer.write(answer)
                        await writer.drain()
        finally:
            writer.close()

    async def _answer(self, head: bytes) -> bytes:
        words = head.split(b"\r\n", 1)[0].split(b" ")
        if len(head) > _REQUEST_LIMIT_BYTES or len(words) != 3:
            return _response("400 Bad Request", b"not an HTTP request\n")
        if words[0] not in (b"GET", b"HEAD"):
            return _response("405 Method Not Allowed", b"only GET\n")
        if words[1].split(b"?")[0] != b"/metrics":
            return _response("404 Not Found", b"the page is /metrics\n")
        return _response("200 OK", await self._render())


def _response(status: str, body: bytes) -> bytes:
    return (
        f"HTTP/1.1 {status}\r\nContent-Type: text/plain; version=0.0.4; charset=utf-8\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    ).encode() + body
