"""What an imatrix brings a level, and which levels are recommended: rules over figures that others measured."""

from __future__ import annotations

import pytest

from imatrix_runner.advise.memory import Budget, MemoryFit, Place
from imatrix_runner.advise.recommend import POOR, LevelCandidate, recommend
from imatrix_runner.quantize.imatrix_benefit import KLDS, PPL_ERRORS, benefit, closeness, computing_types

GIB = 1 << 30


class TestTheNeedOfAnImatrix:
    @pytest.mark.parametrize(
        ("level", "types", "needs", "need"),
        [
            ("IQ2_XXS", {"IQ2_XXS": 9, "Q2_K": 1}, True, "required"),
            ("Q4_K_M", {"Q4_K": 8, "Q6_K": 2}, False, "strongly useful"),
            ("Q4_K_L", {"Q4_K": 8, "Q6_K": 2}, False, "strongly useful"),
            ("IQ4_NL", {"IQ4_NL": 1}, False, "strongly useful"),
            ("Q5_K_M", {"Q5_K": 8, "Q6_K": 2}, False, "marginal"),
            ("Q6_K", {"Q6_K": 1}, False, "marginal"),
            ("Q8_0", {"Q8_0": 1}, False, "none"),
            ("TQ2_0", {"TQ2_0": 1}, False, "none"),
            ("MXFP4_MOE", {"MXFP4": 9, "Q8_0": 1}, False, "none"),
            ("NEW", {"NEW_TYPE": 1}, False, "unknown"),
            # What half the layers' weights gain is gained, whatever the other half has.
            ("Q4_K_M", {"Q8_0": 60, "Q4_K": 40}, False, "strongly useful"),
            ("Q4_K_M", {"Q5_0": 70, "Q8_0": 20, "Q4_K": 10}, False, "strongly useful"),
            ("Q8_0", {"Q8_0": 98, "Q6_K": 2}, False, "none"),
            ("Q4_K_M", {}, False, "none"),
        ],
    )
    def test_by_what_llama_cpp_demands_and_by_the_bits_of_what_computes(
        self, level: str, types: dict[str, int], needs: bool, need: str
    ) -> None:
        found = benefit(level, needs_imatrix=needs, types=types)
        assert found.need == need
        assert found.reason

    def test_embeddings_and_the_output_do_not_decide(self) -> None:
        """Gemma-3-270M: 168 M of its 268 M weights are embeddings, and Q4_K_M leaves them at 8 bits."""
        tensors = [
            ("token_embd.weight", (640, 262_144), "Q8_0"),
            ("output.weight", (640, 262_144), "Q8_0"),
            ("per_layer_token_embd.weight", (4096, 262_144), "Q8_0"),
            ("blk.0.attn_norm.weight", (640,), "F32"),
            ("blk.0.ffn_up.weight", (640, 2048), "Q5_0"),
            ("blk.0.ffn_down.weight", (2048, 640), "Q4_K"),
            ("blk.0.attn_q.weight", (640, 1024), "Q4_K"),
        ]
        types = computing_types(tensors)
        assert types == {"Q5_0": 640 * 2048, "Q4_K": 640 * 2048 + 640 * 1024}
        assert benefit("Q4_K_M", needs_imatrix=False, types=types).need == "strongly useful"

    def test_figures_are_told_of_the_level_they_were_measured_for(self) -> None:
        found = benefit("Q4_K_M", needs_imatrix=False, types={"Q4_K": 1})
        assert (found.ppl_error, found.kld) == ((1.08, 0.75), (0.0313, 0.0282))
        variant = benefit("Q4_K_L", needs_imatrix=False, types={"Q4_K": 1})
        assert (variant.ppl_error, variant.kld) == (None, None)

    def test_an_imatrix_helped_wherever_both_were_measured(self) -> None:
        for without, with_imatrix in PPL_ERRORS.values():
            assert 0 < with_imatrix < without
        both = [pair for pair in KLDS.values() if None not in pair]
        assert len(both) == 6
        assert all(with_imatrix < without for without, with_imatrix in both if without and with_imatrix)

    def test_the_reasons_hold_what_the_table_says(self) -> None:
        """18 to 40 % of an error of 1.08 to 18.72 %; from 5 bits on 0.18 to 0.59 %."""
        low = [pair for level, pair in PPL_ERRORS.items() if level[1] in "234"]
        taken = [1 - with_imatrix / without for without, with_imatrix in low]
        assert 0.17 < min(taken) < max(taken) < 0.41
        assert {round(min(pair[0] for pair in low)), round(max(pair[0] for pair in low))} == {1, 19}
        parts = [1 - with_imatrix / without for level, (without, with_imatrix) in PPL_ERRORS.items() if level[1] in "56"]
        assert 1 / 6.1 < min(parts) < max(parts) < 0.5
        high = [pair[0] for level, pair in PPL_ERRORS.items() if level[1] in "56"]
        assert 0.15 < min(high) < max(high) < 0.6

    def test_closeness_is_that_of_the_level_as_it_would_be_made(self) -> None:
        assert (closeness("Q4_K_M"), closeness("Q8_0"), closeness("IQ1_S"), closeness("Q4_K_L")) == (
            0.0282,
            0.0014,
            2.2546,
            None,
        )


