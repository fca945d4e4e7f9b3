"""What fetching a model would take: its files, sizes, licence and architecture, before any of its weights is fetched."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from imatrix_runner.models.hub.advice import Asked, offline_without
from imatrix_runner.models.hub.choose_files import ChosenFiles, choose
from imatrix_runner.models.hub.fetch import default_cache, hub_endpoint, quiet_library, token_source
from imatrix_runner.models.hub.listing import Listing, list_cached, list_repository
from imatrix_runner.models.hub.transfer import cached_file, is_offline, patiently
from imatrix_runner.models.model import HubId
from imatrix_runner.signals import Stop


@dataclass(frozen=True)
class ForeseenModel:
    """A model on a hub. ``choice``: the files that would be fetched, of which ``missing`` bytes are not in the cache."""

    listing: Listing
    choice: ChosenFiles
    missing: int

    @property
    def n_bytes(self) -> int:
        return sum(file.size or 0 for file in self.choice.files)


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
    if listing.gated:
        patiently(partial(_check_access, asked), asked, stop.check)
    missing = sum(file.size or 0 for file in choice.files if cached_file(asked, file, listing.commit, cache) is None)
    return ForeseenModel(listing, choice, missing)


def _check_access(asked: Asked) -> None:
    """Ask whether this account may fetch a gated model. Raises the library's error if not."""
    from huggingface_hub import HfApi

    HfApi(endpoint=asked.endpoint, library_name="imatrix-runner").auth_check(asked.hub_id.repo)
