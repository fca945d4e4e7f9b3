"""Names, types and data decide how a level and its tensors are rounded; stock stays what it was."""

from __future__ import annotations

from pathlib import Path

import pytest

from imatrix_runner.engines.jobs import QuantizeJob, QuantizeOptions
from imatrix_runner.engines.levels import Level, resolve_levels, split_rounding
from imatrix_runner.engines.roundings import FEEDBACK_TYPES, REFINED_TYPES, ROUNDINGS, Rounding, counted, rounding_of
from imatrix_runner.errors import UsageError
from imatrix_runner.fingerprints import fingerprint_of
from imatrix_runner.mixes.rounding_facts import ROUNDING_KEY, marked
from imatrix_runner.models.gguf_file import type_id
from imatrix_runner.quantize.pass_levels import pass_level
from imatrix_runner.quantize.recipe import Recipe, RecipeTensor
from imatrix_runner.quantize.typed_options import check_override
from imatrix_runner.toolchain.quant_type import QuantType


@pytest.mark.parametrize(
    ("name", "rounding", "stock"),
    [
        ("Q4_K_M", "stock", "Q4_K_M"),
        ("feedback-q4_k_m", "feedback", "Q4_K_M"),
        (" REFINED-IQ3_XXS ", "refined", "IQ3_XXS"),
        ("STOCK-Q4_K_M", "stock", "STOCK-Q4_K_M"),
        ("FEEDBACKQ4_K_M", "stock", "FEEDBACKQ4_K_M"),
    ],
)
def test_a_name_may_ask_for_a_rounding(name: str, rounding: Rounding, stock: str) -> None:
    assert split_rounding(name) == (rounding, stock)


def test_levels_are_resolved_with_their_rounding() -> None:
    types = (QuantType("Q4_K_M", 15, "", ""), QuantType("Q6_K", 18, "", ""))
    found = resolve_levels(["q4_k_m", "Feedback-Q4_K_M", "FEEDBACK-q4_k_m"], types)
    assert [(level.name, level.rounding) for level in found] == [("Q4_K_M", "stock"), ("FEEDBACK-Q4_K_M", "feedback")]
    assert found[1].ftype == found[0].ftype
    with pytest.raises(UsageError):
        resolve_levels(["FEEDBACK-Q9"], types)


def test_the_rounding_counts_and_stock_does_not() -> None:
    stock = Level("Q4_K_M", "Q4_K_M")
    options = QuantizeOptions()
    assert fingerprint_of(stock.apply(options), "level") == fingerprint_of(options, "level")
    other = fingerprint_of(marked(stock.rounded("feedback"), "sha256:abc").apply(options), "level")
    assert "--rounding feedback" in other
    assert f"{ROUNDING_KEY}=str:feedback" in other


@pytest.mark.parametrize("rounding", ["refined", "feedback"])
def test_the_mark_is_an_override_that_llama_cpp_takes(rounding: Rounding) -> None:
    (mark,) = marked(Level("Q4_K_M", "Q4_K_M").rounded(rounding), "sha256:" + 64 * "0").override_kv
    check_override(mark)
    assert mark.startswith(f"{ROUNDING_KEY}=str:{rounding}")


@pytest.mark.parametrize("kind", sorted(REFINED_TYPES | FEEDBACK_TYPES))
def test_types_are_ggmls(kind: str) -> None:
    assert type_id(kind) is not None


@pytest.mark.parametrize("wanted", ROUNDINGS)
def test_the_best_that_type_and_data_allow(wanted: Rounding) -> None:
    assert rounding_of("q4_k", "stock", has_covariance=True) == "stock"
    assert rounding_of("Q4_K", wanted, has_covariance=True) == wanted
    assert rounding_of("Q4_K", wanted, has_covariance=False) == ("stock" if wanted == "stock" else "refined")
    assert rounding_of("TQ1_0", wanted, has_covariance=True) == "stock"
    assert rounding_of("IQ1_S", wanted, has_covariance=False) == "stock"


def test_counts_leave_out_what_there_is_none_of() -> None:
    assert counted(["feedback", "stock", "feedback"]) == {"stock": 1, "feedback": 2}


def tensor(name: str, kind: str) -> RecipeTensor:
    return RecipeTensor(name, (256, 4), "BF16", kind, None, name)


def test_each_tensor_of_a_pass_has_its_rounding() -> None:
    tensors = (tensor("token_embd.weight", "Q4_K"), tensor("blk.0.attn_q.weight", "Q4_K"), tensor("norm", "BF16"))
    recipe = Recipe(Level("FEEDBACK-Q4_K_M", "Q4_K_M"), tensors, (), (), (), False, None)
    covered = {"blk.0.attn_q.weight", "norm"}

    def targets(rounding: Rounding) -> list[str]:
        job = QuantizeJob("s", Path("m"), Path("o"), "Q4_K_M", QuantizeOptions(rounding=rounding), None, None, None)
        return [each.rounding for each in pass_level("L", recipe, job, {}, covered).tensors]

    assert targets("feedback") == ["refined", "feedback", "stock"]
    assert targets("refined") == ["refined", "refined", "stock"]
    assert targets("stock") == ["stock", "stock", "stock"]


def test_the_fingerprint_of_an_unfinished_stock_level_is_that_of_earlier_programs() -> None:
    """It is in ledgers on users' disks."""
    recipe = Recipe(Level("Q4_K_M", "Q4_K_M"), (tensor("blk.0.attn_q.weight", "Q4_K"),), (), (), (), False, None)
    job = QuantizeJob("s", Path("m"), Path("o"), "Q4_K_M", QuantizeOptions(), None, None, None)
    made = pass_level("Q4_K_M", recipe, job, {"engine": "e"}, {"blk.0.attn_q.weight"})
    assert made.fingerprint == ("sha256:c478398c7683a882bafc940e487723a6c7fd846465ce86219aba84d9d67fa029")
