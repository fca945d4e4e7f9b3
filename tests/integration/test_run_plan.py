"""What is told before anything runs, and what a changed input leads to."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from imatrix_runner.models.gguf_file import read_header
from support.command_line import Ran, RunCommand
from support.in_process import CommandLine
from support.llama_tools import BareTools, digest, times
from support.oracles import quantized
from support.tiny_architectures import write_architecture
from support.tiny_models import sample_text, write_llama_gguf

SHORT = ("-c", "128", "--chunks", "4")


def by_level(content: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {entry["level"]: entry for entry in content}


def test_a_dry_run_writes_nothing_and_is_right_to_the_byte(
    tiny_model: Path, tiny_imatrix: Path, runner: RunCommand, tmp_path: Path
) -> None:
    levels = "Q8_0,Q6_K_L,Q4_K_M,Q4_0,IQ3_XXS,F16"
    arguments = ("run", tiny_model, "--imatrix", tiny_imatrix, "--levels", levels)
    dry = runner(*arguments, "--dry-run", "--json")
    assert dry.code == 0, dry.err
    assert list(tmp_path.iterdir()) == []
    assert dry.document["levels"] == []
    planned = by_level(dry.document["plan"]["levels"])
    shown = runner(*arguments, "--dry-run")
    assert f"{len(planned)} of {len(planned)} levels to make" in shown.out
    real = runner(*arguments, "--json").document
    for name, level in by_level(real["levels"]).items():
        assert level["bytes"] == planned[name]["bytes"] == sum(Path(file).stat().st_size for file in level["files"])
        assert level["bits_per_weight"] == planned[name]["bits_per_weight"]
    assert real["plan"]["new_bytes"] == dry.document["plan"]["new_bytes"] == sum(entry["bytes"] for entry in planned.values())


def test_a_dry_run_before_the_imatrix_is_made_is_right_to_the_byte(
    tiny_model: Path, tiny_text: Path, runner: RunCommand, tmp_path: Path
) -> None:
    arguments = ("run", tiny_model, "-f", tiny_text, *SHORT, "--levels", "Q4_K_M,IQ2_XS")
    dry = runner(*arguments, "--dry-run", "--json").document
    assert list(tmp_path.iterdir()) == []
    assert dry["plan"]["imatrix"]["action"] == "generate"
    assert dry["plan"]["imatrix"]["chunks"] == 4
    assert [level["state"] for level in dry["plan"]["levels"]] == ["todo", "todo"]
    real = by_level(runner(*arguments, "--json").document["levels"])
    for name, level in by_level(dry["plan"]["levels"]).items():
        assert real[name]["bytes"] == level["bytes"]
        assert real[name]["bits_per_weight"] == level["bits_per_weight"]


def test_fallbacks_are_told_in_plan_table_and_document(runner: RunCommand, tools: BareTools, tmp_path: Path) -> None:
    """Rows of 544 do not divide into blocks of 256: ffn_down falls back in both layers (without an imatrix, Q4_K_M has
    Q4_K there in a model of two layers)."""
    model = write_llama_gguf(tmp_path / "odd-BF16.gguf", odd=True)
    arguments = ("run", model, "--imatrix", "none", "--levels", "Q4_K_M,Q8_0")
    dry = runner(*arguments, "--dry-run")
    assert "Q4_K_M: 2 tensors" in dry.out
    assert "because their rows do not divide into blocks; blk.0.ffn_down.weight: q4_K -> q5_0" in dry.out
    real = runner(*arguments, "--json")
    planned = by_level(real.document["plan"]["levels"])
    assert [fallback["tensor"] for fallback in planned["Q4_K_M"]["fallbacks"]] == [
        f"blk.{layer}.ffn_down.weight" for layer in (0, 1)
    ]
    share = 2 * 544 * 256 / sum(tensor.n_elements for tensor in read_header(model).tensors)
    assert planned["Q4_K_M"]["fallback_share"] == pytest.approx(share)
    assert planned["Q8_0"]["fallbacks"] == []
    again = runner(*arguments)
    (row,) = [line for line in again.out.splitlines() if line.startswith("Q4_K_M")]
    assert f"2 ({share:.0%})" in row
    bare = tools.quantize(model, tmp_path / "bare.gguf", "Q4_K_M")
    assert digest(tmp_path / "work" / "odd" / "odd-Q4_K_M.gguf") == digest(bare)


def test_a_level_that_must_fail_is_told_before_anything_runs(
    tiny_model: Path, runner: RunCommand, tools: BareTools, tmp_path: Path
) -> None:
    arguments = ("run", tiny_model, "--imatrix", "none", "--levels", "Q4_K_M,IQ2_XXS")
    assert runner(*arguments, "--dry-run").code == 100
    done = runner(*arguments)
    assert done.code == 100
    will_fail = "IQ2_XXS will fail: it needs an importance matrix and there is none"
    assert done.err.index(will_fail) < done.err.index("Q4_K_M ...")
    assert "IQ2_XXS ..." not in done.err
    assert "IQ2_XXS: IQ2_XXS was not made; it needs an importance matrix" in done.out
    assert "1 made, 1 failed" in done.out
    (file,) = (tmp_path / "work" / "tiny").glob("*.gguf")
    assert [digest(file)] == quantized(tools, tiny_model, "Q4_K_M").digests
    document = runner(*arguments, "--json").document
    assert document["exit_code"] == 100
    failed = by_level(document["levels"])["IQ2_XXS"]
    assert (failed["status"], failed["files"], failed["error"]["kind"]) == ("failed", [], "invalid-data")
    quiet = runner(*arguments, "-q")
    assert (quiet.code, quiet.out) == (100, "")
    assert quiet.err.startswith("IQ2_XXS: IQ2_XXS was not made")


@pytest.mark.parametrize(
    ("architecture", "options", "why", "todo"),
    [
        ("glm4moe", (), "belongs to an MTP / NextN block", "--uncovered q4_k"),
        ("llama", ("--exclude-weights", "attn_q"), "--include-weights or --exclude-weights leave it out", "--uncovered q4_k"),
        ("llama", ("--include-weights", "ffn_up"), "--include-weights or --exclude-weights leave it out", "--uncovered q4_k"),
        ("llama", ("--exclude-weights", ""), "--include-weights or --exclude-weights leave it out", "--uncovered q4_k"),
        ("llama", ("--output-tensor-type", "iq2_xs"), "collected with --process-output only", "--process-output"),
    ],
)
def test_data_that_collecting_will_not_give_is_missed_in_the_plan(
    architecture: str, options: tuple[str, ...], why: str, todo: str, cli: CommandLine, tiny_text: Path, tmp_path: Path
) -> None:
    """Before anything is collected, with the option that mends it; and with that option the level can be made."""
    model = write_architecture(architecture, tmp_path / "model.gguf", dtype="BF16")
    arguments = ("run", model, "-f", tiny_text, *SHORT, "--levels", "IQ2_XXS", *options)
    refused = cli(*arguments)
    assert refused.code == 6
    assert why in refused.err
    (do,) = [line for line in refused.err.splitlines() if line.startswith("  Do:")]
    assert todo in do
    assert not (tmp_path / "work" / "model" / "imatrix.gguf").exists()
    planned = by_level(cli(*arguments, *todo.split(), "--dry-run", "--json").document["plan"]["levels"])["IQ2_XXS"]
    assert planned["state"] == "todo"
    if architecture == "glm4moe":
        assert cli(*arguments, *todo.split()).code == 0
        assert (tmp_path / "work" / "model" / "model-IQ2_XXS.gguf").stat().st_size == planned["bytes"]


def test_when_every_level_must_fail_nothing_begins(tiny_model: Path, runner: RunCommand, tmp_path: Path) -> None:
    done = runner("run", tiny_model, "--imatrix", "none", "--levels", "IQ2_XXS,IQ1_S", "--json")
    assert done.code == 6
    assert "None of the 2 levels can be made" in done.err
    assert done.document["schema"] == "imatrix-runner/error"
    assert done.document["error"].keys() == {"kind", "what", "why", "do"}
    assert not list((tmp_path / "work" / "tiny").glob("*.gguf"))


def test_an_impossible_shape_is_told_before_anything_runs(runner: RunCommand, tmp_path: Path) -> None:
    """--token-embedding-type skips llama.cpp's shape fallback; its dry run does not notice, the real one dies."""
    model = write_llama_gguf(tmp_path / "narrow-BF16.gguf", hidden=192)
    done = runner("run", model, "--imatrix", "none", "--levels", "Q8_0", "--token-embedding-type", "q4_k")
    assert done.code == 6
    assert "token_embd.weight has rows of 192, which Q4_K (blocks of 256) cannot hold" in done.err


