"""Downloads a model: lists a repository at one commit, chooses files, checks the disk, and fetches them into the hub's
cache."""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from imatrix_runner.errors import NoSpaceError, RunnerError
from imatrix_runner.events import Finished, Sink, Started
from imatrix_runner.files import existing_parent, free_bytes, human_bytes
from imatrix_runner.models.folder_survey import Folder
from imatrix_runner.models.hub.advice import Asked, explain, offline_without, require_address
from imatrix_runner.models.hub.choose_files import CONFIG, ChosenFiles, RepoFile, choose
from imatrix_runner.models.hub.listing import Listing, list_cached, list_repository, remember_revision, repository_folder
from imatrix_runner.models.hub.transfer import STEP, Meter, cached_file, download, in_background, is_offline, patiently
from imatrix_runner.models.model import HubId, Provenance
from imatrix_runner.models.model_folders import diagnose
from imatrix_runner.models.origin import repository_in
from imatrix_runner.models.safetensors_file import read_model_json
from imatrix_runner.signals import Stop

_DOCTOR_SECONDS = 3.0
_CACHED = re.compile(r"/models--(?P<repo>[^/]+)/snapshots/(?P<commit>[0-9a-f]{40})/(?P<file>.+)$")


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
        """The provenance for a :class:`~imatrix_runner.models.model.Model` made from this download."""
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
    """Download a model from a hub into its cache (``HF_HOME``), all files from one commit.

    The library finds the token by itself (``HF_TOKEN``, then its token file). In offline mode only the cache is used. Raises
    :class:`DownloadError`, :class:`NoSpaceError`, :class:`InvalidDataError` (nothing in the repository is usable).
    """
    quiet_library()
    cache = cache or default_cache()
    asked = Asked(hub_id, endpoint or hub_endpoint(), token_source() is not None)
    if is_offline():
        return _from_cache(asked, cache, trust_remote_code)
    listing = patiently(partial(list_repository, asked), asked, stop.check)
    choice = choose(hub_id, listing.files, trust_remote_code=trust_remote_code, base_model=listing.base_model)
    paths = fetch_files(asked, choice.files, listing.commit, cache, stop, sink, look=_Look(str(hub_id), listing))
    remember_revision(asked, listing.commit, cache)
    return _downloaded(asked, choice, listing.commit, paths)


def hub_id_in_cache(path: Path) -> HubId | None:
    """The file of a hub that ``path`` is by its place in a hub's cache, at its commit; None for any other path.

    The cache has ``models--ORG--NAME/snapshots/COMMIT/FILE`` (huggingface_hub's documented layout).
    """
    match = _CACHED.search(path.as_posix())
    return HubId(match["repo"].replace("--", "/"), match["commit"], match["file"]) if match else None


def quiet_library() -> None:
    """Stop the library from reporting retries on stderr; progress and errors are reported through the sink instead."""
    require_address()
    from huggingface_hub.utils.logging import set_verbosity

    set_verbosity(logging.ERROR)


