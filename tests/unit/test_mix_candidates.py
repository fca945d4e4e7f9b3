"""Candidates for a mix without a model: what every token needs has a floor where other tensors are needed by some only."""

from __future__ import annotations

from dataclasses import replace
from math import isfinite

import pytest

from imatrix_runner.engines.cost_jobs import RoundingError, Trial, TrialResult
from imatrix_runner.engines.jobs import QuantizeOptions
from imatrix_runner.errors import InvalidDataError
from imatrix_runner.mixes.mix_candidates import WITH_FLOOR, Candidates, always_active
from imatrix_runner.mixes.mix_problem import MixProblem
from imatrix_runner.mixes.mix_tensors import MixTensor
from imatrix_runner.mixes.sensitivity import CostModel
from imatrix_runner.mixes.targets import SpeedTarget
from imatrix_runner.mixes.time_budget import TokenTimes, check_speed
from imatrix_runner.quantize.resolve import bits

TYPES = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
ATTENTION = ("blk.0.attn_q.weight", "blk.0.attn_output.weight")
SHARED = ("blk.0.ffn_up_shexp.weight",)
EXPERTS = ("blk.0.ffn_up_exps.weight", "blk.0.ffn_gate_up_exps.weight", "blk.0.ffn_down_chexps.weight")
OUTSIDE = ("token_embd.weight", "output.weight")


def tensors(*names: str, types: tuple[str, ...] = TYPES) -> tuple[MixTensor, ...]:
    return tuple(MixTensor(name, name, (256, 64, 8) if "exps" in name else (256, 64), "BF16", types) for name in names)


def result(trial: str, kld: float) -> TrialResult:
    return TrialResult(trial, (0, 1), (100, 100), (kld, 1.1 * kld), (90, 90), (1.0, 1.0), (1.0, 1.0))


def candidates(some: tuple[MixTensor, ...]) -> Candidates:
    """Probes find experts ten thousand times as expensive as other tensors."""
    errors = [RoundingError(tensor.rounded(kind), 4 ** -bits(kind), 0.0, 1.0) for tensor in some for kind in tensor.types]
    trials = [Trial(tensor.name, (tensor.rounded(tensor.types[0]),)) for tensor in some]
    results = [result(trial.name, 1.0 if "exps" in trial.name else 1e-4) for trial in trials]
    problem = MixProblem(some, {}, {}, 0, sum(64 * 256 for _ in some), None, QuantizeOptions(), {}, 0)
    return Candidates(problem, CostModel.of(errors, trials, results))


def test_what_every_token_needs() -> None:
    assert always_active(tensors(*ATTENTION, *SHARED, *EXPERTS, *OUTSIDE)) == {*ATTENTION, *SHARED}
    assert always_active(tensors(*ATTENTION, *OUTSIDE)) == frozenset()
    state = ("blk.0.ssm_in.weight", "blk.0.ssm_out.weight")
    assert always_active(tensors(*ATTENTION, *state)) == {*state}


def test_a_candidate_has_a_floor_and_the_experts_pay_for_it() -> None:
    found = candidates(tensors(*ATTENTION, *SHARED, *EXPERTS))
    budget = sum(found.problem.sizes({tensor.name: "Q3_K" for tensor in found.problem.tensors}).values())
    by_name = {candidate.name: candidate for candidate in found.within(budget)}
    floored = by_name[WITH_FLOOR]
    assert all(bits(floored.types[name]) >= bits("Q5_K") for name in (*ATTENTION, *SHARED))
    assert floored.n_bytes <= budget
    assert isfinite(floored.cost)
    assert by_name["mix"].cost <= floored.cost, "by costs alone the floor is never better: trials of whole recipes decide"


def test_without_room_for_the_floor_it_is_left_out() -> None:
    found = candidates(tensors(*ATTENTION, *SHARED, *EXPERTS))
    assert WITH_FLOOR not in {candidate.name for candidate in found.within(found.problem.range[0])}


@pytest.mark.parametrize("names", [(*ATTENTION, *OUTSIDE), ()])
def test_a_dense_model_has_no_floor(names: tuple[str, ...]) -> None:
    found = candidates(tensors(*ATTENTION, "blk.0.ffn_up.weight", *names))
    assert WITH_FLOOR not in {candidate.name for candidate in found.within(found.problem.range[1])}


def test_a_tensor_without_a_type_above_the_floor_keeps_its_source_type_as_the_only_one() -> None:
    found = candidates(tensors(*ATTENTION, *EXPERTS, types=("Q2_K", "Q4_K")))
    (floored,) = [each for each in found.within(found.problem.range[1] - 20000) if each.name == WITH_FLOOR]
    assert {floored.types[name] for name in ATTENTION} == {"BF16"}


SECONDS = {"BF16": 4e-9, "Q2_K": 3e-9, "Q3_K": 2.5e-9, "Q4_K": 1e-9, "Q5_K": 1.5e-9, "Q6_K": 2e-9}
"""A machine on which small types are slow: Q4_K is the fastest."""


def test_a_budget_of_time_takes_what_is_fast_and_not_what_is_small() -> None:
    found = candidates(tensors(*ATTENTION, "blk.0.ffn_up.weight", *OUTSIDE))
    problem = found.problem
    weights = 256 * 64
    times = TokenTimes.of(problem, SECONDS, 1.0 + 4 * weights * SECONDS["BF16"], (0, 0))
    assert times.used["token_embd.weight"] == 0, "of the embeddings a token only takes a row"
    assert times.fixed == pytest.approx(1.0)
    fastest = times.rate(times.fixed_load + 4 * round(weights * SECONDS["Q4_K"] * 1e12))
    timed = replace(found, times=times)
    (mix, *_) = timed.within(times.budget(SpeedTarget(fastest)))
    assert {mix.types[name] for name in (*ATTENTION, "blk.0.ffn_up.weight", "output.weight")} == {"Q4_K"}
    assert mix.types["token_embd.weight"] == "BF16", "it takes no time, so it may be large"
    assert mix.n_bytes == problem.file_bytes(mix.types)
    assert times.rate(times.total(problem, mix.types)) >= fastest
    with pytest.raises(InvalidDataError, match=r"MIX@speed:.* cannot be reached"):
        check_speed(SpeedTarget(2 * fastest), times, problem)
    with pytest.raises(InvalidDataError, match="leaves nothing to choose"):
        check_speed(SpeedTarget(0.1), times, problem)


def test_experts_take_the_time_of_those_that_a_token_uses_and_tied_embeddings_that_of_an_output() -> None:
    found = candidates(tensors(*ATTENTION, EXPERTS[0], "token_embd.weight"))
    times = TokenTimes.of(found.problem, SECONDS, 1.0, (2, 8))
    assert times.used[EXPERTS[0]] == 256 * 64 * 2
    assert times.used["token_embd.weight"] == 256 * 64
