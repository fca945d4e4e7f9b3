"""What a hub announces: the models of an owner, those that trend, and those of a collection, as its listings describe them.

Nothing is downloaded. Everything in an answer may be wrong or hostile, also a single model's part of a sound one: values of
other types than a hub's count as not announced, and only an answer that is no listing at all is an error.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal
from urllib.parse import quote

from imatrix_runner.errors import DownloadError, RunnerError, UsageError
from imatrix_runner.models.hub.advice import Asked, no_hub
from imatrix_runner.models.hub.choose_files import choose
from imatrix_runner.models.hub.fetch import hub_endpoint, quiet_library, token_source
from imatrix_runner.models.hub.listing import is_repository, plain_files
from imatrix_runner.models.hub.pages import ask_page
from imatrix_runner.models.hub.transfer import is_offline, patiently
from imatrix_runner.models.model import HubId
from imatrix_runner.models.quantised import quantisation_config, unusable
from imatrix_runner.safe_text import printable, shown
from imatrix_runner.signals import Stop
from imatrix_runner.untrusted import UnreadableError, from_json, split_url

TRENDING = "trending"
MOST_PAGES = 10
PAGE = 100
"""Models in one page of a listing; :data:`MOST_PAGES` of an owner's are read at most, and one of those that trend."""

_FIELDS = ("config", "createdAt", "disabled", "gated", "gguf", "safetensors", "sha", "siblings", "tags")
_MOST_ITEMS = 1000
_MOST_FILES, _MOST_TAGS, _MOST_NAMES, _MOST_TEXT = 20_000, 1000, 8, 80
_MOST_PARAMETERS = 1 << 50
_OWNER = re.compile(r"[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_COLLECTION = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/(?:[\w.%-]{1,200}-)?[0-9a-f]{24}", re.ASCII)
_MOMENT = re.compile(r"\d{4}-\d\d-\d\d[T0-9:.Z+-]{0,40}", re.ASCII)
_BASE, _LICENCE = "base_model:", "license:"
_RELATIONS = ("quantized", "adapter", "merge", "finetune")


@dataclass(frozen=True)
class WatchedPlace:
    """Where models appear on a hub: those of an owner (an organisation or a user), of a collection, or those that trend.
    ``name``: the owner's, or the collection's slug ``OWNER/TITLE-HASH``."""

    kind: Literal["owner", "collection", "trending"]
    name: str

    def __str__(self) -> str:
        return self.name


def parse_place(text: str) -> WatchedPlace:
    """What ``--watch`` names: ``ORG``, ``OWNER/TITLE-HASH``, the web address of one, or ``trending``. Raises
    :class:`UsageError`."""
    path = (split_url(text).path if "://" in text else text).strip("/")
    path = path.removeprefix("collections/")
    if path == TRENDING:
        return WatchedPlace("trending", TRENDING)
    if _OWNER.fullmatch(path):
        return WatchedPlace("owner", path)
    if _COLLECTION.fullmatch(path):
        return WatchedPlace("collection", path)
    is_model = is_repository(path)
    raise UsageError(
        f"Invalid --watch {shown(text)!r}",
        "it is a model, or the name of a collection without the digits at its end"
        if is_model
        else f"it takes an organisation or user, a collection, or {TRENDING}",
        "Give a collection by its address, and a model with: imatrix-runner batch add"
        if is_model
        else "For example: --watch Qwen, or --watch https://huggingface.co/collections/OWNER/TITLE-HASH",
    )


@dataclass(frozen=True)
class Announcement:
    """A model as a listing describes it. ``version``: changes when the model does; ``created``: ISO 8601, empty if not
    announced. ``architectures``: every name that is announced for it, the class in its config.json first; ``relations``: to the
    models that it names as its base (``quantized``, ``adapter``, ``merge``, ``finetune``). ``described`` False: the listing has
    its name alone. ``problem``: why it is none that levels could be made from; empty if it may be one."""

    repo: str
    version: str = ""
    created: str = ""
    described: bool = True
    gated: bool = False
    architecture: str = ""
    architectures: tuple[str, ...] = ()
    licences: tuple[str, ...] = ()
    relations: frozenset[str] = frozenset()
    n_params: int | None = None
    problem: str = ""


