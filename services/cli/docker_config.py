"""Credentials for registries, as docker's client keeps them: ``config.json`` and its helpers.

    {"auths": {"registry.example": {"auth": base64("user:password")}},
     "credHelpers": {"registry.example": "NAME"}, "credsStore": "NAME"}

A helper is a program ``docker-credential-NAME``. One that is named for a registry is asked, or else
the store for all, or else what the file itself has counts; as docker has it, the file is not
consulted behind a helper's back.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from protos.theseus.engine.v1 import images_pb2 as pb
from services.common.errors import FailedPrecondition

_HUB = "docker.io"
_HUB_SERVER = "https://index.docker.io/v1/"
_HUB_NAMES = frozenset({_HUB, "index.docker.io", "registry-1.docker.io"})
_TOKEN_USER = "<token>"  # what a helper calls the user of an identity token
_NOT_FOUND = "credentials not found in native keychain"
_HELPER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_HELPER_S = 60.0  # some of them ask a person
_END_S = 2.0
_SHOWN = 300


def config_path() -> Path:
    """Where docker's client has its configuration: ``$DOCKER_CONFIG``, or ``~/.docker``."""
    directory = os.environ.get("DOCKER_CONFIG", "")
    return (Path(directory) if directory else Path.home() / ".docker") / "config.json"


def registry_of(reference: str) -> str:
    """The registry that a reference names, as users write it."""
    first, slash, _ = reference.partition("/")
    if slash and ("." in first or ":" in first or first == "localhost" or first != first.lower()):
        return _HUB if first in _HUB_NAMES else first
    return _HUB


async def credentials_for(reference: str) -> pb.RegistryCredentials | None:
    """What to show to the registry of a reference; None: nothing.

    Raises:
        FailedPrecondition: the configuration makes no sense, or a helper failed.
    """
    path = config_path()
    config = await asyncio.to_thread(_read, path)
    registry = registry_of(reference)
    server = _HUB_SERVER if registry == _HUB else registry
    helper = _table(config, "credHelpers", path).get(server) or config.get("credsStore") or ""
    if helper:
        if not isinstance(helper, str) or not _HELPER_NAME.fullmatch(helper):
            raise FailedPrecondition(f"{path} names a credential helper {helper!r}, which is none")
        return await _ask_helper(f"docker-credential-{helper}", server, path)
    for address, entry in _table(config, "auths", path).items():
        if _host(address) == registry:
            return _parse_entry(entry, f"auths of {address!r} in {path}")
    return None


def _read(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise FailedPrecondition(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise FailedPrecondition(f"{path} is not JSON: {error}") from error
    if not isinstance(document, dict):
        raise FailedPrecondition(f"{path} is not a JSON object")
    return document


def _table(config: dict[str, Any], key: str, path: Path) -> dict[str, Any]:
    table = config.get(key) or {}
    if not isinstance(table, dict):
        raise FailedPrecondition(f"{key} in {path} is not a JSON object")
    return table


def _host(address: str) -> str:
    """The registry of a key of ``auths``, which may be a URL: ``https://host:5000/v1/``."""
    rest = address.partition("://")[2] or address
    host = rest.partition("/")[0]
    return _HUB if host in _HUB_NAMES else host


def _parse_entry(entry: Any, where: str) -> pb.RegistryCredentials | None:
    if not isinstance(entry, dict) or not all(
        isinstance(entry.get(key) or "", str)
        for key in ("auth", "username", "password", "identitytoken", "registrytoken")
    ):
        raise FailedPrecondition(f"{where} are malformed")
    found = pb.RegistryCredentials(
        username=entry.get("username") or "",
        password=entry.get("password") or "",
        identity_token=entry.get("identitytoken") or "",
        registry_token=entry.get("registrytoken") or "",
    )
    if entry.get("auth"):
        try:
            text = base64.b64decode(entry["auth"], validate=True).decode().rstrip("\0")
        except (binascii.Error, ValueError) as error:
            raise FailedPrecondition(f"{where} are malformed: auth is not base64") from error
        found.username, colon, found.password = text.partition(":")
        if not colon:
            raise FailedPrecondition(f"{where} are malformed: auth has no colon")
    return found if found.ListFields() else None


async def _ask_helper(program: str, server: str, path: Path) -> pb.RegistryCredentials | None:
    try:
        process = await asyncio.create_subprocess_exec(
            program,
            "get",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
    except OSError as error:
        raise FailedPrecondition(
            f"{path} wants {program} to be asked for credentials, and it cannot be run: "
            f"{error.strerror}"
        ) from error
    try:
        async with asyncio.timeout(_HELPER_S):
            out, err = await process.communicate(server.encode())
    except TimeoutError:
        raise FailedPrecondition(
            f"{program} gave no credentials for {server} within {_HELPER_S:.0f} s"
        ) from None
    finally:
        if process.returncode is None:
            process.kill()
            async with asyncio.timeout(_END_S):
                await process.wait()
    if process.returncode:
        said = (out.strip() or err.strip()).decode(errors="replace")
        if _NOT_FOUND in said:
            return None
        raise FailedPrecondition(
            f"{program} failed with status {process.returncode} for {server}: {said[:_SHOWN]}"
        )
    with suppress(ValueError, RecursionError, AttributeError, TypeError):
        answer = json.loads(out)
        username, secret = answer.get("Username") or "", answer.get("Secret") or ""
        if username == _TOKEN_USER:
            return pb.RegistryCredentials(identity_token=secret)
        return pb.RegistryCredentials(username=username, password=secret)
    raise FailedPrecondition(f"{program} answered with what are no credentials for {server}")
