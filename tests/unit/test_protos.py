"""The contracts: their stubs are current, and containerd's are byte-compatible with upstream's.

``data/containerd_api.txt`` lists every fact of containerd's contracts that decides what travels:
method paths and streaming, message names, field numbers and types, enum values. It is written from
upstream's contracts; a difference means a client of containerd would no longer understand us. When
upstream adds something, the failure shows the lines to add.
"""

from __future__ import annotations

import difflib
import importlib
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from google.protobuf import any_pb2, descriptor_pb2

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools" / "protos.py"
CONTAINERD_API = Path(__file__).parent / "data" / "containerd_api.txt"
TOOL_TIMEOUT_S = 120

File = descriptor_pb2.FileDescriptorProto
Message = descriptor_pb2.DescriptorProto
Enum = descriptor_pb2.EnumDescriptorProto
Field = descriptor_pb2.FieldDescriptorProto

# A declaration of a contract: a line which must have a comment above it.
DECLARATION = re.compile(
    r"""\s* (?: (?:rpc|message|enum|service|oneof) \s+ \w+
          | (?:(?:repeated|optional) \s+)? (?:[\w.]+|map<[^>]+>) \s+ \w+ \s* = \s* \d+
          | [A-Z]\w* \s* = \s* -?\d+ )""",
    re.VERBOSE,
)


