"""Platforms: how they are written, made canonical, and chosen from.

A matcher ranks platforms: the smaller the rank the better, None is no match. What a processor can
run besides its own kind follows from its architecture: amd64 runs its lower levels and 386, arm v7
runs v6 and v5, arm64 runs its lower versions and 32-bit arm.
"""

from __future__ import annotations

import os
import re
from dataclasses import replace
from typing import TYPE_CHECKING

from services.common.errors import InvalidArgument
from services.common.frozen import frozen
from services.containerd.content.descriptor import Platform

if TYPE_CHECKING:
    from collections.abc import Iterable

HOST_OS = "linux"

# Go's lists, of the names by which a word standing alone is told to be one or the other.
_SYSTEMS = frozenset(
    re.findall(
        r"\S+",
        "aix android darwin dragonfly freebsd hurd illumos ios js linux nacl netbsd openbsd plan9 "
        "solaris windows zos",
    )
)
_ARCHITECTURES = frozenset(
    re.findall(
        r"\S+",
        "386 amd64 amd64p32 arm armbe arm64 arm64be ppc64 ppc64le loong64 mips mipsle mips64 "
        "mips64le mips64p32 mips64p32le ppc riscv riscv64 s390 s390x sparc sparc64 wasm",
    )
)
_PART = re.compile(r"[A-Za-z0-9_.-]+")

# What uname(2) calls a machine, where that is not what Go calls it.
_MACHINES = {"loongarch64": "loong64", "i486": "386", "i586": "386", "i686": "386"}
_ARM_MACHINE = re.compile(r"armv([5-8])")

# The highest minor version of arm64 v8 that a v9 processor implements, by its own minor version.
_ARM64_V8_OF_V9 = 5


def parse_platform(text: str) -> Platform:
    """Read ``<os>``, ``<architecture>``, ``<os>/<architecture>`` or ``<os>/<arch>/<variant>``.

    What is left out is the host's.

    Raises:
        InvalidArgument: it is none of these.
    """
    parts = text.split("/")
    if len(parts) > 3 or not all(_PART.fullmatch(part) for part in parts):
        raise InvalidArgument(
            f"platform {text[:100]!r} is malformed: want <os>[/<architecture>[/<variant>]]",
            field="platform",
        )
    if len(parts) == 1:
        return _parse_one(text)
    platform = normalize(Platform(parts[0], parts[1], parts[2] if len(parts) == 3 else ""))
    # An architecture written without a variant matches what is described without one.
    if len(parts) == 2 and (platform.architecture, platform.variant) == ("arm", "v7"):
        return replace(platform, variant="")
    if len(parts) == 3 and platform.architecture == "arm64" and not platform.variant:
        return replace(platform, variant="v8")
    return platform


def format_platform(platform: Platform) -> str:
    """A platform as ``parse_platform`` reads it; ``unknown`` if it has no system."""
    if not platform.os:
        return "unknown"
    parts = (platform.os, platform.architecture, platform.variant)
    return "/".join(part for part in parts if part)


def normalize(platform: Platform) -> Platform:
    """The canonical form: lower case, Go's names, the variant that goes without saying left out."""
    system = platform.os.lower() or HOST_OS
    architecture, variant = _normalize_architecture(
        platform.architecture.lower(), platform.variant.lower()
    )
    return replace(
        platform,
        os="darwin" if system == "macos" else system,
        architecture=architecture,
        variant=variant,
        os_features=tuple(sorted(set(platform.os_features))),
    )


def host_platform() -> Platform:
    """What this machine is."""
    machine = os.uname().machine
    if arm := _ARM_MACHINE.match(machine):
        return Platform(HOST_OS, "arm", f"v{arm.group(1)}")
    platform = normalize(Platform(HOST_OS, _MACHINES.get(machine, machine)))
    return replace(platform, variant="v8") if platform.architecture == "arm64" else platform


