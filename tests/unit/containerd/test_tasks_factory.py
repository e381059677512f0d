"""The factory's client: replies, failures in words, and a program that is restarted."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from services.common.errors import DeadlineExceeded, Unavailable
from services.common.log import request_id
from services.containerd.tasks import waiting as waiting_shims
from services.containerd.tasks.factory import FactoryClient
from services.containerd.tasks.line import ShimLine, ShimStartFailed
from services.containerd.tasks.shim import ShimAddress, ShimRequest
from tests.fakes.eventually import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

PROGRAM = (sys.executable, str(Path(__file__).parents[2] / "fakes" / "factory.py"))


@pytest.fixture
async def factory(tmp_path: Path) -> AsyncIterator[FactoryClient]:
    client = FactoryClient(
        PROGRAM, socket=tmp_path / "f.sock", registry=tmp_path / "c.sock", default_runtime="crun"
    )
    async with client:
        yield client


def request(tmp_path: Path, id: str) -> ShimRequest:
    return ShimRequest("ns", id, tmp_path, tmp_path / "shim.sock", "0" * 32)


async def test_a_shim_is_asked_for_with_all_that_it_needs(
    factory: FactoryClient, tmp_path: Path
) -> None:
    request_id.set("0123456789abcdef")
    address = await factory.start_shim(request(tmp_path, "c1"))
    assert address.address == f"unix://{tmp_path}/shim.sock"
    assert address.process.start_time == 7
    assert json.loads(address.version) == {
        "namespace": "ns",
        "id": "c1",
        "bundle": str(tmp_path),
        "socket": str(tmp_path / "shim.sock"),
        "registry": str(tmp_path / "c.sock"),
        "instance_id": "0" * 32,
        "default_runtime": "crun",
        "request_id": "0123456789abcdef",
        "log_level": "info",
        "adopt": False,
    }


async def test_many_are_asked_for_at_once(factory: FactoryClient, tmp_path: Path) -> None:
    found = await asyncio.gather(
        *(factory.start_shim(request(tmp_path, f"c{index}")) for index in range(100))
    )
    assert len({address.process.pid for address in found}) == 100
    assert factory.starts == 1


async def test_a_refusal_is_told_in_its_own_words(factory: FactoryClient, tmp_path: Path) -> None:
    with pytest.raises(ShimStartFailed, match="the bundle is on fire"):
        await factory.start_shim(request(tmp_path, "refused"))


async def test_a_shim_that_dies_first_is_told_with_its_log(
    factory: FactoryClient, tmp_path: Path
) -> None:
    with pytest.raises(ShimStartFailed, match="it broke: reasons"):
        await factory.start_shim(request(tmp_path, "dies"))


async def test_a_reply_without_sense_is_an_error(factory: FactoryClient, tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="another version"):
        await factory.start_shim(request(tmp_path, "garbage"))


async def test_a_shim_that_is_not_ready_in_time_is_given_up(
    factory: FactoryClient, tmp_path: Path
) -> None:
    await factory.start_shim(request(tmp_path, "warm-up"))
    with pytest.raises(DeadlineExceeded):
        await factory.start_shim(request(tmp_path, "hangs"), timeout_s=0.1)


async def test_a_factory_that_dies_over_a_request_is_asked_again(
    factory: FactoryClient, tmp_path: Path
) -> None:
    address = await factory.start_shim(request(tmp_path, "kills-factory"))
    assert address.process.pid
    assert factory.starts == 2


async def test_a_factory_that_is_killed_comes_back(factory: FactoryClient, tmp_path: Path) -> None:
    await factory.start_shim(request(tmp_path, "c1"))
    process = factory._process
    assert process is not None
    os.kill(process.pid, signal.SIGKILL)
    await process.wait()
    await factory.start_shim(request(tmp_path, "c2"))
    assert factory.starts == 2


@pytest.mark.parametrize("asked", [True, False])
async def test_a_factory_may_be_started_later(tmp_path: Path, asked: bool) -> None:
    async with FactoryClient(
        PROGRAM, socket=tmp_path / "f.sock", registry=tmp_path / "c.sock", waiting=1, at_once=False
    ) as client:
        await asyncio.sleep(0)
        assert client.starts == 0
        if asked:
            await client.start_shim(request(tmp_path, "c1"))
        else:
            client.begin()
        await eventually(lambda: len(client.waiting) == 1)
        assert client.starts == 1


async def test_the_factory_ends_with_its_client(tmp_path: Path) -> None:
    async with FactoryClient(
        PROGRAM, socket=tmp_path / "f.sock", registry=tmp_path / "c.sock"
    ) as client:
        await client.start_shim(request(tmp_path, "c1"))
        process = client._process
    assert process is not None
    assert process.returncode == 0


async def test_a_program_that_is_not_there_is_an_error_within_the_deadline(tmp_path: Path) -> None:
    async with FactoryClient(
        ("/nowhere/theseus-shim",), socket=tmp_path / "f.sock", registry=tmp_path / "c.sock"
    ) as client:
        with pytest.raises(DeadlineExceeded, match="no shim for 'c1'"):
            await client.start_shim(request(tmp_path, "c1"), timeout_s=0.1)


@pytest.fixture
async def waiting(tmp_path: Path) -> AsyncIterator[FactoryClient]:
    client = FactoryClient(
        PROGRAM, socket=tmp_path / "f.sock", registry=tmp_path / "c.sock", waiting=2
    )
    async with client:
        await ready(client, 2)
        yield client


async def ready(client: FactoryClient, number: int) -> None:
    await eventually(lambda: len(client.waiting) == number)


def has_waited(address: ShimAddress) -> bool:
    return "waited" in json.loads(address.version)


def connected(client: FactoryClient) -> list[int]:
    """Pids of the shims that wait, as their connections tell."""
    return [line.process.pid for line in client.waiting._ready]


async def test_shims_that_wait_are_taken_and_replaced(
    waiting: FactoryClient, tmp_path: Path
) -> None:
    found = [await waiting.start_shim(request(tmp_path, f"c{number}")) for number in range(2)]
    assert [has_waited(address) for address in found] == [True, True]
    assert len({address.process.pid for address in found}) == 2
    await ready(waiting, 2)
    assert has_waited(await waiting.start_shim(request(tmp_path, "c9")))


async def test_more_than_wait_are_made_as_ever(waiting: FactoryClient, tmp_path: Path) -> None:
    found = await asyncio.gather(
        *(waiting.start_shim(request(tmp_path, f"c{number}")) for number in range(8))
    )
    assert sum(map(has_waited, found)) >= 2
    assert len({address.process.pid for address in found}) == 8


async def test_one_that_was_killed_while_it_waited_is_passed_over(
    waiting: FactoryClient, tmp_path: Path
) -> None:
    for pid in connected(waiting):
        os.kill(pid, signal.SIGKILL)
    address = await waiting.start_shim(request(tmp_path, "c1"))
    assert address.address == f"unix://{tmp_path}/shim.sock"
    await ready(waiting, 2)


async def test_one_that_dies_over_a_request_is_not_the_last_word(
    waiting: FactoryClient, tmp_path: Path
) -> None:
    assert not has_waited(await waiting.start_shim(request(tmp_path, "dies-once")))


class Way:
    """A connection that was dialled."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.closed = False

    def close(self) -> None:
        self.closed = True


