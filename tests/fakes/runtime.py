"""A fake OCI runtime: an executable with runc's command line that runs plain processes.

``install(directory)`` writes the executable and returns a :class:`FakeRuntime`, which makes
commands fail on demand and tells which were called. A "container" is a process on the host:
``create`` forks it, it waits on a FIFO as runc's init does, ``start`` lets it execute the spec's
arguments.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from pathlib import Path


class FakeRuntime:
    """Handle on an installed fake."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.path = directory / "fake-runtime"

    def fail(self, command, *, message="", exit_code=1, hang=False, die=0, garbage=0, lie=""):
        """Make ``command`` fail from now on.

        message: logged as runc does; hang: never answer; die: end by this signal; garbage: print
        so many bytes first; lie: "no-pid" or "bad-pid": succeed without a usable pid file.
        """
        fault = {
            "message": message,
            "exit_code": exit_code,
            "hang": hang,
            "die": die,
            "garbage": garbage,
            "lie": lie,
        }
        (self.directory / f"fault-{command}.json").write_text(json.dumps(fault))

    def hold(self, command):
        """Let ``command`` wait for ``release`` before it does anything."""
        (self.directory / f"hold-{command}").touch()

    def release(self, command):
        """Let those go on that wait, and hold no more."""
        (self.directory / f"hold-{command}").unlink()

    def heal(self, command):
        """Let ``command`` work again."""
        (self.directory / f"fault-{command}.json").unlink(missing_ok=True)

    def leave_filter(self, data):
        """Leave ``data`` as the compiled seccomp filter of the containers to come, as crun does."""
        (self.directory / "seccomp.bpf").write_bytes(data)

    def fail_criu(self, log):
        """Have checkpoint and restore fail, and leave ``log`` as criu's."""
        (self.directory / "criu-fails").write_text(log)

    def calls(self):
        """Command lines so far, without global flags."""
        path = self.directory / "calls"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def install(directory: Path) -> FakeRuntime:
    """Write the executable into ``directory``."""
    directory.mkdir(parents=True, exist_ok=True)
    fake = FakeRuntime(directory)
    fake.path.write_text(
        f"#!{sys.executable} -IS\n"
        f"import sys\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        f"import runtime\n"
        f"sys.exit(runtime.main(sys.argv[1:], {str(directory)!r}))\n"
    )
    fake.path.chmod(0o755)
    return fake


class Failure(Exception):
    pass


def main(arguments, directory):
    if arguments == ["--version"]:
        print("fake-runtime version 1.0")  # noqa: T201
        return 0
    flags, arguments = parse_global(arguments)
    command, *rest = arguments
    with (Path(directory) / "calls").open("a") as calls:
        calls.write(json.dumps([command, *rest]) + "\n")
    while (Path(directory) / f"hold-{command}").exists():
        time.sleep(0.002)
    try:
        fault = load_fault(directory, command)
        if fault:
            inject(fault, flags["--log"])
        options, names = parse_options(rest)
        state = Path(flags["--root"]) / names[0]
        COMMANDS[command](state, options, names, (fault or {}).get("lie", ""))
    except Failure as failure:
        log(flags["--log"], str(failure))
        sys.stderr.write(str(failure) + "\n")
        return 1
    return 0


def parse_global(arguments):
    flags = {}
    while arguments and arguments[0].startswith("--"):
        if arguments[0] == "--systemd-cgroup":
            arguments = arguments[1:]
            continue
        flags[arguments[0]] = arguments[1]
        arguments = arguments[2:]
    return flags, arguments


def parse_options(rest):
    options, names = {}, []
    switches = {
        "--all",
        "--detach",
        "--ext-unix-sk",
        "--file-locks",
        "--force",
        "--leave-running",
        "--no-new-keyring",
        "--no-pivot",
        "--no-subreaper",
        "--shell-job",
        "--tcp-established",
    }
    while rest:
        if rest[0] in switches:
            options[rest[0]] = "1"
            rest = rest[1:]
        elif rest[0].startswith("--"):
            options[rest[0]] = rest[1]
            rest = rest[2:]
        else:
            names.append(rest[0])
            rest = rest[1:]
    return options, names


def load_fault(directory, command):
    try:
        return json.loads((Path(directory) / f"fault-{command}.json").read_text())
    except FileNotFoundError:
        return None


