"""The Content service over a socket: its messages, and the codes that clients expect."""

from __future__ import annotations

from typing import TYPE_CHECKING

import grpc
import pytest

from protos.containerd.services.content.v1 import content_pb2 as pb
from protos.containerd.services.content.v1 import content_pb2_grpc
from services.containerd.content.digest import digest_of
from tests.fakes.transfer_node import TransferNode, open_transfer_node

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

DATA = b"some bytes, " * 1000
DIGEST = digest_of(DATA)
NS = (("containerd-namespace", "a"),)
STAT, WRITE, COMMIT = pb.WriteAction.STAT, pb.WriteAction.WRITE, pb.WriteAction.COMMIT


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[TransferNode]:
    async with open_transfer_node(tmp_path) as node:
        yield node


@pytest.fixture
async def stub(node: TransferNode) -> AsyncIterator[content_pb2_grpc.ContentStub]:
    async with grpc.aio.insecure_channel(await node.serve()) as channel:
        yield content_pb2_grpc.ContentStub(channel)


async def write(
    stub: content_pb2_grpc.ContentStub, *requests: pb.WriteContentRequest
) -> list[pb.WriteContentResponse]:
    call = stub.Write(iter(requests), metadata=NS)
    return [response async for response in call]


async def put(stub: content_pb2_grpc.ContentStub, data: bytes = DATA) -> str:
    [response] = await write(
        stub, pb.WriteContentRequest(action=COMMIT, ref="put", data=data, total=len(data))
    )
    return response.digest


async def code_of(call: object) -> grpc.StatusCode:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call  # type: ignore[misc]
    return caught.value.code()


async def test_stat_write_commit_answer_as_upstream(
    stub: content_pb2_grpc.ContentStub,
) -> None:
    ref, total = "ref", len(DATA)
    stat, first, second, commit = await write(
        stub,
        pb.WriteContentRequest(action=STAT, ref=ref, total=total, expected=DIGEST),
        pb.WriteContentRequest(action=WRITE, data=DATA[:10]),
        pb.WriteContentRequest(action=WRITE, data=DATA[10:], offset=10),
        pb.WriteContentRequest(
            action=COMMIT, offset=total, total=total, expected=DIGEST, labels={"k": "v"}
        ),
    )
    assert (stat.action, stat.offset, stat.total) == (STAT, 0, total)
    assert stat.started_at.seconds > 0
    assert (first.offset, first.digest) == (10, digest_of(DATA[:10]))
    assert (second.offset, second.digest) == (total, DIGEST)
    assert (commit.action, commit.offset, commit.digest) == (COMMIT, total, DIGEST)
    info = (await stub.Info(pb.InfoRequest(digest=DIGEST), metadata=NS)).info
    assert (info.size, dict(info.labels)) == (total, {"k": "v"})


async def test_a_write_goes_on_where_another_ended(
    stub: content_pb2_grpc.ContentStub,
) -> None:
    await write(stub, pb.WriteContentRequest(action=WRITE, ref="r", data=DATA[:100]))
    status = (await stub.Status(pb.StatusRequest(ref="r"), metadata=NS)).status
    assert (status.ref, status.offset) == ("r", 100)
    stat, commit = await write(
        stub,
        pb.WriteContentRequest(action=STAT, ref="r"),
        pb.WriteContentRequest(action=COMMIT, offset=100, data=DATA[100:]),
    )
    assert (stat.offset, commit.digest) == (100, DIGEST)


async def test_a_write_at_0_begins_again(stub: content_pb2_grpc.ContentStub) -> None:
    await write(stub, pb.WriteContentRequest(action=WRITE, ref="r", data=b"wrong"))
    _, commit = await write(
        stub,
        pb.WriteContentRequest(action=WRITE, ref="r", data=DATA),
        pb.WriteContentRequest(action=COMMIT),
    )
    assert commit.digest == DIGEST


