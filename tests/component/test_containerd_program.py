"""The program theseus-containerd: its command line, its lock, its death, and Debian's ctr."""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
import sys
from typing import TYPE_CHECKING

import grpc
import pytest

from protos.containerd.services.content.v1 import content_pb2, content_pb2_grpc
from protos.containerd.services.images.v1 import images_pb2, images_pb2_grpc
from protos.containerd.types import descriptor_pb2
from protos.theseus.journal.v1 import journal_pb2, journal_pb2_grpc
from services.common.client import connect
from services.common.errors import InvalidArgument
from services.containerd import __main__ as program
from services.containerd.config import parse
from tests.fakes.containerd import ContainerdProcess, node_directory, run_program

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

T = 10.0
MODULE = (sys.executable, "-m", "services.containerd")


@pytest.fixture
async def directory() -> AsyncIterator[Path]:
    async with node_directory() as made:
        yield made


async def test_version_and_help_are_quick_words_on_stdout() -> None:
    status, out, _ = await run_program(*MODULE, "--version")
    assert (status, out.split()[0]) == (0, "theseus-containerd")
    status, out, _ = await run_program(*MODULE, "--help")
    assert status == 0
    for option in ("--root", "--state", "--address", "--metrics-address", "--shim"):
        assert option in out


def test_paths_follow_from_root_and_state() -> None:
    config = parse(["--root", "/r", "--state", "/s"])
    assert str(config.address) == "/s/containerd.sock"
    assert parse(["--state", "rel"]).state.is_absolute()
    assert parse(["--shim", "/bin/shim"]).shim == ("/bin/shim",)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--grace-time", "-1"],
        ["--gc-startup-delay", "-0.1"],
        ["--gc-pause-threshold", "nan"],
        ["--journal-events", "0"],
        ["--max-downloads", "0"],
    ],
)
def test_values_that_make_no_sense_are_refused(arguments: list[str]) -> None:
    with pytest.raises(InvalidArgument, match=arguments[0]):
        parse(arguments)


def test_without_privilege_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["theseus-containerd"])
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(program.logs, "configure", lambda *_: None)
    assert program.main() == 1
    assert "run it as root" in capsys.readouterr().err


@pytest.mark.root
async def test_bad_settings_end_it_with_a_sentence(directory: Path) -> None:
    for options, words in (
        (["--metrics-address", "nonsense"], "neither unix:PATH nor HOST:PORT"),
        (["--snapshotter", "zfs"], "snapshotter 'zfs' is not configured"),
        (["--address", f"/{'x' * 120}"], "at most 107"),
    ):
        status, _, err = await run_program(
            *MODULE, "--root", f"{directory}/r", "--state", f"{directory}/s", *options
        )
        assert status == 1, err
        assert words in err
        assert "Traceback" not in err


@pytest.mark.root
async def test_a_second_one_on_the_same_root_is_refused_with_the_firsts_pid(
    directory: Path,
) -> None:
    async with ContainerdProcess(directory) as first:
        assert first.process is not None
        second = ContainerdProcess(directory, options=("--lock-timeout", "0.1"))
        status, _, err = await run_program(*second.arguments())
        assert status == 1
        assert f"process {first.process.pid}" in err
        async with connect(first.address) as channel:
            await asyncio.wait_for(channel.channel_ready(), T)


@pytest.mark.root
async def test_a_successor_waits_for_the_root_and_takes_over(directory: Path) -> None:
    async with ContainerdProcess(directory) as first:
        second = ContainerdProcess(directory)
        starting = asyncio.create_task(second.start())
        try:
            assert await first.stop() == 0
            await starting
            async with connect(second.address, namespace="test") as channel:
                await images_pb2_grpc.ImagesStub(channel).List(
                    images_pb2.ListImagesRequest(), timeout=T
                )
            assert await second.stop() == 0
        finally:
            await second.__aexit__(None, None, None)


@pytest.mark.root
async def test_nothing_that_was_answered_is_lost_in_a_kill(directory: Path) -> None:
    containerd = ContainerdProcess(directory)
    async with containerd:
        answered: list[str] = []
        enough = asyncio.Event()
        writing = asyncio.create_task(_create_images(containerd.address, answered, enough))
        await asyncio.wait_for(enough.wait(), T)
        await containerd.kill()
        await writing
        names = await _restarted_names(containerd)
        assert set(answered) <= names
        entries = await _journal(containerd.address)
        assert [entry.seq for entry in entries] == list(range(1, len(entries) + 1))
        created = [entry for entry in entries if entry.topic == "/images/create"]
        assert len(created) == len(names)
        assert '"epoch": 2' in containerd.log
        assert containerd.log.count("checked after an unclean stop") == 1