def inject(fault, log_file):
    if fault["garbage"]:
        sys.stdout.write("\0\xff{garbage" * (fault["garbage"] // 10))
        sys.stdout.flush()
    if fault["message"]:
        log(log_file, fault["message"])
    if fault["hang"]:
        time.sleep(3600)
    if fault["die"]:
        os.kill(os.getpid(), fault["die"])
    if not fault["lie"]:
        sys.exit(fault["exit_code"])


def log(path, message):
    with Path(path).open("a") as file:
        file.write(json.dumps({"level": "error", "msg": message, "time": "x"}) + "\n")


def create(state, options, names, lie):
    if state.exists():
        raise Failure(f"container with id exists: {names[0]}")
    bundle = Path(options["--bundle"])
    spec = json.loads((bundle / "config.json").read_text())
    state.mkdir(parents=True)
    compiled = directory_of_fake() / "seccomp.bpf"
    if compiled.exists():
        (state / "seccomp.bpf").write_bytes(compiled.read_bytes())
    os.mkfifo(state / "start")
    pid = spawn(spec["process"], options, state / "start")
    (state / "state.json").write_text(json.dumps({"pid": pid, "status": "created"}))
    write_pid(options["--pid-file"], pid, lie)


def directory_of_fake():
    return Path(sys.argv[0]).parent


def spawn(process, options, gate=None):
    check_command(process["args"][0])
    slave = open_console(options["--console-socket"]) if "--console-socket" in options else -1
    pid = os.fork()
    if pid:
        return pid
    try:
        os.setsid()
        if slave >= 0:
            import fcntl
            import termios

            fcntl.ioctl(slave, termios.TIOCSCTTY, 0)
            for fd in range(3):
                os.dup2(slave, fd)
        if gate is not None:
            os.close(os.open(gate, os.O_RDONLY))
        environment = dict(pair.split("=", 1) for pair in process.get("env") or ())
        os.execvpe(process["args"][0], process["args"], {"PATH": os.defpath, **environment})
    finally:
        os._exit(127)


def check_command(command):
    if "/" in command and not Path(command).exists():
        raise Failure(
            "runc create failed: unable to start container process: "
            f'exec: "{command}": stat {command}: no such file or directory'
        )
    if "/" in command and not os.access(command, os.X_OK):
        raise Failure(f'exec: "{command}": permission denied')


def open_console(path):
    master, slave = os.openpty()
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.connect(path)
    socket.send_fds(connection, [b"tty"], [master])
    connection.close()
    os.close(master)
    return slave


def write_pid(path, pid, lie):
    if lie == "no-pid":
        return
    Path(path).write_text("garbage" if lie == "bad-pid" else str(pid))


def load(state):
    try:
        return json.loads((state / "state.json").read_text())
    except FileNotFoundError:
        raise Failure("container does not exist") from None


def start(state, options, names, lie):
    known = load(state)
    if known["status"] != "created":
        raise Failure("cannot start an already running container")
    open_gate(state / "start", known["pid"])
    (state / "state.json").write_text(json.dumps({**known, "status": "running"}))


def open_gate(gate, pid):
    """Let the waiting process go; on a busy machine it may not have come to the gate yet."""
    while True:
        try:
            os.close(os.open(gate, os.O_WRONLY | os.O_NONBLOCK))
        except OSError:
            if not is_alive(pid):
                raise Failure("cannot start a container that has stopped") from None
            time.sleep(0.002)
        else:
            return


def is_alive(pid):
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] not in "ZX"


def execute(state, options, names, lie):
    load(state)
    process = json.loads(Path(options["--process"]).read_text())
    write_pid(options["--pid-file"], spawn(process, options), lie)


def kill(state, options, names, lie):
    try:
        os.kill(load(state)["pid"], int(names[1]))
    except ProcessLookupError:
        raise Failure("os: process already finished") from None


def pause(state, options, names, lie):
    os.kill(load(state)["pid"], signal.SIGSTOP)


def resume(state, options, names, lie):
    os.kill(load(state)["pid"], signal.SIGCONT)


def update(state, options, names, lie):
    load(state)
    json.loads(Path(options["--resources"]).read_text())


def delete(state, options, names, lie):
    pid = load(state)["pid"]
    alive = is_alive(pid)
    if alive and "--force" not in options:
        raise Failure(f"cannot delete container {names[0]} that is not stopped: running")
    if alive:
        os.kill(pid, signal.SIGKILL)
    for entry in state.iterdir():
        entry.unlink()
    state.rmdir()


def checkpoint(state, options, names, lie):
    known = load(state)
    image = Path(options["--image-path"])
    image.mkdir(parents=True, exist_ok=True)
    failure = directory_of_fake() / "criu-fails"
    if failure.exists():
        (Path(options["--work-path"]) / "dump.log").write_text(failure.read_text())
        raise Failure("criu failed: type DUMP errno 0\nlog file: dump.log")
    (image / "image.json").write_text(json.dumps({"options": sorted(options)}))
    if "--leave-running" not in options:
        os.kill(known["pid"], signal.SIGKILL)


def restore(state, options, names, lie):
    failure = directory_of_fake() / "criu-fails"
    if failure.exists():
        (Path(options["--work-path"]) / "restore.log").write_text(failure.read_text())
        raise Failure("criu failed: type RESTORE errno 0\nlog file: restore.log")
    json.loads((Path(options["--image-path"]) / "image.json").read_text())
    spec = json.loads((Path(options["--bundle"]) / "config.json").read_text())
    state.mkdir(parents=True)
    pid = spawn(spec["process"], options)
    (state / "state.json").write_text(json.dumps({"pid": pid, "status": "running"}))
    write_pid(options["--pid-file"], pid, lie)


COMMANDS = {
    "checkpoint": checkpoint,
    "restore": restore,
    "create": create,
    "start": start,
    "exec": execute,
    "kill": kill,
    "pause": pause,
    "resume": resume,
    "update": update,
    "delete": delete,
}
