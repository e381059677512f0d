"""The version of the program, as it stands in the distribution that it was installed from."""

from __future__ import annotations

from functools import cache
from importlib import metadata

DISTRIBUTION = "theseus-engine"


@cache
def program_version() -> str:
    """Version of the installed distribution; ``0+source`` when run from a plain source tree."""
    try:
        return metadata.version(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return "0+source"
