"""A model of the task API, and a machine that holds a shim against it call by call.

One container and one exec process are created, started, paused, killed and deleted in any order.
The model knows each call's outcome, the states after it, and the events that it leaves behind.
"""

from __future__ import annotations

import asyncio
import signal
from contextlib import AsyncExitStack

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from protos.containerd.task.v3 import shim_pb2
from protos.containerd.types.task import task_pb2
from services.common import errors

NONE, CREATED, RUNNING, PAUSED, STOPPED = "none", "created", "running", "paused", "stopped"
STATUSES = {
    CREATED: task_pb2.CREATED,
    RUNNING: task_pb2.RUNNING,
    PAUSED: task_pb2.PAUSED,
    STOPPED: task_pb2.STOPPED,
}
EXEC = "e"
FAULTS = {
    "message": ({"message": "it will not"}, errors.FailedPrecondition),
    "die": ({"die": signal.SIGSEGV}, errors.Internal),
    "garbage": ({"garbage": 5000}, errors.FailedPrecondition),
}
LIES = {
    **FAULTS,
    "no-pid": ({"lie": "no-pid"}, errors.Internal),
    "bad-pid": ({"lie": "bad-pid"}, errors.Internal),
}
CAN_FAIL = ("create", "start", "pause", "resume", "start_exec")
ACTIONS = [*CAN_FAIL, "kill", "delete", "add_exec", "kill_exec", "delete_exec", "resize", "pids"]
LIKELY = {
    NONE: ["create"],
    CREATED: ["start", "start", "add_exec", "start_exec", "delete"],
    RUNNING: ["add_exec", "start_exec", "pause", "kill_exec", "delete_exec", "kill"],
    PAUSED: ["resume", "resume", "add_exec", "kill"],
    STOPPED: ["delete", "delete_exec", "add_exec"],
}
KILLED = 128 + signal.SIGKILL


class Stage:
    """What a machine plays on.

    Attributes:
        registry: the fake containerd.
        fake: the fake runtime, whose commands can be made to fail; None: a real one.
    """

    fake = None
    registry = None

    async def open(self, stack: AsyncExitStack):
        """A shim whose container is not created yet; what it needs is closed with ``stack``."""
        raise NotImplementedError

    def create_arguments(self) -> dict:
        """For the shim's ``create``."""
        raise NotImplementedError


