"""Streams over a real socket: logs, attach, terminals, loggers."""

from __future__ import annotations

import asyncio
import json
import os

import pytest

from protos.containerd.task.v3 import shim_pb2
from protos.theseus.shim.v1 import control_pb2, streams_pb2
from services.common import errors
from tests.fakes.eventually import eventually
from tests.fakes.shim_harness import plain_spec


async def shell(maker, fake, script, **create):
    terminal = create.get("terminal", False)
    bundle = maker.bundle(plain_spec("/bin/sh", "-c", script, terminal=terminal))
    shim = await maker.start(bundle)
    await shim.create(binary=fake.path, **create)
    await shim.start()
    return shim


def log_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


async def test_log_is_complete_when_the_exit_is_told(maker, fake, tmp_path):
    log = tmp_path / "c.log"
    uri = f"theseus-log://{log}"
    shim = await shell(
        maker, fake, "seq 1 20000; printf unfinished; echo err >&2", stdout=uri, stderr=uri
    )
    await shim.wait()
    lines = log_lines(log)
    text = "".join(line["log"] for line in lines if line["stream"] == "stdout")
    assert text == "".join(f"{n}\n" for n in range(1, 20001)) + "unfinished"
    assert [line["log"] for line in lines if line["stream"] == "stderr"] == ["err\n"]
    assert set(lines[0]) == {"log", "stream", "time"}


async def test_who_attaches_to_an_exec_before_its_start_gets_all_of_it(maker, fake):
    shim = await shell(maker, fake, "exec sleep 1000")
    await shim.call(
        "Exec", shim.exec_request("e", ["/bin/echo", "hello"], stdout="theseus-stream:")
    )
    attaching = asyncio.create_task(shim.output(exec_id="e"))
    await shim.state("e")  # a call that came after it
    assert not attaching.done()
    await shim.start("e")
    assert await attaching == (b"hello\n", b"")


@pytest.mark.parametrize("end", ["fails", "deleted"])
async def test_who_waits_for_an_exec_that_never_runs_is_told(maker, fake, end):
    shim = await shell(maker, fake, "exec sleep 1000")
    request = shim.exec_request("e", ["/no/such"], stdout="theseus-stream:")
    await shim.call("Exec", request)
    await shim.info()  # gRPC stands: on its connection the attach comes before what follows it
    attaching = asyncio.create_task(shim.output(exec_id="e"))
    async with asyncio.timeout(10):
        while 'grpc_method="Attach"' not in await shim.metrics():
            pass
    await shim.info()  # its first message has been read by now
    if end == "deleted":
        await shim.delete("e")
    else:
        with pytest.raises(errors.TheseusError):
            await shim.start("e")
    with pytest.raises(errors.FailedPrecondition, match="no streams to attach to"):
        await attaching


async def test_several_readers_and_late_ones_get_the_same(maker, fake, tmp_path):
    shim = await shell(
        maker, fake, "read x; seq 1 50000",
        stdin="theseus-stream:", stdout=f"theseus-log://{tmp_path}/c.log?max-size=200000&max-file=9",
    )  # fmt: skip
    expected = b"".join(b"%d\n" % n for n in range(1, 50001))
    readers = [asyncio.create_task(shim.output()) for _ in range(3)]
    async with shim.attach(input=True) as attached:
        await attached.write(0, b"go\n")
        await shim.wait()
    for reader in readers:
        assert (await reader)[0] == expected
    assert (await shim.output())[0] == expected
    assert (await shim.output(no_follow=True, offset=100))[0] == expected[100:]
    assert (await shim.output(from_end=True))[0] == b""


