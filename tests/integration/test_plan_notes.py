"""What the plan says about levels whose files would mislead, on real models and llama.cpp's own recipes."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from imatrix_runner.models.gguf_file import read_header
from imatrix_runner.models.model import open_gguf
from imatrix_runner.models.trained_types import holds_few_values
from support.in_process import CommandLine
from support.tiny_models import write_llama_gguf


def notes(cli: CommandLine, model: Path, levels: str, *further: str | Path) -> str:
    done = cli("run", model, "--imatrix", "none", "--levels", levels, "--dry-run", "--json", *further)
    assert done.code == 0, done.err
    return "\n".join(done.document["plan"]["notes"])


def rounded_weights(model: Path, values: int) -> Path:
    """Have every weight of the layers be one of ``values`` numbers, as a ternary model's are."""
    header = read_header(model)
    grid = np.linspace(-0.03, 0.03, values, dtype=np.float32)
    for tensor in header.tensors:
        if tensor.name.startswith("blk.") and len(tensor.shape) > 1:
            chosen = grid[np.random.default_rng(tensor.offset).integers(0, values, tensor.n_elements)]
            with model.open("r+b") as file:
                file.seek(header.data_offset + tensor.offset)
                file.write((chosen.view(np.uint32) >> 16).astype("<u2").tobytes())
    return model


def test_levels_of_a_narrow_model_that_hold_the_same_tensors_are_named(cli: CommandLine, tmp_path: Path) -> None:
    """Rows of 96 divide into no K-quant's blocks: everything falls back."""
    model = write_llama_gguf(tmp_path / "narrow-BF16.gguf", hidden=96, ff=160)
    told = notes(cli, model, "Q3_K_S,Q2_K,Q4_K_M,Q8_0,IQ4_XS,IQ4_NL")
    assert "Q2_K holds the same tensors as" in told or "Q2_K, " in told
    assert "computed once, measured once, shown as one level" in told
    assert "Q8_0" not in told
    made = cli("run", model, "--imatrix", "none", "--levels", "IQ4_XS,IQ4_NL,Q3_K_S,Q2_K", "--json")
    assert made.code == 0, made.err
    assert sum(cost["wanted"] - cost["pairs"] for cost in made.document["passes"][0]["types"]) > 0
    same = [note for note in made.document["plan"]["notes"] if "same tensors" in note]
    assert same
    for note in same:
        others, _, rest = note.partition(" hold")
        first = rest.split("same tensors as ")[1].split(":")[0]
        names = [first, *others.split(", ")]
        files = [tmp_path / "work" / "narrow" / f"narrow-{name}.gguf" for name in names]
        data = {hashlib.sha256(file.read_bytes()[read_header(file).data_offset :]).hexdigest() for file in files}
        assert len(data) == 1, note


def test_levels_of_a_usual_model_are_all_different(tiny_model: Path, cli: CommandLine) -> None:
    assert notes(cli, tiny_model, "Q8_0,Q6_K,Q4_K_M,Q2_K") == ""


def test_larger_than_the_source_and_the_source_again(tiny_model: Path, cli: CommandLine) -> None:
    told = notes(cli, tiny_model, "F32,BF16,Q8_0")
    assert "Larger than the source (2.75 MiB): F32 (5." in told
    assert "BF16: no tensor changes its type, so this is the source again." in told
    assert "Q8_0" not in told


def test_a_quantised_source_is_named(tiny_model: Path, cli: CommandLine, tmp_path: Path) -> None:
    assert cli("run", tiny_model, "--imatrix", "none", "--levels", "Q4_0", "--work-dir", tmp_path / "first").code == 0
    source = tmp_path / "first" / "tiny" / "tiny-Q4_0.gguf"
    told = notes(cli, source, "Q8_0,Q4_0,Q2_K", "--allow-requantize")
    assert "The source is quantised (its weights are Q4_0 and Q6_K): every level keeps its error" in told
    assert "Larger than the source" in told
    assert "Q8_0 (" in told


@pytest.mark.parametrize("level", ["TQ1_0", "TQ2_0", "Q2_0"])
def test_types_for_trained_weights_are_warned_about_on_ordinary_ones(
    level: str, tiny_model: Path, cli: CommandLine, tmp_path: Path
) -> None:
    told = notes(cli, tiny_model, f"Q4_0,{level}")
    assert f"{level}: {level} is for models that were trained with" in told
    assert "Q4_0:" not in told
    trained = rounded_weights(write_llama_gguf(tmp_path / "ternary-BF16.gguf"), 3)
    assert notes(cli, trained, level) == ""


def test_one_bit_is_warned_about_with_a_figure(tiny_model: Path, tiny_imatrix: Path, cli: CommandLine) -> None:
    done = cli("run", tiny_model, "--imatrix", tiny_imatrix, "--levels", "IQ1_S,IQ2_XS", "--dry-run", "--json")
    assert "IQ1_S: IQ1_S stores less than 2 bits per weight. Expect a large loss: the mean KLD was 2.25 elsewhere" in "\n".join(
        done.document["plan"]["notes"]
    )


@pytest.mark.parametrize(
    ("values", "fits"), [(2, {"Q1_0", "TQ2_0", "Q2_0"}), (3, {"TQ2_0", "Q2_0"}), (4, {"Q2_0"}), (5, set())]
)
def test_few_values_are_seen_in_the_weights(values: int, fits: set[str], tmp_path: Path) -> None:
    path = rounded_weights(write_llama_gguf(tmp_path / "few-BF16.gguf"), values)
    model = open_gguf(path, allow_requantize=False)
    assert {name for name in ("Q1_0", "TQ2_0", "Q2_0") if holds_few_values(model, name)} == fits
