"""Debian's containerd-shim-runc-v2 under our containerd, with Debian's `ctr` as the client."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import pytest_asyncio
from google.protobuf.any_pb2 import Any as AnyMessage

from protos.containerd.events import task_pb2
from protos.theseus.journal.v1 import journal_pb2, journal_pb2_grpc
from services.common.client import connect
from tests.fakes.containerd import ContainerdProcess, node_directory
from tests.fakes.stock_shim import parent_of
from tests.integration.theseus import ended, until
from tools import image, leaks

pytestmark = [pytest.mark.root, pytest.mark.asyncio(loop_scope="module")]

PROGRAM = "/usr/bin/containerd-shim-runc-v2"
RUNTIME = "io.debian.runc.v2"
IMAGE = "docker.io/library/busybox:foreign"
NAMESPACE = "foreign"


class Node(ContainerdProcess):
    """Our containerd, with what a user would type."""

    def run(self, *arguments, **how):
        command = ["ctr", "-a", str(self.address), "-n", NAMESPACE, *map(str, arguments)]
        return subprocess.run(
            command, capture_output=True, text=True, timeout=60, check=False, **how
        )

    def ctr(self, *arguments, code=0, **how):
        done = self.run(*arguments, **how)
        words = f"ctr {' '.join(map(str, arguments))}: {done.stdout}{done.stderr}"
        assert done.returncode == code, words + self.log[-3000:]
        return done.stdout

    def detached(self, name, *command, options=()):
        self.ctr("run", "-d", "--null-io", "--runtime", RUNTIME, *options, IMAGE, name, *command)
        return self.tasks()[name][0]

    def tasks(self):
        rows = [line.split() for line in self.ctr("tasks", "ls").splitlines()[1:]]
        return {name: (int(pid), status) for name, pid, status in rows}

    def removed(self, name):
        """Exit code of a stopped task, which is removed with its container."""
        done = self.run("tasks", "rm", name)
        assert done.returncode == 0, done.stderr + self.log[-3000:]
        self.ctr("containers", "rm", name)
        _, found, code = done.stderr.partition("exit code ")
        return int(code.split()[0].rstrip(',"')) if found else 0

    async def journal(self, container):
        """(topic, event) of everything about the tasks of one container."""
        found = []
        async with connect(self.address) as channel:
            read = journal_pb2_grpc.JournalStub(channel).Read(
                journal_pb2.ReadRequest(namespace=NAMESPACE, no_follow=True), timeout=10
            )
            async for answer in read:
                entry = answer.entry
                kind = getattr(task_pb2, entry.event.type_url.rpartition(".")[2], None)
                if kind is None:
                    continue
                event = kind.FromString(entry.event.value)
                if event.container_id == container:
                    found.append((entry.topic, event))
        return found

    async def topics(self, container):
        return [topic for topic, _ in await self.journal(container)]


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def running(busybox):
    if not Path(PROGRAM).exists():
        pytest.fail(f"{PROGRAM} is not installed: it comes with Debian's package containerd")
    before = leaks.taken()
    async with node_directory() as directory:
        node = Node(
            directory, ("--runtime", f"{RUNTIME}={PROGRAM}", "--gc-deletion-threshold", "1")
        )
        async with node:
            image.write_oci_archive(busybox, directory / "image.tar", IMAGE)
            node.ctr("images", "import", directory / "image.tar")
            yield node
            assert await node.stop() == 0
        assert str(directory) not in Path("/proc/self/mounts").read_text()
    until(lambda: not [trace for trace in leaks.taken().beyond(before) if "processes" in trace])
    leaks.clear(before)


@pytest_asyncio.fixture(loop_scope="module")
async def node(running):
    yield running
    if running.process.returncode is not None:
        await running.start()
    assert running.tasks() == {}
    assert running.ctr("containers", "ls", "-q") == ""
    tasks = running.directory / "s" / "tasks" / NAMESPACE
    until(lambda: not tasks.exists() or not list(tasks.iterdir()))


async def test_a_container_runs_from_create_to_delete(node):
    run = ["run", "--rm", "--runtime", RUNTIME]
    assert node.ctr(*run, IMAGE, "first", "echo", "hello") == "hello\n"
    done = node.run(*run, IMAGE, "first", "sh", "-c", "echo out; echo err >&2; exit 42")
    assert (done.stdout, done.stderr, done.returncode) == ("out\n", "err\n", 42)
    assert node.ctr("run", "--rm", "--runtime", PROGRAM, IMAGE, "first", "echo", "path") == "path\n"
    topics = ["/tasks/create", "/tasks/start", "/tasks/exit", "/tasks/delete"]
    assert await node.topics("first") == topics * 3


async def test_a_shim_that_cannot_start_the_container_leaves_nothing(node):
    done = node.run("run", "--rm", "--runtime", RUNTIME, IMAGE, "c", "no-such-command")
    assert done.returncode == 1
    assert "no-such-command" in done.stderr


async def test_a_runtime_that_is_not_there_is_told(node):
    done = node.run("run", "--rm", "--runtime", "io.containerd.none.v1", IMAGE, "c", "true")
    assert "there is no containerd-shim-none-v1 in the PATH: not found" in done.stderr
    done = node.run("run", "--rm", "--runtime", "/bin/none", IMAGE, "c", "true")
    assert "runtime '/bin/none' cannot be executed" in done.stderr
    done = node.run("run", "--rm", "--runtime", "/bin/false", IMAGE, "c", "true")
    assert "'/bin/false start' failed for 'c' with exit code 1" in done.stderr
    done = node.run("run", "--rm", "--runtime", "/bin/echo", IMAGE, "c", "true")
    assert "'/bin/echo start' printed no Unix socket's address" in done.stderr


async def test_the_program_that_shims_publish_by_reaches_the_journal(node):
    program = str(Path(sys.executable).with_name("theseus-containerd"))
    command = [program, "--address", str(node.address), "publish", "--topic", "/tasks/oom"]
    event = task_pb2.TaskOOM(container_id="told").SerializeToString()
    message = AnyMessage(type_url="containerd.events.TaskOOM", value=event).SerializeToString()
    for data, namespace, code, words in (
        (message, NAMESPACE, 0, b""),
        (b"", NAMESPACE, 1, b"no google.protobuf.Any"),
        (message, "not/a/name", 1, b"malformed"),
    ):
        done = subprocess.run(
            [*command, "--namespace", namespace],
            input=data,
            capture_output=True,
            timeout=30,
            check=False,
        )
        assert done.returncode == code, done.stderr
        assert words in done.stderr
    assert await node.topics("told") == ["/tasks/oom"]


async def test_a_container_is_looked_at_paused_and_killed(node):
    pid = node.detached("looked", "sleep", "1000")
    assert node.tasks() == {"looked": (pid, "RUNNING")}
    assert node.ctr("tasks", "exec", "--exec-id", "e", "looked", "echo", "inside") == "inside\n"
    node.ctr("tasks", "exec", "--exec-id", "e", "looked", "sh", "-c", "exit 7", code=7)
    assert node.ctr("tasks", "exec", "--exec-id", "e", "looked", "cat", input="typed") == "typed"
    node.ctr("tasks", "exec", "-d", "--exec-id", "d", "looked", "sleep", "1000")
    assert len(node.ctr("tasks", "ps", "looked").splitlines()) == 3
    node.ctr("tasks", "pause", "looked")
    assert node.tasks()["looked"] == (pid, "PAUSED")
    node.ctr("tasks", "resume", "looked")
    assert "memory.usage_in_bytes" in node.ctr("tasks", "metrics", "looked")
    node.ctr("tasks", "kill", "-s", "KILL", "looked")
    ended(pid)
    until(lambda: node.tasks()["looked"] == (pid, "STOPPED"))
    assert node.removed("looked") == 137
    topics = await node.topics("looked")
    assert topics.count("/tasks/exec-started") == 4
    assert {"/tasks/paused", "/tasks/resumed"} <= set(topics)


async def test_exits_are_known_over_a_kill_of_containerd(node, tmp_path):
    codes = {"e1": 7, "e2": 0, "e3": 99}
    mount = ["--mount", f"type=bind,src={tmp_path},dst=/m,options=rbind:rw"]
    script = "until test -e /m/go; do sleep 0.05; done; exit"
    pids = {
        name: node.detached(name, "sh", "-c", f"{script} {code}", options=mount)
        for name, code in codes.items()
    }
    survivor = node.detached("lives", "sleep", "1000")
    await node.kill()
    (tmp_path / "go").touch()
    for pid in pids.values():
        ended(pid)
    await node.start()
    found = node.tasks()
    assert found.pop("lives") == (survivor, "RUNNING")
    assert found == {name: (pid, "STOPPED") for name, pid in pids.items()}
    for name, code in codes.items():
        [exit] = [event for topic, event in await node.journal(name) if topic == "/tasks/exit"]
        assert (exit.exit_status, exit.pid) == (code, pids[name])
    assert {name: node.removed(name) for name in codes} == codes
    assert node.ctr("tasks", "exec", "--exec-id", "e", "lives", "echo", "on") == "on\n"
    node.ctr("tasks", "kill", "-s", "KILL", "lives")
    ended(survivor)
    assert node.removed("lives") == 137


async def test_a_dead_shim_is_cleaned_up_after_and_its_container_ended(node):
    pid = node.detached("c", "sleep", "1000")
    ran = node.detached("ran", "sh", "-c", "exit 5")
    ended(ran)
    until(lambda: node.tasks()["ran"] == (ran, "STOPPED"))
    for name in ("c", "ran"):
        record = node.directory / "s" / "tasks" / NAMESPACE / name / "shim.json"
        os.kill(json.loads(record.read_text())["pid"], signal.SIGKILL)
    ended(pid)
    until(lambda: node.tasks() == {"c": (pid, "STOPPED"), "ran": (ran, "STOPPED")})
    assert (node.removed("c"), node.removed("ran")) == (137, 5)


async def test_a_shim_that_died_while_containerd_was_away_is_cleaned_up_after(node):
    pid = node.detached("c", "sleep", "1000")
    shim = parent_of(pid)
    await node.kill()
    os.kill(shim, signal.SIGKILL)
    ended(shim)
    await node.start()
    ended(pid)
    until(lambda: node.tasks()["c"] == (pid, "STOPPED"))
    assert node.removed("c") == 137


async def test_containers_of_a_pod_share_a_shim_that_outlives_the_first(node):
    pod = ["--annotation", "io.kubernetes.cri.sandbox-id=pod"]
    first = node.detached("pod", "sleep", "1000", options=pod)
    second = node.detached("app", "sleep", "1000", options=pod)
    shim = parent_of(first)
    assert parent_of(second) == shim
    for name, pid in (("app", second), ("pod", first)):
        node.ctr("tasks", "kill", "-s", "KILL", name)
        ended(pid)
        assert node.removed(name) == 137
    ended(shim)
