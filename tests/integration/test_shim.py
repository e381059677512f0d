"""Real containers under real shims, with runc and with crun."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from google.protobuf import any_pb2

from protos.containerd.cgroups.v1 import metrics_pb2
from protos.containerd.task.v3 import shim_pb2
from protos.containerd.types import mount_pb2
from protos.containerd.types.task import task_pb2
from services.common import errors
from services.shim.runtimes.probe import probe
from tests.fakes.registry_server import FakeRegistry
from tests.fakes.shim_harness import FactoryProcess, ShimMaker

pytestmark = pytest.mark.root

# crun refuses a hybrid host; in a mount namespace without the v2 hierarchy it sees a v1 host.
WITHOUT_UNIFIED = (
    "unshare",
    "--mount",
    "sh",
    "-c",
    'umount /sys/fs/cgroup/unified 2>/dev/null; exec "$@"',
    "sh",
)
BUSYBOX = "/bin/busybox"
APPLETS = ("sh", "cat", "echo", "sleep", "true", "kill", "stty", "dd", "seq", "id", "head")


@pytest.fixture(scope="module")
def rootfs(tmp_path_factory):
    root = tmp_path_factory.mktemp("rootfs")
    for name in ("bin", "dev", "proc", "sys", "tmp", "etc", "a-directory"):
        (root / name).mkdir()
    shutil.copy(BUSYBOX, root / "bin" / "busybox")
    for applet in (*APPLETS, "mkdir", "chmod"):
        (root / "bin" / applet).symlink_to("busybox")
    (root / "bin" / "not-executable").write_text("x")
    return root


@pytest.fixture(scope="module", params=["runc", "crun"])
def runtime(request):
    return request.param


@pytest.fixture(scope="module")
def factory(runtime, tmp_path_factory):
    directory = tmp_path_factory.mktemp("factory")
    factory = FactoryProcess(directory, prefix=WITHOUT_UNIFIED if runtime == "crun" else ())
    yield factory
    assert factory.stop() == 0


@pytest.fixture
async def node(factory, runtime, rootfs, tmp_path):
    node = Node(factory, runtime, rootfs, tmp_path)
    async with node:
        yield node


class Node:
    """A shim maker with a fake containerd, and specs for real containers."""

    def __init__(self, factory, runtime, rootfs, directory: Path) -> None:
        self.maker = ShimMaker(factory, directory)
        self.registry = FakeRegistry(self.maker.registry_socket)
        self.runtime = runtime
        self.rootfs = rootfs
        self.directory = directory

    async def __aenter__(self):
        await self.registry.start()
        return self

    async def __aexit__(self, *details):
        await self.maker.__aexit__(*details)
        await self.registry.stop()

    def log_uri(self, **options) -> str:
        query = "&".join(f"{key.replace('_', '-')}={value}" for key, value in options.items())
        return f"theseus-log://{self.directory}/c.log?{query}"

    def spec(self, *arguments, terminal=False, pid_namespace=True, memory=0) -> dict:
        kinds = ["mount", "uts", "ipc", *(["pid"] if pid_namespace else [])]
        spec = {
            "ociVersion": "1.0.2",
            "process": {
                "args": list(arguments),
                "env": ["PATH=/bin"],
                "cwd": "/",
                "user": {"uid": 0, "gid": 0},
                "terminal": terminal,
            },
            "root": {"path": "rootfs"},
            "mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc"},
                {"destination": "/dev", "type": "tmpfs", "source": "tmpfs"},
                {
                    "destination": "/dev/pts",
                    "type": "devpts",
                    "source": "devpts",
                    "options": ["newinstance", "ptmxmode=0666"],
                },
            ],
            "linux": {
                "cgroupsPath": f"/theseus-test-{self.directory.name}",
                "namespaces": [{"type": kind} for kind in kinds],
                "resources": {"devices": [{"allow": True, "access": "rwm"}]},
            },
        }
        if memory:
            spec["linux"]["resources"]["memory"] = {"limit": memory, "swap": memory}
        return spec

    def mounts(self):
        """An overlay over the shared root file system."""
        upper, work = self.directory / "upper", self.directory / "work"
        upper.mkdir(exist_ok=True)
        work.mkdir(exist_ok=True)
        options = [f"lowerdir={self.rootfs}", f"upperdir={upper}", f"workdir={work}"]
        return [mount_pb2.Mount(type="overlay", source="overlay", options=options)]

    async def shim(self, *arguments, create=None, **spec):
        """A shim with a created container."""
        bundle = self.maker.bundle(self.spec(*arguments, **spec), name=self.directory.name)
        shim = await self.maker.start(bundle)
        if create is not None:
            await shim.create(
                binary=self.runtime,
                rootfs=self.mounts(),
                **{"terminal": spec.get("terminal", False), **create},
            )
        return shim


def is_mounted(shim) -> bool:
    """Whether the root file system is mounted where the shim lives."""
    return f" {shim.bundle}/rootfs " in Path(f"/proc/{shim.pid}/mountinfo").read_text()


async def test_container_runs_from_create_to_shutdown(node):
    log = node.log_uri()
    shim = await node.shim(
        "sh", "-c", "echo out; echo err >&2; exit 42", create={"stdout": log, "stderr": log}
    )
    created = await shim.state()
    assert created.status == task_pb2.CREATED
    assert is_mounted(shim)
    await shim.start()
    waited = await shim.wait()
    assert waited.exit_status == 42
    assert waited.exited_at.seconds > 0
    stopped = await shim.state()
    assert (stopped.status, stopped.exit_status, stopped.pid) == (
        task_pb2.STOPPED,
        42,
        created.pid,
    )
    pids = await shim.call("Pids", shim_pb2.PidsRequest(id=shim.id))
    assert [process.pid for process in pids.processes] == [created.pid]
    lines = [json.loads(line) for line in (node.directory / "c.log").read_text().splitlines()]
    assert sorted((line["stream"], line["log"]) for line in lines) == [
        ("stderr", "err\n"),
        ("stdout", "out\n"),
    ]
    deleted = await shim.delete()
    assert (deleted.exit_status, deleted.pid) == (42, created.pid)
    assert not is_mounted(shim)
    await node.registry.wait_for_topic("/tasks/delete")
    assert node.registry.topics() == [
        "/tasks/create",
        "/tasks/start",
        "/tasks/exit",
        "/tasks/delete",
    ]
    await shim.shutdown()
    await shim.ended()
    assert not Path(shim.request["socket"]).exists()
    for controller in ("memory", "pids", "freezer"):
        assert not Path(f"/sys/fs/cgroup/{controller}/theseus-test-{node.directory.name}").exists()


@pytest.mark.parametrize(
    ("signum", "status"), [(signal.SIGKILL, 137), (signal.SIGUSR1, 128 + signal.SIGUSR1)]
)
async def test_death_by_signal_is_128_and_the_signal(node, signum, status):
    # An init without a handler ignores all but SIGKILL, so it is sent to an exec process.
    shim = await node.shim("sleep", "1000", create={})
    await shim.start()
    await shim.exec("e", ["sleep", "1000"])
    await shim.kill(signum, exec_id="e")
    assert (await shim.wait("e")).exit_status == status
    await shim.delete("e")
    await shim.kill()
    assert (await shim.wait()).exit_status == 137
    with pytest.raises(errors.NotFound, match="process already finished"):
        await shim.kill()
    await shim.delete()


async def test_terminal_is_attached_written_and_resized(node):
    shim = await node.shim(
        "sh",
        terminal=True,
        create={"stdin": "theseus-stream:", "stdout": node.log_uri()},
    )
    await shim.start()
    async with shim.attach(output=True, input=True) as attached:
        assert attached.started.terminal
        await attached.resize(132, 43)
        await attached.write(0, b"stty size\n")
        assert b"43 132" in await attached.read_until(b"43 132")
        await attached.write(10, b"exit 3\n")
        async for response in attached:
            assert response.WhichOneof("message") in ("output", "finished")
    assert (await shim.wait()).exit_status == 3
    await shim.delete()


async def test_input_is_written_once_and_ends(node):
    shim = await node.shim("cat", create={"stdin": "theseus-stream:", "stdout": "theseus-stream:"})
    await shim.start()
    async with shim.attach(output=True, input=True) as attached:
        await attached.write(0, b"hello ")
        assert await attached.read_until(b"hello ") == b"hello "
    async with shim.attach(output=True, input=True) as attached:
        assert attached.started.input_offset == 6
        # The second half of the first piece is sent again, as after a reconnect.
        await attached.write(3, b"lo world")
        await attached.close_input()
        assert b"".join([r.output.data async for r in attached]) == b"hello world"
    assert (await shim.wait()).exit_status == 0
    await shim.delete()


async def test_exec_has_streams_and_status_of_its_own(node):
    shim = await node.shim("sleep", "1000", create={})
    init = await shim.start()
    started = await shim.exec(
        "e1",
        ["sh", "-c", "cat; echo done >&2; exit 9"],
        stdin="theseus-stream:",
        stdout="theseus-stream:",
        stderr="theseus-stream:",
    )
    assert started.pid not in (0, init.pid)
    pids = await shim.call("Pids", shim_pb2.PidsRequest(id=shim.id))
    infos = {process.pid: process.info.value for process in pids.processes}
    assert b"e1" in infos[started.pid]
    async with shim.attach(exec_id="e1", input=True) as attached:
        await attached.write(0, b"in")
        await attached.close_input()
        assert await shim.output(exec_id="e1") == (b"in", b"done\n")
    assert (await shim.wait("e1")).exit_status == 9
    assert (await shim.state("e1")).status == task_pb2.STOPPED
    await shim.delete("e1")
    with pytest.raises(errors.NotFound):
        await shim.state("e1")
    await shim.kill()
    await shim.wait()
    await shim.delete()
    await node.registry.wait_for_topic("/tasks/delete")
    topics = node.registry.topics()
    assert topics.index("/tasks/exec-added") < topics.index("/tasks/exec-started")
    assert [event.message.id for event in node.registry.of("/tasks/exit")] == ["e1", shim.id]


async def test_exec_with_a_terminal(node):
    shim = await node.shim("sleep", "1000", create={})
    await shim.start()
    script = "[ -t 0 ] && [ -t 1 ] && [ -t 2 ] && echo tty; exit 4"
    await shim.exec("t", ["sh", "-c", script], terminal=True, stdout="theseus-stream:")
    assert await shim.output(exec_id="t") == (b"tty\r\n", b"")
    assert (await shim.wait("t")).exit_status == 4
    await shim.kill()
    await shim.wait()
    await shim.delete()


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ("no-such-command", "COMMAND_NOT_FOUND"),
        ("/bin/no-such-command", "COMMAND_NOT_FOUND"),
        ("/bin/not-executable", "COMMAND_NOT_EXECUTABLE"),
        ("/a-directory", "COMMAND_NOT_EXECUTABLE"),
    ],
)
async def test_command_that_cannot_run_is_named_and_leaves_nothing(node, command, reason):
    shim = await node.shim(command)
    with pytest.raises(errors.InvalidArgument) as caught:
        await shim.create(binary=node.runtime, rootfs=node.mounts(), stdout=node.log_uri())
    assert caught.value.reason == reason
    assert not is_mounted(shim)
    with pytest.raises(errors.NotFound):
        await shim.state()
    assert node.registry.topics() == []
    # The shim is as good as new.
    (shim.bundle / "config.json").write_text(json.dumps(node.spec("true")))
    await shim.create(binary=node.runtime, rootfs=node.mounts())
    await shim.start()
    assert (await shim.wait()).exit_status == 0
    for name, arguments in (("e", [command]),):
        with pytest.raises(errors.FailedPrecondition):
            await shim.exec(name, arguments)
    await shim.delete()


async def test_exec_of_a_command_that_cannot_run(node):
    shim = await node.shim("sleep", "1000", create={})
    await shim.start()
    for number, (command, reason) in enumerate(
        [("nope", "COMMAND_NOT_FOUND"), ("/bin/not-executable", "COMMAND_NOT_EXECUTABLE")]
    ):
        exec_id = f"e{number}"
        with pytest.raises(errors.InvalidArgument) as caught:
            await shim.exec(exec_id, [command])
        assert caught.value.reason == reason
        assert (await shim.state(exec_id)).status == task_pb2.CREATED
        await shim.delete(exec_id)
    await shim.kill()
    await shim.wait()
    await shim.delete()


async def test_pause_freezes_and_kill_ends_a_frozen_container(node):
    shim = await node.shim("sleep", "1000", create={})
    await shim.start()
    await shim.call("Pause", shim_pb2.PauseRequest(id=shim.id))
    assert (await shim.state()).status == task_pb2.PAUSED
    with pytest.raises(errors.FailedPrecondition, match="cannot exec in container"):
        await shim.exec("e", ["true"])
    await shim.call("Resume", shim_pb2.ResumeRequest(id=shim.id))
    await shim.exec("e", ["true"])
    assert (await shim.wait("e")).exit_status == 0
    await shim.call("Pause", shim_pb2.PauseRequest(id=shim.id))
    await shim.kill()
    assert (await shim.wait()).exit_status == 137
    await shim.delete()


async def test_processes_left_in_a_shared_pid_namespace_are_killed(node):
    shim = await node.shim(
        "sh", "-c", "sleep 1000 & echo $!; exit 5", pid_namespace=False,
        create={"stdout": node.log_uri()},
    )  # fmt: skip
    await shim.start()
    assert (await shim.wait()).exit_status == 5
    out, _ = await shim.output()
    assert not Path(f"/proc/{int(out)}").exists()
    await shim.delete()


async def test_delete_of_a_created_container_kills_it_first(node):
    shim = await node.shim("sleep", "1000", create={})
    with pytest.raises(errors.FailedPrecondition):
        await shim.call("Pause", shim_pb2.PauseRequest(id=shim.id))
    deleted = await shim.delete()
    assert deleted.exit_status == 137
    await node.registry.wait_for_topic("/tasks/delete")
    assert node.registry.topics() == ["/tasks/create", "/tasks/exit", "/tasks/delete"]


async def test_running_container_is_not_deleted_nor_started_twice(node):
    shim = await node.shim("sleep", "1000", create={})
    await shim.start()
    with pytest.raises(errors.FailedPrecondition, match="cannot delete container"):
        await shim.delete()
    with pytest.raises(errors.FailedPrecondition, match="cannot start container"):
        await shim.start()
    with pytest.raises(errors.AlreadyExists):
        await shim.create(binary=node.runtime)
    await shim.kill()
    await shim.wait()
    with pytest.raises(errors.FailedPrecondition):
        await shim.start()
    await shim.delete()


def noting(node, name: str) -> Path:
    """The node's runtime under a name, which notes its commands."""
    program = node.directory / "bin" / name
    program.parent.mkdir()
    program.write_text(
        "#!/bin/sh\n"
        'for word; do case $word in create|start) echo $word >> "$0.calls";; esac; done\n'
        f'exec {shutil.which(node.runtime)} "$@"\n'
    )
    program.chmod(0o755)
    return program


