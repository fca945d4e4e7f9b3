"""The half-finished workspace of an earlier version, unpacked as a new version finds it on another machine.

``tests/stored/`` holds it; the README there lists what it contains, how it was made and what is rewritten here. This module
imports nothing of the program: it decodes and encodes what the earlier version wrote by itself, so that a change of the program
cannot change what the tests expect.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import re
import struct
import tarfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support.command_line import run_command

ARCHIVE = Path(__file__).resolve().parent.parent / "stored" / "0db9d49" / "workspace.tar.xz"
EXPECTED = "expected.json"
"""What undisturbed runs of the earlier version ended with, and what its hashes were made of."""

MODEL, TEXT, HELD_OUT = "tiny-BF16.gguf", "calibration.txt", "held-out.txt"
COLLECTED = "collected.gguf"
"""The matrix of an undisturbed :data:`GENERATE`."""

FINISHED, UNFINISHED = ("Q8_0", "Q4_0"), ("Q5_1", "IQ4_NL")
CHUNKS = 8
"""Chunks that levels are measured on."""

_ENGINE = ("--engine", "embedded", "-t", "1")
_CHUNKS = ("-c", "64", "-b", "256", "-ub", "256")
RUN = ("run", MODEL, "-f", TEXT, *_CHUNKS, "--chunks", "16", "--kernels", "ggml", *_ENGINE)
RUN_FINISHED = (*RUN, "--levels", ",".join(FINISHED))
RUN_ALL = (*RUN, "--levels", ",".join((*FINISHED, *UNFINISHED)))
EVALUATE = ("evaluate", MODEL, "--text", HELD_OUT, "--levels", ",".join(FINISHED), "--chunks", str(CHUNKS))
EVALUATE = (*EVALUATE, "-c", "64", "-b", "128", "-ub", "128", *_ENGINE)
GENERATE = ("imatrix", "generate", MODEL, "-f", TEXT, *_CHUNKS, "--chunks", "64", "--output-frequency", "16")
GENERATE = (*GENERATE, *_ENGINE, "--work-dir", "collecting")
"""A second matrix, in a workspace of its own: a run that finds its matrix finished clears away an unfinished one."""

_IDENTITY = re.compile(r"llama-cpp-python \S+ \(ggml \S+ \S+, libraries [0-9a-f]{8}\)")
_STATE = "imatrix_runner.checkpoint"
_TAIL = struct.Struct("<12sI")


@dataclass(frozen=True)
class Engine:
    """What computed, as fingerprints name it: ``identity`` in those of levels; ``arithmetic``, with everything else that sums
    depend on, in those of matrices and measurements."""

    identity: str
    arithmetic: str


@dataclass(frozen=True)
class Stored:
    """The unpacked archive: the directory in which the commands of this module continue it, and what they must come to."""

    folder: Path
    expected: Mapping[str, Any]

    @property
    def root(self) -> Path:
        """The workspace with a finished matrix and levels, an unfinished pass, an unfinished measurement, and a report."""
        return self.folder / "work" / "tiny"

    @property
    def collecting(self) -> Path:
        """The workspace with an unfinished matrix."""
        return self.folder / "collecting" / "tiny"

    def steps(self) -> dict[str, Any]:
        """The records of the journal of :attr:`root`, by step."""
        steps: dict[str, Any] = _json(self.root / "journal.json")["steps"]
        return steps


def unpack(folder: Path, engine: Engine) -> Stored:
    """Unpack the archive into ``folder``, and make it name ``engine`` instead of the one it was made with."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    expected = _json(folder / EXPECTED)
    stored = Stored(folder, expected)
    _rename(stored, Engine(**expected["engine"]), engine)
    # Nothing is finished in this one, and then a journal of the earlier version knows its model by its path alone.
    journal = stored.collecting / "journal.json"
    model = json.dumps(_json(journal)["facts"]["source"])
    journal.write_text(journal.read_text(encoding="utf-8").replace(model, json.dumps(str(folder / MODEL))), encoding="utf-8")
    return stored


def ledgers(root: Path) -> dict[str, list[dict[str, Any]]]:
    """What is on the disk of each unfinished level: the lines of its ledger, but for the first, which says what it is of."""
    found = sorted((root / ".partial").glob("*/ledger.jsonl"))
    return {path.parent.name: [json.loads(line) for line in path.read_bytes().splitlines()[1:]] for path in found}


def scored_chunks(root: Path, name: str) -> int:
    """Whole chunks of a file of scored tokens."""
    file = root / ".evaluation" / f"{name}.scored"
    return max(0, file.stat().st_size - 32) // (31 * 24 + 4) if file.exists() else 0


