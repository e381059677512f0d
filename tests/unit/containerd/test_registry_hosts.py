"""hosts.toml: what it may say, and what a pull or a push makes of it, with real TLS."""

from __future__ import annotations

from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

import pytest

from services.common.errors import FailedPrecondition, NotFound, Unavailable
from services.containerd.content.descriptor import Descriptor
from services.containerd.content.digest import digest_of
from services.containerd.images import media_types
from services.containerd.images.reference import parse_reference
from services.containerd.remotes.endpoint import ALL_CAPABILITIES, Capability
from services.containerd.remotes.hosts import find_endpoints
from services.containerd.remotes.http import HttpLimits
from services.containerd.remotes.mirrors import DistributionRegistries
from services.containerd.remotes.remote import Credentials, RegistryAccess
from services.containerd.remotes.retry import RetryPolicy
from tests.fakes.certificates import make_certificates
from tests.fakes.images import Blobs, build_image
from tests.fakes.registry import FakeRegistry, Fault

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator
    from pathlib import Path

    from services.containerd.remotes.mirrors import MirroredRepository
    from tests.fakes.certificates import Certificates

POLICY = RetryPolicy(attempts=3, first_delay_s=0.001, max_delay_s=0.01)
LIMITS = HttpLimits(connect_timeout_s=2, read_timeout_s=0.3, redirects=3)
DOMAIN = "r.example"
DATA = bytes(range(256)) * 100
BLOB = Descriptor(media_types.OCI_LAYER, digest_of(DATA), len(DATA))


class MemoryWriter:
    """The part of a content writer that fetching needs."""

    def __init__(self) -> None:
        self.data = b""

    @property
    def offset_bytes(self) -> int:
        return len(self.data)

    @property
    def digest(self) -> str:
        return digest_of(self.data)

    async def write(self, data: bytes) -> None:
        self.data += data

    async def truncate(self) -> None:
        self.data = b""


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return make_certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture
async def stack() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as stack:
        yield stack


@pytest.fixture
async def registries(stack: AsyncExitStack, tmp_path: Path) -> DistributionRegistries:
    return await stack.enter_async_context(
        DistributionRegistries(hosts=[tmp_path], limits=LIMITS, policy=POLICY)
    )


async def serving(stack: AsyncExitStack, **options: object) -> FakeRegistry:
    """A registry with one image, and one blob."""
    registry = await stack.enter_async_context(FakeRegistry(**options))  # type: ignore[arg-type]
    blobs = Blobs()
    registry.serve("lib/x", "1", build_image(blobs, [{"a": b"1"}]).manifest, blobs)
    registry.blobs[BLOB.digest] = DATA
    return registry


def configure(root: Path, text: str, name: str = DOMAIN) -> None:
    (root / name).mkdir(exist_ok=True)
    (root / name / "hosts.toml").write_text(text)


def remote(registries: DistributionRegistries, domain: str = DOMAIN) -> MirroredRepository:
    return registries.open(parse_reference(f"{domain}/lib/x:1"), RegistryAccess())


async def fetched(repository: MirroredRepository) -> bytes:
    writer = MemoryWriter()
    await repository.fetch(BLOB, writer)  # type: ignore[arg-type]
    return writer.data


# What the file may say.


def test_without_a_directory_a_domain_serves_itself(tmp_path: Path) -> None:
    [endpoint] = find_endpoints([tmp_path], "docker.io")
    assert str(endpoint.root) == "https://registry-1.docker.io/v2"
    assert endpoint.capabilities == ALL_CAPABILITIES


def test_hosts_come_in_the_order_of_the_file_and_the_server_last(tmp_path: Path) -> None:
    configure(
        tmp_path,
        """
        server = "https://own.example"
        capabilities = ["pull", "push"]
        [host."https://b.example"]
          capabilities = ["Pull", "resolve"]
        [host."http://a.example:5000/mirror"]
          dial_timeout = "1500ms"
        [host."c.example/v2/"]
        [host."https://d.example/api"]
          override_path = true
        """,
    )
    endpoints = find_endpoints([tmp_path], DOMAIN)
    assert [str(endpoint.root) for endpoint in endpoints] == [
        "https://b.example/v2",
        "http://a.example:5000/mirror/v2",
        "https://c.example/v2",
        "https://d.example/api",
        "https://own.example/v2",
    ]
    assert endpoints[0].capabilities == {Capability.PULL, Capability.RESOLVE}
    assert endpoints[-1].capabilities == {Capability.PULL, Capability.PUSH}
    assert endpoints[1].connect_timeout_s == 1.5
    assert {endpoint.stands_for for endpoint in endpoints} == {DOMAIN}


