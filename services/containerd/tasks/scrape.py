"""One page of metrics out of many: every sample gets its shim as labels, families are merged.

Pages are in Prometheus' text format 0.0.4. A family's HELP and TYPE are written once, before its
samples, wherever those come from.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from services.common.errors import TheseusError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from services.containerd.tasks.shim import Shim

_ASKED_AT_ONCE = 64
_SUFFIXES = ("_bucket", "_sum", "_count", "_created", "_total")


async def scrape(
    shims: Sequence[tuple[str, str, Shim]], *, timeout_s: float, each_s: float = 0.25
) -> tuple[bytes, int]:
    """Ask all shims, many at a time, and take what comes in time.

    Args:
        shims: (namespace, id, shim) of each.
        timeout_s: for all of them together.
        each_s: for one of them, so that some that are stuck do not keep the others waiting.

    Returns:
        The merged page, and how many did not answer.
    """
    turns = asyncio.Semaphore(_ASKED_AT_ONCE)

    async def ask(namespace: str, identity: str, shim: Shim) -> tuple[str, str, bytes] | None:
        async with turns:
            try:
                async with asyncio.timeout(each_s):
                    return namespace, identity, await shim.metrics()
            except (TheseusError, TimeoutError):
                return None

    calls = [asyncio.ensure_future(ask(*shim)) for shim in shims]
    if not calls:
        return b"", 0
    try:
        done, late = await asyncio.wait(calls, timeout=timeout_s)
    finally:
        for call in calls:
            call.cancel()
    await asyncio.gather(*late, return_exceptions=True)
    pages = [page for call in done if (page := call.result()) is not None]
    return await asyncio.to_thread(merge, sorted(pages)), len(shims) - len(pages)


def merge(pages: Iterable[tuple[str, str, bytes]]) -> bytes:
    """Merge (namespace, id, page) into one page.

    The pages are much the same: where a sample belongs is found out once, not for each shim.
    """
    families: dict[str, tuple[list[str], list[str]]] = {}
    heads: dict[str, str] = {}
    places: dict[str, tuple[list[str], str, str]] = {}
    for namespace, identity, page in pages:
        labels = f'namespace="{_escape(namespace)}",shim="{_escape(identity)}"'
        family = ""
        for line in page.decode(errors="replace").split("\n"):
            if line.startswith("#"):
                if line not in heads:
                    heads[line] = _head(line, families)
                family = heads[line] or family
            elif line:
                sample, _, value = line.rpartition(" ")
                place = places.get(sample)
                if place is None:
                    place = places[sample] = _place(sample, family, families)
                samples, before, after = place
                samples.append(f"{before}{labels}{after} {value}")
    lines = [line for head, samples in families.values() for line in (*head, *samples)]
    return "".join(f"{line}\n" for line in lines).encode()


def _head(line: str, families: dict[str, tuple[list[str], list[str]]]) -> str:
    """Take in a HELP or TYPE line, the first of its family; returns the family, or nothing."""
    words = line.split(" ", 3)
    if len(words) < 4 or words[1] not in ("HELP", "TYPE"):
        return ""
    head, _ = families.setdefault(words[2], ([], []))
    if not any(known.startswith(f"# {words[1]} ") for known in head):
        head.append(line)
    return words[2]


def _place(
    sample: str, family: str, families: dict[str, tuple[list[str], list[str]]]
) -> tuple[list[str], str, str]:
    """Where a sample goes, and what comes before and after the labels that it gets."""
    name, _, rest = sample.partition("{")
    if not rest:  # a value before a time, which is no part of the name
        name, _, value = name.partition(" ")
        rest = f"}} {value}".rstrip()
    if not _belongs(name, family):
        family = name
    _, samples = families.setdefault(family, ([], []))
    return samples, f"{name}{{", rest if rest.startswith("}") else f",{rest}"


def _belongs(name: str, family: str) -> bool:
    return name == family or any(name == family + suffix for suffix in _SUFFIXES)


def _escape(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
