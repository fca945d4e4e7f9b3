"""Finding published imatrices: whose weights a model is, and which repositories offer a matrix of them."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path

from imatrix_runner.errors import DownloadError, InvalidDataError, UsageError
from imatrix_runner.events import Sink, info, warning
from imatrix_runner.imatrix.formats import MatrixFile, read
from imatrix_runner.imatrix.published.publishers import (
    PUBLISHERS,
    MatrixCandidate,
    PublishedPlace,
    Refused,
    RepoType,
    format_by_name,
    is_named_imatrix,
    made_from_another,
    names_model,
    parse_wanted,
    places,
    rank,
    refusal,
)
from imatrix_runner.models.hub import Hub, Listing, RepoFile
from imatrix_runner.models.model import HubId, LocalDirectory, Model, Source
from imatrix_runner.models.origin import Origin, given_origin, origin_of_directory, origin_of_gguf


@dataclass(frozen=True)
class PublishedRequest:
    """``wanted``: a publisher, ``REPO`` or ``REPO:FILE``, else the best. ``out`` None means the model's workspace."""

    model: str
    work_dir: Path = Path("work")
    base_model: str | None = None
    wanted: str = ""
    out: Path | None = None
    force: bool = False
    offline: bool = False
    command: str = ""


@dataclass(frozen=True)
class Findings:
    """``candidates``, best first; ``refused``, files that only look like one; ``tried``, a phrase for each place searched.

    ``origin`` is None when a repository was named, because then it is not needed.
    """

    origin: Origin | None
    candidates: tuple[MatrixCandidate, ...]
    refused: tuple[Refused, ...]
    tried: tuple[str, ...]


def find(source: Source, model: Model | None, request: PublishedRequest, hub: Hub, *, guess: bool = True) -> Findings:
    """The candidates of a request, ranked. Raises :class:`DownloadError` if there is none."""
    if "/" in request.wanted:
        findings = _in_repository(request.wanted, hub)
    else:
        origin = _origin(source, model, request.base_model, hub)
        _announce(origin, hub.sink, guess=guess)
        findings = _search(origin, request.wanted, hub)
    findings = _look_into_cache(findings, hub)
    if not findings.candidates:
        raise _nothing(findings, request, hub)
    return findings


def _origin(source: Source, model: Model | None, base_model: str | None, hub: Hub) -> Origin:
    """Find the published model that these weights belong to. Raises :class:`UsageError` if nothing names it."""
    if base_model is not None:
        return given_origin(base_model)
    if isinstance(source, HubId):
        listing = hub.look_up(source.repo)
        base = listing.quantised_from if isinstance(listing, Listing) else ()
        return Origin(base[0], f"the tags of {source.repo}") if base else Origin(source.repo, "the hub id given")
    if isinstance(source, LocalDirectory):
        origin = origin_of_directory(source.path)
        why = "neither its config.json (_name_or_path) nor its README.md (base_model) names a repository of a hub"
    else:
        origin = origin_of_gguf(model.header.metadata) if model is not None else None
        why = "its metadata (general.source.*, general.base_model.*, general.organization) names no repository of a hub"
    if origin is None:
        raise UsageError(
            f"The published model that {source.path} belongs to is unknown",
            why,
            "Name it with --base-model ORG/NAME, as its page on the hub is called.",
        )
    return origin


def _announce(origin: Origin, sink: Sink, *, guess: bool) -> None:
    """Report a guessed base model. Without ``guess``, as in ``run``, raises :class:`UsageError` instead."""
    if origin.sure:
        sink(info(f"Base model {origin.repo}, from {origin.how}"))
        return
    doubt = f"The base model may be {origin.repo}, from {origin.how}"
    if not guess:
        raise UsageError(doubt, "or that is the model it was fine-tuned from", "Name it with --base-model ORG/NAME.")
    sink(warning(f"{doubt}; if this model was fine-tuned from that, name its own page with --base-model ORG/NAME."))


def _search(origin: Origin, publisher: str, hub: Hub) -> Findings:
    """Use the hub's own search, then look in every place where a known publisher would put the imatrix."""
    tagged = hub.made_from(origin.repo)
    promising = [PublishedPlace(found.repo) for found in tagged if any(_worth_a_look(file, origin) for file in found.files)]
    tried = [] if hub.offline else [f"{len(tagged)} repositories tagged as quantised from {origin.repo}"]
    candidates: list[MatrixCandidate] = []
    refused: list[Refused] = []
    for place in {(place.repo_type, place.repo.lower()): place for place in (*promising, *places(origin))}.values():
        if publisher and place.repo.partition("/")[0].lower() != publisher.lower():
            continue
        listing = hub.look_up(place.repo, place.repo_type)
        if isinstance(listing, str):
            tried.append(f"{place.repo} ({listing})")
            continue
        good, bad = _candidates(listing, origin, place)
        candidates += good
        refused += bad
        if not good:
            tried.append(f"{place.repo} (no imatrix of it)")
    return Findings(origin, tuple(candidates), tuple(refused), tuple(tried))


