"""runc, and the programs that speak its command line, crun first among them.

Arguments are lists, no shell is involved. Calls on one container share the log file of its bundle,
except ``exec``: several may run at once, so each has a log of its own, which is removed after.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from services.common import small_files, tracing
from services.common.errors import Unimplemented
from services.shim.runtimes import criu, exec_fifo, failures, programs, seccomp
from services.shim.runtimes.invocation import Outcome, run
from services.shim.runtimes.runtime import (
    RuntimeBroken,
    RuntimeFailed,
    RuntimeOptions,
    UnknownToRuntime,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path
    from typing import Any

    from services.common.errors import TheseusError
    from services.shim.reaper import Reaper
    from services.shim.runtimes.runtime import CheckpointRequest, RuntimeStdio

_PID_FILE_MAX_BYTES = 32
_NICENESS = 10  # sched(7): a tenth of the processor time of others, where there is not enough
_CRIU_FACTOR = 10  # all of a container's memory is written or read


class RuncRuntime:
    """One container's runtime (see :class:`~services.shim.runtimes.runtime.Runtime`)."""

    def __init__(
        self,
        container_id: str,
        options: RuntimeOptions,
        *,
        log_file: Path,
        reaper: Reaper,
        timeout_s: float,
    ) -> None:
        self.name = options.binary
        self._id = container_id
        self._options = options
        self._log_file = log_file
        self._reaper = reaper
        self._timeout_s = timeout_s
        self._program = programs.find(options.binary)
        self._to_keep: seccomp.Wanted | None = None

    def prepare(self, bundle: Path, spec: Mapping[str, Any]) -> None:
        """See :meth:`Runtime.prepare`."""
        self._to_keep = seccomp.prepare(
            bundle, spec, state=self._options.root, container_id=self._id, program=self._program
        )

    async def create(
        self, *, bundle: Path, pid_file: Path, stdio: RuntimeStdio | None, console: str
    ) -> int:
        """See :meth:`Runtime.create`."""
        arguments = ["create", "--bundle", str(bundle), "--pid-file", str(pid_file)]
        if console:
            arguments += ["--console-socket", console]
        if self._options.no_pivot_root:
            self._need("no-pivot", "leave pivot_root out")
            arguments.append("--no-pivot")
        if self._options.no_new_keyring and "no-new-keyring" not in self._program.lacks:
            arguments.append("--no-new-keyring")
        _remove(pid_file)
        await self._run([*arguments, self._id], stdio=stdio, classify=failures.classify_creation)
        if self._to_keep is not None:
            seccomp.keep(self._to_keep)
        return self._read_pid(pid_file)

    async def start(self) -> None:
        """See :meth:`Runtime.start`."""
        await self._run(["start", self._id], classify=failures.classify_creation)

    async def let_go(self) -> bool:
        """See :meth:`Runtime.let_go`."""
        if self._program.path.rpartition("/")[2] not in exec_fifo.PROGRAMS:
            return False
        with tracing.span("exec.fifo"):
            return await exec_fifo.let_go(self._options.root / self._id)

    async def exec(
        self, *, process_file: Path, pid_file: Path, stdio: RuntimeStdio | None, console: str
    ) -> int:
        """See :meth:`Runtime.exec`."""
        self._need("exec", "run one more process")
        arguments = ["exec", "--process", str(process_file), "--detach"]
        arguments += ["--pid-file", str(pid_file)]
        if console:
            arguments += ["--console-socket", console]
        _remove(pid_file)
        log_file = process_file.with_suffix(".log")
        try:
            await self._run(
                [*arguments, self._id],
                stdio=stdio,
                classify=failures.classify_creation,
                log_file=log_file,
            )
        finally:
            _remove(log_file)
        return self._read_pid(pid_file)

    async def kill(self, signum: int, *, all_processes: bool) -> None:
        """See :meth:`Runtime.kill`."""
        if all_processes:
            self._need("kill-all", "signal everything in a container")
        flags = ["--all"] if all_processes else []
        await self._run(["kill", *flags, self._id, str(signum)])

    async def pause(self) -> None:
        """See :meth:`Runtime.pause`."""
        self._need("pause", "pause a container")
        await self._run(["pause", self._id])

    async def resume(self) -> None:
        """See :meth:`Runtime.resume`."""
        await self._run(["resume", self._id])

    async def update(self, resources_file: Path) -> None:
        """See :meth:`Runtime.update`."""
        self._need("update", "change the limits of a container")
        await self._run(["update", "--resources", str(resources_file), self._id])

    async def delete(self, *, force: bool, hurry: bool = True) -> None:
        """See :meth:`Runtime.delete`."""
        flags = ["--force"] if force else []
        try:
            await self._run(["delete", *flags, self._id], hurry=hurry)
        except UnknownToRuntime:
            return

    async def checkpoint(self, request: CheckpointRequest) -> None:
        """See :meth:`Runtime.checkpoint`."""
        self._need("checkpoint", "checkpoint a container")
        arguments = ["checkpoint", "--image-path", str(request.image)]
        arguments += ["--work-path", str(request.work)]
        switches = {
            "--leave-running": request.leave_running,
            "--tcp-established": request.open_tcp,
            "--ext-unix-sk": request.external_unix_sockets,
            "--shell-job": request.terminal,
            "--file-locks": request.file_locks,
        }
        arguments += [switch for switch, wanted in switches.items() if wanted]
        for kind in request.empty_namespaces:
            arguments += ["--empty-ns", kind]
        if request.cgroups_mode:
            arguments += ["--manage-cgroups-mode", request.cgroups_mode]
        if request.parent is not None:
            arguments += ["--parent-path", str(request.parent)]
        await self._run_criu(arguments, request.work / criu.CHECKPOINT_LOG)

    async def restore(
        self,
        *,
        bundle: Path,
        pid_file: Path,
        stdio: RuntimeStdio | None,
        console: str,
        image: Path,
        work: Path,
    ) -> int:
        """See :meth:`Runtime.restore`."""
        self._need("checkpoint", "restore a container")
        arguments = ["restore", "--bundle", str(bundle), "--pid-file", str(pid_file), "--detach"]
        arguments += ["--image-path", str(image), "--work-path", str(work)]
        if console:
            arguments += ["--console-socket", console]
        if self._options.no_pivot_root:
            self._need("no-pivot", "leave pivot_root out")
            arguments.append("--no-pivot")
        if not self._program.path.rpartition("/")[2].startswith("crun"):
            # runc would make itself the subreaper, and init the orphan of nobody we know.
            arguments.append("--no-subreaper")
        _remove(pid_file)
        await self._run_criu(arguments, work / criu.RESTORE_LOG, stdio)
        return self._read_pid(pid_file)

    async def version(self) -> str:
        """See :meth:`Runtime.version`."""
        outcome = await run(
            self._reaper,
            [self._program.path, *self._program.arguments, "--version"],
            stdio=None,
            timeout_s=self._timeout_s,
        )
        if not outcome.succeeded:
            raise RuntimeBroken(f"runtime '{self.name}' {outcome.in_words()} on --version")
        return failures.bounded(outcome.output.partition("\n")[0])

    async def _run_criu(
        self, arguments: list[str], log: Path, stdio: RuntimeStdio | None = None
    ) -> None:
        try:
            await self._run(
                [*arguments, self._id], stdio=stdio, timeout_s=self._timeout_s * _CRIU_FACTOR
            )
        except RuntimeFailed as error:
            if not (reason := failures.bounded(criu.reason(log))):
                raise
            raise RuntimeFailed(f"{error.message}; criu says: {reason}") from error

    async def _run(
        self,
        arguments: list[str],
        *,
        stdio: RuntimeStdio | None = None,
        classify: Callable[[str, str], TheseusError] = failures.classify,
        log_file: Path | None = None,
        timeout_s: float | None = None,
        hurry: bool = True,
    ) -> None:
        log_file = log_file or self._log_file
        offset = log_file.stat().st_size if log_file.exists() else 0
        with tracing.span(f"{self._program.path.rpartition('/')[2]} {arguments[0]}"):
            outcome = await run(
                self._reaper,
                [
                    self._program.path,
                    *self._program.arguments,
                    *self._global_flags(log_file),
                    *arguments,
                ],
                stdio=stdio,
                timeout_s=timeout_s or self._timeout_s,
                niceness=0 if hurry else _NICENESS,
            )
        if outcome.succeeded:
            return
        said = failures.read_log(log_file, offset) or failures.bounded(outcome.output)
        raise self._failure(arguments[0], outcome, said, classify)

    def _failure(
        self,
        command: str,
        outcome: Outcome,
        said: str,
        classify: Callable[[str, str], TheseusError],
    ) -> TheseusError:
        what = f"runtime '{self.name}' failed to {command} container '{self._id}'"
        if outcome.timed_out or outcome.ended is None or outcome.ended.signal:
            tail = f"; its last words: {said}" if said else ""
            return RuntimeBroken(f"{what}: it {outcome.in_words()}{tail}")
        return classify(said, f"{what}: {said or 'it ' + outcome.in_words() + ' without a word'}")

    def _global_flags(self, log_file: Path) -> list[str]:
        flags = ["--root", str(self._options.root), "--log", str(log_file), "--log-format", "json"]
        if self._options.systemd_cgroup:
            self._need("systemd-cgroup", "have systemd make a cgroup")
            flags.append("--systemd-cgroup")
        return flags

    def _need(self, capability: str, what: str) -> None:
        if capability in self._program.lacks:
            raise Unimplemented(f"runtime '{self.name}' cannot {what}")

    def _read_pid(self, pid_file: Path) -> int:
        try:
            text = small_files.read(str(pid_file), _PID_FILE_MAX_BYTES).strip()
        except OSError as error:
            raise RuntimeBroken(
                f"runtime '{self.name}' reported success without writing {pid_file}"
            ) from error
        if not text.isdigit() or int(text) <= 1:
            raise RuntimeBroken(f"runtime '{self.name}' wrote no process id to {pid_file}")
        return int(text)


def _remove(path: Path) -> None:
    path.unlink(missing_ok=True)