@dataclass(frozen=True)
class Announcements:
    """Asks a hub for what it announces. Every method raises :class:`DownloadError` if the hub cannot be used, and
    ``InterruptedRunError`` once stopped."""

    stop: Stop
    trust_remote_code: bool = False
    endpoint: str = field(default_factory=hub_endpoint)

    def at(self, place: WatchedPlace, is_known: Callable[[str], bool]) -> tuple[Announcement, ...]:
        """What is at a place, the newest of an owner's models first. Pages end early at one that ``is_known`` wholly."""
        quiet_library()
        if is_offline():
            raise DownloadError(
                "The hub cannot be asked for new models",
                "offline mode is on (HF_HUB_OFFLINE)",
                "Unset it, or leave out --watch.",
            )
        if place.kind == "collection":
            return self._collection(place)
        sort = [("author", place.name), ("sort", "createdAt")] if place.kind == "owner" else [("sort", "trendingScore")]
        params = [*sort, ("limit", str(PAGE)), *_expanded()]
        url: str | None = f"{self.endpoint}/api/models"
        found: dict[str, Announcement] = {}
        for _ in range(MOST_PAGES if place.kind == "owner" else 1):
            page, url = self._page(place, url or "", params)
            here = [each for each in map(self._announcement, page[:PAGE]) if each is not None and _is_at(each.repo, place)]
            found = {**{each.repo.lower(): each for each in here}, **found}
            if url is None or all(is_known(each.repo) for each in here):
                break
            params = []  # the address of the next page includes them
        return tuple(
            sorted(found.values(), key=lambda each: each.created, reverse=True) if sort[0][0] == "author" else found.values()
        )

    def describe(self, repo: str) -> Announcement:
        """One model, as a listing describes it."""
        asked = self._asked(repo)
        content, _ = patiently(
            partial(ask_page, asked, f"{self.endpoint}/api/models/{repo}", _expanded()), asked, self.stop.check
        )
        found = self._announcement(_decoded(asked, content))
        if found is None:
            raise no_hub(asked)
        return found

    def _page(self, place: WatchedPlace, url: str, params: Sequence[tuple[str, str]]) -> tuple[list[Any], str | None]:
        asked = self._asked(str(place))
        content, following = patiently(partial(ask_page, asked, url, params), asked, self.stop.check)
        page = _decoded(asked, content)
        if not isinstance(page, list):
            raise no_hub(asked)
        return page, following

    def _collection(self, place: WatchedPlace) -> tuple[Announcement, ...]:
        from huggingface_hub.errors import HfHubHTTPError

        asked = self._asked(place.name)
        url = f"{self.endpoint}/api/collections/{quote(place.name, safe='/%')}"
        try:
            content, _ = patiently(partial(ask_page, asked, url), asked, self.stop.check)
        except DownloadError as error:
            cause = error.__cause__
            if isinstance(cause, HfHubHTTPError) and cause.response.status_code in (401, 403, 404):
                raise DownloadError(
                    f"There is no collection {place.name}",
                    f"{asked.host} does not have it, or shows it to its owner only",
                    "Check its address; for a private one set HF_TOKEN.",
                ) from error
            raise
        answer = _decoded(asked, content)
        items = answer.get("items") if isinstance(answer, dict) else None
        if not isinstance(items, list):
            raise no_hub(asked)
        models = [item for item in items[:_MOST_ITEMS] if isinstance(item, dict) and item.get("type") == "model"]
        found = {_text(item, "id"): _moment(item, "lastModified") for item in models if is_repository(_text(item, "id"))}
        return tuple(Announcement(repo, changed, described=False) for repo, changed in found.items())

    def _announcement(self, raw: object) -> Announcement | None:
        """A model of a listing; None for one without a usable name."""
        if not isinstance(raw, dict) or not is_repository(repo := _text(raw, "id")):
            return None
        config, gguf, safetensors = (_mapping(raw, key) for key in ("config", "gguf", "safetensors"))
        classes = [name for name in _list(config, "architectures")[:_MOST_NAMES] if isinstance(name, str)]
        named = [*classes, _text(config, "model_type"), _text(gguf, "architecture")]
        tags = [tag for tag in _list(raw, "tags")[:_MOST_TAGS] if isinstance(tag, str)]
        bases = [tag.removeprefix(_BASE) for tag in tags if tag.startswith(_BASE)]
        relations = frozenset(relation for base in bases if (relation := base.partition(":")[0]) in _RELATIONS)
        total = safetensors.get("total", gguf.get("total"))
        known = isinstance(total, int) and not isinstance(total, bool) and 0 < total < _MOST_PARAMETERS
        problem = _problem(relations, bool(bases), config, raw.get("disabled") is True)
        return Announcement(
            repo,
            _text(raw, "sha")[:_MOST_TEXT],
            _moment(raw, "createdAt"),
            True,
            raw.get("gated") not in (None, False),
            _short(classes[0]) if classes else "",
            tuple(_short(name) for name in named if name),
            tuple(_short(tag.removeprefix(_LICENCE)) for tag in tags if tag.startswith(_LICENCE))[:_MOST_NAMES],
            relations,
            total if known else None,
            problem or self._files_problem(repo, raw, bool(bases)),
        )

    def _files_problem(self, repo: str, raw: Mapping[str, Any], has_base: bool) -> str:
        """Why levels could not be made from the files of a repository; empty if they might."""
        listed = _list(raw, "siblings")[:_MOST_FILES]
        names = [_text(each, "rfilename") for each in listed if isinstance(each, dict)]
        try:
            found = choose(HubId(repo), plain_files((name, None) for name in names), trust_remote_code=self.trust_remote_code)
        except RunnerError as error:
            return shown(f"{error.what}: {error.why}", 300)
        return (
            "its GGUF was made from another repository, which it names as its base" if found.kind == "gguf" and has_base else ""
        )

    def _asked(self, name: str) -> Asked:
        return Asked(HubId(name), self.endpoint, token_source() is not None, perhaps_path=False)


