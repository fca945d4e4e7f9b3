"""Plans are decided from facts alone: here there is no file and no process."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imatrix_runner.engines.jobs import Fallback, QuantizeOptions
from imatrix_runner.engines.levels import Level
from imatrix_runner.imatrix.step import ImatrixStep
from imatrix_runner.journal import StepRecord, describe_change
from imatrix_runner.quantize.level_facts import MadeFacts
from imatrix_runner.quantize.plan import (
    MOST_JOBS,
    MOVE_AWAY,
    LevelStep,
    Plan,
    facts_of,
    level_inputs,
    needs_dry_run,
    order_levels,
    plan_jobs,
    plan_level,
)
from imatrix_runner.quantize.recipe import Recipe, RecipeTensor
from imatrix_runner.quantize.resolve import Resolved
from imatrix_runner.quantize.usable_imatrix import NO_IMATRIX, Failure

LEVEL = Level("Q4_K_M", "Q4_K_M")
FILES = (Path("/w/m/m-Q4_K_M.gguf"),)
INPUTS = {"model file": "sha256:" + "a" * 64, "imatrix": "none", "options": "Q4_K_M", "engine": "llama.cpp 1"}
TENSOR = RecipeTensor("blk.0.attn_q.weight", (256, 2), "BF16", "Q5_0", 352)
RECIPE = Recipe(LEVEL, (TENSOR,), (Fallback(TENSOR.name, "q4_K", "q5_0"),), (), (), False, 1000)
RESOLVED = Resolved(RECIPE, QuantizeOptions(), pinned=(TENSOR.name,))
GIB = 1 << 30


def record(inputs: dict[str, str] | None = None) -> StepRecord:
    return StepRecord.now(inputs or INPUTS, [], "not made yet", 1.0, facts=MadeFacts(facts_of(RESOLVED)))


def plan(
    made: StepRecord | None = None,
    *,
    inputs: dict[str, str] | None = None,
    intact: bool = False,
    resolved: Resolved | None = RESOLVED,
    foreign: bool = False,
) -> LevelStep:
    return plan_level(LEVEL, FILES, inputs or INPUTS, made, intact=intact, resolved=resolved, foreign=foreign)


def step_of(name: str, n_bytes: int | None, state: str = "todo") -> LevelStep:
    step = plan()
    facts = replace(step.facts, n_bytes=n_bytes)
    return replace(step, level=Level(name, name), facts=facts, state=state)  # type: ignore[arg-type]


def test_what_was_never_made_is_to_do() -> None:
    step = plan()
    assert (step.state, step.reason, step.step) == ("todo", "not made yet", "level-Q4_K_M")
    assert step.facts == facts_of(RESOLVED)


def test_what_is_there_from_the_same_inputs_is_up_to_date_and_needs_no_recipe() -> None:
    step = plan(record(), intact=True, resolved=None)
    assert (step.state, step.reason) == ("up-to-date", "made before from the same inputs")
    assert step.facts == facts_of(RESOLVED)


def test_a_file_that_is_gone_is_made_again() -> None:
    step = plan(record())
    assert (step.state, step.reason) == ("todo", "the file is gone or was changed")


def test_a_changed_input_is_named_with_before_and_after() -> None:
    now = {**INPUTS, "options": "Q4_K_M --pure", "model file": "sha256:" + "b" * 64}
    step = plan(record(), inputs=now, intact=True)
    assert step.state == "todo"
    assert step.reason == ("changed: model file: sha256:aaaaaaaaaaaa -> sha256:bbbbbbbbbbbb; options: Q4_K_M -> Q4_K_M --pure")


def test_an_input_that_came_or_went_is_described_as_none() -> None:
    assert describe_change("imatrix", None, "x") == "imatrix: none -> x"
    assert describe_change("imatrix", "x", "") == "imatrix: x -> none"


def test_a_foreign_file_is_never_replaced() -> None:
    step = plan(foreign=True)
    assert step.state == "fails"
    assert (step.reason, step.remedy) == ("m-Q4_K_M.gguf is there and was not made here", MOVE_AWAY)


def test_what_cannot_be_made_fails_with_the_first_reason() -> None:
    failing = replace(RECIPE, failures=(NO_IMATRIX, Failure("more", "Do more.")))
    step = plan(resolved=replace(RESOLVED, recipe=failing), foreign=True)
    assert (step.state, step.reason, step.remedy) == ("fails", NO_IMATRIX.why, NO_IMATRIX.todo)


@pytest.mark.parametrize("made", [None, record()])
@pytest.mark.parametrize("intact", [True, False])
@pytest.mark.parametrize("options", ["Q4_K_M", "Q4_K_M --pure"])
def test_a_dry_run_is_asked_for_exactly_where_the_plan_needs_its_recipe(
    made: StepRecord | None, intact: bool, options: str
) -> None:
    inputs = {**INPUTS, "options": options}
    up_to_date = plan(made, inputs=inputs, intact=intact).state == "up-to-date"
    assert needs_dry_run(made, inputs, intact=intact) is not up_to_date


def inputs_with(options: QuantizeOptions, level: Level = LEVEL, further: str = "") -> dict[str, str]:
    return level_inputs(level, options, source="s", imatrix="i", engine="e", further=further)


def test_inputs_name_everything_that_decides_the_bytes() -> None:
    options = QuantizeOptions(pure=True, exclude_weights=("ffn",), tensor_type_file=Path("/t.txt"))
    assert inputs_with(options, further="--tensor-type-file sha256:1") == {
        "model file": "s",
        "imatrix": "i",
        "options": "Q4_K_M --pure --exclude-weights ffn --tensor-type-file sha256:1",
        "engine": "e",
    }


def test_a_variant_differs_from_its_base_by_its_options() -> None:
    variant = Level("Q4_K_L", "Q4_K_M", "q8_0", "q8_0")
    assert inputs_with(QuantizeOptions(), variant)["options"] == (
        "Q4_K_M --output-tensor-type q8_0 --token-embedding-type q8_0"
    )


def test_what_changes_no_byte_is_no_input() -> None:
    assert inputs_with(QuantizeOptions(max_buffer_size=512)) == inputs_with(QuantizeOptions())


def test_only_what_is_to_do_costs_space() -> None:
    steps = (step_of("A", 100), step_of("B", 10, "up-to-date"), step_of("C", 1, "fails"), step_of("D", None))
    whole = Plan(Path("/w/m"), "m", ImatrixStep("generate", None, "", n_bytes=7), steps, 1000)
    assert [step.level.name for step in whole.todo] == ["A", "D"]
    assert [step.level.name for step in whole.failing] == ["C"]
    assert whole.new_bytes == 107


def test_largest_first_and_unknown_sizes_before_them() -> None:
    ordered = order_levels([step_of("small", 1), step_of("large", 9), step_of("fork", None)])
    assert [step.level.name for step in ordered] == ["fork", "large", "small"]


@pytest.mark.parametrize(("action", "present"), [("none", False), ("use", True), ("generate", True), ("up-to-date", True)])
def test_levels_are_made_with_an_imatrix_unless_there_is_none(action: str, present: bool) -> None:
    assert ImatrixStep(action, None, "").present is present  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("wanted", "levels", "memory", "available", "cores", "jobs"),
    [
        (None, 8, GIB, 100 * GIB, 16, MOST_JOBS),
        (None, 8, GIB, 100 * GIB, 2, 2),
        (None, 1, GIB, 100 * GIB, 16, 1),
        (None, 8, 10 * GIB, 26 * GIB, 16, 2),  # a fifth of what is free stays free
        (None, 8, 10 * GIB, GIB, 16, 1),  # one must always be tried
        (6, 8, 10 * GIB, GIB, 2, 6),  # who asks gets it
        (6, 3, GIB, GIB, 2, 3),
        (None, 0, GIB, GIB, 2, 1),
    ],
)
def test_jobs(wanted: int | None, levels: int, memory: int, available: int, cores: int, jobs: int) -> None:
    assert plan_jobs(wanted, levels, memory, available, cores) == jobs


@given(st.integers(1, 100), st.integers(0, 1 << 45), st.integers(0, 1 << 45), st.integers(1, 256))
def test_jobs_chosen_for_the_user_fit_into_memory(levels: int, memory: int, available: int, cores: int) -> None:
    jobs = plan_jobs(None, levels, memory, available, cores)
    assert 1 <= jobs <= min(levels, cores, MOST_JOBS)
    assert jobs == 1 or jobs * memory <= available
