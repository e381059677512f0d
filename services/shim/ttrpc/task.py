"""The task API over ttrpc, and what a bundle has to tell ``delete`` should this shim die.

<bundle>/task.json    written before the container is made: runtime, its state root, shim's home
         ended        written once it is deleted (see ``ending.py``)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import structlog

from protos.containerd.task.v3 import shim_pb2
from services.common.ttrpc.server import Method
from services.shim.bundle import Bundle
from services.shim.rpc.task_api import TaskApi, create_request
from services.shim.ttrpc import ending

if TYPE_CHECKING:
    from pathlib import Path

    from services.shim.tasks import Tasks

log = structlog.get_logger(__name__)

TASK_FILE = "task.json"
# v2 has the same messages: there is one implementation.
_NAMES = ("containerd.task.v2.Task", "containerd.task.v3.Task")


class StockTaskApi(TaskApi):
    """The task API, keeping bundles ready for ``delete``.

    Args:
        tasks: the containers.
        home: bundle with the state file and the spool of this shim.
    """

    def __init__(self, tasks: Tasks, *, home: Path) -> None:
        super().__init__(tasks)
        self._home = home

    async def Create(
        self, request: shim_pb2.CreateTaskRequest, context: object = None
    ) -> shim_pb2.CreateTaskResponse:
        """See :meth:`TaskApi.Create`."""
        create = create_request(request)
        options = self._tasks.complete(create.options)
        if create.bundle.is_dir():
            Bundle(create.bundle).write(
                TASK_FILE,
                {
                    "runtime": options.binary,
                    "runtime_root": str(options.root),
                    "home": str(self._home),
                },
            )
        return await super().Create(request, context)

    async def Delete(
        self, request: shim_pb2.DeleteRequest, context: object = None
    ) -> shim_pb2.DeleteResponse:
        """See :meth:`TaskApi.Delete`."""
        bundle = self._tasks.container(request.id).bundle.path
        response = await super().Delete(request, context)
        if not request.exec_id:
            exited_at_ns = response.exited_at.ToNanoseconds()
            try:
                ending.write(
                    str(bundle), ending.Ending(response.pid, response.exit_status, exited_at_ns)
                )
            except OSError as error:
                log.warning("ending cannot be kept", bundle=str(bundle), error=error.strerror)
        return response


def services(api: TaskApi) -> dict[str, dict[str, Method]]:
    """The methods of ``api``, under both names of the service."""
    descriptor: Any = shim_pb2.DESCRIPTOR.services_by_name["Task"]
    methods = {
        method.name: Method(getattr(shim_pb2, method.input_type.name), getattr(api, method.name))
        for method in descriptor.methods
    }
    return dict.fromkeys(_NAMES, methods)