@frozen
class PlatformMatcher:
    """Ranks platforms by a list of wanted ones, best first; an empty list wants all alike."""

    wanted: tuple[Platform, ...] = ()

    def rank(self, platform: Platform) -> int | None:
        """Place in the list of the first wanted platform that ``platform`` serves, or None."""
        if not self.wanted:
            return 0
        candidate = normalize(platform)
        for place, want in enumerate(self.wanted):
            if (
                (want.os, want.architecture, want.variant)
                == (candidate.os, candidate.architecture, candidate.variant)
                and set(candidate.os_features) <= set(want.os_features)
            ):  # fmt: skip
                return place
        return None

    def matches(self, platform: Platform) -> bool:
        """Whether the platform is among the wanted ones."""
        return self.rank(platform) is not None

    def __str__(self) -> str:
        return ", ".join(format_platform(want) for want in self.wanted) or "any platform"


ALL_PLATFORMS = PlatformMatcher()


def ordered(platforms: Iterable[Platform]) -> PlatformMatcher:
    """Exactly these platforms, the first is liked best."""
    return PlatformMatcher(tuple(normalize(platform) for platform in platforms))


def runnable_on(platform: Platform) -> PlatformMatcher:
    """Whatever ``platform`` can run, its own kind first."""
    return PlatformMatcher(tuple(normalize(p) for p in _vector(normalize(platform))))


def _parse_one(text: str) -> Platform:
    host = host_platform()
    if text.lower() in _SYSTEMS or text.lower() == "macos":
        return normalize(replace(host, os=text))
    platform = normalize(Platform("", text))
    if platform.architecture not in _ARCHITECTURES:
        raise InvalidArgument(
            f"platform {text[:100]!r} is neither a known system nor a known architecture",
            field="platform",
        )
    if (platform.architecture, platform.variant) == ("arm", "v7"):
        return replace(platform, variant="")
    return platform


def _normalize_architecture(architecture: str, variant: str) -> tuple[str, str]:
    match architecture:
        case "i386":
            return "386", ""
        case "x86_64" | "x86-64" | "amd64":
            return "amd64", "" if variant == "v1" else variant
        case "aarch64" | "arm64":
            plain = {"8": "", "v8": "", "v8.0": "", "9": "v9", "9.0": "v9", "v9.0": "v9"}
            return "arm64", plain.get(variant, variant)
        case "armhf":
            return "arm", "v7"
        case "armel":
            return "arm", "v6"
        case "arm":
            return "arm", {"": "v7", "5": "v5", "6": "v6", "7": "v7", "8": "v8"}.get(
                variant, variant
            )
    return architecture, variant


def _vector(platform: Platform) -> list[Platform]:
    match platform.architecture:
        case "amd64":
            levels = range(_number(platform.variant) - 1, 0, -1)
            lower = [replace(platform, variant=f"v{level}") for level in levels]
            return [platform, *lower, replace(platform, architecture="386", variant="")]
        case "arm":
            levels = range(_number(platform.variant) - 1, 4, -1)
            return [platform, *(replace(platform, variant=f"v{level}") for level in levels)]
        case "arm64":
            arm = replace(platform, architecture="arm", variant="v8")
            variants = _arm64_variants(platform.variant)
            return [*(replace(platform, variant=v) for v in variants), *_vector(arm)]
    return [platform]


def _arm64_variants(variant: str) -> list[str]:
    match = re.fullmatch(r"v([89])(?:\.([0-9]))?", variant or "v8")
    if match is None:
        return [variant]
    major, minor = int(match.group(1)), int(match.group(2) or 0)
    variants = _minor_versions(major, minor)
    if major == 9:
        variants += _minor_versions(8, min(minor + _ARM64_V8_OF_V9, 9))
    return variants


def _minor_versions(major: int, minor: int) -> list[str]:
    return [f"v{major}.{number}" if number else f"v{major}" for number in range(minor, -1, -1)]


def _number(variant: str) -> int:
    digits = variant.removeprefix("v")
    return int(digits) if digits.isascii() and digits.isdigit() and len(digits) < 3 else 0
