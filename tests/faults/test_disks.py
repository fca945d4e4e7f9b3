"""Disks that are full, become full, or cannot be written to: real small file systems."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from imatrix_runner.engines.binaries.engine import BinariesEngine
from imatrix_runner.engines.jobs import ChunkRange, CollectOptions
from imatrix_runner.engines.measures import ReferenceJob
from imatrix_runner.errors import NoSpaceError
from imatrix_runner.events import ignore
from imatrix_runner.process import Runner
from support.command_line import RunCommand, run_command, started
from support.llama_tools import WORK_ONLY, BareTools, digest, fake_tools, leftovers, levels_in
from support.mounts import mounted
from support.oracles import quantized

NUMBER = r"[\d.]+ (?:B|KiB|MiB)"


@pytest.fixture
def small_disk(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A tmpfs; its size is the test's parameter."""
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", f"size={request.param}", "tmpfs") as point:
        yield point


@pytest.mark.parametrize("small_disk", ["2m"], indirect=True)
def test_levels_that_do_not_fit_are_refused_before_anything_runs(
    small_disk: Path, tiny_model: Path, tiny_imatrix: Path, runner: RunCommand
) -> None:
    arguments = ("quantize", tiny_model, "--imatrix", tiny_imatrix, "--work-dir", small_disk, "--levels")
    done = runner(*arguments, "Q8_0,Q6_K,Q4_0")
    assert done.code == 8
    assert "Error: The 3 levels do not fit on the disk." in done.err
    assert " needed, " in done.err
    assert f" free at {small_disk}" in done.err
    assert levels_in(small_disk / "tiny") == {}
    assert runner(*arguments, "Q4_0").code == 0  # what fits is made


@pytest.mark.parametrize("small_disk", ["64k"], indirect=True)
def test_an_imatrix_that_does_not_fit_is_refused_before_it_is_computed(
    small_disk: Path, tiny_model: Path, tiny_text: Path, runner: RunCommand
) -> None:
    out = small_disk / "tiny" / "imatrix.gguf"
    done = runner(
        *("imatrix", "generate", tiny_model, "-f", tiny_text, "-c", "128", "--output-frequency", "10"),
        *("--work-dir", small_disk),
    )
    assert done.code == 8
    assert "Error: The imatrix does not fit on the disk." in done.err
    assert not out.exists()
    assert "imatrix, " not in done.err


@pytest.mark.parametrize("small_disk", ["4m"], indirect=True)
def test_one_by_one_makes_what_fits_and_later_the_rest(
    small_disk: Path, tiny_model: Path, tiny_imatrix: Path, runner: RunCommand, tools: BareTools, tmp_path: Path
) -> None:
    arguments = ("quantize", tiny_model, "--imatrix", tiny_imatrix, "--levels", "Q8_0,Q4_0,Q5_K_M", "--one-by-one", "--json")
    arguments += ("--engine", "embedded", "--work-dir", small_disk)
    workspace, filler = small_disk / "tiny", small_disk / "filler"
    filler.write_bytes(bytes(1536 << 10))
    done = runner(*arguments)
    assert done.code == 8
    assert levels_in(workspace).keys() == {"Q4_0", "Q5_K_M"}
    assert leftovers(workspace) == []
    assert done.err.index("Q4_0: done in") < done.err.index("Q5_K_M: done in")
    assert re.search(
        "Error: The disk became full while Q8_0 was made.\n"
        rf"  Why: 1\.\d+ MiB needed, \d+\.\d+ KiB free at {workspace}\.\n"
        "  Do:  Free some space, or choose another disk with --work-dir, then run the same command again: it continues.",
        done.err,
    )
    filler.unlink()
    again = runner(*arguments)
    assert again.code == 0, again.err
    assert {level["level"]: level["status"] for level in again.document["levels"]} == {
        "Q8_0": "done",
        "Q4_0": "skipped",
        "Q5_K_M": "skipped",
    }
    assert levels_in(workspace) == bare_levels(tools, tiny_model, tiny_imatrix, "Q8_0", "Q4_0", "Q5_K_M")


