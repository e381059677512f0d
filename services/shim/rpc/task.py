"""Serves containerd.task.v3.Task over gRPC, and v2, whose messages are the same."""

from __future__ import annotations

from protos.containerd.task.v3 import shim_pb2_grpc
from services.shim.rpc.task_api import TaskApi


class TaskService(TaskApi, shim_pb2_grpc.TaskServicer):
    """The task API of one shim (see :class:`~services.shim.rpc.task_api.TaskApi`)."""
