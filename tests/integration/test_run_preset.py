"""One command from the demo model to the 26 files of a publisher's preset, each what llama-quantize itself writes."""

from __future__ import annotations

import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from imatrix_runner.engines.levels import preset_levels
from imatrix_runner.files import stamp
from imatrix_runner.journal import Journal
from support.command_line import Ran, run_command
from support.llama_tools import BareTools, digest, leftovers, levels_in, times
from support.oracles import quantized

EIGHT_BITS = ("--token-embedding-type", "q8_0", "--output-tensor-type", "q8_0")
VARIANTS = {
    "Q6_K_L": ("Q6_K", *EIGHT_BITS),
    "Q5_K_L": ("Q5_K_M", *EIGHT_BITS),
    "Q4_K_L": ("Q4_K_M", *EIGHT_BITS),
    "Q3_K_XL": ("Q3_K_L", *EIGHT_BITS),
    "Q2_K_L": ("Q2_K", *EIGHT_BITS),
}
SHORT = ("-c", "128", "--chunks", "24")
ENGINES = {"binaries": "llama.cpp ", "embedded": "llama-cpp-python "}


@dataclass(frozen=True)
class Preset:
    """The finished workspace, how it was made, and the command that made it."""

    folder: Path
    workspace: Path
    first: Ran
    arguments: tuple[str, ...]
    engine: str

    def again(self, *more: str) -> Ran:
        return run_command(*self.arguments, *more, cwd=self.folder)

    def files(self) -> list[Path]:
        return sorted(self.workspace.glob("demo-model-*.gguf"))


@pytest.fixture(scope="module", params=ENGINES)
def preset(request: pytest.FixtureRequest, demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Preset:
    folder, engine = tmp_path_factory.mktemp("preset"), str(request.param)
    arguments = ("run", str(demo_model), "--preset", "bartowski", "--engine", engine, *SHORT)
    first = run_command(*arguments, cwd=folder)
    assert first.code == 0, first.err
    return Preset(folder, folder / "work" / "demo-model", first, arguments, engine)


def test_writes_26_files_byte_for_byte_those_of_llama_quantize(preset: Preset, tools: BareTools, demo_model: Path) -> None:
    levels, missing = preset_levels("bartowski", tools.toolchain.types)
    assert len(levels) == 26
    assert not missing

    def bare(name: str) -> tuple[str, str]:
        ftype, *options = VARIANTS.get(name, (name,))
        (made,) = quantized(tools, demo_model, ftype, *options, imatrix=preset.workspace / "imatrix.gguf").digests
        return name, made

    with ThreadPoolExecutor(2) as pool:
        expected = dict(pool.map(bare, [level.name for level in levels]))
    assert levels_in(preset.workspace) == expected
    assert leftovers(preset.workspace) == []


def test_tells_the_plan_first_and_the_result_last(preset: Preset) -> None:
    told = preset.first.err
    assert told.index("26 of 26 levels to make") < told.index("imatrix, 24 chunks ...") < told.index("Q8_0 ...")
    assert "26 made in" in preset.first.out.splitlines()[-1]


def test_a_second_run_does_nothing_in_under_two_seconds(preset: Preset) -> None:
    before = times(preset.files())
    began = time.monotonic()
    second = preset.again()
    seconds = time.monotonic() - began
    assert second.code == 0
    assert "26 were up to date" in second.out
    assert times(preset.files()) == before
    assert seconds < 2


def test_a_deleted_file_alone_is_made_again(preset: Preset) -> None:
    gone = preset.workspace / "demo-model-Q4_K_M.gguf"
    content = digest(gone)
    before = times(preset.files())
    gone.unlink()
    third = preset.again()
    assert third.code == 0
    assert "1 made, 25 were up to date" in third.out
    assert digest(gone) == content
    after = times(preset.files())
    assert {name for name, when in after.items() if when != before[name]} == {gone.name}


def test_a_copied_workspace_is_recognised_by_content(preset: Preset, tmp_path: Path) -> None:
    """New inodes and times, the same bytes: nothing is computed again, and the stamps are written down anew."""
    copy = tmp_path / "work" / "demo-model"
    shutil.copytree(preset.workspace, copy, copy_function=shutil.copyfile)
    done = run_command(*preset.arguments, cwd=tmp_path)
    assert done.code == 0
    assert "26 were up to date" in done.out
    recorded = Journal(copy / "journal.json")["level-Q8_0"].outputs[0].stamp
    assert recorded == stamp(copy / "demo-model-Q8_0.gguf")


def test_the_document_of_a_run_has_the_promised_shape(preset: Preset) -> None:
    document = preset.again("--json").document
    assert document.keys() == {
        *("schema", "version", "program", "exit_code", "model", "engine", "toolchain", "plan", "imatrix", "collected"),
        *("levels", "passes", "measured", "report", "published", "unpublished", "seconds"),
    }
    assert document["engine"] == preset.engine
    assert document["toolchain"].startswith(ENGINES[preset.engine])
    assert document["passes"] == []
    assert document["schema"] == "imatrix-runner/run"
    assert document["version"] == 1
    assert document["model"]["name"] == "demo-model"
    assert document["imatrix"]["chunks"] == 24
    assert document["imatrix"]["chunk_size"] == 128
    assert document["imatrix"]["datasets"] == ["imatrix_data.txt"]
    assert len(document["levels"]) == 26
    by_name = {level["level"]: level for level in document["levels"]}
    q4 = by_name["Q4_K_M"]
    assert q4.keys() == {
        *(
            "level",
            "status",
            "files",
            "bytes",
            "bits_per_weight",
            "seconds",
            "share",
            "without_weights",
            "copied_from",
            "error",
        ),
    }
    assert q4["status"] == "skipped"
    assert q4["error"] is None
    assert [Path(file).stat().st_size for file in q4["files"]] == [q4["bytes"]]
    plan = document["plan"]
    assert plan.keys() == {"workspace", "imatrix", "levels", "mixing", "notes", "measure", "new_bytes", "free_bytes"}
    assert plan["new_bytes"] == 0
    assert plan["levels"][0].keys() == {
        *("level", "ftype", "state", "reason", "remedy", "files", "bytes", "bits_per_weight", "needs_imatrix", "fallbacks"),
        *("fallback_share", "without_weights", "unseen", "pinned", "predicted_kld"),
    }


def test_quiet_says_nothing(preset: Preset) -> None:
    done = preset.again("-q")
    assert (done.code, done.out, done.err) == (0, "", "")


def test_status_knows_what_is_done(preset: Preset) -> None:
    status = run_command("status", "--json", cwd=preset.folder).document
    (entry,) = status["workspaces"]
    assert entry["state"] == "done"
    assert (entry["levels_done"], entry["levels_wanted"]) == (26, 26)
    assert entry["imatrix"] == "imatrix.gguf"


def test_levels_can_be_added_from_the_same_imatrix(preset: Preset) -> None:
    """Another request in the same workspace keeps what is there and makes only what is new."""
    engine = ("--engine", preset.engine)
    done = run_command("run", preset.arguments[1], "--levels", "Q4_K_M,Q5_0", *SHORT, *engine, "--json", cwd=preset.folder)
    assert done.code == 0
    status = {level["level"]: level["status"] for level in done.document["levels"]}
    assert status == {"Q4_K_M": "skipped", "Q5_0": "done"}
    assert len(done.document["passes"]) == (preset.engine == "embedded")
    (preset.workspace / "demo-model-Q5_0.gguf").unlink()
