"""SIGKILL of containerd, of the daemon, and of both: containers go on, and nothing is lost."""

import os
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import pytest

from tests.integration.theseus import ended, until
from tools import engine as engines

pytestmark = pytest.mark.root

COUNTER = "i=0; while :; do echo $i; i=$((i+1)); sleep 0.02; done"
TIERS = [("containerd",), ("daemon",), ("containerd", "daemon")]


@pytest.fixture(params=TIERS, ids="+".join)
def tiers(request):
    return request.param


def numbers(text):
    return [int(line) for line in text.split()]


def has_no_gap(text):
    found = numbers(text)
    return found == list(range(len(found))) and len(found)


def test_a_container_goes_on_and_its_output_is_whole(theseus, runtime, tiers):
    theseus.start("--runtime", runtime, "--name", "counter", "--", "sh", "-c", COUNTER)
    pid = theseus.pid("counter")
    old = [theseus.tier_pid(tier) for tier in tiers]
    theseus.kill_tiers(*tiers)
    theseus.wait_until_up()
    assert [theseus.tier_pid(tier) for tier in tiers] != old
    found = theseus.inspect("counter")["State"]
    assert (found["Status"], found["Pid"]) == ("running", pid)
    seen = len(numbers(theseus.ok("logs", "counter")))
    until(lambda: len(numbers(theseus.ok("logs", "counter"))) > seen + 10)
    assert has_no_gap(theseus.ok("logs", "counter"))
    # It is theirs again in every way.
    assert theseus("exec", "counter", "sh", "-c", "exit 4").code == 4
    with_rest = theseus.spawn("logs", "-f", "counter")
    theseus.ok("stop", "-t", "0", "counter")
    assert theseus.ok("wait", "counter") == "137"
    assert has_no_gap(with_rest.communicate(timeout=20)[0])


def test_an_exit_while_they_are_down_is_known(theseus, runtime, tiers, tmp_path):
    os.mkfifo(tmp_path / "go")
    theseus.start(
        *["--runtime", runtime, "--name", "answer", "-v", f"{tmp_path}:/d", "--"],
        *["sh", "-c", "read x < /d/go; echo last words; exit 42"],
    )
    pid = theseus.pid("answer")
    with theseus.down(*tiers):
        (tmp_path / "go").write_text("\n")
        ended(pid)
    theseus.wait_until_up()
    assert theseus.ok("wait", "answer") == "42"
    found = theseus.inspect("answer")["State"]
    assert (found["Status"], found["ExitCode"]) == ("exited", 42)
    assert theseus.ok("logs", "answer") == "last words"
    assert "Exited (42)" in theseus.ok("ps", "-a")


def test_one_that_removes_itself_does_so_after_they_return(theseus, tmp_path, tiers):
    os.mkfifo(tmp_path / "go")
    with theseus.leaves_nothing():
        theseus.start(
            *["--rm", "--name", "brief", "-v", f"{tmp_path}:/d", "--"],
            *["sh", "-c", "read x < /d/go; exit 3"],
        )
        pid = theseus.pid("brief")
        with theseus.down(*tiers):
            (tmp_path / "go").write_text("\n")
            ended(pid)
        theseus.wait_until_up()
        until(lambda: theseus("inspect", "brief").code == 1)


def test_a_run_in_the_foreground_notices_nothing(theseus, runtime, tiers, tmp_path):
    script = "i=0; while [ $i -lt 150 ]; do echo $i; i=$((i+1)); sleep 0.02; done; exit 8"
    process = theseus.spawn("run", "--rm", "--runtime", runtime, theseus.image, "sh", "-c", script)
    for _ in range(10):
        process.stdout.readline()
    theseus.kill_tiers(*tiers)
    out, err = process.communicate(timeout=40)
    assert numbers(out) == list(range(10, 150))
    assert (process.returncode, err) == (8, "")


def test_input_of_a_run_in_the_foreground_goes_on(theseus, tiers):
    process = theseus.spawn("run", "--rm", "-i", theseus.image, "cat")
    process.stdin.write("before\n")
    process.stdin.flush()
    assert process.stdout.readline() == "before\n"
    theseus.kill_tiers(*tiers)
    process.stdin.write("while away\n")
    process.stdin.flush()
    assert process.stdout.readline() == "while away\n"
    out, err = process.communicate("after\n", timeout=40)
    assert (out, err, process.returncode) == ("after\n", "", 0)


def test_waiting_commands_go_on(theseus, tiers, tmp_path):
    os.mkfifo(tmp_path / "go")
    theseus.start(
        *["--name", "awaited", "-v", f"{tmp_path}:/d", "--"],
        *["sh", "-c", "echo a; read x < /d/go; echo b; exit 5"],
    )
    waiting = theseus.spawn("wait", "awaited")
    following = theseus.spawn("logs", "-f", "awaited")
    assert following.stdout.readline() == "a\n"
    silent = theseus.spawn("logs", "-f", "--tail", "0", "awaited")
    executing = theseus.spawn("exec", "awaited", "sh", "-c", "sleep 2; echo done; exit 6")
    until(lambda: "sleep" in theseus.ok("exec", "awaited", "ps"))
    theseus.kill_tiers(*tiers)
    theseus.wait_until_up()
    assert executing.communicate(timeout=30) == ("done\n", "")
    assert executing.returncode == 6
    (tmp_path / "go").write_text("\n")
    assert waiting.communicate(timeout=30) == ("5\n", "")
    assert following.communicate(timeout=30) == ("b\n", "")
    assert silent.communicate(timeout=30) == ("b\n", "")


