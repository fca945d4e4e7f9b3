"""What fetching a model would take: its files, sizes, licence and architecture, before any of its weights is fetched."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from imatrix_runner.models.hub.advice import Asked, offline_without
from imatrix_runner.models.hub.choose_files import ChosenFiles, RepoFile, choose
from imatrix_runner.models.hub.fetch import default_cache, hub_endpoint, quiet_library, token_source
from imatrix_runner.models.hub.listing import LISTING_SECONDS, Listing, list_cached, list_repository
from imatrix_runner.models.hub.transfer import cached_file, is_offline, patiently
from imatrix_runner.models.model import HubId
from imatrix_runner.safe_text import printable
from imatrix_runner.signals import Stop

_MOST_PARAMETERS = 1 << 50
_NAME = 100


@dataclass(frozen=True)
class ForeseenModel:
    """A model on a hub. ``choice``: the files that would be fetched, of which ``missing`` bytes are not in the cache.
    ``architecture``: the class in its config.json, or that of its GGUF, as the hub announces it; empty if it does not.
    ``n_params``: number of its weights, None if the hub does not say."""

    listing: Listing
    choice: ChosenFiles
    missing: int
    architecture: str = ""
    n_params: int | None = None
    gated: bool = False

    @property
    def n_bytes(self) -> int:
        return sum(file.size or 0 for file in self.choice.files)


@dataclass(frozen=True)
class _Announced:
    architecture: str
    n_params: int | None
    gated: bool


def foresee_model(hub_id: HubId, *, stop: Stop, trust_remote_code: bool = False) -> ForeseenModel:
    """Ask a hub about a model; nothing is downloaded. Raises what :func:`~imatrix_runner.models.hub.fetch.fetch_model` would
    raise before its first byte, also for a gated model that this account may not fetch."""
    quiet_library()
    cache = default_cache()
    asked = Asked(hub_id, hub_endpoint(), token_source() is not None)
    if is_offline():
        listing = list_cached(asked, cache)
        if listing is None:
            raise offline_without(asked)
        return ForeseenModel(listing, choose(hub_id, listing.files, trust_remote_code=trust_remote_code), 0)
    listing = patiently(partial(list_repository, asked), asked, stop.check)
    choice = choose(hub_id, listing.files, trust_remote_code=trust_remote_code, base_model=listing.base_model)
    announced = patiently(partial(_announced, asked), asked, stop.check)
    if announced.gated:
        patiently(partial(_check_access, asked), asked, stop.check)
    missing = sum(file.size or 0 for file in choice.files if cached_file(asked, file, listing.commit, cache) is None)
    return ForeseenModel(listing, choice, missing, announced.architecture, announced.n_params, announced.gated)


def is_cached(hub_id: HubId, commit: str, files: tuple[RepoFile, ...], cache: Path) -> bool:
    """Whether all files of a commit are in a cache, with their announced sizes."""
    asked = Asked(hub_id, hub_endpoint(), token_source() is not None)
    return all(cached_file(asked, file, commit, cache) is not None for file in files)


def _announced(asked: Asked) -> _Announced:
    """What a hub announces of the model besides its files. Values of other types than a hub's count as not announced."""
    from huggingface_hub import HfApi

    api = HfApi(endpoint=asked.endpoint, library_name="imatrix-runner")
    info = api.model_info(asked.hub_id.repo, revision=asked.hub_id.revision, timeout=LISTING_SECONDS)
    config: Any = info.config if isinstance(info.config, dict) else {}
    gguf: Any = info.gguf if isinstance(info.gguf, dict) else {}
    named = config.get("architectures")
    first = named[0] if isinstance(named, list) and named else gguf.get("architecture")
    total = gguf.get("total") if gguf else getattr(info.safetensors, "total", None)
    known = isinstance(total, int) and not isinstance(total, bool) and 0 < total < _MOST_PARAMETERS
    architecture = printable(first)[:_NAME] if isinstance(first, str) else ""
    return _Announced(architecture, total if known else None, info.gated not in (None, False))


def _check_access(asked: Asked) -> None:
    """Ask whether this account may fetch a gated model. Raises the library's error if not."""
    from huggingface_hub import HfApi

    HfApi(endpoint=asked.endpoint, library_name="imatrix-runner").auth_check(asked.hub_id.repo)
