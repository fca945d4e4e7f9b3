"""What ``--cluster`` takes."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from imatrix_runner.errors import UsageError
from imatrix_runner.fingerprints import harmless

_SAME = harmless("where work is done does not change its result")
_LOCAL = re.compile(r"local:([1-9]\d{0,3})")
_CLIENT = re.compile(r"ray://[^\s/:]+(?::\d{1,5})?")
_CLIENT_PORT = 10001
_DIRECT = re.compile(r"(?!local:)[^\s/:]+:\d{1,5}")


@dataclass(frozen=True)
class ClusterOptions:
    """Where work is spread to. ``address``: ``auto`` (the cluster that this machine is part of), ``ray://HOST:PORT`` or
    ``HOST:PORT``, or ``local:N`` (N workers on this machine).

    ``cpus_per_worker`` None: a worker takes all processors of its machine, or its share of them for ``local:N``.
    ``gpus_per_worker``: GPUs that Ray gives to each worker. ``shared_files`` false: no folder is taken for shared, although the
    probe says so. ``lane``: only this worker of the cluster, counted from 0.
    """

    address: str = field(metadata=_SAME)
    cpus_per_worker: int | None = field(default=None, metadata=_SAME)
    gpus_per_worker: float = field(default=0.0, metadata=_SAME)
    shared_files: bool = field(default=True, metadata=_SAME)
    lane: int | None = field(default=None, metadata=_SAME)

    @property
    def local_workers(self) -> int | None:
        """N of ``local:N``."""
        match = _LOCAL.fullmatch(self.address)
        return int(match[1]) if match else None

    @property
    def endpoint(self) -> tuple[str, int] | None:
        """Host and port that have to answer; None for ``auto`` and ``local:N``."""
        if self.address == "auto" or self.local_workers is not None:
            return None
        host, _, port = self.address.removeprefix("ray://").partition(":")
        return host, int(port or _CLIENT_PORT)


def checked_address(text: str) -> str:
    """The address as it is typed. Raises :class:`UsageError` for what is none."""
    if text == "auto" or any(pattern.fullmatch(text) for pattern in (_LOCAL, _CLIENT, _DIRECT)):
        return text
    raise UsageError(
        f"Invalid --cluster {text!r}",
        "expected auto, ray://HOST:PORT, HOST:PORT or local:N",
        "For example --cluster local:2 for two workers on this machine, or --cluster auto on a machine of a Ray cluster.",
    )
