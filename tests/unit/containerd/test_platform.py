"""Platforms: reading, canonical form, and what runs on what."""

from __future__ import annotations

import pytest

from services.common.errors import InvalidArgument
from services.containerd.content.descriptor import Platform
from services.containerd.images.platform import (
    ALL_PLATFORMS,
    format_platform,
    host_platform,
    normalize,
    ordered,
    parse_platform,
    runnable_on,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("linux/amd64", "linux/amd64"),
        ("linux/x86_64", "linux/amd64"),
        ("Linux/AMD64/v1", "linux/amd64"),
        ("linux/amd64/v3", "linux/amd64/v3"),
        ("linux/aarch64", "linux/arm64"),
        ("linux/arm64/v8", "linux/arm64/v8"),
        ("linux/arm64/8", "linux/arm64/v8"),
        ("linux/arm", "linux/arm"),
        ("linux/arm/7", "linux/arm/v7"),
        ("linux/armhf", "linux/arm"),
        ("linux/armel", "linux/arm/v6"),
        ("i386", "linux/386"),
        ("arm", "linux/arm"),
        ("macos/arm64", "darwin/arm64"),
        ("windows/amd64", "windows/amd64"),
    ],
)
def test_parse_makes_it_canonical(text: str, expected: str) -> None:
    assert format_platform(parse_platform(text)) == expected


def test_a_system_alone_takes_the_architecture_of_the_host() -> None:
    assert parse_platform("linux").architecture == normalize(host_platform()).architecture


@pytest.mark.parametrize("text", ["", "/", "linux/", "linux/amd64/v1/x", "a b/c", "nothing", "*"])
def test_what_is_no_platform_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgument, match="platform"):
        parse_platform(text)


def rank(wanted: str, candidate: str) -> int | None:
    return runnable_on(parse_platform(wanted)).rank(parse_platform(candidate))


def test_amd64_runs_its_lower_levels_and_386_in_this_order() -> None:
    order = ["linux/amd64/v3", "linux/amd64/v2", "linux/amd64", "linux/386"]
    assert [rank("linux/amd64/v3", candidate) for candidate in order] == [0, 1, 2, 3]
    assert rank("linux/amd64", "linux/amd64/v2") is None
    assert rank("linux/amd64", "linux/arm64") is None
    assert rank("linux/amd64", "windows/amd64") is None


def test_arm64_runs_older_versions_then_32_bit_arm() -> None:
    order = ["linux/arm64", "linux/arm/v8", "linux/arm/v7", "linux/arm/v6", "linux/arm/v5"]
    assert [rank("linux/arm64/v8", candidate) for candidate in order] == [0, 1, 2, 3, 4]
    assert rank("linux/arm64/v9", "linux/arm64/v8.5") == 1
    assert rank("linux/arm64/v9", "linux/arm64") == 6
    assert rank("linux/arm64", "linux/arm64/v8.1") is None
    assert rank("linux/arm/v6", "linux/arm/v7") is None
    assert rank("linux/arm/v7", "linux/arm") == 0


def test_ordered_wants_exactly_these() -> None:
    matcher = ordered([parse_platform("linux/arm64"), parse_platform("linux/amd64")])
    assert matcher.rank(Platform("linux", "x86_64")) == 1
    assert matcher.rank(Platform("linux", "arm64", "v8")) == 0
    assert not matcher.matches(Platform("linux", "386"))
    assert ALL_PLATFORMS.matches(Platform("unknown", "unknown"))


def test_features_that_are_not_wanted_rule_a_platform_out() -> None:
    candidate = Platform("linux", "amd64", os_features=("special",))
    assert not runnable_on(Platform("linux", "amd64")).matches(candidate)
    assert runnable_on(Platform("linux", "amd64", os_features=("special",))).matches(candidate)


@pytest.mark.parametrize("variant", ["vx", "v", "v999999999999", "-1", "²"])
def test_odd_variants_match_only_themselves(variant: str) -> None:
    for architecture in ("amd64", "arm", "arm64", "riscv64"):
        platform = Platform("linux", architecture, variant)
        assert runnable_on(platform).rank(platform) == 0
