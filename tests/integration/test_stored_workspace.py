"""A workspace that an earlier version left half finished continues: nothing is computed again, and the bytes are those of an
undisturbed run.

It was made on another machine (``tests/stored/``), whose kernels may round otherwise. So what is computed here is compared with
what an undisturbed run computes here, and what was kept with what was stored.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from gguf import GGUFReader

from support.command_line import Ran, run_command
from support.llama_tools import digest, leftovers, levels_in
from support.stored_workspace import (
    CHUNKS,
    COLLECTED,
    EVALUATE,
    FINISHED,
    GENERATE,
    MODEL,
    RUN_ALL,
    RUN_FINISHED,
    UNFINISHED,
    Engine,
    Stored,
    engine_here,
    ledgers,
    scored_chunks,
    unpack,
)

RECORD = 31 * 24 + 4
"""Bytes of a chunk of scored tokens."""


@pytest.fixture(scope="module")
def engine(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return engine_here(demo_model, tmp_path_factory.mktemp("engine"))


@pytest.fixture
def stored(engine: Engine, tmp_path: Path) -> Stored:
    return unpack(tmp_path / "stored", engine)


@pytest.fixture
def fresh(engine: Engine, tmp_path: Path) -> Stored:
    """A second one, of which a test removes what it wants to see computed here."""
    return unpack(tmp_path / "fresh", engine)


def go_on(stored: Stored, command: tuple[str, ...]) -> Ran:
    done = run_command(*command, "--json", cwd=stored.folder)
    assert done.code == 0, done.err
    return done


def pairs(file: Path) -> set[tuple[str, str]]:
    """Every tensor with its type."""
    return {(tensor.name, tensor.tensor_type.name) for tensor in GGUFReader(file).tensors}


def sums(file: Path) -> dict[str, npt.NDArray[Any]]:
    return {tensor.name: tensor.data.copy() for tensor in GGUFReader(file).tensors}


def test_it_holds_a_half_of_everything(stored: Stored) -> None:
    """What the other tests rely on."""
    assert levels_in(stored.root).keys() == {*FINISHED}
    half = ledgers(stored.root)
    assert half.keys() == {*UNFINISHED}
    assert all(0 < len(lines) < 21 for lines in half.values())
    assert [scored_chunks(stored.root, name) for name in ("source", FINISHED[0])] == [CHUNKS, CHUNKS]
    assert 0 < scored_chunks(stored.root, FINISHED[1]) < CHUNKS
    assert {path.suffix for path in (stored.collecting / ".imatrix-parts").iterdir()} >= {".gguf", ".partial"}
    assert {"imatrix", "report", f"evaluate {FINISHED[0]}"} <= stored.steps().keys()


def test_what_is_finished_is_not_made_again(stored: Stored) -> None:
    before, steps = levels_in(stored.root), stored.steps()
    done = go_on(stored, RUN_FINISHED).document
    assert done["plan"]["imatrix"]["action"] == "up-to-date"
    assert [level["status"] for level in done["levels"]] == ["skipped", "skipped"]
    assert done["passes"] == []
    assert levels_in(stored.root) == before == {level: stored.expected["levels"][level] for level in FINISHED}
    assert digest(stored.root / "imatrix.gguf") == stored.expected["matrix"]
    made = ("imatrix", *(f"level-{level}" for level in FINISHED))
    assert [stored.steps()[step]["finished"] for step in made] == [steps[step]["finished"] for step in made]


def test_the_pass_goes_on_where_it_was(stored: Stored, tmp_path: Path) -> None:
    kept = ledgers(stored.root)
    halves = {level: (stored.root / ".partial" / level / f"tiny-{level}.gguf").read_bytes() for level in UNFINISHED}
    fresh = quantised_here(stored, tmp_path / "work")
    done = go_on(stored, RUN_ALL).document
    assert done["plan"]["imatrix"]["action"] == "up-to-date"
    assert [level["status"] for level in done["levels"]] == ["skipped", "skipped", "done", "done"]
    known = {(line["tensor"], line["type"].upper()) for lines in kept.values() for line in lines}
    known = known.union(pairs(stored.folder / MODEL), *(pairs(stored.root / f"tiny-{level}.gguf") for level in FINISHED))
    wanted = set().union(*(pairs(stored.root / f"tiny-{level}.gguf") for level in UNFINISHED))
    assert sum(cost["pairs"] for cost in done["passes"][0]["types"]) == len(wanted - known) > 0
    for level in UNFINISHED:
        expected = bytearray((fresh / f"tiny-{level}.gguf").read_bytes())
        for line in kept[level]:
            place = slice(line["offset"], line["offset"] + line["bytes"])
            expected[place] = halves[level][place]
        assert (stored.root / f"tiny-{level}.gguf").read_bytes() == expected, level
    assert digest(fresh / "tiny-Q8_0.gguf") == stored.expected["levels"]["Q8_0"]  # no sum in it that a kernel could round
    assert set(leftovers(stored.root)) == {".evaluation"}


def quantised_here(stored: Stored, work: Path) -> Path:
    """Q8_0 and the unfinished levels, made from nothing but the model and the stored matrix."""
    levels = ("--levels", ",".join(("Q8_0", *UNFINISHED)))
    given = ("--imatrix", stored.root / "imatrix.gguf", "--kernels", "ggml", "--engine", "embedded", "-t", "1")
    done = run_command("quantize", MODEL, *given, *levels, "--work-dir", work, cwd=stored.folder)
    assert done.code == 0, done.err
    return work / "tiny"


def test_what_is_measured_is_not_measured_again(stored: Stored) -> None:
    """As if it had been killed between two levels: neither the source nor the first level is computed again."""
    first, second = FINISHED
    scored(stored, second).unlink()
    before, steps = {name: scored(stored, name).read_bytes() for name in ("source", first)}, stored.steps()
    done = go_on(stored, EVALUATE).document
    assert {name: scored(stored, name).read_bytes() for name in before} == before
    assert {step: stored.steps()[step] for step in measured(steps)} == measured(steps)
    assert [path.name for path in (stored.root / "logs").glob("evaluate-*")] == [f"evaluate-{second}.log"]
    figures = stored.expected["measured"]
    assert done["measured"]["levels"][first] == figures[first]
    found = done["measured"]["levels"][second]
    assert found["kld"]["value"] == pytest.approx(figures[second]["kld"]["value"], rel=0.25)


def test_the_measurement_goes_on_where_it_was(stored: Stored, fresh: Stored) -> None:
    """The second level's first chunks are those that were stored, the others what comes of them here."""
    first, second = FINISHED
    scored(fresh, second).unlink()
    for file in (fresh.root / ".evaluation").glob("reference.*"):
        file.unlink()
    go_on(fresh, EVALUATE)
    half, steps = scored(stored, second).read_bytes(), stored.steps()
    known = 32 + scored_chunks(stored.root, second) * RECORD
    go_on(stored, EVALUATE)
    assert {step: stored.steps()[step] for step in measured(steps)} == measured(steps)
    assert scored(stored, second).read_bytes() == half[:known] + scored(fresh, second).read_bytes()[known:]
    assert not (stored.root / "logs" / f"evaluate-{first}.log").exists()


