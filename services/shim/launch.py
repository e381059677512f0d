"""Has the runtime make a process, with its streams or its terminal, and start it."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

from services.shim.checkpoint import work_directory
from services.shim.stdio.console import ConsoleSocket

if TYPE_CHECKING:
    from collections.abc import Mapping

    from services.shim.bundle import Bundle
    from services.shim.checkpoint import CheckpointImage
    from services.shim.runtimes.runtime import Runtime
    from services.shim.stdio.process_io import ProcessIo

NO_TERMINAL = -1
_numbers = itertools.count()


async def create_init(runtime: Runtime, bundle: Bundle, streams: ProcessIo) -> tuple[int, int]:
    """Create the container; returns init's pid, and its terminal's master or NO_TERMINAL."""
    pid_file = bundle.path / "init.pid"
    if not streams.stdio.terminal:
        pid = await runtime.create(
            bundle=bundle.path, pid_file=pid_file, stdio=streams.runtime_stdio, console=""
        )
        return pid, NO_TERMINAL
    with ConsoleSocket(bundle.path, "console") as console:
        pid = await runtime.create(
            bundle=bundle.path, pid_file=pid_file, stdio=None, console=console.address
        )
        return pid, await console.receive()


async def start_init(runtime: Runtime, *, has_hooks: bool) -> None:
    """Let init run the container's command; hooks are for the runtime to run."""
    if has_hooks or not hasattr(runtime, "let_go") or not await runtime.let_go():
        await runtime.start()


async def restore_init(
    runtime: Runtime, bundle: Bundle, streams: ProcessIo, image: CheckpointImage
) -> tuple[int, int]:
    """Make the container out of its saved state; returns as :func:`create_init`."""
    pid_file = bundle.path / "init.pid"
    with work_directory(bundle, image.work) as work:
        if not streams.stdio.terminal:
            pid = await runtime.restore(
                bundle=bundle.path,
                pid_file=pid_file,
                stdio=streams.runtime_stdio,
                console="",
                image=image.path,
                work=work,
            )
            return pid, NO_TERMINAL
        with ConsoleSocket(bundle.path, "console") as console:
            pid = await runtime.restore(
                bundle=bundle.path,
                pid_file=pid_file,
                stdio=None,
                console=console.address,
                image=image.path,
                work=work,
            )
            return pid, await console.receive()


async def run_exec(
    runtime: Runtime, bundle: Bundle, streams: ProcessIo, spec: Mapping[str, Any]
) -> tuple[int, int]:
    """Run one more process; returns as :func:`create_init`."""
    # Not its id: that may be longer than the name of a file.
    name = f"exec-{next(_numbers)}"
    process_file, pid_file = bundle.path / f"{name}.json", bundle.path / f"{name}.pid"
    bundle.write(process_file.name, spec)
    try:
        if not streams.stdio.terminal:
            pid = await runtime.exec(
                process_file=process_file,
                pid_file=pid_file,
                stdio=streams.runtime_stdio,
                console="",
            )
            return pid, NO_TERMINAL
        with ConsoleSocket(bundle.path, name) as console:
            pid = await runtime.exec(
                process_file=process_file, pid_file=pid_file, stdio=None, console=console.address
            )
            return pid, await console.receive()
    finally:
        bundle.remove(process_file.name)
        bundle.remove(pid_file.name)
