"""A shim's life, played through in the factory before any shim is forked.

What a shim does for the first time costs it memory of its own: code is specialised in place, types
get version tags, caches fill, modules are imported. Done here, all that lies in pages which every
shim shares. The play has all parts but gRPC, which must not start in a process that forks, and its
runtime is a shell script.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from google.protobuf import any_pb2

from protos.containerd.task.v3 import shim_pb2
from protos.containerd.types.runc.options import oci_pb2
from services.common import linux
from services.shim.app import Shim
from services.shim.config import ShimConfig
from services.shim.metrics import ShimMetrics

if TYPE_CHECKING:
    from collections.abc import Callable

_ROUNDS = 10
_LIMIT_S = 5.0
_RUNTIME = """#!/bin/sh
while [ $# -gt 0 ]; do
    case $1 in
        create) what=create ;;
        --pid-file) pid_file=$2 ;;
    esac
    shift
done
[ -z "$what" ] || { sleep 60 & echo $! > "$pid_file"; }
"""
_SPEC = '{"ociVersion":"1.0.2","process":{"args":["x"]},"linux":{"namespaces":[{"type":"pid"}]}}'


def rehearse() -> None:
    """Play; blocks for a fifth of a second. No threads, no children and no files are left."""
    with tempfile.TemporaryDirectory(prefix="theseus-rehearsal-") as name:
        directory = Path(name)
        runtime = directory / "runtime"
        runtime.write_text(_RUNTIME)
        runtime.chmod(0o700)
        for number in range(_ROUNDS):
            bundle = directory / str(number)
            bundle.mkdir()
            (bundle / "config.json").write_text(_SPEC)
            asyncio.run(_play(directory, bundle, runtime))