def test_files_are_relative_to_hosts_toml(tmp_path: Path) -> None:
    configure(
        tmp_path,
        """
        ca = ["one.pem", "/two.pem"]
        client = [["c.pem", "c.key"], "both.pem"]
        skip_verify = true
        header = {x-one = "1", x-two = ["2", "3"]}
        """,
    )
    [endpoint] = find_endpoints([tmp_path], DOMAIN)
    directory = tmp_path / DOMAIN
    assert [str(path) for path in endpoint.tls.authorities] == [f"{directory}/one.pem", "/two.pem"]
    assert endpoint.tls.identities == (
        (directory / "c.pem", directory / "c.key"),
        (directory / "both.pem", None),
    )
    assert endpoint.tls.skip_verify
    assert endpoint.headers == (("x-one", "1"), ("x-two", "2"), ("x-two", "3"))
    assert endpoint.stands_for == ""


def test_a_directory_is_found_by_port_by_domain_or_as_the_default(tmp_path: Path) -> None:
    for name in ("r.example_5000_", "r.example:5000", "_default"):
        configure(tmp_path, f'server = "https://{len(name)}.example"', name)

    def host(domain: str) -> str | None:
        return find_endpoints([tmp_path / "none", tmp_path], domain)[-1].root.host

    assert host("r.example:5000") == "15.example"
    (tmp_path / "r.example_5000_" / "hosts.toml").unlink()
    (tmp_path / "r.example_5000_").rmdir()
    assert host("r.example:5000") == "14.example"
    assert host("other.example") == "8.example"


def test_dockers_certificates_are_taken_where_there_is_no_file(tmp_path: Path) -> None:
    directory = tmp_path / "127.0.0.1:5000"
    directory.mkdir()
    for name in ("a.crt", "b.cert", "b.key", "c.cert", "notes.txt"):
        (directory / name).touch()
    [endpoint] = find_endpoints([tmp_path], "127.0.0.1:5000")
    assert endpoint.root.scheme == "https"
    assert endpoint.tls.authorities == (directory / "a.crt",)
    assert endpoint.tls.identities == (
        (directory / "b.cert", directory / "b.key"),
        (directory / "c.cert", None),
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("server = ", "is not TOML"),
        ("server = 1", "server is no text"),
        ('server = "ftp://x"', "no address of a registry"),
        ('host = "https://x"', "host is no table"),
        (
            'server = "x"\ncapabilities = ["pull", "dance"]',
            "there are pull, resolve, push",
        ),
        ('[host."https://x"]\ncapabilities = "pull"', 'host."https://x".capabilities is no list'),
        ('[host."https://x?y=1"]', "no address of a registry"),
        ("skip_verify = 1", "neither true nor false"),
        ("ca = [1]", "ca is neither a file"),
        ('client = [["a", "b", "c"]]', "client is neither"),
        ('dial_timeout = "soon"', "as in '5s'"),
        ('[header]\nx = "a\\nb"', "header.x"),
    ],
)
def test_a_file_that_makes_no_sense_is_refused_naming_the_key(
    tmp_path: Path, text: str, words: str
) -> None:
    configure(tmp_path, text)
    with pytest.raises(FailedPrecondition) as caught:
        find_endpoints([tmp_path], DOMAIN)
    assert words in caught.value.message
    assert f"{DOMAIN}/hosts.toml" in caught.value.message


# What is made of it.


async def test_a_mirror_is_asked_first_and_told_for_whom(
    stack: AsyncExitStack, registries: DistributionRegistries, tmp_path: Path
) -> None:
    mirror, own = await serving(stack), await serving(stack)
    configure(
        tmp_path,
        f'server = "http://{own.address}"\n'
        f'[host."http://{mirror.address}"]\nheader = {{x-k = "v"}}',
    )
    repository = remote(registries)
    await repository.resolve()
    assert await fetched(repository) == DATA
    assert [seen.query for seen in mirror.seen] == [f"ns={DOMAIN}"] * 2
    assert {seen.headers["x-k"] for seen in mirror.seen} == {"v"}
    assert not own.seen


