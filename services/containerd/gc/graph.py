"""Who refers to whom, and what can be reached from the roots: containerd's rules for labels.

Roots are containers, leases and what they keep, images that have not expired, and whatever has
``containerd.io/gc.root``. From there on:

    image      ─▶ its target
    container  ─▶ its snapshot
    snapshot   ─▶ its parent
    ingest     ─▶ the blob that it expects
    anything   ─▶ what its labels name: ``containerd.io/gc.ref.{content,image,snapshot.<name>}``
    the other  ◀─ ``containerd.io/gc.bref.*``: a child that says to whom it belongs
    image, blob ─▶ a snapshot while a condition holds (see :mod:`.conditions`)

A label's name may go on after a dot or a slash (``gc.ref.content.l.0``), so that one thing can
have several. A reference to what does not exist does no harm. What is reached from a flat lease
keeps its parents, but its labels are not followed.
"""

from __future__ import annotations

import json
from collections import defaultdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, NamedTuple

import structlog

from services.containerd.gc.conditions import USED_AT, conditional, holds
from services.containerd.leases.lease import CONTENT, EXPIRE_LABEL, FLAT_LABEL, IMAGES, INGESTS
from services.containerd.metadata import references

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Iterator, Mapping

log = structlog.get_logger(__name__)

LEASES = "leases"
CONTAINERS = "containers"

_GC_PREFIX = "containerd.io/gc."
_ROOT = "containerd.io/gc.root"
_INGEST_LIFETIME_NS = 24 * 3600 * 10**9


class Node(NamedTuple):
    """One thing that may be kept or collected.

    ``type`` is that of a lease's resource, or ``leases`` or ``containers``.
    """

    type: str
    namespace: str
    id: str


