"""``advise`` at the command line: tables that fit the terminal, one document, and nothing of a stranger's that commands it."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from imatrix_runner.app.advise import Advice, AdviseRequest, advise
from imatrix_runner.cli.views.advice_tables import print_advice
from imatrix_runner.context.context import Context
from imatrix_runner.context.requests import EnvironmentRequest, LevelsRequest, SourceRequest
from imatrix_runner.engines.jobs import CollectOptions
from imatrix_runner.events import ignore
from support.in_process import CommandLine
from support.tiny_models import sample_text

LEVELS = ("--levels", "Q8_0,Q4_K_M,IQ2_XXS")
QUICK = ("--no-probe", *LEVELS)


@pytest.fixture(scope="module")
def found(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Advice:
    """Of every level of the demo model, which has partly room on a GPU, with a probe."""
    folder = tmp_path_factory.mktemp("advise")
    (folder / "text.txt").write_text(sample_text(12_000), encoding="utf-8")
    request = AdviseRequest(
        SourceRequest(str(demo_model)),
        EnvironmentRequest(folder / "work"),
        LevelsRequest(),
        folder / "text.txt",
        CollectOptions(n_ctx=128),
        use="chat",
        vram=(1 << 30) + (3 << 20),
    )
    return advise(request, Context(ignore))


def shown(advice: Advice, width: int) -> list[str]:
    out = io.StringIO()
    console = Console(file=out, width=width, highlight=False, markup=False, emoji=False)
    print_advice(advice, ["imatrix-runner run demo-model.gguf --levels Q8_0"], console)
    return out.getvalue().splitlines()


@pytest.mark.parametrize("width", [80, 100, 120])
def test_every_line_fits_the_terminal_and_no_row_is_broken(found: Advice, width: int) -> None:
    lines = shown(found, width)
    assert max(map(len, lines)) <= width
    for level in found.levels:
        (row,) = [line for line in lines if line.startswith(f"{level.level} ")]
        assert {"required": "required", "strongly useful": "useful", "marginal": "marginal", "none": "none"}[
            level.benefit.need
        ] in row
    text = " ".join(" ".join(lines).split())
    assert "18.72 → 12.90 %" in text
    for source in ("PR 4930", "PR 6936", "PR 4897", "120 to 670 MiB", "evaluate MODEL --ab"):
        assert source in text


def test_what_gives_way_in_a_narrow_terminal_is_not_the_answer(found: Advice) -> None:
    def headings(width: int) -> list[str]:
        return next(line.split() for line in shown(found, width) if line.startswith("Level "))

    assert headings(120) == ["Level", "Size", "Bits", "Needs", "Runs", "in", "Imatrix", "PPL", "error", "KLD"]
    assert headings(80) == ["Level", "Size", "Runs", "in", "Imatrix", "PPL", "error", "KLD"]


def test_levels_that_are_partly_on_a_gpu_say_how_many_layers(found: Advice) -> None:
    partly = [level for level in found.levels if level.fit is not None and level.fit.place == "GPU and RAM"]
    assert partly
    lines = shown(found, 120)
    for level in partly:
        assert level.fit is not None
        assert any(line.startswith(f"{level.level} ") and f"GPU {level.fit.n_gpu_layers}/5" in line for line in lines)
    assert any("with -ngl n on the GPU" in line for line in lines)


def test_the_answer_and_what_to_type_come_last(found: Advice) -> None:
    lines = shown(found, 120)
    after = lines[lines.index("Advice") :]
    assert {line.split()[0] for line in after if line[:1].isalpha()} >= {"Advice", "GPU", "RAM", "Make"}
    assert after[-1].split() == ["Make", *["imatrix-runner", "run", "demo-model.gguf", "--levels", "Q8_0"]]


def test_times_come_with_how_they_were_measured(found: Advice) -> None:
    told = " ".join(" ".join(shown(found, 120)).split())
    assert f"for {found.text.n_chunks} chunks on this machine, embedded engine" in told
    assert "2 chunks took" in told
    assert "the 2 before them" in told
    assert f"the {found.held_out_chunks} held-out chunks of the source, and again for each level if it is as fast" in told


def test_one_document_with_every_figure_and_its_reason(cli: CommandLine, tiny_model: Path) -> None:
    ran = cli("advise", tiny_model, *QUICK, "--json", "--vram", "8GiB", "-c", "1024", "--use", "code", "--cluster", "local:3")
    assert ran.code == 0
    document = ran.document
    assert (document["schema"], document["version"], document["exit_code"]) == ("imatrix-runner/advise", 1, 0)
    assert document.keys() == {
        *("schema", "version", "program", "exit_code", "model", "machine", "context", "levels", "left_out", "sources"),
        *("calibration", "engine", "timing", "untimed", "held_out_chunks", "imatrix_bytes", "measured"),
        *("recommendations", "commands", "cluster"),
    }
    assert document["context"] == {"tokens": 1024, "bytes": 1 << 20, "certainty": "exact", "note": ""}
    assert (document["timing"], document["untimed"]) == (None, "--no-probe")
    cluster = document["cluster"]  # nothing is started to answer
    assert (cluster["workers"], cluster["forecasts"], cluster["stops_scaling_at"]) == (3, [], None)
    assert cluster["n_ranges"] >= 1
    assert cluster["sums_bytes"] == 2 * cluster["n_ranges"] * document["imatrix_bytes"]
    level = {each["level"]: each for each in document["levels"]}["Q4_K_M"]
    assert level.keys() == {
        *("level", "bytes", "bits_per_weight", "failure", "fit", "imatrix", "fallbacks", "fallback_share", "predicted_kld"),
    }
    assert level["imatrix"]["need"] == "strongly useful"
    assert (level["imatrix"]["ppl_error"], level["imatrix"]["kld"]) == ([1.08, 0.75], [0.0313, 0.0282])
    assert level["imatrix"]["reason"]
    assert level["fit"]["place"] == "GPU"
    assert level["fit"]["reason"]
    assert document["machine"]["planned"]
    assert document["machine"]["gpus"][0]["n_bytes"] == 8 << 30
    assert {"code-share"} <= {each["kind"] for each in document["calibration"]["judgements"]}
    assert all(each["reason"] for each in document["recommendations"])


def test_quiet_says_nothing(cli: CommandLine, tiny_model: Path) -> None:
    ran = cli("advise", tiny_model, *QUICK, "-q")
    assert (ran.code, ran.out, ran.err) == (0, "", "")


def test_the_next_command_is_the_one_that_fits(cli: CommandLine, tiny_model: Path, tmp_path: Path) -> None:
    """What needs no imatrix is quantised without; options that were given are given again, quoted."""
    (only,) = [line for line in cli("advise", tiny_model, "--no-probe", "--levels", "Q8_0").out.splitlines() if "Make" in line]
    assert only.split() == ["Make", *f"imatrix-runner quantize {tiny_model} --levels Q8_0 --imatrix none".split()]
    text = tmp_path / "my text.txt"
    text.write_text(sample_text(3000), encoding="utf-8")
    options = ("-f", text, "--work-dir", "elsewhere", "-ngl", "0")
    (made,) = [
        line
        for line in cli("advise", tiny_model, "--no-probe", "--levels", "Q4_K_M", *options).out.splitlines()
        if "Make" in line
    ]
    assert made.split(maxsplit=1)[1] == (
        f"imatrix-runner run {tiny_model} --levels Q4_K_M --work-dir elsewhere -f '{text}' -ngl 0"
    )


def test_a_stranger_s_names_do_not_reach_the_terminal(cli: CommandLine, tiny_model: Path, tmp_path: Path) -> None:
    model = tmp_path / "evil\x1b[31m-BF16.gguf"
    model.write_bytes(tiny_model.read_bytes())
    text = tmp_path / "also\x1b]0;evil\x07.txt"
    text.write_text(sample_text(3000), encoding="utf-8")
    ran = cli("advise", model, "-f", text, *QUICK, "--use", "chat")
    assert ran.code == 0
    assert "\x1b" not in ran.out + ran.err
    assert "\x07" not in ran.out + ran.err


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (("--vram", "0"), 2, "is not a size"),
        (("--ram", "lots"), 2, "is not a size"),
        (("-c", "0"), 2, "'-c'"),
        (("--use", "poetry"), 2, "'--use'"),
        (("--levels", "Q4_K_X"), 2, "similar names are"),
        (("--levels", "Q4_K_M,MIX@4GiB"), 2, "MIX@4GiB cannot be assessed"),
        (("-ngl", "many"), 2, "Invalid -ngl 'many'"),
        (("-f", "absent.txt"), 6, "absent.txt"),
    ],
)
def test_a_mistake_is_told_in_three_lines(
    cli: CommandLine, tiny_model: Path, arguments: tuple[str, ...], code: int, told: str
) -> None:
    ran = cli("advise", tiny_model, "--no-probe", *arguments)
    assert (ran.code, ran.out) == (code, "")
    what, why, todo = ran.err.splitlines()
    assert what.startswith("Error: ")
    assert why.startswith("  Why: ")
    assert todo.startswith("  Do:  ")
    assert told in ran.err


def test_a_model_that_is_not_there(cli: CommandLine) -> None:
    ran = cli("advise", "absent.gguf")
    assert ran.code == 6
    assert "No model 'absent.gguf'" in ran.err
