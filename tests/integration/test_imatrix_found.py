"""Which imatrix a run uses, what it says about it, and which it refuses."""

from __future__ import annotations

import math
import shutil
import struct
from dataclasses import replace
from pathlib import Path

import pytest

from imatrix_runner.imatrix.formats import read, write_gguf
from imatrix_runner.models.gguf_file import read_header
from support.command_line import RunCommand
from support.llama_tools import BareTools, digest, levels_in
from support.tiny_models import write_llama_gguf

DESCRIBED = "GGUF, 14 entries, 20 chunks of 128 tokens, words.txt"


@pytest.fixture(scope="module")
def legacy(tools: BareTools, tiny_model: Path, tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("legacy") / "imatrix.dat"
    tools.imatrix(tiny_model, tiny_text, out, "-c", "128", "--chunks", "20", "--output-format", "dat")
    return out


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    folder = tmp_path / "work" / "tiny"
    folder.mkdir(parents=True)
    return folder


def test_names_are_looked_for_in_the_documented_order(
    tiny_model: Path, tiny_imatrix: Path, workspace: Path, runner: RunCommand
) -> None:
    names = ["tiny-imatrix.gguf", "tiny.imatrix", "imatrix.gguf", "imatrix.dat"]
    for name in names:  # each beats those before it
        shutil.copy(tiny_imatrix, workspace / name)
        done = runner("run", tiny_model, "--levels", "Q4_0", "--dry-run")
        assert done.code == 0
        lines = [line for line in done.err.splitlines() if line.startswith("Imatrix ")]
        assert lines == [f"Imatrix {workspace / name} (found in the workspace): {DESCRIBED}"]
        assert not (workspace / "journal.json").exists()


@pytest.mark.parametrize("content", ["legacy", "gguf"])
def test_imatrix_dat_may_hold_either_format(
    content: str, legacy: Path, tiny_model: Path, tiny_imatrix: Path, workspace: Path, runner: RunCommand, tools: BareTools
) -> None:
    shutil.copy(legacy if content == "legacy" else tiny_imatrix, workspace / "imatrix.dat")
    done = runner("run", tiny_model, "--levels", "Q4_K_M", "--json")
    assert done.code == 0, done.err
    kind = "legacy .dat, 14 entries, 20 chunks, words.txt" if content == "legacy" else DESCRIBED
    assert f"Imatrix {workspace / 'imatrix.dat'} (found in the workspace): {kind}" in done.err
    assert done.document["imatrix"]["format"] == ("dat" if content == "legacy" else "gguf")
    assert done.document["plan"]["imatrix"]["action"] == "use"
    bare = tools.quantize(tiny_model, workspace / "bare", "Q4_K_M", imatrix=workspace / "imatrix.dat")
    assert levels_in(workspace) == {"Q4_K_M": digest(bare)}


def test_quantize_never_generates(tiny_model: Path, tiny_imatrix: Path, workspace: Path, runner: RunCommand) -> None:
    without = runner("quantize", tiny_model, "--levels", "Q4_0", "--dry-run")
    assert "Imatrix: none, there is none in the workspace" in without.out
    shutil.copy(tiny_imatrix, workspace / "tiny.imatrix")
    assert "(found in the workspace)" in runner("quantize", tiny_model, "--levels", "Q4_0", "--dry-run").err
    assert runner("quantise", tiny_model, "--imatrix", "generate").code == 2


def test_a_found_file_wins_over_f_and_says_so(
    tiny_model: Path, tiny_text: Path, tiny_imatrix: Path, workspace: Path, runner: RunCommand
) -> None:
    shutil.copy(tiny_imatrix, workspace / "imatrix.dat")
    done = runner("run", tiny_model, "-f", tiny_text, "--levels", "Q4_0", "--dry-run")
    assert "-f has no effect: imatrix.dat is used as it is (found in the workspace)" in done.err


def test_generating_leaves_what_was_found_alone(
    tiny_model: Path, tiny_text: Path, tiny_imatrix: Path, workspace: Path, runner: RunCommand
) -> None:
    """--imatrix generate beside an imatrix.dat of the user's makes imatrix.gguf and uses it, now and later."""
    shutil.copy(tiny_imatrix, workspace / "imatrix.dat")
    arguments = ("run", tiny_model, "-f", tiny_text, "-c", "128", "--chunks", "4", "--imatrix", "generate", "--levels", "Q4_0")
    first = runner(*arguments, "--json")
    assert first.code == 0, first.err
    assert first.document["imatrix"]["path"] == str(workspace / "imatrix.gguf")
    assert digest(workspace / "imatrix.dat") == digest(tiny_imatrix)
    second = runner(*arguments, "--json").document
    assert second["plan"]["imatrix"]["action"] == "up-to-date"
    assert second["levels"][0]["status"] == "skipped"


def _nan(good: Path, bad: Path) -> None:
    header = read_header(good)
    sums = next(tensor for tensor in header.tensors if tensor.name.endswith(".in_sum2"))
    data = bytearray(good.read_bytes())
    struct.pack_into("<f", data, header.data_offset + sums.offset + 12, math.nan)
    bad.write_bytes(data)


def _other_names(good: Path, bad: Path) -> None:
    matrix = read(good).matrix
    write_gguf(replace(matrix, entries={f"strange.{name}": entry for name, entry in matrix.entries.items()}), bad)


def _zeros(good: Path, bad: Path) -> None:
    bad.write_bytes(bytes(good.stat().st_size))


def _empty(_good: Path, bad: Path) -> None:
    bad.write_bytes(b"")


def _cut(good: Path, bad: Path) -> None:
    bad.write_bytes(good.read_bytes()[:-500])


def _prose(_good: Path, bad: Path) -> None:
    bad.write_text("This is a letter, not a matrix.\n" * 40)


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (_nan, "holds NaN or infinite values"),
        (_other_names, "none of its entries names a tensor of this model"),
        (_zeros, "the file is empty or filled with zeros"),
        (_empty, "the file is empty or filled with zeros"),
        (_cut, "a complete one has 18720 bytes"),
        (_prose, "neither a GGUF nor a"),
    ],
)
@pytest.mark.parametrize("named", [True, False])
def test_what_cannot_be_used_is_refused(
    spoil: object, why: str, named: bool, tiny_model: Path, tiny_imatrix: Path, workspace: Path, runner: RunCommand
) -> None:
    assert callable(spoil)
    bad = workspace / "imatrix.dat"
    spoil(tiny_imatrix, bad)
    before = digest(bad)
    done = runner("run", tiny_model, "--levels", "Q4_0", *(["--imatrix", bad] if named else []))
    assert done.code == 6
    assert str(bad) in done.err
    assert why in done.err
    assert not list(workspace.glob("*.gguf"))
    assert digest(bad) == before


def test_the_imatrix_of_another_model_is_refused(
    tiny_model: Path, tiny_imatrix: Path, tmp_path: Path, runner: RunCommand
) -> None:
    wider = write_llama_gguf(tmp_path / "wider-BF16.gguf", hidden=512)
    done = runner("run", wider, "--imatrix", tiny_imatrix, "--levels", "Q4_0")
    assert done.code == 6
    assert "does not belong to wider" in done.err
    assert "256 values where the model needs 512" in done.err


def test_model_weights_given_as_imatrix_are_recognised(tiny_model: Path, runner: RunCommand) -> None:
    done = runner("run", tiny_model, "--imatrix", tiny_model, "--levels", "Q4_0")
    assert done.code == 6
    assert "it is a GGUF of model weights (llama)" in done.err
