"""The options of ``run`` and ``create``, and the container's configuration that they make."""

from __future__ import annotations

from typing import TYPE_CHECKING

from protos.theseus.engine.v1 import containers_pb2 as pb
from services.cli import values
from services.cli.parser import UsageError

if TYPE_CHECKING:
    from argparse import Namespace

    from services.cli.parser import Parser

PULL_POLICIES = ("missing", "always", "never")


def add_options(parser: Parser) -> None:
    """Declare the options."""
    flag, option, many = parser.flag, parser.option, parser.many
    flag("-i", "--interactive", help="pass our standard input on")
    flag("-t", "--tty", help="give it a terminal")
    flag("--rm", help="remove it when it has exited")
    flag("--read-only", help="mount its root file system read-only")
    flag("--privileged", help="give it all that root has")
    option("--name", metavar="NAME", help="what to call it")
    many("-e", "--env", metavar="NAME[=VALUE]", help="set a variable")
    many("--env-file", metavar="FILE", help="set the variables that a file has")
    option("-w", "--workdir", metavar="DIR", help="working directory")
    option("-u", "--user", metavar="USER[:GROUP]", help="user, by name or number")
    many("-v", "--volume", metavar="[SRC:]DST[:ro]", help="mount a directory or a volume")
    many("--mount", metavar="type=...", help="mount, in key=value pairs")
    many("--tmpfs", metavar="DST[:OPTIONS]", help="mount a tmpfs")
    option("--network", "--net", metavar="MODE", help="none, host or bridge (bridge)")
    many("-p", "--publish", metavar="[[IP:]HOST:]PORT[/PROTO]", help="publish a port")
    option("-m", "--memory", metavar="SIZE", help="limit of memory, such as 64m")
    option("--cpus", metavar="NUMBER", help="limit of processors, such as 0.5")
    option("-c", "--cpu-shares", metavar="N", help="relative weight (1024)")
    option("--pids-limit", metavar="N", help="limit of processes")
    parser.add_argument("--entrypoint", metavar="COMMAND", help="replace the image's entrypoint")
    option("-h", "--hostname", metavar="NAME", help="host name")
    many("-l", "--label", metavar="KEY[=VALUE]", help="a label")
    many("--cap-add", metavar="CAP", help="give it a capability")
    many("--cap-drop", metavar="CAP", help="take a capability away")
    many("--security-opt", metavar="OPTION", help="such as no-new-privileges")
    option("--runtime", metavar="NAME", help="OCI runtime")
    option("--stop-signal", metavar="SIGNAL", help="what stop sends (SIGTERM)")
    option("--stop-timeout", metavar="SECONDS", help="from that signal to SIGKILL (10)")
    parser.add_argument(
        "--pull",
        choices=PULL_POLICIES,
        default="missing",
        help="when to pull the image: missing, always, never (missing)",
    )
    parser.words("words", at_least=1, options_end=True)


def container_config(options: Namespace) -> pb.ContainerConfig:
    """The configuration.

    Raises:
        UsageError: a value makes no sense.
    """
    try:
        return _container_config(options)
    except (ValueError, OverflowError) as error:  # what protobuf says to a number past 64 bits
        raise UsageError(f"a number is out of range: {error}") from None


def _container_config(options: Namespace) -> pb.ContainerConfig:
    image, *command = options.words
    if not image:
        raise UsageError("the image's name is empty")
    config = pb.ContainerConfig(
        image=image,
        command=command,
        # An empty one takes the image's away.
        entrypoint=[] if options.entrypoint is None else [options.entrypoint],
        env=values.environment(options.env, options.env_file),
        working_dir=options.workdir,
        user=options.user,
        tty=options.tty,
        open_stdin=options.interactive,
        hostname=options.hostname,
        labels=values.labels(options.label),
        network_mode=options.network,
        auto_remove=options.rm,
        stop_signal=options.stop_signal,
        read_only=options.read_only,
        runtime=options.runtime,
        privileged=options.privileged,
        cap_add=options.cap_add,
        cap_drop=options.cap_drop,
        security_opt=options.security_opt,
        resources=_resources(options),
    )
    for text in options.volume:
        config.mounts.append(values.volume(text))
    for text in options.mount:
        config.mounts.append(values.mount(text))
    for text in options.tmpfs:
        config.mounts.append(values.tmpfs(text))
    for text in options.publish:
        config.ports.extend(values.ports(text))
    if options.stop_timeout:
        config.stop_timeout.FromSeconds(values.number(options.stop_timeout, "--stop-timeout"))
    return config


def _resources(options: Namespace) -> pb.Resources:
    resources = pb.Resources()
    if options.memory:
        resources.memory_bytes = values.size(options.memory)
    if options.cpus:
        resources.nano_cpus = values.nano_cpus(options.cpus)
    if options.pids_limit:
        # docker's -1 is no limit
        resources.pids_limit = max(values.number(options.pids_limit, "--pids-limit"), 0)
    if options.cpu_shares:
        shares = values.number(options.cpu_shares, "--cpu-shares")
        if shares < 0:
            raise UsageError(f"'{options.cpu_shares}' is not a weight: it is 2 or more")
        resources.cpu_shares = shares
    return resources