def test_an_exec_is_made_once_whenever_the_daemon_dies(theseus):
    theseus.start("--name", "counted", "--", "sleep", "1000")
    script, ran = "echo $0 >> /ran; echo out; exit 3", []
    for number in range(8):
        executing = theseus.spawn("exec", "counted", "sh", "-c", script, str(number))
        time.sleep(0.1 + 0.03 * number)  # before its call, in the midst of it, or after it
        theseus.kill_tiers("daemon")
        out, err = executing.communicate(timeout=40)
        if "cannot reach the engine" in err:  # it came while there was none: nothing may have run
            assert (out, executing.returncode) == ("", 1)
        else:
            assert (out, err, executing.returncode) == ("out\n", "", 3)
            ran.append(str(number))
        theseus.wait_until_up()
    assert theseus.ok("exec", "counted", "cat", "/ran").split() == ran


def test_a_published_page_is_served_without_a_gap(theseus, tiers):
    theseus.start(
        *["--name", "web", "-p", "127.0.0.1::80", "--"],
        *["sh", "-c", "mkdir /w; echo page > /w/index.html; httpd -f -p 80 -h /w"],
    )
    port = theseus.inspect("web")["NetworkSettings"]["Ports"]["80/tcp"][0]["HostPort"]
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def page():
        with opener.open(f"http://127.0.0.1:{port}/", timeout=2) as answer:
            return answer.read()

    until(lambda: _quietly(page) == b"page\n")
    failures, asked, stop = [], [], threading.Event()

    def ask():
        while not stop.wait(0.01):
            try:
                assert page() == b"page\n"
                asked.append(1)
            except Exception as error:
                failures.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    theseus.kill_tiers(*tiers)
    theseus.wait_until_up()
    enough = len(asked) + 20
    until(lambda: len(asked) > enough)
    stop.set()
    thread.join()
    assert failures == []


def _quietly(page):
    try:
        return page()
    except OSError:
        return None


def test_many_containers_are_found_again(theseus):
    names = [f"many{number}" for number in range(6)]
    for name in names:
        theseus.start("--name", name, "--network", "none", "--", "sleep", "600")
    pids = {name: theseus.pid(name) for name in names}
    for _ in range(3):
        theseus.kill_tiers("containerd", "daemon")
        theseus.wait_until_up()
    assert {name: theseus.pid(name) for name in names} == pids
    theseus.ok("rm", "-f", *names)


def test_a_request_while_containerd_is_away_is_answered_when_it_is_back(theseus):
    theseus.start("--name", "there", "--", "sleep", "600")
    theseus.kill_tiers("containerd")
    assert theseus("exec", "there", "true").code == 0


def test_up_ends_and_comes_back_to_running_containers(theseus, tmp_path):
    """An engine of its own, since the shared one must stay."""
    directory = tmp_path.parent / "u"
    directory.mkdir()
    archive = tmp_path / "busybox.tar"
    from tools import image

    image.write_oci_archive(image.busybox(), archive, "docker.io/library/busybox:latest")
    arguments = ["--bridge-name", "ttest1", "--bridge-subnet", "172.31.0.0/24"]
    environment = {**os.environ}

    def call(engine, *words):
        environment["THESEUS_HOST"] = str(engine.socket)
        done = subprocess.run(
            [sys.executable, "-m", "services.cli", *words],
            env=environment,
            capture_output=True,
            text=True,
            timeout=40,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    pid_format = "{{.State.Pid}}"
    with engines.running(directory, arguments) as engine:
        call(engine, "load", "-q", "-i", str(archive))
        call(
            engine,
            "run",
            "-d",
            "--name",
            "steady",
            "--network",
            "none",
            "busybox",
            "sh",
            "-c",
            COUNTER,
        )
        pid = call(engine, "inspect", "-f", pid_format, "steady")
    assert Path(f"/proc/{pid}").is_dir(), "it ended with theseus up"
    assert not engine.socket.exists()
    with engines.running(directory, arguments) as engine:
        assert call(engine, "inspect", "-f", pid_format, "steady") == pid
        for options, owner in (
            (engine.process.args, engine.process.pid),
            # Another `up` cannot know; the tier finds out.
            (_with_own_lock(engine, tmp_path), (directory / "root/containerd/lock").read_text()),
        ):
            second = subprocess.run(
                options, capture_output=True, text=True, timeout=40, check=False
            )
            assert second.returncode == 1
            assert f"belongs to process {str(owner).strip()}: stop that one" in second.stderr
            assert second.stdout == ""
        call(engine, "rm", "-f", "steady")
    ended(int(pid))


def test_up_that_is_killed_takes_its_tiers_along(theseus, tmp_path):
    directory = tmp_path.parent / "k"
    directory.mkdir()
    arguments = ["--bridge-name", "ttest2", "--bridge-subnet", "172.31.1.0/24"]
    with engines.running(directory, arguments) as engine:
        pids = [int((engine.root / tier / "lock").read_text()) for tier in ("containerd", "daemon")]
        engine.process.kill()
        engine.process.wait()
        for pid in pids:
            ended(pid)


def _with_own_lock(engine, tmp_path):
    """The command line of an `up` whose containerd has the root of another engine's."""
    others = {str(engine.root): f"{tmp_path}/r", str(engine.state): f"{tmp_path}/s"}
    words = [others.get(word, word) for word in engine.process.args]
    containerd = [f"--root={engine.root}/containerd", "--lock-timeout=0.2"]
    return [*words, *(f"--containerd-option={option}" for option in containerd)]
