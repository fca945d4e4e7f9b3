"""Trials in a loaded model against the same model with the rounded numbers in its file, and against a written level."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from imatrix_runner.engines.cost_jobs import RoundedTensor, Trial, TrialResult, TrialsJob
from imatrix_runner.engines.embedded.bindings import LIBRARY_VARIABLE
from imatrix_runner.engines.embedded.engine import EmbeddedEngine
from imatrix_runner.engines.files.cost_files import read_costs
from imatrix_runner.engines.files.token_scores import read_token_scores
from imatrix_runner.engines.measures import MeasureJob
from imatrix_runner.engines.protocol import Failed, decode_reply, encode_job
from imatrix_runner.errors import InterruptedRunError, InvalidDataError, NoSpaceError, RunnerError
from imatrix_runner.events import Event, Progress, ignore
from imatrix_runner.models.gguf_file import read_header
from imatrix_runner.process import Orders, Runner
from imatrix_runner.signals import Stop
from imatrix_runner.toolchain.probe import Toolchain
from imatrix_runner.toolchain.store import cache_dir
from support.command_line import clean_environment
from support.costs import CHUNKS, OPTIONS, PRINT, Costs, matrices_of, tensors_of, trials_job, with_numbers
from support.divergence import save_logits
from support.llama_tools import BareTools
from support.mounts import mounted
from support.passes import Passes, engine_of, set_floats, write_imatrix
from support.tiny_architectures import ARCHITECTURES, write_architecture
from support.tiny_models import write_llama_gguf

Scores = npt.NDArray[np.void]

HALF = OPTIONS.n_ctx // 2


@dataclass(frozen=True)
class Loaded:
    """A model, an imatrix, and the model's predictions for the second halves of the chunks."""

    model: Path
    imatrix: Path
    text: Path
    costs: Costs
    tools: BareTools
    folder: Path

    def job(self, out: Path, trials: Sequence[Trial], imatrix: bool = True) -> TrialsJob:
        return trials_job(self.model, self.text, trials, self.imatrix if imatrix else None, out)

    def all_to(self, kind: str) -> Trial:
        return Trial(f"all {kind}", tuple(RoundedTensor(name, kind) for name in matrices_of(self.model)))

    def measure(self, file: Path) -> Scores:
        """Token scores [chunks, rows] of a file of the same model, in the order of the job's chunks. The source's predictions
        are llama-perplexity's, which takes models that know nothing, too."""
        base, out = self.folder / "base", self.folder / "scored"
        if not base.exists():
            save_logits(self.tools, self.model, self.text, base, n_ctx=OPTIONS.n_ctx)
        out.unlink(missing_ok=True)
        job = MeasureJob("measure", file, base, out, replace(OPTIONS, repack=False), "scored", None, limit=len(CHUNKS))
        self.costs.engine.measure_level(job, ignore)
        return read_token_scores(out, "scored", OPTIONS.n_ctx)[list(CHUNKS)]


@pytest.fixture(scope="module")
def costs(toolchain: Toolchain) -> Costs:
    return Costs(engine_of(toolchain))


@pytest.fixture(scope="module")
def passes(costs: Costs, tools: BareTools) -> Passes:
    return Passes(costs.engine, tools)


