"""Images from a real registry and from archives, good and bad."""

import base64
import dataclasses
import gzip
import io
import json
import tarfile

import pytest

from tools import image, registry

pytestmark = pytest.mark.root


@pytest.fixture
def push(registry_address):
    """Push an image under a name; returns its reference."""

    def push_it(picture, name, tag="1"):
        image.push(picture, registry_address, name, tag)
        return f"{registry_address}/{name}:{tag}"

    return push_it


@pytest.fixture
def blob_file(registry_directory):
    """Where the registry keeps a blob."""

    def path(digest):
        algorithm, _, digits = digest.partition(":")
        blobs = registry_directory / "data/docker/registry/v2/blobs"
        return blobs / algorithm / digits[:2] / digits / "data"

    return path


def small(text, **config):
    """An image of busybox and one more layer, which no other image has."""
    extra = image.tar_layer([(image.entry("file"), text.encode())])
    return image.build([image.busybox_layer(), extra], **config)


def layers_of(picture):
    return [layer["digest"] for layer in json.loads(picture.manifest)["layers"]]


def test_pull_run_and_remove(theseus, push):
    with theseus.leaves_nothing():
        reference = push(small("one", Cmd=["cat", "/file"]), "one")
        printed = theseus.ok("pull", reference).splitlines()
        assert printed[-1] == reference
        assert printed[-2] == f"Status: Downloaded newer image for {reference}"
        assert theseus.ok("run", "--rm", reference) == "one"
        assert theseus.ok("pull", "-q", reference) == reference
        listed = theseus.ok("images", reference.rpartition(":")[0]).splitlines()
        assert listed[1].split()[1] == "1"
        removed = theseus.ok("rmi", reference)
        assert f"Untagged: {reference}" in removed and "Deleted: sha256:" in removed
        assert theseus("inspect", reference).code == 1


def test_run_pulls_what_is_missing(theseus, push):
    reference = push(small("two"), "two")
    result = theseus("run", "--rm", reference, "cat", "/file")
    assert (result.code, result.out) == (0, "two")
    assert result.err.startswith(f"Unable to find image '{reference}' locally\n")
    assert theseus("run", "--rm", "--pull", "never", f"{reference}0", "true").code == 125
    theseus.ok("rmi", reference)


def test_images_in_use_are_kept_unless_forced(theseus, push):
    reference = push(small("three"), "three")
    theseus.ok("run", "-d", "--name", "user", reference, "sleep", "60")
    refused = theseus("rmi", reference)
    assert refused.code == 1
    theseus.ok("rm", "-f", "user")
    theseus.ok("rmi", reference)


def test_layers_are_shared(theseus, push):
    first, second = push(small("a"), "shared-a"), push(small("b"), "shared-b")
    theseus.ok("pull", first)
    assert "Already exists" in theseus.ok("pull", second)
    theseus.ok("rmi", first)
    assert theseus.ok("run", "--rm", second, "cat", "/file") == "b"
    theseus.ok("rmi", second)


def test_by_digest(theseus, push, registry_address):
    picture = small("digest")
    push(picture, "digest")
    reference = f"{registry_address}/digest@{picture.digest}"
    assert theseus("run", "--rm", reference, "cat", "/file").out == "digest"
    theseus.ok("rmi", reference)


def test_docker_manifests(theseus, push):
    reference = push(small("docker", media_type=image.DOCKER_MANIFEST), "docker-type")
    assert theseus("run", "--rm", reference, "cat", "/file").out == "docker"
    theseus.ok("rmi", reference)


def test_an_index_gives_the_machines_platform(theseus, push, registry_address):
    ours = small("ours")
    other = small("other", target={"os": "linux", "architecture": "s390x"})
    for picture in (ours, other):
        push(picture, "multi", "parts")
    push(ours, "multi", "parts2")
    here = json.loads(ours.config)
    descriptors = [
        {
            "mediaType": picture.media_type,
            "digest": picture.digest,
            "size": len(picture.manifest),
            "platform": {"os": "linux", "architecture": architecture},
        }
        for picture, architecture in ((other, "s390x"), (ours, here["architecture"]))
    ]
    index = json.dumps(
        {"schemaVersion": 2, "mediaType": image.INDEX, "manifests": descriptors}
    ).encode()
    picture = dataclasses.replace(ours, manifest=index, media_type=image.INDEX, blobs={})
    reference = push(picture, "multi", "1")
    assert theseus("run", "--rm", reference, "cat", "/file").out == "ours"
    theseus.ok("rmi", reference)
    absent = theseus("pull", "--platform", "linux/riscv64", reference)
    assert absent.code == 1
    assert "riscv64" in absent.err


