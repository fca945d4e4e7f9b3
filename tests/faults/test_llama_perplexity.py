"""llama-perplexity ends with 0 whatever happened and loses what it says: no figure comes of half a summary, no reference of
half a file, and whoever waits is told why."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from imatrix_runner.engines.binaries import perplexity
from imatrix_runner.engines.binaries.engine import BinariesEngine
from imatrix_runner.engines.files.logits import note_path, read_head
from imatrix_runner.engines.jobs import ChunkRange, CollectOptions
from imatrix_runner.engines.measures import MeasureJob, ReferenceJob
from imatrix_runner.errors import EngineError, InterruptedRunError, InvalidDataError, RunnerError, ToolchainError
from imatrix_runner.events import Event, Notice, ignore
from imatrix_runner.models.gguf_file import read_header
from imatrix_runner.process import Runner
from imatrix_runner.signals import Stop
from support.llama_tools import BareTools
from support.perplexity_tools import PATIENT, perplexity_that
from support.tiny_models import write_llama_gguf

LOSE_THE_END = """told=$("$real" "$@") || exit; printf '%s\\n' "$told" | grep -v "Same top p: "; exit 0"""
OPTIONS = CollectOptions(n_ctx=64, n_batch=64, n_ubatch=64, threads=1)
CHUNKS = 6


@pytest.fixture
def refer_job(tiny_model: Path, tiny_text: Path, tmp_path: Path) -> ReferenceJob:
    out = tmp_path / "work" / "reference.logits"
    out.parent.mkdir()
    return ReferenceJob("refer", tiny_model, tiny_text, ChunkRange(0, CHUNKS), out, OPTIONS, "of this", tmp_path / "refer.log")


@pytest.fixture
def base(tools: BareTools, refer_job: ReferenceJob) -> Path:
    BinariesEngine(tools.toolchain, Runner()).make_reference(refer_job, ignore)
    return refer_job.out


@pytest.fixture
def judge_job(tiny_model: Path, base: Path, tmp_path: Path) -> MeasureJob:
    return MeasureJob("judge", tiny_model, base, tmp_path / "work" / "out", OPTIONS, "of that", tmp_path / "judge.log")


@pytest.fixture
def doing(tools: BareTools, tmp_path: Path) -> Callable[[str], BinariesEngine]:
    """An engine whose llama-perplexity is a script."""
    return lambda does: BinariesEngine(perplexity_that(does, tools.toolchain, tmp_path / "fake"), Runner())


Doing = Callable[[str], BinariesEngine]


def runs(log: Path | None) -> int:
    assert log is not None
    return log.read_text().count("$ ") if log.exists() else 0


def left(job: ReferenceJob) -> list[str]:
    return [path.name for path in job.out.parent.iterdir()]


def break_weights(model: Path, copy: Path, number: float = np.nan) -> Path:
    """The model with this in its last norm: it loads, and computes no number."""
    header = read_header(model)
    norm = next(tensor for tensor in header.tensors if tensor.name == "output_norm.weight")
    data = bytearray(model.read_bytes())
    at = header.data_offset + norm.offset
    data[at : at + 4] = np.array([number], "<f4").tobytes()
    copy.write_bytes(data)
    return copy


def test_a_summary_that_lost_its_end_is_asked_for_again(doing: Doing, judge_job: MeasureJob) -> None:
    events: list[Event] = []
    once = f'if mkdir "$here/asked" 2>/dev/null; then {LOSE_THE_END}; fi\n{PATIENT}'
    found = doing(once).measure_level(judge_job, events.append)
    assert found == doing(PATIENT).measure_level(judge_job, ignore)
    told = [event.text for event in events if isinstance(event, Notice) and event.level == "warning"]
    lost = f"llama-perplexity lost the end of its summary for {judge_job.model.name} (run 1): running it again."
    assert told == [lost]


def test_one_that_always_loses_it_is_an_error_that_names_the_log_and_a_way_out(
    doing: Doing, judge_job: MeasureJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(perplexity, "PATIENCE", 0.0)
    with pytest.raises(EngineError, match="lost the end of its summary") as caught:
        doing(LOSE_THE_END).measure_level(judge_job, ignore)
    assert "--engine embedded" in caught.value.todo
    assert str(judge_job.log) in caught.value.todo
    assert runs(judge_job.log) == perplexity.AGAIN + 1


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        ("0.01.2 E kl_divergence: failed reading log-probs for chunk 3", EngineError),
        ("0.01.2 E kl_divergence : failed to decode", EngineError),
        ("0.01.2 E kl_divergence: inconsistent vocabulary (512 vs 600)", InvalidDataError),
    ],
)
def test_an_error_that_ends_with_0_is_one_and_not_asked_for_again(
    said: str, kind: type[RunnerError], doing: Doing, judge_job: MeasureJob
) -> None:
    with pytest.raises(kind) as caught:
        doing(f"echo '{said}' >&2\n{PATIENT}").measure_level(judge_job, ignore)
    why = {InvalidDataError: "a vocabulary of 512 tokens, and this model has 600"}.get(kind, said)
    assert caught.value.why in why or why in caught.value.why
    assert runs(judge_job.log) == 1


@pytest.mark.parametrize(
    ("fault", "error", "why"),
    [
        pytest.param("kill -ABRT $$", EngineError, "SIGABRT", id="dies"),
        pytest.param("exit 0", EngineError, "No such file", id="writes nothing"),
        pytest.param(
            '"$real" "$@"; truncate -s -1 "$out"', EngineError, "the run that wrote it was interrupted", id="half a file"
        ),
        pytest.param('printf _logits_ > "$out"', EngineError, "_logits_", id="a head alone"),
        pytest.param(
            "echo 'E perplexity: you need at least 128 tokens to evaluate perplexity with a context of 64' >&2",
            InvalidDataError,
            "at least 128 tokens",
            id="a short text",
        ),
    ],
)
def test_a_reference_that_is_not_whole_is_none(
    fault: str, error: type[RunnerError], why: str, doing: Doing, refer_job: ReferenceJob
) -> None:
    find_out = 'for word in "$@"; do [ "$last" = --kl-divergence-base ] && out=$word; last=$word; done\n'
    with pytest.raises(error) as caught:
        doing(find_out + fault).make_reference(refer_job, ignore)
    assert why in caught.value.why
    assert left(refer_job) == []


def test_a_text_that_became_shorter_is_noticed(doing: Doing, refer_job: ReferenceJob) -> None:
    with pytest.raises(InvalidDataError, match="not 5000 of 64"):
        doing(PATIENT).make_reference(replace(refer_job, chunks=ChunkRange(0, 5000)), ignore)
    assert left(refer_job) == []


def test_a_stop_leaves_no_half_reference_and_not_the_one_of_something_else(
    base: Path, refer_job: ReferenceJob, tools: BareTools, tmp_path: Path
) -> None:
    stop = Stop()
    slow = perplexity_that('"$real" "$@"; touch "$here/written"; sleep 60', tools.toolchain, tmp_path / "slow")

    def stop_once_written() -> None:
        while not (tmp_path / "slow" / "written").exists():
            pause.wait(0.01)
        stop.request()

    pause = threading.Event()
    thread = threading.Thread(target=stop_once_written)
    thread.start()
    with pytest.raises(InterruptedRunError):
        BinariesEngine(slow, Runner(stop)).make_reference(replace(refer_job, fingerprint="another"), ignore)
    thread.join()
    assert left(refer_job) == []


@pytest.mark.parametrize("deaf", [False, True], ids=["as it says", "as its file shows"])
def test_a_source_that_computes_no_numbers_is_named(
    deaf: bool, doing: Doing, refer_job: ReferenceJob, tiny_model: Path, tmp_path: Path
) -> None:
    broken = break_weights(tiny_model, tmp_path / "broken.gguf")
    with pytest.raises(InvalidDataError, match=r"broken\.gguf produced NaN or infinite numbers"):
        doing('exec "$real" "$@"' + (" > /dev/null" if deaf else "")).make_reference(replace(refer_job, model=broken), ignore)
    assert left(refer_job) == []


@pytest.mark.parametrize(
    ("number", "why", "does"),
    [
        # It may lose the line that names the tensor.
        (np.nan, r"numbers in (its tensor output_norm\.weight|one of its tensors) are NaN or infinite", 'exec "$real" "$@"'),
        # It may die of sorting what is no number, and lose what it said: it is to live a while longer.
        (3e38, r"its logits in (chunk 1|the first \d+ chunks) are NaN or infinite", '"$real" "$@"; sleep 60'),
    ],
)
def test_a_level_that_computes_no_numbers_is_named(
    number: float, why: str, does: str, doing: Doing, judge_job: MeasureJob, tiny_model: Path, tmp_path: Path
) -> None:
    broken = break_weights(tiny_model, tmp_path / "broken.gguf", number)
    with pytest.raises(InvalidDataError, match=r"broken\.gguf produced NaN or infinite numbers") as caught:
        doing(does).measure_level(replace(judge_job, model=broken), ignore)
    assert re.fullmatch(why, caught.value.why)


def test_a_reference_cut_short_is_refused_before_anything_runs(doing: Doing, judge_job: MeasureJob) -> None:
    judge_job.base.write_bytes(judge_job.base.read_bytes()[:-1])
    with pytest.raises(InvalidDataError, match="cannot be compared with"):
        doing(PATIENT).measure_level(judge_job, ignore)
    assert runs(judge_job.log) == 0


def test_a_level_of_another_vocabulary_or_context_is_refused_before_anything_runs(
    doing: Doing, judge_job: MeasureJob, tmp_path: Path
) -> None:
    other = write_llama_gguf(tmp_path / "other.gguf", vocab=300)
    with pytest.raises(InvalidDataError, match=r"other\.gguf cannot be compared with") as caught:
        doing(PATIENT).measure_level(replace(judge_job, model=other), ignore)
    assert (
        caught.value.why
        == f"the level has a vocabulary of 300 tokens, the reference one of {read_head(judge_job.base).n_vocab}"
    )
    with pytest.raises(InvalidDataError) as caught:
        doing(PATIENT).measure_level(replace(judge_job, options=replace(OPTIONS, n_ctx=128)), ignore)
    assert caught.value.why == "the reference was made with chunks of 64 tokens, not 128"
    assert runs(judge_job.log) == 0


def test_too_few_tokens_are_refused_before_anything_runs(doing: Doing, refer_job: ReferenceJob, judge_job: MeasureJob) -> None:
    with pytest.raises(InvalidDataError, match="too few") as caught:
        doing(PATIENT).make_reference(replace(refer_job, chunks=ChunkRange(0, 3)), ignore)
    assert caught.value.todo == "Use more chunks: --chunks 4"
    assert read_head(judge_job.base).n_chunks == CHUNKS  # the reference that is there stays
    with pytest.raises(InvalidDataError, match="too few"):
        doing(PATIENT).measure_level(replace(judge_job, limit=3), ignore)
    assert runs(judge_job.log) == 0


def test_without_llama_perplexity_there_is_a_way_to_get_it(
    tools: BareTools, refer_job: ReferenceJob, judge_job: MeasureJob
) -> None:
    others = {name: path for name, path in tools.toolchain.tools.items() if name != "llama-perplexity"}
    engine = BinariesEngine(replace(tools.toolchain, tools=others), Runner())
    for ask in (lambda: engine.make_reference(refer_job, ignore), lambda: engine.measure_level(judge_job, ignore)):
        with pytest.raises(ToolchainError) as caught:
            ask()
        assert "imatrix-runner tools build" in caught.value.todo
    assert {refer_job.out, note_path(refer_job.out)} <= set(refer_job.out.parent.iterdir())  # nothing was removed for nothing
