"""The registry client against a registry that misbehaves."""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING

import pytest

from services.common.errors import (
    DataLoss,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
    Unauthenticated,
    Unavailable,
)
from services.containerd.content.descriptor import Descriptor
from services.containerd.content.digest import digest_of
from services.containerd.images import media_types
from services.containerd.images.manifest import MalformedManifest
from services.containerd.images.reference import parse_reference
from services.containerd.remotes.auth import Challenge, parse_challenges
from services.containerd.remotes.endpoint import registry_url
from services.containerd.remotes.http import HttpLimits
from services.containerd.remotes.mirrors import DistributionRegistries
from services.containerd.remotes.remote import Credentials, RegistryAccess
from services.containerd.remotes.retry import RetryPolicy, parse_retry_after
from tests.fakes.images import Blobs, build_image, build_index
from tests.fakes.registry import FakeRegistry, Fault

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator

    from services.containerd.remotes.mirrors import MirroredRepository

POLICY = RetryPolicy(attempts=3, first_delay_s=0.001, max_delay_s=0.01, retry_after_max_s=2)
LIMITS = HttpLimits(connect_timeout_s=2, read_timeout_s=0.2, redirects=3)
BIG = bytes(range(256)) * 10_000  # 2.4 MiB: three chunks


class MemoryWriter:
    """The part of a content writer that fetching needs."""

    def __init__(self, data: bytes = b"") -> None:
        self.data = data

    @property
    def offset_bytes(self) -> int:
        return len(self.data)

    async def write(self, data: bytes) -> None:
        self.data += data

    async def truncate(self) -> None:
        self.data = b""


@pytest.fixture
async def registry() -> AsyncIterator[FakeRegistry]:
    async with FakeRegistry() as registry:
        yield registry


@pytest.fixture
async def registries() -> AsyncIterator[DistributionRegistries]:
    async with DistributionRegistries(limits=LIMITS, policy=POLICY) as registries:
        yield registries


@pytest.fixture
def image(registry: FakeRegistry) -> Descriptor:
    blobs = Blobs()
    target = build_image(blobs, [{"a": b"1"}]).manifest
    registry.serve("lib/x", "1", target, blobs)
    return target


def remote(
    registries: DistributionRegistries,
    registry: FakeRegistry,
    rest: str = "lib/x:1",
    access: RegistryAccess | None = None,
) -> MirroredRepository:
    reference = parse_reference(f"{registry.address}/{rest}")
    return registries.open(reference, access or RegistryAccess())


def with_password(username: str = "user", secret: str = "pass") -> RegistryAccess:
    async def credentials(_host: str) -> Credentials:
        return Credentials(username, secret)

    return RegistryAccess(credentials)


def big(registry: FakeRegistry) -> Descriptor:
    registry.blobs[digest_of(BIG)] = BIG
    return Descriptor(media_types.OCI_LAYER, digest_of(BIG), len(BIG))


async def fetched(
    repository: MirroredRepository, descriptor: Descriptor, start: bytes = b""
) -> bytes:
    writer = MemoryWriter(start)
    await repository.fetch(descriptor, writer)  # type: ignore[arg-type]
    return writer.data


async def test_resolve_by_tag_takes_the_headers(
    registry: FakeRegistry, registries: DistributionRegistries, image: Descriptor
) -> None:
    found = await remote(registries, registry).resolve()
    assert (found.media_type, found.digest, found.size_bytes) == (
        image.media_type,
        image.digest,
        image.size_bytes,
    )
    assert [(seen.method, seen.path) for seen in registry.seen] == [
        ("HEAD", "/v2/lib/x/manifests/1")
    ]
    assert media_types.DOCKER_INDEX in registry.seen[0].headers["Accept"]


async def test_resolve_by_digest(
    registry: FakeRegistry, registries: DistributionRegistries, image: Descriptor
) -> None:
    found = await remote(registries, registry, f"lib/x@{image.digest}").resolve()
    assert found.digest == image.digest


@pytest.mark.parametrize("kind", ["bare", "typeless"])
async def test_resolve_reads_the_manifest_where_the_headers_say_too_little(
    kind: str, registry: FakeRegistry, registries: DistributionRegistries, image: Descriptor
) -> None:
    registry.faults.append(Fault(kind, "/manifests/", times=2))
    found = await remote(registries, registry).resolve()
    assert (found.media_type, found.digest, found.size_bytes) == (
        image.media_type,
        image.digest,
        image.size_bytes,
    )


