"""Modules that are loaded when something of them is first used, though others import them before.

protobuf imports its implementation in Python, with its encoder and decoder, where the one in C is
what works: 12 ms of a start.
"""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType
from typing import Any

PROTOBUF_IN_PYTHON = "google.protobuf.internal.python_message"


def load_late(name: str) -> None:
    """Have a module loaded late; nothing happens where it is loaded, or not there at all.

    The packages above it are imported.
    """
    if name in sys.modules:
        return
    try:
        spec = importlib.util.find_spec(name)
    except ModuleNotFoundError:
        return
    if spec is None or spec.loader is None:
        return
    module = importlib.util.module_from_spec(spec)
    module.__class__ = _Late
    sys.modules[name] = module


class _Late(ModuleType):
    # The standard library's LazyLoader loads for any look at it, and an import looks at __spec__.
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        self.__class__ = ModuleType  # type: ignore[assignment]
        assert self.__spec__ is not None
        assert self.__spec__.loader is not None
        self.__spec__.loader.exec_module(self)
        return getattr(self, name)
