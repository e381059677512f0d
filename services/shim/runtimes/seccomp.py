"""Compiled seccomp filters, kept from one container for the next of the same profile.

A runtime has libseccomp compile ``linux.seccomp`` of the spec in every ``create``: a third of its
time. crun leaves what came of it in its state directory, as ``seccomp.bpf``, and loads one that it
is given in the annotation ``run.oci.seccomp_bpf_data`` as it is. So the first container of a
profile is compiled, and the others get its filter::

    <state of the runtime>/.seccomp/<key>    raw instructions (struct sock_filter)

The key stands for all that goes into a filter: the profile, the runtime's program, and the
libraries of the machine. The profile stays in the spec beside the annotation: a program that does
not know the annotation compiles it, and one that leaves no filter (runc) never gets one.

A filter is written under another name and renamed, so one that is found is whole. Where a file
cannot be read or written the filter is compiled.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import struct
from typing import TYPE_CHECKING, Any

import structlog

from services.common import small_files
from services.common.frozen import frozen
from services.shim.runtimes import programs

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from services.shim.runtimes.programs import Program

log = structlog.get_logger(__name__)

ANNOTATION = "run.oci.seccomp_bpf_data"
_ANNOTATIONS = "run.oci.seccomp"  # whatever begins so has a say in what the filter becomes
_DIRECTORY = ".seccomp"
_LEFT_BY_RUNTIME = "seccomp.bpf"
_INSTRUCTION_BYTES = 8
_FILTER_MAX_BYTES = 4096 * _INSTRUCTION_BYTES  # BPF_MAXINSNS
_RETURNS = frozenset({0x06, 0x16})  # BPF_RET | BPF_K, BPF_RET | BPF_A
_FILTERS_MAX = 64
_LIBRARIES = "/etc/ld.so.cache"  # written anew when libseccomp is replaced


@frozen
class Wanted:
    """A filter that has to be compiled, and may be kept then: where it will be found."""

    left: Path
    kept: Path


def prepare(
    bundle: Path, spec: Mapping[str, Any], *, state: Path, container_id: str, program: Program
) -> Wanted | None:
    """Put the compiled filter into a bundle's spec, if there is one. Blocks.

    Args:
        bundle: has the spec.
        spec: as it is there.
        state: directory of the runtime's state in the container's namespace.
        container_id: as the runtime is told it.
        program: the runtime.

    Returns:
        What to hand to :func:`keep` after the create; None: there is nothing to keep.
    """
    profile = _profile(spec)
    if profile is None:
        return None
    try:
        kept = state.parent / _DIRECTORY / _key(profile, program)
        compiled = _read(kept)
        if compiled is None:
            return Wanted(state / container_id / _LEFT_BY_RUNTIME, kept)
        annotations = spec.get("annotations") or {}
        given = {**annotations, ANNOTATION: base64.b64encode(compiled).decode()}
        _replace(bundle / "config.json", json.dumps({**spec, "annotations": given}).encode())
    except OSError as error:
        log.debug("seccomp filter is compiled", error=str(error))
    return None


def keep(wanted: Wanted) -> None:
    """Keep the filter that a container was created with, if its runtime has left it. Blocks."""
    try:
        compiled = _read(wanted.left)
        if compiled is None:
            return
        directory = wanted.kept.parent
        directory.mkdir(mode=0o700, exist_ok=True)
        others = sorted(directory.iterdir(), key=lambda path: path.stat().st_mtime_ns)
        for path in others[: max(0, len(others) - _FILTERS_MAX + 1)]:
            path.unlink(missing_ok=True)
        _replace(wanted.kept, compiled)
    except OSError as error:
        log.debug("seccomp filter is not kept", error=str(error))


def _profile(spec: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The profile, where the filter depends on nothing else, and nobody listens to it."""
    section = spec.get("linux")
    profile = section.get("seccomp") if isinstance(section, dict) else None
    if not isinstance(profile, dict) or profile.get("listenerPath"):
        return None
    annotations = spec.get("annotations") or {}
    if not isinstance(annotations, dict):
        return None
    return None if any(name.startswith(_ANNOTATIONS) for name in annotations) else profile


def _key(profile: Mapping[str, Any], program: Program) -> str:
    what = [profile, program.arguments, _identity(program.path), _identity(_LIBRARIES)]
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


def _identity(path: str) -> tuple[int, ...]:
    try:
        found = os.stat(path)  # noqa: PTH116 - both are paths of the system, as plain strings
    except FileNotFoundError:
        return ()
    return programs.identity(found)


def _read(path: Path) -> bytes | None:
    """A filter; None where there is none, or something else."""
    try:
        data = small_files.read(str(path), _FILTER_MAX_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):
        return None
    whole = data and len(data) <= _FILTER_MAX_BYTES and len(data) % _INSTRUCTION_BYTES == 0
    # The kernel demands as much of the last instruction.
    if (
        not whole
        or struct.unpack_from("=H", data, len(data) - _INSTRUCTION_BYTES)[0] not in _RETURNS
    ):
        log.warning("file is no seccomp filter", path=str(path))
        return None
    return data


def _replace(path: Path, data: bytes) -> None:
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    small_files.replace(str(path), str(draft), data)
