"""Downloads: list a repository at one commit, choose, check the disk, fetch into the hub's cache, verify the lengths."""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

from imatrix_runner.errors import DownloadError, NoSpaceError, RunnerError, from_os_error
from imatrix_runner.events import Finished, Progress, Sink, Started
from imatrix_runner.files import existing_parent, free_bytes, human_bytes
from imatrix_runner.models.hub.advice import Asked, explain, is_passing, no_hub, offline_without, retry_after
from imatrix_runner.models.hub.background import in_background
from imatrix_runner.models.hub.choice import Choice, RepoFile, choose
from imatrix_runner.models.sources import HubId, Provenance
from imatrix_runner.process import Stop

if TYPE_CHECKING:
    import tenacity
    from typing_extensions import Self

T = TypeVar("T")

STEP = "download"
"""The step that download events carry."""

_COMMIT = re.compile(r"[0-9a-f]{40}")
_TRIES = 3
_LISTING_SECONDS = 30.0
_LONGEST_PAUSE = 30.0
_MOST_RESTARTS = 3
_DOCTOR_SECONDS = 3.0


@dataclass(frozen=True)
class Downloaded:
    """A model in the hub's cache. ``path``: the first shard of a GGUF, or the directory of a checkpoint to convert."""

    kind: Literal["gguf", "checkpoint"]
    path: Path
    hub_id: HubId
    commit: str
    files: tuple[Path, ...]

    @property
    def repo(self) -> str:
        return self.hub_id.repo

    @property
    def source(self) -> Provenance:
        """What a :class:`~imatrix_runner.models.sources.Model` made from this says of its origin."""
        return Provenance("hub", str(self.hub_id), self.repo, self.hub_id.revision, self.commit)


def fetch_model(
    hub_id: HubId,
    *,
    stop: Stop,
    sink: Sink,
    trust_remote_code: bool = False,
    endpoint: str | None = None,
    cache: Path | None = None,
) -> Downloaded:
    """Bring a model from a hub into its cache (``HF_HOME``), every file from one and the same commit.

    The library finds the token by itself (``HF_TOKEN``, then its token file). In offline mode the cache alone is asked.
    Raises :class:`DownloadError`, :class:`NoSpaceError`, :class:`InvalidDataError` (nothing in the repository fits).
    """
    from huggingface_hub import constants
    from huggingface_hub.utils.logging import set_verbosity

    # The library reports retries on stderr by itself; progress and errors reach people through the sink instead.
    set_verbosity(logging.ERROR)
    cache = cache or Path(constants.HF_HUB_CACHE)
    asked = Asked(hub_id, endpoint or hub_endpoint(), token_source() is not None)
    if _offline():
        return _from_cache(asked, cache, trust_remote_code)
    listing = _patiently(partial(_list, asked), asked, stop)
    choice = choose(hub_id, listing.files, trust_remote_code=trust_remote_code, base_model=listing.base_model)
    paths = _fetch(asked, choice, listing.commit, cache, stop, sink)
    _remember_revision(cache, hub_id, listing.commit)
    return _downloaded(asked, choice, listing.commit, paths)


