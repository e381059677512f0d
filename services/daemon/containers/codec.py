"""Records as JSON objects for the database, and back.

A field that is missing takes its default and one that is unknown is passed over, so that the
version before, or after, this one reads the same rows.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, TypeVar

from services.daemon.containers.record import (
    ContainerConfig,
    ContainerId,
    ContainerRecord,
    Endpoint,
    ExecConfig,
    ExecId,
    ExecRecord,
    ExecState,
    ExitStatus,
    Mount,
    MountKind,
    PortMapping,
    Resources,
    State,
    Tombstone,
)
from services.daemon.images.image import RunImage
from services.daemon.metadata.containers import ContainerRow, ExecRow, TombstoneRow
from services.daemon.spec.request import ImageConfig

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

T = TypeVar("T")

_COLUMNS = ("id", "name", "state")
_EXEC_COLUMNS = ("id", "container_id")


def container_row(record: ContainerRecord) -> ContainerRow:
    """The row of a container."""
    rest = dataclasses.asdict(record)
    for column in _COLUMNS:
        del rest[column]
    return ContainerRow(record.id, record.name, record.state, record.image.id, rest)


def container_record(row: ContainerRow) -> ContainerRecord:
    """The container of a row."""
    rest = dict(row.record)
    return _make(
        ContainerRecord,
        rest,
        id=ContainerId(row.id),
        name=row.name,
        state=State(row.state),
        config=_config(rest["config"]),
        image=_image(rest["image"]),
        args=tuple(rest["args"]),
        early_exit=exit_status(rest.get("early_exit")),
        exit=exit_status(rest.get("exit")),
        mounts=_mounts(rest.get("mounts", ())),
        endpoints=tuple(_make(Endpoint, value) for value in rest.get("endpoints", ())),
        ports=_ports(rest.get("ports", ())),
    )


def exec_row(record: ExecRecord) -> ExecRow:
    """The row of an exec session."""
    rest = dataclasses.asdict(record)
    for column in _EXEC_COLUMNS:
        del rest[column]
    return ExecRow(record.id, record.container_id, rest)


def exec_record(row: ExecRow) -> ExecRecord:
    """The exec session of a row."""
    rest = dict(row.record)
    config = dict(rest["config"])
    return _make(
        ExecRecord,
        rest,
        id=ExecId(row.id),
        container_id=ContainerId(row.container_id),
        config=_make(
            ExecConfig,
            config,
            command=tuple(config["command"]),
            env=tuple(config.get("env", ())),
        ),
        state=ExecState(rest["state"]),
        exit=exit_status(rest.get("exit")),
    )


def tombstone_row(tombstone: Tombstone) -> TombstoneRow:
    """The row of a tombstone."""
    status = None if tombstone.exit is None else dataclasses.asdict(tombstone.exit)
    return TombstoneRow(tombstone.id, tombstone.name, status, tombstone.removed_at_ns)


def tombstone(row: TombstoneRow) -> Tombstone:
    """The tombstone of a row."""
    return Tombstone(ContainerId(row.id), row.name, exit_status(row.exit_status), row.removed_at_ns)


def exit_status(value: Mapping[str, Any] | None) -> ExitStatus | None:
    """An exit status out of its JSON object."""
    return None if value is None else _make(ExitStatus, value)


def _config(value: Mapping[str, Any]) -> ContainerConfig:
    entrypoint = value.get("entrypoint")
    lists = ("command", "env", "cap_add", "cap_drop", "security_opt")
    return _make(
        ContainerConfig,
        value,
        entrypoint=None if entrypoint is None else tuple(entrypoint),
        mounts=_mounts(value.get("mounts", ())),
        ports=_ports(value.get("ports", ())),
        resources=_make(Resources, value.get("resources", {})),
        **{name: tuple(value.get(name, ())) for name in lists},
    )


def _image(value: Mapping[str, Any]) -> RunImage:
    config = value["config"]
    lists = ("env", "entrypoint", "command", "exposed_ports", "volumes")
    return _make(
        RunImage,
        value,
        config=_make(ImageConfig, config, **{name: tuple(config.get(name, ())) for name in lists}),
    )


def _mounts(values: Iterable[Mapping[str, Any]]) -> tuple[Mount, ...]:
    return tuple(
        _make(
            Mount,
            value,
            kind=MountKind(value["kind"]),
            options=tuple(value.get("options", ())),
        )
        for value in values
    )


def _ports(values: Iterable[Mapping[str, Any]]) -> tuple[PortMapping, ...]:
    return tuple(_make(PortMapping, value) for value in values)


def _make(kind: type[T], value: Mapping[str, Any], /, **converted: Any) -> T:
    assert dataclasses.is_dataclass(kind)
    known = {field.name for field in dataclasses.fields(kind)}
    plain = {name: item for name, item in value.items() if name in known}
    return kind(**{**plain, **converted})
