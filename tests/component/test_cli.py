"""The `theseus` command as a process of its own, against a daemon that plays containers."""

import asyncio
import json
import os
import signal

import pytest

from protos.theseus.engine.v1 import images_pb2
from services.common import errors
from tests.fakes.cli import Cli, Result, until
from tests.fakes.daemon import FakeDaemon


@pytest.fixture
async def daemon(tmp_path):
    fake = FakeDaemon(tmp_path / "d.sock")
    fake.images["busybox"] = images_pb2.Image(
        id="sha256:" + "1" * 64,
        references=["docker.io/library/busybox:latest", "127.0.0.1:5000/a/b:2"],
        digest="sha256:" + "2" * 64,
        size_bytes=1_234_567,
        platform="linux/amd64",
        config=b'{"config": {"Cmd": ["sh"]}, "rootfs": {"diff_ids": ["sha256:9"]}}',
    )
    await fake.start()
    yield fake
    await fake.close()


@pytest.fixture
def cli(daemon):
    return Cli(daemon.socket)


async def running(daemon):
    await until(lambda: daemon.asked("Start"))
    return next(reversed(daemon.containers.values())).process


async def test_run_prints_output_and_exits_with_the_containers_code(cli, daemon):
    assert await cli("run", "busybox", "echo", "hello") == Result(0, b"hello\n", b"")
    assert await cli("run", "busybox", "exit", "7") == Result(7, b"", b"")
    assert await cli("run", "busybox", "err", "oops") == Result(0, b"", b"oops\n")


async def test_run_attaches_before_it_starts(cli, daemon):
    await cli("run", "busybox", "echo", "x")
    names = [name for name, _ in daemon.requests]
    assert names.index("Create") < names.index("Attach") < names.index("Start")


async def test_run_passes_options_on(cli, daemon, tmp_path):
    (tmp_path / "env").write_text("# a comment\n\nFILE=1 2\nFROM_HOST\nNOT_THERE\n")
    result = await cli(
        *["run", "-d", "--name", "x", "-e", "A=1", "-eB=2", "-e", "FROM_HOST", "-e", "GONE"],
        *["--env-file", f"{tmp_path}/env", "-w", "/w", "-u", "1:2", "-v", "/a:/b:ro", "-v", "n:/c"],
        *["-v", "/anonymous", "--network", "none", "-p", "127.0.0.1:8080:80/tcp", "-p", "53/udp"],
        *["-p", "7000-7001:1-2", "-m", "64m", "--cpus", "0.5", "--pids-limit", "10"],
        *["--entrypoint", "/e", "-h", "box", "--read-only", "--privileged", "--cap-add", "NET_RAW"],
        *["--cap-drop=ALL", "--runtime", "crun", "-l", "k=v", "--stop-signal", "INT", "--rm"],
        *["--mount", "type=bind,src=/s,dst=/t,readonly", "--tmpfs", "/tmp:size=1m"],
        *["--stop-timeout", "3", "--security-opt", "no-new-privileges"],
        *["busybox", "echo", "-d", "--name", "y", "--", "z"],
    )
    assert result.code == 0, result
    (request,) = daemon.asked("Create")
    config = request.config
    assert request.name == "x"
    assert list(config.command) == ["echo", "-d", "--name", "y", "--", "z"]
    assert list(config.entrypoint) == ["/e"]
    assert list(config.env) == ["FILE=1 2", "FROM_HOST=yes", "A=1", "B=2", "FROM_HOST=yes", "GONE"]
    assert (config.working_dir, config.user, config.hostname) == ("/w", "1:2", "box")
    mounts = [(m.type, m.source, m.target, m.read_only, list(m.options)) for m in config.mounts]
    assert mounts == [
        (1, "/a", "/b", True, []),
        (2, "n", "/c", False, []),
        (2, "", "/anonymous", False, []),
        (1, "/s", "/t", True, []),
        (3, "", "/tmp", False, ["size=1m"]),
    ]
    ports = [(p.host_ip, p.host_port, p.container_port, p.protocol) for p in config.ports]
    assert ports == [
        ("127.0.0.1", 8080, 80, "tcp"),
        ("", 0, 53, "udp"),
        ("", 7000, 1, ""),
        ("", 7001, 2, ""),
    ]
    resources = config.resources
    assert (resources.memory_bytes, resources.nano_cpus) == (64 << 20, 500_000_000)
    assert resources.pids_limit == 10
    assert (config.network_mode, config.runtime, config.stop_signal) == ("none", "crun", "INT")
    assert config.read_only and config.privileged and config.auto_remove
    assert (list(config.cap_add), list(config.cap_drop)) == (["NET_RAW"], ["ALL"])
    assert dict(config.labels) == {"k": "v"}
    assert config.stop_timeout.seconds == 3
    assert list(config.security_opt) == ["no-new-privileges"]
    assert not config.tty and not config.open_stdin


