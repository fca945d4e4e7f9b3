"""Collecting, whichever engine computes: what ends up in the matrix, when it stops, and what a kill at any moment changes."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from imatrix_runner.documents.corpus import Corpus, open_corpus
from imatrix_runner.engines.binaries.engine import BinariesEngine
from imatrix_runner.engines.contract import Engine
from imatrix_runner.engines.embedded.engine import EmbeddedEngine
from imatrix_runner.engines.jobs import ChunkRange
from imatrix_runner.errors import EngineError, InvalidDataError, NoSpaceError
from imatrix_runner.events import Event, Finished, Notice, Progress, Saved
from imatrix_runner.imatrix import collect as collecting
from imatrix_runner.imatrix.chunks import ChunkPlan, plan_chunks
from imatrix_runner.imatrix.collect import CollectRequest, CollectResult, clean_parts, collect
from imatrix_runner.imatrix.convergence import converged
from imatrix_runner.imatrix.formats import prepare_gguf, read, write_gguf
from imatrix_runner.imatrix.matrix import Matrix, MatrixEntry
from imatrix_runner.journal import Journal
from imatrix_runner.workspace import Workspace
from support.synthetic import EXPERTS, OPTIONS, SyntheticEngine, expected, one_chunk
from support.values import same_matrix

TOKENS = 40 * OPTIONS.n_ctx + 1


class Killed(BaseException):
    """What SIGKILL leaves behind is tested by leaving, with no handler in between."""


def plan(**changes: Any) -> ChunkPlan:
    return plan_chunks(TOKENS, OPTIONS, **{"range_size": 4, "limit": 20, **changes})


@dataclass
class Place:
    """A workspace that outlives processes, and what was told in it."""

    root: Path
    corpus: Corpus
    told: list[Event]

    @property
    def workspace(self) -> Workspace:
        return Workspace(self.root, "m")

    @property
    def parts(self) -> Path:
        return self.workspace.parts

    @property
    def files(self) -> list[str]:
        return sorted(path.name for path in self.parts.iterdir())

    def request(self, chunk_plan: ChunkPlan, **changes: Any) -> CollectRequest:
        inputs = {"calibration text": self.corpus.sha256, "chunks": repr(chunk_plan.ranges)}
        plain = CollectRequest(
            self.root / "m.gguf", self.corpus, OPTIONS, chunk_plan, self.root / "o.gguf", inputs, 1000, lambda: None
        )
        return replace(plain, **changes)

    def run(self, engine: Engine, chunk_plan: ChunkPlan, **changes: Any) -> CollectResult:
        self.told.clear()
        journal = Journal(self.workspace.journal)
        return collect(self.request(chunk_plan, **changes), engine, self.workspace, journal, self.told.append)

    def notices(self) -> list[str]:
        return [event.text for event in self.told if isinstance(event, Notice)]

    def detail(self) -> str:
        (finished,) = [event for event in self.told if isinstance(event, Finished)]
        return finished.detail


@pytest.fixture
def make_place(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Place]:
    def make() -> Place:
        root = tmp_path_factory.mktemp("place")
        (root / "words.txt").write_text("words " * 100)
        return Place(root / "work", open_corpus(root / "words.txt"), [])

    return make


@pytest.fixture
def place(make_place: Callable[[], Place]) -> Place:
    return make_place()


def content(result: CollectResult, folder: Path) -> bytes:
    """The bytes of the file it becomes."""
    write_gguf(result.matrix, folder / "final.gguf")
    return (folder / "final.gguf").read_bytes()


def sums(matrix: Matrix) -> Matrix:
    """Without what ranges do not know of."""
    return replace(matrix, datasets=(), chunk_count=0)


@pytest.mark.parametrize("exact", [True, False])
def test_ranges_are_added_in_order(exact: bool, place: Place) -> None:
    engine = SyntheticEngine(exact=exact, capabilities=(EmbeddedEngine if exact else BinariesEngine).capabilities)
    result = place.run(engine, plan())
    assert engine.computed == list(plan().ranges)
    if exact:
        assert same_matrix(sums(result.matrix), sums(expected(plan().ranges)))
    else:
        for name, entry in expected(plan().ranges).entries.items():
            assert result.matrix.entries[name].sums == pytest.approx(entry.sums, rel=1e-6)
    assert (result.matrix.chunk_count, result.matrix.datasets) == (20, ("words.txt",))
    assert (result.chunks, result.ranges, result.stopped) == (20, plan().ranges, "chunks")
    assert (result.seconds, result.load_seconds) == (5, pytest.approx(0.5))
    assert place.detail() == "20 chunks, 2 entries, PPL 7.3891 +/- 0.4273"
    assert place.files == ["calibration.txt", "checkpoint.gguf"]
    (job,) = engine.jobs
    assert job.text.read_bytes() == place.corpus.path.read_bytes()
    progress = [event for event in place.told if isinstance(event, Progress)]
    assert [event.done for event in progress] == [4, 4, 8, 8, 12, 12, 16, 16, 20, 20]
    assert {event.total for event in progress} == {20}
    clean_parts(place.workspace)
    assert not place.parts.exists()


def test_a_tensor_without_data_is_named_with_the_option_that_mends_it(place: Place) -> None:
    names = frozenset((*expected(plan().ranges).entries, "blk.8.attn_q.weight", "blk.9.attn_q.weight"))
    place.run(SyntheticEngine(), plan(), expected=names)
    (told,) = place.notices()
    assert "blk.8.attn_q.weight and 1 more" in told
    assert "--uncovered q4_k" in told
    assert place.told.index(Notice("warning", told)) < len(place.told) // 2  # not at the end of it all


def test_the_curve_tells_how_it_settled(place: Place) -> None:
    curve = place.run(SyntheticEngine(), plan(limit=None)).curve
    assert [point.chunks for point in curve] == list(range(8, 41, 4))
    assert all(0 < point.median <= point.worst < 1 for point in curve)
    assert curve[-1].worst < curve[0].worst
    assert {point.tensor for point in curve} <= {"blk.0.attn_q", "blk.0.ffn_down_exps"}


def test_a_large_matrix_has_a_curve_only_when_asked_for(place: Place) -> None:
    large = collecting.CHEAP_CURVE_BYTES + 1
    assert place.run(SyntheticEngine(), plan(), n_bytes=large).curve == ()
    clean_parts(place.workspace)
    assert len(place.run(SyntheticEngine(), plan(), n_bytes=large, tolerance=1e-9).curve) == 4


def dies_before(*ranges: ChunkRange) -> Callable[[ChunkRange], None]:
    def check(chunks: ChunkRange) -> None:
        if chunks in ranges:
            raise Killed

    return check


def test_what_is_in_the_checkpoint_is_not_computed_again(place: Place, make_place: Callable[[], Place], tmp_path: Path) -> None:
    ranges = plan().ranges
    with pytest.raises(Killed):
        place.run(SyntheticEngine(before=dies_before(ranges[3])), plan())
    engine = SyntheticEngine()
    result = place.run(engine, plan())
    assert engine.computed == list(ranges[3:])
    other = make_place()
    assert content(result, tmp_path) == content(other.run(SyntheticEngine(), plan()), tmp_path)
    assert (result.seconds, result.perplexity) == (5, other.run(SyntheticEngine(), plan()).perplexity)
    assert ", 12 chunks kept, PPL 7.3891" in place.detail()
    assert place.notices() == []


def test_a_finished_collection_starts_no_engine(place: Place, tmp_path: Path) -> None:
    """As when a kill came between its last range and the recording of the file."""
    first = content(place.run(SyntheticEngine(), plan()), tmp_path)
    engine = SyntheticEngine()
    assert content(place.run(engine, plan()), tmp_path) == first
    assert engine.jobs == []


class Death:
    """Kills at the ``at``-th of all file operations that last (renames and removals), before or after it."""

    def __init__(self, at: int, *, after: bool) -> None:
        self.at, self.after, self.seen = at, after, 0

    def __call__(self, operation: Callable[..., Any]) -> Callable[..., Any]:
        def act(*arguments: Any, **options: Any) -> Any:
            self.seen += 1
            if self.seen == self.at and not self.after:
                raise Killed
            result = operation(*arguments, **options)
            if self.seen == self.at:
                raise Killed
            return result

        return act


RULES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "snapshots": ({"save_frequency": 7}, {}),
    "converged": ({"spread": True, "limit": None}, {"tolerance": 0.05}),
    "experts": ({"beyond": True, "limit": 8}, {"least_tokens": 3}),
    "both": ({"beyond": True, "spread": True, "limit": 24}, {"tolerance": 0.1, "least_tokens": 3}),
}


@pytest.mark.parametrize("rules", RULES)
@settings(suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture], max_examples=25)
@given(st.data())
def test_killed_anywhere_it_ends_with_the_same_bytes(
    rules: str, make_place: Callable[[], Place], tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Killed again and again, at any rename or removal, before or after it, until one gets through."""
    cut, changes = RULES[rules]
    folder = tmp_path_factory.mktemp("final")
    quiet, place = make_place(), make_place()
    undisturbed = quiet.run(SyntheticEngine(), plan(**cut), **changes)
    for _ in range(12):
        death = Death(data.draw(st.integers(1, 9)), after=data.draw(st.booleans()))
        with pytest.MonkeyPatch.context() as patch:
            for name in ("replace", "unlink"):
                patch.setattr(Path, name, death(getattr(Path, name)))
            try:
                place.run(SyntheticEngine(), plan(**cut), **changes)
                break
            except Killed:
                continue
    result = place.run(SyntheticEngine(), plan(**cut), **changes)
    assert content(result, folder) == content(undisturbed, folder)
    assert (result.ranges, result.stopped, result.curve) == (undisturbed.ranges, undisturbed.stopped, undisturbed.curve)
    snapshots = sorted(path.name for path in quiet.root.glob("o.gguf.at_*"))
    assert sorted(path.name for path in place.root.glob("o.gguf.at_*")) == snapshots
    for name in snapshots:
        assert (place.root / name).read_bytes() == (quiet.root / name).read_bytes()


