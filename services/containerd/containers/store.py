"""What a container store is: records from which a task can be made. Nothing runs by itself here."""

from __future__ import annotations

from dataclasses import field
from typing import TYPE_CHECKING, Protocol

from services.common.frozen import frozen

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from services.containerd.typed import TypedValue


@frozen
class Container:
    """What is recorded of a container. Times are 0 until it is.

    Attributes:
        id: unique in its namespace.
        runtime_name: for example ``io.containerd.runc.v2``.
        runtime_options: for that runtime, or None.
        spec: the OCI runtime specification, JSON within, or None.
        image: name of the image that it was made of; may be empty.
        snapshotter: whose snapshot is the root file system; empty: there is none.
        snapshot_key: which.
        labels: for filters and clients.
        extensions: what clients keep with a container, by their own names.
        sandbox: id of the sandbox that it belongs to; empty: none.
    """

    id: str
    runtime_name: str = ""
    runtime_options: TypedValue | None = None
    spec: TypedValue | None = None
    image: str = ""
    snapshotter: str = ""
    snapshot_key: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    extensions: Mapping[str, TypedValue] = field(default_factory=dict)
    sandbox: str = ""
    created_at_ns: int = 0
    updated_at_ns: int = 0


class ContainerStore(Protocol):
    """Keeps container records. Every method is safe to call concurrently."""

    async def get(self, namespace: str, container_id: str) -> Container:
        """The container of that id.

        Raises:
            NotFound: there is none.
        """

    async def require(self, namespace: str, container_id: str) -> None:
        """As ``get``, for whoever only needs it to be there."""

    async def find(self, namespace: str, filters: Sequence[str] = ()) -> list[Container]:
        """Containers that match any of the filters, by id; all if there are none.

        Raises:
            InvalidArgument: a filter does not parse.
        """

    async def create(self, namespace: str, container: Container) -> Container:
        """Record a new container; returns it with its times.

        Raises:
            AlreadyExists: the id is taken.
            InvalidArgument: the id, a label or an extension is malformed, there is no spec, no
                runtime, or a snapshot key without its snapshotter.
        """

    async def update(
        self, namespace: str, container: Container, fields: Sequence[str] = ()
    ) -> Container:
        """Change a record. A task that was made of it stays as it is.

        Args:
            namespace: where it is.
            container: the new values.
            fields: field mask paths: ``labels``, ``spec``, ``extensions``, ``image``,
                ``snapshotkey``, or one entry of a map (``labels.<name>``). Empty replaces all that
                may change.

        Raises:
            NotFound: there is none of that id.
            InvalidArgument: a path or a value is malformed, or a field may not change.
        """

    async def delete(self, namespace: str, container_id: str) -> None:
        """Forget a container; its snapshot, if nothing else refers to it, is garbage now.

        Raises:
            NotFound: there is none of that id.
        """