async def test_run_detached_prints_the_id(cli, daemon):
    result = await cli("run", "-d", "busybox", "sleep")
    assert result == Result(0, next(iter(daemon.containers)).encode() + b"\n", b"")
    assert not daemon.asked("Attach")


async def test_input_reaches_the_process_to_its_end(cli, daemon):
    data = bytes(range(256)) * 20_000
    result = await cli("run", "-i", "busybox", "cat", stdin=data)
    assert (result.code, result.err) == (0, b"")
    assert result.out == data


async def test_input_stays_ours_without_interactive(cli, daemon):
    result = await cli("run", "busybox", "echo", "x", stdin=b"not for it")
    assert result.out == b"x\n"
    assert not daemon.asked("Attach")[0].input
    assert not daemon.asked("Create")[0].config.open_stdin


async def test_output_is_written_once_across_restarts(cli, daemon):
    process = await cli.spawn("run", "busybox", "count", "40")
    played = await running(daemon)
    for number in range(40):
        before = daemon.attaches
        if number % 10 == 5:
            await daemon.restart(away_s=0.1)
        if number % 10 == 8:
            daemon.cut_after = 2
        await played.update(lambda: setattr(played, "steps", played.steps + 1))
        if number % 10 == 5:
            await until(lambda before=before: daemon.attaches > before)
    out, err = await process.communicate()
    assert out.decode().split() == [str(number) for number in range(40)]
    assert (process.returncode, err) == (0, b"")
    assert daemon.attaches > 4


async def test_input_is_taken_once_across_restarts(cli, daemon):
    process = await cli.spawn("run", "-i", "busybox", "cat")
    played = await running(daemon)
    sent = b""
    for number in range(30):
        line = f"{number} {'x' * 5000}\n".encode()
        process.stdin.write(line)
        await process.stdin.drain()
        sent += line
        if number % 10 == 5:
            await until(lambda: played.taken)
            await daemon.restart(away_s=0.05)
    process.stdin.close()
    out, err = await process.communicate()
    assert out == sent
    assert (process.returncode, err) == (0, b"")


async def test_an_exit_while_the_engine_is_away_is_reported(cli, daemon):
    process = await cli.spawn("run", "busybox", "sleep")
    played = await running(daemon)
    await until(lambda: daemon.asked("Wait"))
    await daemon.stop()
    await played.update(lambda: played.signals.append("SIGTERM"))
    await daemon.start()
    out, err = await process.communicate()
    assert (process.returncode, out, err) == (143, b"", b"")


async def test_a_start_that_was_cut_is_not_done_twice(cli, daemon):
    daemon.vanish_after_start = True
    result = await cli("run", "busybox", "echo", "once")
    assert result == Result(0, b"once\n", b"")
    assert (len(daemon.asked("Start")), len(daemon.asked("Get"))) == (1, 1)


async def test_a_start_that_never_came_is_done_again(cli, daemon):
    daemon.failures["Start"] = [errors.Unavailable("containerd is away")]
    result = await cli("run", "busybox", "echo", "once")
    assert result == Result(0, b"once\n", b"")
    assert len(daemon.asked("Start")) == 2