def test_snapshots_are_of_the_chunks_so_far(place: Place) -> None:
    place.run(SyntheticEngine(), plan(range_size=10, save_frequency=6))
    assert sorted(path.name for path in place.root.glob("o.gguf.at_*")) == ["o.gguf.at_12", "o.gguf.at_18", "o.gguf.at_6"]
    found = read(place.root / "o.gguf.at_12").matrix
    assert (found.chunk_count, found.datasets) == (12, ("words.txt",))
    for name, entry in expected([ChunkRange(0, 6), ChunkRange(6, 4), ChunkRange(10, 2)]).entries.items():
        assert found.entries[name].sums == pytest.approx(entry.sums, rel=1e-6)
    assert next(event.what for event in place.told if isinstance(event, Saved)) == "imatrix of the first 6 chunks"


def test_snapshots_for_another_place_are_made_there(place: Place) -> None:
    with pytest.raises(Killed):
        place.run(SyntheticEngine(before=dies_before(ChunkRange(12, 4))), plan(save_frequency=4))
    place.run(SyntheticEngine(), plan(save_frequency=4), out=place.root / "p.gguf")
    assert len(list(place.root.glob("p.gguf.at_*"))) == 4
    assert "(changed: snapshots: o.gguf -> p.gguf)" in place.notices()[0]


