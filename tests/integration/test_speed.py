"""``evaluate --speed``: files are timed as llama-bench times them, and figures hold for the machine and options they were
measured with."""

from __future__ import annotations

from pathlib import Path

import pytest

from imatrix_runner.engines.jobs import CollectOptions
from imatrix_runner.evaluate.measurements import SPEED_OF_SOURCE, speeds
from imatrix_runner.mixes.type_times import type_times
from imatrix_runner.toolchain.speed_model import SpeedShape
from support.evaluations import Place, make_levels
from support.in_process import CommandLine
from support.mixing import Mixing

SPEED = ("--speed", "--speed-repetitions", "2")


@pytest.fixture(scope="module")
def made(tiny_model: Path, tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Place:
    return make_levels(tmp_path_factory.mktemp("made"), tiny_model, tiny_text, levels=("Q8_0", "Q4_K_M"))


def test_source_and_levels_are_timed_and_figures_are_used_again(made: Place, cli: CommandLine, tmp_path: Path) -> None:
    place = made.copy(tmp_path / "work")
    ran = place.evaluate(cli, *SPEED, "--min-speed", "1", "--json", "-q")
    assert ran.code == 0, ran.err
    found = ran.document["measured"]["speeds"]
    assert list(found) == [SPEED_OF_SOURCE, "Q8_0", "Q4_K_M"]
    level = found["Q4_K_M"]
    assert level["generation"]["runs"] == level["prompt"]["runs"] == 2
    assert level["generation"]["mean"] > 1
    assert level["generation"]["error"] == pytest.approx(level["generation"]["deviation"] / 2**0.5)
    assert {"model", "KV", "compute"} <= {buffer["kind"] for buffer in level["buffers"]}
    assert level["bytes"] == sum(buffer["n_bytes"] for buffer in level["buffers"])
    assert (level["setting"]["threads"], level["setting"]["n_prompt"], level["setting"]["n_gen"]) == (1, 512, 128)
    assert ran.document["measured"]["speed_pick"]["level"] == "Q8_0"
    assert ran.document["picks"][0] == ran.document["measured"]["speed_pick"]
    page, card = ((place.root / name).read_text(encoding="utf-8") for name in ("report.html", "report.md"))
    assert "Speed and quality" in page
    assert "Tokens/s" in card
    assert level["setting"]["machine"] not in page + card

    again = place.evaluate(cli, *SPEED, "--json", "-q")
    assert again.document["measured"]["speeds"] == found
    deeper = place.evaluate(cli, *SPEED, "--speed-depth", "64", "--json", "-q").document["measured"]["speeds"]
    assert deeper["Q4_K_M"]["setting"]["depth"] == 64
    assert deeper["Q4_K_M"]["generation"] != level["generation"]
    assert {name: each.setting.depth for name, each in speeds(place.journal).items()} == {"Q8_0": 64, "Q4_K_M": 64}


def test_a_speed_that_no_level_reaches_is_said(made: Place, cli: CommandLine, tmp_path: Path) -> None:
    ran = made.copy(tmp_path / "work").evaluate(cli, *SPEED, "--min-speed", "1000000")
    assert ran.code == 0
    assert "No measured level generates 1e+06 tokens/s here; the fastest is " in ran.err


def test_programs_do_not_time(made: Place, cli: CommandLine) -> None:
    ran = made.evaluate(cli, "--speed", "--engine", "binaries", "--dry-run")
    assert ran.code == 2
    assert "Speed can only be measured by the embedded engine" in ran.err


def test_types_are_timed_once_for_a_machine_and_its_options(tiny_model: Path, tiny_text: Path, tmp_path: Path) -> None:
    session = Mixing.of(tiny_model, tiny_text, tmp_path / "work").planner.session
    meter = session.engine.speed_meter
    assert meter is not None
    options, shape = CollectOptions(threads=1), SpeedShape(width=256, inner=512, layers=1)
    kinds = ("Q4_K", "IQ1_M", "BF16", "IQ3_XXS")
    found = type_times(kinds, options, session, meter, tmp_path / "cache", shape)
    assert all(0 < found[kind] < 1e-3 for kind in kinds)
    assert type_times(("Q4_K", "BF16"), options, session, meter, tmp_path / "cache", shape) == {
        "Q4_K": found["Q4_K"],
        "BF16": found["BF16"],
    }
    assert len(list((tmp_path / "cache" / "speeds").iterdir())) == 1
