"""Debian's containerd and its `ctr` on our shim, ``io.containerd.theseus.v1``."""

import contextlib
import fcntl
import json
import os
import pty
import random
import shutil
import struct
import subprocess
import sys
import tempfile
import termios
import threading
from pathlib import Path

import pytest

from tests.fakes.stock_shim import kill, kill_processes_of, parent_of, processes_of
from tests.integration.theseus import ended, until
from tools import image, leaks

pytestmark = pytest.mark.root

RUNTIME = "io.containerd.theseus.v1"
PROGRAM = "containerd-shim-theseus-v1"
IMAGE = "docker.io/library/busybox:stock"
# Not needed for `ctr`; some fail in a sandbox, and all take time to start.
DISABLED = [
    "io.containerd.grpc.v1.cri",
    "io.containerd.internal.v1.opt",
    "io.containerd.internal.v1.tracing",
    "io.containerd.snapshotter.v1.aufs",
    "io.containerd.snapshotter.v1.btrfs",
    "io.containerd.snapshotter.v1.devmapper",
    "io.containerd.snapshotter.v1.zfs",
    "io.containerd.tracing.processor.v1.otlp",
]
CONFIG = """\
version = 2
root = "{0}/root"
state = "{0}/state"
disabled_plugins = {1}
[grpc]
address = "{0}/c.sock"
"""
TIME_LIMIT_S = 60


