"""Credentials out of docker's config.json, and from real helper programs."""

import base64
import json

import pytest

from services.cli import docker_config
from services.cli.docker_config import credentials_for, registry_of
from services.common.errors import FailedPrecondition

HUB = "https://index.docker.io/v1/"
ENTRY = {"auth": base64.b64encode(b"user:pa:ss").decode()}
HELPER = """#!/bin/sh
[ "$1" = get ] || exit 9
read -r server
case $server in
    r.example) echo '{"ServerURL": "r.example", "Username": "u", "Secret": "s"}' ;;
    https://index.docker.io/v1/) echo '{"Username": "<token>", "Secret": "identity"}' ;;
    garbage.example) echo 'hello' ;;
    list.example) echo '[1]' ;;
    broken.example) echo "the keyring is locked" >&2; exit 1 ;;
    slow.example) exec sleep 60 ;;
    *) echo "credentials not found in native keychain"; exit 1 ;;
esac
"""


@pytest.fixture
def configure(tmp_path, monkeypatch):
    """Write config.json."""
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))

    def write(text):
        (tmp_path / "config.json").write_text(text if isinstance(text, str) else json.dumps(text))

    return write


@pytest.fixture
def helper(tmp_path, monkeypatch):
    """Install the helper ``test``."""
    program = tmp_path / "bin" / "docker-credential-test"
    program.parent.mkdir()
    program.write_text(HELPER)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")


async def found(reference):
    credentials = await credentials_for(reference)
    return credentials and {field.name: value for field, value in credentials.ListFields()}


@pytest.mark.parametrize(
    ("reference", "registry"),
    [
        ("busybox", "docker.io"),
        ("team/app:1", "docker.io"),
        ("docker.io/library/x", "docker.io"),
        ("index.docker.io/x/y", "docker.io"),
        ("localhost/x", "localhost"),
        ("r.example/x@sha256:00", "r.example"),
        ("host:5000/x", "host:5000"),
        ("Host/x", "Host"),
    ],
)
def test_the_registry_of_a_reference(reference, registry):
    assert registry_of(reference) == registry


async def test_without_a_file_there_are_none(configure):
    assert await credentials_for("r.example/x") is None


async def test_docker_config_may_be_in_the_home_directory(tmp_path, monkeypatch):
    monkeypatch.delenv("DOCKER_CONFIG", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".docker").mkdir()
    (tmp_path / ".docker/config.json").write_text(json.dumps({"auths": {"r.example": ENTRY}}))
    assert await found("r.example/x") == {"username": "user", "password": "pa:ss"}


@pytest.mark.parametrize(
    ("address", "reference"),
    [
        ("r.example", "r.example/x"),
        ("https://r.example", "r.example/x"),
        ("https://r.example:5000/v1/", "r.example:5000/x"),
        (HUB, "busybox"),
        ("docker.io", "busybox"),
    ],
)
async def test_auths_are_found_in_all_their_forms(configure, address, reference):
    configure({"auths": {"other.example": {"auth": "eDp5"}, address: ENTRY}})
    assert await found(reference) == {"username": "user", "password": "pa:ss"}
    assert await found("third.example/x") is None
    assert await found("r.example:1/x") is None


async def test_tokens_of_auths(configure):
    configure({"auths": {"a.example": {"identitytoken": "i"}, "b.example": {"registrytoken": "r"}}})
    assert await found("a.example/x") == {"identity_token": "i"}
    assert await found("b.example/x") == {"registry_token": "r"}


async def test_an_empty_entry_is_none(configure):
    configure({"auths": {"r.example": {}}})  # what docker leaves where a store has the secret
    assert await found("r.example/x") is None


async def test_a_store_is_asked_instead_of_the_file(configure, helper):
    configure({"credsStore": "test", "auths": {"r.example": ENTRY, "none.example": ENTRY}})
    assert await found("r.example/x") == {"username": "u", "password": "s"}
    assert await found("busybox") == {"identity_token": "identity"}
    assert await found("none.example/x") is None


async def test_a_helper_of_a_registry_comes_before_the_store(configure, helper):
    configure({"credsStore": "missing", "credHelpers": {"r.example": "test", HUB: "test"}})
    assert await found("r.example/x") == {"username": "u", "password": "s"}
    assert await found("busybox") == {"identity_token": "identity"}
    with pytest.raises(FailedPrecondition, match=r"docker-credential-missing .* cannot be run"):
        await credentials_for("other.example/x")


@pytest.mark.parametrize(
    ("registry", "words"),
    [
        ("garbage.example", "what are no credentials for garbage.example"),
        ("list.example", "what are no credentials"),
        ("broken.example", "failed with status 1 for broken.example: the keyring is locked"),
        ("slow.example", "within 0 s"),
    ],
)
async def test_a_helper_that_fails_is_told(configure, helper, monkeypatch, registry, words):
    if registry == "slow.example":
        monkeypatch.setattr(docker_config, "_HELPER_S", 0.1)
    configure({"credsStore": "test"})
    with pytest.raises(FailedPrecondition) as caught:
        await credentials_for(f"{registry}/x")
    assert words in caught.value.message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is not JSON"),
        ("[]", "is not a JSON object"),
        ('{"auths": []}', "is fine"),
        ('{"auths": [1]}', "auths in"),
        ('{"auths": {"r.example": 1}}', "malformed"),
        ('{"auths": {"r.example": {"auth": "%"}}}', "not base64"),
        ('{"auths": {"r.example": {"auth": "eA=="}}}', "no colon"),
        ('{"auths": {"r.example": {"auth": 1}}}', "malformed"),
        ('{"credsStore": "../x"}', "which is none"),
        ('{"credsStore": 1}', "which is none"),
    ],
)
async def test_a_file_that_makes_no_sense_is_named(configure, tmp_path, text, words):
    configure(text)
    if words == "is fine":
        assert await credentials_for("r.example/x") is None
        return
    with pytest.raises(FailedPrecondition) as caught:
        await credentials_for("r.example/x")
    assert words in caught.value.message
    assert str(tmp_path / "config.json") in caught.value.message
