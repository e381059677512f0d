"""The sandbox controller ``shim``: a sandbox is held by the shim of its runtime, if that can.

The shim is started as for a task, with a bundle of the sandbox' id, and asked by upstream's sandbox
API. Containers whose record names the sandbox are run by the same process (see
``tasks/sharing.py``). Events are in the journal before a call is answered; the end of a sandbox is
told once, to whoever waits for it first.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack, suppress
from typing import TYPE_CHECKING

import structlog

from services.common.errors import (
    AlreadyExists,
    Cancelled,
    DeadlineExceeded,
    InvalidArgument,
    NotFound,
    TheseusError,
    Unavailable,
    Unimplemented,
)
from services.containerd.identifiers import checked_identifier
from services.containerd.tasks.sandbox import NewSandbox, SandboxStatus
from services.containerd.tasks.shim import TaskNotFound
from services.containerd.uninterrupted import uninterrupted

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from services.common.database import Database
    from services.common.mounts import Mount
    from services.containerd.events.sink import EventSink
    from services.containerd.sandboxes.store import Sandbox
    from services.containerd.tasks.factory import ShimLauncher
    from services.containerd.tasks.known import KnownShim
    from services.containerd.tasks.sandbox import SandboxEnd, SandboxShim, StartedSandbox
    from services.containerd.tasks.shim import Shim
    from services.containerd.tasks.shims import ShimManager
    from services.containerd.typed import TypedValue

    FindLauncher = Callable[[str], tuple[ShimLauncher, str]]
    """Who starts shims for a runtime, and the program of those that others wrote."""
    HasSandboxes = Callable[[Shim], SandboxShim | None]
    """The same shim by its sandbox API; None where there is nobody to ask."""

log = structlog.get_logger(__name__)

NAME = "shim"
"""How requests name this controller."""

_AGAIN_S = 0.05
_AGAIN_MAX_S = 1.0
_END_S = 2.0


class SandboxController:
    """Sandboxes of all namespaces.

    Args:
        shims: the register.
        find_launcher: starts shims, by runtime name.
        has_sandboxes: asks a shim.
        db: for events.
        events: where what happens to sandboxes is told.
    """

    def __init__(
        self,
        shims: ShimManager,
        *,
        find_launcher: FindLauncher,
        has_sandboxes: HasSandboxes,
        db: Database,
        events: EventSink,
    ) -> None:
        self._shims = shims
        self._find_launcher = find_launcher
        self._has_sandboxes = has_sandboxes
        self._db = db
        self._events = events

    async def create(
        self,
        namespace: str,
        sandbox: Sandbox,
        *,
        rootfs: Sequence[Mount] = (),
        options: TypedValue | None = None,
        netns_path: str = "",
        annotations: Mapping[str, str] | None = None,
    ) -> None:
        """Start a shim and have it make the sandbox; undone as a whole when a step fails.

        Raises:
            AlreadyExists: there is one of this id, or a task.
            InvalidArgument: the id or the runtime's name is malformed.
            NotFound: nobody here knows the runtime.
            Unimplemented: its shim has no sandboxes.
        """
        checked_identifier(sandbox.id, what="sandbox id", field="sandbox_id")
        if not sandbox.runtime_name:
            raise InvalidArgument(
                f"sandbox '{sandbox.id}' names no runtime", field="sandbox.runtime.name"
            )
        launcher, binary = self._find_launcher(sandbox.runtime_name)
        spec = sandbox.spec.value if sandbox.spec is not None else b"{}"
        async with AsyncExitStack() as undo:
            try:
                known = await self._shims.begin(
                    namespace, sandbox.id, spec or b"{}", binary, sandbox=sandbox.id
                )
            except AlreadyExists as error:
                raise AlreadyExists(
                    f"sandbox '{sandbox.id}' already runs in namespace '{namespace}'",
                    resource=("sandbox", sandbox.id),
                ) from error
            undo.push_async_callback(self._undo, known)
            await self._shims.start(launcher, known, sandbox.runtime_options)
            request = NewSandbox(
                bundle=str(known.bundle.path),
                rootfs=rootfs,
                options=options,
                netns_path=netns_path,
                annotations=annotations or {},
            )
            try:
                await self._api(known).create_sandbox(request)
            except Unimplemented as error:
                raise Unimplemented(
                    f"the shim of runtime '{sandbox.runtime_name}' has no sandboxes: choose "
                    f"another runtime for '{sandbox.id}' ({error.message})"
                ) from error
            await self._tell(namespace, "create", "SandboxCreate", {"sandbox_id": sandbox.id})
            undo.pop_all()
        self._shims.began(known)

    async def start(self, namespace: str, sandbox_id: str) -> tuple[StartedSandbox, str]:
        """Start a sandbox; returns it and where its shim serves. One that fails is taken away."""
        known = self._known(namespace, sandbox_id)
        try:
            started = await (await self._ready(known)).start_sandbox()
        except TheseusError:
            await uninterrupted(self._take_away(known))
            raise
        await self._tell(namespace, "start", "SandboxStart", {"sandbox_id": sandbox_id})
        return started, known.address

    async def platform(self, namespace: str, sandbox_id: str) -> tuple[str, str, str]:
        """Operating system, architecture and variant of what runs in a sandbox."""
        return await (await self._ready(self._known(namespace, sandbox_id))).sandbox_platform()

    async def stop(self, namespace: str, sandbox_id: str, timeout_s: int = 0) -> None:
        """Stop a sandbox; one that is not there has been stopped."""
        try:
            shim = await self._ready(self._known(namespace, sandbox_id))
            await shim.stop_sandbox(timeout_s)
        except (NotFound, Unavailable) as error:
            log.info("sandbox is stopped already", sandbox=sandbox_id, reason=error.message)

    async def wait(self, namespace: str, sandbox_id: str) -> SandboxEnd:
        """Return once a sandbox has ended; outlives restarts of its shim's connection."""
        known = self._known(namespace, sandbox_id)
        pause_s = _AGAIN_S
        while True:
            try:
                end = await (await self._ready(known)).wait_sandbox()
                break
            except (Unavailable, DeadlineExceeded, Cancelled) as error:
                log.debug("wait is asked again", sandbox=sandbox_id, reason=error.message)
            except NotFound:
                # It may have been shut down while the question was on its way again.
                if known.sandbox_end is None:
                    raise
                end = known.sandbox_end
                break
            await known.change(timeout_s=pause_s)
            pause_s = min(pause_s * 2, _AGAIN_MAX_S)
        if not known.end_told:
            known.end_told = True
            await self._tell(
                namespace,
                "exit",
                "SandboxExit",
                {
                    "sandbox_id": sandbox_id,
                    "exit_status": end.exit_status,
                    "exited_at": end.exited_at_ns,
                },
            )
        return end

    async def status(
        self, namespace: str, sandbox_id: str, *, verbose: bool = False
    ) -> tuple[SandboxStatus, str]:
        """How a sandbox is, and where its shim serves; one that is not there has exited."""
        try:
            known = self._known(namespace, sandbox_id)
            return await (await self._ready(known)).sandbox_status(verbose=verbose), known.address
        except NotFound:
            return SandboxStatus(sandbox_id, exited_at_ns=time.time_ns()), ""

    async def shutdown(self, namespace: str, sandbox_id: str) -> None:
        """Take a sandbox away, and its shim if that has no containers.

        Raises:
            NotFound: there is none.
        """
        known = self._known(namespace, sandbox_id)
        shim = await self._ready(known)
        ending = asyncio.ensure_future(shim.wait_sandbox())
        try:
            await shim.shutdown_sandbox()
            with suppress(TheseusError, TimeoutError):  # then nobody can be told
                async with asyncio.timeout(_END_S):
                    known.sandbox_end = await ending
        finally:
            ending.cancel()
            await asyncio.gather(ending, return_exceptions=True)
        await uninterrupted(self._shims.dismiss(known, {}, told=False))

    async def metrics(self, namespace: str, sandbox_id: str) -> tuple[int, TypedValue | None]:
        """Time in ns, and figures of a sandbox."""
        return await (await self._ready(self._known(namespace, sandbox_id))).sandbox_metrics()

    async def update(self, namespace: str, sandbox_id: str) -> None:
        """Nothing of a sandbox that a shim holds can be changed; upstream accepts it as well.

        Raises:
            NotFound: there is none.
        """
        await self._ready(self._known(namespace, sandbox_id))

    def _known(self, namespace: str, sandbox_id: str) -> KnownShim:
        try:
            known = self._shims.get(namespace, sandbox_id)
        except TaskNotFound:
            raise _not_found(namespace, sandbox_id) from None
        if not known.is_sandbox or known.dismissed is not None:
            raise _not_found(namespace, sandbox_id)
        return known

    async def _ready(self, known: KnownShim) -> SandboxShim:
        try:
            shim = self._has_sandboxes(await known.ready())
        except TaskNotFound:
            shim = None
        if shim is None:
            raise _not_found(known.namespace, known.id)
        return shim

    def _api(self, known: KnownShim) -> SandboxShim:
        assert known.shim is not None, "a shim that serves can be called"
        shim = self._has_sandboxes(known.shim)
        assert shim is not None, "a shim that was just started is not gone"
        return shim

    async def _undo(self, known: KnownShim) -> None:
        await uninterrupted(self._take_away(known))

    async def _take_away(self, known: KnownShim) -> None:
        try:
            await self._shims.remove(known)
        except Exception:
            # The first failure is the one to tell; the removal goes on with the next start.
            log.exception("creation of a sandbox is not undone", sandbox=known.id)

    async def _tell(
        self, namespace: str, topic: str, kind: str, fields: Mapping[str, object]
    ) -> None:
        await self._db.write(
            lambda tx: self._events.append(
                tx, namespace, f"/sandboxes/{topic}", f"containerd.events.{kind}", fields
            )
        )


def _not_found(namespace: str, sandbox_id: str) -> NotFound:
    return NotFound(
        f"sandbox '{sandbox_id}' not found in namespace '{namespace}'",
        resource=("sandbox", sandbox_id),
    )
