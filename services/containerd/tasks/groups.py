"""The group that a container belongs to, as containerd's own shims read it: those of one pod."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

GROUP_ANNOTATIONS = ("io.containerd.runc.v2.group", "io.kubernetes.cri.sandbox-id")
"""In the order in which they count; names are containerd's."""


def group_of(config: Mapping[str, Any]) -> str:
    """The group that a container's spec names; empty for none."""
    annotations = config.get("annotations")
    if isinstance(annotations, dict):
        for name in GROUP_ANNOTATIONS:
            group = annotations.get(name)
            if isinstance(group, str) and group:
                return group
    return ""