def test_a_bad_pattern_is_told_before_anything_runs(tiny_model: Path, runner: RunCommand) -> None:
    done = runner("run", tiny_model, "--imatrix", "none", "--levels", "Q4_0", "--tensor-type", "ffn_(=q8_0")
    assert done.code == 2
    assert "a pattern of --tensor-type is not a valid regular expression" in done.err
    assert "Correct the pattern" in done.err


def test_partial_weights_are_told(tiny_model: Path, tiny_imatrix: Path, runner: RunCommand) -> None:
    arguments = ("run", tiny_model, "--imatrix", tiny_imatrix, "--exclude-weights", "ffn_down", "--levels")
    done = runner(*arguments, "Q4_K_M", "--json")
    assert done.code == 0, done.err
    without = [f"blk.{layer}.ffn_down.weight" for layer in (0, 1)]
    assert by_level(done.document["plan"]["levels"])["Q4_K_M"]["without_weights"] == without
    assert by_level(done.document["levels"])["Q4_K_M"]["without_weights"] == without
    assert re.search("Q4_K_M: 2 tensors .*without weights.* first .*blk.0.ffn_down.weight", done.err)
    impossible = runner(*arguments, "IQ2_XS")
    assert impossible.code == 6
    assert "blk.0.ffn_down.weight becomes IQ2_" in impossible.err