def status_of(program: Path, shim) -> str:
    """What the runtime itself takes a container for."""
    state = json.loads((shim.bundle / "state.json").read_text())
    (container,) = state["containers"]
    command = [program, "--root", container["runtime_root"], "state", container["id"]]
    said = subprocess.run(
        command, check=True, capture_output=True, env={"PATH": os.environ["PATH"]}
    )
    return json.loads(said.stdout)["status"]


@pytest.mark.parametrize("is_known", [True, False])
async def test_the_runtimes_program_is_not_run_to_start_what_it_created(node, is_known):
    """Nor is there a difference to it; a program of another name may have more to do."""
    program = noting(node, node.runtime if is_known else "another")
    log = node.log_uri()
    shim = await node.shim("sh", "-c", "echo $$; sleep 1000")
    await shim.create(binary=str(program), rootfs=node.mounts(), stdout=log)
    assert status_of(program, shim) == "created"
    await shim.start()
    assert status_of(program, shim) == "running"
    await shim.kill()
    assert (await shim.wait()).exit_status == 137
    await shim.delete()
    assert ("start" in program.with_suffix(".calls").read_text().split()) is not is_known


async def test_hooks_are_the_runtimes_to_run(node):
    program, trace = noting(node, node.runtime), node.directory / "hooks"
    spec = node.spec("sleep", "1000")
    kinds = ("createRuntime", "poststart")
    spec["hooks"] = {
        kind: [{"path": "/bin/sh", "args": ["sh", "-c", f"echo {kind} >> {trace}"]}]
        for kind in kinds
    }
    shim = await node.maker.start(node.maker.bundle(spec, name=node.directory.name))
    await shim.create(binary=str(program), rootfs=node.mounts())
    await shim.start()
    assert trace.read_text().split() == list(kinds)
    assert "start" in program.with_suffix(".calls").read_text().split()
    await shim.kill()
    await shim.wait()
    await shim.delete()


