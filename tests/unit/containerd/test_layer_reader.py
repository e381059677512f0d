"""The tar reader and the decompression in front of it, with archives of many makers."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import os
import random
import subprocess
import tarfile
from typing import TYPE_CHECKING

import pytest
import zstandard

from services.common.errors import DataLoss, InvalidArgument, ResourceExhausted
from services.containerd.diff import reader
from services.containerd.diff.limits import DEFAULT_LIMITS, Limits
from services.containerd.diff.reader import TarReader
from services.containerd.diff.stream import LayerStream
from tests.fakes.layers import Member, folder, hardlink, layer, read, symlink

if TYPE_CHECKING:
    from pathlib import Path

FORMATS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]


@pytest.mark.parametrize("tar_format", FORMATS)
def test_every_format_gives_the_same_entries(tar_format: int) -> None:
    (entry, directory, device, fifo, link, soft) = read(
        layer(
            [
                Member("a/b", b"data", mode=0o4750, uid=1000, gid=2000, mtime=12345),
                folder("dir", 0o1777),
                Member("dev", type=tarfile.BLKTYPE, device=(8, 17)),
                Member("pipe", type=tarfile.FIFOTYPE),
                hardlink("link", "a/b"),
                symlink("soft", "../a"),
            ],
            tar_format,
        )
    )
    assert (entry.kind, entry.name, entry.size_bytes) == (reader.REGULAR, "a/b", 4)
    assert (entry.mode, entry.uid, entry.gid) == (0o4750, 1000, 2000)
    assert (entry.mtime_ns, entry.atime_ns) == (12345 * 10**9,) * 2
    assert (directory.kind, directory.name.rstrip("/"), directory.mode) == (
        reader.DIRECTORY,
        "dir",
        0o1777,
    )
    assert (device.kind, device.device) == (reader.BLOCK, (8, 17))
    assert fifo.kind == reader.FIFO
    assert (link.kind, link.linkname) == (reader.HARDLINK, "a/b")
    assert (soft.kind, soft.linkname) == (reader.SYMLINK, "../a")


@pytest.mark.parametrize("tar_format", FORMATS[1:])
def test_long_names_and_large_numbers(tar_format: int) -> None:
    name, link = "d/" * 400 + "ü", "t/" * 300 + "x"
    (entry,) = read(
        layer(
            [Member(name, type=tarfile.SYMTYPE, link=link, uid=3_000_000, gid=2**31, mtime=2**34)],
            tar_format,
        )
    )
    assert (entry.name, entry.linkname) == (name, link)
    assert (entry.uid, entry.gid, entry.mtime_ns) == (3_000_000, 2**31, 2**34 * 10**9)


def test_ustar_prefix_is_put_in_front() -> None:
    name = "p" * 120 + "/" + "n" * 80
    (entry,) = read(layer([Member(name)], tarfile.USTAR_FORMAT))
    assert entry.name == name


def test_names_need_not_be_text() -> None:
    (entry,) = read(layer([Member("caf\udce9")], tarfile.GNU_FORMAT))
    assert os.fsencode(entry.name) == b"caf\xe9"


def test_pax_gives_parts_of_seconds_and_attributes() -> None:
    (entry,) = read(
        layer(
            [
                Member(
                    "file",
                    pax={
                        "mtime": "1500000000.123456789123",
                        "atime": "-1.5",
                        "SCHILY.xattr.user.key": "value",
                    },
                )
            ]
        )
    )
    assert entry.mtime_ns == 1_500_000_000_123_456_789
    assert entry.atime_ns == -1_500_000_000
    assert entry.xattrs == {"user.key": b"value"}


def test_an_attribute_may_have_any_bytes() -> None:
    value = b"\x01\0\0\x02=\n\xff"
    record = b"SCHILY.xattr.security.capability=" + value + b"\n"
    record = b"%d " % (len(record) + 3) + record
    (entry,) = read(extension(b"x", record) + layer([Member("file")], tarfile.USTAR_FORMAT))
    assert entry.xattrs == {"security.capability": value}


def test_data_that_is_not_taken_is_passed_over() -> None:
    data = layer([Member("one", b"x" * 5_000_000), Member("two", b"y"), Member("three", b"")])
    assert [entry.name for entry in read(data)] == ["one", "two", "three"]


def test_a_regular_file_with_a_slash_at_its_end_is_a_directory() -> None:
    block = bytearray(layer([Member("old/")], tarfile.USTAR_FORMAT)[:512])
    block[:100] = b"old/".ljust(100, b"\0")
    (entry,) = read(checked(block) + bytes(1024))
    assert entry.kind == reader.DIRECTORY


def test_global_headers_say_nothing() -> None:
    data = extension(b"g", b"19 path=elsewhere/\n") + layer([Member("file")])
    assert [entry.name for entry in read(data)] == ["file"]


@pytest.mark.parametrize("options", [["--format=gnu"], ["--format=pax", "--sparse-version=1.0"]])
def test_sparse_files_come_out_with_their_holes(tmp_path: Path, options: list[str]) -> None:
    source = tmp_path / "sparse"
    with source.open("wb") as file:
        for number in range(60):  # more pieces than fit into one header block
            file.seek(number * 100_000)
            file.write(b"%05d" % number)
        file.truncate(20_000_000)
    data = subprocess.run(
        ["tar", "-C", tmp_path, *options, "-S", "-cf", "-", "sparse"],
        check=True,
        capture_output=True,
    ).stdout
    assert len(data) < 1_000_000
    target = tmp_path / "target"
    with LayerStream(io.BytesIO(data), DEFAULT_LIMITS) as stream, target.open("wb") as file:
        tar = TarReader(stream, DEFAULT_LIMITS)
        entry = next(tar)
        tar.copy(file.fileno())
        assert list(tar) == []
    assert (entry.name, entry.size_bytes, entry.kind) == ("sparse", 20_000_000, reader.REGULAR)
    assert target.read_bytes() == source.read_bytes()
    assert target.stat().st_blocks * 512 < 2_000_000


def test_older_pax_sparse_files_are_refused_in_words() -> None:
    with pytest.raises(InvalidArgument, match=r"version other than 1\.0"):
        read(layer([Member("file", b"data", pax={"GNU.sparse.map": "0,4"})]))


@pytest.mark.parametrize("kind", [b"V", b"M", b"D", b"z"])
def test_unknown_types_are_refused_with_name_and_type(kind: bytes) -> None:
    with pytest.raises(InvalidArgument, match=f"'odd'.*{kind!r}"):
        read(layer([Member("odd", type=kind)], tarfile.USTAR_FORMAT))


class TestBroken:
    def test_a_missing_end_mark_is_accepted(self) -> None:
        data = layer([Member("file", b"x" * 512)])
        assert [entry.name for entry in read(data[: 3 * 512 - 512])] == ["file"]

    @pytest.mark.parametrize("length", [1, 511, 513, 600, 1023])
    def test_a_tar_cut_short(self, length: int) -> None:
        data = layer([Member("file", b"x" * 512)], tarfile.USTAR_FORMAT)
        with pytest.raises(DataLoss, match="cut short"):
            read(data[:length])

    def test_a_wrong_checksum(self) -> None:
        data = bytearray(layer([Member("file")]))
        data[0] ^= 1
        with pytest.raises(DataLoss, match="checksum"):
            read(bytes(data))

    def test_signed_checksums_are_accepted(self) -> None:
        block = bytearray(layer([Member("\udcff\udcfe")], tarfile.GNU_FORMAT)[:512])
        block[148:156] = b" " * 8
        total = sum(byte - 256 if byte > 127 else byte for byte in block)
        block[148:156] = b"%06o\0 " % total
        assert len(read(bytes(block) + bytes(1024))) == 1

    def test_data_behind_a_block_of_zeros(self) -> None:
        with pytest.raises(DataLoss, match="zeros"):
            read(bytes(512) + layer([Member("file")]))

    @pytest.mark.parametrize("field", [b"xyz", b"-0000000017", b"99999999"])
    def test_a_size_that_is_no_number(self, field: bytes) -> None:
        block = bytearray(layer([Member("file")], tarfile.USTAR_FORMAT)[:512])
        block[124:136] = field.ljust(12, b"\0")
        with pytest.raises(DataLoss):
            read(checked(block) + bytes(1024))

    def test_a_huge_number(self) -> None:
        block = bytearray(layer([Member("file")], tarfile.USTAR_FORMAT)[:512])
        block[124:136] = b"\x80" + b"\xff" * 11
        with pytest.raises(DataLoss, match="number"):
            read(checked(block))

    @pytest.mark.parametrize(
        "record",
        [
            b"nonsense\n",
            b"99 path=x\n",
            b"5 path=x\n",
            b"9 path x\n",
            b"10 path=x!",
            b"12 path=a\0b\n",
            b"-9 path=x\n",
        ],
    )
    def test_a_malformed_pax_record(self, record: bytes) -> None:
        with pytest.raises(DataLoss, match="pax record"):
            read(extension(b"x", record) + layer([Member("file")]))

    @pytest.mark.parametrize(
        "pax", [{"size": "-1"}, {"uid": "x"}, {"mtime": "1e5"}, {"gid": "9" * 30}]
    )
    def test_a_pax_value_that_is_no_number(self, pax: dict[str, str]) -> None:
        with pytest.raises(DataLoss, match="is no"):
            read(layer([Member("file", pax=pax)]))

    def test_random_bytes_never_do_anything_else(self) -> None:
        source = random.Random(7)
        good = layer(
            [Member("a", b"x" * 700), folder("d"), Member("b" * 200, pax={"mtime": "1.5"})],
        )
        for _ in range(2000):
            data = bytearray(good)
            for _ in range(source.randint(1, 4)):
                data[source.randrange(len(data))] = source.randrange(256)
            with contextlib.suppress(DataLoss, InvalidArgument, ResourceExhausted):
                read(bytes(data))


class TestLimits:
    def test_of_entries(self) -> None:
        data = layer([Member("a"), Member("b"), Member("c")])
        with pytest.raises(ResourceExhausted, match="2 entries"):
            read(data, Limits(entries=2))

    def test_of_headers(self) -> None:
        data = layer([Member("a", pax={"SCHILY.xattr.user.a": "x" * 10_000})])
        with pytest.raises(ResourceExhausted, match="header"):
            read(data, Limits(header_bytes=8192))

    def test_of_names(self) -> None:
        with pytest.raises(ResourceExhausted, match="too long"):
            read(layer([Member("x/" * 2100)], tarfile.GNU_FORMAT))

    def test_of_the_stream_when_little_becomes_much(self) -> None:
        bomb = gzip.compress(bytes(50_000_000))
        with pytest.raises(ResourceExhausted, match="uncompressed"):
            read(bomb, Limits(stream_bytes=10_000_000))

    def test_of_a_zstd_window(self) -> None:
        params = zstandard.ZstdCompressionParameters(window_log=24)
        compressor = zstandard.ZstdCompressor(compression_params=params).compressobj()
        data = compressor.compress(layer([Member("a")])) + compressor.flush()
        with pytest.raises(DataLoss, match="zstd"):
            read(data, Limits(window_bytes=1 << 20))


class TestCompression:
    def test_gzip_of_several_members_and_padding(self) -> None:
        tar = layer([Member("a", os.urandom(3_000_000)), Member("b")])
        data = gzip.compress(tar[:1_000_000]) + gzip.compress(tar[1_000_000:]) + bytes(100)
        assert content(data) == tar

    def test_zstd_of_several_frames_some_to_be_skipped(self) -> None:
        tar = layer([Member("a", os.urandom(3_000_000)), Member("b", bytes(2_000_000))])
        compressor = zstandard.ZstdCompressor(write_checksum=True)
        skipped = b"\x50\x2a\x4d\x18" + (5).to_bytes(4, "little") + b"hello"
        data = skipped + compressor.compress(tar[:999]) + skipped + compressor.compress(tar[999:])
        assert content(data) == tar
        stream = zstandard.ZstdCompressor(write_content_size=False).compressobj()
        assert content(stream.compress(tar) + stream.flush()) == tar

    def test_digest_and_size_are_those_of_the_whole_stream(self) -> None:
        tar = layer([Member("a", b"x")]) + b"trailing"
        for data in (tar, gzip.compress(tar), zstandard.compress(tar)):
            with LayerStream(io.BytesIO(data), DEFAULT_LIMITS) as stream:
                list(TarReader(stream, DEFAULT_LIMITS))
                stream.drain()
            assert stream.digest == f"sha256:{hashlib.sha256(tar).hexdigest()}"
            assert stream.size_bytes == len(tar)

    @pytest.mark.parametrize("compress", [gzip.compress, zstandard.compress])
    def test_a_stream_cut_short(self, compress: object) -> None:
        data = compress(layer([Member("a", os.urandom(100_000))]))  # type: ignore[operator]
        for length in (5, 12, 1000, len(data) // 2, len(data) - 1):
            with pytest.raises(DataLoss, match="cut short"):
                content(data[:length])

    @pytest.mark.parametrize(
        "compress", [gzip.compress, zstandard.ZstdCompressor(write_checksum=True).compress]
    )
    def test_a_corrupt_stream(self, compress: object) -> None:
        data = bytearray(compress(b"hello world" * 5000))  # type: ignore[operator]
        data[len(data) // 2] ^= 0xFF
        with pytest.raises(DataLoss, match=r"corrupt|cut short"):
            content(bytes(data))

    def test_a_corrupt_checksum(self) -> None:
        data = bytearray(gzip.compress(b"hello"))
        data[-8] ^= 1
        with pytest.raises(DataLoss, match="corrupt"):
            content(bytes(data))

    @pytest.mark.parametrize("compress", [gzip.compress, zstandard.compress])
    def test_rubbish_behind_the_stream(self, compress: object) -> None:
        data = compress(layer([Member("a")])) + b"rubbish behind"  # type: ignore[operator]
        with pytest.raises(DataLoss, match="corrupt"):
            content(data)

    def test_an_empty_blob_is_an_empty_tar(self) -> None:
        assert read(b"") == []

    def test_a_stream_can_be_left_early(self) -> None:
        with LayerStream(io.BytesIO(bytes(50_000_000)), DEFAULT_LIMITS) as stream:
            stream.read(10)


def content(data: bytes) -> bytes:
    with LayerStream(io.BytesIO(data), DEFAULT_LIMITS) as stream:
        return stream.read(1 << 30)


def checked(block: bytearray) -> bytes:
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def extension(kind: bytes, data: bytes) -> bytes:
    block = bytearray(layer([Member("header")], tarfile.USTAR_FORMAT)[:512])
    block[156:157] = kind
    block[124:136] = b"%011o\0" % len(data)
    return checked(block) + data + bytes(-len(data) % 512)
