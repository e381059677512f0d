"""The task API in any order with real containers, held against the model of the fake ones."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.fakes.task_machine import Stage, TaskMachine
from tests.integration.test_shim import Node, factory, rootfs, runtime  # noqa: F401 - fixtures

pytestmark = pytest.mark.root

SETTINGS = settings(
    max_examples=8,
    stateful_step_count=20,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)


class RealStage(Stage):
    def __init__(self, node) -> None:
        self._node = node
        self.registry = node.registry

    async def open(self, stack):
        await stack.enter_async_context(self._node)
        return await self._node.shim("/bin/sleep", "1000")

    def create_arguments(self):
        return {"binary": self._node.runtime, "rootfs": self._node.mounts()}


def test_any_order_of_calls_goes_as_the_model_says(factory, runtime, rootfs, tmp_path):  # noqa: F811
    numbers = itertools.count()

    class Machine(TaskMachine):
        def make_stage(self):
            directory = tmp_path / f"{runtime}{next(numbers)}"
            directory.mkdir()
            return RealStage(Node(factory, runtime, rootfs, directory))

    run_state_machine_as_test(Machine, settings=SETTINGS)