def cut_in_half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def garbage(path: Path) -> None:
    whole = bytearray(path.read_bytes())
    whole[-100] ^= 1
    path.write_bytes(whole)


@pytest.mark.parametrize("damage", [cut_in_half, garbage, lambda path: path.write_bytes(b"")], ids=["cut", "garbage", "empty"])
def test_a_damaged_checkpoint_is_told_in_one_line_and_thrown_away(
    damage: Callable[[Path], None], place: Place, tmp_path: Path
) -> None:
    undisturbed = content(place.run(SyntheticEngine(), plan()), tmp_path)
    damage(place.parts / "checkpoint.gguf")
    (place.parts / "000000-000004.gguf").write_bytes(b"of the damaged collection")
    engine = SyntheticEngine()
    assert content(place.run(engine, plan()), tmp_path) == undisturbed
    assert engine.computed == list(plan().ranges)
    (told,) = place.notices()
    assert told.startswith("The unfinished imatrix in the workspace cannot be continued and starts again (")


def test_another_text_is_named(place: Place) -> None:
    place.run(SyntheticEngine(), plan())
    place.corpus.path.write_text("other words " * 100)
    place.corpus = open_corpus(place.corpus.path)
    engine = SyntheticEngine()
    place.run(engine, plan())
    assert engine.computed == list(plan().ranges)
    assert "(changed: calibration text: " in place.notices()[0]
    assert engine.jobs[0].text.read_text().startswith("other")


def test_an_engine_may_leave_its_own_work_and_hears_what_it_is_of(place: Place) -> None:
    """What an engine left stays for it, as long as the job is the same; the fingerprint tells."""
    left = place.parts / "engine.state"

    def leave(chunks: ChunkRange) -> None:
        left.write_text("half a range")
        dies_before(plan().ranges[2])(chunks)

    first, second, other = SyntheticEngine(before=leave), SyntheticEngine(), SyntheticEngine()
    with pytest.raises(Killed):
        place.run(first, plan())
    place.run(second, plan())
    assert left.exists()
    place.run(other, plan(limit=18))
    assert not left.exists()
    prints = [engine.jobs[0].fingerprint for engine in (first, second, other)]
    assert prints[0] == prints[1] != prints[2]


