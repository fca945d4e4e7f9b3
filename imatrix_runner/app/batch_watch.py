"""``batch run --watch``: looks at a hub for new models at an interval, in a thread, and adds those that fit to the list.

The list, what was added to it and the journal are the only memory: whatever is named there is never added again.
"""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from imatrix_runner.batch.batch_folder import BatchFolder, append_addition
from imatrix_runner.batch.batch_journal import BatchHistory, BatchJournal, WatchBegan, WatchLooked
from imatrix_runner.batch.batch_list import (
    MOST_ENTRIES,
    BatchEntry,
    OptionText,
    added_models,
    parse_entry,
    read_additions,
    refuse_twice,
)
from imatrix_runner.batch.check_list import CheckedModel, ListChecker
from imatrix_runner.batch.watch_filter import is_new, refusal, refusal_checked
from imatrix_runner.context.context import Context
from imatrix_runner.context.requests import WatchRequest
from imatrix_runner.errors import DownloadError, InterruptedRunError, RunnerError, UsageError
from imatrix_runner.events import info, warning
from imatrix_runner.files import human_seconds
from imatrix_runner.models.hub import Announcement, Announcements, WatchedPlace, concerns_one_file
from imatrix_runner.models.hub.announcements import MOST_PAGES, PAGE
from imatrix_runner.models.model import model_name, parse_source
from imatrix_runner.safe_text import shown

_MOST_CHECKS = 20
_MOST_DESCRIBED = 100
"""Models that one look asks the hub about, each by itself: those that seem to fit, and those that a listing only names."""
_POLL_SECONDS = 0.5


@dataclass(frozen=True)
class PlaceLook:
    """What a look at a place found: ``listed`` models, of which ``fitting`` are to be added, and ``left_out`` with the reasons;
    ``waiting`` are left to the next look. ``first``: it was the first look at an owner, whose models are not new then.
    ``problem``: why there was no answer."""

    place: WatchedPlace
    listed: int = 0
    fitting: tuple[CheckedModel, ...] = ()
    left_out: tuple[tuple[str, str], ...] = ()
    waiting: int = 0
    first: WatchBegan | None = None
    problem: str = ""


@dataclass
class _Budget:
    """What one look may still do, and the entries that it has ``chosen``."""

    additions: int
    checks: int = _MOST_CHECKS
    described: int = _MOST_DESCRIBED
    chosen: list[BatchEntry] = field(default_factory=list)


