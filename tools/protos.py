"""Generate the Python stubs of every contract in ``protos/``, or check that they are current.

Owns every ``*_pb2.py``, ``*_pb2.pyi``, ``*_pb2_grpc.py`` and ``*_pb2_grpc.pyi`` below ``protos/``:
it writes them, and removes those whose contract is gone. It also gives each package directory an
``__init__.py`` where there is none or an empty one; any other is left alone.

All contracts are compiled together with the repository root as include path, in two runs. Google's
own (``google/protobuf``, ``google/rpc``) come from installed packages, and so do their stubs::

    protos/a/v1/x.proto ─┬─ messages ─▶ x_pb2.py       x_pb2.pyi
                         └─ services ─▶ x_pb2_grpc.py  x_pb2_grpc.pyi   (only if x has a service)

The output depends on the contracts and the generators alone, hence the exact versions in
``GENERATORS``: change them together with those of the development dependencies.

Usage: ``python tools/protos.py`` writes, ``python tools/protos.py --check`` compares.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import sysconfig
import tempfile
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from google.protobuf import descriptor_pb2

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

ROOT = Path(__file__).resolve().parent.parent
CONTRACTS = "protos"
GENERATORS = {"grpcio-tools": "1.85.1", "mypy-protobuf": "5.1.0"}
GOOGLE_RPC = "googleapis-common-protos"
STUB_PATTERNS = ("*_pb2.py", "*_pb2.pyi", "*_pb2_grpc.py", "*_pb2_grpc.pyi")
PROTOC_TIMEOUT_S = 300


class GenerationError(Exception):
    """The stubs cannot be made; the message says why, in the words of the tool that refused."""


def main(argv: list[str] | None = None) -> int:
    """Run the command line.

    Returns:
        0 when the stubs were written or are current, 1 when ``--check`` found a difference, 2 when
        they could not be generated.
    """
    parser = argparse.ArgumentParser(description="Generate the Python stubs of protos/.")
    parser.add_argument(
        "--check",
        action="store_true",
        help="write nothing; exit with 1 if the committed stubs differ from fresh ones",
    )
    check = parser.parse_args(argv).check
    try:
        fresh = generate(ROOT)
    except GenerationError as exc:
        sys.stderr.write(f"protos: {exc}\n")
        return 2
    if check:
        problems = compare(ROOT, fresh)
        for problem in problems:
            sys.stdout.write(f"{problem}\n")
        return 1 if problems else 0
    for change in write(ROOT, fresh):
        sys.stdout.write(f"{change}\n")
    return 0


def generate(root: Path) -> dict[Path, bytes]:
    """Compile every contract below ``root`` and return the stubs by path relative to ``root``.

    Nothing below ``root`` is touched.

    Raises:
        GenerationError: a generator is missing or has another version, or protoc rejects a
            contract.
    """
    _require_generators()
    contracts = sorted(path.relative_to(root) for path in (root / CONTRACTS).rglob("*.proto"))
    if not contracts:
        raise GenerationError(f"no contract below {root / CONTRACTS}")
    with tempfile.TemporaryDirectory(prefix="protos-") as scratch:
        out = Path(scratch, "out")
        out.mkdir()
        descriptors = Path(scratch, "descriptors.pb")
        _protoc(
            root,
            [
                f"--plugin=protoc-gen-mypy={_plugin('protoc-gen-mypy')}",
                f"--python_out={out}",
                f"--mypy_out={out}",
                f"--descriptor_set_out={descriptors}",
            ],
            contracts,
        )
        with_services = _files_with_services(descriptors)
        if with_services:
            _protoc(
                root,
                [
                    f"--plugin=protoc-gen-mypy_grpc={_plugin('protoc-gen-mypy_grpc')}",
                    f"--grpc_python_out={out}",
                    f"--mypy_grpc_out=only_async:{out}",
                ],
                with_services,
            )
        return {
            path.relative_to(out): path.read_bytes()
            for path in sorted(out.rglob("*"))
            if path.is_file()
        }


def compare(root: Path, fresh: Mapping[Path, bytes]) -> list[str]:
    """Return one line for each file below ``root`` that is missing, different or left over."""
    problems = [f"stale: {path}" for path in _leftovers(root, fresh)]
    for path, content in fresh.items():
        target = root / path
        if not target.is_file():
            problems.append(f"missing: {path}")
        elif target.read_bytes() != content:
            problems.append(f"different: {path}")
    problems += [f"missing: {init}" for init in _missing_inits(root, fresh)]
    return sorted(problems)


def write(root: Path, fresh: Mapping[Path, bytes]) -> list[str]:
    """Bring the files below ``root`` in line with ``fresh``; return one line for each change."""
    changes = []
    for path in _leftovers(root, fresh):
        (root / path).unlink()
        changes.append(f"removed: {path}")
    for path, content in fresh.items():
        target = root / path
        if target.is_file() and target.read_bytes() == content:
            continue
        target.write_bytes(content)
        changes.append(f"written: {path}")
    for init in _missing_inits(root, fresh):
        name = ".".join(init.parent.parts)
        docstring = f'"""Contracts of {name} and their generated stubs."""\n'
        (root / init).write_text(docstring, "utf-8")
        changes.append(f"written: {init}")
    return sorted(changes)


def _require_generators() -> None:
    """Refuse other generator versions, whose output would differ for no reason in the contracts."""
    for name, wanted in GENERATORS.items():
        try:
            found = metadata.version(name)
        except metadata.PackageNotFoundError:
            found = "nothing"
        if found != wanted:
            raise GenerationError(f"needs {name}=={wanted}, found {found}")


def _google_rpc() -> Path:
    """Return the include path of ``google/rpc``, installed as contracts beside stubs."""
    try:
        return Path(str(metadata.distribution(GOOGLE_RPC).locate_file("")))
    except metadata.PackageNotFoundError as exc:
        raise GenerationError(f"needs {GOOGLE_RPC}, found nothing") from exc


def _plugin(name: str) -> Path:
    """Return the full path of a protoc plug-in installed with the running interpreter.

    protoc itself looks on PATH, which need not hold this environment. The interpreter's own
    directory is the fall-back: in some layouts it is not the one sysconfig names.
    """
    candidates = [
        Path(sysconfig.get_path("scripts"), name),
        Path(sys.executable).parent / name,
    ]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise GenerationError(f"no plug-in at {' or '.join(map(str, candidates))}")


def _protoc(root: Path, options: Iterable[str], files: Iterable[Path]) -> None:
    # As a module, grpc_tools adds the include path of google/protobuf by itself.
    include = ["--proto_path=.", f"--proto_path={_google_rpc()}"]
    done = subprocess.run(
        [sys.executable, "-m", "grpc_tools.protoc", *include, *options, *map(str, files)],
        cwd=root,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=PROTOC_TIMEOUT_S,
        check=False,
    )
    if done.returncode != 0:
        raise GenerationError(f"protoc failed\n{done.stdout.rstrip()}")


def _files_with_services(descriptors: Path) -> list[Path]:
    """Return the files of a descriptor set that define a service."""
    parsed = descriptor_pb2.FileDescriptorSet.FromString(descriptors.read_bytes())
    return sorted(Path(file.name) for file in parsed.file if file.service)


def _leftovers(root: Path, fresh: Mapping[Path, bytes]) -> Iterator[Path]:
    """Yield the stubs on disk which no contract accounts for."""
    for pattern in STUB_PATTERNS:
        for path in sorted((root / CONTRACTS).rglob(pattern)):
            relative = path.relative_to(root)
            if relative not in fresh:
                yield relative


def _missing_inits(root: Path, fresh: Mapping[Path, bytes]) -> list[Path]:
    """Return the ``__init__.py`` which the stubs' packages lack or have without a word."""
    packages = {parent for path in fresh for parent in path.parents} - {Path()}
    inits = [package / "__init__.py" for package in sorted(packages)]
    return [
        init for init in inits if not ((root / init).is_file() and (root / init).stat().st_size)
    ]


if __name__ == "__main__":
    sys.exit(main())
