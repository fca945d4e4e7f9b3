"""Errors of rounded tensors: those of the files that the pass writes, computed again in numpy."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from imatrix_runner.engines.cost_jobs import RoundedTensor, RoundingError, tensor_groups
from imatrix_runner.errors import InvalidDataError, RunnerError
from imatrix_runner.events import Event, Progress, ignore
from imatrix_runner.process import Orders
from imatrix_runner.toolchain.probe import Toolchain
from support.costs import Costs, errors_job, importances, matrices_of, tensors_of
from support.llama_tools import BareTools
from support.passes import Passes, engine_of, set_floats, write_imatrix
from support.tiny_models import write_llama_gguf

LEVELS = ("Q4_K_M", "IQ3_S", "Q8_0", "Q4_0", "F16", "BF16")


@pytest.fixture(scope="module")
def costs(toolchain: Toolchain) -> Costs:
    return Costs(engine_of(toolchain))


@pytest.fixture(scope="module")
def passes(costs: Costs, tools: BareTools) -> Passes:
    return Passes(costs.engine, tools)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("errors")


@pytest.fixture(scope="module", params=["dense", "mixture", "tied"])
def model(request: pytest.FixtureRequest, folder: Path) -> Path:
    path = folder / f"{request.param}.gguf"
    if request.param == "mixture":
        return write_llama_gguf(path, layers=1, experts=4, dtype="f16")
    return write_llama_gguf(path, tied=request.param == "tied", dtype="f32" if request.param == "tied" else "bf16", odd=True)


@pytest.mark.parametrize("weighted", [True, False], ids=["imatrix", "plain"])
def test_they_are_those_of_the_files_that_the_pass_writes(
    weighted: bool, model: Path, costs: Costs, passes: Passes, tmp_path: Path
) -> None:
    """Every tensor of every level. What is rounded without the imatrix is weighed with it all the same."""
    imatrix = write_imatrix(tmp_path / "imatrix.gguf", model, without=["attn_output"])
    made = passes.make(model, LEVELS, tmp_path, imatrix=imatrix if weighted else None)
    assert not made.spoiled
    source = tensors_of(model)
    rounded = {}
    for level in LEVELS:
        for name, (kind, numbers) in tensors_of(*made.files(level)).items():
            if kind != source[name][0]:
                rounded[RoundedTensor(name, kind, weighted)] = numbers
    kinds = {tensor.type for tensor in rounded}
    assert kinds >= {"q4_k", "q6_k", "iq3_s", "q8_0", "q4_0"}
    found = costs.errors(errors_job([model], list(rounded), imatrix, tmp_path / "errors"))
    for tensor, numbers in rounded.items():
        numbers_before = source[tensor.name][1]
        weights = importances(imatrix, tensor.name, numbers_before)
        error = numbers_before - numbers
        assert found[tensor].weighted == pytest.approx((weights * error**2).sum(), rel=1e-5), tensor
        assert found[tensor].squared == pytest.approx((error**2).sum(), rel=1e-5), tensor
        assert found[tensor].norm == pytest.approx((weights * numbers_before**2).sum(), rel=1e-9), tensor


def every(model: Path, *types: str) -> list[RoundedTensor]:
    return [RoundedTensor(name, kind) for name in matrices_of(model) for kind in types]


def test_neither_threads_nor_memory_change_a_byte(model: Path, costs: Costs, tmp_path: Path) -> None:
    imatrix = write_imatrix(tmp_path / "imatrix.gguf", model)
    job = errors_job([model], every(model, "q4_0", "q8_0", "bf16"), imatrix, tmp_path / "errors")
    files = []
    for number, (threads, buffer_bytes) in enumerate(((1, 1 << 30), (4, 1 << 30), (3, 1))):
        given = replace(job, threads=threads, buffer_bytes=buffer_bytes, out=tmp_path / f"errors-{number}")
        costs.errors(given)
        files.append(given.out.read_bytes())
    assert files[0] == files[1] == files[2]


def test_excluded_weights_are_not_rounded_with(folder: Path, costs: Costs, tmp_path: Path) -> None:
    """But errors are weighed with them, so that those of one tensor can be compared."""
    model = write_llama_gguf(tmp_path / "model.gguf", layers=1)
    imatrix = write_imatrix(tmp_path / "imatrix.gguf", model)
    name = "blk.0.attn_q.weight"
    tensors = [RoundedTensor(name, "q4_0"), RoundedTensor(name, "q4_0", weighted=False), RoundedTensor("output.weight", "q4_0")]
    job = errors_job([model], tensors, imatrix, tmp_path / "all")
    with_all = costs.errors(job)
    without = costs.errors(replace(job, out=tmp_path / "some", exclude_weights=("attn_q",)))
    included = costs.errors(replace(job, out=tmp_path / "included", include_weights=("output",)))
    assert with_all[tensors[0]].weighted < with_all[tensors[1]].weighted
    assert replace(without[tensors[0]], tensor=tensors[1]) == without[tensors[1]] == with_all[tensors[1]]
    assert without[tensors[2]] == with_all[tensors[2]]
    assert included == without


def test_shards_are_one_model(costs: Costs, tools: BareTools, tmp_path: Path) -> None:
    model = write_llama_gguf(tmp_path / "model.gguf")
    shards = tools.split(model, tmp_path / "split", 8)
    assert len(shards) > 1
    whole = costs.errors(errors_job([model], every(model, "q4_0"), None, tmp_path / "whole"))
    assert costs.errors(errors_job(shards, every(model, "q4_0"), None, tmp_path / "parts")) == whole


def test_a_file_is_continued_at_any_byte(costs: Costs, tmp_path: Path) -> None:
    """Cut anywhere, as a kill leaves it."""
    model = write_llama_gguf(tmp_path / "model.gguf", layers=1, hidden=64, ff=128)
    job = errors_job([model], every(model, "q4_0", "q8_0"), None, tmp_path / "errors")
    costs.errors(job)
    whole = job.out.read_bytes()
    first = whole.index(b"\n") + 1
    for cut in (0, first // 2, first, first + 5, len(whole) // 2, whole.rindex(b"\n", 0, -1) + 1, len(whole) - 1):
        job.out.write_bytes(whole[:cut] + b"x" * (cut % 3))
        costs.errors(job)
        assert job.out.read_bytes() == whole
    model.unlink()
    costs.errors(job)  # nothing is left to do
    assert job.out.read_bytes() == whole


def test_what_has_another_fingerprint_is_measured_anew(costs: Costs, tmp_path: Path) -> None:
    model = write_llama_gguf(tmp_path / "model.gguf", layers=1, hidden=64, ff=128)
    job = errors_job([model], every(model, "q4_0"), None, tmp_path / "errors")
    costs.errors(job)
    again = replace(job, fingerprint="another", tensors=job.tensors[:3])
    assert len(costs.errors(again)) == 3


def test_progress_counts_elements(costs: Costs, tmp_path: Path) -> None:
    model = write_llama_gguf(tmp_path / "model.gguf", vocab=4096)
    told: list[Event] = []
    job = errors_job([model], every(model, "q4_K"), None, tmp_path / "errors", threads=1)
    costs.errors(job, told.append)
    total = sum(numbers.size for _, numbers in (tensors_of(model)[tensor.name] for tensor in job.tensors))
    assert told
    assert all(isinstance(event, Progress) and 0 < event.done <= event.total == total for event in told)


REFUSED = {
    "no data": (RoundedTensor("blk.0.attn_output.weight", "iq2_xs"), "without data of an imatrix"),
    "not weighted": (RoundedTensor("blk.0.attn_q.weight", "iq2_xs", weighted=False), "without data of an imatrix"),
    "no such tensor": (RoundedTensor("blk.9.attn_q.weight", "q4_0"), "no tensor of this name"),
    "a fallback": (RoundedTensor("blk.0.ffn_down.weight", "q4_K"), "its rows of 544 do not divide into q4_K's blocks of 256"),
    "another size": (RoundedTensor("output.weight", "q4_0"), "values for it instead of 256"),
    "not a number": (RoundedTensor("blk.1.attn_v.weight", "q4_0"), "the model has NaN or infinite numbers there"),
    "too large": (RoundedTensor("blk.1.attn_k.weight", "f16"), "quantised to f16 it has NaN or infinite numbers"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_rounded_is_named(name: str, costs: Costs, tmp_path: Path) -> None:
    """And those before it stay."""
    tensor, why = REFUSED[name]
    model = write_llama_gguf(tmp_path / "model.gguf", odd=True)
    set_floats(model, "blk.1.attn_v.weight", [float("nan")], first=1000)
    set_floats(model, "blk.1.attn_k.weight", [1e20], first=1000)
    odd = write_imatrix(tmp_path / "imatrix.gguf", model, without=["attn_output"])
    if name == "another size":
        other = write_llama_gguf(tmp_path / "other.gguf", hidden=512)
        odd = write_imatrix(tmp_path / "other-imatrix.gguf", other)
    good = RoundedTensor("token_embd.weight", "q4_0", weighted=name != "another size")
    job = errors_job([model], [good, tensor], odd, tmp_path / "errors")
    with pytest.raises(InvalidDataError, match="cannot be rounded") as caught:
        costs.errors(job)
    assert why in caught.value.why
    assert tensor.name in caught.value.why
    assert caught.value.todo


def test_both_lists_of_weights_are_refused(costs: Costs, tmp_path: Path) -> None:
    model = write_llama_gguf(tmp_path / "model.gguf", layers=1)
    job = errors_job([model], every(model, "q4_0"), write_imatrix(tmp_path / "imatrix.gguf", model), tmp_path / "errors")
    with pytest.raises(RunnerError, match="include-weights"):
        costs.errors(replace(job, include_weights=("a",), exclude_weights=("b",)))


@pytest.mark.parametrize("native_kernels", [True, False])
def test_an_assertion_of_ggml_names_the_tensor(native_kernels: bool, costs: Costs, tmp_path: Path) -> None:
    model = set_floats(write_llama_gguf(tmp_path / "model.gguf", dtype="f32"), "blk.1.attn_q.weight", [1e38])
    tensors = [RoundedTensor(f"blk.1.attn_{name}.weight", "iq3_s") for name in "kq"]
    job = replace(errors_job([model], tensors, None, tmp_path / "errors"), native_kernels=native_kernels)
    with pytest.raises(InvalidDataError, match="cannot be rounded") as caught:
        costs.errors(job)
    assert caught.value.why.startswith("blk.1.attn_q.weight: ggml aborted while quantising it to iq3_s: ")


def test_an_imatrix_that_is_not_finite(costs: Costs, tmp_path: Path) -> None:
    """Refused, as in the pass, unless these values are excluded; errors are then not weighed with them either."""
    model = write_llama_gguf(tmp_path / "model.gguf", layers=1)
    imatrix = set_floats(write_imatrix(tmp_path / "imatrix.gguf", model), "blk.0.attn_k.weight.in_sum2", [float("nan")])
    job = errors_job([model], every(model, "q4_0"), imatrix, tmp_path / "errors")
    with pytest.raises(RunnerError, match=r"non-finite|NaN or infinite"):
        costs.errors(job)
    found = costs.errors(replace(job, exclude_weights=("attn_k",)))
    error = found[RoundedTensor("blk.0.attn_k.weight", "q4_0")]
    assert error.weighted == error.squared


def test_errors_depend_on_no_tensor_before_them(model: Path, costs: Costs, tmp_path: Path) -> None:
    """In another order than the job's, one group twice."""
    names = matrices_of(model)[:3]
    tensors = [RoundedTensor(name, kind) for name in names for kind in ("q8_0", "f16")]
    job = errors_job([model], tensors, None, tmp_path / "errors")
    whole = costs.errors(job)
    orders, found = Orders(), list[tuple[int, tuple[RoundingError, ...]]]()
    for place in (wanted := (2, 0, 1, 0)):
        orders.give(place)

    def on_errors(place: int, errors: tuple[RoundingError, ...]) -> None:
        found.append((place, errors))
        if len(found) == len(wanted):
            orders.end()

    costs.engine.ordered_errors(replace(job, out=tmp_path / "none", ordered=True), ignore, orders, on_errors)
    groups = tensor_groups(tensors)
    assert found == [(place, tuple(whole[tensor] for tensor in groups[place])) for place in wanted]
    assert not (tmp_path / "none").exists()
