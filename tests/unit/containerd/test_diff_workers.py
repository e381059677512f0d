"""Worker processes: what they are asked, what comes back, and what happens when they die."""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from services.common import errors
from services.common.errors import DataLoss, Internal, InvalidArgument, NotFound, Unimplemented
from services.common.mounts import Mount
from services.containerd.content.descriptor import Descriptor
from services.containerd.diff.local_applier import LocalApplier
from services.containerd.diff.media_types import LAYERS, OCI_GZIP, OCI_TAR, is_layer
from services.containerd.diff.pool import WorkerPool
from tests.fakes.eventually import eventually
from tests.fakes.layers import Member, folder, layer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from services.containerd.content.store import ContentReader


class OneBlob:
    """A content store with one blob."""

    def __init__(self, path: Path) -> None:
        self.blob = path

    async def path(self, namespace: str, digest: str) -> Path:
        assert namespace == "test"
        if digest != "sha256:one":
            raise NotFound(f"blob {digest} does not exist")
        return self.blob


@pytest.fixture
async def pool() -> AsyncIterator[WorkerPool]:
    async with WorkerPool(2) as pool:
        yield pool


@pytest.fixture
def content(tmp_path: Path) -> ContentReader:
    return OneBlob(tmp_path / "blob")  # type: ignore[return-value]


@pytest.fixture
def applier(content: ContentReader, pool: WorkerPool, tmp_path: Path) -> LocalApplier:
    return LocalApplier(content, pool, tmp_path / "scratch")


@pytest.fixture
def mounts(tmp_path: Path) -> list[Mount]:
    (tmp_path / "root").mkdir()
    return [Mount("bind", str(tmp_path / "root"), options=("rw", "rbind"))]


def described(media_type: str = OCI_TAR) -> Descriptor:
    return Descriptor(media_type, "sha256:one", 1)


def own(name: str, data: bytes = b"") -> Member:
    """A file that its owner may make without being root."""
    return Member(name, data, uid=os.geteuid(), gid=os.getegid())


async def test_a_layer_is_unpacked(
    applier: LocalApplier, mounts: list[Mount], tmp_path: Path
) -> None:
    data = layer([own("file", b"data"), own("sub/file")])
    (tmp_path / "blob").write_bytes(data)
    applied = await applier.apply("test", described(), mounts)
    assert applied == Descriptor(OCI_TAR, f"sha256:{hashlib.sha256(data).hexdigest()}", len(data))
    assert (tmp_path / "root/file").read_bytes() == b"data"
    assert (tmp_path / "root/sub").stat().st_mode & 0o777 == 0o755  # whatever our umask is
    await applier.apply("test", described(), mounts, sync=True)


@pytest.mark.parametrize("media_type", ["", "text/plain", f"{OCI_TAR}+gzip+encrypted"])
async def test_other_media_types_are_refused(
    applier: LocalApplier, mounts: list[Mount], media_type: str
) -> None:
    with pytest.raises(Unimplemented, match="media type"):
        await applier.apply("test", described(media_type), mounts)


def test_media_types_of_layers() -> None:
    assert len(LAYERS) == 20
    assert is_layer("application/vnd.docker.image.rootfs.diff.tar.gzip")
    assert is_layer(f"{OCI_GZIP}; charset=binary")
    assert not is_layer("application/vnd.oci.image.manifest.v1+json")


async def test_errors_of_the_worker_are_raised_here(
    applier: LocalApplier, mounts: list[Mount], tmp_path: Path
) -> None:
    with pytest.raises(NotFound, match="is gone"):
        await applier.apply("test", described(), mounts)
    (tmp_path / "blob").write_bytes(layer([own("file")])[:700])
    with pytest.raises(DataLoss, match="cut short"):
        await applier.apply("test", described(), mounts)
    (tmp_path / "blob").write_bytes(layer([own("file"), own("file/x")]))
    with pytest.raises(InvalidArgument, match="'file/x'"):
        await applier.apply("test", described(), mounts)
    (tmp_path / "blob").write_bytes(layer([own("file")]))
    with pytest.raises(errors.FailedPrecondition, match="read-only"):
        await applier.apply("test", described(), [Mount("bind", "/", options=("ro",))])
    with pytest.raises(errors.FailedPrecondition, match="does not exist"):
        await applier.apply("test", described(), [Mount("bind", f"{tmp_path}/nowhere")])
    with pytest.raises(NotFound, match="blob sha256:two"):
        await applier.apply("test", Descriptor(OCI_TAR, "sha256:two", 1), mounts)


