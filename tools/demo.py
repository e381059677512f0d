"""Shows what Theseus is for, in less than 20 seconds: containers that outlive their engine.

Meant for the sandbox (``make demo``). Each line says what is done, or what was seen; what is seen
is checked, and the first thing that is not as promised ends the demo with exit code 1. Containers,
engine and directory are gone at the end, also after Ctrl-C.
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from tools import engine, image, leaks, registry

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PORT = 8080
COUNT = "i=0; while :; do echo $i; i=$((i+1)); sleep 0.02; done"
SERVE = "mkdir /www; echo 'all planks in place' > /www/index.html; httpd -f -p 80 -h /www"
ANSWER = "read x < /d/go; exit 42"
TIERS = ("containerd", "daemon")
CALL_S = 30.0
_INTERRUPTED = 130


class Broken(Exception):
    """Something is not as promised."""


def main() -> int:
    """Run the demo."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    began = time.monotonic()
    before = leaks.taken()
    try:
        with _directory() as directory:
            Demo(directory).run()
        _check_nothing_left(before)
    except Broken as error:
        sys.stderr.write(f"demo: {error}\n")
        return 1
    except KeyboardInterrupt:
        _check_nothing_left(before)
        sys.stderr.write("demo: interrupted, and cleaned up\n")
        return _INTERRUPTED
    say(f"Done in {time.monotonic() - began:.1f} s; no process, mount, link or cgroup is left.")
    return 0


def say(sentence: str) -> None:
    """Print what is done."""
    sys.stdout.write(f"{sentence}\n")
    sys.stdout.flush()


def see(text: str) -> None:
    """Print what was seen."""
    for line in text.splitlines():
        sys.stdout.write(f"    {line}\n")
    sys.stdout.flush()


class Demo:
    """The demo, in ``directory``."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._engine: engine.Engine
        self._image = ""

    def run(self) -> None:
        """All of it.

        Raises:
            Broken: something is not as promised.
        """
        with ExitStack() as stack:
            say("A registry starts on loopback, and an image of busybox is pushed to it.")
            address = stack.enter_context(registry.serving(self._directory / "registry"))
            image.push(image.busybox(), address, "busybox", "latest")
            self._image = f"{address}/busybox:latest"
            say("containerd and the daemon start.")
            # The kernel's page merging is the host's, and a demo leaves nothing changed.
            options = ["--containerd-option=--merge-memory=off"]
            self._engine = stack.enter_context(engine.running(self._directory, options))
            stack.callback(_uninterrupted, self._remove_containers)
            self._tour()

    def _tour(self) -> None:
        say("The image is pulled.")
        see(self._theseus("pull", self._image).splitlines()[-2])
        say("Three containers start: one counts, one serves a page, one waits for a word to end.")
        self._start_containers()
        see(self._theseus("ps"))
        say("A command runs in one of them.")
        see(
            self._theseus(
                "exec", "web", "sh", "-c", "echo I am $(id -un), process $$; ps | head -3"
            )
        )
        pids = {name: self._pid(name) for name in ("counter", "web")}
        with self._counting() as counted, _visiting() as visits:
            self._kill_tiers()
            self._look_again(pids)
            visits.check()
            counted()
        self._show_metrics()

    def _start_containers(self) -> None:
        run = ("run", "-d", "--name")
        fifo = self._directory / "words"
        fifo.mkdir()
        os.mkfifo(fifo / "go")
        self._theseus(*run, "counter", self._image, "sh", "-c", COUNT)
        publish = ("-p", f"127.0.0.1:{PORT}:80")
        self._theseus(*run, "web", *publish, self._image, "sh", "-c", SERVE)
        self._theseus(*run, "answer", "-v", f"{fifo}:/d", self._image, "sh", "-c", ANSWER)
        _until(lambda: _page() is not None, "the page is served")

    def _kill_tiers(self) -> None:
        pids = {tier: int((self._engine.root / tier / "lock").read_text()) for tier in TIERS}
        answer = self._pid("answer")
        say("SIGKILL for containerd and the daemon; what would restart them is held back.")
        up = self._engine.process
        up.send_signal(signal.SIGSTOP)
        try:
            for pid in pids.values():
                _end(pid, signal.SIGKILL)
            _require(_page() is not None, "the page is not served while the engine is dead")
            see(f"both are dead, and http://127.0.0.1:{PORT}/ says: {_page()}")
            say("Meanwhile the third container gets its word, and ends with 42.")
            (self._directory / "words" / "go").write_text("\n")
            _end(answer)
        finally:
            up.send_signal(signal.SIGCONT)
        say("The supervisor goes on, and starts both again.")
        _until(lambda: "containerd: ready" in self._call("info").stdout, "the engine is back")
        for tier, pid in pids.items():
            now = int((self._engine.root / tier / "lock").read_text())
            _require(now != pid, f"{tier} was not started again")
            see(f"{tier}: process {pid} -> {now}")

    def _look_again(self, pids: dict[str, int]) -> None:
        say("They found their containers again: same processes, and the exit code of the one.")
        for name, pid in pids.items():
            _require(self._pid(name) == pid, f"container {name} has another process now")
            see(f"{name}: still process {pid}")
        code = self._theseus("wait", "answer")
        _require(code == "42", f"the container that ended with 42 is reported with {code}")
        see(self._theseus("ps", "-a"))
        see(self._theseus("exec", "counter", "echo", "and exec works as before"))

    @contextmanager
    def _counting(self) -> Iterator[Callable[[], None]]:
        """Follow the counter's output by one command; the result checks that no number lacks."""
        follower = subprocess.Popen(
            self._command("logs", "-f", "counter"),
            env=self._environment(),
            stdout=subprocess.PIPE,
            text=True,
        )
        assert follower.stdout is not None
        output = follower.stdout
        seen = [int(output.readline())]

        def check() -> None:
            last = int(self._theseus("logs", "--tail", "1", "counter").split()[-1])
            while seen[-1] < last:
                seen.append(int(output.readline()))
            _require(seen == list(range(len(seen))), "the counter's output has a gap")
            see(f"counter: 0 to {seen[-1]}, followed by one 'theseus logs -f', no number missing")

        try:
            yield check
        finally:
            follower.kill()
            follower.wait()
            output.close()

    def _show_metrics(self) -> None:
        say("Some metrics of each tier.")
        wanted = {
            "daemon": (
                "theseus_daemon_containers{",
                "theseus_daemon_container_exits_total",
                "theseus_daemon_containerd_connections_total",
            ),
            "containerd": (
                "theseus_containerd_epoch",
                "theseus_containerd_shims_settled_total",
                "theseus_shim_output_lines_total",
            ),
        }
        for tier, names in wanted.items():
            page = _metrics(self._engine.state / tier / "metrics.sock")
            for name in names:
                lines = [line for line in page.splitlines() if line.startswith(name)]
                _require(bool(lines), f"{tier} has no metric {name}")
                see("\n".join(line for line in lines if not line.endswith(" 0.0")))

    def _remove_containers(self) -> None:
        say("All containers are removed, and the engine ends.")
        if names := self._theseus("ps", "-aq").split():
            self._theseus("rm", "-f", *names)

    def _pid(self, name: str) -> int:
        return int(self._theseus("inspect", "-f", "{{.State.Pid}}", name))

    def _theseus(self, *arguments: str) -> str:
        """What a command prints, without the last newline."""
        done = self._call(*arguments)
        _require(done.returncode == 0, f"theseus {' '.join(arguments)} failed: {done.stderr}")
        return done.stdout.removesuffix("\n")

    def _call(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self._command(*arguments),
            env=self._environment(),
            capture_output=True,
            text=True,
            timeout=CALL_S,
            check=False,
        )

    def _command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "services.cli", *arguments]

    def _environment(self) -> dict[str, str]:
        return {**os.environ, "THESEUS_HOST": str(self._engine.socket)}


