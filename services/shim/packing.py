"""Memory of a process that is forked many times: little of it is to be written to afterwards.

A forked process gets a page of its own for each page that it writes to. New objects go where old
ones were freed, a hole here and one there in pages that would otherwise stay shared; so the holes
are filled before the fork, and what is new lies together. The collector's view of what exists is
frozen, so that no collection touches it. Threads share one heap of the C library.
"""

from __future__ import annotations

import errno
import gc
import sys
import threading
from pathlib import Path
from types import CodeType, FunctionType
from typing import TYPE_CHECKING, Self

from services.common import linux

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import FrameType

# Objects/obmalloc.c of Python 3.11: a pool holds blocks of one size, after a header.
_POOL_BYTES = 16384
_POOL_HEADER_BYTES = 48
_BLOCK_STEP_BYTES = 16
_BLOCK_MAX_BYTES = 512
_BYTES_OVERHEAD = sys.getsizeof(b"")

# malloc(3) keeps freed chunks by size; those that matter are smaller than this.
_CHUNK_MAX_BYTES = 65536
# Too small to be mapped on its own.
_END_BYTES = 100_000
_TRIES_MAX = 100_000

_filling: list[object] = []


class CodeTracer:
    """A context manager that notes all Python code that runs, in all threads."""

    def __init__(self) -> None:
        self.codes: dict[int, CodeType] = {}

    def __enter__(self) -> Self:
        threading.setprofile(self._note)
        sys.setprofile(self._note)
        return self

    def __exit__(self, *details: object) -> None:
        sys.setprofile(None)
        threading.setprofile(None)

    def _note(self, frame: FrameType, event: str, argument: object) -> None:
        if event == "call":
            self.codes[id(frame.f_code)] = frame.f_code


def gather(codes: Mapping[int, CodeType]) -> None:
    """Lay ``codes``, by their ids, side by side: every call writes to the code that it runs.

    Each is replaced by a copy; where they were imported they lie among ten times as many that no
    shim ever runs.
    """
    fill()
    copies: dict[int, CodeType] = {}
    for function in gc.get_objects():
        if isinstance(function, FunctionType) and id(function.__code__) in codes:
            function.__code__ = _copy(function.__code__, codes, copies)


def _copy(code: CodeType, codes: Mapping[int, CodeType], copies: dict[int, CodeType]) -> CodeType:
    if id(code) not in copies:
        constants = tuple(
            _copy(constant, codes, copies)
            if isinstance(constant, CodeType) and id(constant) in codes
            else constant
            for constant in code.co_consts
        )
        copies[id(code)] = code.replace(co_consts=constants)
    return copies[id(code)]


def share_one_heap() -> None:
    """Have all threads allocate from the main heap instead of one each. Call it early."""
    linux.mallopt(linux.M_ARENA_MAX, 1)


def pack() -> None:
    """Fill the holes, and set the collector aside. Call it last, before the first fork."""
    fill()
    gc.collect()
    gc.freeze()


def offer_to_merge() -> None:
    """Allow the kernel to keep what this process' memory has in common with others' once only.

    That is for KSM (ksm.rst of the kernel's administration guide), which containerd lets run for a
    while when shims have been started. By ranges, and not for the process as a whole
    (PR_SET_MEMORY_MERGE): a container would inherit that.
    """
    for line in Path("/proc/self/maps").read_text().splitlines():
        words = line.split(maxsplit=5)
        name = words[5] if len(words) > 5 else ""
        if words[1] != "rw-p" or name.startswith(("[stack", "[v")):
            continue
        start, _, end = words[0].partition("-")
        address = int(start, 16)
        try:
            linux.madvise(address, int(end, 16) - address, linux.MADV_MERGEABLE)
        except OSError as error:
            if error.errno == errno.EINVAL:  # the kernel has no KSM
                return
            if error.errno != errno.ENOMEM:  # unmapped since; or no memory for its bookkeeping
                raise


def fill() -> None:
    """Fill the holes."""
    gc.collect()
    for size in range(3 * _BLOCK_STEP_BYTES, _BLOCK_MAX_BYTES + 1, _BLOCK_STEP_BYTES):
        _filling.append(_fill_pools(size))
    _fill_heap()


def _fill_pools(size: int) -> list[bytes]:
    """Objects of ``size`` bytes, until they come from a pool that was empty before."""
    capacity = (_POOL_BYTES - _POOL_HEADER_BYTES) // size
    blank = b"\0" * (size - _BYTES_OVERHEAD)
    found: list[bytes] = []
    pool = count = 0
    while count < capacity and len(found) < _TRIES_MAX:
        filler = bytes(bytearray(blank))
        found.append(filler)
        last, pool = pool, id(filler) // _POOL_BYTES
        count = count + 1 if pool == last else 1
    return found


def _fill_heap() -> None:
    """Allocate every free chunk below the end of the heap, the large ones first."""
    end = linux.malloc(_END_BYTES)
    sizes = [
        *range(_CHUNK_MAX_BYTES, 4096, -1024),
        *range(4096, 1024, -128),
        *range(1024, 16, -16),
    ]
    for size in sizes:
        for _ in range(_TRIES_MAX):
            if linux.malloc(size) > end:
                break