class Graph:
    """All nodes of the node, with the edges between them, at one moment.

    Args:
        tx: what to read them from.
        now_ns: what is past.
    """

    def __init__(self, tx: sqlite3.Connection, *, now_ns: int) -> None:
        self._now_ns = now_ns
        self._edges: dict[Node, list[Node]] = defaultdict(list)
        self._label_edges: dict[Node, list[Node]] = defaultdict(list)
        self._roots: list[Node] = []
        self._flat_roots: list[Node] = []
        self._conditional: list[tuple[Node, Node, str]] = []
        self._used_at: dict[Node, str] = {}
        self.collectable: list[Node] = []
        """What goes if it is not marked, in the order in which it can be deleted."""
        self._read_leases(tx)
        self._read_images(tx)
        self._read_content(tx)
        self._read_ingests(tx)
        self._read_containers(tx)
        self._read_snapshots(tx)
        self._add_conditional()

    def unreachable(self) -> list[Node]:
        """What no root leads to, children before their parents."""
        marked = self._mark()
        return [node for node in self.collectable if node not in marked]

    def _mark(self) -> set[Node]:
        marked: set[Node] = set()
        waiting = list(self._roots)
        while waiting:
            node = waiting.pop()
            if node not in marked:
                marked.add(node)
                waiting += self._edges.get(node, ())
                waiting += self._label_edges.get(node, ())
        flat: set[Node] = set()
        waiting = list(self._flat_roots)
        while waiting:
            node = waiting.pop()
            if node not in marked and node not in flat:
                flat.add(node)
                waiting += self._edges.get(node, ())
        return marked | flat

    def _read_leases(self, tx: sqlite3.Connection) -> None:
        alive: dict[tuple[str, str], bool] = {}
        for row in references.leases(tx):
            labels = _labels(row["labels"])
            node = Node(LEASES, row["namespace"], row["id"])
            self.collectable.append(node)
            if not self._expired(node, labels):
                self._roots.append(node)
                alive[node.namespace, node.id] = FLAT_LABEL in labels
        for row in references.lease_resources(tx):
            flat = alive.get((row["namespace"], row["lease"]))
            if flat is not None:
                node = Node(row["type"], row["namespace"], row["id"])
                (self._flat_roots if flat else self._roots).append(node)

    def _read_images(self, tx: sqlite3.Connection) -> None:
        for row in references.images(tx):
            labels = _labels(row["labels"])
            node = Node(IMAGES, row["namespace"], row["name"])
            self._edges[node].append(Node(CONTENT, node.namespace, row["digest"]))
            self._add_labels(node, labels)
            if self._expired(node, labels):
                self.collectable.append(node)
            else:
                self._roots.append(node)

    def _read_content(self, tx: sqlite3.Connection) -> None:
        for row in references.content(tx):
            node = Node(CONTENT, row["namespace"], row["digest"])
            self.collectable.append(node)
            self._add_labels(node, _labels(row["labels"]))

    def _read_ingests(self, tx: sqlite3.Connection) -> None:
        for row in references.ingests(tx):
            node = Node(INGESTS, row["namespace"], row["ref"])
            self.collectable.append(node)
            if row["expected"]:
                self._edges[node].append(Node(CONTENT, node.namespace, row["expected"]))
            if row["updated_at_ns"] + _INGEST_LIFETIME_NS > self._now_ns:
                self._roots.append(node)

    def _read_containers(self, tx: sqlite3.Connection) -> None:
        for row in references.containers(tx):
            node = Node(CONTAINERS, row["namespace"], row["id"])
            self._roots.append(node)
            if row["snapshotter"]:
                kind = f"snapshots/{row['snapshotter']}"
                self._edges[node].append(Node(kind, node.namespace, row["snapshot_key"]))
            self._add_labels(node, _labels(row["labels"]))

    def _read_snapshots(self, tx: sqlite3.Connection) -> None:
        parents: dict[Node, Node] = {}
        nodes = []
        for row in references.snapshots(tx):
            kind = f"snapshots/{row['snapshotter']}"
            node = Node(kind, row["namespace"], row["key"])
            nodes.append(node)
            if row["parent"]:
                parents[node] = Node(kind, node.namespace, row["parent"])
                self._edges[node].append(parents[node])
            labels = _labels(row["labels"])
            self._add_labels(node, labels)
            if USED_AT in labels:
                self._used_at[node] = labels[USED_AT]
        self.collectable += _children_first(nodes, parents)

    def _add_labels(self, node: Node, labels: Mapping[str, str]) -> None:
        if node.type in (IMAGES, CONTENT):
            for snapshotter, key, wanted in conditional(labels):
                target = Node(f"snapshots/{snapshotter}", node.namespace, key)
                self._conditional.append((node, target, wanted))
        for key, value in labels.items():
            if not key.startswith(_GC_PREFIX):
                continue
            if key.startswith(_ROOT) and node.type != IMAGES:
                self._roots.append(node)
            for direction, target in _references(node.namespace, key, value):
                if direction == "ref":
                    self._label_edges[node].append(target)
                else:
                    self._label_edges[target].append(node)

    def _add_conditional(self) -> None:
        for node, target, wanted in self._conditional:
            used_at = self._used_at.get(target)
            if used_at is not None and holds(wanted, used_at, now_ns=self._now_ns):
                self._label_edges[node].append(target)

    def _expired(self, node: Node, labels: Mapping[str, str]) -> bool:
        text = labels.get(EXPIRE_LABEL)
        if text is None:
            return False
        try:
            expires_at = datetime.fromisoformat(text)
        except ValueError:
            log.info("expiry does not parse, ignored", value=text, **node._asdict())
            return False
        if expires_at.tzinfo is None:
            expires_at = expires_at.replace(tzinfo=UTC)
        return expires_at.timestamp() * 1e9 < self._now_ns


def _labels(text: str) -> Mapping[str, str]:
    if _GC_PREFIX not in text:
        return {}
    labels: dict[str, str] = json.loads(text)
    return labels


def _references(namespace: str, key: str, value: str) -> Iterator[tuple[str, Node]]:
    direction, _, rest = key.removeprefix(_GC_PREFIX).partition(".")
    if direction not in ("ref", "bref"):
        return
    if rest.startswith("snapshot."):
        snapshotter = rest.removeprefix("snapshot.").partition("/")[0]
        yield direction, Node(f"snapshots/{snapshotter}", namespace, value)
    for noun, kind in (("content", CONTENT), ("image", IMAGES), ("container", CONTAINERS)):
        if rest == noun or rest.startswith((f"{noun}.", f"{noun}/")):
            yield direction, Node(kind, namespace, value)


def _children_first(nodes: list[Node], parents: Mapping[Node, Node]) -> list[Node]:
    depths: dict[Node, int] = {}
    for node in nodes:
        chain = [node]
        while chain[-1] not in depths and chain[-1] in parents:
            chain.append(parents[chain[-1]])
        depth = depths.setdefault(chain.pop(), 0)
        for below in reversed(chain):
            depth += 1
            depths[below] = depth
    return sorted(nodes, key=lambda node: -depths[node])