async def test_signals_go_to_the_process(cli, daemon):
    process = await cli.spawn("run", "busybox", "trap", "3")
    await running(daemon)
    await until(lambda: daemon.asked("Wait"))
    for number, name in ((signal.SIGUSR1, "SIGUSR1"), (signal.SIGHUP, "SIGHUP")):
        process.send_signal(number)
        assert await process.stdout.readline() == f"{name}\n".encode()
    process.send_signal(signal.SIGINT)
    assert await process.stdout.readline() == b"SIGINT\n"
    assert await process.wait() == 3


async def test_an_interrupt_before_the_start_goes_to_the_process(cli, daemon):
    daemon.hold_start = asyncio.Event()
    process = await cli.spawn("run", "busybox", "trap", "1")
    await until(lambda: daemon.asked("Start"))
    process.send_signal(signal.SIGINT)
    daemon.hold_start.set()
    out, err = await process.communicate()
    assert (process.returncode, out, err) == (3, b"SIGINT\n", b"")


async def test_who_insists_before_the_start_leaves_nothing(cli, daemon):
    daemon.hold_start = asyncio.Event()
    process = await cli.spawn("run", "--rm", "busybox", "sleep")
    await until(lambda: daemon.asked("Start"))
    for _ in range(3):
        process.send_signal(signal.SIGINT)
        await asyncio.sleep(0.1)  # signals that come at once are one
    assert await process.wait() == 130
    assert daemon.asked("Remove")


async def test_the_third_interrupt_ends_the_command(cli, daemon):
    process = await cli.spawn("run", "busybox", "trap", "100")
    await running(daemon)
    await until(lambda: daemon.asked("Wait"))
    for count in range(2):
        process.send_signal(signal.SIGINT)
        await process.stdout.readline()
        assert len(daemon.asked("Kill")) == count + 1
    process.send_signal(signal.SIGINT)
    assert await process.wait() == 130


async def test_a_missing_image_is_pulled_first(cli, daemon):
    daemon.pullable["new"] = daemon.images["busybox"]
    result = await cli("run", "new", "echo", "x")
    assert (result.code, result.out) == (0, b"x\n")
    lines = result.err.decode().splitlines()
    assert lines[0] == "Unable to find image 'new' locally"
    assert lines[1:4] == [
        f"aaaaaaaaaaaa: {w}" for w in ("Downloading", "Extracting", "Pull complete")
    ]
    assert lines[-1] == "Status: Downloaded newer image for new:latest"


async def test_pull_policies(cli, daemon):
    daemon.pullable["busybox"] = daemon.images["busybox"]
    never = await cli("run", "--pull", "never", "new", "echo", "x")
    assert (never.code, daemon.asked("Pull")) == (125, [])
    always = await cli("run", "--pull=always", "busybox", "echo", "x")
    assert (always.code, len(daemon.asked("Pull"))) == (0, 1)


async def test_a_refusal_is_one_sentence_with_the_request_id(cli, daemon):
    daemon.failures["Create"] = [errors.InvalidArgument("memory limit is below 6 MiB")]
    result = await cli("run", "busybox", "echo")
    request = daemon.request_ids[-1]
    sentence = f"theseus: memory limit is below 6 MiB (request {request})\n"
    assert result == Result(125, b"", sentence.encode())
    assert len(request) == 16


@pytest.mark.parametrize(
    ("reason", "code"), [("COMMAND_NOT_FOUND", 127), ("COMMAND_NOT_EXECUTABLE", 126), ("", 125)]
)
async def test_a_command_that_cannot_run_has_its_own_code(cli, daemon, reason, code):
    daemon.failures["Start"] = [errors.InvalidArgument("no such command", reason=reason)]
    result = await cli("run", "--rm", "busybox", "nope")
    assert (result.code, result.out) == (code, b"")
    assert [request.force for request in daemon.asked("Remove")] == [True]


async def test_every_call_of_a_command_has_the_same_request_id(cli, daemon):
    await cli("run", "busybox", "echo", "x")
    assert len(daemon.request_ids) >= 4
    assert len(set(daemon.request_ids)) == 1