NAN = MatrixEntry(one_chunk(0).entries[EXPERTS].sums * float("nan"), one_chunk(0).entries[EXPERTS].counts)


def with_nan(path: Path) -> None:
    matrix = one_chunk(0)
    prepare_gguf(replace(matrix, entries={**matrix.entries, EXPERTS: NAN}), path, exact=True).replace(path)


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (cut_in_half, ""),
        (with_nan, f"{EXPERTS} holds NaN or infinite values"),
        (lambda path: write_gguf(one_chunk(0), path), "it counted 32 tokens instead of 128"),
        (lambda path: write_gguf(replace(one_chunk(0), chunk_size=64), path), "its chunks have 64 tokens instead of 32"),
        (Path.unlink, "No such file"),
    ],
    ids=["cut", "nan", "count", "context", "missing"],
)
def test_a_range_that_is_not_whole_does_not_count(damage: Callable[[Path], None], why: str, place: Place) -> None:
    """The ranges before it do, and the next run computes it again."""
    engine = SyntheticEngine()
    engine.damage = lambda path: damage(path) if len(engine.computed) == 2 else None
    with pytest.raises(InvalidDataError, match="The imatrix of chunks 8 to 11 is not usable") as caught:
        place.run(engine, plan())
    assert why in caught.value.why
    again = SyntheticEngine()
    assert same_matrix(sums(place.run(again, plan()).matrix), sums(expected(plan().ranges)))
    assert again.computed == list(plan().ranges[2:])


def test_a_weight_used_twice_counts_twice(place: Place) -> None:
    engine = SyntheticEngine()

    def double(path: Path) -> None:
        matrix = read(path, exact=True).matrix
        entries = {name: MatrixEntry(2 * entry.sums, 2 * entry.counts) for name, entry in matrix.entries.items()}
        prepare_gguf(replace(matrix, entries=entries), path, exact=True).replace(path)

    engine.damage = double
    assert place.run(engine, plan()).matrix.chunk_count == 40


def test_a_model_that_changes_meanwhile_ends_it(place: Place) -> None:
    def changed() -> None:
        raise InvalidDataError("The model changed", "it did", "Run it again.")

    with pytest.raises(InvalidDataError, match="The model changed"):
        place.run(SyntheticEngine(), plan(), check_unchanged=changed)
    assert not (place.parts / "checkpoint.gguf").exists()


def test_no_space_is_told_with_figures(place: Place) -> None:
    def full(chunks: ChunkRange) -> None:
        raise NoSpaceError("The disk is full", "somewhere", "Free some space.")

    with pytest.raises(NoSpaceError, match="Not enough disk space for the imatrix") as caught:
        place.run(SyntheticEngine(before=full), plan(), n_bytes=1 << 60)
    assert " needed, " in caught.value.why
    with pytest.raises(NoSpaceError, match="The disk is full"):
        place.run(SyntheticEngine(before=full), plan())


def test_an_engine_that_ends_early_or_mixes_up_its_ranges_is_told(place: Place) -> None:
    class Lazy(SyntheticEngine):
        def collect(self, job: Any, sink: Any, on_range: Any) -> None:
            super().collect(replace(job, ranges=self.choose(job.ranges)), sink, on_range)

        def choose(self, ranges: Sequence[ChunkRange]) -> tuple[ChunkRange, ...]:
            return tuple(ranges[:2])

    class Confused(Lazy):
        def choose(self, ranges: Sequence[ChunkRange]) -> tuple[ChunkRange, ...]:
            return tuple(reversed(ranges))

    with pytest.raises(EngineError, match="ended early") as caught:
        place.run(Lazy(), plan())
    assert "8 of 20 chunks are done" in caught.value.why
    with pytest.raises(EngineError, match="returned ranges in the wrong order"):
        place.run(Confused(), plan())


