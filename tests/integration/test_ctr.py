"""Debian's stock `ctr` against our containerd: images in and out, and containers over its death."""

import contextlib
import os
import select
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

from tests.fakes.containerd import ContainerdProcess, node_directory
from tests.integration.theseus import until
from tools import image

pytestmark = pytest.mark.root


class Ctr:
    """The command, against one containerd."""

    def __init__(self, containerd):
        self.containerd = containerd

    def __call__(self, *arguments, code=0):
        done = subprocess.run(
            ["ctr", "-a", str(self.containerd.address), *arguments],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        words = f"ctr {' '.join(arguments)}: {done.stdout}{done.stderr}"
        assert done.returncode == code, words + self.containerd.log[-3000:]
        return done.stdout

    def rows(self, *arguments):
        """First words of all lines of a listing but the header."""
        return [line.split()[0] for line in self(*arguments).splitlines()[1:]]


@pytest.fixture
async def containerd():
    async with node_directory() as directory:
        running = ContainerdProcess(directory)
        async with running:
            yield running
            if running.process.returncode is None:
                assert await running.stop() == 0


@pytest.fixture
def ctr(containerd):
    if shutil.which("ctr") is None:
        pytest.fail("ctr is not installed: it comes with Debian's package containerd")
    return Ctr(containerd)


@pytest.fixture
def name(registry_address, busybox):
    image.push(busybox, registry_address, "ctr", "1")
    return f"{registry_address}/ctr:1"


@pytest.fixture
def pulled(ctr, name):
    ctr("images", "pull", "--plain-http", name)
    yield name
    for task in ctr.rows("tasks", "ls"):
        ctr("tasks", "rm", "-f", task)
    if containers := ctr.rows("containers", "ls"):
        ctr("containers", "rm", *containers)
    if images := ctr.rows("images", "ls"):
        ctr("images", "rm", "--sync", *images)
    # What nothing refers to is gone, rows and files.
    assert ctr.rows("content", "ls") == []
    assert ctr.rows("snapshots", "ls") == []
    root = ctr.containerd.directory / "root"
    assert [p for p in (root / "content").rglob("*") if p.is_file()] == []
    assert list((root / "snapshots" / "overlayfs").iterdir()) == []
    tasks = ctr.containerd.directory / "s" / "tasks"
    until(lambda: not [p for p in tasks.rglob("*") if p.is_file()])
    remove_cgroups()


def remove_cgroups():
    """ctr puts containers below a cgroup named like their namespace, which OCI runtimes leave."""
    for cgroup in Path("/sys/fs/cgroup").glob("*/default"):
        with contextlib.suppress(OSError):
            cgroup.rmdir()


async def test_an_image_comes_and_goes(ctr, pulled, tmp_path):
    assert ctr.rows("images", "ls") == [pulled]
    assert "complete" in ctr("images", "check")
    copy = pulled.removesuffix(":1") + ":2"
    ctr("images", "tag", pulled, copy)
    ctr("images", "label", copy, "a=b")
    assert ctr.rows("images", "ls", "labels.a==b") == [copy]
    ctr("images", "push", "--plain-http", copy)
    archive = tmp_path / "image.tar"
    ctr("images", "export", str(archive), pulled)
    with tarfile.open(archive) as tar:
        assert {"oci-layout", "index.json", "manifest.json"} <= set(tar.getnames())
    ctr("images", "rm", "--sync", pulled, copy)
    assert ctr.rows("content", "ls") == []
    ctr("images", "import", str(archive))
    assert ctr.rows("images", "ls") == [pulled]
    ctr("images", "rm", "--sync", pulled)
    ctr("images", "pull", "--plain-http", copy)
    place = tmp_path / "mounted"
    place.mkdir()
    ctr("images", "mount", copy, str(place))
    assert (place / "bin" / "busybox").exists()
    ctr("images", "unmount", "--rm", str(place))
    assert not os.path.ismount(place)


async def test_containers_run_to_their_end(ctr, pulled):
    assert ctr("run", "--rm", pulled, "c1", "echo", "hello") == "hello\n"
    ctr("run", "--rm", pulled, "c2", "sh", "-c", "exit 42", code=42)
    ctr("run", "--rm", pulled, "c3", "no-such-command", code=1)
    told = ctr(
        "run", "--rm", "--env", "A=b", "--cwd", "/tmp", pulled, "c4", "sh", "-c", "echo $A; pwd"
    )
    assert told == "b\n/tmp\n"
    for noun in ("tasks", "containers"):
        assert ctr.rows(noun, "ls") == []


async def test_a_detached_container_is_looked_at_paused_and_killed(ctr, pulled):
    ctr("run", "-d", "--null-io", pulled, "c", "sleep", "1000")
    assert "RUNNING" in ctr("tasks", "ls")
    assert ctr("tasks", "exec", "--exec-id", "e", "c", "echo", "inside") == "inside\n"
    ctr("tasks", "exec", "--exec-id", "e", "c", "sh", "-c", "exit 7", code=7)
    ctr("tasks", "pause", "c")
    assert "PAUSED" in ctr("tasks", "ls")
    ctr("tasks", "resume", "c")
    assert len(ctr.rows("tasks", "ps", "c")) == 1
    assert "memory" in ctr("tasks", "metrics", "c")
    ctr("containers", "label", "c", "x=y")
    assert ctr.rows("containers", "ls", "labels.x==y") == ["c"]
    ctr("tasks", "kill", "-s", "KILL", "c")
    until(lambda: "STOPPED" in ctr("tasks", "ls"))
    ctr("tasks", "rm", "c", code=0)


async def test_containers_outlive_a_kill_and_their_exits_are_known(ctr, pulled, tmp_path):
    ctr("run", "-d", "--null-io", pulled, "lives", "sleep", "1000")
    mount = f"type=bind,src={tmp_path},dst=/m,options=rbind:rw"
    script = "until test -e /m/go; do sleep 0.02; done; exit 42"
    ctr("run", "-d", "--null-io", "--mount", mount, pulled, "ends", "sh", "-c", script)
    pids = dict(line.split()[:2] for line in ctr("tasks", "ls").splitlines()[1:])
    ending = os.pidfd_open(int(pids["ends"]))
    await ctr.containerd.kill()
    (tmp_path / "go").touch()
    assert select.select([ending], [], [], 10)[0]
    os.close(ending)
    await ctr.containerd.start()
    until(lambda: "STOPPED" in ctr("tasks", "ls"))
    table = {line.split()[0]: line.split()[1:] for line in ctr("tasks", "ls").splitlines()[1:]}
    assert table == {"lives": [pids["lives"], "RUNNING"], "ends": [pids["ends"], "STOPPED"]}
    assert ctr("tasks", "exec", "--exec-id", "e", "lives", "echo", "on") == "on\n"
    done = subprocess.run(
        ["ctr", "-a", str(ctr.containerd.address), "tasks", "rm", "ends"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert "exit code 42" in done.stderr
