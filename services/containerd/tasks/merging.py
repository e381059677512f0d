"""Has the kernel keep once what the memory of many shims has in common, by KSM.

Shims are forked from one process and differ in little, but writing to a page, be it a reference
count that goes up and down again, makes it a process' own. KSM (ksm.rst of the kernel's
administration guide) finds pages of equal content, and has processes share them until one writes.

The kernel's thread looks for such pages only during *bursts*: some seconds after shims were
started, and now and then while there are any. Between them it rests and costs nothing; what is
merged stays so. KSM is one for the whole machine, therefore it is left alone where somebody else
has it run, or has memory of his own to be merged: an administrator may have it off for a reason
(whoever sees how long a write takes can tell whether somebody else has an equal page).

The settings found are written down before they are changed, and restored after the burst; the next
start restores them if this process dies in one.
"""

from __future__ import annotations

import asyncio
import json
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Self

import structlog

from services.common.background import Background
from services.containerd.uninterrupted import uninterrupted

if TYPE_CHECKING:
    from types import TracebackType

log = structlog.get_logger(__name__)

KSM = Path("/sys/kernel/mm/ksm")
SHIM_COMMS = frozenset({"theseus-shim", "theseus-waiting"})
"""One that waits may have been a container's before."""
_FAST = {"pages_to_scan": "5000", "sleep_millisecs": "20"}
_STOPPED = "0"
_SCANS = 3  # the first takes notice of a page, the second finds it unchanged, the third merges
_SETTLING_S = 4.0  # after the last start: shims offer their memory half a second before that
_AGAIN_S = 900.0
_POLL_S = 0.25
_BURST_LIMIT_S = 120.0


class MemoryMerger:
    """Owns the bursts. An async context manager.

    Args:
        saved: where the settings found are kept while they are changed.
        allowed: whether there are to be bursts at all.
        ksm: directory of the kernel's switches.
        proc: where processes are listed.
        settling_s: how long no shim may have been started before a burst.
    """

    def __init__(
        self,
        saved: Path,
        *,
        allowed: bool = True,
        ksm: Path = KSM,
        proc: Path = Path("/proc"),
        settling_s: float = _SETTLING_S,
    ) -> None:
        self._saved = saved
        self._ksm = ksm
        self._proc = proc
        self._allowed = allowed
        self._settling_s = settling_s
        self._requested = asyncio.Event()
        self._background = Background()

    async def __aenter__(self) -> Self:
        await asyncio.to_thread(self._restore)
        if self._allowed and (self._ksm / "run").exists():
            self.request()  # there may be shims from before
            self._background.start(self._run(), name="memory-merger")
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._background.stop()

    def request(self) -> None:
        """Note that a shim was started."""
        self._requested.set()

    async def _run(self) -> None:
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(_AGAIN_S):
                    await self._requested.wait()
            with suppress(TimeoutError):
                while True:  # until no shim was started for so long
                    self._requested.clear()
                    async with asyncio.timeout(self._settling_s):
                        await self._requested.wait()
            try:
                await self._burst()
            except OSError as error:
                log.warning("memory of shims is not merged", error=str(error))
                return

    async def _burst(self) -> None:
        try:
            first = await uninterrupted(asyncio.to_thread(self._begin))
            if first is None:
                return
            with suppress(TimeoutError):
                async with asyncio.timeout(_BURST_LIMIT_S):
                    while self._number("full_scans") < first + _SCANS:  # noqa: ASYNC110 - the kernel tells of no scan
                        await asyncio.sleep(_POLL_S)
        finally:
            self._restore()
        log.info(
            "memory of shims merged",
            pages_kept=self._number("pages_shared"),
            pages_saved=self._number("pages_sharing"),
        )

    def _begin(self) -> int | None:
        """Let KSM run, if nobody else has a say in it. Blocks.

        Returns:
            How many scans there were before; None: it does not run.
        """
        if self._read("run") != _STOPPED:
            log.debug("KSM is somebody else's: it runs, or is to unmerge")
            return None
        shims, other = self._mergeable()
        if other:
            log.info("KSM is left off: others have memory to be merged", process=other)
            return None
        if shims < 2:
            return None
        found = {name: self._read(name) for name in (*_FAST, "run")}
        self._saved.write_text(json.dumps(found))
        first = self._number("full_scans")
        for name, value in {**_FAST, "run": "1"}.items():
            (self._ksm / name).write_text(value)
        return first

    def _restore(self) -> None:
        """Put back what was found before a burst, if there was one."""
        try:
            found = json.loads(self._saved.read_bytes())
        except FileNotFoundError:
            return
        except ValueError:  # it died while this was written, and before anything was changed
            found = {}
        for name in ("run", *_FAST):
            if name in found:
                (self._ksm / name).write_text(found[name])
        self._saved.unlink()

    def _mergeable(self) -> tuple[int, str]:
        """How many shims have memory to be merged, and another process that has, if any."""
        shims = 0
        for entry in self._proc.iterdir():
            if not entry.name.isdigit():
                continue
            try:
                if "ksm_mergeable: yes" not in (entry / "ksm_stat").read_text():
                    continue
                name = (entry / "comm").read_text().strip()
            except OSError:  # it ended
                continue
            if name not in SHIM_COMMS:
                return shims, f"{name} ({entry.name})"
            shims += 1
        return shims, ""

    def _number(self, name: str) -> int:
        return int(self._read(name))

    def _read(self, name: str) -> str:
        return (self._ksm / name).read_text().strip()
