"""Containers as a user of docker runs them, through all tiers, with runc and crun."""

import contextlib
import os
import pty
import re
from pathlib import Path

import pytest

from tests.integration.theseus import ended, until
from tools.image import BUSYBOX

pytestmark = pytest.mark.root

# moby's default capabilities.
DEFAULT_CAPABILITIES = "00000000a80425fb"


def test_foreground_prints_output_and_ends_with_the_containers_code(theseus, runtime):
    with theseus.leaves_nothing():
        command = "echo out; echo err >&2; exit 7"
        result = theseus.run("--runtime", runtime, "--", "sh", "-c", command)
    assert (result.code, result.out, result.err) == (7, "out\n", "err\n")


def test_detached_container_runs_on_and_is_logged(theseus, runtime):
    identity = theseus.start(
        "--runtime", runtime, "--name", "dd", "--", "sh", "-c", "echo hi; sleep 60"
    )
    assert re.fullmatch("[0-9a-f]{64}", identity)
    until(lambda: theseus.ok("logs", "dd") == "hi")
    (line,) = [row for row in theseus.ok("ps").splitlines() if row.endswith(" dd")]
    assert line.startswith(identity[:12])
    assert "Up " in line and '"sh -c ' in line
    found = theseus.inspect("dd")
    assert found["Id"] == identity
    assert found["State"]["Status"] == "running"
    assert Path(f"/proc/{found['State']['Pid']}").is_dir()
    assert found["HostConfig"]["Runtime"] in (runtime, "")


def test_environment_directory_user_and_hostname(theseus, runtime):
    result = theseus.run(
        *["--runtime", runtime, "-e", "A=1", "-w", "/tmp", "-u", "65534:7", "-h", "box", "--"],
        *["sh", "-c", "echo $A $PWD $(id -u) $(id -g) $(hostname) $HOME; echo $PATH"],
    )
    assert (result.code, result.out) == (0, "1 /tmp 65534 7 box /home\n/bin:/usr/bin\n")


def test_a_user_by_name(theseus):
    assert theseus.run("-u", "nobody", "--", "id", "-un").out == "nobody\n"


def test_binds_and_volumes(theseus, tmp_path):
    (tmp_path / "in").write_text("from the host\n")
    script = "cat /d/in && echo back > /d/out; echo kept > /v/file; touch /ro/x"
    with theseus.leaves_nothing():
        result = theseus.run(
            *["-v", f"{tmp_path}:/d", "-v", "named:/v", "-v", f"{tmp_path}:/ro:ro", "--"],
            *["sh", "-c", script],
        )
        assert result.out == "from the host\n"
        assert "Read-only file system" in result.err
        assert (tmp_path / "out").read_text() == "back\n"
        assert theseus.run("-v", "named:/v", "--", "cat", "/v/file").out == "kept\n"
        assert theseus.ok("volume", "ls", "-q") == "named"
        theseus.ok("volume", "rm", "named")


def test_anonymous_volumes_go_with_their_container(theseus):
    with theseus.leaves_nothing():
        theseus.start("--name", "vv", "-v", "/data", "--", "sleep", "60")
        assert theseus.ok("volume", "ls", "-q")
        theseus.ok("rm", "-f", "-v", "vv")
        assert theseus.ok("volume", "ls", "-q") == ""


def test_tmpfs_and_read_only_root(theseus):
    script = "touch /tmp/x && echo ok; touch /y; grep ' /tmp ' /proc/mounts"
    result = theseus.run("--read-only", "--tmpfs", "/tmp:size=1m", "--", "sh", "-c", script)
    assert result.out.startswith("ok\ntmpfs /tmp tmpfs ")
    assert "size=1024k" in result.out
    assert "Read-only file system" in result.err


