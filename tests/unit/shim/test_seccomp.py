"""Compiled seccomp filters pass from one container to the next, and only to those they fit."""

from __future__ import annotations

import base64
import json
import os

import pytest

from services.shim.runtimes import seccomp
from services.shim.runtimes.programs import Program

RETURN = b"\x06\0\0\0\0\0\xff\x7f"
LOAD = b"\x20\0\0\0\0\0\0\0"
FILTER = LOAD + RETURN
PROFILE = {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["mkdir"], "action": "x"}]}


class Place:
    """A runtime's program and state, and bundles of containers under it."""

    def __init__(self, directory):
        self.directory = directory
        self.program = directory / "program"
        self.program.write_text("1")
        self.state = directory / "runtime" / "namespace"
        self.state.mkdir(parents=True)

    def bundle(self, name, profile=PROFILE, **more):
        bundle = self.directory / name
        bundle.mkdir()
        spec = {"linux": {"seccomp": profile} if profile is not None else {}, **more}
        (bundle / "config.json").write_text(json.dumps(spec))
        return bundle

    def prepare(self, bundle):
        return seccomp.prepare(
            bundle,
            json.loads((bundle / "config.json").read_text()),
            state=self.state,
            container_id=bundle.name,
            program=Program(str(self.program)),
        )

    def create(self, bundle, compiled=FILTER):
        """What the runtime is given as compiled filter; it leaves ``compiled``, as crun does."""
        wanted = self.prepare(bundle)
        given = annotations(bundle).get(seccomp.ANNOTATION)
        if wanted is not None:
            if compiled is not None:
                (self.state / bundle.name).mkdir()
                (self.state / bundle.name / "seccomp.bpf").write_bytes(compiled)
            seccomp.keep(wanted)
        return given if given is None else base64.b64decode(given)


def annotations(bundle):
    return json.loads((bundle / "config.json").read_text()).get("annotations") or {}


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path)


def test_the_second_container_of_a_profile_gets_the_filter_of_the_first(place):
    assert place.create(place.bundle("a")) is None
    second = place.bundle("b", annotations={"mine": "kept"})
    assert place.create(second) == FILTER
    assert annotations(second)["mine"] == "kept"
    spec = json.loads((second / "config.json").read_text())
    assert spec["linux"]["seccomp"] == PROFILE  # for a program that does not know the annotation


def test_another_profile_or_another_program_is_compiled_anew(place):
    place.create(place.bundle("a"))
    assert place.create(place.bundle("b", PROFILE | {"defaultErrnoRet": 3})) is None
    place.program.write_text("a newer one")
    assert place.create(place.bundle("c")) is None
    assert place.create(place.bundle("d")) == FILTER


def test_what_depends_on_more_than_the_profile_is_left_alone(place):
    place.create(place.bundle("a"))
    own = {seccomp.ANNOTATION: base64.b64encode(RETURN).decode()}
    given = place.bundle("given", annotations=own)
    assert place.prepare(given) is None
    assert annotations(given) == own
    for name, bundle in (
        ("strict", {"annotations": {"run.oci.seccomp_fail_unknown_syscall": "1"}}),
        ("heard", {"profile": PROFILE | {"listenerPath": "/run/agent.sock"}}),
        ("open", {"profile": None}),
    ):
        made = place.bundle(name, **bundle)
        before = (made / "config.json").read_bytes()
        assert place.prepare(made) is None
        assert (made / "config.json").read_bytes() == before


@pytest.mark.parametrize(
    "left", [None, b"", b"short", LOAD, RETURN * 4097], ids=lambda left: f"{len(left or '')} bytes"
)
def test_what_is_no_filter_is_not_kept(place, left):
    place.create(place.bundle("a"), compiled=left)
    assert place.create(place.bundle("b")) is None


def test_a_spec_that_makes_no_sense_is_the_runtimes_to_refuse(place):
    for name, text in (
        ("a", '{"linux": 3}'),
        ("b", '{"linux": {"seccomp": []}}'),
        ("c", '{"linux": {"seccomp": {"defaultAction": "x"}}, "annotations": 3}'),
    ):
        bundle = place.bundle(name)
        (bundle / "config.json").write_text(text)
        assert place.prepare(bundle) is None


def test_filters_are_bounded_in_number_and_the_oldest_go(place):
    for number in range(70):
        place.create(place.bundle(str(number), PROFILE | {"defaultErrnoRet": number}))
        for path in (place.state.parent / ".seccomp").iterdir():
            if path.stat().st_mtime_ns > 10**12:
                os.utime(path, ns=(number, number))
    assert len(list((place.state.parent / ".seccomp").iterdir())) == 64
    assert place.create(place.bundle("old", PROFILE | {"defaultErrnoRet": 5})) is None
    assert place.create(place.bundle("new", PROFILE | {"defaultErrnoRet": 69})) == FILTER


def test_a_filter_that_is_cut_off_is_compiled_again(place):
    place.create(place.bundle("a"))
    (kept,) = (place.state.parent / ".seccomp").iterdir()
    kept.write_bytes(FILTER[:-3])
    assert place.create(place.bundle("b")) is None
    assert place.create(place.bundle("c")) == FILTER
