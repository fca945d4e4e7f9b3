"""Chunk ranges: they cover the text exactly, start only where llama-imatrix can, and do not depend on a clock."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from imatrix_runner.engines.binaries.engine import BinariesEngine
from imatrix_runner.engines.jobs import CollectOptions
from imatrix_runner.errors import InvalidDataError, UsageError
from imatrix_runner.imatrix.chunks import (
    ChunkPlan,
    count_chunks,
    counted_tokens,
    describe_ranges,
    plan_chunks,
    range_chunks,
    require_rows,
    spread_order,
    watched_chunks,
    whole_batches,
)
from imatrix_runner.imatrix.formats import read
from imatrix_runner.process import Command, Runner
from imatrix_runner.toolchain.probe import Toolchain
from support.llama_tools import BareTools
from support.tiny_architectures import write_architecture
from support.tiny_models import sample_text

GIB = 1 << 30


@dataclass(frozen=True)
class Asked:
    """What a plan was asked for."""

    n_tokens: int
    options: CollectOptions
    first: int
    limit: int | None
    size: int
    frequency: int
    spread: bool
    beyond: bool

    @property
    def available(self) -> int:
        return self.n_tokens // self.options.n_ctx - self.first

    @property
    def wanted(self) -> int:
        return self.available if self.limit is None else min(self.limit, self.available)

    def plan(self) -> ChunkPlan:
        return plan_chunks(
            self.n_tokens,
            self.options,
            first=self.first,
            limit=self.limit,
            range_size=self.size,
            save_frequency=self.frequency,
            spread=self.spread,
            beyond=self.beyond,
        )

    def can_start(self, chunk: int) -> bool:
        return chunk == 0 or (chunk + 2) * self.options.n_ctx < self.n_tokens


@st.composite
def requests(draw: st.DrawFn) -> Asked:
    n_ctx = draw(st.integers(1, 1024))
    n_tokens = draw(st.integers(2 * n_ctx, 400 * n_ctx))
    first = draw(st.integers(0, n_tokens // n_ctx))
    options = CollectOptions(n_ctx=n_ctx, n_batch=n_ctx * draw(st.integers(1, 9)))
    asked = Asked(
        n_tokens,
        options,
        first,
        draw(st.none() | st.integers(1, 500)),
        draw(st.integers(1, 60)),
        draw(st.integers(0, 60)),
        draw(st.booleans()),
        draw(st.booleans()),
    )
    assume(asked.can_start(first))
    return asked


@given(requests())
def test_ranges_cover_exactly_what_was_asked_for(asked: Asked) -> None:
    plan = asked.plan()
    ranges = sorted(plan.ranges[: plan.n_asked], key=lambda piece: piece.first)
    assert [piece.first for piece in ranges] == [asked.first, *(piece.end for piece in ranges[:-1])]
    assert all(piece.count > 0 for piece in plan.ranges)
    assert plan.n_chunks == ranges[-1].end - asked.first == asked.wanted
    assert plan.n_tokens == asked.n_tokens
    if not asked.spread:
        assert list(plan.ranges) == sorted(plan.ranges, key=lambda piece: piece.first)


@given(requests())
def test_what_is_beyond_is_the_rest_of_the_text(asked: Asked) -> None:
    plan = asked.plan()
    rest = sorted(plan.ranges[plan.n_asked :], key=lambda piece: piece.first)
    end = asked.first + asked.wanted
    if not asked.beyond or end == asked.first + asked.available or not asked.can_start(end):
        assert rest == []
    else:
        assert [piece.first for piece in rest] == [end, *(piece.end for piece in rest[:-1])]
        assert rest[-1].end == asked.first + asked.available


@given(requests())
def test_no_range_starts_where_llama_imatrix_refuses_to(asked: Asked) -> None:
    assert all(asked.can_start(piece.first) for piece in asked.plan().ranges)


@given(requests())
def test_ranges_are_whole_batches(asked: Asked) -> None:
    """Counted from the first chunk, as one run of llama-imatrix would cut them; but for where what was asked for ends."""
    at_once, end = asked.options.chunks_at_once, asked.first + asked.wanted
    plan = asked.plan()
    for begin, piece in [(asked.first, piece) for piece in plan.ranges[: plan.n_asked]]:
        assert (piece.first - begin) % at_once == 0
        assert piece.count % at_once == 0 or piece.end == end
    for piece in plan.ranges[plan.n_asked :]:
        assert piece.count > 0


@given(requests())
def test_snapshots_lie_on_boundaries_before_the_end(asked: Asked) -> None:
    plan = asked.plan()
    done = [count_chunks(plan.ranges[:ranges]) for ranges in range(1, len(plan.ranges))]
    assert set(plan.snapshots) <= set(done)
    assert list(plan.snapshots) == sorted(set(plan.snapshots))
    if not asked.frequency:
        assert plan.snapshots == ()
    elif not asked.spread and not asked.beyond:
        at_once = asked.options.chunks_at_once
        rounded = {-(-mark // at_once) * at_once for mark in range(asked.frequency, asked.wanted, asked.frequency)}
        # At the very end a range may not be able to begin, and then no snapshot can be left.
        assert set(plan.snapshots) == {mark for mark in rounded if mark < asked.wanted and asked.can_start(asked.first + mark)}


ONE_BY_ONE = CollectOptions(n_ctx=64, n_batch=64)
BY_FOUR = CollectOptions(n_ctx=64, n_batch=256)


def described(options: CollectOptions = ONE_BY_ONE, **changes: int | bool) -> str:
    return describe_ranges(plan_chunks(100 * 64 + 3, options, **{"range_size": 40, **changes}).ranges)  # type: ignore[arg-type]


def test_plans_by_example() -> None:
    assert described() == "0-40,40-80,80-100"
    assert described(range_size=1000) == "0-100"
    assert described(limit=50) == "0-40,40-50"
    assert described(first=90) == "90-100"
    assert described(save_frequency=30) == "0-30,30-40,40-60,60-80,80-90,90-100"
    assert described(limit=50, beyond=True) == "0-40,40-50,50-90,90-100"
    assert described(range_size=20, spread=True) == "0-20,80-100,40-60,20-40,60-80"
    assert described(range_size=20, limit=60, spread=True, beyond=True) == "0-20,40-60,20-40,60-80,80-100"


def test_marks_are_rounded_up_to_whole_batches() -> None:
    plan = plan_chunks(100 * 64, BY_FOUR, range_size=30, limit=50, save_frequency=10)
    assert describe_ranges(plan.ranges) == "0-12,12-20,20-32,32-40,40-50"
    assert plan.snapshots == (12, 20, 32, 40)
    assert describe_ranges(plan_chunks(100 * 64, BY_FOUR, first=3, range_size=30, limit=50).ranges) == "3-35,35-53"


@given(st.integers(0, 300))
def test_a_spread_order_visits_everything_once_and_evenly(count: int) -> None:
    order = spread_order(count)
    assert sorted(order) == list(range(count))
    # After 2^k visits no unvisited stretch is longer than the whole divided by 2^k, rounded up to the next power of two.
    for visits in (2, 4, 8, 16):
        if count >= visits:
            seen = sorted(order[:visits])
            widest = max(after - before for before, after in zip(seen, [*seen[1:], count], strict=True))
            assert widest <= 2 * (1 << (count - 1).bit_length()) // visits


def test_a_spread_order_by_example() -> None:
    assert spread_order(8) == [0, 4, 2, 6, 1, 5, 3, 7]
    assert spread_order(5) == [0, 4, 2, 1, 3]
    assert spread_order(1) == [0]


@pytest.mark.parametrize(("tokens", "plan"), [(100 * 64, "0-49,49-100"), (100 * 64 + 1, "0-49,49-98,98-100")])
def test_a_tail_too_short_to_stand_alone_joins_the_range_before_it(tokens: int, plan: str) -> None:
    """A start at chunk 98 needs more than 100 chunks' worth of tokens."""
    assert describe_ranges(plan_chunks(tokens, ONE_BY_ONE, range_size=49).ranges) == plan


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
        plan_chunks(tokens, ONE_BY_ONE, first=first, range_size=10)
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
            plan_chunks(n_tokens, ONE_BY_ONE, first=chunk, range_size=10)
        except InvalidDataError:
            return False
        return True

    chunks = range(last - 3, last + 1)
    assert [may_start(chunk) for chunk in chunks] == [really_starts(chunk) for chunk in chunks]


