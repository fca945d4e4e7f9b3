"""The embedded engine's evaluation against llama-perplexity: the same file of the reference, the same figures as printed."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from imatrix_runner.engines.embedded.bindings import find, worker_command
from imatrix_runner.engines.embedded.engine import EmbeddedEngine
from imatrix_runner.engines.files.logits import read_head, read_tokens
from imatrix_runner.engines.files.token_scores import read_token_scores
from imatrix_runner.engines.jobs import ChunkRange, CollectOptions
from imatrix_runner.engines.measures import DP_FRACTIONS, KLD_FRACTIONS, MeasureJob, ReferenceJob
from imatrix_runner.errors import EngineError, InvalidDataError
from imatrix_runner.evaluate.kld_statistics import summarise
from imatrix_runner.events import ignore
from imatrix_runner.process import Runner, child_environment
from imatrix_runner.resources import HELD_OUT_TEXT, resource
from imatrix_runner.toolchain.store import cache_dir
from support.command_line import clean_environment
from support.divergence import save_logits
from support.llama_tools import BareTools
from support.tiny_models import write_llama_gguf

CHUNKS = 16
LEVELS = ("Q8_0", "Q4_K_M", "Q2_K")
OPTIONS = CollectOptions(threads=1)


@pytest.fixture(scope="module")
def engine() -> EmbeddedEngine:
    return EmbeddedEngine(find(os.environ, cache_dir()), Runner())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("evaluate")


@pytest.fixture(scope="module")
def base(engine: EmbeddedEngine, demo_model: Path, folder: Path) -> Path:
    """Ours."""
    return make_reference(engine, demo_model, folder / "ours.base")


@pytest.fixture(scope="module")
def their_base(tools: BareTools, demo_model: Path, folder: Path) -> Path:
    """llama-perplexity's, of as many chunks."""
    text = folder / "text.txt"
    whole = resource(HELD_OUT_TEXT).read_text(encoding="utf-8")
    text.write_text(whole[: 1900 * CHUNKS], encoding="utf-8")
    return save_logits(tools, demo_model, text, folder / "theirs.base")


@pytest.fixture(scope="module")
def levels(tools: BareTools, demo_model: Path, folder: Path) -> dict[str, Path]:
    return {level: tools.quantize(demo_model, folder / f"{level}.gguf", level) for level in LEVELS}


def make_reference(engine: EmbeddedEngine, model: Path, out: Path, count: int = CHUNKS, fingerprint: str = "base") -> Path:
    text = resource(HELD_OUT_TEXT)
    engine.make_reference(ReferenceJob("refer", model, text, ChunkRange(0, count), out, OPTIONS, fingerprint, None), ignore)
    return out


def measure_level(engine: EmbeddedEngine, model: Path, base: Path, out: Path) -> Path:
    engine.measure_level(MeasureJob("judge", model, base, out, OPTIONS, "level", None), ignore)
    return out


@dataclass(frozen=True)
class Said:
    """llama-perplexity's summary: label -> the numbers of its line, as printed."""

    lines: dict[str, list[str]]

    def values(self, label: str) -> list[str]:
        return self.lines[label]


def ask_theirs(tools: BareTools, model: Path, base: Path) -> Said:
    """Asked again while its asynchronous log loses lines."""
    tool = tools.toolchain.tool("llama-perplexity")
    argv = [tool, "-m", model, "-c", "512", "-t", "1", "--kl-divergence", "--kl-divergence-base", base]
    for _ in range(20):
        done = subprocess.run(
            [str(word) for word in argv], env=clean_environment(), capture_output=True, check=True, timeout=300
        )
        lines = re.findall(r"^ *([A-Z0-9.][^:\n]*?) *: +(.*)$", done.stdout.decode(), re.MULTILINE)
        said = Said({re.sub(r" +", " ", label): re.findall(r"-?\d+\.\d+", rest) for label, rest in lines})
        if {"Same top p", "Mean KLD", "0.1% Δp", "Mean PPL(Q)"} <= said.lines.keys():
            return said
    raise AssertionError("llama-perplexity told no whole summary in 20 runs")


def same(printed: str, ours: float) -> bool:
    """Equal as printed, give or take one in the last digit: both are rounded."""
    digits = len(printed.partition(".")[2])
    return abs(float(printed) - ours) < 1.01 * 10**-digits