def test_limits_are_the_cgroups(theseus, runtime):
    theseus.start(
        *["--runtime", runtime, "--name", "ll", "--memory", "64m", "--cpus", "0.5"],
        *["--pids-limit", "40", "--", "sleep", "60"],
    )
    groups = {}
    for line in Path(f"/proc/{theseus.pid('ll')}/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        groups.update(dict.fromkeys(controllers.split(","), path))

    def value(controller, name):
        mount = Path("/sys/fs/cgroup") / controller
        return int((mount / groups[controller].lstrip("/") / name).read_text())

    assert value("memory", "memory.limit_in_bytes") == 64 << 20
    assert value("cpu", "cpu.cfs_quota_us") * 2 == value("cpu", "cpu.cfs_period_us")
    assert value("pids", "pids.max") == 40
    theseus.ok("rm", "-f", "ll")
    cgroup = Path("/sys/fs/cgroup/memory") / groups["memory"].lstrip("/")
    until(lambda: not cgroup.exists())  # the runtime deletes behind the answer


def test_memory_past_its_limit_is_an_oom_kill(theseus):
    script = "head -c 60000000 /dev/zero | tail"
    theseus.start("--name", "oom", "--memory", "16m", "--", "sh", "-c", script)
    assert theseus.ok("wait", "oom") in ("137", "1")
    until(lambda: theseus.inspect("oom")["State"]["OOMKilled"])


def test_moby_defaults_from_the_first_day(theseus, runtime):
    script = """
        grep CapEff /proc/self/status; grep Seccomp: /proc/self/status
        for f in /proc/kcore /proc/keys /proc/timer_list; do head -c 1 $f 2>&1 | wc -c; done
        echo 1 > /proc/sys/kernel/domainname || echo read-only
        ls /dev; mknod /tmp/d b 8 0 && cat /tmp/d
    """
    result = theseus.run("--runtime", runtime, "--", "sh", "-c", script)
    lines = result.out.split("\n")
    assert lines[0].split()[1] == DEFAULT_CAPABILITIES
    assert lines[1].split()[1] == "2"
    assert "read-only" in lines
    assert {"null", "zero", "full", "random", "urandom", "tty", "pts", "shm", "ptmx"} <= set(lines)
    assert "sda" not in lines
    assert "Operation not permitted" in result.err or "Permission denied" in result.err


def test_capabilities_are_added_dropped_and_given_all(theseus):
    script = "grep CapEff /proc/self/status"

    def effective(*options):
        out = theseus.run(*options, "--", "sh", "-c", script).out
        return int(out.split()[1], 16)

    assert effective("--cap-drop", "ALL") == 0
    assert effective("--cap-drop", "ALL", "--cap-add", "NET_ADMIN") == 1 << 12
    assert effective("--privileged") & (1 << 21)  # CAP_SYS_ADMIN


def test_entrypoint_replaces_the_images_command(theseus):
    assert theseus.run("--entrypoint", "/bin/echo", "--", "a", "b").out == "a b\n"


def test_standard_input_is_a_pipe(theseus, runtime):
    data = "".join(f"line {number}\n" for number in range(20_000))
    result = theseus.run("--runtime", runtime, "-i", "--", "wc", "-c", stdin=data)
    assert (result.code, result.out.strip()) == (0, str(len(data)))
    result = theseus.run("--runtime", runtime, "-i", "--", "cat", stdin=data)
    assert result.out == data


def test_without_interactive_there_is_no_input(theseus):
    assert theseus.run("cat", stdin="x").out == ""


def test_much_output_comes_whole(theseus, runtime):
    result = theseus.run("--runtime", runtime, "--", "seq", "1", "100000")
    assert result.out == "".join(f"{number}\n" for number in range(1, 100_001))


def test_bytes_that_are_no_text_come_whole(theseus):
    # For the log they are lost, as in every log of JSON; for who is attached they are not.
    process = theseus.spawn(*["run", "--rm", theseus.image, "cat", "/bin/busybox"], text=False)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert out == BUSYBOX.read_bytes()


def test_a_terminal(theseus, runtime):
    ours, theirs = pty.openpty()
    process = theseus.spawn(
        *["run", "--rm", "-it", "--runtime", runtime, theseus.image],
        *["sh", "-c", "tty; read x; echo got $x; exit 5"],
        **dict.fromkeys(("stdin", "stdout", "stderr"), theirs),
    )
    seen = b""
    os.set_blocking(ours, False)

    def shows(text):
        nonlocal seen
        with contextlib.suppress(BlockingIOError):
            seen += os.read(ours, 65536)
        return text in seen

    until(lambda: shows(b"/dev/pts/0"))
    os.write(ours, b"typed\r")
    until(lambda: shows(b"got typed"))
    assert process.wait(20) == 5
    os.close(ours)
    os.close(theirs)


def test_terminal_size_reaches_the_container(theseus):
    ours, theirs = pty.openpty()
    os.set_blocking(ours, False)
    import fcntl
    import struct
    import termios

    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 33, 77, 0, 0))
    process = theseus.spawn(
        *["run", "--rm", "-it", theseus.image, "sh", "-c"],
        "until [ \"$(stty size)\" = '33 77' ]; do sleep 0.05; done; echo seen",
        **dict.fromkeys(("stdin", "stdout", "stderr"), theirs),
    )
    assert process.wait(20) == 0
    assert b"seen" in os.read(ours, 65536)
    os.close(ours)
    os.close(theirs)


