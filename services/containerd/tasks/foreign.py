"""Shims that others wrote: how a runtime's name leads to a program, and how that is started.

A runtime's name that is not one of ours names a program as upstream has it: an absolute path, or
``some.prefix.NAME.VERSION`` for ``containerd-shim-NAME-VERSION`` in the PATH; the configuration may
say another path for a name. Such a shim does not register. It is found again by what shim.json
says, is asked what happened meanwhile, and publishes its events (see ``rpc/shim_events.py``).

The bundle has two things more than for our own shim: ``work/``, and ``log``, which the shim opens
for its messages. Upstream makes that a FIFO; a file serves as well, and no reader has to outlive
anybody.
"""

from __future__ import annotations

import asyncio
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from services.common import linux
from services.common.errors import InvalidArgument, NotFound
from services.containerd.tasks.bundle import Bundle
from services.containerd.tasks.processes import ProcessId
from services.containerd.tasks.shim import ShimAddress

if TYPE_CHECKING:
    from collections.abc import Mapping

    from services.containerd.tasks.shim import ShimConnector, ShimRequest
    from services.containerd.typed import TypedValue


class ShimPrograms(Protocol):
    """Runs the programs of shims."""

    async def start(
        self, binary: str, bundle: Bundle, options: TypedValue | None, *, timeout_s: float
    ) -> str:
        """Start a shim; returns its address, with protocol and version.

        Raises:
            ShimStartFailed: it could not, or what it says makes no sense.
            DeadlineExceeded: it was not ready in time; it may come up later.
        """

    async def delete(self, binary: str, bundle: Bundle) -> None:
        """Have the program clean up after a shim that is dead. Never raises."""


class ForeignRuntimes:
    """Finds and starts them.

    Args:
        programs: runs them.
        connect: makes the way to a shim.
        paths: programs by runtime name, where the configuration says.
    """

    def __init__(
        self,
        programs: ShimPrograms,
        connect: ShimConnector,
        paths: Mapping[str, Path] | None = None,
    ) -> None:
        self._programs = programs
        self._connect = connect
        self._paths = dict(paths or {})

    def launcher(self, runtime: str) -> ForeignLauncher:
        """Who starts shims for a runtime.

        Raises:
            InvalidArgument: that is no name of a runtime.
            NotFound: its program is not here.
        """
        return ForeignLauncher(self._find(runtime), self._programs, self._connect)

    def _find(self, runtime: str) -> str:
        path = self._paths.get(runtime)
        if path is None and runtime.startswith("/"):
            path = Path(runtime)
        if path is not None:
            if not os.access(path, os.X_OK) or path.is_dir():
                raise NotFound(
                    f"runtime '{runtime}' cannot be executed: {path}", resource=("runtime", runtime)
                )
            return str(path)
        name = program_name(runtime)
        found = shutil.which(name)
        if found is None:
            raise NotFound(
                f"runtime '{runtime}' is not here: there is no {name} in the PATH",
                resource=("runtime", runtime),
            )
        return str(Path(found).absolute())


class ForeignLauncher:
    """Implements ``ShimLauncher`` with the program ``binary``."""

    def __init__(self, binary: str, programs: ShimPrograms, connect: ShimConnector) -> None:
        self.binary = binary
        self._programs = programs
        self._connect = connect

    async def start_shim(self, request: ShimRequest, *, timeout_s: float = 30.0) -> ShimAddress:
        """As ``ShimLauncher.start_shim``."""
        bundle = Bundle(request.namespace, request.id, request.bundle)
        await asyncio.to_thread(_furnish, bundle)
        address = await self._programs.start(
            self.binary, bundle, request.options, timeout_s=timeout_s
        )
        shim = self._connect(namespace=request.namespace, container_id=request.id, address=address)
        try:
            info = await shim.connect()
        finally:
            await shim.close()
        start_time = await asyncio.to_thread(linux.process_start_time, info.shim_pid)
        process = ProcessId(info.shim_pid, start_time or 0)
        # A start of containerd that finds no pid asks the address file, which the shim wrote.
        await asyncio.to_thread(
            bundle.complete, pid=process.pid, start_time=process.start_time, address=address
        )
        return ShimAddress(process, address, info.version)


def program_name(runtime: str) -> str:
    """The program that upstream looks for.

    Raises:
        InvalidArgument: that is no name of a runtime.
    """
    parts = runtime.split(".")
    if "/" in runtime or len(parts) < 2 or not (parts[0] and parts[-2] and parts[-1]):
        raise InvalidArgument(
            f"runtime '{runtime}' is neither a name such as io.containerd.runc.v2 nor the absolute "
            "path of a shim's program",
            field="runtime",
        )
    return f"containerd-shim-{parts[-2]}-{parts[-1]}"


def left_address(bundle: Bundle) -> str:
    """Where a shim of before 2.3 serves of which shim.json says nothing; empty: nowhere. Blocks."""
    try:
        address = (bundle.path / "address").read_text().strip()
    except OSError:
        return ""
    path = address.removeprefix("unix://")
    return f"ttrpc+unix://{path}?version=2" if path.startswith("/") else ""


def socket_of(address: str) -> Path:
    """The socket of an address that a launcher gave."""
    return Path(address.partition("://")[2].partition("?")[0])


def _furnish(bundle: Bundle) -> None:
    (bundle.path / "work").mkdir(mode=0o711, exist_ok=True)
    (bundle.path / "log").touch(mode=0o600)
