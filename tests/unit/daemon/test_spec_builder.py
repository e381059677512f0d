from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from services.common.errors import InvalidArgument
from services.daemon.spec import builder, devices
from services.daemon.spec.capabilities import DEFAULTS, NAMES
from services.daemon.spec.host import HostFacts, kernel_version
from services.daemon.spec.process import ExecRequest, exec_process
from services.daemon.spec.request import (
    Device,
    ImageConfig,
    NetworkMode,
    Overrides,
    ResolvedUser,
    Resources,
    Rlimit,
    SpecRequest,
)
from services.daemon.spec.seccomp_default import DEFAULT_PROFILE
from services.daemon.volumes.mounts import MountType, ResolvedMount

HOST = HostFacts(
    machine="x86_64",
    kernel=(6, 1),
    capabilities=tuple(name for name in NAMES if name != "CAP_SYS_RESOURCE"),
    cpus=4,
    unified_cgroups=False,
    swap_limit=True,
    thermal_paths=("/sys/devices/system/cpu/cpu0/thermal_throttle",),
)
REQUEST = SpecRequest(
    image=ImageConfig(env=("PATH=/image/bin", "A=image", "B=image"), command=("sh",)),
    overrides=Overrides(),
    user=ResolvedUser(33, 34, (100,), "/var/www"),
    hostname="box",
    cgroups_path="/theseus/abc",
    netns_path="/run/netns/abc",
    seccomp=DEFAULT_PROFILE,
)


def build(host: HostFacts = HOST, **changes: Any) -> dict[str, Any]:
    return builder.build_spec(replace(REQUEST, **changes), host)


