"""Make ``tests/stored/COMMIT/workspace.tar.xz``: what an earlier version leaves when it is killed at four places.

    git worktree add ../earlier COMMIT && python -m venv ../earlier/.venv && ../earlier/.venv/bin/pip install ../earlier
    .venv/bin/python scripts/store_workspace.py --program ../earlier/.venv/bin/imatrix-runner --out workspace.tar.xz

The commands are those of ``tests/support/stored_workspace.py``, which continues what is made here. First they run undisturbed,
to know what everything must come to; then again, each killed where it has done a part. A moment that was missed (a tiny model
takes milliseconds) is tried again. Logs are left out: they name this machine, and nothing continues from them.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
import tarfile
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from gguf import GGUFReader

from support.command_line import Running, run_command, started, wait_gone
from support.llama_tools import digest, levels_in
from support.stored_workspace import (
    CHUNKS,
    COLLECTED,
    EVALUATE,
    EXPECTED,
    FINISHED,
    GENERATE,
    HELD_OUT,
    MODEL,
    RUN_ALL,
    RUN_FINISHED,
    TEXT,
    UNFINISHED,
    encoded,
    ledgers,
    scored_chunks,
    sha256,
)
from support.tiny_models import sample_text, write_llama_gguf

ATTEMPTS = 40
TENSORS = 21
"""Of the model: nine of each of two layers, the embeddings, the output and its norm."""
LEFT_OUT = (".owner.json", ".lock", "report.html")
"""Files that serve a living process; and a page that holds a megabyte of a library for charts, and is only ever made again."""

Command = tuple[str, ...]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", type=Path, required=True, help="imatrix-runner of the earlier version")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    program = (str(options.program.absolute()),)
    with tempfile.TemporaryDirectory() as scratch:
        quiet, half = Path(scratch, "quiet"), Path(scratch, "half")
        for folder in (quiet, half):
            write_inputs(folder)
        for command in (RUN_FINISHED, EVALUATE, RUN_ALL, GENERATE):
            finish(program, command, quiet)
        leave_half(program, half)
        shutil.copy(quiet / "collecting" / "tiny" / "imatrix.gguf", half / COLLECTED)
        (half / EXPECTED).write_text(json.dumps(expected(quiet, half), indent=1) + "\n", encoding="utf-8")
        pack(half, options.out)


def write_inputs(folder: Path) -> None:
    """A model of 115,000 weights, small enough to be stored, and two texts that have nothing in common."""
    folder.mkdir()
    write_llama_gguf(folder / MODEL, hidden=64, ff=128, vocab=288, fluent=True)
    (folder / TEXT).write_text(sample_text(12_000), encoding="utf-8")
    (folder / HELD_OUT).write_text(sample_text(3_000, seed=5), encoding="utf-8")


def finish(program: Command, command: Command, folder: Path) -> None:
    done = run_command(*command, cwd=folder, program=program)
    if done.code:
        raise SystemExit(f"{' '.join(command)} ended with {done.code}:\n{done.err}")


def leave_half(program: Command, folder: Path) -> None:
    """Levels that are finished, then a measurement, a pass and a collection that are not."""
    root, parts = folder / "work" / "tiny", folder / "collecting" / "tiny" / ".imatrix-parts"
    finish(program, RUN_FINISHED, folder)

    def measuring() -> bool:
        return 0 < scored_chunks(root, FINISHED[-1]) < CHUNKS

    def quantizing() -> bool:
        recorded = [len(lines) for lines in ledgers(root).values()]
        return len(recorded) == len(UNFINISHED) and all(0 < count < TENSORS for count in recorded)

    def collecting() -> bool:
        return (parts / "checkpoint.gguf").exists() and any(parts.glob("*.partial"))

    kill_at(program, EVALUATE, folder, measuring, lambda running: running.wait_for(measuring))
    kill_at(program, RUN_ALL, folder, quantizing, lambda running: record_at_once(running, root))
    kill_at(program, GENERATE, folder, collecting, lambda running: orphan(running, parts))


def kill_at(
    program: Command, command: Command, folder: Path, reached: Callable[[], bool], wait: Callable[[Running], None]
) -> None:
    """Start ``command`` and kill it after ``wait``, from the same beginning until it was ``reached``."""
    before = folder.with_name("before")
    shutil.copytree(folder, before)
    for _ in range(ATTEMPTS):
        with started(*command, cwd=folder, program=program) as running:
            try:
                wait(running)
            except AssertionError:
                pass  # it ended first
            else:
                running.kill_tree()
        if reached():
            shutil.rmtree(before)
            return
        shutil.rmtree(folder)
        shutil.copytree(before, folder)
    raise SystemExit(f"{' '.join(command)} was killed {ATTEMPTS} times, and never at the right moment")


def record_at_once(running: Running, root: Path) -> None:
    """Run the pass in slices of a millisecond until it has written a little, hold it until the second is over after which the
    worker records what it finished, and go on in slices until it has: it computes everything in less than a second."""
    halves = [root / ".partial" / level / f"tiny-{level}.gguf" for level in UNFINISHED]
    running.wait_for((root / ".partial").exists)
    run_in_slices(running, lambda: all(half.exists() and written(half) > 0.25 for half in halves))
    time.sleep(1.5)
    run_in_slices(running, lambda: all(ledgers(root).values()))


def written(half: Path) -> float:
    """About how much of an output is there, 0 to 1: its space is reserved with zeros before anything is written."""
    data = half.read_bytes()
    return 1 - data.count(0) / len(data)


def run_in_slices(running: Running, reached: Callable[[], bool]) -> None:
    """Leave the worker suspended where ``reached`` holds."""

    def step() -> bool:
        for worker in running.descendants():
            worker.resume()
            time.sleep(0.001)
            worker.suspend()
        return reached()

    running.wait_for(step)


def orphan(running: Running, parts: Path) -> None:
    """Kill the command alone, in the second range: its worker then leaves the batches of an unfinished range."""
    running.wait_for((parts / "checkpoint.gguf").exists)
    wait_gone(running.kill_alone())


def expected(quiet: Path, half: Path) -> dict[str, Any]:
    """What undisturbed runs came to, and what hashes in the workspace that name the engine were made of."""
    root = quiet / "work" / "tiny"
    steps = json.loads((root / "journal.json").read_text(encoding="utf-8"))["steps"]
    return {
        "engine": {
            "identity": steps[f"level-{FINISHED[0]}"]["inputs"]["engine"],
            "arithmetic": steps["imatrix"]["inputs"]["engine"],
        },
        "levels": levels_in(root),
        "matrix": digest(root / "imatrix.gguf"),
        "collected": digest(quiet / "collecting" / "tiny" / "imatrix.gguf"),
        "measured": {level: steps[f"evaluate {level}"]["facts"]["divergence"] for level in FINISHED},
        "ledgers": {level: ledger_text(level, steps[f"level-{level}"], root, half) for level in (*FINISHED, *UNFINISHED)},
        "checkpoint": sums_checksum(half / "collecting" / "tiny" / ".imatrix-parts" / "checkpoint.gguf"),
    }


def ledger_text(level: str, record: dict[str, Any], root: Path, half: Path) -> str:
    """What the fingerprint in a level's ledger is the SHA-256 of: its inputs, the imatrix's name, the types of its tensors."""
    tensors = [
        {"name": tensor.name, "original": tensor.name, "type": tensor.tensor_type.name}
        for tensor in GGUFReader(root / f"tiny-{level}.gguf").tensors
    ]
    text = encoded([dict(sorted(record["inputs"].items())), "imatrix.gguf", tensors])
    workspace = half / "work" / "tiny"
    files = (workspace / ".ledgers" / f"{level}.jsonl", workspace / ".partial" / level / "ledger.jsonl")
    (file,) = (path for path in files if path.exists())
    if json.loads(file.read_bytes().splitlines()[0])["fingerprint"] != f"sha256:{sha256(text)}":
        raise SystemExit(f"The fingerprint of {level} is of something else than {text}")
    return text


def sums_checksum(checkpoint: Path) -> int:
    """The CRC-32 of a checkpoint's sums and counts, to which that of its state is added."""
    reader = GGUFReader(checkpoint)
    arrays = {tensor.name: tensor.data for tensor in reader.tensors}
    checksum = 0
    for name in sorted(name.removesuffix(".in_sum2") for name in arrays if name.endswith(".in_sum2")):
        checksum = zlib.crc32(name.encode(), checksum)
        for array in (arrays[f"{name}.in_sum2"], arrays[f"{name}.counts"]):
            checksum = zlib.crc32(array.tobytes(), checksum)
    return checksum


def pack(folder: Path, out: Path) -> None:
    """The same files give the same archive but for their times."""

    def entry(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
        name = Path(member.name)
        if "logs" in name.parts or name.name in LEFT_OUT:
            return None
        member.uid = member.gid = 0
        member.uname = member.gname = ""
        return member

    with tarfile.open(out, "w:xz", preset=9) as archive:
        for path in sorted(folder.iterdir()):
            archive.add(path, path.name, filter=entry)
    print(f"{out}: {out.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    main()
