"""``imatrix-runner evaluate``: what people type, what they read, and the document that programs read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import pytest

from imatrix_runner import __version__
from imatrix_runner.engines.measures import DP_FRACTIONS, KLD_FRACTIONS, Divergence
from imatrix_runner.evaluate.ab_verdict import RULE, Comparison
from imatrix_runner.workspace import hold
from support.command_line import Ran, run_command
from support.evaluations import CHUNKS, Place, make_levels
from support.in_process import CommandLine

PLAN = {
    *("text", "sha256", "chunks", "context", "tokens", "overlap", "disk_bytes", "passes", "levels", "twins", "without_twin"),
    *("same", "until_precise"),
}
MEASURED = {"levels", "failed", "comparisons", "domain", "tasks", "mixes", "target", "speeds", "speed_pick", "seconds"}


@pytest.fixture(scope="module")
def told(tiny_model: Path, tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Place, Ran]:
    """A level and its baseline measured, and the document of it."""
    place = make_levels(tmp_path_factory.mktemp("made"), tiny_model, tiny_text, levels=("Q4_K_M",))
    done = run_command(*place.arguments("--ab", "--target-kld", "0.2", "--json", "-q"), cwd=place.work)
    assert (done.code, done.err) == (0, "")
    return place, done


@pytest.fixture
def place(told: tuple[Place, Ran], tmp_path: Path) -> Place:
    return told[0].copy(tmp_path / "work")


def test_the_document_keeps_its_shape(told: tuple[Place, Ran]) -> None:
    place, ran = told
    document = ran.document
    assert list(document) == [
        *("schema", "version", "program", "exit_code", "workspace", "plan", "measured", "picks", "report")
    ]
    assert (document["schema"], document["version"], document["program"]) == ("imatrix-runner/evaluate", 1, __version__)
    assert (document["exit_code"], document["workspace"]) == (0, str(place.root))
    plan = document["plan"]
    assert plan.keys() == PLAN
    assert (plan["text"], plan["chunks"], plan["context"], plan["tokens"]) == ("held-out.txt", CHUNKS, 64, CHUNKS * 31)
    assert (plan["overlap"], plan["passes"], plan["without_twin"], plan["twins"]) == (0.0, 1, {}, ["Q4_K_M"])
    assert plan["levels"] == [{"level": "Q4_K_M", "state": "todo", "reason": "not measured yet"}]
    assert plan["disk_bytes"] > place.workspace.level_file("Q4_K_M").stat().st_size
    names = ["report.html", "report.md", "report.json"]  # one measured level makes no picture
    assert [Path(path).name for path in document["report"]] == names


def test_every_figure_of_a_level_has_its_name_and_error(told: tuple[Place, Ran]) -> None:
    measured = told[1].document["measured"]
    assert measured.keys() == MEASURED
    assert (measured["failed"], measured["domain"]) == ({}, [])
    assert measured["seconds"] > 0
    level = measured["levels"]["Q4_K_M"]
    assert list(level) == [field.name for field in fields(Divergence)]
    for name in ("ppl", "ppl_base", "log_ratio", "ratio", "difference", "kld", "dp", "dp_rms", "same_top"):
        assert level[name].keys() == {"value", "error"}
    assert list(level["kld_at"]) == [str(fraction) for fraction in KLD_FRACTIONS]
    assert list(level["dp_at"]) == [str(fraction) for fraction in DP_FRACTIONS]
    assert 0 < level["same_top"]["value"] <= 1


def test_comparisons_targets_and_picks_are_in_it(told: tuple[Place, Ran]) -> None:
    document = told[1].document
    (pair,) = document["measured"]["comparisons"]
    assert list(pair) == [field.name for field in fields(Comparison)]
    assert pair["with_imatrix"] == document["measured"]["levels"]["Q4_K_M"]
    assert pair["verdict"] in ("not needed", "take it", "do not go without")
    assert document["measured"]["target"] == {
        "why": "target",
        "level": "Q4_K_M",
        "rule": "the smallest with a mean KLD of at most 0.2",
    }
    assert document["picks"][0] == document["measured"]["target"]
    assert all(pick.keys() == {"why", "level", "rule"} for pick in document["picks"])


def test_a_dry_run_has_the_plan_and_no_figures(place: Place, cli: CommandLine) -> None:
    document = place.evaluate(cli, "--again", "--dry-run", "--json", "-q").document
    assert document["plan"].keys() == PLAN
    assert document["plan"]["levels"] == [{"level": "Q4_K_M", "state": "todo", "reason": "asked for"}]
    assert document["measured"] == {
        "levels": {},
        "failed": {},
        "comparisons": [],
        "domain": [],
        "tasks": [],
        "mixes": [],
        "target": None,
        "speeds": {},
        "speed_pick": None,
        "seconds": 0.0,
    }
    assert (document["picks"], document["report"]) == ([], [])


def test_people_read_the_table_the_rule_and_where_the_report_lies(place: Place, cli: CommandLine) -> None:
    ran = place.evaluate(cli, "--ab")
    assert ran.code == 0, ran.err
    assert "Q4_K_M" in ran.out
    assert "Mean KLD" in ran.out
    assert "With and without imatrix" in ran.out
    assert " ".join(RULE.split()) in " ".join(ran.out.split())
    assert f"Report: {place.root / 'report.html'}" in ran.out.replace("\n", "")
    assert "To measure: nothing; 1 known already." in ran.err
    assert "Disk:" not in ran.err  # none is needed


def test_quiet_says_nothing_when_all_is_well_and_what_failed_when_not(place: Place, cli: CommandLine) -> None:
    ran = place.evaluate(cli, "-q")
    assert (ran.code, ran.out, ran.err) == (0, "", "")
    place.spoil("Q4_K_M")
    ran = place.evaluate(cli, "-q")
    assert (ran.code, ran.out) == (100, "")
    assert "Q4_K_M: tiny-Q4_K_M.gguf produced NaN or infinite numbers" in ran.err


def test_what_failed_is_an_error_with_all_its_parts_in_the_document(place: Place, cli: CommandLine) -> None:
    place.spoil("Q4_K_M")
    ran = place.evaluate(cli, "--json", "-q")
    assert ran.code == ran.document["exit_code"] == 100
    error = ran.document["measured"]["failed"]["Q4_K_M"]
    assert error.keys() == {"kind", "what", "why", "do"}
    assert error["kind"] == "invalid-data"
    assert ran.document["measured"]["levels"] == {}


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (["evaluate"], 2, ["Missing argument 'MODEL'", "imatrix-runner evaluate [OPTIONS] MODEL"]),
        (["evaluate", "MODEL", "--chunks", "0"], 2, ["'--chunks': 0 is not in the range"]),
        (["evaluate", "MODEL", "-c", "8"], 2, ["8 is not in the range"]),
        (["evaluate", "MODEL", "-c", "3000"], 2, ["A context of 3000 tokens cannot be divided into batches of 2048"]),
        (["evaluate", "MODEL", "--until-precise", "90%"], 2, ["'90%' is not a share such as 2% or 0.02, below 0.5"]),
        (["evaluate", "MODEL", "--until-precise", "2%", "--kl-divergence-base", "b"], 2, ["exclude each other"]),
        (["evaluate", "MODEL", "--max-disk", "lots"], 2, ["'lots' is not a size", "4GiB"]),
        (["evaluate", "MODEL", "--target-size", "0"], 2, ["'0' is not a size"]),
        (["evaluate", "MODEL", "--target-kld", "0"], 2, ["'--target-kld': 0.0 is not in the range"]),
        (["evaluate", "MODEL", "--min-speed", "0"], 2, ["'--min-speed': 0.0 is not in the range"]),
        (["evaluate", "MODEL", "--speed-repetitions", "1"], 2, ["'--speed-repetitions': 1 is not in the range"]),
        (["evaluate", "MODEL", "--predict", "0"], 2, ["'--predict': 0 is not in the range"]),
        (["evaluate", "MODEL", "--text", "a", "--kl-divergence-base", "b"], 2, ["exclude each other", "Leave one out"]),
        (["evaluate", "MODEL"], 2, ["There is nothing to measure in", "imatrix-runner run "]),
        (["evaluate", "nothing.gguf"], 6, ["No model 'nothing.gguf'"]),
        (["evaluate", "MODEL", "--levls", "Q4_0"], 2, ["--levls", "'--levels'"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) and value[0] == "evaluate" else "",
)
def test_a_wrong_request_is_told_in_three_lines(
    arguments: Sequence[str], code: int, told: Sequence[str], cli: CommandLine, tiny_model: Path, tmp_path: Path
) -> None:
    ran = cli(*(str(tiny_model) if word == "MODEL" else word for word in arguments))
    assert ran.code == code
    what, why, todo = ran.err.splitlines()[-3:]
    assert (what[:7], why[:7], todo[:7]) == ("Error: ", "  Why: ", "  Do:  ")
    assert "Traceback" not in ran.err
    assert all(text in ran.err for text in told)
    assert list(tmp_path.iterdir()) == []


def test_an_error_is_a_document_too(cli: CommandLine, tiny_model: Path) -> None:
    ran = cli("evaluate", tiny_model, "--json")
    assert ran.code == 2
    assert (ran.document["schema"], ran.document["exit_code"]) == ("imatrix-runner/error", 2)


def test_a_workspace_in_use_is_exit_7_and_can_be_planned(place: Place, cli: CommandLine) -> None:
    with hold(place.workspace, "imatrix-runner run somewhere"):
        ran = place.evaluate(cli)
        assert ran.code == 7
        assert "imatrix-runner run somewhere is writing to it" in ran.err
        assert place.evaluate(cli, "--dry-run", "-q").code == 0


def test_figures_in_the_journal_that_are_none_are_told_and_measured_again(place: Place, cli: CommandLine) -> None:
    text = place.workspace.journal.read_text(encoding="utf-8")
    place.workspace.journal.write_text(text.replace('"n_tokens": 248', '"n_tokens": "many"'), encoding="utf-8")
    ran = place.evaluate(cli)
    assert ran.code == 6
    assert "the figures of Q4_K_M (evaluate) are not what this program wrote" in ran.err
    assert "Measure again: imatrix-runner evaluate MODEL --again" in ran.err
    again = place.evaluate(cli, "--again", "--ab", "-q")
    assert (again.code, again.err) == (0, "")
    assert place.evaluate(cli, "-q").code == 0
