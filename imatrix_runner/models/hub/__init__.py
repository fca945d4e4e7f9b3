"""Hugging Face hubs: the only room that imports huggingface_hub.

:func:`fetch_model` brings a model into its cache; a :class:`Hub` is searched for other files, and
:func:`fetch_dataset` brings the rows of a data set.
"""

from imatrix_runner.models.hub.choice import RepoFile
from imatrix_runner.models.hub.datasets import FetchedDataset, fetch_dataset
from imatrix_runner.models.hub.fetch import Downloaded, fetch_model, hub_endpoint, reachability, token_source
from imatrix_runner.models.hub.listing import Listing
from imatrix_runner.models.hub.search import Hub, concerns_one_file
from imatrix_runner.models.hub.tables import DatasetId, parse_dataset
from imatrix_runner.models.hub.transfer import is_offline

__all__ = [
    "DatasetId",
    "Downloaded",
    "FetchedDataset",
    "Hub",
    "Listing",
    "RepoFile",
    "concerns_one_file",
    "fetch_dataset",
    "fetch_model",
    "hub_endpoint",
    "is_offline",
    "parse_dataset",
    "reachability",
    "token_source",
]
