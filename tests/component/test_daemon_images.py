"""The daemon over its socket: images."""

from __future__ import annotations

import json

import grpc
import pytest

from protos.theseus.engine.v1 import images_pb2 as pb
from tests.fakes.engine import engine


@pytest.fixture
async def made():
    async with engine() as running:
        yield running


async def get(made, image):
    return (await made.images.Get(pb.GetImageRequest(image=image), timeout=20)).image


async def list_all(made):
    return list((await made.images.List(pb.ListImagesRequest(), timeout=20)).images)


async def remove(made, image, **fields):
    return await made.images.Remove(pb.RemoveImageRequest(image=image, **fields), timeout=20)


async def load(made, *pieces):
    async def requests():
        for piece in pieces:
            yield pb.LoadImageRequest(data=piece)

    return list((await made.images.Load(requests(), timeout=20)).images)


async def test_an_image_is_described_and_found_by_every_name(made):
    image = await get(made, "busybox")
    assert list(image.references) == ["docker.io/library/busybox:latest"]
    assert (image.platform, image.size_bytes, image.unpacked_bytes) == ("linux/amd64", 1100, 4096)
    assert image.created_at.ToJsonString() == "2024-05-06T07:08:09.500Z"
    assert json.loads(image.config)["config"]["Cmd"] == ["sh"]
    hexdigits = image.id.removeprefix("sha256:")
    for name in (
        "busybox:latest",
        "docker.io/library/busybox",
        f"busybox@{image.digest}",
        image.id,
        hexdigits,
        hexdigits[:8],
        f"sha256:{hexdigits[:8]}",
    ):
        assert (await get(made, name)).id == image.id


async def test_a_pull_reports_layers_and_ends_with_the_image(made):
    call = made.images.Pull(pb.PullImageRequest(reference="host:5000/a/b"), timeout=20)
    answers = [answer async for answer in call]
    assert answers[-1].image.references == ["host:5000/a/b:latest"]
    layers = [layer for answer in answers for layer in answer.layers]
    assert layers[-1].status == "done"
    assert {layer.name for layer in layers} == {"sha256:" + "e" * 64}
    assert (layers[-1].current_bytes, layers[-1].total_bytes) == (1000, 1000)


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"reference": "UPPER"}, "INVALID_ARGUMENT"),
        ({"reference": ""}, "INVALID_ARGUMENT"),
        ({"reference": "a", "platform": "x"}, "INVALID_ARGUMENT"),
        ({"reference": "missing"}, "NOT_FOUND"),
    ],
)
async def test_a_pull_that_cannot_be_is_refused(made, fields, code):
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        async for _ in made.images.Pull(pb.PullImageRequest(**fields), timeout=20):
            pass
    assert refused.value.code().name == code


async def test_an_archive_is_sent_within_the_window(made):
    images = await load(made, b"image docker.io/", b"library/loaded:1")
    assert [list(image.references) for image in images] == [
        ["docker.io/library/busybox:latest", "docker.io/library/loaded:1"]
    ]


async def test_an_image_without_a_name_is_found_by_its_id(made):
    made.node.world.images.clear()
    (image,) = await load(made, b"image untagged")
    assert list(image.references) == []
    assert (await get(made, image.id)).id == image.id
    removed = await remove(made, image.id)
    assert (list(removed.untagged), list(removed.deleted)) == ([], [image.id])
    assert await list_all(made) == []


async def test_a_file_that_is_no_archive_is_refused(made):
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await load(made, b"garbage" * 1000)
    assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT


async def test_removing_one_of_two_names_only_untags(made):
    identity = made.node.world.add_image("docker.io/library/other:1")
    await made.create("one", network_mode="none")  # in use, but not only by this name
    removed = await remove(made, "other:1")
    assert (list(removed.untagged), list(removed.deleted)) == (["docker.io/library/other:1"], [])
    assert [image.id for image in await list_all(made)] == [identity]


async def test_an_id_with_two_names_has_to_be_forced(made):
    identity = made.node.world.add_image("docker.io/library/other:1")
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await remove(made, identity)
    assert "referenced in multiple repositories" in refused.value.details()
    removed = await remove(made, identity, force=True)
    assert len(removed.untagged) == 2
    assert await list_all(made) == []


async def test_force_removes_what_stopped_containers_use_and_not_what_runs(made):
    await made.create("stopped", network_mode="none")
    running = await made.run("running", network_mode="none")
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await remove(made, "busybox", force=True)
    assert "cannot be forced" in refused.value.details()
    made.node.world.end(running, 0)
    await made.wait("running")
    await remove(made, "busybox", force=True)
    # A container keeps what it needs of its image.
    await made.begin("stopped")


async def test_unknown_images_are_not_found(made):
    for call in (get, remove):
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await call(made, "nosuch")
        assert refused.value.code() == grpc.StatusCode.NOT_FOUND
        assert refused.value.details() == "No such image: nosuch:latest"


async def test_an_index_is_read_for_this_machine(made):
    world = made.node.world
    manifests = []
    for architecture in ("arm64", "amd64", "s390x"):
        world.add_image("scratch", config={"Cmd": [architecture]}, platform=("linux", architecture))
        digest = world.images["scratch"][1]
        entry = {"digest": digest, "size": 1, "platform": {"os": "linux"}}
        entry["platform"]["architecture"] = architecture
        manifests.append(entry)
    index = world.add_blob(
        json.dumps(
            {"mediaType": "application/vnd.oci.image.index.v1+json", "manifests": manifests}
        ).encode()
    )
    world.images = {"docker.io/library/many:1": ("index", index, 1, 1)}
    image = await get(made, "many:1")
    assert json.loads(image.config)["config"]["Cmd"] == [made.app._images._platform.architecture]
    assert image.digest == index
    # What is here for another machine only is better than nothing.
    mine = made.app._images._platform.architecture
    (doomed,) = (m["digest"] for m in manifests if m["platform"]["architecture"] == mine)
    del world.blobs[doomed]
    made.app._images._known.clear()
    other = await get(made, "many:1")
    assert json.loads(other.config)["config"]["Cmd"] != [mine]


async def test_a_damaged_image_is_left_out_of_lists(made):
    digest = made.node.world.add_blob(b"not json")
    made.node.world.images["docker.io/library/bad:1"] = ("m", digest, 1, 1)
    assert len(await list_all(made)) == 1
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await get(made, "bad:1")
    assert refused.value.code() == grpc.StatusCode.DATA_LOSS
