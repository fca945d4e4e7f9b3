"""What measuring costs takes, for models of any size: numbers of trials and tokens, and time where a speed is known."""

from __future__ import annotations

from pathlib import Path

import pytest

from imatrix_runner.engines.jobs import CollectOptions
from imatrix_runner.mixes.measure_costs import PROBE_TOKENS, places
from imatrix_runner.mixes.measuring_work import describe_work, measuring_step, planned_probes
from imatrix_runner.mixes.mix_tensors import MixTensor, allowed_types
from imatrix_runner.mixes.rounding_speed import LEAST_SECONDS, remember_rounding, rounding_speed
from imatrix_runner.quantize.plan import MixingStep

WHERE = places(280, CollectOptions(), PROBE_TOKENS)


def dense(n_layers: int, *, tied: bool = False) -> tuple[MixTensor, ...]:
    """The tensors of a llama of so many layers; their sizes do not matter here."""
    kinds = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    names = [f"blk.{layer}.{kind}.weight" for layer in range(n_layers) for kind in kinds]
    names += ["token_embd.weight", *([] if tied else ["output.weight"])]
    return tuple(MixTensor(name, name, (4096, 4096), "BF16", allowed_types("")) for name in names)


def step_of(tensors: tuple[MixTensor, ...], n_targets: int = 1, *, thorough: bool = False) -> MixingStep:
    n_probes = len(planned_probes(tensors, ()))
    return measuring_step(
        tensors, WHERE, 512, n_probes=n_probes, n_rounded=0, n_targets=n_targets, thorough=thorough, weighted=True
    )


@pytest.mark.parametrize(
    ("n_layers", "tied", "n_probes", "millions"),
    [(30, True, 264, 1.09), (16, True, 142, 0.72), (32, False, 284, 1.17), (80, False, 704, 2.46)],
    ids=["0.1 B", "1 B", "8 B", "70 B"],
)
def test_models_from_a_tenth_to_seventy_billion_weights(n_layers: int, tied: bool, n_probes: int, millions: float) -> None:
    """The table of docs/mixes.md."""
    tensors = dense(n_layers, tied=tied)
    step = step_of(tensors)
    assert step.n_probes == n_probes
    assert step.n_tokens / 1e6 == pytest.approx(millions, abs=0.005)
    assert n_probes * PROBE_TOKENS <= 2 * 2048 * len(tensors), "the goal: two forward passes of 2,048 tokens for each tensor"


def test_further_targets_take_recipes_alone() -> None:
    tensors = dense(32)
    one, three = step_of(tensors), step_of(tensors, 3)
    assert three.n_probes == one.n_probes
    assert three.n_tokens - one.n_tokens == 2 * 8 * len(WHERE.recipes) * 512
    assert step_of(tensors, thorough=True).n_probes == one.n_probes + 6 * len(tensors)


def test_tensors_that_no_text_reaches_are_not_probed() -> None:
    tensors = dense(2)
    some = {"blk.1.ffn_up.weight", "token_embd.weight"}
    missing = {trial.tensors[0].name for trial in planned_probes(tensors, ())} - {
        trial.tensors[0].name for trial in planned_probes(tensors, some)
    }
    assert missing == {"blk.1.ffn_up.weight"}


def test_time_is_named_where_the_speed_is_known() -> None:
    step = MixingStep(120_000_000, 39, 25, 600_000, tokens_per_second=2000.0, weights_per_second=2e6)
    assert (step.trial_seconds, step.rounding_seconds) == (300.0, 60.0)
    assert describe_work(step, 2) == (
        "Choosing the types of 2 mixes takes 120.0 M weights to round (1:00 at the speed of the last time), and at most 39 "
        "probes of tensors and 25 whole recipes with 600,000 tokens (5:00 at the speed of the imatrix)."
    )


def test_time_that_is_not_known_is_not_guessed() -> None:
    step = MixingStep(120_000_000, 39, 25, 600_000)
    assert (step.trial_seconds, step.rounding_seconds) == (None, None)
    assert describe_work(step, 1).count("time not known") == 2
    assert MixingStep(0, 0, 0, 0).trial_seconds == 0.0


def test_what_is_measured_already_is_not_counted() -> None:
    step = MixingStep(0, 0, 6, 1000, tokens_per_second=100.0)
    assert describe_work(step, 1) == (
        "Choosing the types of a mix takes at most 6 whole recipes with 1,000 tokens (10.0 s at the speed of the imatrix)."
    )


def test_the_speed_of_rounding_is_remembered_for_an_engine_and_its_threads(tmp_path: Path) -> None:
    remember_rounding(tmp_path, "engine 1", None, 10_000_000, 5.0)
    assert rounding_speed(tmp_path, "engine 1", None) == 2e6
    assert rounding_speed(tmp_path, "engine 1", 4) is None
    assert rounding_speed(tmp_path, "engine 2", None) is None
    remember_rounding(tmp_path, "engine 2", None, 1000, LEAST_SECONDS / 2)
    assert rounding_speed(tmp_path, "engine 2", None) is None
