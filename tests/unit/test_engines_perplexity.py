"""What llama-perplexity is told, and what is read of what it says: cut anywhere, and with lines missing."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imatrix_runner.engines.binaries.perplexity import DivergenceOutput
from imatrix_runner.engines.files.logits import LogitsHead, first_invalid_chunk, row_words
from imatrix_runner.engines.jobs import ChunkRange, CollectOptions
from imatrix_runner.engines.llama_cpp.flags import measure_command, reference_command
from imatrix_runner.engines.measures import DP_FRACTIONS, KLD_FRACTIONS, Estimate, MeasureJob, ReferenceJob
from imatrix_runner.errors import UsageError
from support.values import fake_toolchain

# Of llama.cpp 0c1e57098, the demo model's Q4_K_M over 8 chunks of the held-out text; three rows of eight.
SAID = """0.00 minutes

chunk             PPL               ln(PPL(Q)/PPL(base))          KL Divergence              Δp RMS            Same top p
   1     137.9956 ±   26.0208       0.00101 ±    0.00894       0.00867 ±    0.00054     1.607 ±  0.261 %    90.588 ±  1.832 %
   2     130.5439 ±   17.3677       0.00090 ±    0.00692       0.00865 ±    0.00038     1.644 ±  0.215 %    91.765 ±  1.218 %
   8     120.0063 ±    7.8938       0.00256 ±    0.00385       0.00889 ±    0.00023     1.621 ±  0.107 %    91.961 ±  0.602 %

====== Perplexity statistics ======
Mean PPL(Q)                   : 120.006292 ±   7.893786
Mean PPL(base)                : 119.699408 ±   7.872561
Cor(ln(PPL(Q)), ln(PPL(base))):  99.83%
Mean ln(PPL(Q)/PPL(base))     :   0.002561 ±   0.003849
Mean PPL(Q)/PPL(base)         :   1.002564 ±   0.003859
Mean PPL(Q)-PPL(base)         :   0.306884 ±   0.461776

====== KL divergence statistics ======
Mean    KLD:   0.008893 ±   0.000228
Maximum KLD:   0.269944
99.9%   KLD:   0.081274
99.0%   KLD:   0.045048
95.0%   KLD:   0.023773
90.0%   KLD:   0.017560
Median  KLD:   0.006550
10.0%   KLD:   0.001965
 5.0%   KLD:   0.001167
 1.0%   KLD:   0.000149
 0.1%   KLD:   0.000034
Minimum KLD:   0.000005

====== Token probability statistics ======
Mean    Δp: -0.097 ± 0.036 %
Maximum Δp:  8.760%
99.9%   Δp:  8.027%
99.0%   Δp:  4.677%
95.0%   Δp:  1.625%
90.0%   Δp:  0.670%
75.0%   Δp:  0.052%
Median  Δp:  0.000%
25.0%   Δp: -0.075%
10.0%   Δp: -0.835%
 5.0%   Δp: -2.188%
 1.0%   Δp: -6.379%
 0.1%   Δp: -13.386%