def test_exec(theseus, runtime):
    theseus.start("--runtime", runtime, "--name", "ee", "-e", "A=1", "--", "sleep", "60")
    assert theseus("exec", "ee", "sh", "-c", "echo $A; exit 9").code == 9
    result = theseus(
        "exec",
        "-e",
        "B=2",
        "-w",
        "/tmp",
        "-u",
        "5:6",
        "ee",
        "sh",
        "-c",
        "echo $A $B $PWD $(id -u) $(id -g)",
    )
    assert result.out == "1 2 /tmp 5 6\n"
    assert theseus("exec", "-i", "ee", "cat", stdin="through\n").out == "through\n"
    with theseus.leaves_nothing():
        theseus.ok("exec", "-d", "ee", "touch", "/tmp/made")
        until(lambda: theseus("exec", "ee", "ls", "/tmp/made").code == 0)
    both = theseus("exec", "ee", "sh", "-c", "echo out; echo err >&2")
    assert (both.out, both.err) == ("out\n", "err\n")


def test_logs_options(theseus):
    theseus.start("--name", "gg", "--", "sh", "-c", "for i in 1 2 3; do echo $i; done; echo e >&2")
    theseus.ok("wait", "gg")
    result = theseus("logs", "gg")
    assert (result.out, result.err) == ("1\n2\n3\n", "e\n")
    assert (
        theseus("logs", "--tail", "2", "gg").out + theseus("logs", "-n", "2", "gg").err == "3\ne\n"
    )
    stamped = theseus("logs", "-t", "gg").out.splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\dT[\d:.]+Z \d$", line) for line in stamped)
    assert theseus("logs", "--since", "1h", "gg").out == "1\n2\n3\n"
    assert theseus("logs", "--until", "1h", "gg").out == ""


def test_logs_follow_until_the_end(theseus, tmp_path):
    os.mkfifo(tmp_path / "go")
    theseus.start(
        "--name", "ff", "-v", f"{tmp_path}:/d", "--", "sh", "-c", "echo a; read x < /d/go; echo b"
    )
    process = theseus.spawn("logs", "-f", "ff")
    assert process.stdout.readline() == "a\n"
    (tmp_path / "go").write_text("\n")
    out, err = process.communicate(timeout=20)
    assert (out, err, process.returncode) == ("b\n", "", 0)


