"""Hugging Face hubs: the only room that imports huggingface_hub. :func:`fetch_model` brings a model into its cache."""

from imatrix_runner.models.hub.fetch import Downloaded, fetch_model, hub_endpoint, reachability, token_source

__all__ = ["Downloaded", "fetch_model", "hub_endpoint", "reachability", "token_source"]