class TestUntilConverged:
    def test_it_stops_at_the_second_good_point(self, place: Place) -> None:
        cut = plan(spread=True, limit=None)
        whole = place.run(SyntheticEngine(), cut).curve
        clean_parts(place.workspace)
        tolerance = sorted(point.worst for point in whole)[4]
        chunks = converged(whole, tolerance)
        assert chunks is not None
        engine = SyntheticEngine()
        result = place.run(engine, cut, tolerance=tolerance)
        assert (result.chunks, result.stopped) == (chunks, "converged" if chunks < 40 else "chunks")
        assert result.curve == whole[: len(result.curve)]
        assert engine.computed == list(cut.ranges[: len(engine.computed)])
        assert result.matrix.chunk_count == chunks
        last = result.curve[-1]
        told = f"converged after {chunks} of 40 chunks: worst {last.worst:.3f} ({last.tensor}), median {last.median:.3f}"
        assert place.detail().endswith(told)

    def test_it_never_computes_more_than_was_asked_for(self, place: Place) -> None:
        result = place.run(SyntheticEngine(), plan(spread=True), tolerance=1e-9)
        assert (result.chunks, result.stopped) == (20, "chunks")
        assert "not converged: worst 0." in place.detail()

    def test_text_without_variation_is_enough_after_three_ranges(self, place: Place) -> None:
        engine = SyntheticEngine(changes={"noise": 0.0})
        result = place.run(engine, plan(spread=True), tolerance=0.5)
        assert (result.chunks, result.stopped, len(result.curve)) == (12, "converged", 2)

    def test_two_ranges_cannot_tell(self, place: Place) -> None:
        result = place.run(SyntheticEngine(), plan(range_size=10, spread=True), tolerance=1.0)
        assert (result.chunks, result.stopped) == (20, "chunks")
        assert "not converged: worst" in place.detail()


class TestMinExpertTokens:
    """The last expert sees three tokens in every 40th chunk, that is: in chunk 39 (or in every ``rare``-th)."""

    def test_it_goes_on_past_the_chunks_until_every_expert_was_met(self, place: Place) -> None:
        engine = SyntheticEngine(changes={"rare": 15})
        cut = plan(limit=8, beyond=True)
        result = place.run(engine, cut, least_tokens=6)
        assert (result.chunks, result.stopped) == (32, "covered")  # chunks 14 and 29
        assert result.matrix.counts(EXPERTS)[3] == 6
        assert place.detail().endswith("every expert saw at least 6 tokens")
        assert place.notices() == []

    def test_it_ends_with_the_text_and_names_who_is_missing(self, place: Place) -> None:
        result = place.run(SyntheticEngine(), plan(limit=8, beyond=True), least_tokens=10)
        assert (result.chunks, result.stopped) == (40, "text")
        assert place.notices() == [
            "The text ended before every expert saw 10 tokens: blk.0.ffn_down_exps: expert 3 of 4 saw 3 tokens"
        ]

    def test_it_does_nothing_where_all_were_met(self, place: Place) -> None:
        result = place.run(SyntheticEngine(changes={"rare": 2}), plan(limit=8, beyond=True), least_tokens=6)
        assert (result.chunks, result.stopped) == (8, "chunks")

    def test_after_it_has_converged(self, place: Place) -> None:
        """The rest of what was asked for comes first, then what lies beyond."""
        engine = SyntheticEngine(changes={"noise": 0.0, "rare": 37})
        cut = plan(limit=20, beyond=True, spread=True)
        result = place.run(engine, cut, tolerance=0.9, least_tokens=3)
        assert result.stopped == "covered"
        assert engine.computed == list(cut.ranges[: len(engine.computed)])
        assert engine.computed[-1] == next(chunks for chunks in cut.ranges if chunks.first <= 36 < chunks.end)
        assert "converged after 12 of 20 chunks" in place.detail()
        progress = [event for event in place.told if isinstance(event, Progress)]
        assert all(event.total is not None and event.done <= event.total for event in progress)


def test_random_plans_and_kills_agree_with_plain_addition(make_place: Callable[[], Place]) -> None:
    """A second opinion on all of it together: whatever was cut and killed, the sums are those of the ranges that were done."""
    chooser = random.Random(5)
    for _ in range(10):
        place = make_place()
        cut = plan(range_size=chooser.randint(1, 9), limit=chooser.randint(2, 39), spread=chooser.random() < 0.5)
        for victim in sorted(chooser.sample(range(len(cut.ranges)), min(2, len(cut.ranges)))):
            with pytest.raises(Killed):
                place.run(SyntheticEngine(before=dies_before(cut.ranges[victim])), cut)
        result = place.run(SyntheticEngine(), cut)
        assert same_matrix(sums(result.matrix), sums(expected(cut.ranges)))
        shutil.rmtree(place.root)