def test_stop_sends_term_and_then_kill(theseus):
    theseus.start(
        "--name", "ss", "--", "sh", "-c", "trap 'exit 3' TERM; echo up; while :; do sleep 0.1; done"
    )
    until(lambda: theseus.ok("logs", "ss") == "up")
    theseus.ok("stop", "ss")
    assert theseus.inspect("ss")["State"]["ExitCode"] == 3
    theseus.start(
        "--name", "kk", "--", "sh", "-c", "trap '' TERM; echo up; while :; do sleep 0.1; done"
    )
    until(lambda: theseus.ok("logs", "kk") == "up")
    theseus.ok("stop", "-t", "1", "kk")
    assert theseus.inspect("kk")["State"]["ExitCode"] == 137


def test_stop_uses_the_containers_signal(theseus):
    script = "trap 'exit 4' USR1; echo up; while :; do sleep 0.1; done"
    theseus.start("--name", "uu", "--stop-signal", "USR1", "--", "sh", "-c", script)
    until(lambda: theseus.ok("logs", "uu") == "up")
    theseus.ok("stop", "uu")
    assert theseus.ok("wait", "uu") == "4"


def test_kill_wait_and_rm(theseus, runtime):
    with theseus.leaves_nothing():
        theseus.start("--runtime", runtime, "--name", "xx", "--", "sleep", "60")
        waiting = theseus.spawn("wait", "xx")
        refused = theseus("rm", "xx")
        assert refused.code == 1
        assert "running" in refused.err and "(request " in refused.err
        theseus.ok("kill", "xx")
        assert waiting.communicate(timeout=20)[0] == "137\n"
        assert theseus("kill", "xx").code == 1
        assert theseus.ok("stop", "xx") == "xx"
        assert theseus.ok("rm", "xx") == "xx"
        assert theseus("inspect", "xx").code == 1


def test_started_again_it_runs_again(theseus):
    theseus.start("--name", "again", "--", "sh", "-c", "echo run >> /log; wc -l < /log")
    theseus.ok("wait", "again")
    result = theseus("start", "-a", "again")
    assert (result.code, result.out.strip()) == (0, "2")
    assert theseus.ok("logs", "again").split() == ["1", "2"]


def test_a_container_by_name_id_and_prefix(theseus):
    identity = theseus.start("--name", "one", "--", "sleep", "60")
    for name in ("one", identity, identity[:12], identity[:6]):
        assert theseus.inspect(name)["Id"] == identity
    missing = theseus("inspect", "two")
    assert missing.code == 1


def test_rm_removes_the_container_and_all_of_it(theseus, runtime):
    with theseus.leaves_nothing():
        process = theseus.spawn(
            *["run", "--rm", "--runtime", runtime, "--name", "gone", theseus.image],
            *["sh", "-c", "echo up; sleep 60"],
        )
        assert process.stdout.readline() == "up\n"
        pid = theseus.pid("gone")
        theseus.ok("kill", "gone")
        assert process.wait(20) == 137
        process.communicate()
        ended(pid)
        assert theseus("inspect", "gone").code == 1


def test_everything_in_the_container_ends_with_its_init(theseus, runtime):
    theseus.start(
        "--runtime", runtime, "--name", "tree", "--", "sh", "-c", "sleep 61 & sleep 62 & sleep 60"
    )
    theseus.start("--name", "other", "--", "sleep", "60")
    until(lambda: len(_pids_of("sleep\x0061")) == 1)
    theseus.ok("kill", "tree")
    theseus.ok("wait", "tree")
    until(lambda: not _pids_of("sleep\x0061") and not _pids_of("sleep\x0062"))


def _pids_of(words):
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if words in (entry / "cmdline").read_text():
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


def test_several_at_once(theseus):
    with theseus.leaves_nothing():
        processes = [
            theseus.spawn("run", "--rm", theseus.image, "echo", str(number)) for number in range(6)
        ]
        for number, process in enumerate(processes):
            out, err = process.communicate(timeout=40)
            assert (process.returncode, out, err) == (0, f"{number}\n", "")