def _worth_a_look(file: RepoFile, origin: Origin) -> bool:
    return is_named_imatrix(file.name) and refusal(file.name, file.size, origin.name) is None


def _candidates(listing: Listing, origin: Origin, place: PublishedPlace) -> tuple[list[MatrixCandidate], list[Refused]]:
    candidates: list[MatrixCandidate] = []
    refused: list[Refused] = []
    mismatch = None if place.shared else made_from_another(listing.repo, listing.base_model, listing.quantised_from, origin)
    for file in listing.files:
        if not is_named_imatrix(file.name) or (place.shared and not names_model(file.name, origin.name)):
            continue
        why = refusal(file.name, file.size, origin.name) or mismatch
        if why is not None:
            refused.append(Refused(listing.repo, file.name, why))
        else:
            candidates.append(_candidate(listing, file))
    return candidates, refused


def _candidate(listing: Listing, file: RepoFile) -> MatrixCandidate:
    repo_type: RepoType = "dataset" if listing.repo_type == "dataset" else "model"
    kind = format_by_name(file.name)
    return MatrixCandidate(listing.repo, repo_type, listing.commit, file.name, file.size, listing.date, kind)


def _in_repository(wanted: str, hub: Hub) -> Findings:
    """What one repository offers, or the one file in it that was named (whatever its name says)."""
    hub_id = parse_wanted(wanted)
    repo_type: RepoType = next((known.repo_type for known in PUBLISHERS if hub_id.repo in known.repos), "model")
    listing = hub.repository(hub_id.repo, repo_type)
    if hub_id.file is None:
        named = [file for file in listing.files if is_named_imatrix(file.name)]
    else:
        named = [file for file in listing.files if file.name == hub_id.file]
        if not named:
            names = [file.name for file in listing.files]
            near = [name for name in names if is_named_imatrix(name)] or get_close_matches(hub_id.file, names)
            raise DownloadError(
                f"{hub_id.repo} has no file {hub_id.file}",
                f"it holds {', '.join(near[:3])}" if near else "and it has no file with imatrix in its name",
                f"Name one that exists: --from {hub_id.repo}:{near[0]}" if near else "See what there is with: find MODEL",
            )
    checked = [(file, refusal(file.name if hub_id.file is None else "", file.size, "")) for file in named]
    refused = tuple(Refused(listing.repo, file.name, why) for file, why in checked if why)
    return Findings(None, tuple(_candidate(listing, file) for file, why in checked if not why), refused, (listing.repo,))


def _look_into_cache(findings: Findings, hub: Hub) -> Findings:
    """Rank with the true format and chunks of files that were fetched before."""
    candidates: list[MatrixCandidate] = []
    refused = list(findings.refused)
    for candidate in findings.candidates:
        path = hub.cached(listing_of(candidate), RepoFile(candidate.file, candidate.size))
        try:
            candidates.append(checked(candidate, read(path)) if path is not None else candidate)
        except InvalidDataError as error:
            refused.append(Refused(candidate.repo, candidate.file, error.why))
    return replace(findings, candidates=rank(candidates), refused=tuple(refused))


def compute_one(request: PublishedRequest) -> str:
    """Return the remedy when no published imatrix can be used."""
    return f"Compute one with: imatrix-runner imatrix generate {shlex.quote(request.model)}"


def checked(candidate: MatrixCandidate, file: MatrixFile) -> MatrixCandidate:
    return replace(candidate, format=file.format, chunks=file.matrix.chunk_count, checked=True)


def listing_of(candidate: MatrixCandidate) -> Listing:
    return Listing(candidate.repo, candidate.repo_type, candidate.commit, candidate.date, ())


def _nothing(findings: Findings, request: PublishedRequest, hub: Hub) -> DownloadError:
    of = findings.origin.repo if findings.origin is not None else request.wanted
    looked = [*findings.tried, *(f"refused {refused}" for refused in findings.refused)]
    return DownloadError(
        f"No imatrix of {of} is in the cache" if hub.offline else f"No imatrix of {of} is published",
        f"tried {'; '.join(looked)}",
        compute_one(request),
    )