@pytest.mark.parametrize("write", [image.write_oci_archive, image.write_docker_archive])
@pytest.mark.parametrize("compressed", [False, True], ids=["plain", "gzip"])
def test_load(theseus, tmp_path, write, compressed):
    archive = tmp_path / "a.tar"
    write(small("loaded", Cmd=["cat", "/file"]), archive, "docker.io/library/loaded:1")
    if compressed:
        archive.write_bytes(gzip.compress(archive.read_bytes(), 1))
    with theseus.leaves_nothing():
        assert theseus.ok("load", "-i", str(archive)) == "Loaded image: loaded:1"
        assert theseus.ok("run", "--rm", "loaded:1") == "loaded"
        theseus.ok("rmi", "loaded:1")


# What is wrong with an image: each is refused in words and leaves nothing.


def test_an_unknown_image(theseus, registry_address):
    with theseus.leaves_nothing():
        for name in (f"{registry_address}/nope:1", f"{registry_address}/busybox:nope"):
            result = theseus("pull", name)
            assert result.code == 1
            assert name in result.err or "not found" in result.err.lower()
        assert theseus("run", "--rm", f"{registry_address}/nope", "true").code == 125


def test_a_registry_that_is_not_there(theseus):
    with theseus.leaves_nothing():
        result = theseus("pull", "127.0.0.1:1/x")
    assert result.code == 1
    assert "127.0.0.1:1" in result.err


@pytest.mark.parametrize(
    "name", ["", "UPPER", "a b", "x:", "x@sha256:1", "-", "http://x/y", "a//b"]
)
def test_a_malformed_reference(theseus, name):
    with theseus.leaves_nothing():
        result = theseus("pull", "--", name)
        assert result.code == 1
        assert "reference" in result.err
        assert theseus("run", "--rm", "--", name, "true").code == 125


@pytest.mark.parametrize("which", [0, 1], ids=["first", "last"])
def test_a_corrupt_layer(theseus, push, blob_file, which):
    picture = small(f"corrupt{which}")
    extra = image.tar_layer([(image.entry("other"), f"{which}".encode())])
    picture = image.build([extra, *picture.layers])
    reference = push(picture, f"corrupt{which}")
    file = blob_file(layers_of(picture)[0 if which == 0 else -1])
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0xFF
    with theseus.leaves_nothing():
        file.write_bytes(data)
        result = theseus("pull", reference)
    assert result.code == 1
    assert "digest" in result.err or "does not match" in result.err


def test_a_truncated_layer(theseus, push, blob_file):
    picture = image.build([image.tar_layer([(image.entry("big"), bytes(range(256)) * 5000)])])
    reference = push(picture, "truncated")
    file = blob_file(layers_of(picture)[0])
    whole = file.read_bytes()
    with theseus.leaves_nothing():
        file.write_bytes(whole[:-10])
        assert theseus("pull", reference).code == 1
        # What has come is kept for the next pull, and goes with the image.
        file.write_bytes(whole)
        theseus.ok("pull", reference)
        theseus.ok("rmi", reference)


def test_a_missing_layer(theseus, push, blob_file):
    picture = small("missing")
    reference = push(picture, "missing")
    with theseus.leaves_nothing():
        blob_file(layers_of(picture)[-1]).unlink()
        assert theseus("pull", reference).code == 1


def test_layers_that_are_not_what_their_diff_ids_say(theseus, push):
    picture = small("lying")
    config = json.loads(picture.config)
    config["rootfs"]["diff_ids"][1] = image.digest_of(b"something else")
    data = json.dumps(config).encode()
    manifest = json.loads(picture.manifest)
    manifest["config"] |= {"digest": image.digest_of(data), "size": len(data)}
    blobs = picture.blobs | {image.digest_of(data): data}
    picture = dataclasses.replace(
        picture, manifest=json.dumps(manifest).encode(), blobs=blobs, config=data
    )
    reference = push(picture, "lying")
    with theseus.leaves_nothing():
        result = theseus("pull", reference)
    assert result.code == 1


def climbing(kind):
    """Layers that try to write outside of their root."""
    target = "tmp/theseus-climbed"
    climbs = {
        "dots": [(image.entry("../../../../../../../" + target), b"x")],
        "absolute name": [(image.entry("/" + target), b"x")],
        "through a symlink": [
            (image.entry("out", tarfile.SYMTYPE, linkname="/tmp"), b""),
            (image.entry("out/theseus-climbed"), b"x"),
        ],
        "through a relative symlink": [
            (image.entry("out", tarfile.SYMTYPE, linkname="../../../../../../../../tmp"), b""),
            (image.entry("out/theseus-climbed"), b"x"),
        ],
        "hardlink": [
            (image.entry("passwd", tarfile.LNKTYPE, linkname="../../../../../../etc/passwd"), b""),
        ],
    }
    return climbs[kind]