async def test_codes_of_writes_that_go_wrong(stub: content_pb2_grpc.ContentStub) -> None:
    request = pb.WriteContentRequest
    assert await code_of(write(stub)) is grpc.StatusCode.INVALID_ARGUMENT
    assert await code_of(write(stub, request(data=b"x"))) is grpc.StatusCode.INVALID_ARGUMENT
    bad = request(ref="r", expected="sha256:zz")
    assert await code_of(write(stub, bad)) is grpc.StatusCode.INVALID_ARGUMENT
    gap = request(action=WRITE, ref="r", data=b"x", offset=5)
    assert await code_of(write(stub, gap)) is grpc.StatusCode.OUT_OF_RANGE
    wrong = request(action=COMMIT, ref="r", data=b"x", expected=DIGEST)
    assert await code_of(write(stub, wrong)) is grpc.StatusCode.FAILED_PRECONDITION
    short = request(action=COMMIT, ref="s", data=b"x", total=2)
    assert await code_of(write(stub, short)) is grpc.StatusCode.FAILED_PRECONDITION
    await put(stub)
    again = request(action=STAT, ref="t", expected=DIGEST)
    assert await code_of(write(stub, again)) is grpc.StatusCode.ALREADY_EXISTS
    late = [request(action=STAT, ref="u"), request(action=COMMIT, expected=DIGEST)]
    assert await code_of(write(stub, *late)) is grpc.StatusCode.ALREADY_EXISTS
    assert await code_of(stub.Status(pb.StatusRequest(ref="u"), metadata=NS)) is (
        grpc.StatusCode.NOT_FOUND
    )


async def test_a_locked_ref_is_unavailable(stub: content_pb2_grpc.ContentStub) -> None:
    call = stub.Write(metadata=NS)
    await call.write(pb.WriteContentRequest(action=STAT, ref="r"))
    await call.read()
    assert await code_of(write(stub, pb.WriteContentRequest(action=STAT, ref="r"))) is (
        grpc.StatusCode.UNAVAILABLE
    )
    await call.done_writing()
    assert await call.read() is grpc.aio.EOF
    await write(stub, pb.WriteContentRequest(action=STAT, ref="r"))


async def test_read_gives_ranges(stub: content_pb2_grpc.ContentStub) -> None:
    data = bytes(range(256)) * 8192
    digest = await put(stub, data)

    async def read(**fields: int) -> bytes:
        call = stub.Read(pb.ReadContentRequest(digest=digest, **fields), metadata=NS)
        parts, offset = [], 0
        async for response in call:
            assert response.offset == offset
            offset += len(response.data)
            parts.append(response.data)
        return b"".join(parts)

    assert await read() == data
    assert await read(offset=5, size=10) == data[5:15]
    assert await read(offset=len(data) - 1, size=10) == data[-1:]
    assert await read(offset=len(data)) == b""
    past = stub.Read(pb.ReadContentRequest(digest=digest, offset=len(data) + 1), metadata=NS)
    assert await code_of(past.read()) is grpc.StatusCode.OUT_OF_RANGE


async def test_list_filters_and_update_masks(stub: content_pb2_grpc.ContentStub) -> None:
    digests = sorted([await put(stub, bytes([number])) for number in range(120)])
    messages = [m async for m in stub.List(pb.ListContentRequest(), metadata=NS)]
    assert [len(message.info) for message in messages] == [100, 20]
    assert [info.digest for message in messages for info in message.info] == digests
    request = pb.UpdateRequest(info=pb.Info(digest=digests[3], labels={"a.b": "x"}))
    request.update_mask.paths.append("labels.a.b")
    updated = await stub.Update(request, metadata=NS)
    assert dict(updated.info.labels) == {"a.b": "x"}
    for filters in (['labels."a.b"==x'], [f"digest=={digests[3]}"]):
        call = stub.List(pb.ListContentRequest(filters=filters), metadata=NS)
        assert [i.digest for message in [m async for m in call] for i in message.info] == [
            digests[3]
        ]
    request.update_mask.paths.append("size")
    assert await code_of(stub.Update(request, metadata=NS)) is grpc.StatusCode.INVALID_ARGUMENT


async def test_delete_abort_and_statuses(stub: content_pb2_grpc.ContentStub) -> None:
    await put(stub)
    await stub.Delete(pb.DeleteContentRequest(digest=DIGEST), metadata=NS)
    assert await code_of(stub.Info(pb.InfoRequest(digest=DIGEST), metadata=NS)) is (
        grpc.StatusCode.NOT_FOUND
    )
    for ref in ("one", "two"):
        await write(stub, pb.WriteContentRequest(action=WRITE, ref=ref, data=b"x"))
    listed = await stub.ListStatuses(pb.ListStatusesRequest(filters=["ref~=^t"]), metadata=NS)
    assert [status.ref for status in listed.statuses] == ["two"]
    await stub.Abort(pb.AbortRequest(ref="two"), metadata=NS)
    listed = await stub.ListStatuses(pb.ListStatusesRequest(), metadata=NS)
    assert [status.ref for status in listed.statuses] == ["one"]
    assert await code_of(stub.Abort(pb.AbortRequest(ref="two"), metadata=NS)) is (
        grpc.StatusCode.NOT_FOUND
    )
    assert await code_of(stub.Info(pb.InfoRequest(digest="x"), metadata=NS)) is (
        grpc.StatusCode.INVALID_ARGUMENT
    )