class Stock:
    """A containerd of Debian's in a directory of its own, and `ctr` against it."""

    def __init__(self, directory):
        self.directory = directory
        self.address = directory / "c.sock"
        self.process = None
        (directory / "config.toml").write_text(CONFIG.format(directory, json.dumps(DISABLED)))

    @property
    def log(self):
        return (self.directory / "log").read_text()

    def start(self):
        shims = Path(sys.executable).parent
        environment = {**os.environ, "PATH": f"{shims}:{os.environ['PATH']}"}
        with (self.directory / "log").open("ab") as log:
            self.process = subprocess.Popen(
                ["containerd", "--config", self.directory / "config.toml"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
            )
        until(self.serves)

    def serves(self):
        assert self.process.poll() is None, self.log[-3000:]
        return self.run("version").returncode == 0

    def kill(self):
        self.process.kill()
        self.process.wait(10)

    def stop(self):
        self.process.terminate()
        assert self.process.wait(20) == 0

    def run(self, *arguments, **how):
        return subprocess.run(
            self.command(*arguments),
            capture_output=True,
            timeout=TIME_LIMIT_S,
            check=False,
            text=True,
            **how,
        )

    def command(self, *arguments):
        return ["ctr", "--address", str(self.address), *map(str, arguments)]

    def __call__(self, *arguments, code=0, **how):
        """Standard output of a `ctr` that ends with ``code``."""
        done = self.run(*arguments, **how)
        words = f"ctr {' '.join(map(str, arguments))}: {done.stdout}{done.stderr}"
        assert done.returncode == code, words + self.log[-3000:]
        return done.stdout

    def tasks(self):
        """Pid and status by id."""
        rows = [line.split() for line in self("tasks", "ls").splitlines()[1:]]
        return {name: (int(pid), status) for name, pid, status in rows}

    def rows(self, *arguments):
        return [line.split()[0] for line in self(*arguments).splitlines()[1:]]

    def detached(self, name, *command, options=()):
        """Run a container in the background; returns its pid."""
        flags = ["--runtime", RUNTIME, "-d", "--null-io", *options]
        self("run", *flags, IMAGE, name, *command)
        return self.tasks()[name][0]

    def removed(self, name):
        """Exit code of a stopped task, which is removed with its container."""
        done = self.run("tasks", "rm", name)
        self("containers", "rm", name)
        assert done.returncode == 0, done.stderr
        _, found, code = done.stderr.partition("exit code ")
        return int(code.split()[0].rstrip(',"')) if found else 0


@pytest.fixture(scope="module")
def containerd():
    for program in ("containerd", "ctr"):
        if shutil.which(program) is None:
            pytest.fail(f"{program} is not installed: it comes with Debian's package containerd")
    if not (Path(sys.executable).parent / PROGRAM).exists():
        pytest.fail(f"{PROGRAM} is not installed: use make setup")
    directory = Path(tempfile.mkdtemp(prefix="thsc", dir="/tmp"))
    before = leaks.taken()
    stock = Stock(directory)
    stock.start()
    try:
        image.write_oci_archive(image.busybox(), directory / "busybox.tar", IMAGE)
        stock("images", "import", directory / "busybox.tar")
        yield stock
        stock.stop()
    finally:
        kill_processes_of(stock.address)
        shutil.rmtree(directory)
        leaks.clear(before)


@pytest.fixture
def ctr(containerd):
    yield containerd
    if containerd.process.poll() is not None:
        containerd.start()
    for task in containerd.tasks():
        containerd.run("tasks", "rm", "-f", task)
    if left := containerd.rows("containers", "ls"):
        containerd("containers", "rm", *left)
    # Of bundles, mounts and shims' sockets nothing is left.
    state = containerd.directory / "state"
    until(lambda: not list(state.glob("io.containerd.runtime.v2.task/default/*")))
    assert str(state) not in Path("/proc/self/mounts").read_text()
    until(lambda: not list((containerd.directory / "s").glob("theseus-*")))


def run_words(*more):
    return ["run", "--rm", "--runtime", RUNTIME, *more, IMAGE]


def test_a_foreground_container_has_its_output_and_exit_code(ctr):
    assert ctr(*run_words(), "c", "echo", "hello") == "hello\n"
    done = ctr.run(*run_words(), "c", "sh", "-c", "echo out; echo err >&2; exit 42")
    said = [
        line for line in done.stderr.splitlines() if "level=warning" not in line
    ]  # containerd 2
    assert (done.stdout, said, done.returncode) == ("out\n", ["err"], 42)
    assert ctr(*run_words("--env", "A=b", "--cwd", "/tmp"), "c", "sh", "-c", "echo $A; pwd") == (
        "b\n/tmp\n"
    )
    assert ctr.tasks() == {}


def test_much_output_comes_whole(ctr):
    lines = ctr(*run_words(), "c", "seq", "1", "100000").splitlines()
    assert lines == [str(number) for number in range(1, 100_001)]


def test_standard_input_is_passed_on(ctr):
    # This ctr tells its exec processes of the end of the input, and no others.
    assert ctr(*run_words(), "c", "head", "-n", "2", input="one\ntwo\n") == "one\ntwo\n"


def test_a_command_that_is_not_there_is_told_and_leaves_nothing(ctr):
    done = ctr.run(*run_words(), "c", "no-such-command")
    assert done.returncode == 1
    assert "no-such-command" in done.stderr
    assert ctr.rows("containers", "ls") == []


def test_a_detached_container_is_looked_at_paused_and_killed(ctr):
    pid = ctr.detached("c", "sleep", "1000")
    assert ctr.tasks() == {"c": (pid, "RUNNING")}
    assert ctr("tasks", "exec", "--exec-id", "e", "c", "echo", "inside") == "inside\n"
    ctr("tasks", "exec", "--exec-id", "e", "c", "sh", "-c", "exit 7", code=7)
    assert ctr("tasks", "exec", "--exec-id", "e", "c", "cat", input="typed") == "typed"
    ctr("tasks", "exec", "-d", "--exec-id", "d", "c", "sleep", "1000")
    assert len(ctr.rows("tasks", "ps", "c")) == 2
    ctr("tasks", "pause", "c")
    assert ctr.tasks()["c"] == (pid, "PAUSED")
    ctr("tasks", "resume", "c")
    assert ctr.tasks()["c"] == (pid, "RUNNING")
    ctr("tasks", "kill", "c")
    ctr("tasks", "kill", "-s", "KILL", "c")
    ended(pid)
    until(lambda: ctr.tasks()["c"] == (pid, "STOPPED"))
    assert ctr.removed("c") == 137


def test_metrics_are_those_of_the_cgroup(ctr):
    ctr.detached("c", "sleep", "1000")
    table = ctr("tasks", "metrics", "c")
    words = dict(line.split(None, 1) for line in table.splitlines() if line)
    assert "c" in words, table
    assert int(words["memory.usage_in_bytes"]) > 0
    assert int(words["cpuacct.usage"]) > 0
    assert words["pids.current"].strip() == "1"


def test_a_checkpoint_is_refused_in_words(ctr):
    ctr.detached("c", "sleep", "1000")
    done = ctr.run("tasks", "checkpoint", "c")
    assert done.returncode == 1
    assert "failed to checkpoint container 'c'" in done.stderr
    assert ctr("tasks", "ls").split()[-1] == "RUNNING"


class Terminal:
    """A program on a pseudoterminal of a given size."""

    def __init__(self, command, *, rows, columns):
        master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        # As its controlling terminal: a change of size is told to that one's processes only.
        command = ["setsid", "--ctty", *command]
        self.process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave)
        os.close(slave)
        self.master = master
        self.text = ""

    def type(self, text):
        os.write(self.master, text.encode())

    def resize(self, rows, columns):
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def expect(self, text):
        """Read on until ``text`` was printed."""
        watchdog = threading.Timer(TIME_LIMIT_S / 2, self.process.kill)
        watchdog.start()
        with contextlib.suppress(OSError):
            while text not in self.text:
                self.text += os.read(self.master, 4096).decode()
        watchdog.cancel()
        assert text in self.text, self.text
        self.text = self.text.partition(text)[2]

    def close(self):
        code = self.process.wait(20)
        os.close(self.master)
        return code


