"""Tables, figures, names and JSON."""

import time

import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from protos.theseus.engine.v1 import containers_pb2 as pb
from protos.theseus.engine.v1 import images_pb2
from services.cli import describe, names, table
from services.cli.commands.ps import ports, status


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.4, "Less than a second"),
        (1, "1 second"),
        (59, "59 seconds"),
        (60, "About a minute"),
        (120, "2 minutes"),
        (3599, "59 minutes"),
        (3600, "About an hour"),
        (7200, "2 hours"),
        (47 * 3600, "47 hours"),
        (48 * 3600, "2 days"),
        (20 * 86400, "2 weeks"),
        (70 * 86400, "2 months"),
        (800 * 86400, "2 years"),
    ],
)
def test_durations(seconds, words):
    assert table.duration(seconds) == words


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0B"),
        (999, "999B"),
        (1000, "1kB"),
        (1_234_567, "1.23MB"),
        (56_000_000, "56MB"),
        (999_999, "1MB"),
        (999_499, "999kB"),
        (12 * 10**9, "12GB"),
        (5 * 10**15, "5000TB"),
    ],
)
def test_sizes(count, text):
    assert table.size(count) == text


def test_tables_are_as_wide_as_their_cells(capsys):
    table.write(("A", "BB"), [("long cell", "x"), ("y", "")])
    assert capsys.readouterr().out == "A           BB\nlong cell   x\ny\n"


@pytest.mark.parametrize(
    ("reference", "parts"),
    [
        ("docker.io/library/busybox:latest", ("busybox", "latest", "")),
        ("docker.io/a/b:1", ("a/b", "1", "")),
        ("localhost:5000/a", ("localhost:5000/a", "", "")),
        ("localhost:5000/a:t@sha256:1", ("localhost:5000/a", "t", "sha256:1")),
    ],
)
def test_references(reference, parts):
    assert names.split(names.familiar(reference)) == parts


def test_states_in_words():
    now = time.time_ns()
    container = pb.Container(state=pb.CONTAINER_STATE_RUNNING)
    container.started_at.FromNanoseconds(now - 5 * 10**9)
    assert status(container) == "Up 5 seconds"
    container.state = pb.CONTAINER_STATE_PAUSED
    assert status(container) == "Up 5 seconds (Paused)"
    container.state = pb.CONTAINER_STATE_EXITED
    container.exit.code = 42
    container.exit.finished_at.FromNanoseconds(now - 3 * 10**9)
    assert status(container) == "Exited (42) 3 seconds ago"
    container.exit.lost = True
    assert status(container) == "Exited (lost) 3 seconds ago"
    assert status(pb.Container(state=pb.CONTAINER_STATE_CREATED)) == "Created"


def test_ports_in_words():
    mappings = [
        pb.PortMapping(host_ip="127.0.0.1", host_port=8080, container_port=80, protocol="udp"),
        pb.PortMapping(host_port=1, container_port=2),
    ]
    assert ports(mappings) == "127.0.0.1:8080->80/udp, 0.0.0.0:1->2/tcp"


def test_a_container_as_json():
    container = pb.Container(
        id="a" * 64,
        name="x",
        args=["sh", "-c", "true"],
        state=pb.CONTAINER_STATE_EXITED,
        config=pb.ContainerConfig(image="busybox", labels={"k": "v"}, network_mode="host"),
        exit=pb.ExitStatus(code=3, oom_killed=True),
        networks=[pb.NetworkEndpoint(network="bridge", ip_address="10.0.0.2", prefix_length=16)],
        mounts=[pb.Mount(type=pb.Mount.TYPE_BIND, source="/a", target="/b", read_only=True)],
        created_at=Timestamp(seconds=1),
    )
    found = describe.container(container)
    assert (found["Path"], found["Args"], found["Created"]) == (
        "sh",
        ["-c", "true"],
        "1970-01-01T00:00:01Z",
    )
    state = found["State"]
    assert (state["Status"], state["ExitCode"], state["OOMKilled"]) == ("exited", 3, True)
    assert state["StartedAt"] == "0001-01-01T00:00:00Z"
    assert found["NetworkSettings"]["Networks"]["bridge"]["IPAddress"] == "10.0.0.2"
    assert found["NetworkSettings"]["IPAddress"] == "10.0.0.2"
    assert found["Mounts"][0]["RW"] is False
    container.exit.lost = True
    assert describe.container(container)["State"]["ExitCode"] is None


def test_an_image_without_configuration_as_json():
    found = describe.image(images_pb2.Image(id="sha256:1", digest="sha256:2"))
    assert (found["RepoTags"], found["RootFS"]["Layers"]) == ([], [])