def test_the_reference_s_file_is_theirs_but_for_the_last_bit(
    base: Path, demo_model: Path, tools: BareTools, folder: Path
) -> None:
    theirs = save_logits(tools, demo_model, resource(HELD_OUT_TEXT), folder / "whole.base")
    head, other = read_head(base), read_head(theirs)
    assert (head.n_ctx, head.n_vocab) == (other.n_ctx, other.n_vocab)
    assert np.array_equal(read_tokens(base, head), read_tokens(theirs, other)[:CHUNKS])
    mine = np.fromfile(base, "<u2", offset=head.rows_at).astype(np.int32)
    their = np.fromfile(theirs, "<u2", offset=other.rows_at)[: len(mine)].astype(np.int32)
    assert (mine != their).mean() < 1e-4


@pytest.mark.parametrize("level", LEVELS)
def test_every_figure_is_the_one_that_llama_perplexity_prints(
    level: str, engine: EmbeddedEngine, tools: BareTools, base: Path, levels: dict[str, Path], folder: Path
) -> None:
    """Both read the reference that we wrote."""
    found = summarise(
        read_token_scores(measure_level(engine, levels[level], base, folder / f"{level}.scored"), "level", 512).ravel()
    )
    said = ask_theirs(tools, levels[level], base)
    estimates = {
        "Mean PPL(Q)": found.ppl,
        "Mean PPL(base)": found.ppl_base,
        "Mean ln(PPL(Q)/PPL(base))": found.log_ratio,
        "Mean PPL(Q)/PPL(base)": found.ratio,
        "Mean PPL(Q)-PPL(base)": found.difference,
        "Mean KLD": found.kld,
    }
    shares = {"Mean Δp": found.dp, "RMS Δp": found.dp_rms, "Same top p": found.same_top}
    for label, estimate in estimates.items():
        value, error = said.values(label)[-2:]
        assert same(value, estimate.value), label
        assert same(error, estimate.error), label
    for label, estimate in shares.items():
        value, error = said.values(label)[-2:]
        assert same(value, 100 * estimate.value), label
        assert same(error, 100 * estimate.error), label
    names = {1.0: "Maximum", 0.5: "Median", 0.0: "Minimum"}
    for fraction in KLD_FRACTIONS:
        label = f"{names.get(fraction, f'{100 * fraction:.1f}%')} KLD"
        assert same(said.values(label)[-1], found.kld_at[fraction]), label
    for fraction in DP_FRACTIONS:
        label = f"{names.get(fraction, f'{100 * fraction:.1f}%')} Δp"
        assert same(said.values(label)[-1], 100 * found.dp_at[fraction]), label
    assert same(said.values("Cor(ln(PPL(Q)), ln(PPL(base)))")[-1], 100 * found.correlation)


def test_the_source_does_not_differ_from_itself(engine: EmbeddedEngine, demo_model: Path, base: Path, folder: Path) -> None:
    found = summarise(
        read_token_scores(measure_level(engine, demo_model, base, folder / "itself.scored"), "level", 512).ravel()
    )
    assert found.n_tokens == CHUNKS * 255
    assert abs(found.kld.value) < 1e-6
    assert found.same_top.value > 0.999
    assert found.ppl.value == pytest.approx(found.ppl_base.value, rel=0.01)  # the file holds nothing below e^-16


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_a_killed_comparison_goes_on_to_the_same_bytes(
    engine: EmbeddedEngine, base: Path, levels: dict[str, Path], folder: Path
) -> None:
    whole = measure_level(engine, levels["Q4_K_M"], base, folder / "whole.scored").read_bytes()
    out = folder / "killed.scored"
    asked = MeasureJob("judge", levels["Q4_K_M"], base, out, OPTIONS, "level", None)
    for least in (1, 5, 9):
        kill_once(asked, lambda least=least: chunks_in(out) >= least)  # type: ignore[misc]
    assert 1 <= chunks_in(out) <= CHUNKS
    assert measure_level(engine, levels["Q4_K_M"], base, out).read_bytes() == whole


def chunks_in(path: Path) -> int:
    return max(0, size_of(path) - 32) // (255 * 24 + 4)