def test_a_terminal_is_one_for_the_container_and_is_resized(ctr):
    terminal = Terminal(ctr.command(*run_words("-t"), "c", "sh"), rows=33, columns=101)
    terminal.expect("# ")
    terminal.type("tty && stty size\n")
    terminal.expect("/dev/pts/0")
    terminal.expect("33 101")
    terminal.resize(44, 122)
    until(
        lambda: (
            "44 122"
            in ctr("tasks", "exec", "--exec-id", "e", "c", "sh", "-c", "stty size < /dev/pts/0")
        )
    )
    terminal.type("exit 5\n")
    assert terminal.close() == 5


def test_an_exec_has_a_terminal_of_its_own(ctr):
    ctr.detached("c", "sleep", "1000")
    command = ctr.command(
        "tasks",
        "exec",
        "-t",
        "--exec-id",
        "e",
        "c",
        "sh",
        "-c",
        "tty; read line; echo got $line; exit 3",
    )
    terminal = Terminal(command, rows=24, columns=80)
    terminal.expect("/dev/pts/0")
    terminal.type("something\n")
    terminal.expect("got something")
    assert terminal.close() == 3


def test_exit_codes_are_right_when_containerd_was_killed_meanwhile(ctr, tmp_path):
    codes = {f"c{number}": random.Random(number).randrange(1, 126) for number in range(12)}
    mount = ["--mount", f"type=bind,src={tmp_path},dst=/m,options=rbind:rw"]
    script = "until test -e /m/go; do sleep 0.05; done; exit"
    pids = {
        name: ctr.detached(name, "sh", "-c", f"{script} {code}", options=mount)
        for name, code in codes.items()
    }
    survivor = ctr.detached("lives", "sleep", "1000")
    pidfds = [os.pidfd_open(pid) for pid in pids.values()]
    ctr.kill()
    (tmp_path / "go").touch()
    for pid, pidfd in zip(pids.values(), pidfds, strict=True):
        ended(pid)
        os.close(pidfd)
    ctr.start()
    found = ctr.tasks()
    assert found.pop("lives") == (survivor, "RUNNING")
    assert found == {name: (pid, "STOPPED") for name, pid in pids.items()}
    assert {name: ctr.removed(name) for name in codes} == codes
    assert ctr("tasks", "exec", "--exec-id", "e", "lives", "echo", "on") == "on\n"
    ctr("tasks", "kill", "-s", "KILL", "lives")
    ended(survivor)
    assert ctr.removed("lives") == 137


def test_a_containerd_that_comes_back_is_told_what_happened(ctr, tmp_path):
    """The exit is published by the new containerd, though the old one never heard of it."""
    pid = ctr.detached("c", "sleep", "1000")
    shim = parent_of(pid)
    ctr.kill()
    os.kill(pid, 15)
    os.kill(pid, 9)
    ended(pid)
    spool = ctr.directory / "state/io.containerd.runtime.v2.task/default/c/spool"
    until(lambda: any("/tasks/exit" in path.read_text() for path in spool.iterdir()))
    ctr.start()
    # Delivered: what is left is the file that keeps the sequence going, and nothing waits.
    highest = max(int(path.name) for path in spool.iterdir())
    until(lambda: [int(path.name) for path in spool.iterdir()] == [highest])
    assert parent_of(shim) > 0
    assert ctr.removed("c") == 137


def test_a_container_whose_shim_dies_is_ended_and_said_to_be_killed(ctr):
    command = ctr.command(*run_words(), "c", "sleep", "1000")
    running = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE)
    until(lambda: ctr.tasks().get("c", (0, ""))[1] == "RUNNING")
    pid = ctr.tasks()["c"][0]
    kill(parent_of(pid))
    ended(pid)
    running.communicate(timeout=TIME_LIMIT_S)
    assert running.returncode != 0
    until(lambda: ctr.tasks() == {})


def test_containers_of_a_pod_share_a_shim(ctr):
    pod = ["--annotation", "io.kubernetes.cri.sandbox-id=pod"]
    first = ctr.detached("sandbox", "sleep", "1000", options=pod)
    second = ctr.detached("app", "sleep", "1000", options=pod)
    alone = ctr.detached("alone", "sleep", "1000")
    shim = parent_of(first)
    assert parent_of(second) == shim != parent_of(alone)
    ctr.kill()
    ctr.start()
    for name, pid in (("app", second), ("sandbox", first)):
        ctr("tasks", "kill", "-s", "KILL", name)
        ended(pid)
        assert ctr.removed(name) == 137
    ended(shim)


def test_the_shims_are_ours_and_speak_no_grpc(ctr):
    shim = parent_of(ctr.detached("c", "sleep", "1000"))
    assert shim in processes_of(ctr.address)
    assert Path(f"/proc/{shim}/comm").read_text() == "theseus-shim\n"
    assert "cygrpc" not in Path(f"/proc/{shim}/maps").read_text()