async def test_gap_only_where_the_log_was_rotated_away(maker, fake, tmp_path):
    uri = f"theseus-log://{tmp_path}/c.log?max-size=300000&max-file=2"
    # More than a shim keeps in memory for a log that is behind.
    shim = await shell(maker, fake, "seq 1 900000", stdout=uri)
    async with shim.attach(output=True) as attached:
        async for _ in attached:  # to its end: nothing is rotated any more then
            pass
    expected = b"".join(b"%d\n" % n for n in range(1, 900001))
    at, kept = 0, b""
    async with shim.attach(output=True) as attached:
        async for response in attached:
            if response.HasField("gap"):
                assert getattr(response.gap, "from") == at == 0
                at = response.gap.to
            elif response.HasField("output"):
                assert response.output.offset == at
                kept += response.output.data
                at += len(response.output.data)
            else:
                assert response.finished.offset == len(expected)
    assert at == len(expected)
    assert kept == expected[-len(kept) :]
    assert 0 < len(kept) < len(expected)


async def test_both_streams_share_one_sequence_of_offsets(maker, fake):
    shim = await shell(
        maker, fake, "for i in 1 2 3; do echo out$i; sleep 0.02; echo err$i >&2; sleep 0.02; done",
        stdout="theseus-stream:", stderr="theseus-stream:",
    )  # fmt: skip
    pieces, at = [], 0
    async with shim.attach(output=True) as attached:
        async for response in attached:
            if response.HasField("output"):
                assert response.output.offset == at
                at += len(response.output.data)
                pieces.append((response.output.stream, response.output.data))
    assert pieces == [
        (stream, b"%s%d\n" % (name, number))
        for number in (1, 2, 3)
        for stream, name in ((1, b"out"), (2, b"err"))
    ]


async def test_newer_writer_takes_over_and_input_ends(maker, fake):
    shim = await shell(maker, fake, "cat", stdin="theseus-stream:", stdout="theseus-stream:")
    async with (
        shim.attach(input=True, output=True) as first,
        shim.attach(input=True, output=True) as second,
    ):
        await second.write(0, b"second")
        assert await first.read_until(b"second") == b"second"
        await first.write(6, b"first")
        with pytest.raises(errors.FailedPrecondition, match="took over"):
            await anext(first)
        await second.close_input()
        async for response in second:
            assert response.WhichOneof("message") in ("output", "finished")
    assert (await shim.wait()).exit_status == 0


async def test_terminal_of_a_process(maker, fake, tmp_path):
    shim = await shell(
        maker, fake, "stty size; read line; echo got $line; stty size; exit 7",
        terminal=True, stdin="theseus-stream:", stdout=f"theseus-log://{tmp_path}/c.log",
    )  # fmt: skip
    async with shim.attach(input=True, output=True) as attached:
        assert attached.started.terminal
        await attached.read_until(b"0 0\r\n")
        request = shim_pb2.ResizePtyRequest(id=shim.id, width=100, height=50)
        await shim.call("ResizePty", request)
        await attached.write(0, b"hello\n")
        assert b"got hello\r\n50 100\r\n" in await attached.read_until(b"50 100\r\n")
    assert (await shim.wait()).exit_status == 7
    assert any(line["log"] == "got hello\r\n" for line in log_lines(tmp_path / "c.log"))


@pytest.mark.parametrize(
    ("requests", "kind"),
    [
        ([streams_pb2.AttachRequest()], errors.InvalidArgument),
        ([], errors.InvalidArgument),
        (
            [
                streams_pb2.AttachRequest(
                    start=streams_pb2.AttachStart(container_id="x", output=True)
                )
            ],
            errors.NotFound,
        ),
    ],
)
async def test_attach_begins_with_a_start_of_something_that_exists(maker, fake, requests, kind):
    shim = await shell(maker, fake, "sleep 1000", stdout="theseus-stream:")
    from services.common.rpc_errors import translated

    with pytest.raises(kind), translated():
        async for _ in shim.streams.Attach(iter(requests), timeout=10):
            pytest.fail("an answer to a bad request")


