from __future__ import annotations

import gzip
import json
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from services.common.errors import InvalidArgument
from services.daemon.spec.capabilities import DEFAULTS, NAMES
from services.daemon.spec.host import may_run_x32
from services.daemon.spec.seccomp import Condition, Profile, Rule, parse_profile, render
from services.daemon.spec.seccomp_default import DEFAULT_PROFILE
from services.daemon.spec.security import SecurityOptions, parse_security_options

if TYPE_CHECKING:
    from pathlib import Path

KERNEL = (6, 1)


def rules(capabilities=DEFAULTS, machine="x86_64", kernel=KERNEL) -> dict[str, list[dict]]:
    """Rules by the name of the call."""
    seccomp = render(DEFAULT_PROFILE, machine=machine, kernel=kernel, capabilities=capabilities)
    found: dict[str, list[dict]] = {}
    for rule in seccomp["syscalls"]:
        for name in rule["names"]:
            found.setdefault(name, []).append(rule)
    return found


def test_what_is_not_named_is_refused() -> None:
    seccomp = render(DEFAULT_PROFILE, machine="x86_64", kernel=KERNEL, capabilities=())
    assert seccomp["defaultAction"] == "SCMP_ACT_ERRNO"
    assert seccomp["defaultErrnoRet"] == 1
    assert seccomp["architectures"] == ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"]


def test_an_abi_that_the_kernel_has_not_is_left_out() -> None:
    native = render(DEFAULT_PROFILE, machine="x86_64", kernel=KERNEL, capabilities=(), x32=False)
    assert native["architectures"] == ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86"]
    named = replace(DEFAULT_PROFILE, architectures=("SCMP_ARCH_X32",))
    kept = render(named, machine="x86_64", kernel=KERNEL, capabilities=(), x32=False)
    assert kept["architectures"] == ["SCMP_ARCH_X32"]


def test_whether_the_kernel_has_x32_is_read_from_its_configuration(tmp_path: Path) -> None:
    assert may_run_x32("6.1", tmp_path)
    (tmp_path / "boot").mkdir()
    for text, expected in (
        ("\nCONFIG_X86_X32_ABI=y\n", True),
        ("\nCONFIG_X86_X32=y\n", True),
        ("\n# CONFIG_X86_X32_ABI is not set\nCONFIG_X86_X32_DISABLED=y\n", False),
    ):
        (tmp_path / "boot/config-6.1").write_text(text)
        assert may_run_x32("6.1", tmp_path) is expected
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/config.gz").write_bytes(gzip.compress(b"\nCONFIG_X86_X32_ABI=y\n"))
    assert may_run_x32("6.1", tmp_path)


def test_default_container() -> None:
    found = rules()
    for name in ("read", "openat2", "epoll_pwait2", "rseq", "ptrace", "chroot", "arch_prctl"):
        assert found[name][0]["action"] == "SCMP_ACT_ALLOW"
        assert "args" not in found[name][0]
    for name in (
        "mount",
        "unshare",
        "setns",
        "bpf",
        "keyctl",
        "init_module",
        "reboot",
        "kexec_load",
    ):
        assert name not in found


