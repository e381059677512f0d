"""Security options as users write them: ``no-new-privileges``, ``seccomp=...``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from services.common.errors import InvalidArgument
from services.common.frozen import frozen
from services.daemon.spec.seccomp import parse_profile
from services.daemon.spec.seccomp_default import DEFAULT_PROFILE

if TYPE_CHECKING:
    from collections.abc import Iterable

    from services.daemon.spec.seccomp import Profile


@frozen
class SecurityOptions:
    """What the options amount to; ``seccomp`` None means no filter."""

    no_new_privileges: bool = False
    seccomp: Profile | None = DEFAULT_PROFILE


def parse_security_options(options: Iterable[str]) -> SecurityOptions:
    """Read options; a later one wins.

    ``seccomp=`` takes ``unconfined``, ``builtin``, or the text of a profile in moby's JSON form.
    ``apparmor=`` and ``label=`` are taken where they ask for nothing.

    Raises:
        InvalidArgument: an option that is unknown or has a bad value.
    """
    no_new_privileges = False
    seccomp: Profile | None = DEFAULT_PROFILE
    for option in options:
        if option == "no-new-privileges":
            no_new_privileges = True
            continue
        separator = "=" if "=" in option else ":"
        key, found, value = option.partition(separator)
        if not found:
            raise InvalidArgument(f'invalid --security-opt 1: "{option}"', field="security_opt")
        if key == "no-new-privileges" and value in ("true", "false"):
            no_new_privileges = value == "true"
        elif key == "seccomp":
            seccomp = _profile(value)
        elif option not in ("apparmor=unconfined", "label=disable", "label:disable"):
            raise InvalidArgument(f'invalid --security-opt 2: "{option}"', field="security_opt")
    return SecurityOptions(no_new_privileges, seccomp)


def _profile(value: str) -> Profile | None:
    if value == "unconfined":
        return None
    return DEFAULT_PROFILE if value == "builtin" else parse_profile(value)