class TaskMachine(RuleBasedStateMachine):
    """See the module. A subclass has a ``make_stage``."""

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.stack = AsyncExitStack()
        self.stage = self.make_stage()
        self.shim = self.run(self.stage.open(self.stack))
        self.init = self.exec = NONE
        self.exec_status = 0
        self.events: list[str] = []

    def make_stage(self) -> Stage:
        raise NotImplementedError

    def run(self, work):
        return self.runner.run(work)

    def expect(self, work, kind=None):
        """Await a call; ``kind`` is how it has to fail, None that it has to succeed."""

        async def call():
            try:
                await work
            except errors.TheseusError as error:
                return error
            return None

        error = self.run(call())
        assert type(error) is (kind or type(None)), f"expected {kind}, got {error!r}"

    def runtime_call(self, command, work, fault, table=FAULTS):
        """A call that has to succeed, unless the runtime is told to fail; says which it was."""
        if self.stage.fake is None or fault is None:
            self.expect(work)
            return True
        faults, kind = table[fault]
        self.stage.fake.fail(command, **faults)
        try:
            self.expect(work, kind)
        finally:
            self.stage.fake.heal(command)
        return False

    @rule(data=st.data())
    def step(self, data):
        """One call: one that can succeed, more often than not."""
        action = data.draw(st.sampled_from(LIKELY[self.init] * 3 + ACTIONS), label="action")
        if action not in CAN_FAIL:
            getattr(self, action)()
            return
        faults = LIES if action == "create" else FAULTS
        fault = data.draw(st.sampled_from([None, None, None, *faults]), label="fault")
        getattr(self, action)(fault)

    def create(self, fault):
        call = self.shim.create(**self.stage.create_arguments())
        if self.init != NONE:
            self.expect(call, errors.AlreadyExists)
        elif self.runtime_call("create", call, fault, LIES):
            self.init = CREATED
            self.events.append("/tasks/create")

    def start(self, fault):
        call = self.shim.start()
        if self.init != CREATED:
            self.expect(call, self.refusal())
        elif self.runtime_call("start", call, fault):
            self.init = RUNNING
            self.events.append("/tasks/start")

    def pause(self, fault):
        call = self.shim.call("Pause", shim_pb2.PauseRequest(id=self.shim.id))
        if self.init != RUNNING:
            self.expect(call, self.refusal())
        elif self.runtime_call("pause", call, fault):
            self.init = PAUSED
            self.events.append("/tasks/paused")

    def resume(self, fault):
        call = self.shim.call("Resume", shim_pb2.ResumeRequest(id=self.shim.id))
        if self.init != PAUSED:
            self.expect(call, self.refusal())
        elif self.runtime_call("resume", call, fault):
            self.init = RUNNING
            self.events.append("/tasks/resumed")

    def kill(self):
        if self.init in (NONE, STOPPED):
            self.expect(self.shim.kill(), errors.NotFound)
            return
        self.end_exec_as_the_kernel_does()
        self.expect(self.shim.kill())
        ended = self.run(self.shim.wait())
        assert ended.exit_status == KILLED
        self.note_end_of_exec()
        self.init = STOPPED
        self.events.append("/tasks/exit")

    def delete(self):
        if self.init in (RUNNING, PAUSED):
            self.expect(self.shim.delete(), errors.FailedPrecondition)
        elif self.init == NONE:
            self.expect(self.shim.delete(), errors.NotFound)
        else:
            if self.init == CREATED:
                self.end_exec_as_the_kernel_does()
                self.note_end_of_exec()
                self.events.append("/tasks/exit")
            answer = self.run(self.shim.delete())
            assert answer.exit_status == KILLED
            self.events.append("/tasks/delete")
            self.init = self.exec = NONE

    def add_exec(self):
        call = self.shim.call("Exec", self.exec_request())
        if self.exec != NONE:
            self.expect(call, errors.AlreadyExists)
        elif self.init in (CREATED, RUNNING):
            self.expect(call)
            self.exec = CREATED
            self.events.append("/tasks/exec-added")
        else:
            self.expect(call, self.refusal())

    def start_exec(self, fault):
        # runc and crun start no process in a container whose init has not begun.
        if self.stage.fake is None and self.init == CREATED:
            return
        call = self.shim.start(EXEC)
        if self.exec == NONE:
            self.expect(call, errors.NotFound)
        elif self.exec != CREATED or self.init not in (CREATED, RUNNING):
            self.expect(call, errors.FailedPrecondition)
        elif self.runtime_call("exec", call, fault):
            self.exec = RUNNING
            self.events.append("/tasks/exec-started")

    def kill_exec(self):
        # A frozen container's processes die once it thaws.
        if self.stage.fake is None and self.init == PAUSED:
            return
        if self.exec == RUNNING:
            self.end_exec()
            self.note_end_of_exec()
        else:
            kind = errors.FailedPrecondition if self.exec == CREATED else errors.NotFound
            self.expect(self.shim.kill(exec_id=EXEC), kind)

    def delete_exec(self):
        if self.exec == NONE:
            self.expect(self.shim.delete(EXEC), errors.NotFound)
        elif self.exec == RUNNING:
            self.expect(self.shim.delete(EXEC), errors.FailedPrecondition)
        else:
            self.expect(self.shim.delete(EXEC))
            self.exec = NONE

    def resize(self):
        request = shim_pb2.ResizePtyRequest(id=self.shim.id, width=80, height=25)
        self.expect(self.shim.call("ResizePty", request), self.refusal())

    def pids(self):
        call = self.shim.call("Pids", shim_pb2.PidsRequest(id=self.shim.id))
        if self.init == NONE:
            self.expect(call, errors.NotFound)
            return
        found = {process.pid for process in self.run(call).processes}
        assert self.run(self.shim.state()).pid in found

    @invariant()
    def states_are_the_models(self):
        for exec_id, state in (("", self.init), (EXEC, self.exec)):
            if state == NONE:
                self.expect(self.shim.state(exec_id), errors.NotFound)
                continue
            answer = self.run(self.shim.state(exec_id))
            shown = PAUSED if self.init == PAUSED and state == RUNNING else state
            assert answer.status == STATUSES[shown], (exec_id, state, answer.status)
            assert answer.exit_status == (KILLED if state == STOPPED else 0)

    def teardown(self):
        try:
            if self.init in (RUNNING, PAUSED):
                self.kill()
            if self.init != NONE:
                self.delete()
            self.run(self.stage.registry.wait_for(lambda r: len(r.events) >= len(self.events)))
            assert self.stage.registry.topics() == self.events
        finally:
            self.run(self.stack.aclose())
            self.runner.close()

    def refusal(self):
        """How a call fails that the container's state forbids, or that finds no container."""
        return errors.NotFound if self.init == NONE else errors.FailedPrecondition

    def end_exec_as_the_kernel_does(self):
        """The fake has no pid namespace whose end would end the exec process."""
        if self.exec == RUNNING and self.stage.fake is not None:
            self.end_exec()

    def end_exec(self):
        self.expect(self.shim.kill(exec_id=EXEC))
        assert self.run(self.shim.wait(EXEC)).exit_status == KILLED

    def note_end_of_exec(self):
        if self.exec == RUNNING:
            self.exec = STOPPED
            self.events.append("/tasks/exit")

    def exec_request(self):
        return self.shim.exec_request(EXEC, ["/bin/sleep", "1000"])
