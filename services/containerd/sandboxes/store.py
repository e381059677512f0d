"""The interface of the sandbox store: what a sandbox is to be, as clients record it.

A record is not the sandbox: whether there is one, and how it is, the controller knows.
"""

from __future__ import annotations

from dataclasses import field
from typing import TYPE_CHECKING, Protocol

from services.common.frozen import frozen

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from services.containerd.typed import TypedValue


@frozen
class Sandbox:
    """A sandbox' record.

    Attributes:
        id: unique in its namespace.
        runtime_name: whose shim holds it.
        runtime_options: for that runtime, or None.
        spec: whatever the shim makes of it, or None.
        labels: for filters and clients.
        extensions: what clients keep with a sandbox, by their own names.
        sandboxer: the controller that it is for.
    """

    id: str
    runtime_name: str = ""
    runtime_options: TypedValue | None = None
    spec: TypedValue | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    extensions: Mapping[str, TypedValue] = field(default_factory=dict)
    sandboxer: str = ""
    created_at_ns: int = 0
    updated_at_ns: int = 0


class SandboxStore(Protocol):
    """Keeps records of sandboxes. Every method is safe to call concurrently."""

    async def get(self, namespace: str, sandbox_id: str) -> Sandbox:
        """The record of that id.

        Raises:
            NotFound: there is none.
        """

    async def find(self, namespace: str, filters: Sequence[str] = ()) -> list[Sandbox]:
        """Records that match any of the filters, by id; all if there are none.

        Raises:
            InvalidArgument: a filter does not parse.
        """

    async def create(self, namespace: str, sandbox: Sandbox) -> Sandbox:
        """Record a new sandbox; returns it with its times.

        Raises:
            AlreadyExists: the id is taken.
            InvalidArgument: the id or a label is malformed.
        """

    async def update(self, namespace: str, sandbox: Sandbox, fields: Sequence[str] = ()) -> Sandbox:
        """Change a record.

        Args:
            namespace: where it is.
            sandbox: the new values.
            fields: ``labels``, ``extensions``, ``spec``, ``runtime``, or one entry of a map
                (``labels.<name>``). Empty replaces all of them, but not the runtime's name.

        Raises:
            NotFound: there is none of that id.
            InvalidArgument: a path or a value is malformed, or a field may not change.
        """

    async def delete(self, namespace: str, sandbox_id: str) -> None:
        """Forget a record.

        Raises:
            NotFound: there is none of that id.
        """
