"""``version`` and ``info``."""

from __future__ import annotations

import platform
import sys
from typing import TYPE_CHECKING

from protos.theseus.engine.v1 import system_pb2 as pb
from services.cli import table
from services.cli.commands import Command
from services.common import VERSION

if TYPE_CHECKING:
    from argparse import Namespace

    from services.cli.engine import Engine
    from services.cli.parser import Parser


def _no_arguments(parser: Parser) -> None:
    parser.words("nothing", at_most=0)


async def _version(engine: Engine, options: Namespace) -> int:
    del options
    sys.stdout.write(
        f"Client:\n Version:     {VERSION}\n Python:      {platform.python_version()}\n"
    )
    sys.stdout.flush()
    answer = await engine.call(engine.system.Version, pb.VersionRequest())
    sys.stdout.write(
        f"\nServer:\n Version:     {answer.version}\n Python:      {answer.python}\n"
        f" containerd:  {answer.containerd or 'does not answer'}\n Kernel:      {answer.kernel}\n"
    )
    return 0


async def _info(engine: Engine, options: Namespace) -> int:
    del options
    info = await engine.call(engine.system.Info, pb.InfoRequest())
    usable = [runtime.name for runtime in info.runtimes if runtime.usable]
    lines = {
        "Containers": str(info.containers),
        " Running": str(info.running),
        "Images": str(info.images),
        "Root Dir": info.root,
        "State Dir": info.state,
        "containerd": "ready" if info.containerd_ready else "does not answer",
        "Snapshotter": info.snapshotter,
        "Runtimes": " ".join(usable),
        "Default Runtime": info.default_runtime,
        "Cgroups": info.cgroup_layout,
        "Bridge": f"{info.bridge} {info.bridge_subnet}".strip(),
        "Kernel Version": info.kernel,
        "Operating System": info.operating_system,
        "CPUs": str(info.cpus),
        "Total Memory": table.size(info.memory_bytes),
    }
    sys.stdout.writelines(f"{key}: {value}\n" for key, value in lines.items())
    for runtime in info.runtimes:
        if not runtime.usable:
            sys.stdout.write(f"WARNING: runtime {runtime.name} is not usable: {runtime.reason}\n")
    sys.stdout.writelines(f"WARNING: {sentence}\n" for sentence in info.warnings)
    return 0


COMMANDS = {
    "version": Command(_no_arguments, _version),
    "info": Command(_no_arguments, _info),
}