@pytest.mark.parametrize(
    "kind", ["dots", "absolute name", "through a symlink", "through a relative symlink", "hardlink"]
)
def test_a_layer_never_writes_outside_of_its_root(theseus, push, kind):
    from pathlib import Path

    name = kind.replace(" ", "-")
    picture = image.build([image.busybox_layer(), image.tar_layer(climbing(kind))])
    reference = push(picture, f"climb-{name}")
    before = Path("/etc/passwd").stat()
    with theseus.leaves_nothing():
        theseus("pull", reference)
        theseus("rmi", reference)
    assert not Path("/tmp/theseus-climbed").exists()
    assert Path("/etc/passwd").stat() == before


def test_unknown_media_types(theseus, push):
    picture = small("media")
    manifest = json.loads(picture.manifest)
    manifest["layers"][1]["mediaType"] = "application/x-nobody-knows"
    odd = dataclasses.replace(picture, manifest=json.dumps(manifest).encode())
    reference = push(odd, "media")
    with theseus.leaves_nothing():
        result = theseus("pull", reference)
    assert result.code == 1
    assert "application/x-nobody-knows" in result.err


def test_archives_that_are_none(theseus, tmp_path):
    bad = {
        "empty": b"",
        "noise": b"not a tar at all" * 1000,
        "other tar": image.tar_layer([(image.entry("file"), b"x")]),
        "half": b"",
        "bad gzip": b"\x1f\x8b\x08\x00garbage",
        "bad json": image.tar_layer(
            [(image.entry("oci-layout"), b"{"), (image.entry("index.json"), b"{")]
        ),
    }
    whole = tmp_path / "whole.tar"
    image.write_oci_archive(small("half"), whole, "docker.io/library/half:1")
    bad["half"] = whole.read_bytes()[: len(whole.read_bytes()) // 2]
    for name, data in bad.items():
        file = tmp_path / "bad.tar"
        file.write_bytes(data)
        with theseus.leaves_nothing():
            result = theseus("load", "-i", str(file))
        assert result.code == 1, name
        assert result.err.count("\n") == 1, name


def test_an_archive_whose_blob_is_corrupt(theseus, tmp_path):
    archive = tmp_path / "a.tar"
    picture = small("corrupt archive")
    image.write_oci_archive(picture, archive, "docker.io/library/x:1")
    victim = layers_of(picture)[-1].partition(":")[2]
    target = io.BytesIO()
    with tarfile.open(archive) as source, tarfile.open(fileobj=target, mode="w") as copy:
        for member in source:
            data = bytearray(source.extractfile(member).read())
            if victim in member.name:
                data[-1] ^= 0xFF
            copy.addfile(member, io.BytesIO(data))
    archive.write_bytes(target.getvalue())
    with theseus.leaves_nothing():
        result = theseus("load", "-i", str(archive))
    assert result.code == 1
    assert "(request " in result.err


def test_a_registry_of_its_own_can_be_used_too(theseus, tmp_path):
    with registry.serving(tmp_path) as address:
        image.push(small("second"), address, "deep/er/name", "v1.0")
        reference = f"{address}/deep/er/name:v1.0"
        assert theseus("run", "--rm", reference, "cat", "/file").out == "second"
        theseus.ok("rmi", reference)


def test_credentials_come_from_dockers_configuration(theseus, tmp_path, monkeypatch):
    with registry.serving(tmp_path / "r") as address:
        image.push(small("closed"), address, "closed", "1")
    # "pass", by bcrypt with the lowest cost
    users = "user:$2y$04$abcdefghijklmnopqrstuufznL8bkzdtHwLhca4To/v9Lo9bA7fR6\n"
    configuration = tmp_path / "config.json"
    monkeypatch.setitem(theseus.environment, "DOCKER_CONFIG", str(tmp_path))
    with registry.serving(tmp_path / "r", users=users) as address:
        reference = f"{address}/closed:1"

        def configure(password):
            pair = base64.b64encode(f"user:{password}".encode()).decode()
            configuration.write_text(json.dumps({"auths": {address: {"auth": pair}}}))

        denied = theseus("pull", reference)
        assert denied.code == 1
        assert "wants a user name and a password" in denied.err
        configure("wrong")
        assert f"access to {address}/closed denied" in theseus("pull", reference).err
        configure("pass")
        assert theseus("run", "--rm", reference, "cat", "/file").out == "closed"
        theseus.ok("rmi", reference)
        helper = tmp_path / "docker-credential-test"
        helper.write_text('#!/bin/sh\necho \'{"Username": "user", "Secret": "pass"}\'\n')
        helper.chmod(0o755)
        configuration.write_text(json.dumps({"credHelpers": {address: "test"}}))
        monkeypatch.setitem(theseus.environment, "PATH", f"{tmp_path}:/usr/bin:/bin")
        theseus.ok("pull", reference)
        theseus.ok("rmi", reference)
        configuration.write_text("{")
        broken = theseus("pull", reference)
        assert (broken.code, f"{configuration} is not JSON" in broken.err) == (1, True)