Minimum Δp: -21.354%
RMS Δp    :  1.621 ± 0.107 %
Same top p: 91.961 ± 0.602 %
"""
FIGURES = [line for line in SAID.splitlines() if ": " in line and " minutes" not in line]

OPTIONS = CollectOptions()
TOOLS = fake_toolchain(
    options={"llama-perplexity": frozenset(("-fit", "-c", "-ts", "-sm", "-mg", "-ot", "-fa", "--load-mode"))}
)
BASE = Path("/w/reference.logits")
REFER = ReferenceJob("refer", Path("/m.gguf"), Path("/t.txt"), ChunkRange(0, 30), BASE, OPTIONS, "of", None)
JUDGE = MeasureJob("judge", Path("/q.gguf"), BASE, Path("/w/q.scored"), OPTIONS, "of", None)


def heard(text: str) -> DivergenceOutput:
    output = DivergenceOutput()
    output.feed("stdout", text)
    return output


def test_the_reference_is_written_of_so_many_chunks() -> None:
    assert list(reference_command(REFER, Path("/w/part"), TOOLS).argv) == [
        *("/tools/llama-perplexity", "-m", "/m.gguf", "-f", "/t.txt", "--kl-divergence-base", "/w/part", "--chunks", "30"),
        *("-c", "512", "-b", "2048", "-ub", "512", "-fit", "off"),
    ]


def test_a_level_is_compared_with_the_whole_file_and_told_everything_that_changes_what_is_computed() -> None:
    options = CollectOptions(
        n_ctx=256,
        n_batch=1024,
        n_ubatch=128,
        threads=3,
        n_gpu_layers="99",
        tensor_split="3,1",
        split_mode="row",
        main_gpu=1,
        override_tensors=("exps=CPU",),
        flash_attn="on",
        mmap=False,
        extra=("--numa", "numactl"),
    )
    assert list(measure_command(replace(JUDGE, options=options), BASE, TOOLS).argv) == [
        *("/tools/llama-perplexity", "-m", "/q.gguf", "--kl-divergence", "--kl-divergence-base", str(BASE)),
        *("-c", "256", "-b", "1024", "-ub", "128", "-t", "3", "-ngl", "99", "-fit", "off", "-ts", "3,1", "-sm", "row"),
        *("-mg", "1", "-ot", "exps=CPU", "-fa", "on", "--load-mode", "none", "--numa", "numactl"),
    ]


def test_an_option_that_this_llama_perplexity_lacks_is_refused() -> None:
    older = fake_toolchain(options={"llama-perplexity": frozenset(), "llama-imatrix": frozenset(("-fa",))})
    with pytest.raises(UsageError, match="llama-perplexity has no -fa"):
        measure_command(replace(JUDGE, options=replace(OPTIONS, flash_attn="on")), BASE, older)


def test_what_llama_perplexity_cannot_do_is_refused() -> None:
    with pytest.raises(UsageError, match="from its beginning"):
        reference_command(replace(REFER, chunks=ChunkRange(4, 8)), BASE, TOOLS)
    with pytest.raises(UsageError, match="from its beginning"):
        measure_command(replace(JUDGE, first=4), BASE, TOOLS)
    with pytest.raises(UsageError, match="plain text"):
        reference_command(replace(REFER, options=replace(OPTIONS, parse_special=True)), BASE, TOOLS)


LATER = ("95.0%", "90.0%", " 0.1%")
"""Percentiles of the KL divergence that releases before 2025 do not print."""


def test_a_summary_of_2024_has_fewer_percentiles() -> None:
    lines = [line for line in SAID.split("\n") if not line.startswith(tuple(f"{name}   KLD" for name in LATER))]
    assert len(lines) == len(SAID.split("\n")) - len(LATER)
    found = heard("\n".join(lines)).divergence(2040)
    assert found is not None
    assert list(found.kld_at) == [1.0, 0.999, 0.99, 0.5, 0.1, 0.05, 0.01, 0.0]
    cut = [line for line in lines if not line.startswith("Same top p")]
    assert heard("\n".join(cut)).divergence(2040) is None


def test_every_figure_of_the_summary_is_read() -> None:
    output = heard(SAID)
    assert (output.done, output.ppl, output.kld, output.wrong) == (8, 120.0063, 0.00889, "")
    found = output.divergence(2040)
    assert found is not None
    assert found.n_tokens == 2040
    assert found.ppl == Estimate(120.006292, 7.893786)
    assert found.ppl_base == Estimate(119.699408, 7.872561)
    assert found.correlation == pytest.approx(0.9983)
    assert found.log_ratio == Estimate(0.002561, 0.003849)
    assert found.ratio == Estimate(1.002564, 0.003859)
    assert found.difference == Estimate(0.306884, 0.461776)
    assert found.kld == Estimate(0.008893, 0.000228)
    values = (0.269944, 0.081274, 0.045048, 0.023773, 0.01756, 0.00655, 0.001965, 0.001167, 0.000149, 0.000034, 0.000005)
    assert found.kld_at == dict(zip(KLD_FRACTIONS, values, strict=True))
    percents = (8.76, 8.027, 4.677, 1.625, 0.67, 0.052, 0.0, -0.075, -0.835, -2.188, -6.379, -13.386, -21.354)
    assert found.dp_at == pytest.approx({at: p / 100 for at, p in zip(DP_FRACTIONS, percents, strict=True)})
    assert (found.dp.value, found.dp.error) == pytest.approx((-0.00097, 0.00036))
    assert (found.dp_rms.value, found.dp_rms.error) == pytest.approx((0.01621, 0.00107))
    assert (found.same_top.value, found.same_top.error) == pytest.approx((0.91961, 0.00602))


@given(st.lists(st.integers(0, len(SAID)), max_size=40))
def test_pieces_tell_the_same_as_the_whole(places: list[int]) -> None:
    output = DivergenceOutput()
    ends = [*sorted(places), len(SAID)]
    done = [output.done for begin, end in zip([0, *ends], ends, strict=False) if output.feed("stdout", SAID[begin:end])]
    assert output.divergence(2040) == heard(SAID).divergence(2040)
    assert done == sorted(set(done))
    assert done[-1] == 8


@pytest.mark.parametrize("line", FIGURES, ids=lambda line: line.partition(":")[0].strip())
def test_a_summary_without_one_line_is_none(line: str) -> None:
    assert heard(SAID.replace(line + "\n", "")).divergence(2040) is None


@given(st.integers(0, len(SAID) - 1))
def test_a_summary_that_ends_early_is_none(end: int) -> None:
    assert heard(SAID[:end]).divergence(2040) is None


def test_errors_of_a_level_that_does_not_differ_from_its_source_are_nothing() -> None:
    """Square roots of what rounding made negative, and 0 / 0."""
    text = SAID.replace(
        "Mean ln(PPL(Q)/PPL(base))     :   0.002561 ±   0.003849", "Mean ln(PPL(Q)/PPL(base))     :   0.0 ±  -nan"
    )
    text = text.replace("RMS Δp    :  1.621 ± 0.107 %", "RMS Δp    :  0.000 ±   nan %").replace(":  99.83%", ":   -nan%")
    found = heard(text).divergence(2040)
    assert found is not None
    assert (found.log_ratio, found.dp_rms, found.correlation) == (Estimate(0.0, 0.0), Estimate(0.0, 0.0), 1.0)


@pytest.mark.parametrize(("ppl", "kld"), [("nan", "0.1"), ("-nan", "nan"), ("12.0", "inf"), ("inf", "0.1")])
def test_a_level_without_numbers_is_told_by_its_first_row(ppl: str, kld: str) -> None:
    output = DivergenceOutput()
    row = "   {}     {} ±   nan       nan ±    nan       {} ±    nan     nan ±  nan %    0.000 ±  0.000 %\n"
    assert output.feed("stdout", row.format(1, "12.0", "0.1") + row.format(2, ppl, kld) + row.format(3, ppl, kld))
    assert (output.done, output.non_finite_at) == (3, 2)
    assert heard(SAID).non_finite_at == 0


def test_the_first_tensor_without_numbers_is_kept_if_its_line_is_not_lost() -> None:
    output = DivergenceOutput()
    assert not output.invalid
    output.feed("stderr", "ggml_validate_row_data: found nan value at block 0\n")
    assert (output.invalid, output.bad_tensor) == (True, "")
    for name in ("blk.0.attn_norm.weight", "blk.1.ffn_norm.weight"):
        output.feed("stderr", f"0.00.2 E load_all_data: tensor '{name}' has invalid data\n")
    assert (output.invalid, output.bad_tensor) == (True, "blk.0.attn_norm.weight")


@pytest.mark.parametrize(
    "said",
    [
        "kl_divergence: failed reading log-probs for chunk 3",
        "kl_divergence : failed to decode",
        "kl_divergence: inconsistent vocabulary (512 vs 600)",
        "kl_divergence: /w/x does not look like a file containing log-probabilities",
        "kl_divergence: /w/x has been computed with 1024, while the current context is 512. Increase it with -c and retry",
    ],
)
def test_what_the_tool_says_went_wrong_is_kept(said: str) -> None:
    output = DivergenceOutput()
    output.feed("stderr", f"0.00.2 I kl_divergence: computing over 8 chunks, n_ctx=512\n0.00.3 E {said}\n")
    assert output.wrong == said.partition(":")[2].strip()


def test_the_first_chunk_without_numbers_is_found(tmp_path: Path) -> None:
    import numpy as np

    head = LogitsHead(8, 5, 3)
    path = tmp_path / "base"
    rows = np.zeros((3, head.rows, row_words(5)), "<u2")

    def write() -> None:
        path.write_bytes(head.pack() + bytes(4 * 3 * 8) + rows.tobytes())

    write()
    assert first_invalid_chunk(path, head) is None
    leading = rows[:, :, :4].copy()
    leading.view("<f4")[0, 0] = (24 / 65535, -24.5)  # a fork keeps tokens that are that much rarer
    rows[:, :, :4] = leading
    write()
    assert first_invalid_chunk(path, head) is None
    leading.view("<f4")[1, 2, 1] = math.nan
    leading.view("<f4")[2, 0, 0] = math.inf
    rows[:, :, :4] = leading
    write()
    assert first_invalid_chunk(path, head) == 1