async def test_no_engine_is_said_in_words(cli, daemon):
    await daemon.stop()
    result = await cli("ps")
    assert (result.code, result.out) == (1, b"")
    assert result.err.startswith(f"theseus: cannot reach the engine at {daemon.socket}".encode())
    assert result.err.count(b"\n") == 1
    await daemon.start()


async def test_exec_codes_and_streams(cli, daemon):
    await cli("run", "-d", "--name", "c", "busybox", "sleep")
    assert await cli("exec", "c", "echo", "hi") == Result(0, b"hi\n", b"")
    assert await cli("exec", "c", "exit", "9") == Result(9, b"", b"")
    assert await cli("exec", "-i", "c", "cat", stdin=b"in\n") == Result(0, b"in\n", b"")
    daemon.failures["ExecStart"] = [errors.InvalidArgument("no", reason="COMMAND_NOT_FOUND")]
    assert (await cli("exec", "c", "nope")).code == 127
    detached = await cli("exec", "-d", "-e", "A=1", "-w", "/", "-u", "1", "c", "sleep", "-t")
    assert detached == Result(0, b"", b"")
    request = daemon.asked("ExecCreate")[-1]
    assert (list(request.command), list(request.env)) == (["sleep", "-t"], ["A=1"])
    assert request.detach
    await cli("kill", "c")


async def test_exec_survives_a_restart(cli, daemon):
    await cli("run", "-d", "--name", "c", "busybox", "sleep")
    process = await cli.spawn("exec", "c", "count", "4")
    await until(lambda: daemon.asked("ExecRun"))
    played = daemon.execs["exec0"]
    for number in range(4):
        await played.update(lambda: setattr(played, "steps", played.steps + 1))
        if number == 1:
            await daemon.restart()
    out, err = await process.communicate()
    assert (process.returncode, out, err) == (0, b"0\n1\n2\n3\n", b"")


async def test_exec_without_input_is_one_call(cli, daemon):
    await cli("run", "-d", "--name", "c", "busybox", "sleep")
    before = len(daemon.requests)
    assert await cli("exec", "-e", "A=1", "-w", "/", "-u", "1", "c", "echo", "hi") == Result(
        0, b"hi\n", b""
    )
    [request] = daemon.asked("ExecRun")
    assert (list(request.env), request.working_dir, request.user) == (["A=1"], "/", "1")
    assert [name for name, _ in daemon.requests[before:]] == ["ExecRun", "ExecStart"]
    assert (await cli("exec", "c", "err", "no")).err == b"no\n"
    absent = await cli("exec", "none", "echo", "hi")
    assert (absent.code, absent.out) == (1, b"")


@pytest.mark.parametrize("step", ["created", "told", "started", "output"])
async def test_exec_survives_a_restart_at_any_step_and_runs_once(cli, daemon, step):
    await cli("run", "-d", "--name", "c", "busybox", "sleep")
    daemon.vanish_at = step
    assert await cli("exec", "c", "echo", "once") == Result(0, b"once\n", b"")
    ran = [played for played in daemon.execs.values() if played.task is not None]
    assert [bytes(played.output) for played in ran] == [b"once\n"]
    assert len(daemon.asked("ExecRun")) == (2 if step == "created" else 1)
    assert daemon.vanish_at == ""


async def test_a_start_of_an_exec_that_was_cut_is_made_again(cli, daemon):
    await cli("run", "-d", "--name", "c", "busybox", "sleep")
    daemon.failures["ExecStart"] = [errors.Unavailable("containerd is away")]
    assert await cli("exec", "c", "echo", "once") == Result(0, b"once\n", b"")
    assert (len(daemon.asked("ExecRun")), len(daemon.asked("ExecStart"))) == (1, 2)


