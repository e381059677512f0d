from __future__ import annotations

import base64
import json
import os
import signal
from pathlib import Path

import pytest

from services.common.errors import InvalidArgument
from services.shim.reaper import Reaper
from services.shim.runtimes import criu, failures, probe, programs
from services.shim.runtimes.programs import find_program
from services.shim.runtimes.runc import RuncRuntime
from services.shim.runtimes.runtime import (
    CommandNotExecutable,
    CommandNotFound,
    RuntimeBroken,
    RuntimeFailed,
    RuntimeMissing,
    RuntimeOptions,
    RuntimeStdio,
    UnknownToRuntime,
)
from tests.fakes import runtime as fakes
from tests.fakes.eventually import eventually


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        # runc 1.1
        (
            'runc create failed: unable to start container process: exec: "nope": executable file '
            "not found in $PATH",
            CommandNotFound,
        ),
        ('exec: "/bin/nope": stat /bin/nope: no such file or directory', CommandNotFound),
        ('exec: "/bin/x": permission denied', CommandNotExecutable),
        ('exec: "/adir": is a directory', CommandNotExecutable),
        ("exec /bin/x: exec format error", CommandNotExecutable),
        ('error mounting "/a" to rootfs at "/b": not a directory', CommandNotFound),
        ("container does not exist", UnknownToRuntime),
        ("unable to apply cgroup configuration: no space left on device", RuntimeFailed),
        # crun 1.8
        ("executable file `nope` not found in $PATH: No such file or directory", CommandNotFound),
        ("open executable: Permission denied", CommandNotExecutable),
        ("open executable: Operation not permitted", CommandNotExecutable),
        (
            "error opening file `/run/crun/x/status`: No such file or directory",
            UnknownToRuntime,
        ),
        ("cgroups in hybrid mode not supported, drop all controllers from cgroupv2", RuntimeFailed),
    ],
)
def test_runtimes_words_become_an_error(text, kind):
    assert type(failures.classify_creation(text, "sentence")) is kind


def test_only_creation_knows_of_commands():
    assert type(failures.classify("x: no such file or directory", "s")) is RuntimeFailed


def test_log_gives_the_last_error_behind_an_offset(tmp_path):
    path = tmp_path / "log.json"
    old = '{"level":"error","msg":"old"}\n'
    path.write_text(
        old + '{"level":"error","msg":"first"}\n{"level":"error","msg":" second\\nline "}\n'
        '{"level":"debug","msg":"later"}\nnot json\n'
    )
    assert failures.read_log(path, len(old)) == "second line"
    path.write_text('[]\n{"level":"info"}\nplain words\n')
    assert failures.read_log(path, 0) == "plain words"
    assert failures.read_log(tmp_path / "missing", 0) == ""
    path.write_text(json.dumps({"level": "error", "msg": "x" * 10_000}) + "\n")
    assert len(failures.read_log(path, 0)) < 2100


@pytest.mark.parametrize("binary", ["", "a b", "../runc", "a/b", "x" * 200])
def test_runtime_name_is_a_name_or_an_absolute_path(binary):
    with pytest.raises(InvalidArgument):
        find_program(binary)


def test_runtime_that_is_not_installed_is_missing():
    with pytest.raises(RuntimeMissing, match="not installed"):
        find_program("no-such-runtime")


class Bench:
    """A runtime for one container over the fake program."""

    def __init__(self, directory, reaper):
        self.fake = fakes.install(directory / "fake")
        self.bundle = directory / "bundle"
        self.bundle.mkdir()
        self.spec("/bin/sleep", "100")
        self.reaper = reaper
        self.root = directory / "root"
        self.runtime = self.make()

    def make(self, *, timeout_s=10.0, **options):
        return RuncRuntime(
            "c",
            RuntimeOptions(binary=str(self.fake.path), root=self.root, **options),
            log_file=self.bundle / "log.json",
            reaper=self.reaper,
            timeout_s=timeout_s,
        )

    def spec(self, *arguments):
        (self.bundle / "config.json").write_text(json.dumps({"process": {"args": arguments}}))

    async def create(self, runtime=None):
        null = os.open(os.devnull, os.O_RDWR)
        runtime = runtime or self.runtime
        try:
            runtime.prepare(self.bundle, json.loads((self.bundle / "config.json").read_text()))
            return await runtime.create(
                bundle=self.bundle,
                pid_file=self.bundle / "init.pid",
                stdio=RuntimeStdio(null, null, null),
                console="",
            )
        finally:
            os.close(null)