def run_tool(tool: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the generator at ``tool``, which works on the checkout it lies in."""
    return subprocess.run(
        [sys.executable, str(tool), *arguments],
        capture_output=True,
        text=True,
        timeout=TOOL_TIMEOUT_S,
        check=False,
    )


def contracts(below: str) -> list[str]:
    """Return the contracts below a directory, relative to the repository root."""
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / below).rglob("*.proto"))


def stub(contract: str) -> ModuleType:
    """Import the message stubs of a contract."""
    return importlib.import_module(contract.removesuffix(".proto").replace("/", ".") + "_pb2")


def facts(file: File) -> Iterator[str]:
    """Yield what a contract says on the wire, one fact a line, with names in full."""
    for message in file.message_type:
        yield from message_facts(message, file.package)
    for enum in file.enum_type:
        yield from enum_facts(enum, file.package)
    for service in file.service:
        for method in service.method:
            takes = "stream " * method.client_streaming + method.input_type[1:]
            gives = "stream " * method.server_streaming + method.output_type[1:]
            yield f"rpc /{file.package}.{service.name}/{method.name} {takes} -> {gives}"


def message_facts(message: Message, scope: str) -> Iterator[str]:
    """Yield the facts of one message, and of those inside it."""
    name = f"{scope}.{message.name}"
    yield f"message {name}"
    maps = {f".{name}.{m.name}": m for m in message.nested_type if m.options.map_entry}
    for field in message.field:
        entry = maps.get(field.type_name)
        if entry:
            kind = f"map<{field_type(entry.field[0])},{field_type(entry.field[1])}>"
        elif field.label == Field.LABEL_REPEATED:
            kind = f"repeated {field_type(field)}"
        elif field.proto3_optional:
            kind = f"optional {field_type(field)}"
        else:
            kind = field_type(field)
        if field.HasField("oneof_index") and not field.proto3_optional:
            kind += f" oneof {message.oneof_decl[field.oneof_index].name}"
        if field.options.deprecated:
            kind += " deprecated"
        yield f"field {name} {field.number} {field.name} {kind}"
    for gap in message.reserved_range:
        yield f"reserved {name} {gap.start}..{gap.end - 1}"
    for inner in message.nested_type:
        if not inner.options.map_entry:
            yield from message_facts(inner, name)
    for enum in message.enum_type:
        yield from enum_facts(enum, name)


def enum_facts(enum: Enum, scope: str) -> Iterator[str]:
    """Yield the facts of one enum."""
    for value in enum.value:
        yield f"value {scope}.{enum.name} {value.number} {value.name}"


def field_type(field: Field) -> str:
    """Return the type of a field: a scalar's name, or a message's or enum's in full."""
    return field.type_name[1:] or Field.Type.Name(field.type).removeprefix("TYPE_").lower()


def described(contract: str) -> File:
    """Return the descriptor inside the stubs of a contract."""
    file = File()
    stub(contract).DESCRIPTOR.CopyToProto(file)
    return file


def containerd_api() -> list[str]:
    """Return the facts of all of containerd's contracts, in the form of the golden file."""
    lines: list[str] = []
    for contract in contracts("protos/containerd"):
        lines += ["", f"# {contract}", *facts(described(contract))]
    return lines[1:]


def test_stubs_are_current() -> None:
    """Fresh stubs of all contracts equal the committed ones, byte for byte."""
    done = run_tool(TOOL, "--check")
    assert done.returncode == 0, f"run `make protos`\n{done.stdout}{done.stderr}"


def test_containerd_contracts_equal_upstream() -> None:
    """No name, number, type or streaming-ness of containerd's contracts has changed."""
    pinned = CONTAINERD_API.read_text("utf-8").splitlines()
    diff = difflib.unified_diff(pinned, containerd_api(), "upstream", "ours", n=1, lineterm="")
    assert not (text := "\n".join(diff)), text


def test_shim_api_v2_is_v3_by_another_name() -> None:
    """Both versions of the shim API serve one implementation, so they must not drift apart."""
    old, new = (described(f"protos/containerd/task/{v}/shim.proto") for v in ("v2", "v3"))
    assert [fact.replace("task.v2", "task.v3") for fact in facts(old)] == list(facts(new))


@pytest.mark.parametrize("contract", contracts("protos"))
def test_path_is_proto_import_and_python_import(contract: str) -> None:
    """The stubs lie beside the contract, and know it by its path from the repository root."""
    assert described(contract).name == contract
    if described(contract).service:
        importlib.import_module(f"{stub(contract).__name__}_grpc")


@pytest.mark.parametrize("contract", contracts("protos/containerd"))
def test_every_declaration_has_a_comment(contract: str) -> None:
    """Services, calls, messages, fields, enums and values say what they are."""
    lines = (ROOT / contract).read_text("utf-8").splitlines()
    silent = [
        f"{contract}:{number + 1}: {line.strip()}"
        for number, line in enumerate(lines)
        if DECLARATION.match(line) and not lines[number - 1].lstrip().startswith("//")
    ]
    assert not silent, "\n".join(silent)


@pytest.mark.parametrize(
    ("contract", "message", "type_url"),
    [
        ("events/task", "TaskExit", "containerd.events.TaskExit"),
        ("events/image", "ImageCreate", "containerd.services.images.v1.ImageCreate"),
        ("types/runc/options/oci", "Options", "containerd.runc.v1.Options"),
        ("types/runtimeoptions/v1/api", "Options", "runtimeoptions.v1.Options"),
        ("types/task/task", "Process", "containerd.v1.types.Process"),
        ("types/transfer/imagestore", "ImageStore", "containerd.types.transfer.ImageStore"),
        (
            "services/streaming/v1/streaming",
            "StreamInit",
            "containerd.services.streaming.v1.StreamInit",
        ),
        ("cgroups/v1/metrics", "Metrics", "io.containerd.cgroups.v1.Metrics"),
        ("cgroups/v2/metrics", "Metrics", "io.containerd.cgroups.v2.Metrics"),
    ],
)
def test_type_urls_are_those_of_containerd(contract: str, message: str, type_url: str) -> None:
    """Messages that travel in ``Any`` are named as clients of containerd expect.

    containerd writes type URLs without a host part and looks only at what follows the last slash.
    """
    kind = getattr(stub(f"protos/containerd/{contract}.proto"), message)
    assert kind.DESCRIPTOR.full_name == type_url
    assert any_pb2.Any(type_url=type_url).Is(kind.DESCRIPTOR) is False, "needs a slash to be read"
    assert any_pb2.Any(type_url=f"/{type_url}").Is(kind.DESCRIPTOR)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout with the generator and one contract, and stubs that are current."""
    (tmp_path / "tools").mkdir()
    shutil.copy(TOOL, tmp_path / "tools")
    folder = tmp_path / "protos" / "pets" / "v1"
    folder.mkdir(parents=True)
    (folder / "cat.proto").write_text('syntax = "proto3";\npackage pets.v1;\nmessage Cat {}\n')
    (folder / "dog.proto").write_text(
        'syntax = "proto3";\npackage pets.v1;\nmessage Dog {}\n'
        "service Kennel { rpc Fetch(Dog) returns (stream Dog); }\n"
    )
    assert run_tool(tmp_path / "tools" / "protos.py").returncode == 0
    return tmp_path


def test_generator_makes_service_stubs_only_for_services(checkout: Path) -> None:
    """Each package gets an ``__init__.py``; only a contract with a service gets gRPC stubs."""
    made = {p.name for p in (checkout / "protos" / "pets" / "v1").iterdir()} - {"__pycache__"}
    assert made == {
        "__init__.py",
        *(f"cat{end}" for end in (".proto", "_pb2.py", "_pb2.pyi")),
        *(
            f"dog{end}"
            for end in (".proto", "_pb2.py", "_pb2.pyi", "_pb2_grpc.py", "_pb2_grpc.pyi")
        ),
    }
    assert (checkout / "protos" / "__init__.py").is_file()
    assert run_tool(checkout / "tools" / "protos.py", "--check").returncode == 0


def test_check_names_edited_missing_and_leftover_stubs(checkout: Path) -> None:
    """``--check`` names each kind of difference and changes nothing; writing mends them all."""
    folder, tool = checkout / "protos" / "pets" / "v1", checkout / "tools" / "protos.py"
    (folder / "cat_pb2.pyi").write_text("edited\n")
    (folder / "dog_pb2.py").unlink()
    (folder / "cow_pb2.py").write_text("left over\n")
    done = run_tool(tool, "--check")
    assert done.returncode == 1
    assert done.stdout.splitlines() == [
        "different: protos/pets/v1/cat_pb2.pyi",
        "missing: protos/pets/v1/dog_pb2.py",
        "stale: protos/pets/v1/cow_pb2.py",
    ]
    assert (folder / "cow_pb2.py").exists()
    assert run_tool(tool).returncode == 0
    assert run_tool(tool, "--check").returncode == 0


def test_generator_reports_a_broken_contract(checkout: Path) -> None:
    """A contract protoc rejects fails the run with protoc's words and leaves the stubs alone."""
    folder = checkout / "protos" / "pets" / "v1"
    before = (folder / "cat_pb2.py").read_bytes()
    (folder / "cat.proto").write_text('syntax = "proto3";\nmessage Cat { Whisker w = 1; }\n')
    done = run_tool(checkout / "tools" / "protos.py")
    assert done.returncode not in {0, 1}
    assert "Whisker" in done.stderr
    assert (folder / "cat_pb2.py").read_bytes() == before