async def test_a_signal_ends_the_exec_command_and_not_its_process(cli, daemon):
    await cli("run", "-d", "--name", "c", "busybox", "sleep")
    process = await cli.spawn("exec", "c", "sleep")
    await until(lambda: daemon.asked("ExecStart"))
    process.send_signal(signal.SIGTERM)
    out, err = await process.communicate()
    assert (process.returncode, out, err) == (143, b"", b"")
    assert daemon.execs["exec0"].code is None


async def test_lists(cli, daemon):
    await cli("run", "-d", "--name", "up", "-p", "8080:80", "busybox", "sleep")
    await cli("run", "--name", "down", "busybox", "exit", "3")
    table = (await cli("ps", "-a")).out.decode().splitlines()
    head = ["CONTAINER", "ID", "IMAGE", "COMMAND", "CREATED", "STATUS", "PORTS", "NAMES"]
    assert table[0].split() == head
    assert table[1].split("   ")[-1].strip() == "down"
    assert "Exited (3) Less than a second ago" in table[1] or "second ago" in table[1]
    assert "0.0.0.0:8080->80/tcp" in table[2]
    assert (await cli("ps")).out.count(b"\n") == 2
    ids = (await cli("ps", "-aq", "--no-trunc")).out.decode().split()
    assert ids == list(reversed(daemon.containers))


async def test_images(cli, daemon):
    table = [line.split() for line in (await cli("images")).out.decode().splitlines()]
    assert table[0] == ["REPOSITORY", "TAG", "IMAGE", "ID", "CREATED", "SIZE"]
    assert table[1][:3] == ["busybox", "latest", "1" * 12]
    assert table[2][:3] == ["127.0.0.1:5000/a/b", "2", "1" * 12]
    assert table[1][-1] == "1.23MB"
    assert (await cli("images", "-q")).out == b"1" * 12 + b"\n"
    assert (await cli("images", "busybox")).out.count(b"\n") == 2
    removed = await cli("rmi", "busybox", "nope")
    assert removed.code == 1
    assert b"Untagged: busybox:latest\n" in removed.out
    assert b"image 'nope' does not exist" in removed.err


async def test_pull_prints_lines_without_a_terminal(cli, daemon):
    daemon.pullable["x"] = daemon.images["busybox"]
    result = await cli("pull", "x")
    assert result.out.decode().splitlines() == [
        "aaaaaaaaaaaa: Downloading",
        "aaaaaaaaaaaa: Extracting",
        "aaaaaaaaaaaa: Pull complete",
        f"Digest: sha256:{'2' * 64}",
        "Status: Downloaded newer image for x:latest",
        "x",
    ]
    assert (await cli("pull", "-q", "x")).out == b"x\n"
    assert (await cli("pull", "nope")).code == 1


async def test_load_sends_a_file_or_a_pipe(cli, daemon, tmp_path):
    archive = os.urandom(3 << 20)
    (tmp_path / "a.tar").write_bytes(archive)
    result = await cli("load", "-i", str(tmp_path / "a.tar"))
    assert result == Result(0, b"Loaded image: loaded:1\n", b"")
    assert daemon.loaded == archive
    assert (await cli("load", "-q", stdin=b"piped")).out == b""
    assert daemon.loaded == b"piped"
    assert (await cli("load", "-i", str(tmp_path / "none"))).code == 125


async def test_lifecycle_of_several_containers(cli, daemon):
    for name in ("a", "b"):
        await cli("run", "-d", "--name", name, "busybox", "sleep")
    result = await cli("stop", "-t", "3", "a", "nope", "b")
    assert (result.code, result.out) == (1, b"a\nb\n")
    assert result.err.startswith(b"theseus: container 'nope' does not exist (request ")
    assert [request.timeout.seconds for request in daemon.asked("Stop")] == [3, 3, 3]
    assert (await cli("wait", "a", "b")).out == b"143\n143\n"
    assert (await cli("kill", "-s", "HUP", "a")).code == 1
    assert (await cli("rm", "a", "-f", "b")).out == b"a\nb\n"
    assert [request.force for request in daemon.asked("Remove")] == [True, True]


