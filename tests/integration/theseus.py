"""The `theseus` command against a real engine, and ways to look below it."""

import asyncio
import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from dataclasses import dataclass

from protos.containerd.services.containers.v1 import containers_pb2, containers_pb2_grpc
from protos.containerd.services.content.v1 import content_pb2, content_pb2_grpc
from protos.containerd.services.images.v1 import images_pb2, images_pb2_grpc
from protos.containerd.services.snapshots.v1 import snapshots_pb2, snapshots_pb2_grpc
from services.common.client import connect
from tools import leaks

CLI = [sys.executable, "-m", "services.cli"]
CALL_S = 40
BRIDGE = "ttest0"
GATEWAY = "10.99.0.1"


@dataclass(frozen=True)
class Result:
    """What a command printed and how it ended."""

    code: int
    out: str
    err: str


class Theseus:
    """The `theseus` command against one engine, and what is below that."""

    def __init__(self, engine, address):
        self.engine = engine
        self.address = address
        self.image = f"{address}/busybox:latest"
        self.environment = {**os.environ, "THESEUS_HOST": f"unix://{engine.socket}"}

    def __call__(self, *arguments, stdin="", timeout=CALL_S):
        """Run a command to its end."""
        done = subprocess.run(
            [*CLI, *arguments],
            input=stdin,
            capture_output=True,
            text=True,
            env=self.environment,
            timeout=timeout,
            check=False,
        )
        return Result(done.returncode, done.stdout, done.stderr)

    def ok(self, *arguments, **kwargs):
        """Run a command that must succeed; returns what it printed, without the last newline."""
        result = self(*arguments, **kwargs)
        assert result.code == 0, f"theseus {' '.join(arguments)}: {result}"
        return result.out.removesuffix("\n")

    def run(self, *arguments, **kwargs):
        """`theseus run --rm` of the busybox image; options end at `--`, or there are none."""
        options, command = _split(arguments)
        return self("run", "--rm", *options, self.image, *command, **kwargs)

    def start(self, *arguments):
        """`theseus run -d` of the busybox image; returns the id."""
        options, command = _split(arguments)
        return self.ok("run", "-d", *options, self.image, *command)

    def spawn(self, *arguments, **kwargs):
        """Start a command without waiting for it."""
        streams = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        return subprocess.Popen(
            [*CLI, *arguments], env=self.environment, **(streams | {"text": True} | kwargs)
        )

    def inspect(self, name):
        """A container or an image as JSON."""
        return json.loads(self.ok("inspect", name))[0]

    def pid(self, name):
        """Process id of a container's init."""
        return self.inspect(name)["State"]["Pid"]

    # What is below

    def tier_pid(self, tier):
        """Process id of `containerd` or `daemon`."""
        return int((self.engine.root / tier / "lock").read_text())

    def kill_tiers(self, *tiers):
        """SIGKILL; returns when they have ended, and `theseus up` may have begun to start them."""
        descriptors = [os.pidfd_open(self.tier_pid(tier)) for tier in tiers]
        for descriptor in descriptors:
            signal.pidfd_send_signal(descriptor, signal.SIGKILL)
        for descriptor in descriptors:
            assert select.select([descriptor], [], [], 10)[0]
            os.close(descriptor)

    @contextlib.contextmanager
    def down(self, *tiers):
        """Keep tiers dead inside the block: `theseus up` is stopped meanwhile."""
        up = self.engine.process
        up.send_signal(signal.SIGSTOP)
        try:
            self.kill_tiers(*tiers)
            yield
        finally:
            up.send_signal(signal.SIGCONT)

    def wait_until_up(self):
        """Both tiers answer."""
        until(lambda: "containerd: ready" in self("info").out, timeout=20)

    def records(self):
        """All that an engine may keep of containers, by kind."""
        found = asyncio.run(self._in_containerd())
        found["containers"] = set(self.ok("ps", "-aq", "--no-trunc").split())
        state, root = self.engine.state, self.engine.root
        for place in (
            state / "daemon" / "netns",
            state / "containerd" / "tasks" / "theseus",
            state / "containerd" / "s",
            root / "daemon" / "containers",
            root / "daemon" / "volumes",
            root / "containerd" / "content" / "ingest",
        ):
            found[str(place)] = {p.name for p in place.iterdir()} if place.is_dir() else set()
        return found

    async def _in_containerd(self):
        async with connect(self.engine.containerd, namespace="theseus") as channel:
            containers = await containers_pb2_grpc.ContainersStub(channel).List(
                containers_pb2.ListContainersRequest(), timeout=10
            )
            pictures = await images_pb2_grpc.ImagesStub(channel).List(
                images_pb2.ListImagesRequest(), timeout=10
            )
            snapshots, blobs = set(), set()
            request = snapshots_pb2.ListSnapshotsRequest(snapshotter="overlayfs")
            async for answer in snapshots_pb2_grpc.SnapshotsStub(channel).List(request, timeout=10):
                snapshots |= {info.name for info in answer.info}
            listing = content_pb2_grpc.ContentStub(channel).List(
                content_pb2.ListContentRequest(), timeout=10
            )
            async for answer in listing:
                blobs |= {info.digest for info in answer.info}
        return {
            "containerd's containers": {found.id for found in containers.containers},
            "images": {found.name for found in pictures.images},
            "snapshots": snapshots,
            "blobs": blobs,
        }

    def residue(self):
        """Records, processes, mounts, links, cgroups, tables: all that could be left behind."""
        return self.records(), leaks.taken()

    @contextlib.contextmanager
    def leaves_nothing(self):
        """What the block makes must be gone soon after its end."""
        records, traces = self.residue()
        yield
        deadline = time.monotonic() + 10
        while left := self._beyond(records, traces):
            assert time.monotonic() < deadline, f"left behind: {left}"
            time.sleep(0.05)

    def _beyond(self, records, traces):
        now, there = self.residue()
        left = [f"{kind}: {found - records[kind]}" for kind, found in now.items()]
        # Not one of these is a thing that a request makes.
        own = ("services.c", "services.d", "theseus-", "setpriv")
        left = [line for line in left if not line.endswith("set()")]
        return left + [
            line
            for line in there.beyond(traces)
            if not (line.startswith("processes") and any(word in line for word in own))
        ]


def _split(arguments):
    if "--" not in arguments:
        return (), arguments
    place = arguments.index("--")
    return arguments[:place], arguments[place + 1 :]


def until(condition, timeout=15.0, pause=0.03):
    """Wait for what another process does; returns the first true value."""
    deadline = time.monotonic() + timeout
    while not (value := condition()):
        assert time.monotonic() < deadline, "it did not come to that in time"
        time.sleep(pause)
    return value


def ended(pid, timeout=15):
    """Wait for the end of a process that need not be ours."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        assert select.select([descriptor], [], [], timeout)[0], f"process {pid} runs on"
    finally:
        os.close(descriptor)