def hub_endpoint() -> str:
    """``HF_ENDPOINT`` as it is now, else the library's default (which it reads once, when it is imported)."""
    from huggingface_hub import constants

    return (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")


def token_source() -> str | None:
    """Where a token would be taken from; never the token."""
    from huggingface_hub import constants

    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        if os.environ.get(name, "").strip():
            return name
    file = Path(constants.HF_TOKEN_PATH)
    return "token file" if file.is_file() and file.stat().st_size else None


def reachability(endpoint: str | None = None) -> str:
    """One line for ``doctor`` within about three seconds: ``reachable in 120 ms``, or why not."""
    import httpx2

    endpoint = endpoint or hub_endpoint()
    if _offline():
        return "not asked: offline mode is on (HF_HUB_OFFLINE)"
    asked = Asked(HubId("org/name"), endpoint, has_token=False)
    began = time.monotonic()

    def expire() -> None:
        if time.monotonic() - began > _DOCTOR_SECONDS:
            raise TimeoutError

    try:
        answer = in_background(partial(httpx2.get, f"{endpoint}/api/models?limit=1", timeout=_DOCTOR_SECONDS), expire)
    except TimeoutError:
        return f"{asked.host} does not answer within {_DOCTOR_SECONDS:g} s"
    except httpx2.HTTPError as error:
        return str(explain(error, asked))
    if answer.status_code >= 400:
        return f"{asked.host} answers with HTTP status {answer.status_code}"
    return f"{asked.host} is reachable in {1000 * (time.monotonic() - began):.0f} ms"


@dataclass(frozen=True)
class _Listing:
    commit: str
    files: tuple[RepoFile, ...]
    base_model: str | None


def _list(asked: Asked) -> _Listing:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError

    api = HfApi(endpoint=asked.endpoint, library_name="imatrix-runner")
    try:
        info = api.model_info(asked.hub_id.repo, revision=asked.hub_id.revision, files_metadata=True, timeout=_LISTING_SECONDS)
    except HFValidationError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise no_hub(asked) from error  # no JSON, or not a hub's
    if not _COMMIT.fullmatch(info.sha or ""):
        raise no_hub(asked)
    files = tuple(RepoFile(entry.rfilename, entry.size) for entry in info.siblings or () if _is_plain_name(entry.rfilename))
    base = info.card_data.get("base_model") if info.card_data else None
    base = base[0] if isinstance(base, list) and base else base
    return _Listing(str(info.sha), files, base if isinstance(base, str) else None)


def _is_plain_name(name: str) -> bool:
    return "\\" not in name and name.isprintable() and all(part not in ("", ".", "..") for part in name.split("/"))


def _fetch(asked: Asked, choice: Choice, commit: str, cache: Path, stop: Stop, sink: Sink) -> tuple[Path, ...]:
    cached = {file.name: _cached(asked.hub_id.repo, file, commit, cache) for file in choice.files}
    need = sum(file.size or 0 for file in choice.files if cached[file.name] is None)
    _require_space(cache, need, asked.hub_id.repo)
    sink(Started(STEP, f"Downloading {asked.hub_id}", float(need), "B"))
    began = time.monotonic()
    meter = _Meter(sink, stop, asked, need)
    paths: list[Path] = []
    try:
        for file in choice.files:
            path = cached[file.name] or _patiently(partial(_download, asked, file, commit, cache, meter), asked, stop)
            paths.append(path)
    except RunnerError as error:
        sink(Finished(STEP, "failed", str(error), time.monotonic() - began))
        raise
    detail = f"{human_bytes(need)} at commit {commit[:12]}" if need else f"in the cache at commit {commit[:12]}"
    sink(Finished(STEP, "done" if need else "skipped", detail, time.monotonic() - began))
    return tuple(paths)


def _download(asked: Asked, file: RepoFile, commit: str, cache: Path, meter: _Meter) -> Path:
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    bar: Any = type("_MeteredBar", (_Bar,), {"meter": meter})
    repo = asked.hub_id.repo
    # A copy of another length is a damaged one; the library would take it for whole.
    damaged = isinstance(try_to_load_from_cache(repo, file.name, cache_dir=cache, revision=commit), str)
    path = Path(
        hf_hub_download(
            repo,
            file.name,
            revision=commit,
            endpoint=asked.endpoint,
            cache_dir=cache,
            force_download=damaged,
            tqdm_class=bar,
            library_name="imatrix-runner",
        )
    )
    size = path.stat().st_size
    if file.size is not None and size != file.size:
        raise DownloadError(
            f"{file.name} of {repo} arrived with the wrong length",
            f"{size} bytes instead of {file.size}; {asked.host} or a proxy on the way sent something else",
            "Run the same command again; if it stays so, look at your proxy and at HF_ENDPOINT.",
        )
    meter.finish(size)
    return path


class _Meter:
    """Adds up what all files of a download bring, and lets a stop through between two pieces."""

    def __init__(self, sink: Sink, stop: Stop, asked: Asked, total: int) -> None:
        self._sink, self._stop, self._asked, self._total = sink, stop, asked, total
        self._finished = 0
        self._current = 0
        self._restarts = 0

    def begin(self, initial: int) -> None:
        self._current = initial

    def add(self, count: int) -> None:
        self._stop.check()
        if count < 0:
            # The server forgot where we were. The library would start over for ever, for each time some bytes arrive.
            self._restarts += 1
            if self._restarts > _MOST_RESTARTS:
                raise DownloadError(
                    f"The connection to {self._asked.host} was cut again and again",
                    f"it cannot continue a broken download, and this one broke {self._restarts} times",
                    "Run the same command again on a better connection.",
                )
        self._current += count
        self._sink(Progress(STEP, float(self._finished + self._current), float(self._total)))

    def finish(self, size: int) -> None:
        self._finished += size
        self._current = 0


class _Bar:
    """What huggingface_hub takes for a progress bar: the part of tqdm's face that it uses."""

    meter: ClassVar[_Meter]

    def __init__(self, *, initial: int = 0, total: int | None = None, **_look: object) -> None:
        self.total = total
        self.meter.begin(initial)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def update(self, count: float | None = 1) -> None:
        self.meter.add(int(count or 0))

    def update_transfer(self, count: float | None = 1) -> None:
        """Bytes on the wire; with Xet these are not the file's. Only the file's bytes are shown."""

    def refresh(self) -> None:
        """Nothing is drawn here."""

    def close(self) -> None:
        """Nothing to close."""

    def set_postfix_str(self, _text: str, refresh: bool = True) -> None:
        """Rates are computed by those who draw."""

    set_transfer_postfix_str = set_postfix_str


def _cached(repo: str, file: RepoFile, commit: str, cache: Path) -> Path | None:
    """The file's copy in the cache, if it is there and whole."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repo, file.name, cache_dir=cache, revision=commit)
    if not isinstance(found, str):
        return None
    whole = file.size is None or Path(found).stat().st_size == file.size
    return Path(found) if whole else None


def _patiently(work: Callable[[], T], asked: Asked, stop: Stop) -> T:
    """Up to three tries, with growing pauses, for what passes by itself; everything else is explained at once."""
    import tenacity

    tries = tenacity.Retrying(
        stop=tenacity.stop_after_attempt(_TRIES), wait=_pause, retry=tenacity.retry_if_exception(is_passing), reraise=True
    )
    stop.check()
    try:
        return in_background(partial(tries, work), stop.check)
    except Exception as error:
        explained = explain(error, asked)
        if explained is error:
            raise
        raise explained from error


def _pause(state: tenacity.RetryCallState) -> float:
    error = state.outcome.exception() if state.outcome else None
    asked_for = retry_after(error) if error else None
    return min(asked_for if asked_for is not None else 0.5 * 2**state.attempt_number, _LONGEST_PAUSE)


def _require_space(cache: Path, need: int, repo: str) -> None:
    free = free_bytes(cache)
    if need > free:
        raise NoSpaceError(
            f"Not enough disk space for {repo}",
            f"{human_bytes(need)} to download, {human_bytes(free)} free at {existing_parent(cache)}",
            "Free some space, or put the cache on another disk by setting HF_HOME.",
        )


def _downloaded(asked: Asked, choice: Choice, commit: str, paths: tuple[Path, ...]) -> Downloaded:
    path = paths[0] if choice.kind == "gguf" else paths[0].parent
    return Downloaded(choice.kind, path, asked.hub_id, commit, paths)


def _offline() -> bool:
    from huggingface_hub import constants

    return constants.is_offline_mode() or os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def _repo_folder(cache: Path, repo: str) -> Path:
    return cache / f"models--{repo.replace('/', '--')}"


def _remember_revision(cache: Path, hub_id: HubId, commit: str) -> None:
    """Note which commit a branch or tag meant (``refs/`` of the cache's documented layout), for later offline use.

    The library does this only when it is asked for the branch itself; we ask for the commit.
    """
    revision = hub_id.revision or "main"
    if revision == commit:
        return
    note = _repo_folder(cache, hub_id.repo) / "refs" / revision
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(commit, encoding="ascii")
    except OSError as error:
        raise from_os_error(error, "noting the downloaded revision", note) from error


def _from_cache(asked: Asked, cache: Path, trust_remote_code: bool) -> Downloaded:
    folder = _repo_folder(cache, asked.hub_id.repo)
    revision = asked.hub_id.revision or "main"
    note = folder / "refs" / revision
    commit = note.read_text(encoding="ascii").strip() if note.is_file() else revision
    snapshot = folder / "snapshots" / commit
    if not _COMMIT.fullmatch(commit) or not snapshot.is_dir():
        raise offline_without(asked)
    files = [
        RepoFile(path.relative_to(snapshot).as_posix(), path.stat().st_size)
        for path in sorted(snapshot.rglob("*"))
        if path.is_file()
    ]
    try:
        choice = choose(asked.hub_id, files, trust_remote_code=trust_remote_code)
    except RunnerError as error:
        raise offline_without(asked) from error
    return _downloaded(asked, choice, commit, tuple(snapshot / file.name for file in choice.files))
