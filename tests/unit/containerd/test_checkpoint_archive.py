"""What is taken out of a checkpoint's archive: files and directories within it, nothing else."""

from __future__ import annotations

import io
import tarfile

import pytest

from services.common.errors import DataLoss
from services.containerd.tasks import checkpoints


@pytest.fixture
def place(tmp_path):
    (tmp_path / "to").mkdir()
    return tmp_path


def archive_of(place, *members):
    path = place / "archive.tar"
    with tarfile.open(path, "w") as tar:
        for name, kind, data in members:
            member = tarfile.TarInfo(name)
            member.type = kind
            if kind == tarfile.REGTYPE:
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
            else:
                member.linkname = data
                tar.addfile(member)
    return path


def test_a_directory_comes_back_as_it_was(place):
    directory = place / "from"
    (directory / "sub").mkdir(parents=True)
    (directory / "sub" / "pages-1.img").write_bytes(b"\0pages")
    (directory / "inventory.img").write_bytes(b"")
    checkpoints._pack(directory, place / "archive.tar")
    checkpoints._unpack(place / "archive.tar", place / "to")
    found = {
        path.relative_to(place / "to"): path.is_dir() or path.read_bytes()
        for path in sorted((place / "to").rglob("*"))
    }
    assert {str(path): what for path, what in found.items()} == {
        "inventory.img": b"",
        "sub": True,
        "sub/pages-1.img": b"\0pages",
    }


@pytest.mark.parametrize(
    "member",
    [
        ("../outside", tarfile.REGTYPE, b"x"),
        ("sub/../../outside", tarfile.REGTYPE, b"x"),
        ("link", tarfile.SYMTYPE, "/etc"),
        ("link", tarfile.LNKTYPE, "../outside"),
        ("device", tarfile.CHRTYPE, ""),
        ("pipe", tarfile.FIFOTYPE, ""),
    ],
)
def test_whatever_else_is_in_it_is_refused_by_name(place, member):
    archive = archive_of(place, member)
    with pytest.raises(DataLoss, match=member[0].replace("/", ".")):
        checkpoints._unpack(archive, place / "to")
    assert list((place / "to").iterdir()) == []
    assert not (place / "outside").exists()


def test_an_absolute_name_is_refused(place):
    archive = archive_of(place, (f"{place}/outside", tarfile.REGTYPE, b"x"))
    with pytest.raises(DataLoss, match="outside"):
        checkpoints._unpack(archive, place / "to")
    assert not (place / "outside").exists()


def test_a_file_that_comes_twice_is_refused(place):
    archive = archive_of(place, ("a", tarfile.REGTYPE, b"1"), ("a", tarfile.REGTYPE, b"2"))
    with pytest.raises(DataLoss, match="exists"):
        checkpoints._unpack(archive, place / "to")