SIZES = st.tuples(st.integers(10**6, 10**12), st.integers(10**6, 10**12), st.integers(10**4, 10**10))


@given(st.booleans(), SIZES, st.sampled_from((64, 512, 4096)), st.sampled_from((512, 2048)), st.booleans())
def test_a_range_is_whole_batches_and_never_tiny(
    loads: bool, sizes: tuple[int, int, int], n_ctx: int, n_batch: int, gpu: bool
) -> None:
    options = CollectOptions(n_ctx=n_ctx, n_batch=n_batch)
    n_params, n_bytes, matrix_bytes = sizes
    given_sizes = (n_params, n_bytes if loads else None, matrix_bytes)
    chunks = range_chunks(*given_sizes, options, gpu=gpu)
    assert chunks >= 10
    assert chunks % options.chunks_at_once == 0
    assert chunks == range_chunks(*given_sizes, options, gpu=gpu)
    cheap = range_chunks(*given_sizes, options, gpu=gpu, least=1)
    watched = watched_chunks(cheap, 320 * n_ctx, options)
    assert 320 // 64 <= watched <= whole_batches(320 // 16, options)
    assert watched % options.chunks_at_once == 0


@given(st.booleans(), SIZES)
def test_a_range_on_a_gpu_is_never_shorter(loads: bool, sizes: tuple[int, int, int]) -> None:
    options, (n_params, n_bytes, matrix_bytes) = CollectOptions(), sizes
    on_gpu, on_cpu = (
        range_chunks(n_params, n_bytes if loads else None, matrix_bytes, options, gpu=gpu) for gpu in (True, False)
    )
    assert on_gpu >= on_cpu