def measured(steps: dict[str, Any]) -> dict[str, Any]:
    """The records of a measurement's finished steps."""
    return {step: record for step, record in steps.items() if step.startswith(("reference ", "evaluate "))}


def scored(stored: Stored, name: str) -> Path:
    return stored.root / ".evaluation" / f"{name}.scored"


def test_the_matrix_goes_on_where_it_was(stored: Stored, fresh: Stored) -> None:
    """A range is in the checkpoint, and some batches of the second are in a file of their own."""
    shutil.rmtree(fresh.collecting)
    go_on(fresh, GENERATE)
    done = go_on(stored, GENERATE)
    assert "16 chunks kept" in done.err
    logs = (place.collecting / "logs" / "imatrix.log" for place in (stored, fresh))
    went_on, from_nothing = (log.read_text(encoding="utf-8").count('"type":"progress"') for log in logs)
    assert 0 < went_on < from_nothing - 16 // 4  # four chunks at once
    out, other = (place.collecting / "imatrix.gguf" for place in (stored, fresh))
    # Where the fresh one has the stored digest, this machine rounds as that one did, and the bytes must be the same.
    assert digest(out) == digest(other) or digest(other) != stored.expected["collected"]
    found, expected = sums(out), sums(stored.folder / COLLECTED)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=0 if name.endswith(".counts") else 0.05, err_msg=name)
    assert leftovers(stored.collecting) == []


def test_its_report_is_made_anew(stored: Stored) -> None:
    """Not refused as a file of somebody else, and with the figures that were measured."""
    done = run_command("report", stored.root, cwd=stored.folder)
    assert done.code == 0, done.err
    report = json.loads((stored.root / "report.json").read_text(encoding="utf-8"))
    (level,) = (each for each in report["levels"] if each["name"] == FINISHED[0])
    assert level["measured"]["kld"]["value"] == stored.expected["measured"][FINISHED[0]]["kld"]["value"]
