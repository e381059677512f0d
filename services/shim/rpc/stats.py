"""Figures of a cgroup as the messages that containerd's clients know, v1 or v2."""

from __future__ import annotations

from typing import TYPE_CHECKING

from google.protobuf import any_pb2

from services.shim.cgroups import read_lines, read_number, read_table

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from google.protobuf.message import Message

    from protos.containerd.cgroups.v1 import metrics_pb2 as v1
    from services.shim.cgroups import Cgroup

_USER_HZ_NS = 10_000_000
_MEMORY_STAT_NAMES = {
    "pgpgin": "pg_pg_in",
    "pgpgout": "pg_pg_out",
    "pgfault": "pg_fault",
    "pgmajfault": "pg_maj_fault",
    "hierarchical_memsw_limit": "hierarchical_swap_limit",
}
_BLKIO_FILES = {
    "io_service_bytes_recursive": "blkio.throttle.io_service_bytes_recursive",
    "io_serviced_recursive": "blkio.throttle.io_serviced_recursive",
}


def cgroup_metrics(cgroup: Cgroup) -> any_pb2.Any:
    """All figures of a cgroup; what a controller does not give is left out."""
    message = _v1(cgroup) if cgroup.in_v1 else _v2(cgroup)
    return any_pb2.Any(type_url=message.DESCRIPTOR.full_name, value=message.SerializeToString())


def _v1(cgroup: Cgroup) -> Message:
    # Imported late: most shims are never asked.
    from protos.containerd.cgroups.v1 import metrics_pb2

    metrics = metrics_pb2.Metrics()
    readers: dict[str, Callable[[Path, v1.Metrics], None]] = {
        "pids": _v1_pids,
        "cpuacct": _v1_cpuacct,
        "cpu": _v1_cpu,
        "memory": _v1_memory,
        "blkio": _v1_blkio,
    }
    for controller, reader in readers.items():
        if (directory := cgroup.directory(controller)) is not None:
            reader(directory, metrics)
    return metrics


def _v1_pids(path: Path, metrics: v1.Metrics) -> None:
    metrics.pids.current = read_number(path / "pids.current")
    limit = read_lines(path / "pids.max")
    # Upstream has 0 for no limit.
    metrics.pids.limit = int(limit[0]) if limit and limit[0].isdigit() else 0


def _v1_cpuacct(path: Path, metrics: v1.Metrics) -> None:
    usage = metrics.cpu.usage
    usage.total = read_number(path / "cpuacct.usage")
    ticks = read_table(path / "cpuacct.stat")
    usage.user = ticks.get("user", 0) * _USER_HZ_NS
    usage.kernel = ticks.get("system", 0) * _USER_HZ_NS
    for line in read_lines(path / "cpuacct.usage_percpu"):
        usage.per_cpu.extend(int(word) for word in line.split())


def _v1_cpu(path: Path, metrics: v1.Metrics) -> None:
    table = read_table(path / "cpu.stat")
    metrics.cpu.throttling.periods = table.get("nr_periods", 0)
    metrics.cpu.throttling.throttled_periods = table.get("nr_throttled", 0)
    metrics.cpu.throttling.throttled_time = table.get("throttled_time", 0)


def _v1_memory(path: Path, metrics: v1.Metrics) -> None:
    memory = metrics.memory
    for name, value in read_table(path / "memory.stat").items():
        prefix = "total_" if name.startswith("total_") else ""
        plain = name.removeprefix("total_")
        _set(memory, prefix + _MEMORY_STAT_NAMES.get(plain, plain), value)
    for entry, infix in (
        (memory.usage, ""),
        (memory.swap, "memsw."),
        (memory.kernel, "kmem."),
        (memory.kernel_tcp, "kmem.tcp."),
    ):
        entry.limit = read_number(path / f"memory.{infix}limit_in_bytes")
        entry.usage = read_number(path / f"memory.{infix}usage_in_bytes")
        entry.max = read_number(path / f"memory.{infix}max_usage_in_bytes")
        entry.failcnt = read_number(path / f"memory.{infix}failcnt")
    table = read_table(path / "memory.oom_control")
    metrics.memory_oom_control.oom_kill_disable = table.get("oom_kill_disable", 0)
    metrics.memory_oom_control.under_oom = table.get("under_oom", 0)
    metrics.memory_oom_control.oom_kill = table.get("oom_kill", 0)


def _v1_blkio(path: Path, metrics: v1.Metrics) -> None:
    metrics.blkio.SetInParent()  # there, if empty, as upstream has it
    for field, name in _BLKIO_FILES.items():
        for line in read_lines(path / name):
            words = line.split()
            if len(words) != 3:
                continue
            major, _, minor = words[0].partition(":")
            getattr(metrics.blkio, field).add(
                op=words[1], major=int(major), minor=int(minor), value=int(words[2])
            )


def _v2(cgroup: Cgroup) -> Message:
    from protos.containerd.cgroups.v2 import metrics_pb2

    metrics = metrics_pb2.Metrics()
    path = cgroup.unified
    if path is None:
        return metrics
    metrics.pids.current = read_number(path / "pids.current")
    metrics.pids.limit = read_number(path / "pids.max")
    _fill(metrics.cpu, read_table(path / "cpu.stat"))
    _fill(metrics.memory, read_table(path / "memory.stat"))
    metrics.memory.usage = read_number(path / "memory.current")
    metrics.memory.usage_limit = read_number(path / "memory.max")
    metrics.memory.swap_usage = read_number(path / "memory.swap.current")
    metrics.memory.swap_limit = read_number(path / "memory.swap.max")
    _fill(metrics.memory_events, read_table(path / "memory.events"))
    for line in read_lines(path / "io.stat"):
        device, *pairs = line.split()
        major, _, minor = device.partition(":")
        figures = dict(pair.split("=", 1) for pair in pairs if "=" in pair)
        metrics.io.usage.add(
            major=int(major),
            minor=int(minor),
            **{
                name: int(figures[name])
                for name in ("rbytes", "wbytes", "rios", "wios")
                if figures.get(name, "").isdigit()
            },
        )
    return metrics


def _fill(message: Message, table: dict[str, int]) -> None:
    for name, value in table.items():
        _set(message, name, value)


def _set(message: Message, name: str, value: int) -> None:
    """Set a field of a number, if there is one of that name."""
    field = message.DESCRIPTOR.fields_by_name.get(name)
    if field is not None and field.message_type is None:
        setattr(message, name, value)
