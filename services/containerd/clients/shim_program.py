"""Runs the programs of shims that others wrote, by upstream's protocol.

``start`` makes a shim, or finds the one of the container's pod, and prints where it serves. On its
standard input it is told the runtime options (``google.protobuf.Any``) or, since 2.3, a message
that holds them: a shim of 2.3 refuses the former before it does anything, and is then asked anew.
``delete`` cleans up after a shim that is dead, and prints how its container ended; what it prints
is a number made up by the shim where it does not know, so it is not read.
"""

from __future__ import annotations

import asyncio
import json
import os
from typing import TYPE_CHECKING, Any

import structlog
from google.protobuf.message import DecodeError

from protos.containerd.runtime.bootstrap.v1 import bootstrap_pb2
from services.common import VERSION
from services.common.errors import DeadlineExceeded
from services.containerd.rpc.encoding import to_any
from services.containerd.tasks.line import ShimStartFailed

if TYPE_CHECKING:
    from pathlib import Path

    from services.containerd.tasks.bundle import Bundle
    from services.containerd.typed import TypedValue

log = structlog.get_logger(__name__)

_DELETE_S = 30.0
_OUTPUT_MAX = 2000
_VERSIONS = (2, 3)
_REFUSAL = b"deprecated API"
"""In the words of a shim since 2.3 that was told what those before it are."""


class ShimPrograms:
    """Implements :class:`services.containerd.tasks.foreign.ShimPrograms`.

    Args:
        address: containerd's gRPC socket; events go to the ttrpc socket beside it.
        publisher: the program that publishes an event for a shim that speaks neither.
        log_level: of containerd; shims know only ``debug``.
    """

    def __init__(self, *, address: Path, publisher: str, log_level: str) -> None:
        self._address = address
        self._publisher = publisher
        self._debug = log_level == "debug"
        self._modern: set[str] = set()

    async def start(
        self, binary: str, bundle: Bundle, options: TypedValue | None, *, timeout_s: float
    ) -> str:
        """As there."""
        told = self._params(bundle, options) if binary in self._modern else _legacy(options)
        code, out, err = await self._run(binary, bundle, "start", told, timeout_s=timeout_s)
        if code and _REFUSAL in err and binary not in self._modern:
            self._modern.add(binary)
            told = self._params(bundle, options)
            code, out, err = await self._run(binary, bundle, "start", told, timeout_s=timeout_s)
        if code:
            said = (err or out).decode(errors="replace").strip()[-_OUTPUT_MAX:]
            raise ShimStartFailed(
                f"'{binary} start' failed for '{bundle.id}' with exit code {code}: {said}"
            )
        return address_of(out, binary)

    async def delete(self, binary: str, bundle: Bundle) -> None:
        """As there."""
        arguments = ("-bundle", str(bundle.path))
        try:
            code, _, err = await self._run(
                binary, bundle, "delete", b"", arguments, timeout_s=_DELETE_S
            )
        except (ShimStartFailed, DeadlineExceeded) as error:
            log.error("shim is not cleaned up after", container=bundle.id, reason=error.message)
            return
        if code:
            said = err.decode(errors="replace").strip()[-_OUTPUT_MAX:]
            log.warning("shim's delete failed", container=bundle.id, code=code, output=said)

    def _params(self, bundle: Bundle, options: TypedValue | None) -> bytes:
        """What a shim since 2.3 is told."""
        params = bootstrap_pb2.BootstrapParams(
            instance_id=bundle.id,
            namespace=bundle.namespace,
            log_level=bootstrap_pb2.LOG_LEVEL_DEBUG
            if self._debug
            else bootstrap_pb2.LOG_LEVEL_INFO,
            containerd_version=VERSION,
            containerd_grpc_address=str(self._address),
            containerd_ttrpc_address=f"{self._address}.ttrpc",
            containerd_binary=self._publisher,
        )
        if options is not None:
            params.extensions.add(value=to_any(options))
        return params.SerializeToString()

    async def _run(
        self,
        binary: str,
        bundle: Bundle,
        verb: str,
        told: bytes,
        arguments: tuple[str, ...] = (),
        *,
        timeout_s: float,
    ) -> tuple[int, bytes, bytes]:
        argv = [
            binary,
            *("-namespace", bundle.namespace, "-address", str(self._address)),
            *("-publish-binary", self._publisher, "-id", bundle.id),
            *arguments,
            *(["-debug"] if self._debug else []),
            verb,
        ]
        environment = {
            **os.environ,
            "GOMAXPROCS": "2",
            "MAX_SHIM_VERSION": str(max(_VERSIONS)),
            "TTRPC_ADDRESS": f"{self._address}.ttrpc",
            "GRPC_ADDRESS": str(self._address),
            "NAMESPACE": bundle.namespace,
        }
        try:
            process = await asyncio.create_subprocess_exec(
                *argv,
                cwd=bundle.path,
                env=environment,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                start_new_session=True,
            )
        except OSError as error:
            raise ShimStartFailed(f"cannot execute {binary}: {error.strerror}") from error
        try:
            async with asyncio.timeout(timeout_s):
                out, err = await process.communicate(told)
        except TimeoutError:
            raise DeadlineExceeded(
                f"'{binary} {verb}' for '{bundle.id}' did not end within {timeout_s:g} s"
            ) from None
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        assert process.returncode is not None
        return process.returncode, out, err


def address_of(said: bytes, binary: str) -> str:
    """The address of a shim, with protocol and version, out of what its ``start`` printed.

    That is a message since 2.3, JSON since 1.7, and before that the bare address of a ttrpc socket.

    Raises:
        ShimStartFailed: it is none of them, or of a version that we do not speak.
    """
    found: dict[str, Any] = {}
    text = said.decode(errors="replace").strip()
    try:
        parsed = json.loads(text)
        found = parsed if isinstance(parsed, dict) else {}
    except ValueError:
        result = _result(said)
        if result is not None:
            found = {
                "version": result.version,
                "address": result.address,
                "protocol": result.protocol,
            }
    version, protocol = found.get("version", 2), str(found.get("protocol", "ttrpc")).lower()
    address = str(found.get("address") or ("" if found else text))
    if version not in _VERSIONS or protocol not in ("ttrpc", "grpc"):
        raise ShimStartFailed(
            f"'{binary} start' wants version {version} over {protocol}: only versions 2 and 3 over "
            "ttrpc and grpc are spoken here"
        )
    path = address.removeprefix("unix://")
    if not path.startswith("/"):
        raise ShimStartFailed(f"'{binary} start' printed no Unix socket's address: {text[:200]!r}")
    return f"{protocol}+unix://{path}?version={version}"


def _result(said: bytes) -> bootstrap_pb2.BootstrapResult | None:
    try:
        result = bootstrap_pb2.BootstrapResult.FromString(said)
    except DecodeError:
        return None
    return result if result.version and result.address else None


def _legacy(options: TypedValue | None) -> bytes:
    """What a shim before 2.3 is told."""
    message = to_any(options)
    return b"" if message is None else message.SerializeToString()
