"""The preflight's findings: each flaw of a matrix is named, with the tensors it is about, and nothing else is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest

from imatrix_runner.imatrix.coverage import FEW_TOKENS, Coverage, Finding, examine, wants_weights
from imatrix_runner.imatrix.matrix import Matrix, MatrixEntry
from support.values import entry, matrix

EXPERTS = 4
SHAPES: Mapping[str, tuple[int, ...]] = {
    "token_embd.weight": (8, 32),
    "output.weight": (8, 32),
    "output_norm.weight": (8,),
    **{
        f"blk.{layer}.{name}.weight": shape
        for layer in range(3)
        for name, shape in {
            "attn_norm": (8,),
            "attn_q": (8, 8),
            "attn_output": (8, 8),
            "ffn_gate_inp": (8, EXPERTS),
            "ffn_up_exps": (8, 16, EXPERTS),
            "ffn_down_exps": (16, 8, EXPERTS),
        }.items()
    },
}
QUERY, UP, DOWN = "blk.0.attn_q.weight", "blk.0.ffn_up_exps.weight", "blk.1.ffn_down_exps.weight"


def full() -> dict[str, MatrixEntry]:
    """Data for all that llama-imatrix collects, without a flaw."""
    entries = {}
    for name, shape in SHAPES.items():
        if name.startswith("blk.") and len(shape) > 1:
            rows = shape[2] if len(shape) > 2 else 1
            entries[name] = MatrixEntry(np.ones((rows, shape[0])), np.full(rows, 2 * FEW_TOKENS))
    return entries


def examined(shapes: Mapping[str, tuple[int, ...]] = SHAPES, /, **changes: MatrixEntry | None) -> Coverage:
    """The full matrix with some entries replaced or (None) left out; ``__`` stands for a dot."""
    named = {name.replace("__", "."): value for name, value in changes.items()}
    entries = {name: value for name, value in {**full(), **named}.items() if value is not None}
    return examine(matrix(dict(sorted(entries.items()))), shapes)


def changed(name: str, value: MatrixEntry | None) -> Coverage:
    return examined(**{name.replace(".", "__"): value})


def flaws(coverage: Coverage) -> list[Finding]:
    return [finding for finding in coverage.findings if finding.severity != "info"]


def only(coverage: Coverage, kind: str) -> Finding:
    (finding,) = flaws(coverage)
    assert finding.kind == kind
    return finding


def test_a_full_matrix_has_no_flaw() -> None:
    coverage = examined()
    assert flaws(coverage) == []
    assert coverage.usable
    (origin,) = coverage.findings
    assert origin.text == "2 chunks of 64 tokens, dataset text.txt"


def test_a_legacy_matrix_says_less_of_itself() -> None:
    coverage = examine(Matrix(full(), 0, 0, ()), SHAPES)
    assert {finding.kind: finding.text for finding in coverage.findings} == {
        "origin": "0 chunks of unknown size (legacy), dataset unknown",
        "no-chunks": "its metadata says that it saw no chunk of text",
    }


class TestNames:
    """What the matrix has and the model wants."""

    def test_missing_entries_are_named(self) -> None:
        coverage = examined(**{QUERY.replace(".", "__"): None, UP.replace(".", "__"): None})
        finding = only(coverage, "missing")
        assert finding.tensors == (QUERY, UP)
        assert finding.text == f"2 tensors without an entry: {QUERY}, {UP}"
        assert coverage.usable

    def test_extra_entries_are_named(self) -> None:
        assert only(changed("blk.7.attn_q.weight", entry([1], 1)), "extra").tensors == ("blk.7.attn_q.weight",)

    def test_a_block_without_data_is_one_finding(self) -> None:
        bare = {name.replace(".", "__"): None for name in SHAPES if name.startswith("blk.1.")}
        finding = only(examined(**bare), "block-without-data")
        assert finding.text == "block 1 without any data"
        assert set(finding.tensors) == {
            name for name in SHAPES if name.startswith("blk.1.") and wants_weights(name, SHAPES[name])
        }

    def test_a_prediction_layer_explains_itself(self) -> None:
        more = {"blk.3.attn_q.weight": (8, 8), "blk.3.nextn.eh_proj.weight": (16, 8), "blk.3.nextn.enorm.weight": (8,)}
        finding = only(examined({**SHAPES, **more}), "block-without-data")
        assert finding.text == "block 3 without any data: MTP / NextN layers are never run while collecting"
        assert finding.tensors == ("blk.3.attn_q.weight", "blk.3.nextn.eh_proj.weight")

    def test_another_model_is_one_finding(self) -> None:
        coverage = examine(matrix({"blk.0.ssm_in.weight": entry([1], 1)}), SHAPES)
        assert [finding.kind for finding in flaws(coverage)] == ["other-model"]
        assert not coverage.usable

    @pytest.mark.parametrize(
        ("name", "shape"),
        [
            ("token_embd.weight", (8, 8)),
            ("per_layer_token_embd.weight", (8, 8)),
            ("output.weight", (8, 8)),
            ("blk.0.attn_norm.weight", (8,)),
            ("blk.0.attn_q.bias", (8, 8)),
            ("blk.0.attn_q_norm.weight", (8, 8)),
            ("blk.0.ffn_gate_inp.weight", (8, 4)),
            ("blk.0.ssm_conv1d.weight", (4, 8)),
            ("blk.0.shortconv.conv.weight", (3, 8)),
            ("blk.0.time_mix_w1.weight", (8, 8)),
            ("blk.0.time_mix_lerp_fused.weight", (8, 8)),
            ("blk.0.indexer.k_proj.weight", (8, 8)),
            ("token_types.weight", (8, 2)),
            ("enc.blk.0.attn_rel_b.weight", (8, 8)),
        ],
    )
    def test_what_is_never_quantised_is_not_missed(self, name: str, shape: tuple[int, ...]) -> None:
        """src/llama-quant.cpp, tensor_allows_quantization()."""
        assert not wants_weights(name, shape)

    @pytest.mark.parametrize(
        "name", [QUERY, UP, "blk.0.shortconv.in_proj.weight", "blk.0.time_mix_key.weight", "blk.0.ffn_gate_inp_shexp.weight"]
    )
    def test_what_is_quantised_is_missed(self, name: str) -> None:
        assert wants_weights(name, (8, 8))


class TestSizes:
    """As many values as ne0 * ne2, or llama-quantize stops."""

    @pytest.mark.parametrize(
        ("name", "shape", "value", "why"),
        [
            (
                UP,
                (8, 16, EXPERTS),
                entry([1] * 8, 1),
                "one row where there are 4 (the matrix was made before experts were merged",
            ),
            (UP, (8, 16, EXPERTS), entry([[1] * 8] * 8, [64] * 8), "64 values, the model needs 32: another number of experts"),
            (QUERY, (8, 8), entry([1] * 4, 1), "4 values, the model needs 8: it was made from another model"),
            ("blk.0.attn_k_b.weight", (8, 4, 2), entry([1] * 8, 1), "one row where there are 2 (MLA heads were one matrix)"),
            ("blk.0.attn_kv_b.weight", (8, 4), entry([1] * 16, 1), "an MLA model converted by another version of llama.cpp"),
            ("blk.0.ffn_gate_up_exps.weight", (8, 4, 2), entry([1] * 32, 1), "a fused gate_up tensor against separate ones"),
        ],
    )
    def test_a_wrong_size_is_an_error_with_a_guess_at_its_cause(
        self, name: str, shape: tuple[int, ...], value: MatrixEntry, why: str
    ) -> None:
        coverage = examined({**SHAPES, name: shape}, **{name.replace(".", "__"): value})
        finding = next(finding for finding in coverage.findings if finding.kind == "size")
        assert finding.severity == "error"
        assert why in finding.text
        assert finding.tensors == (name,)
        assert not coverage.usable

    def test_all_heads_of_a_three_dimensional_weight_lie_in_one_row(self) -> None:
        name = "blk.0.attn_k_b.weight"
        coverage = examined({**SHAPES, name: (8, 4, 2)}, blk__0__attn_k_b__weight=entry([1] * 16, 64))
        assert flaws(coverage) == []

    @pytest.mark.parametrize("name", ["token_embd.weight", "per_layer_token_embd.weight"])
    def test_embeddings_may_misfit(self, name: str) -> None:
        coverage = examined({**SHAPES, name: (8, 32)}, **{name.replace(".", "__"): entry([1], 1)})
        assert flaws(coverage) == []


class TestValues:
    """Numbers that protect nothing, or are none."""

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    def test_numbers_that_are_none(self, bad: float) -> None:
        coverage = changed(QUERY, entry([1] * 7 + [bad], 200))
        assert only(coverage, "nan-or-infinite").tensors == (QUERY,)
        assert not coverage.usable

    @pytest.mark.parametrize("value", [entry([1] * 7 + [-1], 200), entry([1] * 8, -200)])
    def test_negative_numbers(self, value: MatrixEntry) -> None:
        coverage = changed(QUERY, value)
        assert only(coverage, "negative").tensors == (QUERY,)
        assert not coverage.usable

    def test_only_zeros(self) -> None:
        coverage = changed(QUERY, entry([0] * 8, 200))
        assert only(coverage, "zero").tensors == (QUERY,)
        assert coverage.usable

    def test_dead_columns(self) -> None:
        assert only(changed(QUERY, entry([1] * 7 + [0], 200)), "columns").tensors == (QUERY,)

    def test_no_token_counted(self) -> None:
        assert only(changed(QUERY, entry([0] * 8, 0)), "uncounted").tensors == (QUERY,)

    def test_the_zeros_of_an_unseen_expert_are_not_dead_columns(self) -> None:
        value = entry([[1] * 16, [0] * 16, [1] * 16, [1] * 16], [99, 0, 99, 99])
        only(changed(DOWN, value), "experts-without-data")

    def test_several_are_told_in_one_line(self) -> None:
        zeros = {f"blk__{layer}__{name}__weight": entry([0] * 8, 99) for layer in (0, 1) for name in ("attn_q", "attn_output")}
        finding = only(examined(**zeros), "zero")
        assert finding.text.startswith("4 entries hold only zeros")
        assert finding.text.endswith("and 1 more")
        assert len(finding.tensors) == 4


class TestExperts:
    """Tokens per expert."""

    def test_unseen_and_scarcely_seen_experts_are_named(self) -> None:
        value = entry([[1] * 16, [0] * 16, [1] * 16, [1] * 16], [300, 0, FEW_TOKENS - 1, FEW_TOKENS])
        coverage = changed(DOWN, value)
        unseen, few = flaws(coverage)
        assert unseen.kind == "experts-without-data"
        assert unseen.text == f"1 experts in 1 tensors saw no token and are quantised with equal weights; most in {DOWN}: 1"
        assert few.kind == "experts-with-few-tokens"
        assert few.text == f"1 experts in 1 tensors saw fewer than {FEW_TOKENS} tokens; most in {DOWN}: 2"
        (told,) = [tensor for tensor in coverage.experts if tensor.tensor == DOWN]
        assert (told.n_experts, told.unseen, told.few) == (4, (1,), (2,))
        assert (told.fewest, told.median) == (0, FEW_TOKENS - 0.5)

    def test_every_mixture_tensor_is_covered_and_no_other(self) -> None:
        assert {tensor.tensor for tensor in examined().experts} == {name for name in SHAPES if "_exps" in name}

    def test_a_legacy_mixture_tells_nothing_about_its_experts(self) -> None:
        flat = {name: replace(value, sums=value.sums.reshape(1, -1), counts=value.counts[:1]) for name, value in full().items()}
        coverage = examine(Matrix(flat, 0, 5, ("a",)), SHAPES)
        assert coverage.experts == ()
        assert flaws(coverage) == []


def test_the_worst_comes_first() -> None:
    coverage = examined(
        blk__0__attn_q__weight=entry([math.nan] * 8, 1), blk__1__attn_q__weight=None, blk__2__attn_q__weight=entry([1], 1)
    )
    assert [finding.severity for finding in coverage.findings] == ["error", "error", "warning", "info"]