@dataclass
class WatchLooker:
    """Looks at places, and writes nothing. ``listed``: the entries of the list itself, ``known`` the options that an entry may
    give, ``defaults`` those of the list."""

    request: WatchRequest
    folder: BatchFolder
    checker: ListChecker
    listed: Sequence[BatchEntry]
    known: frozenset[str]
    defaults: Mapping[str, OptionText]
    history: Callable[[], BatchHistory]
    _refused: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Why models were left out, with their version, so that the hub is not asked again before they change."""

    def looks(self) -> Iterator[PlaceLook]:
        """Look at every place once. A hub that does not answer, or not as a hub does, is a problem of the look. Raises
        ``InterruptedRunError``."""
        budget = _Budget(self.request.most)
        for place in self.request.places:
            try:
                yield self._look(place, budget)
            except InterruptedRunError:
                raise
            except RunnerError as error:
                yield PlaceLook(place, problem=error.sentence())

    def _look(self, place: WatchedPlace, budget: _Budget) -> PlaceLook:
        hub = Announcements(self.checker.stop, self.checker.trust_remote_code)
        history = self.history()
        lines, added = added_models(self.folder.additions)
        everything = [*{entry.model: entry for entry in (*self._entries(), *budget.chosen)}.values()]
        known = {_repository(name) for name in (*(entry.model for entry in everything), *added, *[*history.models])}
        first = history.watched.get(str(place))
        there = {repo.lower() for repo in first.there} if first is not None else set()
        found = hub.at(place, lambda repo: repo.lower() in known or repo.lower() in there)
        if place.kind == "owner" and first is None and not self.request.since:
            oldest = found[-1].created if len(found) >= PAGE * MOST_PAGES else ""
            return PlaceLook(place, len(found), first=WatchBegan(str(place), tuple(each.repo for each in found), oldest))
        new = [each for each in found if each.repo.lower() not in known and is_new(each, place, self.request, history)]
        if new and lines + budget.additions > MOST_ENTRIES:
            raise UsageError(
                "No more models can be added to this batch",
                f"{lines} were added, and {MOST_ENTRIES} is the most",
                "Begin another list.",
            )
        fitting: list[CheckedModel] = []
        left_out: list[tuple[str, str]] = []
        waiting = 0
        for each in new:
            if budget.additions <= 0 or budget.checks <= 0 or budget.described <= 0:
                waiting += 1
                continue
            outcome = self._examine(hub, each, budget, everything)
            if isinstance(outcome, str):
                left_out.append((each.repo, outcome))
                continue
            fitting.append(outcome)
            everything.append(outcome.entry)
            budget.chosen.append(outcome.entry)
            budget.additions -= 1
        return PlaceLook(place, len(found), tuple(fitting), tuple(left_out), waiting)

    def _entries(self) -> list[BatchEntry]:
        """The entries of the list, and of what was added to it."""
        return [*self.listed, *read_additions(self.folder.additions, self.known, self.listed, self.defaults)[0]]

    def _examine(
        self, hub: Announcements, listed: Announcement, budget: _Budget, everything: Sequence[BatchEntry]
    ) -> CheckedModel | str:
        """The model, checked as an entry of the list, or why it is left out."""
        name = listed.repo.lower()
        version, why = self._refused.get(name, ("", ""))
        if why and version == listed.version:
            return why
        why, lasting = "", True
        try:
            described = listed
            if not listed.described:
                budget.described -= 1
                described = hub.describe(listed.repo)
            if not (why := refusal(described, self.request)):
                entry = self._entry(described, everything)
                budget.checks -= 1
                checked = self.checker.check_one(entry)
                if not (why := refusal_checked(checked, self.request) or _collision(checked, everything)):
                    return checked
                # Access may be granted, and a network may recover, without a change of the model.
                lasting = checked.problem is None or checked.problem.kind != DownloadError.kind
        except InterruptedRunError:
            raise
        except RunnerError as error:
            if isinstance(error, DownloadError) and not concerns_one_file(error):
                raise
            why, lasting = f"{error.what}: {error.why}", not isinstance(error, DownloadError)
        if lasting and listed.version:
            self._refused[name] = (listed.version, why)
        return why

    def _entry(self, described: Announcement, everything: Sequence[BatchEntry]) -> BatchEntry:
        """The entry that ``batch add`` would make. Raises :class:`RunnerError` for one that it would refuse."""
        if described.architecture:
            self.checker.check_architecture(described.architecture, described.repo)
        if Path(described.repo).exists():
            raise UsageError(
                f"{described.repo} is the name of a local path",
                "the list would take that for the model",
                "Add the model with its revision: imatrix-runner batch add FILE ORG/NAME@main",
            )
        parse_source(described.repo)
        entry = parse_entry({"model": described.repo}, self.known, "--watch", self.defaults)
        refuse_twice([*everything, entry])
        return entry


def _collision(checked: CheckedModel, everything: Sequence[BatchEntry]) -> str:
    """Why a model would get into the way of others of the batch; empty if it does not."""
    targets = {_target(entry): entry.model for entry in everything if entry.publish}
    if checked.entry.model.lower() in targets:
        return "this batch publishes it"
    other = targets.get(checked.repo.lower(), "") if checked.repo else ""
    return f"it would be published to {checked.repo}, as {other} is" if other else ""


def _target(entry: BatchEntry) -> str:
    """The repository that an entry is published to, in lower case; empty where its model has no usable name."""
    try:
        return entry.repository(model_name(entry.model)).lower()
    except RunnerError:
        return ""


def _repository(model: str) -> str:
    """The repository of an entry's model without revision and file, in lower case; any other text for a path."""
    return model.partition("@")[0].partition(":")[0].strip().lower()