def encoded(value: Any) -> str:
    """A value as the earlier version wrote it before it was hashed."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def engine_here(model: Path, folder: Path) -> Engine:
    """What computes on this machine, asked for in ``folder`` without making anything."""
    asked = ("run", model, "--imatrix", "none", "--levels", "Q8_0", *_ENGINE, "--dry-run", "--json")
    planned = run_command(*asked, cwd=folder)
    assert planned.code == 0, planned.err
    identity = planned.document["toolchain"]
    assert _IDENTITY.fullmatch(identity), f"earlier versions do not name a library {identity!r}: none of their work continues"
    checks = run_command("doctor", "--offline", "--json", cwd=folder).document["checks"]
    names = [check["name"] for check in checks]
    weights = checks[names.index("weights", names.index("llama-cpp-python"))]  # the programs have such a line, too
    mark = "" if weights["verdict"] == "ok" else ", --no-repack"
    return Engine(identity, f"{identity}, numpy {importlib.metadata.version('numpy')}{mark}")


def _rename(stored: Stored, before: Engine, now: Engine) -> None:
    """Replace what computed, in every place that names it or holds a hash of it. Each hash is first proven to be of what this
    module believes it to be of."""

    def renamed(text: str) -> str:
        return text.replace(before.arithmetic, now.arithmetic).replace(before.identity, now.identity)

    def rehashed(digest: str, text: str) -> str:
        assert digest == sha256(text), f"not the hash of {text}"
        return sha256(renamed(text))

    steps, evaluation = stored.steps(), stored.root / ".evaluation"
    (reference,) = (record for step, record in steps.items() if step.startswith("reference "))
    contents = {level: f"sha256:{steps[f'level-{level}']['outputs'][0]['sha256']}" for level in FINISHED}
    measured = {"source": {}, **{level: {"level file": content} for level, content in contents.items()}}
    for name, inputs in measured.items():
        file = evaluation / f"{name}.scored"
        data = file.read_bytes()
        head = rehashed(data[:32].hex(), encoded({**reference["inputs"], **inputs}))
        file.write_bytes(bytes.fromhex(head) + data[32:])
    lineage = encoded([reference["inputs"]["model file"], before.identity])
    for level, text in stored.expected["ledgers"].items():
        (file,) = (path for path in _ledger_paths(stored.root, level) if path.exists())
        first, rest = file.read_bytes().split(b"\n", 1)
        head = json.loads(first)
        head["lineage"] = "sha256:" + rehashed(head["lineage"].removeprefix("sha256:"), lineage)
        head["fingerprint"] = "sha256:" + rehashed(head["fingerprint"].removeprefix("sha256:"), text)
        file.write_bytes(encoded(head).encode() + b"\n" + rest)
    parts = stored.collecting / ".imatrix-parts"
    state = _rename_checkpoint(parts / "checkpoint.gguf", stored.expected["checkpoint"], renamed)
    (begun,) = parts.glob("*.partial")
    inputs = json.dumps(state["inputs"], sort_keys=True)
    old, new = sha256(inputs), rehashed(sha256(inputs), inputs)
    data = begun.read_bytes()
    assert data.count(old.encode()) == 1, "the unfinished range does not say what it is of"
    begun.write_bytes(data.replace(old.encode(), new.encode()))
    for file in (evaluation / "reference.logits.of", stored.root / "journal.json"):
        file.write_text(renamed(file.read_text(encoding="utf-8")), encoding="utf-8")


def _ledger_paths(root: Path, level: str) -> tuple[Path, Path]:
    return root / ".ledgers" / f"{level}.jsonl", root / ".partial" / level / "ledger.jsonl"


def _rename_checkpoint(path: Path, sums: int, renamed: Callable[[str], str]) -> dict[str, Any]:
    """Rename in the state that a checkpoint carries as metadata, and return the state as it was. Further tensors move if its
    length changes. ``sums``: the checksum before the state is added to it."""
    from gguf import GGUFReader

    reader = GGUFReader(path)
    state, last = reader.fields[_STATE], reader.tensors[-1].field
    at = state.offset + sum(part.nbytes for part in state.parts[:-1])
    header_end = last.offset + sum(part.nbytes for part in last.parts)
    begin, alignment = reader.data_offset, reader.alignment
    before = bytes(state.parts[-1])
    del reader, state, last  # they map the file
    data = path.read_bytes()
    mark, checksum = _TAIL.unpack(data[-_TAIL.size :])
    assert checksum == zlib.crc32(before, sums), "the checksum is not of the sums and the state"
    after = renamed(before.decode()).encode()
    header = data[: at - 8] + struct.pack("<Q", len(after)) + after + data[at + len(before) : header_end]
    tail = _TAIL.pack(mark, zlib.crc32(after, sums))
    path.write_bytes(header + bytes(-len(header) % alignment) + data[begin : -_TAIL.size] + tail)
    found: dict[str, Any] = json.loads(before)
    return found


def _json(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found
