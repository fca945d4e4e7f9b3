"""The connection to a Ray cluster. No other module imports ray.

Ray places workers, restarts them, notices lost machines, and moves objects. What is decided here is which unit goes to which
worker (:mod:`~imatrix_runner.cluster.unit_queue`).
"""

from __future__ import annotations

import logging
import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from imatrix_runner.cluster.cluster_options import ClusterOptions
from imatrix_runner.cluster.cluster_workers import ClusterWorkers
from imatrix_runner.cluster.node_facts import share_of_processors
from imatrix_runner.cluster.spreading import phrase
from imatrix_runner.environment import neutral_directory
from imatrix_runner.errors import ToolchainError
from imatrix_runner.events import Sink
from imatrix_runner.extras import RAY
from imatrix_runner.signals import Stop, handlers_kept

_ANSWER_SECONDS = 10.0

_OBJECTS = 512 << 20
"""Bytes of the object store of ``local:N``, which needs room for a few results at a time."""


@contextmanager
def connected(options: ClusterOptions, sink: Sink, stop: Stop) -> Iterator[ClusterWorkers]:
    """Connect to the cluster (``local:N`` starts one on this machine), and disconnect at the end. Where this process is
    connected already, that connection is used.

    Raises :class:`ToolchainError` without Ray, for a cluster that cannot be reached, and for one of another version of Ray or
    Python.
    """
    RAY.require("--cluster")
    # Read when ray is imported. It would print its machines' messages to this program's stdout, and report its use.
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", "(?s).*")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray
    import ray.util.scheduling_strategies

    mine = not ray.is_initialized()
    if mine:
        _initialise(ray, options)
    workers = ClusterWorkers(ray, options, sink, stop)
    try:
        yield workers
    finally:
        workers.close()
        if mine:
            ray.shutdown()


def _initialise(ray: Any, options: ClusterOptions) -> None:
    logging.getLogger("ray").setLevel(logging.CRITICAL)
    _require_answer(options)
    quiet = {"log_to_driver": False, "logging_level": logging.CRITICAL, "configure_logging": False}
    try:
        with _neutral(), handlers_kept(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what they say is in the error
            if options.local_workers is not None:
                cpus = options.local_workers * (options.cpus_per_worker or share_of_processors(options.local_workers))
                ray.init(
                    address="local",  # never a cluster that happens to run here
                    num_cpus=cpus,
                    include_dashboard=False,
                    object_store_memory=_OBJECTS,
                    _node_ip_address="127.0.0.1",
                    **quiet,
                )
            else:
                ray.init(address=options.address, **quiet)
    except (ConnectionError, TimeoutError, RuntimeError, ValueError, OSError) as error:
        text = phrase(error)
        if "version" in text.lower():
            raise ToolchainError(
                f"The Ray cluster at {options.address} has another version",
                text,
                "Install the same versions of Python and ray everywhere (here: ray "
                f"{ray.__version__}), then run the same command again.",
            ) from error
        raise _unreachable(options, text) from error


def _require_answer(options: ClusterOptions) -> None:
    """Raise :class:`ToolchainError` where nothing listens: Ray itself would try for minutes."""
    if options.endpoint is None:
        return
    try:
        socket.create_connection(options.endpoint, timeout=_ANSWER_SECONDS).close()
    except OSError as error:
        raise _unreachable(options, f"nothing answers there ({error.strerror or error})") from error


def _unreachable(options: ClusterOptions, why: str) -> ToolchainError:
    return ToolchainError(
        f"The Ray cluster at {options.address} cannot be reached",
        why,
        "Start one with: ray start --head   (or use --cluster local:2 for two workers on this machine)",
    )


@contextmanager
def _neutral() -> Iterator[None]:
    """Ray lets workers import modules from the driver's working directory, which may hold anyone's files."""
    before = Path.cwd()
    os.chdir(neutral_directory())
    try:
        yield
    finally:
        os.chdir(before)
