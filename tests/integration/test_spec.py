"""The configurations that the daemon builds, run by the runtimes that are installed."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from services.daemon.networks import netns
from services.daemon.spec.builder import build_spec
from services.daemon.spec.host import HostFacts
from services.daemon.spec.request import (
    ImageConfig,
    NetworkMode,
    Overrides,
    ResolvedUser,
    Resources,
    SpecRequest,
)
from services.daemon.spec.seccomp_default import DEFAULT_PROFILE
from services.daemon.volumes.mounts import Mount, MountType, resolve_bind, resolve_tmpfs

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
    pytest.mark.skipif(shutil.which("busybox") is None, reason="needs a static busybox"),
]

CGROUPS = Path("/sys/fs/cgroup")
APPLETS = (
    "sh",
    "cat",
    "id",
    "env",
    "hostname",
    "grep",
    "head",
    "ip",
    "ls",
    "mknod",
    "touch",
    "unshare",
)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    rootfs = tmp_path / "rootfs"
    (rootfs / "bin").mkdir(parents=True)
    (rootfs / "etc").mkdir()
    (rootfs / "tmp").mkdir(mode=0o777)
    (rootfs / "tmp").chmod(0o1777)
    shutil.copy(str(shutil.which("busybox")), rootfs / "bin/busybox")
    for applet in APPLETS:
        (rootfs / "bin" / applet).symlink_to("busybox")
    return tmp_path


@pytest.fixture
def cgroup() -> Iterator[str]:
    name = f"thtest-{secrets.token_hex(4)}"
    yield name
    for directory in sorted(CGROUPS.glob(f"*/{name}/**/"), reverse=True):
        directory.rmdir()
    for directory in CGROUPS.glob(f"*/{name}"):
        directory.rmdir()


@pytest.fixture(params=["runc", "crun"])
def run(request: pytest.FixtureRequest, bundle: Path, cgroup: str) -> Callable[..., str]:
    """Runs a shell script in a container; returns what it wrote, errors included."""
    runtime = shutil.which(request.param)
    if runtime is None:
        pytest.skip(f"needs {request.param}")
    command = [runtime, "--root", str(bundle / "state"), "run", "--bundle", str(bundle), cgroup]
    if request.param == "crun" and (CGROUPS / "unified/cgroup.controllers").exists():
        # Some versions refuse a hybrid layout: give it one that is not.
        script = f'umount {CGROUPS}/unified && exec "$@"'
        command = ["unshare", "--mount", "sh", "-c", script, "sh", *command]

    def run(script: str, **changes: Any) -> str:
        wanted: dict[str, Any] = {
            "image": ImageConfig(command=("sh", "-c", f"exec 2>&1; {script}"), env=("A=image",)),
            "overrides": Overrides(env=("B=user",), working_dir="/made/for/it"),
            "user": ResolvedUser(),
            "hostname": "box",
            "cgroups_path": f"/{cgroup}/c",
            "network_mode": NetworkMode.NONE,
            "seccomp": DEFAULT_PROFILE,
        }
        spec = build_spec(SpecRequest(**{**wanted, **changes}), HostFacts.read())
        (bundle / "config.json").write_text(json.dumps(spec))
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
            stdin=subprocess.DEVNULL,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


def test_process(run: Callable[..., str]) -> None:
    lines = run("hostname; pwd; env; id; grep -E 'CapEff|NoNewPrivs|Seccomp:' /proc/self/status")
    assert lines.splitlines()[:2] == ["box", "/made/for/it"]
    assert "A=image\n" in lines
    assert "B=user\n" in lines
    assert "HOME=/root\n" in lines
    assert "uid=0 gid=0 groups=0" in lines
    assert "CapEff:\t00000000a80425fb" in lines
    assert "NoNewPrivs:\t0" in lines
    assert "Seccomp:\t2" in lines


def test_user_and_privileges(run: Callable[..., str]) -> None:
    lines = run(
        "id; grep -E 'CapEff|NoNewPrivs' /proc/self/status; touch /x || true",
        user=ResolvedUser(33, 34, (100,), "/var/www"),
        no_new_privileges=True,
    )
    assert "uid=33 gid=34 groups=34,100" in lines
    assert "CapEff:\t0000000000000000" in lines
    assert "NoNewPrivs:\t1" in lines
    assert "touch: /x: Permission denied" in lines


def test_filter_devices_and_paths_keep_the_container_in(run: Callable[..., str]) -> None:
    lines = run(
        "unshare -U true; mknod /tmp/disk b 7 0; head -c1 /tmp/disk; "
        "echo 1 > /proc/sys/vm/swappiness; cat /proc/timer_list; ls /sys/firmware; "
        "echo to-null > /dev/null && echo written"
    )
    assert "unshare: unshare(0x10000000): Operation not permitted" in lines
    assert "head: /tmp/disk: Operation not permitted" in lines
    assert "Read-only file system" in lines
    assert lines.endswith("written\n")


def test_privileged(run: Callable[..., str]) -> None:
    lines = run(
        "unshare -U true && echo unshared; grep Seccomp: /proc/self/status", privileged=True
    )
    assert "unshared" in lines
    assert "Seccomp:\t0" in lines


def test_limits(run: Callable[..., str]) -> None:
    if (CGROUPS / "cgroup.controllers").exists():
        files, quota = "memory.max pids.max cpu.max", ["50000 100000"]
    else:
        files = "memory/memory.limit_in_bytes pids/pids.max cpu/cpu.cfs_quota_us"
        quota = ["50000"]
    lines = run(
        f"cd /sys/fs/cgroup; cat {files}", resources=Resources(64 << 20, 500_000_000, 50, 512)
    )
    assert lines.splitlines() == [str(64 << 20), "50", *quota]


def test_mounts(run: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("127.0.0.1 box\n")
    shared = resolve_bind(
        Mount(MountType.BIND, str(tmp_path / "shared"), "/shared", True, create_source=True)
    )
    scratch = resolve_tmpfs(Mount(MountType.TMPFS, "", "/scratch", options=("size=1m",)))
    lines = run(
        "cat /etc/hosts; touch /shared/x; touch /scratch/x && echo scratched; touch /x; "
        "touch /dev/shm/x && echo shm",
        mounts=(shared, scratch),
        files={"/etc/hosts": str(tmp_path / "hosts")},
        readonly_rootfs=True,
    )
    assert lines.splitlines() == [
        "127.0.0.1 box",
        "touch: /shared/x: Read-only file system",
        "scratched",
        "touch: /x: Read-only file system",
        "shm",
    ]


def test_the_namespace_of_a_network_is_joined(run: Callable[..., str], tmp_path: Path) -> None:
    path = tmp_path / "netns"

    async def joined() -> str:
        mark = ["ip", "link", "add", "name", "mark", "type", "bridge"]
        await netns.inside(path, lambda: subprocess.check_call(mark))
        try:
            return await asyncio.to_thread(
                run,
                "ip -o link; cat /proc/sys/net/ipv4/ip_unprivileged_port_start",
                network_mode=NetworkMode.BRIDGE,
                netns_path=str(path),
            )
        finally:
            await netns.delete_netns(path)

    lines = asyncio.run(joined())
    assert "mark:" in lines
    assert "lo: <LOOPBACK,UP,LOWER_UP>" in lines
    assert lines.endswith("\n0\n")
    assert not path.exists()
