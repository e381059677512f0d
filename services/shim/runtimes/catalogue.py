"""Which runtime serves a container: a program with runc's command line, or a plug-in.

A plug-in is an entry point of the group ``theseus.runtimes`` in an installed distribution; its name
is the runtime's, its object a :class:`RuntimeFactory`. Entry points are looked for only when a name
is neither configured nor that of a program: nobody else pays for the search.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from services.common.errors import FailedPrecondition
from services.shim.runtimes.runc import RuncRuntime
from services.shim.runtimes.runtime import RuntimeMissing

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint
    from pathlib import Path

    from services.shim.reaper import Reaper
    from services.shim.runtimes.runtime import Runtime, RuntimeOptions

GROUP = "theseus.runtimes"


class RuntimeFactory(Protocol):
    """Makes a runtime for one container; a class whose instances are runtimes is one."""

    def __call__(
        self,
        container_id: str,
        options: RuntimeOptions,
        *,
        log_file: Path,
        reaper: Reaper,
        timeout_s: float,
    ) -> Runtime:
        """Make it.

        Args:
            container_id: of the container.
            options: how the container is to be run; ``binary`` is the runtime's name.
            log_file: where the runtime may write what went wrong.
            reaper: starts programs and waits for them: a shim has one place that does.
            timeout_s: limit of each call.

        Raises:
            TheseusError: it cannot serve here.
        """
        ...


def make_runtime(
    container_id: str,
    options: RuntimeOptions,
    *,
    log_file: Path,
    reaper: Reaper,
    timeout_s: float,
) -> Runtime:
    """The runtime of a container.

    Raises:
        InvalidArgument: the name cannot be one.
        RuntimeMissing: there is neither a program nor a plug-in of that name.
        FailedPrecondition: the plug-in cannot be loaded.
    """
    factory: RuntimeFactory = RuncRuntime
    try:
        return factory(container_id, options, log_file=log_file, reaper=reaper, timeout_s=timeout_s)
    except RuntimeMissing:
        entry = plug_ins().get(options.binary)
        if entry is None:
            raise
        factory = load(entry)
    return factory(container_id, options, log_file=log_file, reaper=reaper, timeout_s=timeout_s)


def plug_ins() -> dict[str, EntryPoint]:
    """Entry points by the name of their runtime; some ten milliseconds."""
    # Imported late: it brings a mail parser and two dozen other modules.
    from importlib.metadata import entry_points

    return {entry.name: entry for entry in entry_points(group=GROUP)}


def load(entry: EntryPoint) -> RuntimeFactory:
    """The object of an entry point.

    Raises:
        FailedPrecondition: it cannot be imported, or is nothing that can be called.
    """
    try:
        factory: RuntimeFactory = entry.load()
    except Exception as error:
        raise FailedPrecondition(
            f"runtime plug-in '{entry.name}' ({entry.value}) cannot be loaded: "
            f"{type(error).__name__}: {error}"
        ) from error
    if not callable(factory):
        raise FailedPrecondition(
            f"runtime plug-in '{entry.name}' ({entry.value}) is nothing that makes runtimes"
        )
    return factory