@given(SIZES)
def test_what_need_not_be_loaded_again_can_be_saved_more_often(sizes: tuple[int, int, int]) -> None:
    n_params, n_bytes, matrix_bytes = sizes
    assume(matrix_bytes < n_bytes / 20)  # as it is: a float for a column, where the model has one for every weight
    options = CollectOptions()
    kept, loaded = (range_chunks(n_params, to_load, matrix_bytes, options, gpu=False) for to_load in (None, n_bytes))
    assert kept <= loaded


def test_ranges_of_real_models_have_a_sensible_length() -> None:
    options = CollectOptions()

    def binaries(n_params: int, n_bytes: int, *, gpu: bool = False) -> int:
        return range_chunks(n_params, n_bytes, 1 << 20, options, gpu=gpu)

    def embedded(n_params: int, matrix_bytes: int, *, gpu: bool = False) -> int:
        return range_chunks(n_params, None, matrix_bytes, options, gpu=gpu)

    seven = binaries(7_000_000_000, 14 * GIB)
    assert binaries(3_000_000, 6 << 20) > 300  # a chunk takes milliseconds: reloading must not dominate
    assert 10 <= seven <= 20  # a chunk takes most of a minute
    assert binaries(7_000_000_000, 14 * GIB, gpu=True) > 300
    assert seven < binaries(3_000_000_000, 60 * GIB)  # much to load, little to compute
    assert embedded(7_000_000_000, 5 << 20) == 12  # llama-imatrix's 10, in whole batches of four
    assert embedded(7_000_000_000, 5 << 20, gpu=True) == 12
    assert 12 < embedded(3_000_000_000, GIB) < 100  # a mixture: a gigabyte to save
    assert 12 < embedded(3_000_000, 40_000) < 300


