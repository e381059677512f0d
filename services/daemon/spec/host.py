"""Facts of this machine that a configuration depends on, read once when the daemon starts."""

from __future__ import annotations

import gzip
import os
import re
from pathlib import Path

from services.common.frozen import frozen
from services.daemon.spec.capabilities import names_of_mask

_CGROUP_ROOT = Path("/sys/fs/cgroup")
_CPU_ROOT = Path("/sys/devices/system/cpu")
_X32_OPTIONS = ("CONFIG_X86_X32_ABI", "CONFIG_X86_X32")  # since Linux 5.18, and before


@frozen
class HostFacts:
    """What this kernel and this process can do.

    Attributes:
        machine: as ``uname -m``.
        kernel: version and major revision, e.g. (6, 1).
        capabilities: that this process may hand on, in the kernel's order.
        cpus: processors that may be used.
        unified_cgroups: only cgroup version 2 is mounted.
        swap_limit: swap can be limited together with memory.
        thermal_paths: directories that tell load of other tenants, to be masked.
        x32: programs for x86_64 with short pointers may run; true where it cannot be known.
    """

    machine: str
    kernel: tuple[int, int]
    capabilities: tuple[str, ...]
    cpus: int
    unified_cgroups: bool
    swap_limit: bool
    thermal_paths: tuple[str, ...]
    x32: bool = True

    @classmethod
    def read(cls) -> HostFacts:
        """Ask the kernel. Blocks shortly."""
        unified = (_CGROUP_ROOT / "cgroup.controllers").exists()
        return cls(
            machine=os.uname().machine,
            kernel=kernel_version(os.uname().release),
            capabilities=names_of_mask(_bounding_mask()),
            cpus=len(os.sched_getaffinity(0)),
            unified_cgroups=unified,
            swap_limit=_swap_limit(unified),
            thermal_paths=tuple(
                str(path) for path in sorted(_CPU_ROOT.glob("cpu[0-9]*/thermal_throttle"))
            ),
            x32=may_run_x32(os.uname().release),
        )


def kernel_version(release: str) -> tuple[int, int]:
    """The first two numbers of a kernel release: ``6.1.0-18-amd64`` is (6, 1)."""
    match = re.match(r"(\d+)\.(\d+)", release)
    return (int(match[1]), int(match[2])) if match else (0, 0)


def may_run_x32(release: str, root: Path = Path("/")) -> bool:
    """Whether the kernel has the x32 ABI; true where its configuration cannot be read. Blocks.

    Args:
        release: of the kernel, as ``uname -r``.
        root: where its configuration is looked for.
    """
    try:
        with gzip.open(root / "proc/config.gz", "rt") as file:
            configuration = file.read()
    except OSError:
        try:
            configuration = (root / f"boot/config-{release}").read_text()
        except OSError:
            return True
    return any(f"\n{name}=y\n" in configuration for name in _X32_OPTIONS)


def _bounding_mask() -> int:
    masks = dict(
        line.split(":\t")
        for line in Path("/proc/self/status").read_text().splitlines()
        if "Cap" in line
    )
    return int(masks["CapBnd"], 16) & int(masks["CapPrm"], 16)


def _swap_limit(unified: bool) -> bool:
    if unified:
        return any(_CGROUP_ROOT.glob("*/memory.swap.max"))
    return (_CGROUP_ROOT / "memory/memory.memsw.limit_in_bytes").exists()
