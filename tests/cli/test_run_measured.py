"""``run --evaluate`` and the report at the end of a run: what is refused at once, and what never spoils a run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from imatrix_runner.models.gguf_file import read_header
from imatrix_runner.report.document import read_report
from support.evaluations import held_out_text
from support.in_process import CommandLine
from support.tiny_models import write_llama_gguf

LEVELS = ("--levels", "Q4_K_M,Q3_K_M", "-c", "128", "--chunks", "4", "-t", "1")


@pytest.fixture
def made(cli: CommandLine, tiny_model: Path, tiny_text: Path) -> Path:
    """The workspace of a run."""
    assert cli("run", tiny_model, *LEVELS, "-f", tiny_text, "-q").code == 0
    return Path("work/tiny")


def test_a_text_that_the_imatrix_will_be_made_of_is_refused_before_it_is_made(
    cli: CommandLine, tiny_model: Path, tiny_text: Path, tmp_path: Path
) -> None:
    ran = cli("run", tiny_model, *LEVELS, "-f", tiny_text, "--text", tiny_text)
    assert ran.code == 6
    assert "cannot say how good the levels are" in ran.err
    assert not list(tmp_path.rglob("*.gguf"))


@pytest.mark.parametrize("content", [None, ""], ids=["missing", "empty"])
def test_a_text_that_is_none_is_refused_before_anything_is_made(
    cli: CommandLine, tiny_model: Path, tiny_text: Path, tmp_path: Path, content: str | None
) -> None:
    text = tmp_path / "text.txt"
    if content is not None:
        text.write_text(content, encoding="utf-8")
    ran = cli("run", tiny_model, *LEVELS, "-f", tiny_text, "--text", text)
    assert ran.code == 6
    assert "text.txt" in ran.err
    assert not list(tmp_path.rglob("*.gguf"))


def test_what_measuring_takes_is_in_the_plan(cli: CommandLine, tiny_model: Path, tiny_text: Path, tmp_path: Path) -> None:
    text = held_out_text(tmp_path / "held-out.txt", chunks=20)
    arguments = ("run", tiny_model, *LEVELS, "-f", tiny_text, "--text", text, "--dry-run")
    planned = cli(*arguments, "--json").document["plan"]["measure"]
    assert (planned["text"], planned["n_passes"], planned["twins"]) == ("held-out.txt", 1, False)
    shown = cli(*arguments, "--ab").out
    chunks = planned["n_chunks"]
    assert f"Then measured, each level with and without imatrix, on held-out.txt: {chunks} chunks of 512 tokens in one" in shown
    assert cli("run", tiny_model, *LEVELS, "-f", tiny_text, "--dry-run", "--json").document["plan"]["measure"] is None


@pytest.mark.parametrize(
    ("chunks", "options", "code", "why"),
    [(2, (), 6, "too short to measure with"), (60, ("--max-disk", "10KiB"), 8, "There is no room to measure")],
)
def test_what_cannot_be_measured_is_refused_before_the_imatrix_is_made(
    chunks: int,
    options: tuple[str, ...],
    code: int,
    why: str,
    cli: CommandLine,
    tiny_model: Path,
    tiny_text: Path,
    tmp_path: Path,
) -> None:
    """The text has that many chunks of 128 tokens; levels are measured with chunks of 512."""
    text = held_out_text(tmp_path / "held-out.txt", chunks=chunks)
    ran = cli("run", tiny_model, *LEVELS, "-f", tiny_text, "--text", text, *options)
    assert ran.code == code
    assert why in ran.err
    assert not list(tmp_path.rglob("*.gguf"))


def test_room_for_measuring_is_what_the_levels_leave(
    cli: CommandLine, tiny_model: Path, tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk on which the levels fit, and the measurement beside none of them."""
    for module in ("app.run", "evaluate.held_out"):
        monkeypatch.setattr(f"imatrix_runner.{module}.free_bytes", lambda _path: 3 << 20)
    text = held_out_text(tmp_path / "held-out.txt", chunks=60)
    arguments = ("run", tiny_model, *LEVELS, "-f", tiny_text, "--dry-run")
    assert cli(*arguments).code == 0
    ran = cli(*arguments, "--text", text)
    assert ran.code == 8
    assert "MiB first; then" in ran.err


def test_prompts_that_are_none_are_refused_before_anything_is_made(
    cli: CommandLine, tiny_model: Path, tiny_text: Path, tmp_path: Path
) -> None:
    (tmp_path / "prompts.jsonl").write_text("{", encoding="utf-8")
    ran = cli("run", tiny_model, *LEVELS, "-f", tiny_text, "--domain", tmp_path / "prompts.jsonl")
    assert ran.code == 6
    assert "prompts.jsonl" in ran.err
    assert not list(tmp_path.rglob("*.gguf"))