@pytest.fixture
async def bench(tmp_path):
    reaper = Reaper()
    reaper.start()
    made = Bench(tmp_path, reaper)
    yield made
    await made.runtime.delete(force=True)
    reaper.stop()


async def test_commands_have_runcs_words(bench):
    runtime = bench.make(no_pivot_root=True, no_new_keyring=True, systemd_cgroup=True)
    pid = await bench.create(runtime)
    assert Path(f"/proc/{pid}").exists()
    await runtime.start()
    await runtime.pause()
    await runtime.resume()
    resources = bench.bundle / "resources.json"
    resources.write_text("{}")
    await runtime.update(resources)
    await runtime.kill(signal.SIGKILL, all_processes=True)
    await eventually(lambda: not Path(f"/proc/{pid}").exists())
    await runtime.delete(force=False)
    await runtime.delete(force=True)  # gone already: fine
    bundle, pid_file = str(bench.bundle), str(bench.bundle / "init.pid")
    switches = ["--no-pivot", "--no-new-keyring"]
    assert bench.fake.calls() == [
        ["create", "--bundle", bundle, "--pid-file", pid_file, *switches, "c"],
        ["start", "c"],
        ["pause", "c"],
        ["resume", "c"],
        ["update", "--resources", str(resources), "c"],
        ["kill", "--all", "c", "9"],
        ["delete", "c"],
        ["delete", "--force", "c"],
    ]  # fmt: skip
    assert await runtime.version() == "fake-runtime version 1.0"


@pytest.mark.parametrize(
    ("fault", "kind", "words"),
    [
        ({"message": "the moon is full"}, RuntimeFailed, "the moon is full"),
        ({"exit_code": 4}, RuntimeFailed, "exited with 4 without a word"),
        ({"die": 9, "message": "last words"}, RuntimeBroken, "signal 9; its last words: last"),
        ({"garbage": 3_000_000}, RuntimeFailed, "garbage"),
    ],
)
async def test_failure_says_what_the_runtime_said(bench, fault, kind, words):
    await bench.create()
    bench.fake.fail("pause", **fault)
    with pytest.raises(kind) as caught:
        await bench.runtime.pause()
    assert words in caught.value.message
    assert len(caught.value.message) < 4000
    bench.fake.heal("pause")
    await bench.runtime.pause()
    await bench.runtime.resume()


async def test_runtime_that_hangs_is_killed(bench):
    runtime = bench.make(timeout_s=0.3)
    bench.fake.fail("create", hang=True, message="thinking")
    with pytest.raises(RuntimeBroken, match=r"did not answer in time and was killed.*thinking"):
        await bench.create(runtime)


@pytest.mark.parametrize(("lie", "words"), [("no-pid", "without writing"), ("bad-pid", "no proc")])
async def test_runtime_that_lies_about_the_pid_is_broken(bench, lie, words):
    bench.fake.fail("create", lie=lie)
    with pytest.raises(RuntimeBroken, match=words):
        await bench.create()


async def test_program_that_cannot_be_executed_is_missing(bench):
    bench.fake.path.chmod(0o644)
    with pytest.raises(RuntimeMissing, match="Permission denied"):
        await bench.runtime.start()
    bench.fake.path.chmod(0o755)


