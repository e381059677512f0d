"""Who owns the root of a snapshot that a user namespace will use: a pair of labels says it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from services.common.errors import InvalidArgument

if TYPE_CHECKING:
    from collections.abc import Mapping

UIDS_LABEL = "containerd.io/snapshot/uidmapping"
GIDS_LABEL = "containerd.io/snapshot/gidmapping"


def mapped_root(labels: Mapping[str, str]) -> tuple[int, int] | None:
    """The host's ids of a user namespace's root, if the labels describe one."""
    if UIDS_LABEL not in labels or GIDS_LABEL not in labels:
        return None
    return _host_id_of_root(labels[UIDS_LABEL]), _host_id_of_root(labels[GIDS_LABEL])


def _host_id_of_root(mapping: str) -> int:
    """From ``<in the namespace>:<on the host>:<count>``, separated by commas."""
    try:
        for line in mapping.split(","):
            inside, host, count = (int(number) for number in line.split(":"))
            if inside == 0 and count > 0:
                return host
    except ValueError:
        pass
    raise InvalidArgument(f"{mapping!r} maps no root of a user namespace", field="labels")