async def test_workers_are_kept(
    applier: LocalApplier, pool: WorkerPool, mounts: list[Mount], tmp_path: Path
) -> None:
    (tmp_path / "blob").write_bytes(layer([own("file")]))
    for _ in range(5):
        await applier.apply("test", described(), mounts)
    assert len(pool.pids) == 1
    await asyncio.gather(*(applier.apply("test", described(), mounts) for _ in range(6)))
    assert len(pool.pids) == 2


async def test_a_worker_that_died_is_replaced(
    applier: LocalApplier, pool: WorkerPool, mounts: list[Mount], tmp_path: Path
) -> None:
    (tmp_path / "blob").write_bytes(layer([own("file")]))
    await applier.apply("test", described(), mounts)
    (first,) = pool.pids
    os.kill(first, signal.SIGKILL)
    with pytest.raises(Internal, match="signal 9"):
        await applier.apply("test", described(), mounts)
    await applier.apply("test", described(), mounts)
    assert first not in pool.pids


async def test_a_cancelled_job_ends_its_worker(
    applier: LocalApplier, pool: WorkerPool, mounts: list[Mount], tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "blob")  # nobody writes to it: the worker waits for ever
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.5):
            await applier.apply("test", described(), mounts)
    assert pool.pids == set()
    (tmp_path / "blob").unlink()
    (tmp_path / "blob").write_bytes(layer([own("file")]))
    await applier.apply("test", described(), mounts)


async def test_no_worker_outlives_its_pool(tmp_path: Path, mounts: list[Mount]) -> None:
    (tmp_path / "blob").write_bytes(layer([own("file")]))
    async with WorkerPool(1) as pool:
        applier = LocalApplier(
            OneBlob(tmp_path / "blob"),  # type: ignore[arg-type]
            pool,
            tmp_path,
        )
        await applier.apply("test", described(), mounts)
        (pid,) = pool.pids
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


async def test_a_program_that_does_not_start_is_an_internal_error(mounts: list[Mount]) -> None:
    async with WorkerPool(1, program=["/bin/false"]) as pool:
        with pytest.raises(Internal, match="exit code 1"):
            await pool.run("apply", mounts=mounts)


async def test_a_worker_without_work_is_let_go_and_another_one_takes_the_next_job(
    tmp_path: Path, mounts: list[Mount]
) -> None:
    (tmp_path / "blob").write_bytes(layer([own("file")]))
    async with WorkerPool(2, idle_s=0.05) as pool:
        blob = OneBlob(tmp_path / "blob")
        applier = LocalApplier(blob, pool, tmp_path)  # type: ignore[arg-type]
        await asyncio.gather(*(applier.apply("test", described(), mounts) for _ in range(2)))
        pids = pool.pids
        await eventually(lambda: not pool.pids)
        await eventually(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))
        await applier.apply("test", described(), mounts)


async def test_rubbish_as_an_error_is_an_internal_error() -> None:
    script = """read line; echo '{"error": "annotations", "message": "odd"}'"""
    async with WorkerPool(1, program=["/bin/sh", "-c", script]) as pool:
        with pytest.raises(Internal, match="odd"):
            await pool.run("apply")


async def test_an_unexpected_failure_says_no_more_than_that_it_happened(pool: WorkerPool) -> None:
    with pytest.raises(Internal, match="see the log"):
        await pool.run("no such job")
    with pytest.raises(TypeError, match="has no place"):
        await pool.run("apply", blob=object())


@pytest.mark.root
async def test_deep_names_are_made_or_refused_but_never_crash(
    applier: LocalApplier, mounts: list[Mount], tmp_path: Path
) -> None:
    (tmp_path / "blob").write_bytes(layer([own("d/" * 2000 + "f"), folder("x")]))
    try:
        await applier.apply("test", described(), mounts)
    finally:
        # Deeper than PATH_MAX allows in one go.
        process = await asyncio.create_subprocess_exec("rm", "-rf", str(tmp_path / "root"))
        await process.wait()