@pytest.mark.parametrize("free", [400, 1800])
@pytest.mark.parametrize("small_disk", ["8m"], indirect=True)
def test_space_that_others_took_before_the_pass_began(
    free: int, small_disk: Path, tiny_model: Path, tiny_text: Path, tools: BareTools, tmp_path: Path
) -> None:
    """Planned while there was room, and gone when the imatrix was computed, all or (one level still fits) some of it: nothing
    is quantised, and what could be reserved is given back."""
    arguments = ("run", tiny_model, "-f", tiny_text, "-c", "128", "--levels", "Q8_0,Q6_K,Q4_0", "--engine", "embedded")
    arguments += ("--work-dir", small_disk)
    workspace, filler = small_disk / "tiny", small_disk / "filler"
    with started(*arguments, cwd=tmp_path) as running:
        running.wait_for((workspace / "logs" / "imatrix.log").exists)
        filler.write_bytes(bytes(shutil.disk_usage(small_disk).free - (free << 10)))
        done = running.finish()
    assert done.code == 8, done.err
    assert "Error: The disk became full while 3 levels were made." in done.err
    assert levels_in(workspace) == {}
    assert not list((workspace / ".partial").rglob("*.gguf"))
    assert shutil.disk_usage(small_disk).free > (free - 300) << 10
    filler.unlink()
    again = run_command(*arguments, cwd=tmp_path)
    assert again.code == 0, again.err
    assert levels_in(workspace) == bare_levels(tools, tiny_model, workspace / "imatrix.gguf", "Q8_0", "Q6_K", "Q4_0")
    assert leftovers(workspace) == []


@pytest.mark.parametrize("small_disk", ["6m"], indirect=True)
def test_a_disk_that_becomes_full_under_the_pass(
    small_disk: Path, tiny_model: Path, tiny_imatrix: Path, tools: BareTools, tmp_path: Path
) -> None:
    """The levels have their space by then; ledgers, logs and the journal do not."""
    arguments = ("quantize", tiny_model, "--imatrix", tiny_imatrix, "--levels", "IQ2_S,Q8_0,Q6_K", "--engine", "embedded")
    arguments += ("--work-dir", small_disk)
    workspace, filler = small_disk / "tiny", small_disk / "filler"
    with started(*arguments, cwd=tmp_path) as running:
        running.wait_for(lambda: len(list((workspace / ".partial").glob("*/ledger.jsonl"))) == 3)
        with pytest.raises(OSError, match="No space left"), filler.open("wb", buffering=0) as handle:  # noqa: PT012
            while True:
                handle.write(bytes(4096))
        done = running.finish()
    assert done.code == 8, done.err
    assert "Free some space" in done.err
    assert "Traceback" not in done.err
    filler.unlink()
    again = run_command(*arguments, cwd=tmp_path)
    assert again.code == 0, again.err
    assert levels_in(workspace) == bare_levels(tools, tiny_model, tiny_imatrix, "IQ2_S", "Q8_0", "Q6_K")
    assert leftovers(workspace) == []


def bare_levels(tools: BareTools, model: Path, imatrix: Path, *levels: str) -> dict[str, str]:
    """What llama-quantize makes of them."""
    return {name: quantized(tools, model, name, imatrix=imatrix).digests[0] for name in levels}


@pytest.mark.parametrize("small_disk", ["6m"], indirect=True)
def test_a_disk_that_becomes_full_ends_the_run_and_the_same_command_continues(
    small_disk: Path, tiny_model: Path, tiny_imatrix: Path, runner: RunCommand, tools: BareTools, tmp_path: Path
) -> None:
    """Another program takes all that is left just before llama-quantize writes the second level."""
    filler = small_disk / "filler"
    fill = f'if [ "$type" = Q4_0 ]; then dd if=/dev/zero of={filler} bs=4k 2>/dev/null; fi'
    fake = fake_tools(tools.toolchain, tmp_path / "fake", llama_quantize=WORK_ONLY + fill)
    arguments = ("quantize", tiny_model, "--imatrix", tiny_imatrix, "--levels", "Q8_0,Q4_0", "--jobs", "1")
    arguments += ("--engine", "binaries", "--work-dir", small_disk)
    done = runner(*arguments, "--llama-cpp", fake)
    assert done.code == 8
    assert "Error: The disk became full while Q4_0 was made." in done.err
    assert "KiB needed, 0 B free at" in done.err.replace("MiB", "KiB")
    assert "Free some space" in done.err
    assert "Traceback" not in done.err
    workspace = small_disk / "tiny"
    assert levels_in(workspace).keys() == {"Q8_0"}
    assert leftovers(workspace) == []
    filler.unlink()
    again = runner(*arguments)
    assert again.code == 0, again.err
    assert "1 made, 1 was up to date" in again.out
    assert levels_in(workspace) == bare_levels(tools, tiny_model, tiny_imatrix, "Q8_0", "Q4_0")


