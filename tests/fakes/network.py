"""A bridge network that only keeps files, one for each endpoint, so that it outlives a crash."""

from __future__ import annotations

from ipaddress import IPv4Address

from services.common.errors import AlreadyExists, FailedPrecondition
from services.daemon.networks.network import Endpoint, PortMapping


class FakeNetwork:
    def __init__(self, directory):
        self.directory = directory
        self.refuse = ""
        self.torn_down = False

    async def attach(self, container_id, netns_path, ports=(), *, chosen=None):
        if self.refuse:
            raise FailedPrecondition(self.refuse)
        self.directory.mkdir(exist_ok=True)
        path = self.directory / container_id
        if path.exists():
            raise AlreadyExists(f"{container_id} is attached")
        path.write_text(str(netns_path))
        endpoint = Endpoint(
            container_id=container_id,
            network="bridge",
            ip=IPv4Address("10.77.0.2"),
            prefix_length=16,
            gateway=IPv4Address("10.77.0.1"),
            mac="02:42:0a:4d:00:02",
            link="veth0",
            netns_path=netns_path,
            ports=tuple(
                PortMapping(p.container_port, p.host_port or 49153, p.host_ip or "0.0.0.0", "tcp")
                for p in ports
            ),
        )
        if chosen is not None:
            await chosen(endpoint)
        return endpoint

    async def detach(self, container_id, *, given_back=None):
        (self.directory / container_id).unlink(missing_ok=True)
        if given_back is not None:
            await given_back()

    async def restore(self, containers):
        for container_id in self.attached():
            if container_id not in containers:
                await self.detach(container_id)

    async def teardown_if_unused(self):
        self.torn_down = not self.attached()
        return self.torn_down

    def attached(self):
        return sorted(path.name for path in self.directory.glob("*"))
