from __future__ import annotations

import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from protos.containerd.cgroups.v1 import metrics_pb2 as v1
from protos.containerd.cgroups.v2 import metrics_pb2 as v2
from services.shim import cgroups
from services.shim.rpc.stats import cgroup_metrics
from services.shim.shim_cgroup import PATH, ROOT, Home
from tests.fakes.shim_harness import REPOSITORY


def tree(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def process(proc, pid, text, ours="0::/\n1:memory:/\n"):
    tree(proc, {f"{pid}/cgroup": text, "self/cgroup": ours})


def test_v1_cgroup_is_found_and_read(tmp_path):
    root, proc = tmp_path / "cg", tmp_path / "proc"
    tree(
        root,
        {
            "memory/a/b/cgroup.procs": "5\n7\n",
            "memory/a/b/nested/cgroup.procs": "9\n",
            "memory/a/b/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 3\n",
        },
    )
    process(proc, 7, "4:memory:/a/b\n3:cpu,cpuacct:/a/b\n0::/\n")
    found = cgroups.of_process(7, root=root, proc=proc)
    assert found.own
    assert [n for n in found.controllers if found.directory(n)] == ["memory"]
    assert found.in_v1
    assert found.processes() == [5, 7, 9]
    assert found.oom_kills() == 3


def test_v2_cgroup_is_found_and_read(tmp_path):
    root, proc = tmp_path / "cg", tmp_path / "proc"
    tree(
        root,
        {
            "cgroup.controllers": "memory pids",
            "a/cgroup.procs": "5\n",
            "a/memory.events": "low 0\noom 1\noom_kill 2\n",
        },
    )
    process(proc, 5, "0::/a\n", ours="0::/\n")
    found = cgroups.of_process(5, root=root, proc=proc)
    assert found.own
    assert not found.in_v1
    assert (found.processes(), found.oom_kills()) == ([5], 2)


def test_v2_part_that_is_shared_on_a_hybrid_host_is_left_alone(tmp_path):
    root, proc = tmp_path / "cg", tmp_path / "proc"
    tree(root, {"memory/a/cgroup.procs": "", "unified/service/cgroup.kill": ""})
    process(proc, 5, "4:memory:/a\n0::/service\n", ours="4:memory:/s\n0::/service\n")
    found = cgroups.of_process(5, root=root, proc=proc)
    assert (found.own, found.unified) == (True, None)
    assert found.kill_all()
    assert (root / "unified/service/cgroup.kill").read_text() == ""


@pytest.mark.parametrize("path", ["/", "/ours"])
def test_cgroup_that_others_share_is_never_killed(tmp_path, path):
    child = subprocess.Popen(["/bin/sleep", "100"])
    root, proc = tmp_path / "cg", tmp_path / "proc"
    tree(root, {f"memory{path}/cgroup.procs": f"{child.pid}\n"})
    process(proc, child.pid, f"4:memory:{path}\n", ours="4:memory:/ours\n")
    found = cgroups.of_process(child.pid, root=root, proc=proc)
    assert not found.own
    assert found.kill_all()
    assert child.poll() is None
    child.kill()
    child.wait()


def test_everything_in_an_own_cgroup_is_killed(tmp_path):
    child = subprocess.Popen(["/bin/sleep", "100"])
    procs = tmp_path / "cgroup.procs"
    procs.write_text(f"{child.pid}\n")
    found = cgroups.Cgroup({"memory": str(tmp_path)}, None, own=True)
    with ThreadPoolExecutor() as pool:
        killing = pool.submit(found.kill_all)
        assert child.wait(10) == -signal.SIGKILL
        procs.write_text("")
        assert killing.result(10)


def test_v1_figures_have_upstreams_fields(tmp_path):
    tree(
        tmp_path,
        {
            "pids/pids.current": "3\n",
            "pids/pids.max": "max\n",
            "cpuacct/cpuacct.usage": "1234\n",
            "cpuacct/cpuacct.stat": "user 2\nsystem 1\n",
            "cpuacct/cpuacct.usage_percpu": "1000 234 \n",
            "cpu/cpu.stat": "nr_periods 5\nnr_throttled 1\nthrottled_time 99\n",
            "memory/memory.stat": "cache 1\nswap 9\npgfault 4\ntotal_rss 8\nunknown 1\n",
            "memory/memory.usage_in_bytes": "4096\n",
            "memory/memory.limit_in_bytes": "8192\n",
            "memory/memory.memsw.usage_in_bytes": "5000\n",
            "memory/memory.oom_control": "oom_kill_disable 0\nunder_oom 1\noom_kill 2\n",
            "blkio/blkio.throttle.io_service_bytes_recursive": "8:0 Read 512\nTotal 512\n",
        },
    )
    names = ("pids", "cpuacct", "cpu", "memory", "blkio")
    packed = cgroup_metrics(
        cgroups.Cgroup({name: f"{tmp_path}/{name}" for name in names}, None, own=True)
    )
    assert packed.type_url == "io.containerd.cgroups.v1.Metrics"
    metrics = v1.Metrics.FromString(packed.value)
    assert (metrics.pids.current, metrics.pids.limit) == (3, 0)
    assert metrics.cpu.usage.total == 1234
    assert metrics.cpu.usage.user == 20_000_000
    assert list(metrics.cpu.usage.per_cpu) == [1000, 234]
    assert metrics.cpu.throttling.throttled_time == 99
    assert (metrics.memory.cache, metrics.memory.pg_fault, metrics.memory.total_rss) == (1, 4, 8)
    assert (metrics.memory.usage.usage, metrics.memory.usage.limit) == (4096, 8192)
    assert metrics.memory.swap.usage == 5000
    assert metrics.memory_oom_control.oom_kill == 2
    entry = metrics.blkio.io_service_bytes_recursive[0]
    assert (entry.op, entry.major, entry.minor, entry.value) == ("Read", 8, 0, 512)


def test_v2_figures_have_upstreams_fields(tmp_path):
    tree(
        tmp_path,
        {
            "pids.current": "3\n",
            "pids.max": "max\n",
            "cpu.stat": "usage_usec 10\nuser_usec 6\nsystem_usec 4\n",
            "memory.stat": "anon 5\nfile 6\n",
            "memory.current": "11\n",
            "memory.max": "max\n",
            "memory.events": "oom_kill 1\n",
            "io.stat": "8:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=0\n",
        },
    )
    packed = cgroup_metrics(cgroups.Cgroup({}, tmp_path, own=True))
    metrics = v2.Metrics.FromString(packed.value)
    assert packed.type_url == "io.containerd.cgroups.v2.Metrics"
    assert metrics.pids.limit == (1 << 64) - 1
    assert metrics.cpu.usage_usec == 10
    assert (metrics.memory.anon, metrics.memory.usage) == (5, 11)
    assert metrics.memory_events.oom_kill == 1
    assert (metrics.io.usage[0].rbytes, metrics.io.usage[0].wios) == (1, 4)


def test_shims_enter_and_leave_a_cgroup_of_their_own(tmp_path):
    root = tmp_path / "cg"
    tree(
        root,
        {
            "memory/containerd/cgroup.procs": "",
            "cpuset/cpuset.cpus": "0-1\n",
            "cpuset/cpuset.mems": "0\n",
        },
    )
    proc = tmp_path / "cgroup"
    proc.write_text("3:memory:/containerd\n2:cpuset:/\n1:gone:/\n")
    home = Home(root, proc)
    home.enter()
    assert (root / "memory/theseus/shims/cgroup.procs").read_text() == "0"
    for name in ("memory", "cpuset"):  # the kernel's files do not keep a cgroup
        for file in (root / name / "theseus").rglob("*"):
            file.unlink() if file.is_file() else None
    home.leave()
    assert not (root / "memory/theseus").exists()
    assert (root / "memory/containerd/cgroup.procs").read_text() == "0"


MEMBER = """
import pathlib, sys
from services.shim.shim_cgroup import PATH, ROOT, Home
from tests.fakes.shim_harness import REPOSITORY
for _ in range(300):
    home = Home(*map(pathlib.Path, sys.argv[1:]))
    home.enter()
    assert not home.skipped, home.skipped
    home.leave()
"""


@pytest.mark.root
def test_one_enters_while_another_leaves(tmp_path):
    """Whoever leaves removes the cgroup, at times between two steps of one who enters."""
    hierarchy = "freezer" if (ROOT / "freezer").is_dir() else ""  # one of many is enough
    # Apart from the shims of others: who still leaves keeps theirs.
    apart = ROOT / hierarchy / f"theseus-test-{tmp_path.name}"
    apart.mkdir()
    root, proc = tmp_path / "root", tmp_path / "cgroup"
    root.mkdir()
    (root / (hierarchy or "unified")).symlink_to(apart)
    proc.write_text(f"1:{hierarchy}:/\n")
    command = [sys.executable, "-c", MEMBER, str(root), str(proc)]
    members = [subprocess.Popen(command, cwd=REPOSITORY) for _ in range(3)]
    assert [member.wait(60) for member in members] == [0, 0, 0]
    assert not (apart / PATH).exists()
    apart.rmdir()


@pytest.mark.root
@pytest.mark.skipif(not (ROOT / "cpuset").is_dir(), reason="cgroup v2: none can be like that")
def test_nothing_is_left_of_a_cgroup_that_cannot_be_entered(tmp_path):
    barren = ROOT / "cpuset" / tmp_path.name  # without CPUs, as every new one
    barren.mkdir()
    (tmp_path / "cpuset").symlink_to(barren)
    proc = tmp_path / "cgroup"
    proc.write_text("3:cpuset:/\n")
    home = Home(tmp_path, proc)
    try:
        home.enter()
        assert home.skipped == {str(tmp_path / "cpuset" / PATH): "No space left on device"}
        assert not (barren / "theseus").exists()
    finally:
        barren.rmdir()
