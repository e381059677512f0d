"""A disk that is filled to its last byte under a running engine: what takes away still works."""

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from services.common.disk import free_bytes
from tests.fakes.disk import fill, small_disk
from tests.integration.theseus import Theseus, until
from tools import engine as engines
from tools import image

pytestmark = pytest.mark.root

MIB = 1 << 20
OPTIONS = ["--bridge-name", "ttest3", "--bridge-subnet", "172.31.3.0/24"]
MKFS = ("mkfs.ext4", "-q", "-m", "0", "-E", "lazy_itable_init=0,lazy_journal_init=0")


@pytest.fixture
def disk():
    with (
        tempfile.TemporaryDirectory(prefix="thfull", dir="/tmp") as directory,
        small_disk(Path(directory), *MKFS, size_bytes=160 * MIB, name="root") as root,
    ):
        yield root


@pytest.fixture
def full(disk, registry_address, busybox):
    """An engine with two containers and an image on a disk that is full."""
    image.push(busybox, registry_address, "busybox", "latest")
    with engines.running(disk.parent, OPTIONS) as engine:
        theseus = Theseus(engine, registry_address)
        theseus.ok("pull", theseus.image)
        theseus.ok("volume", "create", "vol")
        theseus.ok(
            *("run", "-d", "--name", "runs", "--network", "none", "-v", "vol:/v", theseus.image),
            *("sh", "-c", "echo hello; sleep 1000"),
        )
        theseus.ok("run", "-d", "--name", "ends", "--network", "none", theseus.image, "true")
        until(lambda: theseus.inspect("ends")["State"]["Status"] == "exited")
        until((disk / "containerd/reserve").exists)
        until((disk / "daemon/reserve").exists)
        fill(disk / "filler")
        assert free_bytes(disk) == 0
        yield theseus
        if theseus.engine.process.poll() is None:
            for name in theseus("ps", "-aq").out.split():
                theseus("rm", "-f", name)


def check(disk):
    done = subprocess.run(
        [sys.executable, "-m", "services.containerd", "check", "--root", disk / "containerd"],
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_whole_way_down(full, disk):
    theseus = full
    assert "runs" in theseus.ok("ps", "-a")
    assert theseus.ok("logs", "runs") == "hello"
    assert theseus.inspect("runs")["State"]["Status"] == "running"
    assert "busybox" in theseus.ok("images")
    # What needs room fails, or gets it, and leaves nothing half done.
    theseus("create", "--name", "another", "--network", "none", theseus.image, "true")
    theseus("rm", "-f", "another")
    # Neither tier needs room to come back.
    theseus.kill_tiers("containerd", "daemon")
    theseus.wait_until_up()
    assert "runs" in theseus.ok("ps")
    # Stopping and removing, all the way.
    theseus.ok("stop", "-t", "0", "runs")
    theseus.ok("rm", "runs", "ends")
    theseus.ok("volume", "rm", "vol")
    theseus.ok("rmi", theseus.image)
    assert theseus.ok("ps", "-aq") == theseus.ok("images", "-q") == ""
    content = disk / "containerd/content/blobs"
    until(lambda: not [path for path in content.rglob("*") if path.is_file()])
    until(lambda: not list((disk / "containerd/snapshots/overlayfs").iterdir()))
    # That has made room, but not enough to bring an image in.
    refused = theseus("pull", theseus.image)
    assert (refused.code, "must stay free" in refused.err) == (1, True), refused
    (disk / "filler").unlink()
    theseus.ok("run", "--rm", "--network", "none", theseus.image, "true")
    theseus.engine.process.terminate()
    theseus.engine.process.wait(timeout=30)
    check(disk)
