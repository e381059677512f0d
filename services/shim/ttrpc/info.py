"""``-info``: what runtime this is and what it can do, as containerd 2.x asks a shim's program."""

from __future__ import annotations

import json
import subprocess

from google.protobuf import any_pb2
from google.protobuf.message import DecodeError

from protos.containerd.types import introspection_pb2
from protos.containerd.types.runc.options import oci_pb2
from services.common import VERSION
from services.common.errors import InvalidArgument
from services.shim.runtimes.programs import ENVIRONMENT, find_program

NAME = "io.containerd.theseus.v1"
_OPTIONS_TYPE = "containerd.runc.v1.Options"
_FEATURES_TYPE = "types.containerd.io/opencontainers/runtime-spec/1/features/Features"
_RUNTIME_LIMIT_S = 10.0


def runtime_info(given: bytes) -> bytes:
    """A serialized ``RuntimeInfo``.

    Args:
        given: a serialized ``Any`` with the options that a task would be created with, or nothing.

    Raises:
        InvalidArgument: these are no options.
        RuntimeMissing: the OCI runtime is not installed.
    """
    packed, options = any_pb2.Any(), oci_pb2.Options()
    try:
        packed.ParseFromString(given)
        if packed.type_url.rpartition("/")[2] == _OPTIONS_TYPE:
            options.ParseFromString(packed.value)
    except DecodeError as error:
        raise InvalidArgument("standard input holds no runtime options") from error
    info = introspection_pb2.RuntimeInfo(
        name=NAME, version=introspection_pb2.RuntimeVersion(version=VERSION)
    )
    if packed.type_url:
        info.options.CopyFrom(packed)
    features = _features(find_program(options.binary_name or "runc"))
    if features:
        info.features.type_url, info.features.value = _FEATURES_TYPE, features
    return info.SerializeToString()


def _features(program: str) -> bytes:
    """The runtime's own account of itself, JSON; empty when it gives none (crun before 1.9)."""
    try:
        answer = subprocess.run(
            [program, "features"],
            capture_output=True,
            stdin=subprocess.DEVNULL,
            env=ENVIRONMENT,
            timeout=_RUNTIME_LIMIT_S,
            check=False,
        )
        if answer.returncode == 0 and isinstance(json.loads(answer.stdout), dict):
            return answer.stdout
    except (OSError, ValueError, subprocess.SubprocessError):
        pass
    return b""