async def test_a_host_is_asked_for_what_it_can_only(
    stack: AsyncExitStack, registries: DistributionRegistries, tmp_path: Path
) -> None:
    mirror, own = await serving(stack), await serving(stack)
    configure(
        tmp_path,
        f'server = "http://{own.address}"\n'
        f'[host."http://{mirror.address}"]\ncapabilities = ["pull"]',
    )
    repository = remote(registries)
    await repository.resolve()
    assert await fetched(repository) == DATA
    assert [seen.method for seen in own.seen] == ["HEAD"]
    assert [seen.method for seen in mirror.seen] == ["GET"]


async def test_a_push_goes_to_the_first_host_that_takes_pushes(
    stack: AsyncExitStack, registries: DistributionRegistries, tmp_path: Path
) -> None:
    mirror, own = await serving(stack), await serving(stack)
    hosts = f'[host."http://{mirror.address}"]\ncapabilities = ["pull", "resolve"]'
    configure(tmp_path, f'server = "http://{own.address}"\n{hosts}')

    async def read(offset: int) -> AsyncGenerator[bytes]:
        yield DATA[offset:]

    await remote(registries).push(BLOB, read)
    assert [seen.method for seen in own.seen] == ["POST", "PUT"]
    assert not mirror.seen
    configure(tmp_path, f'server = "http://{own.address}"\ncapabilities = ["pull"]\n{hosts}')
    with pytest.raises(
        FailedPrecondition, match=r"no host of r\.example has the capability 'push'"
    ):
        await remote(registries).push(BLOB, read)


@pytest.mark.parametrize(
    "fault",
    [
        Fault("status", times=99, status=503),
        Fault("status", times=99, status=401),
        Fault("status", times=99, status=404),
        Fault("html", times=99),
        Fault("loop", times=99),
        Fault("hang", times=99),
        Fault("corrupt", "/blobs/", times=99),
        Fault("excess", "/blobs/", times=99),
        Fault("truncate", "/blobs/", times=99, after_bytes=100),
    ],
    ids=lambda fault: f"{fault.kind}-{fault.status}",
)
async def test_a_mirror_that_fails_is_passed_over(
    fault: Fault, stack: AsyncExitStack, registries: DistributionRegistries, tmp_path: Path
) -> None:
    mirror, own = await serving(stack), await serving(stack)
    mirror.faults.append(fault)
    configure(tmp_path, f'server = "http://{own.address}"\n[host."http://{mirror.address}"]')
    repository = remote(registries)
    await repository.resolve()
    assert await fetched(repository) == DATA
    assert own.requests("GET", "/blobs/")
    if fault.kind == "truncate":  # what the mirror did send need not come again
        [seen] = own.requests("GET", "/blobs/")
        assert seen.headers["Range"].startswith("bytes=")


async def test_a_mirror_that_is_down_is_asked_once_in_a_transfer(
    stack: AsyncExitStack, registries: DistributionRegistries, tmp_path: Path
) -> None:
    mirror, own = await serving(stack), await serving(stack)
    mirror.faults.append(Fault("status", times=99, status=503))
    configure(tmp_path, f'server = "http://{own.address}"\n[host."http://{mirror.address}"]')
    repository = remote(registries)
    await repository.resolve()
    asked = len(mirror.seen)
    await fetched(repository)
    assert len(mirror.seen) == asked > 0


async def test_the_word_of_the_registry_itself_is_the_last_one(
    stack: AsyncExitStack, registries: DistributionRegistries, tmp_path: Path
) -> None:
    mirror, own = await serving(stack), await serving(stack)
    mirror.faults.append(Fault("status", times=99, status=503))
    own.blobs.clear()
    configure(tmp_path, f'server = "http://{own.address}"\n[host."http://{mirror.address}"]')
    repository = remote(registries)
    for _ in range(2):  # the second time the mirror is the one that is asked last
        with pytest.raises(NotFound, match=own.address):
            await fetched(repository)


async def test_headers_of_a_host_do_not_follow_a_redirect(
    stack: AsyncExitStack, registries: DistributionRegistries, tmp_path: Path
) -> None:
    store, own = await serving(stack), await serving(stack)
    target = f"http://{store.address}/v2/lib/x/blobs/{BLOB.digest}"
    own.faults.append(Fault("redirect", "/blobs/", location=target))
    configure(tmp_path, f'server = "http://{own.address}"\n[header]\nx-secret = "s"')
    assert await fetched(remote(registries)) == DATA
    assert own.seen[0].headers["x-secret"] == "s"
    assert "x-secret" not in store.seen[0].headers


# TLS.


