"""Small files are read and written whole, or not at all."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from services.common import small_files


@pytest.mark.parametrize("size", [0, 1, 65535, 65536, 65537, 200_000])
def test_what_was_written_is_read(tmp_path, size):
    path, content = str(tmp_path / "file"), os.urandom(size)
    small_files.replace(path, f"{path}.tmp", content)
    assert small_files.read(path) == content
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_of_a_longer_file_the_beginning_is_read(tmp_path):
    (tmp_path / "file").write_bytes(b"x" * 70_000)
    path = str(tmp_path / "file")
    assert [len(small_files.read(path, limit)) for limit in (1, 65536, 65537)] == [1, 65536, 65537]


def test_a_file_of_the_kernels_is_read_to_its_end():
    assert small_files.read("/proc/self/smaps").endswith(b"\n")
    assert len(small_files.read("/proc/kallsyms")) > 100_000


def test_the_old_file_stays_where_the_new_one_finds_no_room(tmp_path):
    (tmp_path / "file").write_text("old")
    descriptors = sorted(Path("/proc/self/fd").iterdir())
    with pytest.raises(OSError) as raised:
        small_files.replace(str(tmp_path / "file"), "/dev/full", b"new")
    assert raised.value.errno == errno.ENOSPC
    with pytest.raises(FileNotFoundError):
        small_files.read(str(tmp_path / "none"))
    assert (tmp_path / "file").read_text() == "old"
    assert sorted(Path("/proc/self/fd").iterdir()) == descriptors


def test_a_write_in_pieces_is_completed(tmp_path, monkeypatch):
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:3]))
    small_files.replace(str(tmp_path / "file"), str(tmp_path / "new"), b"0123456789")
    assert Path(tmp_path / "file").read_bytes() == b"0123456789"