@pytest.fixture
async def ahead(tmp_path: Path) -> AsyncIterator[FactoryClient]:
    async def dial(path: Path) -> Way:
        return Way(path)

    client = FactoryClient(
        PROGRAM, socket=tmp_path / "f.sock", registry=tmp_path / "c.sock", waiting=1, dial=dial
    )
    async with client:
        await ready(client, 1)
        yield client


async def asked(
    client: FactoryClient, tmp_path: Path, id: str, *, timeout_s: float = 10
) -> tuple[ShimLine, Way]:
    asked = replace(request(tmp_path, id), ahead=True)
    address = await client.start_shim(asked, timeout_s=timeout_s)
    assert address.address == f"unix://{tmp_path}/shim.sock"
    assert address.line is not None
    assert address.process == address.line.process
    assert isinstance(address.line.way, Way)
    return address.line, address.line.way


async def test_one_that_waits_is_connected_to_and_need_not_have_answered(
    ahead: FactoryClient, tmp_path: Path
) -> None:
    line, way = await asked(ahead, tmp_path, "c1")
    assert way.path == tmp_path / f"waiting-{line.process.pid}"
    assert await line.serves()
    assert not way.closed
    line.close()


async def test_one_that_refuses_says_why_when_it_is_asked(
    ahead: FactoryClient, tmp_path: Path
) -> None:
    line, way = await asked(ahead, tmp_path, "refused")
    with pytest.raises(ShimStartFailed, match="the bundle is on fire"):
        await line.serves()
    assert way.closed  # or the first call would wait for ever


async def test_one_that_ends_without_an_answer_has_done_nothing(
    ahead: FactoryClient, tmp_path: Path
) -> None:
    line, way = await asked(ahead, tmp_path, "dies")
    assert not await line.serves()
    assert way.closed


async def test_one_that_does_not_answer_is_given_up(ahead: FactoryClient, tmp_path: Path) -> None:
    line, way = await asked(ahead, tmp_path, "hangs", timeout_s=0.05)
    with pytest.raises(DeadlineExceeded, match="no shim for 'hangs' within"):
        await line.serves()
    assert way.closed
    line.close()


async def test_an_answer_without_sense_is_told(ahead: FactoryClient, tmp_path: Path) -> None:
    line, way = await asked(ahead, tmp_path, "garbage")
    with pytest.raises(Unavailable, match="another version"):
        await line.serves()
    assert way.closed


