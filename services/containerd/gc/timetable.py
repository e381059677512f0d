"""When the next collection is due: arithmetic on times that others read from their clock.

After each collection time is cut into intervals. What is scheduled waits for the end of the
interval in which it was first wanted: one collection does for all that is deleted in it, and a
client has that long to refer to what it made. Nothing ticks while nothing changes.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from services.containerd.gc.policy import PAUSE_THRESHOLD_MAX

if TYPE_CHECKING:
    from services.containerd.gc.policy import GcPolicy

_FIRST_INTERVAL_S = 1.0
_LEAST_PAUSE_S = 0.005
"""A collection counts as no shorter than this, as upstream: or the next would come at once."""
_RETRY_MAX_S = 60.0


class Timetable:
    """The time of the next collection, ``due_s``; times are those of one monotonic clock.

    Args:
        policy: how often.
    """

    def __init__(self, policy: GcPolicy) -> None:
        self._policy = policy
        self.due_s = math.inf
        self._interval_s = _FIRST_INTERVAL_S
        self._since_s: float | None = None  # the end of the last collection; None: none so far
        self._pauses_s = 0.0
        self._collections = 0
        self._failures = 0  # since the last one that succeeded
        self._running = self._asked = False
        # Since the last collection that succeeded began, and before one that runs now.
        self._deletions = self._mutations = 0
        self._before = (0, 0)

    def begin(self, now_s: float) -> None:
        """Collections are possible from now on."""
        self._expect(now_s + self._policy.startup_delay_s)

    def changed(self, now_s: float) -> None:
        """Something was made, or changed."""
        self._mutations += 1
        if self._reached(self._mutations, self._policy.mutation_threshold):
            self._expect(self._end_of_interval(now_s))

    def deleted(self, now_s: float) -> None:
        """Something was deleted."""
        self._deletions += 1
        self._mutations += 1
        if self._reached(self._deletions, self._policy.deletion_threshold):
            self._expect(now_s + self._policy.schedule_delay_s)
        self._expect(self._end_of_interval(now_s))

    def asked(self, now_s: float) -> None:
        """Somebody waits for a collection."""
        self._asked = True
        self._expect(now_s + self._policy.schedule_delay_s)
        self._expect(self._end_of_interval(now_s))

    def began(self) -> None:
        """A collection looks at what there is: what is deleted from now on is for the next one."""
        self._before = (self._deletions, self._mutations)
        self._deletions = self._mutations = 0
        self._asked = False
        self._running = True
        self.due_s = math.inf

    def ended(self, now_s: float, *, pause_s: float) -> None:
        """The collection has succeeded; it has kept others waiting for ``pause_s``."""
        policy = self._policy
        self._pauses_s += pause_s
        self._collections += 1
        self._failures = 0
        if policy.pause_threshold > 0:
            share = min(policy.pause_threshold, PAUSE_THRESHOLD_MAX)
            mean_s = max(self._pauses_s / self._collections, _LEAST_PAUSE_S)
            self._interval_s = mean_s / share - mean_s
        self._since_s = now_s
        self._running = False
        if policy.idle_interval_s > 0:
            self._expect(now_s + policy.idle_interval_s)
        many = self._reached(self._mutations, policy.mutation_threshold)
        if self._asked or self._deletions or many:
            self._expect(now_s + self._interval_s)

    def failed(self, now_s: float) -> None:
        """The collection has failed: it is tried again, later with each time."""
        deletions, mutations = self._before
        self._deletions += deletions
        self._mutations += mutations
        self._failures += 1
        self._since_s = now_s
        self._running = False
        self._expect(now_s + min(self._interval_s + self._failures, _RETRY_MAX_S))

    def _end_of_interval(self, now_s: float) -> float:
        if self._running or self._failures or self._since_s is None:
            return self.due_s  # an interval begins with its end; or the next attempt is on its way
        passed = max(now_s - self._since_s, 0.0) // self._interval_s
        return self._since_s + (passed + 1) * self._interval_s

    def _expect(self, due_s: float) -> None:
        self.due_s = min(self.due_s, due_s)

    @staticmethod
    def _reached(count: int, threshold: int) -> bool:
        return 0 < threshold <= count