async def test_what_died_before_its_start_is_not_started(node):
    shim = await node.shim("sleep", "1000", create={})
    os.kill((await shim.state()).pid, signal.SIGKILL)
    await shim.wait()
    with pytest.raises(errors.FailedPrecondition, match="cannot start container"):
        await shim.start()
    await shim.delete()


async def test_memory_figures_limits_and_the_oom_event(node):
    shim = await node.shim("sleep", "1000", memory=64 << 20, create={})
    await shim.start()
    answer = await shim.call("Stats", shim_pb2.StatsRequest(id=shim.id))
    assert answer.stats.type_url == "io.containerd.cgroups.v1.Metrics"
    metrics = metrics_pb2.Metrics.FromString(answer.stats.value)
    assert metrics.memory.usage.limit == 64 << 20
    assert metrics.memory.usage.usage > 0
    assert metrics.pids.current >= 1
    assert metrics.cpu.usage.total > 0
    resources = {"memory": {"limit": 32 << 20, "swap": 32 << 20}}
    await shim.call(
        "Update",
        shim_pb2.UpdateTaskRequest(
            id=shim.id, resources=any_pb2.Any(value=json.dumps(resources).encode())
        ),
    )
    answer = await shim.call("Stats", shim_pb2.StatsRequest(id=shim.id))
    assert metrics_pb2.Metrics.FromString(answer.stats.value).memory.usage.limit == 32 << 20
    await shim.exec("hog", ["dd", "if=/dev/zero", "of=/dev/null", "bs=200M", "count=1"])
    assert (await shim.wait("hog")).exit_status == 137
    await node.registry.wait_for_topic("/tasks/exit")
    topics = node.registry.topics()
    assert topics.index("/tasks/oom") < topics.index("/tasks/exit")
    await shim.kill()
    await shim.wait()
    await shim.delete()