@pytest.mark.parametrize(
    ("options", "why"),
    [(("--predict", "2040"), "is too long for tiny"), (("--chat-template-file", "broken.jinja"), "broken.jinja")],
)
def test_prompts_that_the_model_cannot_answer_are_refused_before_the_imatrix_is_made(
    options: tuple[str, ...], why: str, cli: CommandLine, tiny_model: Path, tiny_text: Path, tmp_path: Path
) -> None:
    (tmp_path / "broken.jinja").write_text("{% for %}", encoding="utf-8")
    (tmp_path / "prompts.txt").write_text("Why does a lighthouse keeper write down the weather?\n", encoding="utf-8")
    ran = cli("run", tiny_model, *LEVELS, "-f", tiny_text, "--domain", tmp_path / "prompts.txt", *options)
    assert ran.code == 6
    assert why in ran.err
    assert not list(tmp_path.rglob("*.gguf"))


def test_a_target_measures_and_names_the_level(cli: CommandLine, tiny_model: Path, tiny_text: Path, tmp_path: Path) -> None:
    text = held_out_text(tmp_path / "held-out.txt", chunks=120)
    ran = cli("run", tiny_model, *LEVELS, "-f", tiny_text, "--text", text, "--target-kld", "5")
    assert ran.code == 0, ran.err
    assert "(target): the smallest with a mean KLD of at most 5" in ran.out
    report = read_report(tmp_path / "work" / "tiny" / "report.json")
    assert all(level.measured is not None for level in report.levels)
    assert report.picks[0].level == min(report.levels, key=lambda level: level.n_bytes).name


def test_every_run_leaves_a_report_and_says_where(cli: CommandLine, made: Path, tiny_model: Path, tiny_text: Path) -> None:
    again = cli("run", tiny_model, *LEVELS, "-f", tiny_text)
    assert again.code == 0
    assert f"Report: {(made / 'report.html').absolute()}" in again.out
    report = read_report(made / "report.json")
    assert [level.name for level in report.levels] == ["Q4_K_M", "Q3_K_M"]


def test_a_report_that_was_edited_stays_and_the_run_is_no_failure(
    cli: CommandLine, made: Path, tiny_model: Path, tiny_text: Path
) -> None:
    (made / "report.md").write_text("# My own words\n", encoding="utf-8")
    arguments = ("-c", "128", "--chunks", "4", "-t", "1", "-f", tiny_text)
    ran = cli("run", tiny_model, "--levels", "Q4_K_M,Q3_K_M,Q2_K", *arguments)
    assert ran.code == 0
    assert "report.md is in the way of the report" in ran.err
    assert "Report:" not in ran.out
    assert (made / "report.md").read_text(encoding="utf-8") == "# My own words\n"
    assert (made / "tiny-Q2_K.gguf").is_file()
    assert [level.name for level in read_report(made / "report.json").levels] == ["Q4_K_M", "Q3_K_M"]


def test_where_no_level_was_made_there_is_no_report(cli: CommandLine, tiny_model: Path, tmp_path: Path) -> None:
    ran = cli("quantize", tiny_model, "--levels", "IQ2_XXS")
    assert ran.code == 6
    assert not list(tmp_path.rglob("report.*"))


def test_a_target_counts_until_the_next_measurement(
    cli: CommandLine, tiny_model: Path, tiny_text: Path, tmp_path: Path
) -> None:
    text = held_out_text(tmp_path / "held-out.txt", chunks=120)
    ran = cli("run", tiny_model, *LEVELS, "-f", tiny_text, "--text", text, "--target-size", "1GiB")
    assert "(target)" in ran.out
    again = cli("evaluate", tiny_model, "--text", text, "-t", "1")
    assert again.code == 0, again.err
    assert "(target)" not in again.out


def test_the_demo_ends_with_what_its_levels_cost_and_a_picture(cli: CommandLine, tmp_path: Path) -> None:
    done = cli("demo", "--levels", "Q8_0,Q4_0", "-c", "128", "--chunks", "4", "--work-dir", tmp_path / "work")
    assert done.code == 0, done.err
    assert "Measured on held_out.txt: 2,040 tokens in 8 chunks of 512" in done.out.replace("\n", " ")
    picture = tmp_path / "work" / "demo-model" / "report.png"
    assert picture.is_file()
    assert f"Picture: {picture}" in done.out.replace("\n", "")
    assert "(quality)" in done.out


def test_a_source_that_says_nothing_is_agreed_with_by_nobody(cli: CommandLine, tmp_path: Path) -> None:
    """Every level that ends at once, too, would have 100 % of the same answers."""
    model = write_llama_gguf(tmp_path / "silent-BF16.gguf", fluent=True)
    header = read_header(model)
    output = next(tensor for tensor in header.tensors if tensor.name == "output.weight")
    with model.open("r+b") as file:  # the end of the text is always likeliest
        file.seek(header.data_offset + output.offset + 1 * output.shape[0] * 2)
        file.write((np.array([-0.03], "<f4").view("<u4") >> 16).astype("<u2").tobytes())
    text = held_out_text(tmp_path / "held-out.txt")
    assert cli("quantize", model, "--levels", "Q8_0").code == 0
    told = []
    for number, prompt in enumerate(("A lighthouse keeper", "On quiet days")):  # one of them has another likeliest token
        prompts = tmp_path / f"{number}.txt"
        prompts.write_text(f"{prompt}\n", encoding="utf-8")
        done = cli("evaluate", model, "--text", text, "--chunks", "2", "--domain", prompts, "--predict", "4", "-t", "1")
        told.append((done.code, "Answers of silent cannot be compared" in done.err))
    assert sorted(told) == [(0, False), (6, True)]
