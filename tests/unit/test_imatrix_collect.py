"""Chunk ranges: they cover the text exactly, start only where llama-imatrix can, and do not depend on a clock."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from tiny_models import sample_text

from imatrix_runner.engines.base import CollectOptions
from imatrix_runner.engines.binaries.engine import BinariesEngine
from imatrix_runner.errors import InvalidDataError
from imatrix_runner.imatrix.collect import ChunkPlan, plan_chunks, range_chunks
from imatrix_runner.process import Command, Runner
from imatrix_runner.toolchain.probe import Toolchain

GIB = 1 << 30


@st.composite
def plans(draw: st.DrawFn) -> tuple[ChunkPlan, int, int, int, int | None, int]:
    """A plan, and what was asked for: context, tokens, first chunk, limit, save frequency."""
    n_ctx = draw(st.integers(1, 1024))
    n_tokens = draw(st.integers(2 * n_ctx, 400 * n_ctx))
    first = draw(st.integers(0, n_tokens // n_ctx))
    assume(first == 0 or (first + 2) * n_ctx < n_tokens)
    limit = draw(st.none() | st.integers(1, 500))
    size, frequency = draw(st.integers(1, 60)), draw(st.integers(0, 60))
    plan = plan_chunks(n_tokens, n_ctx, first=first, limit=limit, range_size=size, save_frequency=frequency)
    return plan, n_ctx, n_tokens, first, limit, frequency


@given(plans())
def test_ranges_cover_exactly_what_was_asked_for(asked: tuple[ChunkPlan, int, int, int, int | None, int]) -> None:
    plan, n_ctx, n_tokens, first, limit, _ = asked
    wanted = n_tokens // n_ctx - first
    assert [piece.first for piece in plan.ranges] == [first, *(piece.end for piece in plan.ranges[:-1])]
    assert all(piece.count > 0 for piece in plan.ranges)
    assert plan.n_chunks == plan.ranges[-1].end - first == (wanted if limit is None else min(limit, wanted))
    assert plan.n_tokens == n_tokens


@given(plans())
def test_no_range_starts_where_llama_imatrix_refuses_to(asked: tuple[ChunkPlan, int, int, int, int | None, int]) -> None:
    plan, n_ctx, n_tokens, *_ = asked
    assert all(piece.first == 0 or (piece.first + 2) * n_ctx < n_tokens for piece in plan.ranges)


@given(plans())
def test_snapshots_lie_on_boundaries_before_the_end(asked: tuple[ChunkPlan, int, int, int, int | None, int]) -> None:
    plan, _, _, first, _, frequency = asked
    assert {first + done for done in plan.snapshots} <= {piece.end for piece in plan.ranges[:-1]}
    assert list(plan.snapshots) == sorted(set(plan.snapshots))
    assert all(done % frequency == 0 for done in plan.snapshots)
    if not frequency:
        assert plan.snapshots == ()


def described(**options: int) -> str:
    return plan_chunks(100 * 64 + 3, 64, **{"range_size": 40, **options}).describe()


def test_plans_by_example() -> None:
    assert described() == "0-40,40-80,80-100"
    assert described(range_size=1000) == "0-100"
    assert described(limit=50) == "0-40,40-50"
    assert described(first=90) == "90-100"
    assert described(save_frequency=30) == "0-30,30-40,40-60,60-80,80-90,90-100"


@pytest.mark.parametrize(("tokens", "plan"), [(100 * 64, "0-49,49-100"), (100 * 64 + 1, "0-49,49-98,98-100")])
def test_a_tail_too_short_to_stand_alone_joins_the_range_before_it(tokens: int, plan: str) -> None:
    """A start at chunk 98 needs more than 100 chunks' worth of tokens."""
    assert plan_chunks(tokens, 64, range_size=49).describe() == plan


@pytest.mark.parametrize(
    ("tokens", "first", "why"),
    [
        (127, 0, "it has 127 tokens, 1 chunks of 64; at least 2 must remain"),
        (0, 0, "it has 0 tokens, 0 chunks of 64"),
        (640, 9, "10 chunks of 64, of which 9 are to be skipped"),
        (640, 8, "of which 8 are to be skipped"),
        (640, 50, "of which 50 are to be skipped"),
    ],
)
def test_a_text_that_is_too_short_is_told_in_numbers(tokens: int, first: int, why: str) -> None:
    with pytest.raises(InvalidDataError, match="too short") as caught:
        plan_chunks(tokens, 64, first=first, range_size=10)
    assert why in caught.value.why
    assert "-f" in caught.value.todo


def test_the_tail_rule_is_that_of_the_real_program(
    engine: BinariesEngine, toolchain: Toolchain, demo_model: Path, tmp_path: Path
) -> None:
    """With 64 tokens a chunk: what the plan allows as a first chunk llama-imatrix accepts, and nothing else."""
    text = tmp_path / "text.txt"
    text.write_text(sample_text(3000), encoding="utf-8")
    n_tokens = engine.count_tokens(demo_model, text, parse_special=False, log=None)
    last = n_tokens // 64

    def really_starts(chunk: int) -> bool:
        argv = [str(toolchain.tool("llama-imatrix")), "-m", str(demo_model), "-f", str(text), "-o", str(tmp_path / "o.gguf")]
        argv += ["-c", "64", "-b", "64", "--chunk", str(chunk), "--chunks", "1", "--output-frequency", "1000000", "--no-ppl"]
        return Runner().run(Command(tuple(argv))).ok

    def may_start(chunk: int) -> bool:
        try:
            plan_chunks(n_tokens, 64, first=chunk, range_size=10)
        except InvalidDataError:
            return False
        return True

    chunks = range(last - 3, last + 1)
    assert [may_start(chunk) for chunk in chunks] == [really_starts(chunk) for chunk in chunks]


SIZES = st.tuples(st.integers(10**6, 10**12), st.integers(10**6, 10**12))


@given(SIZES, st.sampled_from((64, 512, 4096)), st.sampled_from((512, 2048)), st.booleans())
def test_a_range_is_whole_batches_and_never_tiny(sizes: tuple[int, int], n_ctx: int, n_batch: int, gpu: bool) -> None:
    options = CollectOptions(n_ctx=n_ctx, n_batch=n_batch)
    chunks = range_chunks(*sizes, options, gpu=gpu)
    assert chunks >= 10
    assert chunks % max(1, n_batch // n_ctx) == 0
    assert chunks == range_chunks(*sizes, options, gpu=gpu)


@given(SIZES)
def test_a_range_on_a_gpu_is_never_shorter(sizes: tuple[int, int]) -> None:
    options = CollectOptions()
    assert range_chunks(*sizes, options, gpu=True) >= range_chunks(*sizes, options, gpu=False)


def test_ranges_of_real_models_have_a_sensible_length() -> None:
    options = CollectOptions()
    tiny = range_chunks(3_000_000, 6 << 20, options, gpu=False)
    seven = range_chunks(7_000_000_000, 14 * GIB, options, gpu=False)
    seven_on_gpu = range_chunks(7_000_000_000, 14 * GIB, options, gpu=True)
    mixture = range_chunks(3_000_000_000, 60 * GIB, options, gpu=False)
    assert tiny > 300  # a chunk takes milliseconds: reloading must not dominate
    assert 10 <= seven <= 20  # a chunk takes most of a minute
    assert seven_on_gpu > 300
    assert seven < mixture  # much to load, little to compute
