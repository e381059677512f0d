"""How often garbage is collected: upstream's settings, under upstream's names.

A collection after a deletion is *scheduled*: it comes at the end of the interval that it falls
into, and intervals are as long as it takes for collections to be no more than a share of the time,
the *pause threshold*. Whoever asks for one (a deletion that is to wait for it) has it at once.
"""

from __future__ import annotations

from services.common.frozen import frozen

PAUSE_THRESHOLD_MAX = 0.5
"""As upstream: a greater share than this counts as this one."""


@frozen
class GcPolicy:
    """When a collection is due.

    Attributes:
        pause_threshold: share of the time that scheduled collections may take; 0: one each second.
        deletion_threshold: so many deletions have one come without waiting for the interval; 0: no
            number has.
        mutation_threshold: so many changes have one come at the end of the interval though nothing
            was deleted; 0: no number has.
        schedule_delay_s: how long one that was asked for, or is due by the number of deletions,
            waits for more of the kind.
        startup_delay_s: from the start of containerd to its first one, which finds what the
            run before it had no time for.
        idle_interval_s: after which one comes in any case, since leases and images expire by
            themselves; 0: none does.
    """

    pause_threshold: float = 0.02
    deletion_threshold: int = 0
    mutation_threshold: int = 100
    schedule_delay_s: float = 0.0
    startup_delay_s: float = 0.1
    idle_interval_s: float = 300.0