def _problem(relations: frozenset[str], has_base: bool, config: Mapping[str, Any], disabled: bool) -> str:
    """Why a repository is not the original of a model; empty if it may be. Merges and fine-tunes are originals. Some models are
    published quantised in the first place (FP8, MXFP4): these name no base."""
    if disabled:
        return "the hub has disabled it"
    if "quantized" in relations:
        return "it is a quantised copy of another repository"
    if "adapter" in relations:
        return "it is an adapter of another model"
    quantised = quantisation_config(config)
    method = str(quantised.get("quant_method") or "unknown")
    if quantised and (has_base or method.lower() == "gptq" or unusable(config, {}) is not None):
        return f"its weights are quantised ({_short(method)})"
    return ""


def _expanded() -> list[tuple[str, str]]:
    return [("expand", name) for name in _FIELDS]


def _decoded(asked: Asked, content: bytes) -> Any:
    try:
        return from_json(content, object)
    except UnreadableError as error:
        raise no_hub(asked) from error


def _is_at(repo: str, place: WatchedPlace) -> bool:
    return place.kind != "owner" or repo.partition("/")[0].lower() == place.name.lower()


def _text(value: Mapping[str, Any], key: str) -> str:
    found = value.get(key)
    return found if isinstance(found, str) else ""


def _mapping(value: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = value.get(key)
    return found if isinstance(found, dict) else {}


def _list(value: Mapping[str, Any], key: str) -> list[Any]:
    found = value.get(key)
    return found if isinstance(found, list) else []


def _moment(value: Mapping[str, Any], key: str) -> str:
    found = _text(value, key)
    return found if _MOMENT.fullmatch(found) else ""


def _short(text: str) -> str:
    return printable(text.strip())[:_MOST_TEXT]