def candidate(level: str, n_bytes: int, place: Place = "RAM", n_gpu_layers: int = 0) -> LevelCandidate:
    return LevelCandidate(level, n_bytes, MemoryFit(place, n_bytes + GIB, n_gpu_layers, 33, f"{level} in {place}"))


class TestRecommendations:
    def test_the_closest_that_fits_each_place(self) -> None:
        levels = [
            candidate("Q8_0", 8 * GIB, "RAM"),
            candidate("Q6_K", 6 * GIB, "GPU and RAM", 20),
            candidate("Q4_1", 5 * GIB, "GPU"),
            candidate("Q4_K_M", 4 * GIB, "GPU"),
        ]
        found = {each.place: each for each in recommend(levels, Budget(16 * GIB, (6 * GIB,)))}
        assert found["GPU"].level == "Q4_K_M"  # not the larger Q4_1: measured elsewhere, it is farther from its source
        assert found["RAM"].level == "Q8_0"
        assert "GPU and RAM" not in found
        assert "of the 2 that fit wholly on the GPU" in found["GPU"].reason
        assert "PR 6936" in found["GPU"].reason

    def test_in_part_where_that_is_closer_than_what_fits_either(self) -> None:
        levels = [candidate("Q4_K_M", 18 * GIB, "GPU and RAM", 19), candidate("IQ2_M", 9 * GIB, "RAM")]
        found = {each.place: each for each in recommend(levels, Budget(12 * GIB, (8 * GIB,)))}
        assert (found["GPU and RAM"].level, found["RAM"].level) == ("Q4_K_M", "IQ2_M")

    def test_a_level_in_memory_that_a_gpu_helps_says_how(self) -> None:
        (found,) = recommend([candidate("Q8_0", 8 * GIB, "GPU and RAM", 20)], Budget(16 * GIB, (6 * GIB,)))
        assert (found.place, found.level) == ("RAM", "Q8_0")
        assert "-ngl 20 puts as many of its 33 layers on the GPU" in found.reason

    def test_a_poor_one_is_called_so(self) -> None:
        (found,) = recommend([candidate("IQ1_M", GIB, "GPU")], Budget(0, (4 * GIB,)))
        assert found.poor
        assert "Still poor" in found.reason
        assert {level for level in KLDS if (closeness(level) or 0) > POOR} == {"IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S"}

    def test_a_smaller_one_at_the_bend(self) -> None:
        sizes = {
            "Q8_0": 8.0,
            "Q6_K": 6.1,
            "Q5_K_M": 5.3,
            "Q4_K_M": 4.6,
            "IQ4_XS": 4.1,
            "Q3_K_M": 3.7,
            "IQ2_M": 2.7,
            "IQ1_S": 1.9,
        }
        found = recommend([candidate(level, int(size * GIB)) for level, size in sizes.items()], Budget(16 * GIB))
        assert [(each.place, each.level) for each in found] == [("RAM", "Q8_0"), ("smaller", "IQ4_XS")]

    def test_among_levels_nobody_measured_the_largest(self) -> None:
        found = recommend([candidate("Q4_K_L", 5 * GIB), candidate("Q6_K_L", 7 * GIB)], Budget(16 * GIB))
        assert [(each.place, each.level) for each in found] == [("RAM", "Q6_K_L")]
        assert found[0].reason.startswith("the largest of the 2 that fit")

    def test_nothing_where_nothing_fits(self) -> None:
        assert recommend([candidate("Q8_0", 8 * GIB, "nowhere")], Budget(GIB)) == ()
        assert recommend([], Budget(GIB)) == ()
