"""Access to Hugging Face hubs; no other room imports huggingface_hub.

:func:`fetch_model` downloads a model into the hub's cache, :func:`fetch_dataset` a data set, and :class:`Hub` searches for and
downloads other files. :class:`Announcements` has what is new, and :class:`PublishingHub` writes to one.
"""

from imatrix_runner.models.hub.advice import is_passing
from imatrix_runner.models.hub.announcements import Announcement, Announcements, WatchedPlace, parse_place
from imatrix_runner.models.hub.choose_files import RepoFile
from imatrix_runner.models.hub.dataset_tables import DatasetId, parse_dataset
from imatrix_runner.models.hub.datasets import FetchedDataset, fetch_dataset
from imatrix_runner.models.hub.fetch import Downloaded, fetch_model, hub_endpoint, hub_id_in_cache, reachability, token_source
from imatrix_runner.models.hub.foresee import ForeseenModel, foresee_model
from imatrix_runner.models.hub.listing import Listing
from imatrix_runner.models.hub.published_ggufs import (
    NamedGguf,
    PublishedGguf,
    fetch_gguf,
    find_ggufs,
    parse_named,
    read_headers,
)
from imatrix_runner.models.hub.publishing import Changes, Gating, NewFile, PublishingHub, git_id
from imatrix_runner.models.hub.remote_repository import RemoteCommit, RemoteFile, RemoteRepository
from imatrix_runner.models.hub.search import Hub, concerns_one_file
from imatrix_runner.models.hub.sending import SendMeter
from imatrix_runner.models.hub.transfer import is_offline

__all__ = [
    "Announcement",
    "Announcements",
    "Changes",
    "DatasetId",
    "Downloaded",
    "FetchedDataset",
    "ForeseenModel",
    "Gating",
    "Hub",
    "Listing",
    "NamedGguf",
    "NewFile",
    "PublishedGguf",
    "PublishingHub",
    "RemoteCommit",
    "RemoteFile",
    "RemoteRepository",
    "RepoFile",
    "SendMeter",
    "WatchedPlace",
    "concerns_one_file",
    "fetch_dataset",
    "fetch_gguf",
    "fetch_model",
    "find_ggufs",
    "foresee_model",
    "git_id",
    "hub_endpoint",
    "hub_id_in_cache",
    "is_offline",
    "is_passing",
    "parse_dataset",
    "parse_named",
    "parse_place",
    "reachability",
    "read_headers",
    "token_source",
]