async def test_attach_is_refused_where_streams_are_not_the_shims(maker, fake, tmp_path):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    shim = await shell(maker, fake, "sleep 1000", stdout=str(fifo))
    with pytest.raises(errors.FailedPrecondition, match="past the shim"):
        async with shim.attach(output=True):
            pass
    with pytest.raises(errors.FailedPrecondition, match="cannot be attached to"):
        async with shim.attach(input=True):
            pass
    other = await shell(maker, fake, "sleep 1000", stdout="theseus-stream:")
    async with other.attach(output=True) as attached:
        await attached.write(0, b"x")
        with pytest.raises(errors.FailedPrecondition, match="did not ask"):
            await anext(attached)
    async with other.attach(output=True) as attached:
        await attached.resize(1, 1)
        with pytest.raises(errors.FailedPrecondition, match="no terminal"):
            await anext(attached)


async def test_output_can_be_read_on_while_the_container_is_deleted(maker, fake):
    shim = await shell(maker, fake, "seq 1 1000", stdout="theseus-stream:")
    await shim.wait()
    async with shim.attach(output=True) as attached:
        await shim.delete()
        data = b"".join([r.output.data async for r in attached])
    assert data == b"".join(b"%d\n" % n for n in range(1, 1001))


async def test_raw_file_takes_both_streams(maker, fake, tmp_path):
    shim = await shell(
        maker, fake, "echo out; sleep 0.05; echo err >&2", stdout=f"file://{tmp_path}/new/raw"
    )
    await shim.wait()
    assert (tmp_path / "new" / "raw").read_bytes() == b"out\nerr\n"


async def test_logger_program_gets_pipes_and_names(maker, fake, tmp_path):
    logger = tmp_path / "logger"
    logger.write_text(
        "#!/bin/sh\n"
        'echo "$CONTAINER_ID $CONTAINER_NAMESPACE $1 $2" > "$2.names"\n'
        "exec 5>&-\n"
        'cat <&3 > "$2.out"\ncat <&4 > "$2.err"\n'
    )
    logger.chmod(0o755)
    base = tmp_path / "logged"
    shim = await shell(
        maker, fake, "echo out; echo err >&2", stdout=f"binary://{logger}?file={base}"
    )
    await shim.wait()
    await shim.delete()
    err = base.with_suffix(".err")
    await eventually(lambda: err.exists() and err.read_text())
    assert base.with_suffix(".names").read_text() == f"{shim.id} test file {base}\n"
    assert base.with_suffix(".out").read_text() == "out\n"
    assert base.with_suffix(".err").read_text() == "err\n"


async def test_moved_log_is_reopened(maker, fake, tmp_path):
    log = tmp_path / "c.log"
    shim = await shell(
        maker, fake, "echo before; read x; echo after",
        stdin="theseus-stream:", stdout=f"theseus-log://{log}",
    )  # fmt: skip
    async with shim.attach(input=True, output=True) as attached:
        await attached.read_until(b"before\n")
        await eventually(log.read_text)
        log.rename(tmp_path / "moved.log")
        await shim.control.ReopenLog(control_pb2.ReopenLogRequest(container_id=shim.id), timeout=10)
        await attached.write(0, b"\n")
        await shim.wait()
    assert [line["log"] for line in log_lines(tmp_path / "moved.log")] == ["before\n"]
    assert [line["log"] for line in log_lines(log)] == ["after\n"]


async def test_background_process_that_holds_the_pipe_does_not_delay_the_exit(maker, fake):
    shim = await shell(maker, fake, "sleep 1000", stdout="theseus-stream:")
    await shim.exec("e", ["/bin/sh", "-c", "sleep 1000 & echo $!"], stdout="theseus-stream:")
    began = asyncio.get_running_loop().time()
    assert (await shim.wait("e")).exit_status == 0
    assert asyncio.get_running_loop().time() - began < 2
    async with shim.attach(exec_id="e", output=True) as attached:
        pid = int(await attached.read_until(b"\n"))
    await shim.delete("e")
    os.kill(pid, 9)