async def test_resolve_refuses_schema_1(
    registry: FakeRegistry, registries: DistributionRegistries
) -> None:
    registry.put_manifest(
        "lib/x", "1", b"{}", "application/vnd.docker.distribution.manifest.v1+prettyjws"
    )
    with pytest.raises(MalformedManifest, match="schema 1"):
        await remote(registries, registry).resolve()


async def test_resolve_refuses_what_is_neither_index_nor_manifest(
    registry: FakeRegistry, registries: DistributionRegistries
) -> None:
    registry.put_manifest("lib/x", "1", b'{"a": 1}', "application/json")
    with pytest.raises(MalformedManifest, match="neither an index nor a manifest"):
        await remote(registries, registry).resolve()


async def test_resolve_refuses_a_huge_manifest(
    registry: FakeRegistry, registries: DistributionRegistries
) -> None:
    registry.put_manifest("lib/x", "1", b" " * (5 << 20), media_types.OCI_MANIFEST)
    with pytest.raises(ResourceExhausted, match="more than"):
        await remote(registries, registry).resolve()
    registry.faults.append(Fault("bare", "/manifests/", times=2))
    with pytest.raises(ResourceExhausted, match="more than"):
        await remote(registries, registry).resolve()


async def test_resolve_needs_a_tag_or_a_digest(
    registry: FakeRegistry, registries: DistributionRegistries
) -> None:
    with pytest.raises(InvalidArgument, match="no tag"):
        await remote(registries, registry, "lib/x").resolve()


async def test_unknown_tag_is_not_found(
    registry: FakeRegistry, registries: DistributionRegistries
) -> None:
    with pytest.raises(NotFound, match="lib/x"):
        await remote(registries, registry).resolve()


async def test_an_html_page_is_no_registry(
    registry: FakeRegistry, registries: DistributionRegistries, image: Descriptor
) -> None:
    registry.faults.append(Fault("html"))
    with pytest.raises(FailedPrecondition, match="HTML"):
        await remote(registries, registry).resolve()
    descriptor = big(registry)
    registry.faults.append(Fault("html"))
    with pytest.raises(FailedPrecondition, match="HTML"):
        await fetched(remote(registries, registry), descriptor)


async def test_fetch_streams_a_blob(
    registry: FakeRegistry, registries: DistributionRegistries
) -> None:
    assert await fetched(remote(registries, registry), big(registry)) == BIG


async def test_fetch_asks_manifests_for_a_manifest(
    registry: FakeRegistry, registries: DistributionRegistries, image: Descriptor
) -> None:
    del registry.blobs[image.digest]
    data = await fetched(remote(registries, registry), image)
    assert digest_of(data) == image.digest


async def test_fetch_goes_on_where_a_connection_was_cut(
    registry: FakeRegistry, registries: DistributionRegistries
) -> None:
    descriptor = big(registry)
    registry.faults.append(Fault("truncate", "/blobs/", times=2, after_bytes=70_000))
    assert await fetched(remote(registries, registry), descriptor) == BIG
    ranges = [seen.headers.get("Range") for seen in registry.requests("GET", "/blobs/")]
    assert ranges == [None, "bytes=70000-", "bytes=140000-"]


async def test_fetch_gives_up_when_cut_again_and_again_without_progress(
    registry: FakeRegistry, registries: DistributionRegistries
) -> None:
    descriptor = big(registry)
    registry.faults.append(Fault("truncate", "/blobs/", times=99, after_bytes=10))
    with pytest.raises(Unavailable):
        await fetched(remote(registries, registry), descriptor)
    assert len(registry.seen) == POLICY.attempts


async def test_fetch_does_not_count_failures_against_a_blob_that_comes_along(
    registry: FakeRegistry, registries: DistributionRegistries
) -> None:
    data = BIG * 4
    registry.blobs[digest_of(data)] = data
    registry.faults.append(Fault("truncate", "/blobs/", times=5, after_bytes=1_500_000))
    descriptor = Descriptor(media_types.OCI_LAYER, digest_of(data), len(data))
    assert await fetched(remote(registries, registry), descriptor) == data


async def test_fetch_continues_an_earlier_ingest(
    registry: FakeRegistry, registries: DistributionRegistries
) -> None:
    descriptor = big(registry)
    assert await fetched(remote(registries, registry), descriptor, BIG[:1000]) == BIG
    assert registry.seen[-1].headers["Range"] == "bytes=1000-"
    count = len(registry.seen)
    assert await fetched(remote(registries, registry), descriptor, BIG) == BIG
    assert len(registry.seen) == count


