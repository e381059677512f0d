"""Who owns a snapshot that a user namespace will use: a pair of labels says it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from services.common.idmap import IdMap

if TYPE_CHECKING:
    from collections.abc import Mapping

UIDS_LABEL = "containerd.io/snapshot/uidmapping"
GIDS_LABEL = "containerd.io/snapshot/gidmapping"


def id_map(labels: Mapping[str, str]) -> IdMap:
    """How a snapshot's labels map ids; it is false if they do not."""
    if UIDS_LABEL not in labels or GIDS_LABEL not in labels:
        return IdMap()
    return IdMap(labels[UIDS_LABEL], labels[GIDS_LABEL])


def mount_options(labels: Mapping[str, str]) -> tuple[str, ...]:
    """Options of a mount that shows layers to whom the labels name: theirs have other owners."""
    ids = id_map(labels)
    return (f"uidmap={ids.uids}", f"gidmap={ids.gids}") if ids else ()
