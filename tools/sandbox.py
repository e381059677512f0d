"""Run a command as if on a machine of its own, and leave nothing of it behind.

    python -m tools.sandbox COMMAND [ARG ...]

The command gets private network, mount, pid and cgroup namespaces: loopback is up and nothing else
is there, its cgroups lie below one of their own, and when it ends the kernel ends all it started.
The hybrid hierarchy's cgroup2 mount is left out, since crun 1.8 refuses a host that has one with a
controller in it. The exit status is the command's; 125 says that the sandbox could not be made.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from services.common import linux

if TYPE_CHECKING:
    from collections.abc import Callable

CGROUP_ROOT = Path("/sys/fs/cgroup")
MARK = "THESEUS_SANDBOX"
"""Environment variable that is set inside."""

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def main() -> int:
    """Make the sandbox, run the command in it, and clean up."""
    command = sys.argv[1:]
    if not command:
        sys.stderr.write(f"{__doc__}\n")
        return 125
    if os.geteuid() != 0:
        sys.stderr.write("sandbox: needs root, to make namespaces and cgroups\n")
        return 125
    name = f"theseus-sandbox-{os.getpid()}"
    cgroups = _enter_cgroups(name)
    try:
        return _run(command)
    finally:
        for directory in cgroups:
            _leave_cgroup(directory)


def _run(command: list[str]) -> int:
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # the command hears them, and ends in its own way
    # Two forks: this process stays outside to clean up, its child becomes part of the new mount
    # namespace, and only a child of that one is process 1 of the new pid namespace.
    return _in_child(lambda: _isolated(command))


def _isolated(command: list[str]) -> int:
    linux.unshare(
        linux.CLONE_NEWNS | linux.CLONE_NEWNET | linux.CLONE_NEWPID | linux.CLONE_NEWCGROUP
    )
    return _in_child(lambda: _init(command))


def _in_child(work: Callable[[], int]) -> int:
    child = os.fork()
    if child == 0:
        status = 125
        try:
            linux.set_parent_death_signal(signal.SIGKILL)
            status = work()
        except Exception as error:
            sys.stderr.write(f"sandbox: {type(error).__name__}: {error}\n")
        finally:
            os._exit(status)
    signal.signal(signal.SIGTERM, lambda *_: os.kill(child, signal.SIGTERM))
    return _exit_code(os.waitpid(child, 0)[1])


def _init(command: list[str]) -> int:
    """Process 1: set the stage, start the command, reap until it ends."""
    linux.mount("none", "/", flags=linux.MS_REC | linux.MS_PRIVATE)
    linux.mount("proc", "/proc", fstype="proc")
    _mount_cgroups()
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    environment = {**os.environ, MARK: "1"}
    pid = os.posix_spawnp(command[0], command, environment, setsigdef=_SIGNALS)
    signal.signal(signal.SIGTERM, lambda *_: os.kill(pid, signal.SIGTERM))
    while True:
        ended, status = os.wait()
        if ended == pid:
            return _exit_code(status)


def _exit_code(status: int) -> int:
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def _hierarchies() -> list[tuple[Path, str, str]]:
    """Mount point, file system type and controller options of each cgroup mount."""
    found = []
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, target, fstype, options, *_ = line.split()
        if fstype in ("cgroup", "cgroup2"):
            kept = [o for o in options.split(",") if o not in ("rw", "ro", "relatime", "nosuid")]
            kept = [o for o in kept if o not in ("nodev", "noexec", "nsdelegate")]
            found.append((Path(target), fstype, ",".join(kept)))
    return found


def _enter_cgroups(name: str) -> list[Path]:
    made = []
    for target, fstype, _ in _hierarchies():
        directory = target / name
        if fstype == "cgroup2" and target != CGROUP_ROOT:
            continue  # the hybrid hierarchy's
        directory.mkdir()
        made.append(directory)
        for setting in ("cpuset.cpus", "cpuset.mems"):
            if (target / setting).exists():  # a new v1 cpuset is empty, and takes no process
                (directory / setting).write_text((target / setting).read_text())
        (directory / "cgroup.procs").write_text(str(os.getpid()))
    return made


def _leave_cgroup(directory: Path) -> None:
    (directory.parent / "cgroup.procs").write_text(str(os.getpid()))
    for root, directories, _ in os.walk(directory, topdown=False):
        for entry in directories:
            (Path(root) / entry).rmdir()
    directory.rmdir()


def _mount_cgroups() -> None:
    hierarchies = _hierarchies()
    for target, _, _ in reversed(hierarchies):
        linux.umount(target, linux.MNT_DETACH)
    if not any(target == CGROUP_ROOT for target, _, _ in hierarchies):
        # A fresh directory of hierarchies: crun makes plain directories where it misses cgroup2's.
        linux.mount("tmpfs", CGROUP_ROOT, fstype="tmpfs", data="mode=755")
    for target, fstype, options in hierarchies:
        if fstype == "cgroup":
            target.mkdir()
            linux.mount("cgroup", target, fstype=fstype, data=options)
        elif target == CGROUP_ROOT:
            linux.mount("cgroup", target, fstype=fstype)


if __name__ == "__main__":
    sys.exit(main())