@pytest.mark.parametrize("small_disk", ["2m"], indirect=True)
def test_a_disk_that_becomes_full_under_the_imatrix(
    small_disk: Path, tiny_model: Path, tiny_text: Path, runner: RunCommand, tools: BareTools, tmp_path: Path
) -> None:
    """llama-imatrix ignores that it cannot write and ends with 0; its torn file must not count."""
    filler = small_disk / "filler"
    fill = f'case "$out" in *-000008.gguf) dd if=/dev/zero of={filler} bs=4k 2>/dev/null;; esac'
    fake = fake_tools(tools.toolchain, tmp_path / "fake", llama_imatrix=WORK_ONLY + fill)
    arguments = ("imatrix", "generate", tiny_model, "-f", tiny_text, "-c", "128", "-b", "512", "--chunks", "12")
    arguments += ("--output-frequency", "4", "--engine", "binaries", "--work-dir")
    done = runner(*arguments, small_disk, "--llama-cpp", fake)
    assert done.code == 8
    assert "Not enough disk space for the imatrix" in done.err
    assert " needed, 0 B free at" in done.err
    assert not (small_disk / "tiny" / "imatrix.gguf").exists()
    filler.unlink()
    again = runner(*arguments, small_disk)
    assert again.code == 0, again.err
    assert "4 chunks kept" in again.err
    assert runner(*arguments, "work").code == 0
    assert digest(small_disk / "tiny" / "imatrix.gguf") == digest(tmp_path / "work" / "tiny" / "imatrix.gguf")


@pytest.mark.parametrize("small_disk", ["300k"], indirect=True)
def test_a_disk_that_becomes_full_under_llama_perplexity_s_reference(
    small_disk: Path, tiny_model: Path, tiny_text: Path, tools: BareTools
) -> None:
    """It does not look whether what it writes is written, and ends with 0."""
    options = CollectOptions(n_ctx=64, n_batch=64, threads=1)
    job = ReferenceJob("refer", tiny_model, tiny_text, ChunkRange(0, 20), small_disk / "reference.logits", options, "of", None)
    with pytest.raises(NoSpaceError, match="the disk became full"):
        BinariesEngine(tools.toolchain, Runner()).make_reference(job, ignore)
    assert list(small_disk.iterdir()) == []


def test_a_work_directory_that_is_read_only(tiny_model: Path, runner: RunCommand, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    with mounted(tmp_path / "read-only", "--bind", str(source)) as point:
        subprocess.run(["mount", "-o", "remount,ro,bind", point], check=True)
        done = runner("quantize", tiny_model, "--levels", "Q4_0", "--work-dir", point)
        assert done.code == 6
        assert "Read-only file system" in done.err
        assert "choose a writable place with --work-dir" in done.err
        assert "Traceback" not in done.err
        dry = runner("quantize", tiny_model, "--levels", "Q4_0", "--work-dir", point, "--dry-run")
        assert dry.code == 0


@pytest.mark.parametrize("place", ["work", "work/tiny", "work/tiny/logs", "work/tiny/journal.json"])
def test_something_lies_where_we_must_write(place: str, tiny_model: Path, runner: RunCommand, tmp_path: Path) -> None:
    way = tmp_path / place
    way.parent.mkdir(parents=True, exist_ok=True)
    way.write_text("mine")
    done = runner("quantize", tiny_model, "--levels", "Q4_0")
    assert done.code == (2 if place == "work" else 6)
    assert "Traceback" not in done.err
    assert way.read_text() == "mine"
    assert not list(tmp_path.rglob("*.gguf"))
