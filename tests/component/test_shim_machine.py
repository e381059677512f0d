"""The task API in any order, held against a model, with a runtime that fails on demand."""

from __future__ import annotations

import itertools

from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.fakes.registry_server import FakeRegistry
from tests.fakes.runtime import install
from tests.fakes.shim_harness import ShimMaker, plain_spec
from tests.fakes.task_machine import Stage, TaskMachine

SETTINGS = settings(
    max_examples=12,
    stateful_step_count=30,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)


class FakeStage(Stage):
    def __init__(self, factory, directory) -> None:
        self.fake = install(directory / "fake")
        self._factory = factory
        self._directory = directory

    async def open(self, stack):
        maker = await stack.enter_async_context(ShimMaker(self._factory, self._directory))
        self.registry = FakeRegistry(maker.registry_socket)
        await self.registry.start()
        stack.push_async_callback(self.registry.stop)
        return await maker.start(maker.bundle(plain_spec("/bin/sleep", "1000")))

    def create_arguments(self):
        return {"binary": self.fake.path}


def test_any_order_of_calls_goes_as_the_model_says(factory, tmp_path):
    numbers = itertools.count()

    class Machine(TaskMachine):
        def make_stage(self):
            directory = tmp_path / str(next(numbers))
            directory.mkdir()
            return FakeStage(factory, directory)

    run_state_machine_as_test(Machine, settings=SETTINGS)
