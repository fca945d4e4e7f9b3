"""The schedule of a batch: order, one stage a lane, a disk bound that nothing exceeds, and no standstill."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from imatrix_runner.batch.schedule import (
    ModelNeeds,
    ModelProgress,
    StageStart,
    after,
    disk_without_bound,
    held_bytes,
    is_safe,
    next_starts,
    peak_bytes,
    without_room,
)

SIZES = st.integers(0, 40)


@st.composite
def needs(draw: st.DrawFn) -> ModelNeeds:
    publishes, keep = draw(st.booleans()), draw(st.sampled_from(("all", "levels", "nothing")))
    groups = draw(st.lists(st.integers(1, 20), min_size=1, max_size=5))
    if not (keep == "nothing" and publishes):
        groups = [sum(groups)]
    return ModelNeeds(draw(SIZES), draw(SIZES), tuple(groups), publishes, keep, draw(st.integers(0, 10)))  # type: ignore[arg-type]


def models(found: list[ModelNeeds]) -> list[ModelProgress]:
    return [ModelProgress(f"m{number}", each) for number, each in enumerate(found)]


@given(st.lists(needs(), min_size=1, max_size=6), st.integers(1, 200), st.integers(0, 1 << 30), st.integers(1, 4))
def test_whatever_ends_first_the_disk_is_never_exceeded_and_everything_that_fits_is_done(
    found: list[ModelNeeds], limit: int, seed: int, lanes: int
) -> None:
    """Stages end in any order, and some fail; afterwards everything is done but what failed or could not fit."""
    chooser = random.Random(seed)
    state = {model.name: model for model in models(found)}
    running: list[StageStart] = []
    done: list[StageStart] = []
    failed: set[str] = set()
    for _ in range(400):
        now = list(state.values())
        running += next_starts(now, running, limit, lanes)
        assert held_bytes(now, running) <= limit
        assert failed or is_safe(now, running, limit)  # a model that failed leaves more on the disk than one that is done
        assert max(Counter((start.lane, start.compute_lane) for start in running).values(), default=0) <= 1
        assert all(start.compute_lane < (lanes if start.lane == "compute" else 1) for start in running)
        assert len({(start.model, start.stage) for start in running}) == len(running)
        if not running:
            stuck = without_room(now, running, limit)
            if stuck is None:
                break
            # A model that cannot begin on an empty disk would take more than there is.
            others = sum(model.held(()) for model in now if model.name != stuck.name)
            assert failed or others + stuck.needs.peak > limit
            failed.add(stuck.name)
            state[stuck.name] = replace(stuck, ended=True, left=stuck.held(()))
            continue
        end = running.pop(chooser.randrange(len(running)))
        if chooser.random() < 0.05:
            failed.add(end.model)
            running = [start for start in running if start.model != end.model]
            state[end.model] = replace(state[end.model], ended=True, left=state[end.model].held(()))
            continue
        if end.model not in failed:
            done.append(end)
            state[end.model] = after(state[end.model], end)
    assert all(model.ended for model in state.values())
    for name, model in state.items():
        if name not in failed:
            assert model.finished
            stages = [start.stage for start in done if start.model == name]
            assert stages[:2] == ["download", "prepare"]
            assert stages.count("make") == len(model.needs.groups)
            assert ("complete" in stages) == model.needs.publishes


@given(st.lists(needs(), min_size=1, max_size=6), st.integers(1, 200), st.integers(1, 4))
def test_the_foreseen_peak_stays_within_the_limit(found: list[ModelNeeds], limit: int, lanes: int) -> None:
    peak, misfits = peak_bytes(models(found), limit, lanes)
    assert peak <= limit
    alone = {f"m{number}" for number, each in enumerate(found) if each.peak > limit}
    assert alone <= {*misfits}


def test_levels_rotate_through_source_and_two(tmp_path_factory: object) -> None:
    """--keep nothing: of one model never more than the source and two levels, however slow the upload is."""
    model = ModelProgress("m", ModelNeeds(100, 0, (10, 20, 30, 40), publishes=True, keep="nothing"))
    assert model.needs.peak == 100 + 30 + 40
    for done in (StageStart("m", "download"), StageStart("m", "prepare"), StageStart("m", "make", 0)):
        model = after(model, done)
    (start, upload) = sorted(next_starts([model], (), 170), key=lambda each: each.stage)
    assert (start.stage, start.group, upload.stage, upload.group) == ("make", 1, "publish", 0)
    model = after(model, start)
    assert next_starts([model], [upload], 170) == []  # two are there: the third waits for the upload
    model = after(model, upload)
    assert [(each.stage, each.group) for each in next_starts([model], (), 170)] == [("publish", 1), ("make", 2)]


def test_the_next_model_is_fetched_while_this_one_computes() -> None:
    first, second = models([ModelNeeds(10, 10, (5,), publishes=False, keep="levels")] * 2)
    first = after(first, StageStart("m0", "download"))
    starts = next_starts([first, second], (), 1000)
    assert [(start.model, start.stage) for start in starts] == [("m0", "prepare"), ("m1", "download")]
    # With room for one at a time, the second waits.
    assert [start.model for start in next_starts([first, second], (), 24)] == ["m0"]


def test_an_earlier_model_comes_first_in_every_lane() -> None:
    ready = [replace(model, downloaded=True, prepared=True) for model in models([ModelNeeds(1, 0, (1,), False, "all")] * 3)]
    assert [start.model for start in next_starts(ready, (), 100)] == ["m0"]


def test_each_compute_lane_takes_a_model_of_its_own_and_keeps_it() -> None:
    """Two lanes: two models are computed at a time; a model goes on where it was, if that lane is free."""
    ready = [replace(model, downloaded=True) for model in models([ModelNeeds(1, 0, (1,), False, "all")] * 3)]
    first, second = next_starts(ready, (), 100, 2)
    assert [(each.model, each.stage, each.compute_lane) for each in (first, second)] == [
        ("m0", "prepare", 0),
        ("m1", "prepare", 1),
    ]
    ready[1] = after(ready[1], second)
    assert next_starts(ready, [first], 100, 2) == [StageStart("m1", "make", 0, compute_lane=1)]
    ready[0] = after(ready[0], first)
    both = next_starts(ready, (), 100, 2)
    assert [(each.model, each.stage, each.compute_lane) for each in both] == [("m0", "make", 0), ("m1", "make", 1)]
    # Lane 0 is taken meanwhile: the other one is not left idle.
    taken = StageStart("m2", "prepare", compute_lane=0)
    assert next_starts([ready[0], ready[2]], [taken], 100, 2) == [StageStart("m0", "make", 0, compute_lane=1)]


def test_without_a_bound_the_disk_holds_as_many_models_as_are_computed() -> None:
    assert disk_without_bound([5, 30, 20]) == 30
    assert disk_without_bound([5, 30, 20], 2) == 50
    assert disk_without_bound([]) is None