class TestCountedTokens:
    """How llama.cpp cuts batches, and what of it the collector sees."""

    @pytest.mark.parametrize(
        ("options", "chunks", "tokens"),
        [
            (CollectOptions(), 4, {2048}),
            (CollectOptions(), 5, {2560}),
            (CollectOptions(), 7, {2048 + 510 * 3, 3584}),  # a batch of three: 3 x 170, three times, and 3 x 2 lost
            (CollectOptions(), 2, {1024}),
            (CollectOptions(n_ctx=100, n_batch=100), 3, {300}),
            (CollectOptions(n_ctx=256, n_batch=128, n_ubatch=24), 2, {2 * 2 * 5 * 24}),  # 128 = 5 x 24 + 8
            (CollectOptions(n_ctx=64, n_batch=64, n_ubatch=7), 3, set()),
        ],
    )
    def test_by_example(self, options: CollectOptions, chunks: int, tokens: set[int]) -> None:
        assert counted_tokens(chunks, options) == tokens

    @given(
        st.integers(1, 40),
        st.sampled_from((16, 64, 100, 512, 4096)),
        st.sampled_from((16, 128, 512, 2048)),
        st.integers(16, 600),
    )
    def test_few_are_lost_and_none_is_invented(self, chunks: int, n_ctx: int, n_batch: int, n_ubatch: int) -> None:
        options = CollectOptions(n_ctx=n_ctx, n_batch=n_batch, n_ubatch=n_ubatch)
        counted = counted_tokens(chunks, options)
        assert all(0 < tokens <= chunks * n_ctx for tokens in counted)
        at_once = options.chunks_at_once
        if at_once == 1 and min(n_ctx, n_batch) % n_ubatch == 0 and n_ctx % min(n_ctx, n_batch) == 0:
            assert counted == {chunks * n_ctx}

    @pytest.mark.parametrize(
        ("n_ctx", "n_batch", "n_ubatch", "chunks"),
        [
            *((512, 2048, 512, chunks) for chunks in (5, 6, 7)),
            *((128, 512, 100, 7), (128, 512, 33, 6), (128, 1000, 512, 6), (64, 128, 512, 3), (100, 300, 77, 5)),
            *((256, 64, 48, 3), (256, 128, 24, 2), (16, 64, 16, 7), (16, 256, 20, 31), (16, 512, 40, 31)),
        ],
    )
    def test_the_real_program_counts_so_too(
        self,
        n_ctx: int,
        n_batch: int,
        n_ubatch: int,
        chunks: int,
        tiny_model: Path,
        tiny_text: Path,
        tools: BareTools,
        tmp_path: Path,
    ) -> None:
        out = tmp_path / "o.gguf"
        given = ("-c", str(n_ctx), "-b", str(n_batch), "-ub", str(n_ubatch), "--chunks", str(chunks), "--no-ppl")
        tools.imatrix(tiny_model, tiny_text, out, *given)
        matrix = read(out).matrix
        (tokens,) = {int(matrix.counts(name)[0]) for name in matrix.entries}
        assert tokens in counted_tokens(chunks, CollectOptions(n_ctx=n_ctx, n_batch=n_batch, n_ubatch=n_ubatch))

    @pytest.mark.parametrize("name", ["mixtral", "deepseek2", "mamba", "jamba"])
    def test_so_it_does_for_experts_latent_attention_and_recurrent_layers(
        self, name: str, tiny_text: Path, tools: BareTools, tmp_path: Path
    ) -> None:
        model = write_architecture(name, tmp_path / "model.gguf")
        tools.imatrix(
            model, tiny_text, tmp_path / "o.gguf", "-c", "128", "-b", "512", "-ub", "100", "--chunks", "7", "--no-ppl"
        )
        matrix = read(tmp_path / "o.gguf").matrix
        most = max(int(matrix.counts(name)[0]) for name in matrix.entries if matrix.counts(name).size == 1)
        assert most in counted_tokens(7, CollectOptions(n_ctx=128, n_batch=512, n_ubatch=100))


@pytest.mark.parametrize(
    ("n_batch", "n_ubatch", "enough"), [(2048, 512, True), (2048, 16, True), (2048, 8, False), (8, 512, False)]
)
def test_batches_too_small_to_collect_anything_are_refused(n_batch: int, n_ubatch: int, enough: bool) -> None:
    options = CollectOptions(n_ctx=128, n_batch=n_batch, n_ubatch=n_ubatch)
    if enough:
        require_rows(options)
    else:
        with pytest.raises(UsageError, match="Nothing can be collected"):
            require_rows(options)


def test_recurrent_layers_want_enough_tokens_of_each_sequence() -> None:
    """128 chunks of 16 tokens at once are computed in pieces of 512 / 128 tokens of each."""
    require_rows(CollectOptions(n_ctx=16))
    with pytest.raises(UsageError) as caught:
        require_rows(CollectOptions(n_ctx=16), recurrent=True)
    assert "-b 512" in caught.value.todo
    require_rows(CollectOptions(n_ctx=16, n_batch=512), recurrent=True)
