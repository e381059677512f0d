"""References that count only while a condition holds: containerd's ``gc.cond.*`` labels.

    on an image or a blob    containerd.io/gc.cond.snapshot.<snapshotter>[/<any>] =
                                 usedat<24h|<the snapshot's name>
    on the snapshot          containerd.io/gc.cond.value-usedat = <time, RFC 3339>

That snapshot is kept for the image's sake while it was used less than a day ago. Of several
conditions, by commas, one is enough; ``<`` and ``>`` compare the time since then with a duration as
Go writes it. What does not parse is no condition, and keeps nothing.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

REFERENCE = "containerd.io/gc.cond.snapshot"
USED_AT = "containerd.io/gc.cond.value-usedat"

_UNITS_S = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1, "m": 60, "h": 3600}
_DURATION = re.compile(r"(?:(?:\d+\.?\d*|\.\d+)(?:ns|us|µs|ms|s|m|h))+")
_PART = re.compile(r"(\d+\.?\d*|\.\d+)(ns|us|µs|ms|s|m|h)")
_CONDITION = re.compile(r"usedat(<|>)(.*)")


def conditional(labels: Mapping[str, str]) -> Iterator[tuple[str, str, str]]:
    """Snapshotter, snapshot and conditions of each conditional reference among labels."""
    for name, value in labels.items():
        if name.startswith(REFERENCE):
            snapshotter = name.removeprefix(REFERENCE).lstrip("./").partition("/")[0]
            conditions, separator, key = value.partition("|")
            if separator and snapshotter:
                yield snapshotter, key, conditions


def holds(conditions: str, used_at: str, *, now_ns: int) -> bool:
    """Whether one of the conditions is met by a snapshot that was used at a time."""
    try:
        at = datetime.fromisoformat(used_at)
    except ValueError:
        return False
    since_s = now_ns / 1e9 - (at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp()
    return any(_met(condition, since_s) for condition in conditions.split(","))


def _met(condition: str, since_s: float) -> bool:
    match = _CONDITION.fullmatch(condition)
    limit_s = None if match is None else _seconds(match[2])
    if match is None or limit_s is None:
        return False
    return since_s < limit_s if match[1] == "<" else since_s > limit_s


def _seconds(text: str) -> float | None:
    if not _DURATION.fullmatch(text):
        return None
    return sum(float(number) * _UNITS_S[unit] for number, unit in _PART.findall(text))