class _Visits:
    """Counts how often the page was asked for, and how often in vain."""

    def __init__(self) -> None:
        self.answered = self.failed = 0
        self.over = threading.Event()

    def ask(self) -> None:
        """Ask until it is over."""
        while not self.over.wait(0.01):
            if _page() is None:
                self.failed += 1
            else:
                self.answered += 1

    def check(self) -> None:
        """All were answered."""
        _require(self.failed == 0, f"{self.failed} requests for the page failed")
        _require(self.answered > 10, "the page was hardly asked for")
        see(f"web: {self.answered} requests meanwhile, all of them answered")


@contextmanager
def _visiting() -> Iterator[_Visits]:
    visits = _Visits()
    thread = threading.Thread(target=visits.ask, name="visitor")
    thread.start()
    try:
        yield visits
    finally:
        visits.over.set()
        thread.join()


def _page() -> str | None:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"http://127.0.0.1:{PORT}/", timeout=2) as answer:
            return str(answer.read().decode().strip())
    except OSError:
        return None


def _metrics(path: Path) -> str:
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(CALL_S)
        client.connect(str(path))
        client.sendall(b"GET /metrics HTTP/1.1\r\nHost: demo\r\n\r\n")
        with client.makefile("rb") as answer:
            return answer.read().decode()


def _end(pid: int, number: signal.Signals | None = None) -> None:
    """Wait until a process has ended; send it a signal first, where one is given."""
    with suppress(ProcessLookupError):
        descriptor = os.pidfd_open(pid)
        try:
            if number is not None:
                signal.pidfd_send_signal(descriptor, number)
            ended, _, _ = select.select([descriptor], [], [], CALL_S)
            _require(bool(ended), f"process {pid} does not end")
        finally:
            os.close(descriptor)


def _until(condition: Callable[[], bool], what: str) -> None:
    give_up_at = time.monotonic() + CALL_S
    while not condition():
        _require(time.monotonic() < give_up_at, f"in vain: {what}")
        time.sleep(0.02)


def _require(condition: bool, sentence: str) -> None:
    if not condition:
        raise Broken(sentence)


@contextmanager
def _directory() -> Iterator[Path]:
    """A directory with a short name, since those of Unix sockets are limited."""
    directory = Path(tempfile.mkdtemp(prefix="theseus-demo-", dir="/tmp"))
    try:
        yield directory
    finally:
        _uninterrupted(lambda: shutil.rmtree(directory))


def _uninterrupted(work: Callable[[], object]) -> None:
    """Do what has to be done although the user presses Ctrl-C again."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        work()
    finally:
        signal.signal(signal.SIGINT, before)


def _check_nothing_left(before: leaks.Traces) -> None:
    leaks.clear(before)
    left = leaks.left_since(before)
    _require(not left, f"left behind: {left}")


if __name__ == "__main__":
    sys.exit(main())