async def test_fetch_copes_with_a_registry_that_ignores_ranges(
    registry: FakeRegistry, registries: DistributionRegistries
) -> None:
    descriptor = big(registry)
    registry.faults.append(Fault("whole", "/blobs/"))
    assert await fetched(remote(registries, registry), descriptor, BIG[:1000]) == BIG


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("excess", f"has {len(BIG) + 22} bytes of sha256:.*, whose size is {len(BIG)}"),
        ("short", f"has {len(BIG) - 1} bytes of sha256:.*, whose size is {len(BIG)}"),
        ("unbounded", "sent more than"),
    ],
)
async def test_fetch_refuses_a_blob_of_another_size(
    kind: str, words: str, registry: FakeRegistry, registries: DistributionRegistries
) -> None:
    descriptor = big(registry)
    registry.faults.append(Fault(kind, "/blobs/"))
    with pytest.raises(DataLoss, match=words):
        await fetched(remote(registries, registry), descriptor)
    assert len(registry.seen) == 1


async def test_fetch_of_a_missing_blob_is_not_found(
    registry: FakeRegistry, registries: DistributionRegistries
) -> None:
    descriptor = Descriptor(media_types.OCI_LAYER, digest_of(b"x"), 1)
    with pytest.raises(NotFound):
        await fetched(remote(registries, registry), descriptor)


async def test_a_server_that_falls_silent_is_tried_again(
    registry: FakeRegistry, registries: DistributionRegistries, image: Descriptor
) -> None:
    registry.faults.append(Fault("hang"))
    assert (await remote(registries, registry).resolve()).digest == image.digest
    registry.faults.append(Fault("hang", times=99))
    with pytest.raises(Unavailable, match="did not answer in time"):
        await remote(registries, registry).resolve()


async def test_retry_after_is_honoured_and_bounded(
    registry: FakeRegistry, registries: DistributionRegistries, image: Descriptor
) -> None:
    registry.faults.append(Fault("busy", retry_after="1"))
    began = asyncio.get_running_loop().time()
    await remote(registries, registry).resolve()
    assert asyncio.get_running_loop().time() - began >= 1
    registry.faults.append(Fault("busy", retry_after="3600"))
    with pytest.raises(Unavailable, match="429") as caught:
        await remote(registries, registry).resolve()
    assert caught.value.retry_after_s == 3600


@pytest.mark.parametrize(
    ("status", "error"),
    [(403, PermissionDenied), (404, NotFound), (400, FailedPrecondition), (503, Unavailable)],
)
async def test_statuses_become_errors_in_words(
    status: int,
    error: type[Exception],
    registry: FakeRegistry,
    registries: DistributionRegistries,
    image: Descriptor,
) -> None:
    descriptor = big(registry)
    registry.faults.append(Fault("status", status=status, times=99))
    with pytest.raises(error, match="because of the test"):
        await fetched(remote(registries, registry), descriptor)


async def test_redirects_are_followed_up_to_a_bound(
    registry: FakeRegistry, registries: DistributionRegistries, image: Descriptor
) -> None:
    registry.faults.append(Fault("loop", times=LIMITS.redirects))
    assert (await remote(registries, registry).resolve()).digest == image.digest
    registry.faults.append(Fault("loop", times=99))
    with pytest.raises(FailedPrecondition, match="redirects more than 3 times"):
        await remote(registries, registry).resolve()


async def test_a_redirect_to_another_scheme_is_refused(
    registry: FakeRegistry, registries: DistributionRegistries
) -> None:
    registry.faults.append(Fault("redirect", location="file:///etc/passwd"))
    with pytest.raises(FailedPrecondition, match="scheme"):
        await remote(registries, registry).resolve()


async def test_another_host_never_sees_the_credentials(
    registry: FakeRegistry, registries: DistributionRegistries
) -> None:
    descriptor = big(registry)
    registry.auth = "basic"
    async with FakeRegistry() as other:
        other.blobs[descriptor.digest] = BIG
        path = f"/v2/lib/x/blobs/{descriptor.digest}"
        registry.faults.append(Fault("redirect", location=f"http://{other.address}{path}"))
        repository = remote(registries, registry, access=with_password())
        assert await fetched(repository, descriptor) == BIG
        assert "Authorization" in registry.seen[-1].headers
        assert "Authorization" not in other.seen[-1].headers
        other.auth = "basic"
        registry.faults.append(Fault("redirect", location=f"http://{other.address}{path}"))
        with pytest.raises(Unauthenticated):
            await fetched(repository, descriptor)
        assert "Authorization" not in other.seen[-1].headers


