"""Which prompts are answered side by side, and what is left of their answers on the disk."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imatrix_runner.engines.files.completions import CompletionsFile, read_completions
from imatrix_runner.engines.measures import Completion
from imatrix_runner.engines.worker.batching import LEAST_SEQUENCES, MOST_SEQUENCES, MOST_TOKENS, Group, groups

SIZES = st.lists(st.integers(1, 40_000), min_size=1, max_size=60)


@given(SIZES)
def test_every_prompt_has_one_seat_in_a_context_that_holds_it(sizes: list[int]) -> None:
    plan = groups(sizes)
    assert sorted(number for group in plan for number in group.members) == list(range(len(sizes)))
    for group in plan:
        assert len(group.members) <= group.sequences
        assert LEAST_SEQUENCES <= group.sequences <= MOST_SEQUENCES
        assert group.sequences * group.n_ctx <= max(MOST_TOKENS, LEAST_SEQUENCES * group.n_ctx)
        assert all(sizes[number] <= group.n_ctx < max(257, 2 * sizes[number]) for number in group.members)


@given(SIZES, SIZES)
def test_the_shape_a_prompt_is_answered_in_does_not_depend_on_the_others(sizes: list[int], others: list[int]) -> None:
    def shapes(plan: list[Group]) -> dict[int, tuple[int, int]]:
        return {number: (group.n_ctx, group.sequences) for group in plan for number in group.members}

    alone, together = shapes(groups(sizes)), shapes(groups(sizes + others))
    assert all(together[number] == shape for number, shape in alone.items())


def test_small_contexts_come_first_and_prompts_in_their_order() -> None:
    plan = groups([300, *[100] * 17, 9000, 300])
    assert plan == [
        Group(256, 16, tuple(range(1, 17))),
        Group(256, 16, (17,)),
        Group(512, 16, (0, 19)),
        Group(16384, 2, (18,)),
    ]


# -- the file ----------------------------------------------------------------------------------------------------------------

FIRST = [Completion(2, 5, (1, 2, 3), True, "héllo"), Completion(0, 4, (), False, "")]
SECOND = [Completion(1, 9, (7,) * 100, False, "x" * 300)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "some.answers"


def write(path: Path, *records: list[Completion], fingerprint: str = "model, prompts") -> bytes:
    with closing(CompletionsFile(path, fingerprint)) as file:
        for record in records:
            file.append(record)
    return path.read_bytes()


def held(path: Path, fingerprint: str = "model, prompts") -> tuple[int, int]:
    with closing(CompletionsFile(path, fingerprint)) as file:
        return file.groups, file.prompts


def test_answers_come_back_in_the_order_of_the_prompts(path: Path) -> None:
    write(path, FIRST, SECOND)
    assert read_completions(path, "model, prompts") == [FIRST[1], SECOND[0], FIRST[0]]
    assert held(path) == (2, 3)


def test_another_one_s_answers_are_neither_read_nor_continued(path: Path) -> None:
    write(path, FIRST, SECOND)
    assert read_completions(path, "another model") == []
    assert held(path, "another model") == (0, 0)
    assert read_completions(path, "model, prompts") == []
    assert read_completions(path.with_name("none"), "model, prompts") == []


def test_wherever_a_write_was_torn_whole_groups_stay_and_the_end_is_the_same(path: Path) -> None:
    one = len(write(path, FIRST))
    whole = write(path, SECOND)
    for size in range(0, len(whole), 5):
        path.write_bytes(whole[:size])
        assert read_completions(path, "model, prompts") == ([FIRST[1], FIRST[0]] if size >= one else [])
        with closing(CompletionsFile(path, "model, prompts")) as file:
            assert file.groups == (size >= one)
            for record in (FIRST, SECOND)[file.groups :]:
                file.append(record)
        assert path.read_bytes() == whole


@pytest.mark.parametrize("at", [32, 33, 36, 50, -1])
def test_a_damaged_group_and_what_follows_it_do_not_count(path: Path, at: int) -> None:
    data = bytearray(write(path, FIRST, SECOND))
    data[at] ^= 0xFF
    path.write_bytes(data)
    kept = 1 if at < 0 else 0
    assert held(path) == (kept, 2 * kept)
    assert path.stat().st_size == (32 if not kept else len(write(path.with_name("first"), FIRST)))