async def test_one_that_is_killed_while_it_waits_is_missed_at_once(
    ahead: FactoryClient, tmp_path: Path
) -> None:
    (pid,) = connected(ahead)
    way = ahead.waiting._ready[0].way
    os.kill(pid, signal.SIGKILL)
    await eventually(lambda: connected(ahead) not in ([], [pid]))
    assert isinstance(way, Way)
    assert way.closed


async def test_one_that_nobody_can_connect_to_does_not_wait(tmp_path: Path) -> None:
    dialled = asyncio.Event()

    async def dial(path: Path) -> Way:
        dialled.set()
        raise ConnectionRefusedError

    async with FactoryClient(
        PROGRAM, socket=tmp_path / "f.sock", registry=tmp_path / "c.sock", waiting=1, dial=dial
    ) as client:
        await dialled.wait()
        assert json.loads((await client.start_shim(request(tmp_path, "c1"))).version)["id"] == "c1"
        assert not len(client.waiting)


async def test_one_that_waits_again_is_taken_once_nothing_names_it(
    ahead: FactoryClient, tmp_path: Path
) -> None:
    line, _ = await asked(ahead, tmp_path, "again")
    assert await line.serves()
    assert await line.waits_again()
    assert line.process.pid not in connected(ahead)
    line.release()
    await eventually(lambda: line.process.pid in connected(ahead))
    next_line, way = await asked(ahead, tmp_path, "c1")
    assert next_line.process == line.process
    assert way.path == tmp_path / f"waiting-{line.process.pid}"
    assert await next_line.serves()
    assert not await next_line.waits_again()  # it has ended


async def test_one_that_was_asked_for_at_once_waits_after_that(
    ahead: FactoryClient, tmp_path: Path
) -> None:
    await asked(ahead, tmp_path, "c1")
    address = await ahead.start_shim(request(tmp_path, "again"))
    assert address.line is not None
    assert not has_waited(address)
    assert await address.line.waits_again()
    address.line.release()
    await eventually(lambda: address.process.pid in connected(ahead))


async def test_one_that_still_is_a_shim_is_not_given_back(
    ahead: FactoryClient, tmp_path: Path
) -> None:
    line, _ = await asked(ahead, tmp_path, "stays")
    assert await line.serves()
    line.release()
    await eventually(lambda: not Path(f"/proc/{line.process.pid}").exists())
    assert line.process.pid not in connected(ahead)
    assert not await line.waits_again()


async def test_one_that_was_killed_before_it_was_given_back_is_not_taken(
    ahead: FactoryClient, tmp_path: Path
) -> None:
    line, _ = await asked(ahead, tmp_path, "again")
    assert await line.waits_again()
    os.kill(line.process.pid, signal.SIGKILL)
    await eventually(lambda: not Path(f"/proc/{line.process.pid}").exists())
    line.release()
    await eventually(lambda: connected(ahead) not in ([], [line.process.pid]))
    assert line.process.pid not in connected(ahead)


async def test_more_than_the_number_wait_for_a_moment_only(
    ahead: FactoryClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waiting_shims, "_BACK_WITHIN_S", 0.2)
    lines = []
    for number in range(3):
        address = await ahead.start_shim(request(tmp_path, f"again-{number}"))
        assert address.line is not None
        assert await address.line.waits_again()
        lines.append(address.line)
    for line in lines:
        line.release()
    await eventually(lambda: len(ahead.waiting) >= 3)
    await eventually(lambda: len(ahead.waiting) == 1)
    await eventually(lambda: sum(Path(f"/proc/{line.process.pid}").exists() for line in lines) <= 1)


async def test_lines_of_shims_go_with_their_client(tmp_path: Path) -> None:
    async with FactoryClient(
        PROGRAM, socket=tmp_path / "f.sock", registry=tmp_path / "c.sock", waiting=1
    ) as client:
        await ready(client, 1)
        address = await client.start_shim(request(tmp_path, "stays"))
        pid = address.process.pid
        assert Path(f"/proc/{pid}").exists()
    await eventually(lambda: not Path(f"/proc/{pid}").exists())
    assert address.line is not None
    address.line.release()  # by a removal that comes too late


async def test_those_that_wait_go_with_their_client(tmp_path: Path) -> None:
    async with FactoryClient(
        PROGRAM, socket=tmp_path / "f.sock", registry=tmp_path / "c.sock", waiting=1
    ) as client:
        await ready(client, 1)
        (pid,) = connected(client)
    await eventually(lambda: not Path(f"/proc/{pid}").exists())


async def test_sockets_of_those_that_were_killed_are_cleared_away(tmp_path: Path) -> None:
    dead, alive = tmp_path / "waiting-4194304", tmp_path / f"waiting-{os.getpid()}"
    for path in (dead, alive, tmp_path / "0123"):
        path.touch()
    async with FactoryClient(
        PROGRAM, socket=tmp_path / "f.sock", registry=tmp_path / "c.sock", waiting=1
    ) as client:
        await ready(client, 1)
    assert not dead.exists()
    assert alive.exists()
    assert (tmp_path / "0123").exists()
