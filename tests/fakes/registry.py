"""A registry in the test's own process, with faults on demand.

async with FakeRegistry() as registry:
    registry.serve("library/x", "1", descriptor, blobs)
    registry.faults.append(Fault("truncate", "/blobs/", after_bytes=100))
    ... registry.address ...
"""

from __future__ import annotations

import asyncio
import base64
import json
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self

from aiohttp import web

from services.containerd.content.digest import digest_of

if TYPE_CHECKING:
    import ssl

    from services.containerd.content.descriptor import Descriptor
    from tests.fakes.images import Blobs

_PATH = re.compile(
    r"/v2/(?P<name>.+)/(?P<kind>manifests|blobs|referrers)/(?P<what>uploads/.*|[^/]+)"
)


@dataclass
class Fault:
    """Something that goes wrong with requests whose path contains ``path``.

    Kinds: ``truncate`` (closes the connection), ``revoke`` (and forgets all tokens), ``stall``
    (sends ``after_bytes`` and then nothing), ``corrupt``
    (sends other bytes), ``hang``, ``busy``
    (429 with ``retry_after``), ``status`` (answers ``status``), ``html``, ``loop`` (redirects to
    itself), ``redirect`` (to ``location``), ``whole`` (ignores Range), ``bare`` (leaves out digest
    and length), ``typeless`` (application/json), ``excess`` (appends bytes), ``unbounded``
    (and does not say how many there are), ``short`` (leaves the last one out), ``cut`` (takes
    ``after_bytes`` of a chunk, and closes the connection).
    """

    kind: str
    path: str = "/"
    times: int = 1
    after_bytes: int = 0
    retry_after: str = "0"
    status: int = 500
    location: str = ""


@dataclass
class Seen:
    """One request as it came."""

    method: str
    path: str
    query: str
    headers: dict[str, str]


