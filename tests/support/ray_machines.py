"""A real Ray cluster whose machines are all this one: each node has a raylet of its own, and can be lost on its own."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest import mock

import psutil

from support.children import eventually

_WORKER = "ray::NodeWorker"


class RayMachines:
    """``address`` for ``--cluster``; nodes with one processor, so that each has one worker."""

    def __init__(self, cluster: Any) -> None:
        self._cluster = cluster
        self.address: str = cluster.address
        self.nodes: list[Any] = []

    def add(self, env: Mapping[str, str] | None = None) -> Any:
        """Add a machine; ``env``: what its processes find in the environment besides ours."""
        with mock.patch.dict(os.environ, env or {}):
            node = self._cluster.add_node(num_cpus=1, object_store_memory=100 << 20)
        self.nodes.append(node)
        return node

    def remove(self, node: Any) -> None:
        """Let a machine vanish: its processes are killed."""
        self._cluster.remove_node(node, allow_graceful=False)
        self.nodes.remove(node)

    def workers(self) -> list[psutil.Process]:
        """The processes of workers that a driver has started."""
        found = []
        for raylet in _raylets(self.nodes):
            for child in raylet.children(recursive=True):
                try:
                    if child.cmdline()[:1] and child.cmdline()[0].startswith(_WORKER):
                        found.append(child)
                except psutil.Error:
                    continue
        return found

    def computing(self) -> list[psutil.Process]:
        """Those of them that have a child process computing."""
        return [worker for worker in self.workers() if worker.is_running() and worker.children()]

    def kill_one(self, seconds: float = 60.0) -> None:
        """SIGKILL a worker that is computing, as soon as there is one."""
        assert eventually(lambda: bool(self.computing()), seconds=seconds)
        self.computing()[0].kill()


def _raylets(nodes: list[Any]) -> Iterator[psutil.Process]:
    for node in nodes:
        for name, processes in node.all_processes.items():
            if name == "raylet":
                for each in processes:
                    if psutil.pid_exists(each.process.pid):
                        yield psutil.Process(each.process.pid)


@contextmanager
def ray_machines(count: int) -> Iterator[RayMachines]:
    """A cluster of ``count`` nodes, and one that has no processor to give, which keeps its state."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from ray.cluster_utils import Cluster

        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": 100 << 20})
        try:
            machines = RayMachines(cluster)
            for _ in range(count):
                machines.add()
            yield machines
        finally:
            cluster.shutdown()
