"""How much is measured: all of it, or as much as fits in three minutes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Scale:
    """Numbers of everything.

    Attributes:
        rounds: timed rounds of short calls.
        pulls: timed rounds of pulls and other things that take seconds.
        fleet: containers that are started for a rate, and that run beside a recovery.
        fleets: timed fleets of each engine for a rate that has a goal; others have one.
        crowds: containers that run beside what is measured.
        packed: containers that run with several to a shim.
        records: container records that a list has.
        events: events in the journal.
        layers: layers of an image.
        networks: those of the rates.
        warm: whether pulls have an untimed round before the others.
        files: files of the image of many; their MiB are about a sixtieth.
        big_mib: size of the image of few big files.
        log_mib: what a container writes to its log.
    """

    rounds: int
    pulls: int
    fleet: int
    fleets: int
    crowds: tuple[int, ...]
    packed: int
    records: tuple[int, ...]
    events: tuple[int, ...]
    layers: tuple[int, ...]
    files: int
    big_mib: int
    log_mib: int
    networks: tuple[str, ...]
    warm: bool


FULL = Scale(
    rounds=30,
    pulls=5,
    fleet=200,
    fleets=3,
    crowds=(0, 50, 200),
    packed=200,
    records=(10, 100, 1000),
    events=(10, 10_000),
    layers=(1, 20, 100),
    files=17_000,
    big_mib=300,
    log_mib=256,
    networks=("none", "bridge"),
    warm=True,
)
QUICK = Scale(
    rounds=2,
    pulls=1,
    fleet=8,
    fleets=1,
    crowds=(0, 8),
    packed=64,
    records=(10, 40),
    events=(10, 500),
    layers=(1, 8),
    files=1_500,
    big_mib=32,
    log_mib=32,
    networks=("none",),
    warm=False,
)