class Workplace:
    """One model and one text, quantised again and again with one thing changed."""

    def __init__(self, folder: Path, model: Path, runner: RunCommand) -> None:
        self.model = Path(shutil.copy(model, folder / model.name))
        self.text = folder / "mine.txt"
        self.text.write_text(sample_text(6000), encoding="utf-8")
        self.workspace = folder / "work" / "tiny"
        self._runner = runner

    def run(self, *more: str, levels: str = "Q4_0,Q5_K_M") -> Ran:
        done = self._runner("run", self.model, "-f", self.text, *SHORT, "--levels", levels, *more)
        assert done.code == 0, done.err
        return done

    def times(self) -> dict[str, int]:
        return times(sorted(self.workspace.glob("*.gguf")))


@pytest.fixture
def workplace(tmp_path: Path, tiny_model: Path, runner: RunCommand) -> Workplace:
    place = Workplace(tmp_path, tiny_model, runner)
    place.run()
    return place


def test_what_does_not_matter_redoes_nothing(workplace: Workplace) -> None:
    before = workplace.times()
    done = workplace.run("--no-ppl", "-t", "1", "--jobs", "1", "--max-buffer-size", "64", "-v", "--timeout", "30")
    assert "2 were up to date" in done.out
    assert workplace.times() == before


def test_a_changed_option_redoes_the_levels_only(workplace: Workplace) -> None:
    before = workplace.times()
    done = workplace.run("--pure")
    assert "Q5_K_M made again, changed: options: Q5_K_M -> Q5_K_M --pure" in done.err
    assert "2 made" in done.out
    after = workplace.times()
    assert {name for name in before if before[name] == after[name]} == {"imatrix.gguf"}