async def test_fifos_of_a_containerd_client(node):
    paths = {name: node.directory / name for name in ("in", "out", "err")}
    for path in paths.values():
        os.mkfifo(path)
    shim = await node.shim(
        "sh", "-c", "cat; echo bye >&2",
        create={
            "stdin": str(paths["in"]), "stdout": str(paths["out"]), "stderr": str(paths["err"]),
        },
    )  # fmt: skip
    await shim.start()
    out, err = await asyncio.gather(
        asyncio.to_thread(paths["out"].open, "rb"), asyncio.to_thread(paths["err"].open, "rb")
    )
    with out, err:
        with await asyncio.to_thread(paths["in"].open, "wb") as stdin:
            stdin.write(b"x" * 100_000)
        await shim.call("CloseIO", shim_pb2.CloseIORequest(id=shim.id, stdin=True))
        assert await asyncio.to_thread(out.read) == b"x" * 100_000
        assert await asyncio.to_thread(err.read) == b"bye\n"
    await shim.wait()
    await shim.delete()


async def test_attach_resumes_from_an_offset_and_reads_the_log_behind_the_buffer(node):
    log = node.log_uri(max_size=100_000_000)
    shim = await node.shim(
        "sh", "-c", "seq 1 300000; echo end >&2", create={"stdout": log, "stderr": log}
    )
    await shim.start()
    await shim.wait()
    expected = b"".join(b"%d\n" % number for number in range(1, 300001))
    out, err = await shim.output()
    assert out == expected
    assert err == b"end\n"
    out, _ = await shim.output(offset=1_000_001)
    assert out == expected[1_000_001:]
    with pytest.raises(errors.OutOfRange):
        await shim.output(offset=len(expected) + 100)
    await shim.delete()


