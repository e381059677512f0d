"""Times one run from its creation to its removal: through the daemon, and by the bare runtime.

    make bench [ARGS="--rounds 20 --json FILE"]

Everything is measured interleaved in one go, with the same image, runtime and command, since a
machine's speed drifts; what counts are the medians' ratios. It must run inside the sandbox.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from protos.theseus.engine.v1 import (
    containers_pb2,
    containers_pb2_grpc,
    images_pb2,
    images_pb2_grpc,
)
from services.common.client import connect
from tools import engine, image, registry

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    import grpc

RUNTIMES = ("runc", "crun")
TIMEOUT_S = 60.0
COMMAND = ["true"]


@dataclass(frozen=True, slots=True)
class Case:
    """One thing that is timed.

    Attributes:
        limit: name of the case that it can at best come down to; empty for a limit itself.
    """

    name: str
    once: Callable[[], Awaitable[None]]
    limit: str = ""


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="bench", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20, help="how often each case is timed")
    parser.add_argument("--json", type=Path, help="also write the figures, in seconds, to a file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="theseus-bench-") as directory:
        figures = asyncio.run(_measure(Path(directory), options.rounds))
    _print(figures)
    if options.json:
        options.json.write_text(json.dumps({name: times for (name, _), times in figures.items()}))
    return 0


async def _measure(directory: Path, rounds: int) -> dict[tuple[str, str], list[float]]:
    picture = image.busybox()
    with registry.serving(directory / "registry") as address, engine.running(directory) as running:
        image.push(picture, address, "busybox", "latest")
        reference = f"{address}/busybox:latest"
        async with connect(running.socket) as channel:
            pull = images_pb2_grpc.ImagesStub(channel).Pull
            request = images_pb2.PullImageRequest(reference=reference)
            async for _ in pull(request, timeout=TIMEOUT_S):
                pass
            cases = _cases(channel, reference, _bundle(directory / "bundle", picture))
            return await _interleave(cases, rounds)


def _cases(channel: grpc.aio.Channel, reference: str, bundle: Path) -> list[Case]:
    cases = []
    for runtime in RUNTIMES:
        limit = f"{runtime}, bare create + start + delete"
        cases.append(Case(limit, partial(_bare, runtime, bundle)))
        for network in ("none", "bridge"):
            config = containers_pb2.ContainerConfig(
                image=reference, command=COMMAND, network_mode=network, runtime=runtime
            )
            name = f"{runtime}, daemon's API, network {network}"
            cases.append(Case(name, partial(_through, channel, config), limit))
    return cases


async def _interleave(cases: Sequence[Case], rounds: int) -> dict[tuple[str, str], list[float]]:
    figures: dict[tuple[str, str], list[float]] = {(case.name, case.limit): [] for case in cases}
    for number in range(rounds + 1):
        for case in cases:
            began = time.perf_counter()
            await case.once()
            if number:  # the first round warms up
                figures[case.name, case.limit].append(time.perf_counter() - began)
    return figures


async def _through(channel: grpc.aio.Channel, config: containers_pb2.ContainerConfig) -> None:
    stub = containers_pb2_grpc.ContainersStub(channel)
    made = await stub.Create(
        containers_pb2.CreateContainerRequest(config=config), timeout=TIMEOUT_S
    )
    next_exit = containers_pb2.WaitContainerRequest(
        container=made.id, condition=containers_pb2.WaitContainerRequest.CONDITION_NEXT_EXIT
    )
    waiting = asyncio.ensure_future(stub.Wait(next_exit, timeout=TIMEOUT_S))
    await stub.Start(containers_pb2.StartContainerRequest(container=made.id), timeout=TIMEOUT_S)
    answer = await waiting
    if answer.exit.code or answer.exit.lost:
        raise RuntimeError(f"the container ended with {answer.exit}")
    await stub.Remove(containers_pb2.RemoveContainerRequest(container=made.id), timeout=TIMEOUT_S)


async def _bare(runtime: str, bundle: Path) -> None:
    name = f"bench-{time.monotonic_ns()}"
    for command in (
        ["create", "--bundle", str(bundle), name],
        ["start", name],
        ["delete", "--force", name],
    ):
        process = await asyncio.create_subprocess_exec(
            runtime,
            *command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        if await process.wait():
            raise RuntimeError(f"{runtime} {' '.join(command)} failed")


def _bundle(directory: Path, picture: image.Image) -> Path:
    root = directory / "rootfs"
    root.mkdir(parents=True)
    layer = directory / "layer.tar"
    layer.write_bytes(picture.layers[0])
    with tarfile.open(layer) as archive:
        archive.extractall(root, filter="fully_trusted")
    subprocess.run(["runc", "spec", "--bundle", str(directory)], check=True)
    config = directory / "config.json"
    spec = json.loads(config.read_text())
    spec["ociVersion"] = "1.0.2"  # crun 1.8 takes no newer
    spec["process"] |= {"terminal": False, "args": COMMAND, "env": ["PATH=/bin"]}
    config.write_text(json.dumps(spec))
    return directory


def _print(figures: dict[tuple[str, str], list[float]]) -> None:
    medians = {name: statistics.median(times) for (name, _), times in figures.items()}
    lines = [f"{'case':44} {'median ms':>9} {'min':>7} {'max':>7} {'to its limit':>13}"]
    for (name, limit), times in figures.items():
        ratio = f"{medians[name] / medians[limit]:.2f}x" if limit else ""
        row = f"{medians[name] * 1e3:9.1f} {min(times) * 1e3:7.1f} {max(times) * 1e3:7.1f}"
        lines.append(f"{name:44} {row} {ratio:>13}")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    if shutil.which("runc") is None:
        sys.exit("bench: needs runc, crun and docker-registry: use make bench")
    sys.exit(main())