def test_a_changed_text_redoes_the_imatrix_and_the_levels(workplace: Workplace) -> None:
    before = workplace.times()
    workplace.text.write_text(sample_text(6000, seed=1), encoding="utf-8")
    done = workplace.run()
    assert "imatrix.gguf, 4 chunks (changed: calibration text: sha256:" in done.err
    assert "Q4_0, Q5_K_M made again, changed: imatrix: imatrix.gguf sha256:" in done.err
    assert not set(before.items()) & set(workplace.times().items())


def test_a_changed_source_redoes_everything(workplace: Workplace) -> None:
    before = workplace.times()
    write_llama_gguf(workplace.model, seed=1)
    done = workplace.run()
    assert "changed: model file: sha256:" in done.err
    assert "Q4_0, Q5_K_M made again, changed: model file: sha256:" in done.err
    assert not set(before.items()) & set(workplace.times().items())


def test_a_source_that_was_only_touched_redoes_nothing(workplace: Workplace) -> None:
    before = workplace.times()
    workplace.model.touch()
    assert "2 were up to date" in workplace.run().out
    assert workplace.times() == before


def test_a_changed_context_is_named(workplace: Workplace) -> None:
    done = workplace.run("-c", "64")
    assert "changed: context: 128 -> 64" in done.err


def test_a_users_own_file_is_never_overwritten(workplace: Workplace, tools: BareTools) -> None:
    """A foreign GGUF, a foreign something, and a level of ours that was edited: each stays as it is, the rest goes on."""
    foreign = tools.quantize(workplace.model, workplace.workspace / "tiny-Q6_K.gguf", "Q6_K")
    scrap = workplace.workspace / "tiny-Q8_0.gguf"
    scrap.write_text("notes")
    edited = workplace.workspace / "tiny-Q4_0.gguf"
    edited.write_bytes(edited.read_bytes() + bytes(32))
    before = {path: digest(path) for path in (foreign, scrap, edited)}
    done = workplace._runner(
        *("run", workplace.model, "-f", workplace.text, *SHORT, "--levels", "Q4_0,Q5_K_M,Q6_K,Q8_0,Q4_1", "--json")
    )
    assert done.code == 100
    levels = by_level(done.document["levels"])
    assert {name: level["status"] for name, level in levels.items()} == {
        "Q4_0": "failed",
        "Q5_K_M": "skipped",
        "Q6_K": "failed",
        "Q8_0": "failed",
        "Q4_1": "done",
    }
    assert "is there and was not made by this workspace" in levels["Q6_K"]["error"]["why"]
    assert levels["Q6_K"]["error"]["do"].startswith("Move the file away")
    assert "is there but damaged" in levels["Q8_0"]["error"]["why"]
    assert "was changed since it was made" in levels["Q4_0"]["error"]["why"]
    assert {path: digest(path) for path in before} == before


def test_inputs_are_never_written_to(workplace: Workplace) -> None:
    before = times([workplace.model, workplace.text]), digest(workplace.model)
    workplace.run("--pure")
    assert (times([workplace.model, workplace.text]), digest(workplace.model)) == before


def test_a_model_in_its_own_workspace(tiny_model: Path, tiny_imatrix: Path, runner: RunCommand, tmp_path: Path) -> None:
    """Where a converted model lies; no level can take its name."""
    folder = tmp_path / "work" / "tiny"
    folder.mkdir(parents=True)
    model = Path(shutil.copy(tiny_model, folder / "tiny-BF16.gguf"))
    before = digest(model)
    done = runner("run", model, "--imatrix", tiny_imatrix, "--levels", "BF16,Q4_0")
    assert done.code == 100
    assert "tiny-BF16.gguf is there and was not made by this workspace" in done.err
    assert digest(model) == before