def mounts_of(spec: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {mount["destination"]: mount for mount in spec["mounts"]}


def namespaces_of(spec: dict[str, Any]) -> dict[str, str]:
    return {entry["type"]: entry.get("path", "") for entry in spec["linux"]["namespaces"]}


def bind(target: str, **changes: Any) -> ResolvedMount:
    return ResolvedMount(MountType.BIND, "/src", target, options=("rbind", "rprivate"), **changes)


def test_a_plain_container() -> None:
    spec = build()
    assert spec["ociVersion"] == "1.0.2"
    assert spec["root"] == {"path": "rootfs", "readonly": False}
    assert spec["hostname"] == "box"
    process = spec["process"]
    assert process["args"] == ["sh"]
    assert process["cwd"] == "/"
    assert process["terminal"] is False
    assert process["noNewPrivileges"] is False
    assert process["user"] == {"uid": 33, "gid": 34, "additionalGids": [34, 100]}
    assert set(process["capabilities"]) == {"bounding", "effective", "permitted"}
    assert process["capabilities"]["bounding"] == list(DEFAULTS)
    assert "rlimits" not in process
    assert "oomScoreAdj" not in process
    linux = spec["linux"]
    assert linux["cgroupsPath"] == "/theseus/abc"
    assert set(linux["resources"]) == {"devices"}
    assert linux["resources"]["devices"][0] == {"allow": False, "access": "rwm"}
    assert linux["seccomp"]["defaultAction"] == "SCMP_ACT_ERRNO"
    assert linux["maskedPaths"][-1] == HOST.thermal_paths[0]
    assert "/proc/kcore" in linux["maskedPaths"]
    assert "/proc/sys" in linux["readonlyPaths"]
    assert "rootfsPropagation" not in linux
    assert list(mounts_of(spec)) == [
        "/proc",
        "/dev",
        "/dev/pts",
        "/sys",
        "/sys/fs/cgroup",
        "/dev/mqueue",
        "/dev/shm",
    ]
    assert "size=67108864" in mounts_of(spec)["/dev/shm"]["options"]


@pytest.mark.parametrize(
    ("image", "overrides", "args"),
    [
        (ImageConfig(command=("c",)), Overrides(), ["c"]),
        (ImageConfig(entrypoint=("e",), command=("c",)), Overrides(), ["e", "c"]),
        (ImageConfig(entrypoint=("e",), command=("c",)), Overrides(command=("d",)), ["e", "d"]),
        (ImageConfig(entrypoint=("e",), command=("c",)), Overrides(entrypoint=("f",)), ["f"]),
        (
            ImageConfig(entrypoint=("e",), command=("c",)),
            Overrides(entrypoint=("f",), command=("d",)),
            ["f", "d"],
        ),
        (
            ImageConfig(entrypoint=("e",), command=("c",)),
            Overrides(entrypoint=("",), command=("d",)),
            ["d"],
        ),
    ],
)
def test_entrypoint_and_command(image: ImageConfig, overrides: Overrides, args: list[str]) -> None:
    assert build(image=image, overrides=overrides)["process"]["args"] == args


@pytest.mark.parametrize(
    ("image", "overrides"),
    [
        (ImageConfig(), Overrides()),
        (ImageConfig(command=("c",)), Overrides(entrypoint=())),
        (ImageConfig(), Overrides(command=("",))),
    ],
)
def test_nothing_to_execute_is_refused(image: ImageConfig, overrides: Overrides) -> None:
    with pytest.raises(InvalidArgument, match="no command specified"):
        build(image=image, overrides=overrides)


def test_environment_in_mobys_order() -> None:
    spec = build(overrides=Overrides(env=("C=user", "A=user", "B"), tty=True))
    assert spec["process"]["env"] == [
        "PATH=/image/bin",
        "HOSTNAME=box",
        "TERM=xterm",
        "C=user",
        "A=user",
        "HOME=/var/www",
    ]
    assert spec["process"]["terminal"] is True


def test_configured_variables_win_over_defaults() -> None:
    env = build(overrides=Overrides(env=("HOME=/x", "HOSTNAME", "EMPTY=")))["process"]["env"]
    assert env == ["PATH=/image/bin", "HOME=/x", "EMPTY=", "A=image", "B=image"]
    assert build(image=ImageConfig(command=("c",)))["process"]["env"][0].startswith(
        "PATH=/usr/local/sbin:"
    )


@pytest.mark.parametrize("entry", ["=x", "", "A=\0"])
def test_bad_variables_are_refused(entry: str) -> None:
    with pytest.raises(InvalidArgument, match="invalid environment variable"):
        build(overrides=Overrides(env=(entry,)))


def test_working_directory() -> None:
    image = ImageConfig(command=("c",), working_dir="/image")
    assert build(image=image)["process"]["cwd"] == "/image"
    assert build(image=image, overrides=Overrides(working_dir="/u"))["process"]["cwd"] == "/u"
    with pytest.raises(InvalidArgument, match="needs to be an absolute path"):
        build(overrides=Overrides(working_dir="relative"))


def test_network_modes() -> None:
    bridge = build()
    assert namespaces_of(bridge)["network"] == "/run/netns/abc"
    assert bridge["linux"]["sysctl"]["net.ipv4.ip_unprivileged_port_start"] == "0"
    none = build(network_mode=NetworkMode.NONE, netns_path="")
    assert namespaces_of(none)["network"] == ""
    host = build(network_mode=NetworkMode.HOST, netns_path="")
    assert "network" not in namespaces_of(host)
    assert "sysctl" not in host["linux"]


def test_a_cgroup_namespace_only_with_cgroups_version_2() -> None:
    assert "cgroup" not in namespaces_of(build())
    assert "cgroup" in namespaces_of(build(replace(HOST, unified_cgroups=True)))


def test_resources() -> None:
    resources = build(resources=Resources(64 << 20, 1_500_000_000, 100, 512))["linux"]["resources"]
    assert resources["memory"] == {"limit": 64 << 20, "swap": 128 << 20}
    assert resources["cpu"] == {"shares": 512, "period": 100_000, "quota": 150_000}
    assert resources["pids"] == {"limit": 100}
    without = build(replace(HOST, swap_limit=False), resources=Resources(64 << 20))
    assert without["linux"]["resources"]["memory"] == {"limit": 64 << 20}


@pytest.mark.parametrize(
    ("resources", "message"),
    [
        (Resources(memory_bytes=(6 << 20) - 1), "Minimum memory limit allowed is 6MB"),
        (Resources(memory_bytes=-1), "Minimum memory limit allowed is 6MB"),
        (
            Resources(nano_cpus=4_000_000_001),
            "range of CPUs is from 0.01 to 4.00, as there are only 4 CPUs available",
        ),
        (Resources(nano_cpus=-1), "range of CPUs is from 0.01 to 4.00"),
        (Resources(nano_cpus=9_999_999), "range of CPUs is from 0.01 to 4.00"),
        (Resources(pids_limit=-2), "invalid PIDs limit"),
        (Resources(cpu_shares=-1), "invalid CPU shares"),
    ],
)
def test_bad_limits_are_refused(resources: Resources, message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        build(resources=resources)


def test_smallest_limits_are_taken() -> None:
    build(resources=Resources(6 << 20, 10_000_000, -1, 2))


@pytest.mark.parametrize(
    ("add", "drop", "expected"),
    [
        (("net_admin",), (), {*DEFAULTS, "CAP_NET_ADMIN"}),
        ((), ("CAP_CHOWN", "kill"), {*DEFAULTS} - {"CAP_CHOWN", "CAP_KILL"}),
        ((), ("all",), set()),
        (("chown",), ("ALL",), {"CAP_CHOWN"}),
        (("ALL",), ("sys_admin",), {*HOST.capabilities} - {"CAP_SYS_ADMIN"}),
        ((), ("sys_resource",), set(DEFAULTS)),
    ],
)
def test_capabilities(add: tuple[str, ...], drop: tuple[str, ...], expected: set[str]) -> None:
    capabilities = build(cap_add=add, cap_drop=drop)["process"]["capabilities"]
    assert set(capabilities["bounding"]) == set(capabilities["effective"]) == expected


def test_a_default_that_cannot_be_had_is_left_out_and_a_wish_is_refused() -> None:
    poor = replace(HOST, capabilities=("CAP_CHOWN", "CAP_KILL"))
    assert build(poor)["process"]["capabilities"]["bounding"] == ["CAP_CHOWN", "CAP_KILL"]
    with pytest.raises(InvalidArgument, match="not available in the current environment"):
        build(cap_add=("SYS_RESOURCE",))
    with pytest.raises(InvalidArgument, match='unknown capability: "CAP_FLY"'):
        build(cap_drop=("fly",))


def test_privileged() -> None:
    spec = build(privileged=True)
    assert spec["process"]["capabilities"]["bounding"] == list(HOST.capabilities)
    assert "seccomp" not in spec["linux"]
    assert spec["linux"]["maskedPaths"] == spec["linux"]["readonlyPaths"] == []
    assert spec["linux"]["resources"]["devices"][-1] == {"allow": True, "access": "rwm"}
    assert "/dev/null" in {node["path"] for node in spec["linux"]["devices"]}
    assert "ro" not in mounts_of(spec)["/sys"]["options"]
    assert "ro" not in mounts_of(spec)["/sys/fs/cgroup"]["options"]


def test_further_wishes() -> None:
    spec = build(
        no_new_privileges=True,
        seccomp=None,
        masked_paths=("/m",),
        readonly_paths=(),
        oom_score_adj=100,
        rlimits=(Rlimit("RLIMIT_NOFILE", 10, 20),),
        annotations={"a": "b"},
    )
    assert spec["process"]["noNewPrivileges"] is True
    assert "seccomp" not in spec["linux"]
    assert spec["linux"]["maskedPaths"] == ["/m"]
    assert spec["linux"]["readonlyPaths"] == []
    assert spec["process"]["oomScoreAdj"] == 100
    assert spec["process"]["rlimits"] == [{"type": "RLIMIT_NOFILE", "soft": 10, "hard": 20}]
    assert spec["annotations"] == {"a": "b"}


def test_mounts_of_the_user_come_after_defaults_and_outer_ones_first() -> None:
    spec = build(
        mounts=(bind("/etc/a/b"), bind("/data", read_only=True), bind("/etc")),
        files={"/etc/hosts": "/c/hosts"},
    )
    assert list(mounts_of(spec))[7:] == ["/data", "/etc", "/etc/hosts", "/etc/a/b"]
    assert mounts_of(spec)["/data"] == {
        "destination": "/data",
        "type": "bind",
        "source": "/src",
        "options": ["rbind", "rprivate", "rro"],
    }
    old = build(replace(HOST, kernel=(5, 11)), mounts=(bind("/data", read_only=True),))
    assert mounts_of(old)["/data"]["options"][-1] == "ro"


def test_a_mount_of_the_user_replaces_a_default_one() -> None:
    tmpfs = ResolvedMount(MountType.TMPFS, "tmpfs", "/dev/shm", options=("size=1g",))
    spec = build(mounts=(tmpfs,))
    assert mounts_of(spec)["/dev/shm"] == {
        "destination": "/dev/shm",
        "type": "tmpfs",
        "source": "tmpfs",
        "options": ["size=1g"],
    }
    assert not any(
        target.startswith("/dev/") for target in mounts_of(build(mounts=(bind("/dev"),)))
    )
    hosts = build(mounts=(bind("/etc/hosts"),), files={"/etc/hosts": "/c/hosts"})
    assert [m["source"] for m in hosts["mounts"] if m["destination"] == "/etc/hosts"] == ["/src"]


def test_a_readonly_root_keeps_the_usual_places_writable() -> None:
    spec = build(readonly_rootfs=True, mounts=(bind("/data"),), shm_size_bytes=1)
    found = mounts_of(spec)
    assert spec["root"]["readonly"] is True
    assert {target for target, mount in found.items() if "ro" not in mount["options"]} == {
        "/proc",
        "/dev",
        "/dev/pts",
        "/dev/mqueue",
        "/dev/shm",
        "/data",
    }


def test_propagation_of_the_root_follows_the_mounts() -> None:
    def propagation(*words: str) -> str:
        mounts = tuple(
            ResolvedMount(MountType.BIND, "/s", f"/{word}", options=("rbind", word))
            for word in words
        )
        return build(mounts=mounts)["linux"].get("rootfsPropagation", "")

    assert propagation("rprivate") == ""
    assert propagation("rslave", "rprivate") == "rslave"
    assert propagation("rslave", "rshared") == "shared"


def test_devices_are_made_and_allowed() -> None:
    spec = build(devices=(Device("/dev/zero", "/dev/nil", "rw"),))
    node = spec["linux"]["devices"][0]
    assert (node["path"], node["type"], node["major"], node["minor"]) == ("/dev/nil", "c", 1, 5)
    assert spec["linux"]["resources"]["devices"][-1] == {
        "allow": True,
        "type": "c",
        "major": 1,
        "minor": 5,
        "access": "rw",
    }


@pytest.mark.parametrize(
    ("device", "message"),
    [
        (Device("/dev/none-such", ""), "no such file or directory"),
        (Device("/etc/passwd", ""), "not a device node"),
        (Device("/dev/zero", "", "rx"), "invalid device mode"),
        (Device("/dev/zero", "", ""), "invalid device mode"),
    ],
)
def test_bad_devices_are_refused(device: Device, message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        build(devices=(device,))


def test_a_directory_of_devices_is_taken_whole() -> None:
    nodes, rules = devices.requested([Device("/dev", "/devices")])
    paths = {node["path"] for node in nodes}
    assert "/devices/null" in paths
    assert "/devices/console" not in paths
    assert not any(path.startswith("/devices/pts/") for path in paths)
    assert len(rules) == len(nodes)


def test_exec_takes_the_containers_process() -> None:
    spec = build()
    made = exec_process(spec["process"], ExecRequest(("ls",), env=("A=exec", "B"), tty=True))
    assert made["args"] == ["ls"]
    assert made["terminal"] is True
    assert made["cwd"] == "/"
    assert made["user"] == spec["process"]["user"]
    assert made["env"] == [
        "TERM=xterm",
        "PATH=/image/bin",
        "HOSTNAME=box",
        "A=exec",
        "HOME=/var/www",
    ]
    assert spec["process"]["args"] == ["sh"]


def test_exec_as_another_user() -> None:
    root = ResolvedUser(0, 0, (), "/root")
    request = ExecRequest(
        ("ls",), user=root, working_dir="/w", privileged_capabilities=("CAP_BPF",)
    )
    made = exec_process(build()["process"], request)
    assert made["user"] == {"uid": 0, "gid": 0, "additionalGids": [0]}
    assert "HOME=/root" in made["env"]
    assert made["cwd"] == "/w"
    assert made["capabilities"]["effective"] == ["CAP_BPF"]
    kept = exec_process(build()["process"], replace(request, home_configured=True))
    assert "HOME=/var/www" in kept["env"]


@pytest.mark.parametrize(
    "request_",
    [ExecRequest(()), ExecRequest(("ls",), working_dir="w"), ExecRequest(("ls",), ("=",))],
)
def test_bad_execs_are_refused(request_: ExecRequest) -> None:
    with pytest.raises(InvalidArgument):
        exec_process(build()["process"], request_)


def test_host_facts_are_those_of_this_machine() -> None:
    facts = HostFacts.read()
    assert facts.cpus >= 1
    assert facts.kernel > (3, 0)
    assert set(facts.capabilities) <= set(NAMES)
    assert kernel_version("6.1.0-18-amd64") == (6, 1)
    assert kernel_version("what") == (0, 0)