async def test_descriptors_are_closed_whatever_happens(bench):
    await bench.create()
    before = len(list(Path("/proc/self/fd").iterdir()))
    bench.fake.fail("pause", message="no")
    for _ in range(3):
        with pytest.raises(RuntimeFailed):
            await bench.runtime.pause()
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def script(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_probe_says_what_is_usable_and_why_not(tmp_path):
    good = script(tmp_path / "good", "echo runc version 1.1.5; echo more")
    bad = script(tmp_path / "bad", "exit 3")
    crun = script(tmp_path / "crun", "echo crun version 1.8.1")
    hybrid, pure = tmp_path / "hybrid", tmp_path / "pure"
    (hybrid / "unified").mkdir(parents=True)
    (hybrid / "unified" / "cgroup.controllers").write_text("hugetlb\n")
    pure.mkdir()
    (pure / "cgroup.controllers").write_text("memory\n")
    names = [good, bad, crun, "no-such-runtime", str(tmp_path / "missing")]
    found = {result.name: result for result in probe.probe(names, cgroups=hybrid)}
    assert (found[good].usable, found[good].version) == (True, "runc version 1.1.5")
    assert not found[bad].usable
    assert "exited with 3" in found[bad].reason
    assert not found[crun].usable
    assert "hugetlb" in found[crun].reason
    assert "not installed" in found["no-such-runtime"].reason
    assert "No such file" in found[str(tmp_path / "missing")].reason
    assert probe.probe([crun], cgroups=pure)[0].usable
    assert probe.probe([crun], cgroups=tmp_path)[0].usable


async def test_the_next_container_is_created_with_the_compiled_filter(bench):
    compiled = b"\x06\0\0\0\0\0\xff\x7f"
    bench.fake.leave_filter(compiled)
    spec = {"process": {"args": ["/bin/sleep", "100"]}, "linux": {"seccomp": {"syscalls": []}}}
    config = bench.bundle / "config.json"
    config.write_text(json.dumps(spec))
    await bench.create()
    assert json.loads(config.read_text()) == spec
    await bench.runtime.delete(force=True)
    await bench.create()
    given = json.loads(config.read_text())
    assert base64.b64decode(given["annotations"]["run.oci.seccomp_bpf_data"]) == compiled


def test_criu_is_quoted_with_its_last_errors(tmp_path):
    log = tmp_path / "dump.log"
    assert criu.reason(log) == ""
    lines = [f"(00.0{n}) Error (criu/x.c:{n}): failure {n}\n(00.0{n}) fine" for n in range(6)]
    log.write_text("\n".join(lines))
    assert criu.reason(log) == "failure 2; failure 3; failure 4; failure 5"


def test_probe_says_why_there_are_no_checkpoints(tmp_path, monkeypatch):
    program = tmp_path / "runtime"
    program.write_text('#!/bin/sh\n[ "$1" != checkpoint ] || exit 1\necho runtime version 1\n')
    program.chmod(0o755)
    (without,) = probe.probe([str(program)], cgroups=tmp_path)
    assert (without.usable, without.checkpoints) == (True, False)
    assert without.no_checkpoints == f"{program} was built without it"
    program.write_text("#!/bin/sh\necho runtime version 1\n")
    checker = tmp_path / "criu"
    monkeypatch.setitem(programs.ENVIRONMENT, "PATH", f"{tmp_path}:/usr/bin:/bin")
    for script, words in (
        ("echo Looks good.", ""),
        ("echo '(0.1) Error (criu/a.c:1): no ptrace'; exit 1", f"{checker} check: no ptrace"),
        ("exit 1", f"{checker} check: it fails"),
    ):
        checker.write_text(f"#!/bin/sh\n{script}\n")
        checker.chmod(0o755)
        probe._criu_obstacle.cache_clear()
        (found,) = probe.probe([str(program)], cgroups=tmp_path)
        assert (found.checkpoints, found.no_checkpoints) == (not words, words)
    probe._criu_obstacle.cache_clear()