async def test_wait_goes_on_across_a_restart(cli, daemon):
    await cli("run", "-d", "--name", "c", "busybox", "sleep")
    process = await cli.spawn("wait", "c")
    await until(lambda: daemon.asked("Wait"))
    await daemon.restart(away_s=0.2)
    await cli("kill", "-s", "SIGTERM", "c")
    assert await process.communicate() == (b"143\n", b"")


async def test_logs_follow_across_a_restart(cli, daemon):
    await cli("run", "-d", "--name", "c", "busybox", "count", "12")
    played = await running(daemon)
    await played.update(lambda: setattr(played, "steps", 4))
    await played.until(lambda: len(played.output) == 8)
    process = await cli.spawn("logs", "-f", "--tail", "2", "c")
    assert await process.stdout.readline() == b"2\n"
    await daemon.restart()
    await played.update(lambda: setattr(played, "steps", 12))
    out, err = await process.communicate()
    assert out.split() == [str(number).encode() for number in range(3, 12)]
    assert (process.returncode, err) == (0, b"")


async def test_logs_with_times(cli, daemon):
    await cli("run", "--name", "c", "busybox", "echo", "x")
    assert (await cli("logs", "-t", "c")).out == b"1970-01-01T00:16:40Z x\n"
    await cli("logs", "--since", "10m", "--until", "2030-01-01T00:00:00Z", "c")
    request = daemon.asked("Logs")[-1]
    assert request.until.seconds == 1893456000
    assert not request.follow and request.stdout and request.stderr


async def test_inspect(cli, daemon):
    await cli("run", "-d", "--name", "c", "-p", "80:8080", "busybox", "sleep")
    (found,) = json.loads((await cli("inspect", "c")).out)
    assert (found["Name"], found["State"]["Status"], found["State"]["Pid"]) == (
        "/c",
        "running",
        4242,
    )
    assert found["NetworkSettings"]["Ports"] == {
        "8080/tcp": [{"HostIp": "0.0.0.0", "HostPort": "80"}]
    }
    template = "{{.State.Pid}} {{json .Config.Cmd}}"
    assert (await cli("inspect", "-f", template, "c")).out == b'4242 ["sleep"]\n'
    (image,) = json.loads((await cli("inspect", "busybox")).out)
    assert image["RepoTags"] == ["busybox:latest", "127.0.0.1:5000/a/b:2"]
    missing = await cli("inspect", "nope")
    assert (missing.code, json.loads(missing.out)) == (1, [])
    assert b"neither a container nor an image" in missing.err


async def test_create_then_start(cli, daemon):
    created = await cli("create", "--name", "c", "busybox", "echo", "x")
    assert created == Result(0, next(iter(daemon.containers)).encode() + b"\n", b"")
    assert await cli("start", "-a", "c") == Result(0, b"x\n", b"")
    assert await cli("start", "-a", "c") == Result(0, b"x\n", b"")
    assert await cli("start", "c") == Result(0, b"c\n", b"")


async def test_version_and_info(cli, daemon):
    version = (await cli("version")).out.decode()
    assert " Version:     9.9" in version
    assert " containerd:  does not answer" in version
    info = (await cli("info")).out.decode()
    assert "WARNING: runtime crun is not usable: it refuses this host" in info


async def test_volumes(cli, daemon):
    assert (await cli("volume", "create", "--label", "a=b", "v")).out == b"v\n"
    assert (await cli("volume", "ls")).out == b"DRIVER   VOLUME NAME\nlocal    v\n"
    assert (await cli("volume", "rm", "v")).out == b"v\n"
    assert (await cli("volume", "rm", "v")).code == 1
    assert (await cli("volume", "prune")).code == 125


async def test_whoever_closes_our_output_ends_us(cli, daemon):
    process = await cli.spawn("run", "busybox", "count", "1000000")
    played = await running(daemon)
    await played.update(lambda: setattr(played, "steps", 1000))
    await process.stdout.readline()
    process._transport.get_pipe_transport(1).close()
    await played.update(lambda: setattr(played, "steps", 50_000))
    assert await process.wait() == 141
