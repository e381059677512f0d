"""Libraries that the standard library can do without, and that a shim goes without.

They are for TLS, faster digests, UUIDs of this machine and old archives: memory, and forty mappings
that every fork would copy.
"""

from __future__ import annotations

import sys

_SPARED = ("ssl", "_hashlib", "_uuid", "bz2", "lzma")


def leave_out() -> None:
    """Have imports go without them from now on. Call it first."""
    for name in _SPARED:
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]  # see importlib: not found


def let_in() -> None:
    """Have them found again, by plug-ins say. Call it once all else is imported."""
    for name in _SPARED:
        if name in sys.modules and sys.modules[name] is None:
            del sys.modules[name]