@pytest.fixture(scope="module", params=["dense", "mixture", "tied"])
def loaded(
    request: pytest.FixtureRequest,
    costs: Costs,
    tools: BareTools,
    tiny_text: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Loaded:
    folder = tmp_path_factory.mktemp(request.param)
    model = folder / "model.gguf"
    if request.param == "mixture":
        write_llama_gguf(model, layers=1, experts=8, dtype="f16", fluent=True)
    elif request.param == "tied":
        write_llama_gguf(model, tied=True, dtype="f32")
    else:
        write_llama_gguf(model, fluent=True)
    return Loaded(model, write_imatrix(folder / "imatrix.gguf", model), tiny_text, costs, tools, folder)


def test_numbers_of_a_tensor_s_own_type_change_nothing(loaded: Loaded, tmp_path: Path) -> None:
    source = tensors_of(loaded.model)
    own = Trial("own", tuple(RoundedTensor(name, source[name][0]) for name in matrices_of(loaded.model)))
    others = [loaded.all_to("q4_K"), Trial("one", (RoundedTensor("token_embd.weight", "q2_K"),))]
    found = loaded.costs.trials(loaded.job(tmp_path / "trials", [own, *others, replace(own, name="again")]))
    for name in ("own", "again"):
        result = found[name]
        assert result.chunks == CHUNKS
        assert result.tokens == (127,) * 6
        assert result.kld == (0.0,) * 6
        assert result.same == result.tokens
        assert result.nll == result.nll_base
    assert min(found["all q4_K"].kld) > 0
    assert min(found["one"].kld) > 0


NAMES = ("token_embd.weight", "blk.0.attn_q.weight", "blk.0.ffn_down.weight", "blk.0.ffn_down_exps.weight", "output.weight")


def test_each_trial_is_the_model_with_these_numbers_in_its_file(loaded: Loaded, passes: Passes, tmp_path: Path) -> None:
    """One tensor after another, then all of them: the same likelihood of every token. The divergence differs by what a
    reference's 16 bits lose."""
    made = passes.make(loaded.model, ["Q4_K_S"], tmp_path, imatrix=loaded.imatrix)
    source, level = tensors_of(loaded.model), tensors_of(*made.files("Q4_K_S"))
    names = [name for name in NAMES if name in source]
    changed = [name for name in level if level[name][0] != source[name][0]]
    groups = {**{name: [name] for name in names}, "all": changed}
    assert set(names) < set(changed)
    trials = [Trial(group, tuple(RoundedTensor(name, level[name][0]) for name in members)) for group, members in groups.items()]
    found = loaded.costs.trials(replace(loaded.job(tmp_path / "trials", trials), first_scored=HALF))
    for group, members in groups.items():
        file = with_numbers(loaded.model, tmp_path / "rounded.gguf", {name: level[name][1] for name in members})
        scores, result = loaded.measure(file), found[group]
        assert result.tokens == (OPTIONS.n_ctx - 1 - HALF,) * len(CHUNKS)
        assert result.nll == pytest.approx(scores["nll"].sum(axis=1, dtype=np.float64), rel=1e-12)
        assert result.nll_base == pytest.approx(scores["base"].sum(axis=1, dtype=np.float64), rel=1e-3)
        assert result.kld == pytest.approx(scores["kld"].sum(axis=1), rel=1e-2, abs=2e-3)
        assert result.same == pytest.approx(
            scores["same"].sum(axis=1), abs=2
        )  # nearly equal logits, of which 16 bits lose some


def test_all_tensors_together_are_the_written_level(loaded: Loaded, passes: Passes, tmp_path: Path) -> None:
    """Almost: with quantised weights ggml rounds activations to 8 bits, too."""
    made = passes.make(loaded.model, ["Q3_K_S"], tmp_path, imatrix=loaded.imatrix)
    level, source = tensors_of(*made.files("Q3_K_S")), tensors_of(loaded.model)
    changed = tuple(RoundedTensor(name, kind) for name, (kind, _) in level.items() if kind != source[name][0])
    found = loaded.costs.trials(replace(loaded.job(tmp_path / "trials", [Trial("all", changed)]), first_scored=HALF))["all"]
    (file,) = made.files("Q3_K_S")
    scores = loaded.measure(file)
    assert sum(found.kld) == pytest.approx(scores["kld"].sum(), rel=0.05)
    assert sum(found.nll) == pytest.approx(scores["nll"].sum(dtype=np.float64), rel=0.005)


def is_unused(name: str, tensor: str) -> bool:
    """Whether llama.cpp loads a tensor of an architecture and computes nothing with it."""
    if name == "rwkv7":
        return tensor.startswith("blk.0.time_mix_v") and tensor.removesuffix(".weight")[-1] in "012"
    return name == "glm4moe" and tensor.startswith("blk.2.")


@pytest.mark.parametrize("name", [*ARCHITECTURES, "glm4moe"])
def test_every_weight_of_every_architecture_is_found(name: str, costs: Costs, tiny_text: Path, tmp_path: Path) -> None:
    """Norms and biases, too: all that its graph reads, whatever the operation. What it does not read is named."""
    model = write_architecture(name, tmp_path / "model.gguf")
    own = [RoundedTensor(each.name, each.type_name.lower()) for each in read_header(model).tensors if len(each.shape) < 4]
    used = tuple(tensor for tensor in own if not is_unused(name, tensor.name))
    job = trials_job(model, tiny_text, [Trial("own", used)], None, tmp_path / "trials")
    assert costs.trials(job)["own"].kld == (0.0,) * len(CHUNKS)
    for tensor in [each for each in own if is_unused(name, each.name)][:2]:
        refused(costs, replace(job, out=tmp_path / "refused", trials=(Trial("unused", (*used, tensor)),)), tensor.name)


def refused(costs: Costs, job: TrialsJob, why: str) -> RunnerError:
    with pytest.raises(RunnerError) as caught:
        costs.trials(job)
    assert why in caught.value.why
    assert caught.value.todo
    assert not list(job.out.parent.glob(".*reference*"))
    return caught.value


@pytest.fixture
def small(tiny_model: Path, tiny_text: Path, tmp_path: Path) -> TrialsJob:
    """Three trials of the tiny model."""
    trials = [Trial(kind, (RoundedTensor("blk.0.ffn_up.weight", kind, weighted=False),)) for kind in ("q2_K", "q4_0", "q8_0")]
    return trials_job(tiny_model, tiny_text, trials, None, tmp_path / "trials")


def test_a_trial_ends_when_its_error_is_small_enough(small: TrialsJob, costs: Costs) -> None:
    """After the batch of two chunks in which it becomes so, and not before four."""
    whole = costs.trials(small)
    errors = {}
    for name, result in whole.items():
        kld = np.array(result.kld)
        assert result.chunks == CHUNKS
        errors[name] = [float(kld[:n].std(ddof=1) / np.sqrt(n) / kld[:n].mean()) for n in (4, 6)]
    lower, upper = min(errors[name][0] for name in errors), max(errors[name][0] for name in errors)
    assert lower < upper
    for enough in (1e-9, (lower + upper) / 2, 10.0):
        found = costs.trials(replace(small, enough=enough, fingerprint=f"enough {enough}"))
        for name, result in found.items():
            n = 4 if errors[name][0] < enough else 6
            assert result.chunks == CHUNKS[:n]
            assert result.kld == whole[name].kld[:n]
            assert result.nll_base == whole[name].nll_base[:n]


def test_progress_counts_batches(small: TrialsJob, costs: Costs) -> None:
    told: list[Event] = []
    costs.trials(small, told.append)
    assert all(isinstance(event, Progress) for event in told)
    assert [event.done for event in told if isinstance(event, Progress)] == list(range(1, 13))
    assert {event.total for event in told if isinstance(event, Progress)} == {12}
    assert told[-1] == Progress("trials", 12, 12, "3/3 q8_0")


def test_a_file_is_continued_at_a_trial(small: TrialsJob, costs: Costs) -> None:
    """Cut anywhere, as a kill leaves it; what another job left of its scratch file is removed."""
    costs.trials(small)
    whole = small.out.read_bytes()
    ends = [match.end() for match in re.finditer(b"\n", whole)]
    for cut in (0, ends[0], ends[1] - 1, ends[1] + 7, ends[2]):
        small.out.write_bytes(whole[:cut])
        small.out.with_name(f".{small.out.name}.reference").write_bytes(b"left by a kill")
        costs.trials(small)
        assert small.out.read_bytes() == whole
    costs.trials(replace(small, model=small.model.with_name("gone.gguf")))  # nothing is left to do
    assert small.out.read_bytes() == whole


def test_a_result_depends_on_no_trial_before_it(small: TrialsJob, costs: Costs, tmp_path: Path) -> None:
    """In another order than the job's, one of them twice, without what others rounded between."""
    whole = list(costs.trials(small).values())
    for wanted in ((2, 0, 1, 0), (1,)):
        orders, found, told = Orders(), list[tuple[int, TrialResult]](), list[Event]()
        for place in wanted:
            orders.give(place)

        def on_trial(
            place: int,
            result: TrialResult,
            n: int = len(wanted),
            orders: Orders = orders,
            to: list[tuple[int, TrialResult]] = found,
        ) -> None:
            to.append((place, result))
            if len(to) == n:
                orders.end()

        out = tmp_path / "ordered"
        costs.engine.ordered_trials(replace(small, out=out, ordered=True), told.append, orders, on_trial)
        assert found == [(place, whole[place]) for place in wanted]
        assert not list(tmp_path.glob("*ordered*"))
        assert [event.done for event in told if isinstance(event, Progress)] == list(range(1, 3 * (len(wanted) + 1) + 1))


def test_a_stop_finishes_the_batch_and_the_rest_gives_the_same_bytes(small: TrialsJob, costs: Costs, tmp_path: Path) -> None:
    whole, left = tmp_path / "whole", []
    small = replace(small, options=replace(OPTIONS, n_ctx=512, n_batch=512))
    costs.trials(replace(small, out=whole))
    for at in (1, 8, 14):
        out, stop, told = tmp_path / f"stopped-{at}", Stop(), []
        job = replace(small, out=out)

        def notice(event: Event, at: int = at, stop: Stop = stop, told: list[Event] = told) -> None:
            told.append(event)
            if len(told) == at:
                stop.request()

        stopping = EmbeddedEngine(costs.engine.bindings, Runner(stop), cache_dir())
        with pytest.raises(InterruptedRunError):
            stopping.trials(job, notice)
        left.append(len(read_costs(out, PRINT, TrialResult)))
        assert left[-1] == max(0, len(told) // len(CHUNKS) - 1)
        costs.trials(job)
        assert out.read_bytes() == whole.read_bytes()
    assert left[0] < len(small.trials)


def test_what_cannot_be_tried_is_refused(small: TrialsJob, costs: Costs, tools: BareTools, tmp_path: Path) -> None:
    def trial(*tensors: RoundedTensor) -> tuple[Trial, ...]:
        return (Trial("bad", tensors),)

    refused(costs, replace(small, trials=trial(RoundedTensor("none.weight", "q4_0"))), "none.weight: tiny-BF16.gguf has no")
    unweighted = RoundedTensor("blk.0.attn_q.weight", "iq2_xxs")
    refused(costs, replace(small, trials=trial(unweighted)), "blk.0.attn_q.weight: ggml does not quantise to iq2_xxs without")
    quantised = tools.quantize(small.model, tmp_path / "level.gguf", "Q8_0")
    error = refused(costs, replace(small, model=quantised), "blk.0.ffn_up.weight: its own type, q8_0, does not hold")
    assert isinstance(error, InvalidDataError)
    error = refused(costs, replace(small, chunks=(0, 500)), "shorter now than when its tokens were counted")
    assert "too few for 501 chunks of 128" in error.what


def test_numbers_that_are_not_finite_are_refused(small: TrialsJob, costs: Costs, tmp_path: Path) -> None:
    def broken(tensor: str, number: float) -> TrialsJob:
        model = tmp_path / "broken.gguf"
        model.write_bytes(small.model.read_bytes())
        return replace(small, model=set_floats(model, tensor, [number] * 256), out=tmp_path / "broken")

    error = refused(costs, broken("output_norm.weight", float("nan")), "numbers in its tensor output_norm.weight are NaN")
    assert isinstance(error, InvalidDataError)
    refused(costs, broken("output_norm.weight", 3e38), "its logits in chunk 5 are NaN or infinite")


def test_a_disk_without_room_for_the_predictions_is_refused(small: TrialsJob, costs: Costs, tmp_path: Path) -> None:
    """Before anything is computed, and the same command goes on when there is room: six chunks take 0.8 MB."""
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "size=600k", "tmpfs") as disk:
        job = replace(small, out=disk / "trials", log=tmp_path / "log")
        error = refused(costs, job, "needed")
        assert isinstance(error, NoSpaceError)
        assert error.what == "Not enough disk space for the predictions that trials are compared with"
        assert len(costs.trials(replace(job, chunks=(0, 1)))) == 3


_SABOTAGED = """
import sys
from imatrix_runner.engines.protocol import decode_job, encode
from imatrix_runner.engines.worker.cost.loaded_weights import LoadedWeights
from imatrix_runner.engines.worker.cost.trials_job import measure_trials
from imatrix_runner.engines.worker.refusal import Refusal
write, holds, written = LoadedWeights.write, LoadedWeights.holds, []
def write_some(self, name, offset, data):
    written.append(name)
    if len(written) < 4:  # what the second trial rounded is not put back
        write(self, name, offset, data)
LoadedWeights.write = write_some
LoadedWeights.holds = lambda *arguments: len(written) >= 4 and sys.argv[2] == "unseen" or holds(*arguments)
try:
    measure_trials(decode_job(sys.argv[1]), lambda reply: None)
except Refusal as refusal:
    print(encode(refusal.reply).decode())
"""


@pytest.mark.parametrize(
    ("how", "why", "kept"),
    [
        ("seen", "blk.0.ffn_up.weight has other bytes in memory than in the file", 1),
        ("unseen", "it predicts otherwise than before the trials", 0),
    ],
)
def test_a_model_that_is_not_restored_is_noticed(how: str, why: str, kept: int, small: TrialsJob, toolchain: Toolchain) -> None:
    """By its bytes; and by what it predicts at the end: then no result since the beginning is trusted."""
    reading, writing = os.pipe()  # a worker stops when its stdin ends
    try:
        done = subprocess.run(
            [sys.executable, "-c", _SABOTAGED, encode_job(replace(small, trials=small.trials[:2])).decode(), how],
            env=clean_environment({LIBRARY_VARIABLE: str(toolchain.directory)}),
            stdin=reading,
            capture_output=True,
            timeout=300,
            check=True,
        )
    finally:
        os.close(reading)
        os.close(writing)
    failed = decode_reply(done.stdout.decode())
    assert isinstance(failed, Failed)
    assert failed.what == "tiny-BF16.gguf could not be restored in memory"
    assert failed.why == why
    assert failed.exit_code == 5
    assert len(read_costs(small.out, PRINT, TrialResult)) == kept