@dataclass
class FakeRegistry:
    """Use it as an async context manager; ``address`` is ``127.0.0.1:PORT``.

    ``auth`` is empty, ``basic`` or ``bearer``. The one user is ``user``, its password ``pass``,
    its identity token ``identity``;
    with ``anonymous_tokens`` the token server also gives tokens to nobody.
    """

    auth: str = ""
    anonymous_tokens: bool = True
    address: str = ""
    blobs: dict[str, bytes] = field(default_factory=dict)
    manifests: dict[tuple[str, str], tuple[bytes, str]] = field(default_factory=dict)
    tokens: dict[str, str] = field(default_factory=dict)
    forms: list[dict[str, str]] = field(default_factory=list)
    given: int = 0
    uploads: list[bytearray] = field(default_factory=list)
    takes_chunks: bool = True
    referrers_api: bool = True
    least_chunk: int = 0
    sent_bytes: int = 0
    stalled: asyncio.Event = field(default_factory=asyncio.Event)
    token_lifetime_s: int = 300
    faults: list[Fault] = field(default_factory=list)
    seen: list[Seen] = field(default_factory=list)
    arrived: asyncio.Event = field(default_factory=asyncio.Event)
    gate: asyncio.Event | None = None
    tls: ssl.SSLContext | None = None
    bind: str = "127.0.0.1"
    _closing: asyncio.Event = field(default_factory=asyncio.Event)
    _runner: web.AppRunner | None = None

    async def __aenter__(self) -> Self:
        app = web.Application(client_max_size=64 << 20)
        app.router.add_route("*", "/{tail:.*}", self._handle)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, self.bind, 0, ssl_context=self.tls)
        await site.start()
        port = self._runner.addresses[0][1]
        self.address = f"{self.bind}:{port}"
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._closing.set()
        assert self._runner is not None
        await self._runner.cleanup()

    def serve(self, name: str, tag: str, target: Descriptor, blobs: Blobs) -> str:
        """Offer an image; returns its full reference."""
        self.blobs.update(blobs.data)
        self.put_manifest(name, tag, blobs.data[target.digest], target.media_type)
        for data in blobs.data.values():
            if data.startswith(b'{"schemaVersion"'):
                media_type = json.loads(data)["mediaType"]
                self.manifests[name, digest_of(data)] = (data, media_type)
        return f"{self.address}/{name}:{tag}"

    def put_manifest(self, name: str, tag: str, data: bytes, media_type: str) -> None:
        """Offer any bytes as a manifest, under its tag and digest."""
        self.manifests[name, tag] = (data, media_type)
        self.manifests[name, digest_of(data)] = (data, media_type)

    def requests(self, method: str, part: str) -> list[Seen]:
        """Requests of a method whose path contains ``part``."""
        return [seen for seen in self.seen if seen.method == method and part in seen.path]

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        self.seen.append(
            Seen(request.method, request.path, request.query_string, dict(request.headers))
        )
        self.arrived.set()
        if request.path == "/token":
            return await self._token(request)
        match = _PATH.fullmatch(request.path)
        if match is None:
            return web.Response(status=404)
        if refused := self._authorize(request, match["name"]):
            return refused
        fault = self._fault(request)
        if fault is not None and (response := await self._broken(request, fault)):
            return response
        if match["what"].startswith("uploads/"):
            return await self._upload(request, match["name"], fault)
        if match["kind"] == "referrers":
            return self._referrers(request, match["name"], match["what"])
        if match["kind"] == "manifests":
            return await self._manifest(request, match["name"], match["what"], fault)
        if self.gate is not None:
            await self.gate.wait()
        return await self._blob(request, match["what"], fault)

    def _fault(self, request: web.Request) -> Fault | None:
        for fault in self.faults:
            if fault.times > 0 and fault.path in request.path:
                if fault.kind == "cut" and request.method != "PATCH":
                    continue
                if (
                    fault.kind
                    in ("truncate", "revoke", "stall", "corrupt", "excess", "unbounded", "short")
                    and request.method != "GET"
                ):
                    continue
                fault.times -= 1
                return fault
        return None

    async def _broken(self, request: web.Request, fault: Fault) -> web.StreamResponse | None:
        match fault.kind:
            case "hang":
                await self._closing.wait()
                return web.Response(status=500)
            case "busy":
                return web.Response(status=429, headers={"Retry-After": fault.retry_after})
            case "status":
                errors = {"errors": [{"code": "DENIED", "message": "because of the test"}]}
                return web.json_response(errors, status=fault.status)
            case "html":
                return web.Response(text="<html>hello</html>", content_type="text/html")
            case "loop":
                return web.Response(status=302, headers={"Location": request.path})
            case "redirect":
                return web.Response(status=307, headers={"Location": fault.location})
        return None

    async def _manifest(
        self, request: web.Request, name: str, what: str, fault: Fault | None
    ) -> web.StreamResponse:
        if request.method == "PUT":
            data = await request.read()
            self.manifests[name, what] = (data, request.headers["Content-Type"])
            self.manifests[name, digest_of(data)] = self.manifests[name, what]
            headers = {"Docker-Content-Digest": digest_of(data)}
            if self.referrers_api and (subject := json.loads(data).get("subject")):
                headers["OCI-Subject"] = subject["digest"]
            return web.Response(status=201, headers=headers)
        if (name, what) not in self.manifests:
            return web.json_response(
                {"errors": [{"code": "MANIFEST_UNKNOWN", "message": "manifest unknown"}]},
                status=404,
            )
        data, media_type = self.manifests[name, what]
        headers = {"Content-Type": media_type, "Docker-Content-Digest": digest_of(data)}
        if fault is not None and fault.kind == "bare":
            del headers["Docker-Content-Digest"]
        if fault is not None and fault.kind == "typeless":
            headers["Content-Type"] = "application/json"
        return await self._send(request, data, headers, fault)

    def _referrers(self, request: web.Request, name: str, digest: str) -> web.StreamResponse:
        """The API of distribution-spec 1.1, one referrer a page."""
        if not self.referrers_api:
            return web.Response(status=404)
        found = {}
        for (repository, _), (data, media_type) in self.manifests.items():
            document = json.loads(data)
            if repository == name and document.get("subject", {}).get("digest") == digest:
                found[digest_of(data)] = {
                    "mediaType": media_type,
                    "digest": digest_of(data),
                    "size": len(data),
                    "artifactType": document.get("artifactType", ""),
                }
        page = int(request.query.get("page", "0"))
        index = {"schemaVersion": 2, "manifests": list(found.values())[page : page + 1]}
        headers = {"Content-Type": "application/vnd.oci.image.index.v1+json"}
        if page + 1 < len(found):
            headers["Link"] = f'<{request.path}?page={page + 1}>; rel="next"'
        return web.Response(body=json.dumps(index).encode(), headers=headers)

    async def _blob(
        self, request: web.Request, digest: str, fault: Fault | None
    ) -> web.StreamResponse:
        if digest not in self.blobs:
            return web.Response(status=404)
        headers = {"Content-Type": "application/octet-stream"}
        return await self._send(request, self.blobs[digest], headers, fault)

    async def _send(
        self, request: web.Request, data: bytes, headers: dict[str, str], fault: Fault | None
    ) -> web.StreamResponse:
        kind = "" if fault is None else fault.kind
        if kind == "corrupt":
            data = bytes([data[0] ^ 1]) + data[1:]
        if kind in ("excess", "unbounded"):
            data += b"more than was promised"
        if kind == "short":
            data = data[:-1]
        status, start = 200, 0
        wanted = re.fullmatch(r"bytes=(\d+)-", request.headers.get("Range", ""))
        if wanted and kind != "whole":
            status, start = 206, int(wanted[1])
            if start >= len(data):
                return web.Response(status=416)
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        response = web.StreamResponse(status=status, headers=headers)
        if kind not in ("bare", "unbounded"):
            response.content_length = len(data) - start
        await response.prepare(request)
        if request.method == "HEAD":
            return response
        if kind in ("truncate", "revoke"):
            assert fault is not None
            if kind == "revoke":
                self.tokens.clear()
            await self._write(response, data[start : start + fault.after_bytes])
            assert request.transport is not None
            request.transport.close()
            return response
        if kind == "stall":
            assert fault is not None
            await self._write(response, data[start : start + fault.after_bytes])
            self.stalled.set()
            await self._closing.wait()
            if request.transport is not None:
                request.transport.close()
            return response
        await self._write(response, data[start:])
        await response.write_eof()
        return response

    async def _write(self, response: web.StreamResponse, data: bytes) -> None:
        self.sent_bytes += len(data)
        await response.write(data)

    async def _upload(
        self, request: web.Request, name: str, fault: Fault | None
    ) -> web.StreamResponse:
        if request.method == "POST":
            if request.query.get("mount") in self.blobs:
                return web.Response(status=201)
            self.uploads.append(bytearray())
            return self._session(name, len(self.uploads) - 1, 202)
        number = int(request.path.rpartition("/")[2])
        data = self.uploads[number]
        if request.query["_state"] != "a+b":
            return web.Response(status=400)
        if request.method == "GET":
            return self._session(name, number, 204)
        if request.method == "PATCH":
            return await self._chunk(request, name, number, fault)
        data += await request.read()
        if digest_of(bytes(data)) != request.query["digest"]:
            return web.Response(status=400)
        self.blobs[digest_of(bytes(data))] = bytes(data)
        return web.Response(status=201, headers={"Docker-Content-Digest": digest_of(bytes(data))})

    async def _chunk(
        self, request: web.Request, name: str, number: int, fault: Fault | None
    ) -> web.StreamResponse:
        if not self.takes_chunks:
            return web.Response(status=405)
        data = self.uploads[number]
        if int(request.headers["Content-Range"].partition("-")[0]) != len(data):
            return web.Response(status=416)
        if fault is not None and fault.kind == "cut":
            data += await request.content.readexactly(fault.after_bytes)
            assert request.transport is not None
            request.transport.close()
            return web.Response(status=500)
        data += await request.read()
        return self._session(name, number, 202)

    def _session(self, name: str, number: int, status: int) -> web.Response:
        headers = {
            "Location": f"/v2/{name}/blobs/uploads/{number}?_state=a%2Bb",
            "Range": f"0-{max(0, len(self.uploads[number]) - 1)}",
        }
        if self.least_chunk:
            headers["OCI-Chunk-Min-Length"] = str(self.least_chunk)
        return web.Response(status=status, headers=headers)

    async def _token(self, request: web.Request) -> web.StreamResponse:
        header = request.headers.get("Authorization", "")
        fields = dict(request.query)
        if request.method == "POST":  # OAuth 2
            fields = {key: str(value) for key, value in (await request.post()).items()}
            self.forms.append(fields)
            if fields["refresh_token"] != "identity":
                return web.Response(status=401)
        elif header != _BASIC and not (self.anonymous_tokens and not header):
            return web.Response(status=401)
        token = f"token-{self.given}"
        self.given += 1
        self.tokens[token] = fields.get("scope", "")
        return web.json_response({"token": token, "expires_in": self.token_lifetime_s})

    def _authorize(self, request: web.Request, name: str) -> web.StreamResponse | None:
        header = request.headers.get("Authorization", "")
        if self.auth == "basic" and header != _BASIC:
            return web.Response(status=401, headers={"WWW-Authenticate": 'Basic realm="x"'})
        if self.auth == "bearer":
            scheme = "http" if self.tls is None else "https"
            scope = self.tokens.get(header.removeprefix("Bearer "), "")
            if f"repository:{name}:" not in scope:
                challenge = (
                    f'Bearer realm="{scheme}://{self.address}/token",service="fake",'
                    f'scope="repository:{name}:pull"'
                )
                return web.Response(status=401, headers={"WWW-Authenticate": challenge})
        return None


_BASIC = "Basic " + base64.b64encode(b"user:pass").decode()