async def test_stream_waits_for_its_reader(node):
    shim = await node.shim("sh", "-c", "seq 1 1000000", create={"stdout": "theseus-stream:"})
    await shim.start()
    # Nobody reads: about one MiB is taken, and then the process has to wait.
    async with shim.attach(output=True) as attached:
        first = await anext(attached)
        assert first.output.data.startswith(b"1\n2\n")
    assert (await shim.state()).status == task_pb2.RUNNING
    out, _ = await shim.output(offset=2)
    assert out == b"".join(b"%d\n" % number for number in range(2, 1_000_001))
    assert (await shim.wait()).exit_status == 0
    await shim.delete()


async def test_missing_runtime_and_failing_mount_leave_nothing(node):
    shim = await node.shim("true")
    with pytest.raises(errors.FailedPrecondition, match=r"no-such-runtime.*not installed"):
        await shim.create(binary="no-such-runtime", rootfs=node.mounts())
    bad = [
        *node.mounts(),
        mount_pb2.Mount(type="no-such-fs", source="x", target="/tmp"),
    ]
    with pytest.raises(errors.FailedPrecondition, match=r"cannot mount no-such-fs.*No such device"):
        await shim.create(binary=node.runtime, rootfs=bad)
    assert not is_mounted(shim)
    for rootfs in (node.mounts(), bad):  # which is being mounted when the stream is not found
        with pytest.raises(errors.FailedPrecondition, match="/no/such/fifo"):
            await shim.create(binary=node.runtime, rootfs=rootfs, stdout="/no/such/fifo")
        assert not is_mounted(shim)