async def test_basic_authorization(
    registry: FakeRegistry, registries: DistributionRegistries, image: Descriptor
) -> None:
    registry.auth = "basic"
    with pytest.raises(Unauthenticated, match="user name and a password"):
        await remote(registries, registry).resolve()
    with pytest.raises(Unauthenticated):
        await remote(registries, registry, access=with_password(secret="no")).resolve()
    repository = remote(registries, registry, access=with_password())
    assert (await repository.resolve()).digest == image.digest


async def test_bearer_tokens_are_got_once_for_concurrent_requests(
    registry: FakeRegistry, registries: DistributionRegistries, image: Descriptor
) -> None:
    registry.auth = "bearer"
    repository = remote(registries, registry)
    found = await asyncio.gather(*(repository.resolve() for _ in range(5)))
    assert {descriptor.digest for descriptor in found} == {image.digest}
    assert [seen.query for seen in registry.requests("GET", "/token")] == [
        "service=fake&scope=repository:lib/x:pull"
    ]


async def test_bearer_with_wrong_password_or_without_one_is_unauthenticated(
    registry: FakeRegistry, registries: DistributionRegistries, image: Descriptor
) -> None:
    registry.auth, registry.anonymous_tokens = "bearer", False
    with pytest.raises(Unauthenticated):
        await remote(registries, registry).resolve()
    with pytest.raises(Unauthenticated):
        await remote(registries, registry, access=with_password(secret="no")).resolve()
    assert await remote(registries, registry, access=with_password()).resolve()


async def test_a_token_that_is_no_longer_taken_is_replaced(
    registry: FakeRegistry, registries: DistributionRegistries, image: Descriptor
) -> None:
    registry.auth = "bearer"
    repository = remote(registries, registry)
    await repository.resolve()
    registry.tokens = {"forget": "all"}
    await repository.resolve()
    assert len(registry.requests("GET", "/token")) == 2


async def test_a_header_given_as_credentials_is_sent_as_it_is(
    registry: FakeRegistry, registries: DistributionRegistries, image: Descriptor
) -> None:
    registry.auth = "basic"

    async def credentials(_host: str) -> Credentials:
        return Credentials(header="Basic dXNlcjpwYXNz")

    assert await remote(registries, registry, access=RegistryAccess(credentials)).resolve()


async def test_headers_of_the_access_are_sent(
    registry: FakeRegistry, registries: DistributionRegistries, image: Descriptor
) -> None:
    await remote(registries, registry, access=RegistryAccess(headers={"X-Test": "1"})).resolve()
    assert registry.seen[-1].headers["X-Test"] == "1"


async def test_nobody_listening_is_unavailable(registries: DistributionRegistries) -> None:
    async with FakeRegistry() as registry:
        pass
    with pytest.raises(Unavailable, match="cannot connect"):
        await remote(registries, registry).resolve()


async def test_push_uploads_blobs_then_the_manifest(
    registry: FakeRegistry, registries: DistributionRegistries
) -> None:
    blobs = Blobs()
    image = build_image(blobs, [{"a": b"1"}])
    index = build_index(blobs, [image.manifest])
    registry.auth = "bearer"
    repository = remote(registries, registry, "lib/new:1")
    for descriptor in (*image.layers, image.config, image.manifest, index):

        async def read(offset: int, digest: str = descriptor.digest) -> AsyncGenerator[bytes]:
            yield blobs.data[digest][offset:]

        assert not await repository.has(descriptor)
        await repository.push(descriptor, read, tag="1" if descriptor is index else "")
        assert await repository.has(descriptor)
    assert (await repository.resolve()).digest == index.digest
    assert registry.tokens["token-0"] == "repository:lib/new:pull,push"


async def test_push_mounts_what_another_repository_has(
    registry: FakeRegistry, registries: DistributionRegistries
) -> None:
    descriptor = big(registry)

    sent = []

    async def read(offset: int) -> AsyncGenerator[bytes]:
        sent.append(descriptor)
        yield BIG

    await remote(registries, registry).push(descriptor, read, mount_from="lib/other")
    assert sent == []
    assert registry.requests("PUT", "/") == []


