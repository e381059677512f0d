"""The factory's client: replies, failures in words, and a program that is restarted."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from services.common.errors import DeadlineExceeded, Unavailable
from services.common.log import request_id
from services.containerd.tasks.factory import FactoryClient, ShimStartFailed
from services.containerd.tasks.shim import ShimRequest

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