async def test_overlay_with_more_options_than_a_page(node):
    layers = []
    for number in range(60):
        layer = node.directory / f"{number:03}-{'x' * 40}"
        layer.mkdir()
        (layer / f"file-{number}").write_text("x")
        layers.append(str(layer))
    base = node.directory / "base"
    shutil.copytree(node.rootfs, base, symlinks=True)
    lower = ":".join([*layers, str(base)])
    assert len(lower) > 4096
    shim = await node.shim("sh", "-c", "cat file-0 file-59")
    mount = mount_pb2.Mount(type="overlay", source="overlay", options=[f"lowerdir={lower}", "ro"])
    await shim.create(binary=node.runtime, rootfs=[mount], stdout=node.log_uri())
    await shim.start()
    assert (await shim.wait()).exit_status == 0
    assert await shim.output() == (b"xx", b"")
    await shim.delete()


async def test_the_runtime_runs_from_sealed_memory(node):
    """So does a container's init until its start: out of the factory's copy, not one of its own."""
    shim = await node.shim("sleep", "1000", create={})
    init = Path(f"/proc/{(await shim.state()).pid}/exe")
    inherited = {fd.stat().st_ino for fd in Path(f"/proc/{shim.pid}/fd").iterdir()}
    assert str(init.readlink()) == "/memfd:runc_cloned:/proc/self/exe (deleted)"
    assert init.stat().st_ino in inherited
    await shim.delete()


async def test_compiled_seccomp_filter_holds_in_the_next_container(node):
    """The first of a profile is compiled; crun's second gets its filter, and another none of it."""
    refuse_mkdir, refuse_chmod = (
        {
            "defaultAction": "SCMP_ACT_ALLOW",
            "syscalls": [{"names": names, "action": "SCMP_ACT_ERRNO", "errnoRet": 7}],
        }
        for names in (["mkdir", "mkdirat"], ["chmod", "fchmodat"])
    )
    script = "mkdir /tmp/x; echo mkdir=$?; chmod 700 /tmp; echo chmod=$?; "
    script += "while read name value; do [ $name = Seccomp: ] && echo $name$value; done"
    script += " < /proc/self/status"
    said = []
    for number, profile in enumerate((refuse_mkdir, refuse_mkdir, refuse_chmod)):
        spec = node.spec("sh", "-c", script)
        spec["linux"]["seccomp"] = profile
        bundle = node.maker.bundle(spec, name=f"{node.directory.name}-{number}")
        shim = await node.maker.start(bundle)
        log = bundle.with_suffix(".log")
        await shim.create(
            binary=node.runtime,
            rootfs=node.mounts(),
            stdout=f"theseus-log://{log}?format=json-file",
        )
        annotations = json.loads((bundle / "config.json").read_text()).get("annotations") or {}
        await shim.start()
        await shim.wait()
        await shim.delete()
        await shim.shutdown()
        await shim.ended()
        lines = [json.loads(line)["log"].strip() for line in log.read_text().splitlines()]
        said.append((lines, "run.oci.seccomp_bpf_data" in annotations))
    held = ["mkdir=1", "chmod=0", "Seccomp:2"]
    compiled_before = node.runtime == "crun"
    assert said == [
        (held, False),
        (held, compiled_before),
        (["mkdir=0", "chmod=1", "Seccomp:2"], False),
    ]


async def test_a_checkpoint_is_taken_or_refused_with_the_reason(node, runtime, tmp_path):
    """Whether it can be taken lies with runtime, criu and kernel: the probe says so beforehand."""
    found = {one.name: one for one in probe([runtime])}[runtime]
    shim = await node.shim("sleep", "1000", create={})
    await shim.start()
    request = shim_pb2.CheckpointTaskRequest(id=shim.id, path=str(tmp_path / "image"))
    if found.checkpoints:
        await shim.call("Checkpoint", request)
        assert any((tmp_path / "image").iterdir())
    else:
        with pytest.raises(errors.FailedPrecondition) as refused:
            await shim.call("Checkpoint", request)
        obstacle = found.no_checkpoints.rpartition(" check: ")[2].partition("; ")[0]
        words = {"criu is not installed": "criu", f"{found.path} was built without it": "unknown"}
        assert words.get(obstacle, obstacle) in refused.value.message
    state = await shim.state()
    assert state.status == task_pb2.RUNNING
    await shim.kill()
    await shim.wait()
    await shim.delete()
