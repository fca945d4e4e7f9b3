"""``evaluate`` ended at any moment and started again with the same command: the figures of one that nobody disturbed."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from imatrix_runner.app.status import list_workspaces
from support.children import is_running
from support.command_line import Ran, run_command, started
from support.evaluations import Place, held_out_text
from support.llama_tools import leftovers, levels_in
from support.mounts import mounted

LEVELS = ("Q8_0", "Q3_K_M")
CHUNKS = 12
COMPUTE = ("-c", "256", "-b", "512", "-ub", "256", "-t", "1")
"""Two chunks side by side: six batches, each saved."""


class Slow(Place):
    """The demo model: a level takes a second."""

    def arguments(self, *further: str | Path, chunks: int | None = CHUNKS, text: bool = True) -> tuple[str | Path, ...]:
        limit = ("--text", self.text, *COMPUTE, "--chunks", str(chunks))
        return ("evaluate", self.model, *limit, *further, "--work-dir", self.work)

    def chunks_of(self, name: str) -> int:
        """Whole chunks of a file of scored tokens."""
        file = self.workspace.evaluation / f"{name}.scored"
        return max(0, file.stat().st_size - 32) // (127 * 24 + 4) if file.exists() else 0

    def reference_bytes(self) -> int:
        file = self.workspace.evaluation / "reference.logits"
        return file.stat().st_size if file.exists() else 0

    def clean(self) -> bool:
        """Nothing half lies about."""
        there = self.workspace.evaluation.iterdir()
        return all(path.suffix == ".scored" for path in there) and set(leftovers(self.root)) <= {".evaluation"}


@pytest.fixture(scope="module")
def made(demo_model: Path, tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Slow:
    folder = tmp_path_factory.mktemp("made")
    place = Slow(folder / "work", demo_model, held_out_text(folder / "held-out.txt", 60))
    arguments = ("-f", tiny_text, "-c", "128", "--chunks", "8", "--levels", ",".join(LEVELS), "--work-dir", place.work)
    done = run_command("run", demo_model, *arguments, cwd=folder)
    assert done.code == 0, done.err
    return place


@pytest.fixture(scope="module")
def quiet(made: Slow, tmp_path_factory: pytest.TempPathFactory) -> tuple[Slow, float]:
    """What comes of it when nobody disturbs it, baselines included, and how long that takes."""
    place = copy(made, tmp_path_factory.mktemp("quiet") / "work")
    began = time.monotonic()
    finish(place, "--ab")
    return place, time.monotonic() - began


@pytest.fixture
def place(made: Slow, tmp_path: Path) -> Slow:
    return copy(made, tmp_path / "work")


def copy(place: Slow, to: Path) -> Slow:
    shutil.copytree(place.work, to)
    return replace(place, work=to)


def finish(place: Slow, *further: str) -> Ran:
    """The same command, undisturbed."""
    done = run_command(*place.arguments(*further), cwd=place.work)
    assert done.code == 0, done.err
    assert place.clean()
    assert not place.workspace.baselines.exists()
    return done


def test_killed_at_random_moments(place: Slow, quiet: tuple[Slow, float]) -> None:
    """The whole tree at once, again and again, each time a part of the whole time further on."""
    expected, seconds = quiet
    chooser = random.Random(9)
    kills = 0
    for _ in range(3):
        with started(*place.arguments("--ab"), cwd=place.work) as running:
            end = time.monotonic() + chooser.uniform(0.2, 0.5) * seconds
            while time.monotonic() < end and running.process.poll() is None:
                time.sleep(0.002)
            kills += running.kill_tree()
    finish(place, "--ab")
    assert kills >= 1  # what is done is not done again, so that later ones may come to an end
    assert place.facts() == expected.facts()
    assert levels_in(place.root) == levels_in(expected.root)


MOMENTS: dict[str, Callable[[Slow], object]] = {
    "the reference grows": lambda place: 0 < place.chunks_of("source") < CHUNKS,
    "the first level is compared": lambda place: 0 < place.chunks_of("Q8_0") < CHUNKS,
    "the second level is compared": lambda place: 0 < place.chunks_of("Q3_K_M") < CHUNKS,
    "baselines are made": lambda place: any(place.workspace.baselines.rglob("*.gguf")),
    "a baseline is compared": lambda place: 0 < place.chunks_of("Q3_K_M-without-imatrix") < CHUNKS,
}


def test_killed_in_each_of_its_phases(place: Slow, quiet: tuple[Slow, float]) -> None:
    """What was scored is kept: each run goes on where the one before was killed."""
    scored = 0
    for name, reached in MOMENTS.items():
        with started(*place.arguments("--ab"), cwd=place.work) as running:
            running.wait_for(lambda reached=reached: reached(place))  # type: ignore[misc]
            assert running.kill_tree(), name
        now = sum(place.chunks_of(each) for each in ("source", *LEVELS))
        assert now >= scored, name
        scored = now
    assert state(place)[0] == "resumable"
    assert state(place)[1].startswith(f"imatrix-runner evaluate {place.model} ")
    finish(place, "--ab")
    assert place.facts() == quiet[0].facts()
    assert {name: count for name, count in place.runs().items() if name in LEVELS} == {"Q8_0": 2, "Q3_K_M": 2}
    assert state(place) == ("done", "")


def state(place: Slow) -> tuple[str, str]:
    """What ``status`` says of it, and the command that continues."""
    (status,) = list_workspaces(place.work)
    return status.state, status.command


def test_killed_between_renames(place: Slow, quiet: tuple[Slow, float]) -> None:
    """Also where a random moment seldom falls: between a record and the next, among the report's files."""
    further = ("--ab", "--levels", "Q3_K_M")
    for turn, count in enumerate((1, 2, 1, 2, *range(3, 20))):
        died = run_command(*place.arguments(*further), cwd=place.work, dies_after=count)
        if died.code == 0:
            break
        assert died.code == -signal.SIGKILL, f"in turn {turn}: {died.err}"
    assert died.code == 0
    assert turn > 5
    expected = {step: facts for step, facts in quiet[0].facts().items() if "Q3_K_M" in step}
    assert place.facts() == expected
    assert place.clean()
    assert (place.root / "report.html").is_file()
    runs = place.runs()
    finish(place, *further)
    assert place.runs() == runs


