"""Manifests and configurations of images, read as far as running a container needs them."""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import re
from typing import TYPE_CHECKING, Any

from services.common.errors import DataLoss
from services.common.frozen import frozen
from services.daemon.images.node import Descriptor, Platform
from services.daemon.spec.request import ImageConfig

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

DOCUMENT_MAX_BYTES = 8 << 20

INDEX_TYPES = frozenset(
    {
        "application/vnd.oci.image.index.v1+json",
        "application/vnd.docker.distribution.manifest.list.v2+json",
    }
)
_MACHINES = {
    "x86_64": ("amd64", ""),
    "aarch64": ("arm64", "v8"),
    "armv7l": ("arm", "v7"),
    "armv6l": ("arm", "v6"),
    "i686": ("386", ""),
    "ppc64le": ("ppc64le", ""),
    "riscv64": ("riscv64", ""),
    "s390x": ("s390x", ""),
}
_NORMAL_VARIANTS = {"arm64": "v8", "arm": "v7"}
_CREATED = re.compile(
    r"(\d{4}-\d\d-\d\d)[Tt](\d\d:\d\d:\d\d)(?:\.(\d{1,9})\d*)?([Zz]|[+-]\d\d:\d\d)"
)


@frozen
class Manifest:
    """One platform's image: its configuration and layers."""

    config: Descriptor
    layers: tuple[Descriptor, ...]


@frozen
class ParsedConfig:
    """What a configuration blob says."""

    platform: Platform
    created_at_ns: int
    diff_ids: tuple[str, ...]
    run: ImageConfig


def host_platform() -> Platform:
    """This machine's."""
    machine = os.uname().machine
    architecture, variant = _MACHINES.get(machine, (machine, ""))
    return Platform("linux", architecture, "" if architecture == "arm64" else variant)


def parse_platform(text: str) -> Platform | None:
    """``os/architecture[/variant]``; None when it has another form."""
    parts = text.split("/")
    if not 2 <= len(parts) <= 3 or not all(re.fullmatch(r"[a-z0-9_.]+", part) for part in parts):
        return None
    return Platform(parts[0], parts[1], parts[2] if len(parts) == 3 else "")


def parse_document(data: bytes, what: str) -> dict[str, Any]:
    """The JSON object in a blob.

    Raises:
        DataLoss: it is something else.
    """
    try:
        document = json.loads(data)
    except ValueError as error:
        raise DataLoss(f"{what} is not JSON: {error}") from error
    if not isinstance(document, dict):
        raise DataLoss(f"{what} is not a JSON object")
    return document


def choose(index: Mapping[str, Any], wanted: Platform, what: str) -> list[Descriptor]:
    """Manifests of an index that fit a platform, best first."""
    fitting: list[tuple[int, Descriptor]] = []
    for entry in _list(index, "manifests", what):
        platform = entry.get("platform") or {}
        rank = _rank(platform, wanted)
        if rank is not None:
            fitting.append((rank, descriptor(entry, what)))
    return [found for _, found in sorted(fitting, key=lambda pair: pair[0])]


def entries(index: Mapping[str, Any], what: str) -> list[Descriptor]:
    """Everything that an index names."""
    return [descriptor(entry, what) for entry in _list(index, "manifests", what)]


def parse_manifest(document: Mapping[str, Any], what: str) -> Manifest:
    """A manifest out of its document.

    Raises:
        DataLoss: something is missing.
    """
    config = document.get("config")
    if not isinstance(config, dict):
        raise DataLoss(f"{what} has no configuration")
    layers = tuple(descriptor(layer, what) for layer in _list(document, "layers", what))
    return Manifest(descriptor(config, what), layers)


def parse_config(data: bytes, what: str) -> ParsedConfig:
    """A configuration out of its blob.

    Raises:
        DataLoss: it is none.
    """
    document = parse_document(data, what)
    rootfs, run = document.get("rootfs") or {}, document.get("config") or {}
    if not isinstance(rootfs, dict) or not isinstance(run, dict):
        raise DataLoss(f"{what} is malformed: rootfs and config have to be objects")
    return ParsedConfig(
        platform=Platform(
            str(document.get("os") or "linux"),
            str(document.get("architecture") or ""),
            str(document.get("variant") or ""),
        ),
        created_at_ns=_created(str(document.get("created") or "")),
        diff_ids=_strings(rootfs.get("diff_ids")),
        run=_run_config(run),
    )


def chain_ids(diff_ids: Sequence[str]) -> tuple[str, ...]:
    """Names of the layers' snapshots, bottom first (OCI image-spec, config.md, Layer ChainID)."""
    chain: list[str] = []
    for diff_id in diff_ids:
        if not chain:
            chain.append(diff_id)
        else:
            joined = f"{chain[-1]} {diff_id}".encode()
            chain.append(f"sha256:{hashlib.sha256(joined).hexdigest()}")
    return tuple(chain)


def descriptor(value: Any, what: str) -> Descriptor:
    """A descriptor out of its JSON object.

    Raises:
        DataLoss: a field is missing or has the wrong type.
    """
    if not isinstance(value, dict) or not isinstance(value.get("digest"), str):
        raise DataLoss(f"{what} has a malformed descriptor")
    size = value.get("size")
    return Descriptor(
        str(value.get("mediaType") or ""), value["digest"], size if isinstance(size, int) else 0
    )


def _run_config(run: Mapping[str, Any]) -> ImageConfig:
    return ImageConfig(
        env=_strings(run.get("Env")),
        entrypoint=_strings(run.get("Entrypoint")),
        command=_strings(run.get("Cmd")),
        working_dir=str(run.get("WorkingDir") or ""),
        user=str(run.get("User") or ""),
        labels={str(key): str(value) for key, value in (run.get("Labels") or {}).items()},
        exposed_ports=tuple(sorted(str(port) for port in run.get("ExposedPorts") or {})),
        volumes=tuple(sorted(str(path) for path in run.get("Volumes") or {})),
        stop_signal=str(run.get("StopSignal") or ""),
    )


def _rank(platform: Mapping[str, Any], wanted: Platform) -> int | None:
    """0 is exact; None does not fit. An entry without a platform fits last."""
    if not platform:
        return 2
    if platform.get("os") != wanted.os or platform.get("architecture") != wanted.architecture:
        return None
    normal = _NORMAL_VARIANTS.get(wanted.architecture, "")
    have = str(platform.get("variant") or normal)
    want = wanted.variant or normal
    if have == want:
        return 0
    # A later variant of the processor runs what was made for an earlier one.
    return 1 if have and want and have < want else None


def _list(document: Mapping[str, Any], key: str, what: str) -> list[Any]:
    value = document.get(key)
    if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
        raise DataLoss(f"{what} has no list of {key}")
    return value


def _strings(value: Any) -> tuple[str, ...]:
    if isinstance(value, str):
        return (value,)
    return tuple(str(entry) for entry in value or ())


def _created(text: str) -> int:
    match = _CREATED.fullmatch(text)
    if match is None:
        return 0
    zone = "+00:00" if match[4] in "Zz" else match[4]
    try:
        moment = datetime.datetime.fromisoformat(f"{match[1]}T{match[2]}{zone}")
    except ValueError:
        return 0
    return int(moment.timestamp()) * 1_000_000_000 + int((match[3] or "0").ljust(9, "0"))