def size_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def kill_once(asked: ReferenceJob | MeasureJob, reached: Callable[[], bool]) -> None:
    """Let a worker work until that is reached, or to its end."""
    command = worker_command(asked, find(os.environ, cache_dir()).library)
    child = subprocess.Popen(
        list(command.argv),
        env=child_environment(command.env),
        cwd=command.cwd,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 60
    while child.poll() is None and time.monotonic() < deadline and not reached():
        time.sleep(0.001)
    child.send_signal(signal.SIGKILL)
    child.communicate()


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_a_killed_reference_goes_on_to_the_same_bytes(
    engine: EmbeddedEngine, base: Path, demo_model: Path, folder: Path
) -> None:
    """Killed within a batch, whose rows come by slices of its four chunks: the file then has holes."""
    out, head = folder / "killed.base", read_head(base)
    asked = ReferenceJob("refer", demo_model, resource(HELD_OUT_TEXT), ChunkRange(0, CHUNKS), out, OPTIONS, "base", None)
    left = []
    for least in (0, 3, 6, 9, 12):
        kill_once(asked, lambda least=least: size_of(out) > head.rows_at + least * head.chunk_bytes)  # type: ignore[misc]
        left.append(size_of(out))
    assert any((size - head.rows_at) % (4 * head.chunk_bytes) for size in left)
    assert make_reference(engine, demo_model, out).read_bytes() == base.read_bytes()


def test_an_unfinished_reference_is_continued_and_another_one_s_is_not(
    engine: EmbeddedEngine, demo_model: Path, base: Path, folder: Path
) -> None:
    whole = base.read_bytes()
    torn = folder / "torn.base"
    make_reference(engine, demo_model, torn)
    head = read_head(torn)
    with torn.open("r+b") as handle:
        handle.truncate(head.rows_at + 7 * head.chunk_bytes + 100)
        handle.seek(head.rows_at)
        handle.write(b"\1\2")  # proves that what is there is kept
    make_reference(engine, demo_model, torn)
    assert torn.read_bytes() == whole[: head.rows_at] + b"\1\2" + whole[head.rows_at + 2 :]
    make_reference(engine, demo_model, torn, fingerprint="another")
    assert torn.read_bytes() == whole


def test_a_truncated_reference_is_refused(engine: EmbeddedEngine, demo_model: Path, base: Path, folder: Path) -> None:
    torn = folder / "short.base"
    torn.write_bytes(base.read_bytes()[:-1])
    with pytest.raises(InvalidDataError, match="cannot be compared with"):
        read_head(torn)
    with pytest.raises(InvalidDataError, match="cannot be compared with"):
        measure_level(engine, demo_model, torn, folder / "torn.scored")


def test_a_level_of_another_vocabulary_is_refused(engine: EmbeddedEngine, base: Path, folder: Path) -> None:
    other = write_llama_gguf(folder / "other.gguf", vocab=600)
    with pytest.raises(InvalidDataError, match="vocabulary of"):
        measure_level(engine, other, base, folder / "other.scored")


def test_references_of_parts_of_the_text_give_what_one_of_the_whole_gives(
    engine: EmbeddedEngine, demo_model: Path, base: Path, levels: dict[str, Path], folder: Path
) -> None:
    """Half the disk, twice: 8 chunks, compared; then the other 8, into the same file."""
    out, text = folder / "halves.scored", resource(HELD_OUT_TEXT)
    for first in (0, 8):
        half = folder / "half.base"
        engine.make_reference(
            ReferenceJob("refer", demo_model, text, ChunkRange(first, 8), half, OPTIONS, f"half {first}", None), ignore
        )
        engine.measure_level(MeasureJob("judge", levels["Q2_K"], half, out, OPTIONS, "level", None, first), ignore)
    whole = measure_level(engine, levels["Q2_K"], base, folder / "at-once.scored")
    assert out.read_bytes() == whole.read_bytes()


def test_a_limit_compares_so_many_chunks_and_a_gap_is_refused(
    engine: EmbeddedEngine, base: Path, levels: dict[str, Path], folder: Path
) -> None:
    out = folder / "limited.scored"
    job = MeasureJob("judge", levels["Q8_0"], base, out, OPTIONS, "level", None, limit=5)
    engine.measure_level(job, ignore)
    assert read_token_scores(out, "level", 512).shape == (5, OPTIONS.scored_tokens)
    with pytest.raises(EngineError, match="was compared with 5 chunks only"):
        engine.measure_level(replace(job, first=8), ignore)