def test_threads_are_allowed_and_namespaces_are_not() -> None:
    found = rules()
    assert found["clone"][0]["args"] == [
        {"index": 0, "value": 0x7E020000, "valueTwo": 0, "op": "SCMP_CMP_MASKED_EQ"}
    ]
    assert found["clone3"] == [{"names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38}]
    assert rules(machine="s390x")["clone"][0]["args"][0]["index"] == 1


def test_sockets_of_all_families_but_two() -> None:
    def allowed(family: int) -> bool:
        compare = {"LT": int.__lt__, "EQ": int.__eq__, "GT": int.__gt__}
        return any(
            compare[rule["args"][0]["op"][-2:]](family, rule["args"][0]["value"])
            for rule in rules()["socket"]
        )

    assert [family for family in range(46) if not allowed(family)] == [38, 40]


def test_capabilities_open_calls() -> None:
    found = rules(capabilities=NAMES)
    assert {rule["action"] for rule in found["clone3"]} == {"SCMP_ACT_ALLOW"}
    assert all("args" not in rule for rule in found["clone"])
    for name in ("mount", "bpf", "ptrace", "clock_settime", "open_by_handle_at", "syslog"):
        assert name in found
    assert "perf_event_open" in rules(capabilities=("CAP_PERFMON",))


def test_kernel_and_architecture_are_conditions() -> None:
    assert "ptrace" not in rules(kernel=(4, 7))
    assert "arch_prctl" not in rules(machine="aarch64")
    assert "cacheflush" in rules(machine="aarch64")


def test_exclusion_needs_only_one_capability() -> None:
    profile = Profile(rules=(Rule(("x",), unless=Condition(capabilities=("A", "B"))),))

    def rendered(*capabilities: str) -> list:
        return render(profile, machine="x86_64", kernel=KERNEL, capabilities=capabilities)[
            "syscalls"
        ]

    assert rendered("B") == []
    assert len(rendered("C")) == 1


def test_a_profile_in_json_is_read() -> None:
    text = json.dumps(
        {
            "defaultAction": "SCMP_ACT_ALLOW",
            "syscalls": [
                {
                    "names": ["chmod"],
                    "action": "SCMP_ACT_ERRNO",
                    "errnoRet": 5,
                    "args": [{"index": 1, "value": 511, "op": "SCMP_CMP_EQ"}],
                    "includes": {"minKernel": "4.8", "arches": ["amd64"]},
                    "excludes": {"caps": ["CAP_FOWNER"]},
                },
                {"name": "mkdir", "action": "SCMP_ACT_KILL"},
            ],
        }
    )
    seccomp = render(parse_profile(text), machine="x86_64", kernel=KERNEL, capabilities=())
    assert "defaultErrnoRet" not in seccomp
    assert seccomp["syscalls"] == [
        {
            "names": ["chmod"],
            "action": "SCMP_ACT_ERRNO",
            "errnoRet": 5,
            "args": [{"index": 1, "value": 511, "valueTwo": 0, "op": "SCMP_CMP_EQ"}],
        },
        {"names": ["mkdir"], "action": "SCMP_ACT_KILL"},
    ]


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "{}",
        '{"defaultAction": "A", "syscalls": [{"action": "B"}]}',
        '{"defaultAction": "A", "syscalls": [{"names": ["x"], "name": "y", "action": "B"}]}',
        '{"defaultAction": "A", "syscalls": [{"name": "x", "action": "B", '
        '"includes": {"minKernel": "four"}}]}',
    ],
)
def test_what_is_no_profile_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgument, match="decoding seccomp profile failed"):
        parse_profile(text)


def test_security_options() -> None:
    assert parse_security_options([]) == SecurityOptions(False, DEFAULT_PROFILE)
    assert parse_security_options(["no-new-privileges"]).no_new_privileges
    assert parse_security_options(["no-new-privileges:true"]).no_new_privileges
    assert not parse_security_options(
        ["no-new-privileges", "no-new-privileges=false"]
    ).no_new_privileges
    assert parse_security_options(["seccomp=unconfined", "label=disable"]).seccomp is None
    custom = parse_security_options(['seccomp={"defaultAction": "SCMP_ACT_ALLOW"}']).seccomp
    assert custom == Profile(rules=(), default_action="SCMP_ACT_ALLOW", default_errno=None)


@pytest.mark.parametrize("option", ["nonsense", "apparmor=mine", "no-new-privileges=maybe"])
def test_unknown_security_options_are_refused(option: str) -> None:
    with pytest.raises(InvalidArgument, match=f'invalid --security-opt .: "{option}"'):
        parse_security_options([option])
