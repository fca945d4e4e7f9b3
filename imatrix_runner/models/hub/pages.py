"""Asks a hub's API for pages of a listing, each bounded in size and time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from urllib.parse import urljoin

from imatrix_runner.models.hub.advice import Asked, no_hub
from imatrix_runner.models.hub.listing import LISTING_SECONDS
from imatrix_runner.untrusted import split_url


def ask_page(asked: Asked, url: str, params: Sequence[tuple[str, str]] = ()) -> tuple[bytes, str | None]:
    """One page of a listing, and the address of the next; None after the last. The library's own paging has no bound on time,
    and would send the token to any address that a page names as the next."""
    from huggingface_hub import get_session
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status  # type: ignore[attr-defined]

    headers: dict[str, Any] = build_hf_headers(library_name="imatrix-runner")
    answer = get_session().get(url, params=tuple(params) or None, headers=headers, timeout=LISTING_SECONDS)
    hf_raise_for_status(answer)
    content: bytes = answer.content
    following = answer.links.get("next", {}).get("url")
    if following is None:
        return content, None
    following = urljoin(url, following)
    if split_url(following)[:2] != split_url(asked.endpoint)[:2]:
        raise no_hub(asked)
    return content, following