def test_ctrl_c_finishes_the_batch_and_tells_how_to_continue(place: Slow, quiet: tuple[Slow, float]) -> None:
    with started(*place.arguments(), cwd=place.work) as running:
        running.wait_for(lambda: 0 < place.chunks_of("Q8_0") < CHUNKS)
        children = running.descendants()
        os.kill(running.pid, signal.SIGINT)
        done = running.finish()
    assert done.code == 130
    assert not any(is_running(child.pid) for child in children)
    assert "Error: Stopped by SIGINT." in done.err
    assert f"Continue with: imatrix-runner evaluate {place.model} --text " in done.err
    assert "Traceback" not in done.err
    kept = place.chunks_of("Q8_0")
    assert 0 < kept < CHUNKS
    assert kept % 2 == 0  # whole batches
    finish(place)
    assert place.figures() == quiet[0].figures()


def test_a_worker_that_dies_costs_its_level_and_no_work(place: Slow, quiet: tuple[Slow, float]) -> None:
    """As the kernel's OOM killer would end it: the other level is measured, and the same command goes on with this one."""
    arguments = place.arguments("--json")
    with started(*arguments, cwd=place.work) as running:
        running.wait_for(lambda: 0 < place.chunks_of("Q8_0") < CHUNKS)
        (worker,) = running.descendants()
        worker.kill()
        done = running.finish()
    assert done.code == 100
    failed = done.document["measured"]["failed"]
    assert failed.keys() == {"Q8_0"}
    assert "SIGKILL" in failed["Q8_0"]["why"]
    assert place.figures().keys() == {"Q3_K_M"}
    kept = place.chunks_of("Q8_0")
    assert kept > 0
    finish(place)
    assert place.figures() == quiet[0].figures()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "size=20m", "tmpfs") as point:
        yield point


def test_a_disk_that_becomes_full_ends_it_and_the_same_command_continues(
    made: Slow, small_disk: Path, quiet: tuple[Slow, float]
) -> None:
    """Another program takes all that is left while the reference is written."""
    place, filler = copy(made, small_disk / "work"), small_disk / "filler"
    arguments = place.arguments()
    with started(*arguments, cwd=made.work) as running:
        running.wait_for(lambda: place.reference_bytes() > 100_000)
        with pytest.raises(OSError, match="No space left"), filler.open("wb", buffering=0) as handle:  # noqa: PT012
            while True:
                handle.write(bytes(4096))
        done = running.finish()
    assert done.code == 8, done.err
    assert "Error: The disk became full while levels were measured." in done.err
    assert "then run the same command again: it continues" in done.err
    assert "Traceback" not in done.err
    assert place.figures() == {}
    filler.unlink()
    again = run_command(*arguments, cwd=made.work)
    assert again.code == 0, again.err
    assert place.figures() == quiet[0].figures()
    assert place.clean()