class BatchWatcher:
    """Looks at places again and again in a thread of its own, and appends what fits to the list."""

    def __init__(self, looker: WatchLooker, journal: BatchJournal, context: Context) -> None:
        self._looker, self._journal, self._context = looker, journal, context
        self.checked: dict[str, CheckedModel] = {}
        """What was added and not taken up yet, which need not be checked again."""
        self._over = threading.Event()
        self._last: dict[str, str] = {}
        self._thread = threading.Thread(target=self._watch, name="watch", daemon=True)

    @property
    def active(self) -> bool:
        """Whether something may still be added. It was all appended once this is False."""
        return self._thread.is_alive()

    @property
    def places(self) -> tuple[str, ...]:
        """What is watched; nothing once it is over."""
        return tuple(map(str, self._looker.request.places)) if self.active else ()

    @property
    def prospect(self) -> str:
        """When the next look is made, as a sentence."""
        end = " until Ctrl-C" if self._looker.request.lasts is None else ""
        return f"New models are looked for every {human_seconds(self._looker.request.every)}{end}."

    @contextmanager
    def running(self) -> Iterator[None]:
        """Watch while this context is active."""
        self._thread.start()
        try:
            yield
        finally:
            self._over.set()
            self._thread.join()

    def _watch(self) -> None:
        request, began = self._looker.request, time.monotonic()
        while not self._ended:
            looked = time.monotonic()
            try:
                self._look()
            except InterruptedRunError:
                return
            except RunnerError as error:  # the list or the journal cannot be written, on a full disk for example
                self._context.sink(warning(f"New models cannot be added now: {error.sentence()}"))
            except Exception:  # noqa: BLE001 - a bug in a look must not take the night
                last = traceback.format_exc().strip().splitlines()[-1]
                self._context.sink(warning(f"A bug in imatrix-runner ended a look for new models: {shown(last, 300)}"))
            due = looked + request.every
            if request.lasts is not None and due - began > request.lasts:
                return
            while time.monotonic() < due and not self._ended:
                self._over.wait(max(0.0, min(_POLL_SECONDS, due - time.monotonic())))

    @property
    def _ended(self) -> bool:
        return self._over.is_set() or self._context.stop.requested

    def _look(self) -> None:
        for look in self._looker.looks():
            place, names = str(look.place), tuple(model.entry.model for model in look.fitting)
            self.checked |= {model.entry.model: model for model in look.fitting}
            if names:  # before the journal: what was added is known by the list alone
                append_addition(self._looker.folder, [{"model": name} for name in names])
            if look.first is not None:
                self._journal.append(look.first)
            at = time.strftime("%Y-%m-%dT%H:%M:%S%z")
            self._journal.append(WatchLooked(place, at, look.listed, names, look.problem))
            self._report(look)

    def _report(self, look: PlaceLook) -> None:
        """Report what a look found; a problem only when it is not that of the look before."""
        place, sink = str(look.place), self._context.sink
        if look.problem and self._last.get(place) != look.problem:
            sink(warning(f"Looking for new models at {place} failed and will be tried again: {look.problem}"))
        self._last[place] = look.problem
        if look.fitting:
            names = ", ".join(model.entry.model for model in look.fitting)
            sink(info(f"New at {place}: {names}{f'; {look.waiting} more wait for the next look' if look.waiting else ''}."))
        if look.first is not None:
            missing = "" if look.listed else " Is the name right?"
            sink(info(f"Watching {place} for models that appear from now on; {look.listed} are there.{missing}"))