async def test_an_authority_of_ones_own_is_trusted_when_it_is_named(
    stack: AsyncExitStack,
    registries: DistributionRegistries,
    tmp_path: Path,
    certificates: Certificates,
) -> None:
    registry = await serving(stack, tls=certificates.server())
    server = f'server = "https://{registry.address}"\n'
    configure(tmp_path, server)
    with pytest.raises(FailedPrecondition, match=r"is not trusted: .* hosts\.toml"):
        await fetched(remote(registries))
    configure(tmp_path, f'{server}ca = "{certificates.authority}"')
    assert await fetched(remote(registries)) == DATA
    configure(tmp_path, f"{server}skip_verify = true")
    assert await fetched(remote(registries)) == DATA


async def test_the_name_in_a_certificate_counts(
    stack: AsyncExitStack,
    registries: DistributionRegistries,
    tmp_path: Path,
    certificates: Certificates,
) -> None:
    # The loopback has all of 127/8, and the certificate is for 127.0.0.1 alone.
    registry = await serving(stack, tls=certificates.server(), bind="127.0.0.2")
    configure(tmp_path, f'server = "https://{registry.address}"\nca = "{certificates.authority}"')
    with pytest.raises(FailedPrecondition, match="is not trusted"):
        await fetched(remote(registries))


async def test_a_client_certificate_is_shown(
    stack: AsyncExitStack,
    registries: DistributionRegistries,
    tmp_path: Path,
    certificates: Certificates,
) -> None:
    registry = await serving(stack, tls=certificates.server(wants_client=True))
    trust = f'server = "https://{registry.address}"\nca = "{certificates.authority}"\n'
    configure(tmp_path, trust)
    # Its refusal comes behind the handshake (RFC 8446, 4.4.2.4), and may get lost with it.
    with pytest.raises((FailedPrecondition, Unavailable), match=registry.address):
        await fetched(remote(registries))
    pair = f'["{certificates.certificate("client")}", "{certificates.key("client")}"]'
    configure(tmp_path, f"{trust}client = [{pair}]")
    assert await fetched(remote(registries)) == DATA
    both = tmp_path / "both.pem"
    both.write_bytes(
        certificates.certificate("client").read_bytes() + certificates.key("client").read_bytes()
    )
    configure(tmp_path, f'{trust}client = "{both}"')
    assert await fetched(remote(registries)) == DATA


async def test_dockers_directory_of_certificates_works(
    stack: AsyncExitStack,
    registries: DistributionRegistries,
    tmp_path: Path,
    certificates: Certificates,
) -> None:
    registry = await serving(stack, tls=certificates.server(wants_client=True))
    directory = tmp_path / registry.address
    directory.mkdir()
    (directory / "ca.crt").symlink_to(certificates.authority)
    (directory / "client.cert").symlink_to(certificates.certificate("client"))
    (directory / "client.key").symlink_to(certificates.key("client"))
    assert await fetched(remote(registries, registry.address)) == DATA


async def test_tokens_come_over_the_same_tls(
    stack: AsyncExitStack,
    registries: DistributionRegistries,
    tmp_path: Path,
    certificates: Certificates,
) -> None:
    registry = await serving(stack, tls=certificates.server(), auth="bearer")
    configure(tmp_path, f'server = "https://{registry.address}"\nca = "{certificates.authority}"')
    asked = []

    async def credentials(host: str) -> Credentials:
        asked.append(host)
        return Credentials("user", "pass")

    reference = parse_reference(f"{DOMAIN}/lib/x:1")
    repository = registries.open(reference, RegistryAccess(credentials))
    await repository.resolve()
    assert registry.requests("GET", "/token")
    assert asked == [registry.address]


@pytest.mark.parametrize("what", ["ca", "client"])
async def test_a_certificate_that_is_none_is_named(
    what: str, registries: DistributionRegistries, tmp_path: Path
) -> None:
    for name in ("missing.pem", "broken.pem"):
        configure(tmp_path, f'{what} = "{name}"')
        (tmp_path / DOMAIN / "broken.pem").write_text("no certificate")
        with pytest.raises(FailedPrecondition, match=f"{name} cannot be used: "):
            await fetched(remote(registries))


async def test_plain_http_where_tls_is_spoken_is_an_error_in_words(
    stack: AsyncExitStack,
    registries: DistributionRegistries,
    tmp_path: Path,
    certificates: Certificates,
) -> None:
    plain = await serving(stack)
    configure(tmp_path, f'server = "https://{plain.address}"')
    with pytest.raises(FailedPrecondition, match="no TLS connection to"):
        await fetched(remote(registries))
