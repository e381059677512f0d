"""What a container gets when nobody asks for anything else, as users of moby expect it.

The figures are moby's: mounts, masked and read-only paths, device rules, the search path.
"""

from __future__ import annotations

from typing import Any

PATH_ENV = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

MASKED_PATHS = (
    "/proc/acpi",
    "/proc/asound",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/sys/devices/virtual/powercap",
    "/sys/firmware",
)

READONLY_PATHS = (
    "/proc/bus",
    "/proc/fs",
    "/proc/irq",
    "/proc/sys",
    "/proc/sysrq-trigger",
)

# Character devices that may be used: zero, null, urandom, random, tty, console. The runtime adds
# what it creates itself: full, ptmx and the pseudo terminals.
_ALLOWED_DEVICES = ((1, 5), (1, 3), (1, 9), (1, 8), (5, 0), (5, 1))
_FUSE = (10, 229)

# A read-only root leaves these writable: without them hardly any program runs.
WRITABLE_ON_READONLY_ROOT = frozenset({"/proc", "/dev", "/dev/pts", "/dev/shm", "/dev/mqueue"})


def mounts(*, shm_size_bytes: int) -> list[dict[str, Any]]:
    """The mounts of every container, in the order in which they are made."""
    return [
        _mount("/proc", "proc", "proc", "nosuid noexec nodev"),
        _mount("/dev", "tmpfs", "tmpfs", "nosuid strictatime mode=755 size=65536k"),
        _mount(
            "/dev/pts",
            "devpts",
            "devpts",
            "nosuid noexec newinstance ptmxmode=0666 mode=0620 gid=5",
        ),
        _mount("/sys", "sysfs", "sysfs", "nosuid noexec nodev ro"),
        _mount("/sys/fs/cgroup", "cgroup", "cgroup", "ro nosuid noexec nodev"),
        _mount("/dev/mqueue", "mqueue", "mqueue", "nosuid noexec nodev"),
        _mount("/dev/shm", "tmpfs", "shm", f"nosuid noexec nodev mode=1777 size={shm_size_bytes}"),
    ]


def device_rules() -> list[dict[str, Any]]:
    """Rules of the device controller, in order: nothing but the usual devices."""
    return [
        {"allow": False, "access": "rwm"},
        *(_device_rule(True, numbers) for numbers in _ALLOWED_DEVICES),
        _device_rule(False, _FUSE),
    ]


def _device_rule(allow: bool, numbers: tuple[int, int]) -> dict[str, Any]:
    major, minor = numbers
    return {"allow": allow, "type": "c", "major": major, "minor": minor, "access": "rwm"}


def _mount(destination: str, fstype: str, source: str, options: str) -> dict[str, Any]:
    return {
        "destination": destination,
        "type": fstype,
        "source": source,
        "options": options.split(),
    }