@pytest.mark.root
async def test_a_kill_in_a_write_leaves_an_ingest_that_goes_on(directory: Path) -> None:
    # Nothing refers to the blob: a collection would be right to take it.
    containerd = ContainerdProcess(directory, options=("--gc-startup-delay=3600",))
    data = os.urandom(3 << 20)
    digest = "sha256:" + hashlib.sha256(data).hexdigest()
    first = content_pb2.WriteContentRequest(
        action=content_pb2.WriteAction.WRITE, ref="r", total=len(data), data=data[: 1 << 20]
    )
    async with containerd:
        async with connect(containerd.address, namespace="test") as channel:
            call = content_pb2_grpc.ContentStub(channel).Write(timeout=T)
            await call.write(first)
            assert (await call.read()).offset == 1 << 20
            await containerd.kill()
        await containerd.start()
        async with connect(containerd.address, namespace="test") as channel:
            stub = content_pb2_grpc.ContentStub(channel)
            status = await stub.Status(content_pb2.StatusRequest(ref="r"), timeout=T)
            offset = status.status.offset
            rest = content_pb2.WriteContentRequest(
                action=content_pb2.WriteAction.COMMIT,
                ref="r",
                total=len(data),
                expected=digest,
                offset=offset,
                data=data[offset:],
            )
            async for _ in stub.Write(iter([rest]), timeout=T):
                pass
            info = await stub.Info(content_pb2.InfoRequest(digest=digest), timeout=T)
            assert info.info.size == len(data)


@pytest.mark.root
@pytest.mark.skipif(shutil.which("ctr") is None, reason="needs ctr of Debian's containerd")
async def test_debians_ctr_finds_its_way(directory: Path) -> None:
    async with ContainerdProcess(directory) as containerd:

        async def ctr(*arguments: str) -> str:
            status, out, err = await run_program(
                "ctr", "-a", str(containerd.address), "-n", "dev", *arguments
            )
            assert status == 0, f"ctr {' '.join(arguments)}: {err}\n{containerd.log}"
            return out

        assert "Revision: theseus" in await ctr("version")
        assert "overlayfs" in await ctr("plugins", "ls")
        await ctr("namespaces", "create", "dev", "a=1")
        await ctr("namespaces", "label", "dev", "b=2")
        assert "a=1,b=2" in await ctr("namespaces", "ls")
        for noun in ("images", "containers", "content", "snapshots", "tasks", "leases"):
            header = await ctr(noun, "ls")
            assert len(header.splitlines()) == 1, header
        lease = (await ctr("leases", "create", "--id", "mine")).strip()
        assert lease == "mine"
        assert "mine" in await ctr("leases", "ls")
        await ctr("leases", "delete", "mine")
        await ctr("snapshots", "prepare", "empty")
        assert "Active" in await ctr("snapshots", "ls")
        await ctr("snapshots", "commit", "done", "empty")
        assert "Committed" in await ctr("snapshots", "ls")
        await ctr("snapshots", "rm", "done")
        await ctr("namespaces", "rm", "dev")
        assert "dev" not in await ctr("namespaces", "ls")


async def _create_images(address: Path, answered: list[str], enough: asyncio.Event) -> None:
    async def create(number: int) -> None:
        target = descriptor_pb2.Descriptor(media_type="t", digest="sha256:" + "a" * 64, size=1)
        for turn in range(1000):
            name = f"i{number}-{turn}"
            made = images_pb2.Image(name=name, target=target)
            await stub.Create(
                images_pb2.CreateImageRequest(image=made),
                timeout=T,
                metadata=[("containerd-namespace", "test")],
            )
            answered.append(name)
            if len(answered) == 100:
                enough.set()

    # A channel without retries: what it answered is what containerd answered.
    async with grpc.aio.insecure_channel(
        f"unix:{address}", options=[("grpc.enable_retries", 0)]
    ) as channel:
        stub = images_pb2_grpc.ImagesStub(channel)
        await asyncio.gather(*(create(number) for number in range(8)), return_exceptions=True)


async def _restarted_names(containerd: ContainerdProcess) -> set[str]:
    await containerd.start()
    async with connect(containerd.address, namespace="test") as channel:
        listed = await images_pb2_grpc.ImagesStub(channel).List(
            images_pb2.ListImagesRequest(), timeout=T
        )
    return {image.name for image in listed.images}


async def _journal(address: Path) -> list[journal_pb2.Entry]:
    async with connect(address) as channel:
        read = journal_pb2_grpc.JournalStub(channel).Read(
            journal_pb2.ReadRequest(no_follow=True), timeout=T
        )
        return [response.entry async for response in read]
