"""The process part of a configuration: arguments, environment, user and capabilities.

Used for a container's first process and, with the container's configuration at hand, for those
that are started in it later.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from services.common.errors import InvalidArgument
from services.common.frozen import frozen
from services.daemon.spec.defaults import PATH_ENV
from services.daemon.spec.limits import validate_env, validate_working_dir

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from services.daemon.spec.request import ImageConfig, Overrides, ResolvedUser


@frozen
class ExecRequest:
    """A further process in a container.

    Attributes:
        env: added to the container's, as ``Overrides.env``.
        working_dir: empty takes the container's.
        user: None takes the container's.
        home_configured: the container's HOME comes from the image or the user: it stays as it is
            when the process runs as somebody else.
        privileged_capabilities: what it gets instead of the container's capabilities; None for
            the container's.
    """

    args: tuple[str, ...]
    env: tuple[str, ...] = ()
    working_dir: str = ""
    user: ResolvedUser | None = None
    home_configured: bool = False
    tty: bool = False
    privileged_capabilities: tuple[str, ...] | None = None


def arguments(image: ImageConfig, overrides: Overrides) -> tuple[str, ...]:
    """What is executed: entrypoint, then command, by moby's rules of who replaces what.

    Raises:
        InvalidArgument: nothing is left to execute.
    """
    entrypoint = image.entrypoint if overrides.entrypoint is None else overrides.entrypoint
    if entrypoint == ("",):
        entrypoint = ()
    command = overrides.command
    if overrides.entrypoint is None and not command:
        command = image.command
    args = (*entrypoint, *command)
    if not args or not args[0]:
        raise InvalidArgument("no command specified", field="command")
    if any("\0" in arg for arg in args):
        raise InvalidArgument("an argument has a NUL character in it", field="command")
    return args


def environment(
    image: ImageConfig, overrides: Overrides, *, hostname: str, user: ResolvedUser
) -> list[str]:
    """The environment: defaults, then the user's variables, then the image's others.

    Raises:
        InvalidArgument: an entry without a name.
    """
    validate_env(overrides.env)
    asked = {_name(entry) for entry in overrides.env}
    configured = [*overrides.env, *(entry for entry in image.env if _name(entry) not in asked)]
    defaults = [PATH_ENV, f"HOSTNAME={hostname}"]
    if overrides.tty:
        defaults.append("TERM=xterm")
    env = merge_env(defaults, configured)
    return env if any(_name(entry) == "HOME" for entry in env) else [*env, f"HOME={user.home}"]


def merge_env(base: Iterable[str], changes: Iterable[str]) -> list[str]:
    """``base`` changed: NAME=VALUE replaces in place or is appended, NAME alone removes."""
    merged = {_name(entry): entry for entry in base}
    for entry in changes:
        if "=" in entry:
            merged[_name(entry)] = entry
        else:
            merged.pop(entry, None)
    return list(merged.values())


def process(
    args: Sequence[str],
    *,
    env: Sequence[str],
    working_dir: str,
    user: ResolvedUser,
    tty: bool,
    capabilities: Sequence[str],
    no_new_privileges: bool,
) -> dict[str, Any]:
    """``process`` of an OCI configuration."""
    validate_working_dir(working_dir)
    names = list(capabilities)
    return {
        "terminal": tty,
        "user": _user(user),
        "args": list(args),
        "env": list(env),
        "cwd": working_dir or "/",
        "capabilities": {"bounding": names, "effective": names, "permitted": names},
        "noNewPrivileges": no_new_privileges,
    }


def exec_process(init: dict[str, Any], request: ExecRequest) -> dict[str, Any]:
    """The OCI process of a further process in the container whose own one is ``init``.

    Raises:
        InvalidArgument: no arguments, a bad variable, or a relative working directory.
    """
    if not request.args or not request.args[0]:
        raise InvalidArgument("no exec command specified", field="command")
    validate_env(request.env)
    validate_working_dir(request.working_dir)
    made: dict[str, Any] = copy.deepcopy(init)
    made.pop("consoleSize", None)
    env = made["env"]
    if request.user is not None:
        made["user"] = _user(request.user)
        if not request.home_configured:
            env = merge_env(env, [f"HOME={request.user.home}"])
    if request.tty:
        env = merge_env(["TERM=xterm"], env)
    made["env"] = merge_env(env, request.env)
    made["args"] = list(request.args)
    made["terminal"] = request.tty
    made["cwd"] = request.working_dir or made["cwd"]
    if request.privileged_capabilities is not None:
        names = list(request.privileged_capabilities)
        made["capabilities"] = {"bounding": names, "effective": names, "permitted": names}
    return made


def _user(user: ResolvedUser) -> dict[str, Any]:
    return {
        "uid": user.uid,
        "gid": user.gid,
        "additionalGids": list(dict.fromkeys((user.gid, *user.additional_gids))),
    }


def _name(entry: str) -> str:
    return entry.partition("=")[0]
