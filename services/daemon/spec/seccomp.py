"""System call filters: rules with conditions, and what is left of them for one container.

A profile is written once for every machine: a rule may depend on the architecture, the kernel's
version and the capabilities that the container has. :func:`render` decides the conditions and
leaves what the OCI runtime reads as ``linux.seccomp``. Names that a runtime's libseccomp does not
know are skipped by the runtime. The default profile is in
:mod:`services.daemon.spec.seccomp_default`; :func:`parse_profile` reads the JSON form that users
of moby write by hand.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from services.common.errors import InvalidArgument
from services.common.frozen import frozen

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

EPERM = 1
ENOSYS = 38

ALLOW = "SCMP_ACT_ALLOW"
ERRNO = "SCMP_ACT_ERRNO"

# uname -m -> name in profiles, and the constants of libseccomp: native first
_ARCHITECTURES: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "x86_64": ("amd64", ("SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32")),
    "aarch64": ("arm64", ("SCMP_ARCH_AARCH64", "SCMP_ARCH_ARM")),
    "armv7l": ("arm", ("SCMP_ARCH_ARM",)),
    "ppc64le": ("ppc64le", ("SCMP_ARCH_PPC64LE",)),
    "s390x": ("s390x", ("SCMP_ARCH_S390X", "SCMP_ARCH_S390")),
    "riscv64": ("riscv64", ("SCMP_ARCH_RISCV64",)),
    "loongarch64": ("loongarch64", ("SCMP_ARCH_LOONGARCH64",)),
}


@frozen
class Argument:
    """A condition on one argument of the call: ``op`` as libseccomp names it, without SCMP_CMP_."""

    index: int
    op: str
    value: int
    value_two: int = 0


@frozen
class Condition:
    """When a rule counts. Empty fields do not ask anything.

    Attributes:
        arches: any of them.
        capabilities: all of them to include a rule, any of them to exclude it.
        min_kernel: at least this version.
    """

    arches: tuple[str, ...] = ()
    capabilities: tuple[str, ...] = ()
    min_kernel: tuple[int, int] | None = None


@frozen
class Rule:
    """What happens to some system calls; ``arguments`` must all hold."""

    names: tuple[str, ...]
    action: str = ALLOW
    errno: int | None = None
    arguments: tuple[Argument, ...] = ()
    when: Condition = Condition()
    unless: Condition = Condition()


@frozen
class Profile:
    """A whole filter; ``default_action`` is for calls that no rule names."""

    rules: tuple[Rule, ...]
    default_action: str = ERRNO
    default_errno: int | None = EPERM
    architectures: tuple[str, ...] = ()


def render(
    profile: Profile,
    *,
    machine: str,
    kernel: tuple[int, int],
    capabilities: Collection[str],
    x32: bool = True,
) -> dict[str, Any]:
    """The filter as ``linux.seccomp`` of an OCI configuration.

    Args:
        profile: the rules.
        machine: as ``uname -m``.
        kernel: version of the running kernel.
        capabilities: the container's bounding set.
        x32: the kernel has that ABI. Where it has not, no program for it can run, and its part of
            the filter, a sixth of the time to create a container, is left out.
    """
    arch, native = _ARCHITECTURES.get(machine, (machine, ()))
    seccomp: dict[str, Any] = {"defaultAction": profile.default_action}
    if profile.default_errno is not None:
        seccomp["defaultErrnoRet"] = profile.default_errno
    if not x32:
        native = tuple(name for name in native if name != "SCMP_ARCH_X32")
    architectures = profile.architectures or native
    if architectures:
        seccomp["architectures"] = list(architectures)
    seccomp["syscalls"] = [
        _render_rule(rule)
        for rule in profile.rules
        if _included(rule.when, arch, kernel, capabilities)
        and not _excluded(rule.unless, arch, kernel, capabilities)
    ]
    return seccomp


def parse_profile(text: str) -> Profile:
    """Read a profile in moby's JSON form.

    Raises:
        InvalidArgument: it is not one.
    """
    try:
        document = json.loads(text)
        return Profile(
            rules=tuple(_parse_rule(entry) for entry in document.get("syscalls") or ()),
            default_action=document["defaultAction"],
            default_errno=document.get("defaultErrnoRet"),
            architectures=tuple(document.get("architectures") or ()),
        )
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InvalidArgument(
            f"decoding seccomp profile failed: {error}", field="security_opt"
        ) from error


def _included(
    condition: Condition, arch: str, kernel: tuple[int, int], capabilities: Collection[str]
) -> bool:
    return (
        (not condition.arches or arch in condition.arches)
        and all(name in capabilities for name in condition.capabilities)
        and (condition.min_kernel is None or kernel >= condition.min_kernel)
    )


def _excluded(
    condition: Condition, arch: str, kernel: tuple[int, int], capabilities: Collection[str]
) -> bool:
    return (
        arch in condition.arches
        or any(name in capabilities for name in condition.capabilities)
        or (condition.min_kernel is not None and kernel >= condition.min_kernel)
    )


def _render_rule(rule: Rule) -> dict[str, Any]:
    rendered: dict[str, Any] = {"names": list(rule.names), "action": rule.action}
    if rule.errno is not None:
        rendered["errnoRet"] = rule.errno
    if rule.arguments:
        rendered["args"] = [
            {
                "index": argument.index,
                "value": argument.value,
                "valueTwo": argument.value_two,
                "op": f"SCMP_CMP_{argument.op}",
            }
            for argument in rule.arguments
        ]
    return rendered


def _parse_rule(entry: Mapping[str, Any]) -> Rule:
    if entry.get("name") and entry.get("names"):
        raise ValueError("both 'name' and 'names' are specified, use either")
    names = [entry["name"]] if entry.get("name") else entry["names"]
    return Rule(
        names=tuple(str(name) for name in names),
        action=entry["action"],
        errno=entry.get("errnoRet"),
        arguments=tuple(
            Argument(
                index=int(argument["index"]),
                op=argument["op"].removeprefix("SCMP_CMP_"),
                value=int(argument["value"]),
                value_two=int(argument.get("valueTwo", 0)),
            )
            for argument in entry.get("args") or ()
        ),
        when=_parse_condition(entry.get("includes") or {}),
        unless=_parse_condition(entry.get("excludes") or {}),
    )


def _parse_condition(entry: Mapping[str, Any]) -> Condition:
    kernel = entry.get("minKernel") or ""
    version = None
    if kernel:
        first, second = kernel.split(".")
        version = (int(first), int(second))
    return Condition(
        arches=tuple(entry.get("arches") or ()),
        capabilities=tuple(entry.get("caps") or ()),
        min_kernel=version,
    )