@pytest.mark.parametrize(
    ("domain", "scheme", "url"),
    [
        ("docker.io", "", "https://registry-1.docker.io"),
        ("localhost:5000", "", "http://localhost:5000"),
        ("127.0.0.2", "", "http://127.0.0.2"),
        ("[::1]:5000", "", "http://[::1]:5000"),
        ("r.example", "", "https://r.example"),
        ("r.example", "http", "http://r.example"),
        ("localhost", "https", "https://localhost"),
    ],
)
def test_loopback_is_http_and_all_else_https_unless_told(
    domain: str, scheme: str, url: str
) -> None:
    assert str(registry_url(domain, scheme)).rstrip("/") == url


def test_registry_url_refuses_other_schemes_and_no_domain() -> None:
    with pytest.raises(InvalidArgument, match="scheme"):
        registry_url("r.example", "ftp")
    with pytest.raises(InvalidArgument, match="full"):
        registry_url("", "")


def test_challenges_are_parsed() -> None:
    assert parse_challenges(
        ['Bearer realm="https://a/b?c=d,e",service=s , scope="x \\"y\\"", Basic realm="z"']
    ) == [
        Challenge("bearer", {"realm": "https://a/b?c=d,e", "service": "s", "scope": 'x "y"'}),
        Challenge("basic", {"realm": "z"}),
    ]
    assert parse_challenges(["Negotiate", '"', ""]) == [Challenge("negotiate", {})]


def test_retry_after_takes_seconds_and_dates() -> None:
    assert parse_retry_after("7") == 7
    assert parse_retry_after("Thu, 01 Jan 1970 00:00:00 GMT") == 0
    assert parse_retry_after("soon") is None
    assert parse_retry_after("") is None


LARGE = random.Random(3).randbytes((16 << 20) + 5_000_000)
CHUNK = 16 << 20


async def push_large(
    registries: DistributionRegistries, registry: FakeRegistry, sent: list[int]
) -> Descriptor:
    """Push a blob of more than a chunk; ``sent`` is told the offsets that it is read from."""
    blob = Descriptor(media_types.OCI_LAYER, digest_of(LARGE), len(LARGE))

    async def read(offset: int) -> AsyncGenerator[bytes]:
        sent.append(offset)
        for at in range(offset, len(LARGE), 1 << 20):
            yield LARGE[at : at + (1 << 20)]

    await remote(registries, registry).push(blob, read)
    assert registry.blobs[blob.digest] == LARGE
    return blob


async def test_a_large_blob_is_pushed_in_chunks(
    registry: FakeRegistry, registries: DistributionRegistries
) -> None:
    sent: list[int] = []
    await push_large(registries, registry, sent)
    chunks = registry.requests("PATCH", "/uploads/")
    ranges = [seen.headers["Content-Range"] for seen in chunks]
    assert ranges == [f"0-{CHUNK - 1}", f"{CHUNK}-{len(LARGE) - 1}"]
    assert sent[:2] == [0, CHUNK]
    [put] = registry.requests("PUT", "/uploads/")
    assert put.headers["Content-Length"] == "0"


@pytest.mark.parametrize("taken", [0, 3_000_000])
async def test_a_chunk_that_breaks_off_is_gone_on_with_where_the_registry_is(
    taken: int, registry: FakeRegistry, registries: DistributionRegistries
) -> None:
    registry.faults.append(Fault("cut", "/uploads/", after_bytes=taken))
    sent: list[int] = []
    await push_large(registries, registry, sent)
    assert sent[:2] == [0, taken]
    assert len(registry.requests("POST", "/uploads/")) == 1


async def test_a_registry_that_breaks_off_for_ever_fails_a_push(
    registry: FakeRegistry, registries: DistributionRegistries
) -> None:
    registry.faults.append(Fault("cut", "/uploads/", times=99))
    with pytest.raises(Unavailable, match="broke"):
        await push_large(registries, registry, [])


async def test_a_registry_without_chunks_gets_a_blob_in_one_piece(
    registry: FakeRegistry, registries: DistributionRegistries
) -> None:
    registry.takes_chunks = False
    await push_large(registries, registry, [])
    [put] = registry.requests("PUT", "/uploads/")
    assert put.headers["Content-Length"] == str(len(LARGE))


async def test_a_registry_may_want_larger_chunks(
    registry: FakeRegistry, registries: DistributionRegistries
) -> None:
    registry.least_chunk = len(LARGE)
    await push_large(registries, registry, [])
    assert not registry.requests("PATCH", "/uploads/")
