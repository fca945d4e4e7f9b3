"""Levels with other numbers than llama-quantize's, through the command line: planned, compared with stock, made, kept."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from imatrix_runner.engines.files.covariance_file import stored_covariances
from imatrix_runner.mixes.mix_recipe import METADATA_KEY, read_recipe
from imatrix_runner.mixes.rounding_facts import ROUNDING_KEY
from imatrix_runner.models.gguf_file import read_header
from imatrix_runner.report.document import Report, read_report
from support.command_line import Ran, RunCommand, run_command
from support.llama_tools import BareTools, digest
from support.perplexity_tools import perplexity_of

FEEDBACK, REFINED = "FEEDBACK-Q4_K_M", "REFINED-IQ4_XS"
OPTIONS = ("-c", "128", "--chunks", "120", "--feedback-tokens", "8192")


@dataclass(frozen=True)
class Rounded:
    """A finished run: its workspace, its document, and the command that repeats it."""

    workspace: Path
    ran: Ran
    arguments: tuple[str | Path, ...]
    folder: Path

    def again(self, *further: str, cwd: Path | None = None) -> Ran:
        return run_command(*self.arguments, *further, cwd=cwd or self.folder)

    def level(self, name: str) -> Path:
        return self.workspace / f"{self.workspace.name}-{name}.gguf"

    def facts(self, step: str) -> dict[str, Any]:
        steps = json.loads((self.workspace / "journal.json").read_text(encoding="utf-8"))["steps"]
        facts: dict[str, Any] = steps[step]["facts"]
        return facts


@pytest.fixture(scope="module")
def rounded(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Rounded:
    folder = tmp_path_factory.mktemp("rounded")
    names = f"Q4_K_M,{REFINED},{FEEDBACK}"
    arguments = ("run", demo_model, "--levels", names, *OPTIONS, "--json")
    ran = run_command(*arguments, cwd=folder)
    assert ran.code == 0, ran.err
    return Rounded(folder / "work" / demo_model.stem, ran, arguments, folder)


def test_all_three_are_made_from_one_reading(rounded: Rounded) -> None:
    made = [level["level"] for level in rounded.ran.document["levels"]]
    assert made == ["Q4_K_M", REFINED, FEEDBACK]
    assert len(rounded.ran.document["passes"]) == 1


def test_types_and_size_are_those_of_stock_and_numbers_are_not(rounded: Rounded) -> None:
    stock, other = (read_header(rounded.level(name)) for name in ("Q4_K_M", FEEDBACK))
    types = [{tensor.name: tensor.type_name for tensor in header.tensors} for header in (stock, other)]
    assert types[0] == types[1]
    assert stock.integer("general.file_type") == other.integer("general.file_type")
    contents = [
        rounded.level(name).read_bytes()[header.data_offset :] for name, header in (("Q4_K_M", stock), (FEEDBACK, other))
    ]
    assert len(contents[0]) == len(contents[1])
    assert contents[0] != contents[1]


def test_the_stock_level_among_them_is_llama_quantizes(
    rounded: Rounded, tools: BareTools, demo_model: Path, tmp_path: Path
) -> None:
    bare = tools.quantize(demo_model, tmp_path / "bare.gguf", "Q4_K_M", imatrix=rounded.workspace / "imatrix.gguf")
    assert digest(bare) == digest(rounded.level("Q4_K_M"))


def test_files_say_how_they_were_rounded(rounded: Rounded) -> None:
    said = {name: read_header(rounded.level(name)).text(ROUNDING_KEY) for name in ("Q4_K_M", REFINED, FEEDBACK)}
    assert said["Q4_K_M"] is None
    assert said[REFINED] == "refined"
    assert (said[FEEDBACK] or "").startswith("feedback, covariances sha256:")


def test_stock_programs_load_them(rounded: Rounded, tools: BareTools, tiny_text: Path) -> None:
    for name in (REFINED, FEEDBACK):
        found = perplexity_of(tools.toolchain, rounded.level(name), tiny_text, "-c", "64", "--chunks", "2")
        assert 1 < found < 10_000


def test_each_was_better_than_stock_where_it_was_compared(rounded: Rounded) -> None:
    for name in (REFINED, FEEDBACK):
        facts = rounded.facts(f"rounding {name}")
        assert facts["stock"] == name.partition("-")[2]
        assert not facts["kept_stock"]
        assert facts["kld"] < facts["stock_kld"]
    assert rounded.facts(f"rounding {FEEDBACK}")["typical"] < rounded.facts(f"rounding {REFINED}")["typical"]
    assert f"{FEEDBACK}: on the calibration text its divergence is 0." in rounded.ran.err


def test_feedback_is_better_on_text_that_it_never_saw(rounded: Rounded) -> None:
    done = run_command("evaluate", rounded.arguments[1], "--chunks", "12", "--json", cwd=rounded.folder)
    assert done.code == 0, done.err
    (verdict,) = done.document["measured"]["mixes"]
    assert (verdict["level"], verdict["stock"][0]["level"]) == (FEEDBACK, "Q4_K_M")
    assert verdict["ratio"]["value"] < 0.8
    assert f"{REFINED} is not compared with stock" in done.err
    assert f"Make and measure {REFINED.partition('-')[2]} too." in done.err
    report = read_report(rounded.workspace / "report.json")
    assert_reported(report)
    card = (rounded.workspace / "report.md").read_text(encoding="utf-8")
    assert "How numbers are rounded" in card
    assert f"**{FEEDBACK}**" in card


def assert_reported(report: Report) -> None:
    levels = {level.name: level for level in report.levels}
    assert levels["Q4_K_M"].rounding is None
    found = levels[FEEDBACK].rounding
    assert found is not None
    assert (found.kind, found.stock, found.refined) == ("feedback", "Q4_K_M", ())
    assert found.held_out is not None
    assert found.held_out.is_better
    assert levels[FEEDBACK].command == ""


def test_a_second_run_finds_everything_made(rounded: Rounded) -> None:
    before = {path.name: digest(path) for path in rounded.workspace.glob("*.gguf")}
    again = rounded.again()
    assert [level["status"] for level in again.document["levels"]] == ["skipped"] * 3
    assert {path.name: digest(path) for path in rounded.workspace.glob("*.gguf")} == before


def test_a_level_that_is_gone_is_made_again_with_the_same_bytes(rounded: Rounded, tmp_path: Path) -> None:
    """On one thread, from covariances that are there, without comparing again."""
    shutil.copytree(rounded.folder / "work", tmp_path / "work")
    copy = tmp_path / "work" / rounded.workspace.name
    gone = copy / rounded.level(FEEDBACK).name
    gone.unlink()
    again = rounded.again("-t", "1", cwd=tmp_path)
    assert again.code == 0, again.err
    assert "compared" not in again.err
    assert digest(gone) == digest(rounded.level(FEEDBACK))


def test_the_plan_says_what_will_be_made(demo_model: Path, runner: RunCommand, tmp_path: Path) -> None:
    plan = runner("run", demo_model, "--rounding", "feedback", "--levels", "Q4_K_M,BF16", "--dry-run", cwd=tmp_path)
    assert plan.code == 0, plan.err
    assert FEEDBACK in plan.out
    assert "FEEDBACK-BF16" not in plan.out
    assert not (tmp_path / "work").exists()


def test_a_mix_takes_the_better_rounding(
    tiny_model: Path, tiny_imatrix: Path, tiny_text: Path, runner: RunCommand, tmp_path: Path
) -> None:
    options = ("--rounding", "feedback", "--types", "q4_k,q6_k", "-c", "128", "--feedback-tokens", "4096", "--like", "Q4_K_M")
    ran = runner("run", tiny_model, "--imatrix", tiny_imatrix, "-f", tiny_text, *options, "--json", cwd=tmp_path)
    assert ran.code == 0, ran.err
    (made,) = (level["level"] for level in ran.document["levels"])
    file = tmp_path / "work" / "tiny" / f"tiny-{made}.gguf"
    recipe, header = read_recipe(file.with_suffix(".recipe.json")), read_header(file)
    measured = [row.name for row in recipe.measured]
    assert any(name.endswith(", feedback") for name in measured)
    assert made.startswith("FEEDBACK-MIX-" if recipe.rounding == "feedback" else "MIX-")
    assert recipe.digest in (header.text(METADATA_KEY) or "")
    assert (header.text(ROUNDING_KEY) or "stock").split(",")[0] == recipe.rounding
    assert recipe.n_bytes == file.stat().st_size
    assert recipe.chosen is not None
    assert recipe.chosen.name == recipe.taken
    assert recipe.taken.endswith(", feedback") == (recipe.rounding == "feedback")
    assert recipe.n_bytes <= next(row.n_bytes for row in recipe.measured if row.name == "Q4_K_M")


def test_covariances_are_kept_by_input(rounded: Rounded) -> None:
    found = stored_covariances(rounded.workspace / ".covariances")
    assert found["blk.0.attn_q.weight"].path == found["blk.0.attn_v.weight"].path
    assert found["blk.0.attn_q.weight"].path != found["blk.0.attn_output.weight"].path


def test_programs_alone_cannot_round_otherwise(demo_model: Path, runner: RunCommand, tools: BareTools, tmp_path: Path) -> None:
    ran = runner("run", demo_model, "--engine", "binaries", "--rounding", "feedback", "--levels", "Q4_K_M", cwd=tmp_path)
    assert ran.code == 3
    assert "Feedback rounding needs the embedded engine" in ran.err
    assert "leave out --rounding" in ran.err


def test_a_quantised_source_is_refused(rounded: Rounded, runner: RunCommand, tmp_path: Path) -> None:
    options = ("--allow-requantize", "--imatrix", "none", "--levels", "REFINED-Q3_K_M")
    ran = runner("run", rounded.level("Q4_K_M"), *options, cwd=tmp_path)
    assert ran.code == 6
    assert "Refined rounding needs a source that is not quantised" in ran.err


def test_a_text_that_is_too_short(demo_model: Path, runner: RunCommand, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("A few words only, and no more of them than that. " * 150, encoding="utf-8")
    options = ("-f", "short.txt", "-c", "128", "--rounding", "feedback", "--levels", "Q4_K_M", "--imatrix", "none")
    ran = runner("run", demo_model, *options, cwd=tmp_path)
    assert ran.code == 6
    assert "too short for error feedback" in ran.err
    assert "-f has no effect" not in ran.err


@pytest.mark.parametrize("wanted", [("--levels", "Q4_K_M"), ("--like", "Q4_K_M")])
def test_ggmls_kernels_round_in_one_way_only(
    wanted: tuple[str, str], demo_model: Path, runner: RunCommand, tmp_path: Path
) -> None:
    """Said before anything is measured."""
    options = ("--rounding", "refined", *wanted, "--imatrix", "none", "--kernels", "ggml")
    ran = runner("run", demo_model, *options, cwd=tmp_path)
    assert ran.code == 2
    assert "--rounding and --kernels ggml exclude each other" in ran.err


def test_without_a_compiler(demo_model: Path, runner: RunCommand, tmp_path: Path) -> None:
    options = ("--rounding", "refined", "--levels", "Q4_K_M", "--imatrix", "none")
    ran = runner("run", demo_model, *options, cwd=tmp_path, env={"CC": "no-such-compiler"})
    assert ran.code == 3
    assert "Install a C compiler" in ran.err