def default_cache() -> Path:
    """The folder of the hub's cache, according to ``HF_HOME`` and ``HF_HUB_CACHE``."""
    require_address()
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def hub_endpoint() -> str:
    """The current ``HF_ENDPOINT``, else the library's default (which it reads once, when it is imported)."""
    require_address()
    from huggingface_hub import constants

    return (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")


def token_source() -> str | None:
    """The name of the variable or ``token file`` that provides a token, never the token itself; None if there is none."""
    require_address()
    from huggingface_hub import constants

    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        if os.environ.get(name, "").strip():
            return name
    file = Path(constants.HF_TOKEN_PATH)
    return "token file" if file.is_file() and file.stat().st_size else None


def _status(url: str) -> int:
    """The HTTP status of an answer, whose body is not read."""
    import httpx2

    with httpx2.stream("GET", url, timeout=_DOCTOR_SECONDS) as answer:
        return answer.status_code


def reachability(endpoint: str | None = None) -> str:
    """One line for ``doctor`` within about three seconds: ``reachable in 120 ms``, or why not."""
    import httpx2

    endpoint = endpoint or hub_endpoint()
    if is_offline():
        return "not checked: offline mode is on (HF_HUB_OFFLINE)"
    asked = Asked(HubId("org/name"), endpoint, has_token=False)
    began = time.monotonic()

    def expire() -> None:
        if time.monotonic() - began > _DOCTOR_SECONDS:
            raise TimeoutError

    try:
        status = in_background(partial(_status, f"{endpoint}/api/models?limit=1"), expire)
    except TimeoutError:
        return f"{asked.host} does not answer within {_DOCTOR_SECONDS:g} s"
    except httpx2.HTTPError as error:
        return str(explain(error, asked))
    if status >= 400:
        return f"{asked.host} answers with HTTP status {status}"
    return f"{asked.host} is reachable in {1000 * (time.monotonic() - began):.0f} ms"


@dataclass(frozen=True)
class _Look:
    """Checks a checkpoint's config.json, which is fetched first, so that no gigabytes are fetched for an unusable model."""

    name: str
    listing: Listing

    def __call__(self, file: RepoFile, path: Path) -> None:
        if file.name != CONFIG:
            return
        names = tuple(sorted(listed.name for listed in self.listing.files))
        found = Folder(self.name, names, read_model_json(path), base=repository_in(self.listing.base_model) or "", local=False)
        if (wrong := diagnose(found)) is not None:
            raise wrong


def fetch_files(
    asked: Asked,
    files: Sequence[RepoFile],
    commit: str,
    cache: Path,
    stop: Stop,
    sink: Sink,
    *,
    impatient: bool = False,
    look: Callable[[RepoFile, Path], None] | None = None,
) -> tuple[Path, ...]:
    """Download files of one commit into the cache; files that are already there are not fetched again.

    ``impatient`` gives up on a stalled connection after two minutes instead of twenty. ``look`` is called with every file once
    it is in the cache, and may raise an error that ends the download.
    """
    cached = {file.name: cached_file(asked, file, commit, cache) for file in files}
    need = sum(file.size or 0 for file in files if cached[file.name] is None)
    _require_space(cache, need, asked.hub_id.repo)
    sink(Started(STEP, f"Downloading {asked.hub_id}", float(need), "B"))
    began = time.monotonic()
    meter = Meter(sink, stop, asked, need, impatient=impatient)
    paths: list[Path] = []
    try:
        for file in files:
            path = cached[file.name] or patiently(
                partial(download, asked, file, commit, cache, meter), asked, meter.check, seconds=float("inf")
            )
            if look is not None:
                look(file, path)
            paths.append(path)
    except RunnerError as error:
        sink(Finished(STEP, "failed", str(error), time.monotonic() - began))
        raise
    detail = f"{human_bytes(need)} at commit {commit[:12]}" if need else f"in the cache at commit {commit[:12]}"
    sink(Finished(STEP, "done" if need else "skipped", detail, time.monotonic() - began))
    return tuple(paths)


def _require_space(cache: Path, need: int, repo: str) -> None:
    free = free_bytes(cache)
    if need > free:
        raise NoSpaceError(
            f"Not enough disk space for {repo}",
            f"{human_bytes(need)} to download, {human_bytes(free)} free at {existing_parent(cache)}",
            "Free some space, or put the cache on another disk by setting HF_HOME.",
        )


def _downloaded(asked: Asked, choice: ChosenFiles, commit: str, paths: tuple[Path, ...]) -> Downloaded:
    path = paths[0] if choice.kind == "gguf" else paths[0].parent
    return Downloaded(choice.kind, path, asked.hub_id, commit, paths)


def _from_cache(asked: Asked, cache: Path, trust_remote_code: bool) -> Downloaded:
    listing = list_cached(asked, cache)
    if listing is None:
        raise offline_without(asked)
    try:
        choice = choose(asked.hub_id, listing.files, trust_remote_code=trust_remote_code)
    except RunnerError as error:
        raise offline_without(asked) from error
    snapshot = repository_folder(asked, cache) / "snapshots" / listing.commit
    return _downloaded(asked, choice, listing.commit, tuple(snapshot / file.name for file in choice.files))
