"""OCI bundles for those who are given one: the bare runtimes, and clients of containerd's API."""

from __future__ import annotations

import copy
import functools
import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from tools.bench.engines.engine import Plan

_GROUP = "io.containerd.runc.v2.group"
"""The annotation by which containerd's own shims are shared."""


def specification(plan: Plan, *, cgroup: str = "") -> dict[str, Any]:
    """What ``runc spec`` writes, with the command of a plan; no network but loopback."""
    spec = copy.deepcopy(_default())
    spec["process"]["args"] = list(plan.command)
    if cgroup:
        spec["linux"]["cgroupsPath"] = cgroup
    if plan.group:
        spec["annotations"] = {_GROUP: plan.group}
    for source, target in (plan.binds or {}).items():
        options = ["rbind", "ro"]
        mount = {"destination": target, "type": "bind", "source": source, "options": options}
        spec["mounts"].append(mount)
    return spec


def write_bundle(directory: Path, plan: Plan | None = None, *, root: str = "rootfs") -> None:
    """Write a bundle's configuration; without a plan, of `true`."""
    directory.mkdir(exist_ok=True)
    spec = specification(plan or Plan())
    spec["root"] = {"path": root}
    (directory / "config.json").write_text(json.dumps(spec))


@functools.cache
def _default() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as directory:
        subprocess.run(["runc", "spec", "--bundle", directory], check=True)
        spec: dict[str, Any] = json.loads((Path(directory) / "config.json").read_text())
    spec["ociVersion"] = "1.0.2"  # crun 1.8 takes no newer
    spec["process"] |= {"terminal": False, "env": ["PATH=/bin:/usr/bin"]}
    spec["root"] = {"path": "rootfs"}
    # One that is inherited cannot be raised without CAP_SYS_RESOURCE.
    spec["process"].pop("rlimits", None)
    return spec
