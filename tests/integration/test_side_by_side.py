"""A pass with many threads, in several processes of this machine: the same bytes, also when it is stopped between."""

from __future__ import annotations

from pathlib import Path

import pytest

from imatrix_runner.cluster import side_by_side
from imatrix_runner.cluster.spread_pass import PassedShare, SpreadPass
from imatrix_runner.errors import InterruptedRunError
from support.in_process import CommandLine

LEVELS = ("Q4_K_M", "Q8_0")


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Two threads are many, and every tensor is a unit; the result gets the number of processes of each pass."""
    counts: list[int] = []
    cut, spread = side_by_side.cut_units, side_by_side.ProcessWorkers.spread

    def counted(self: side_by_side.ProcessWorkers, *arguments: object) -> None:
        counts.append(self._count)
        spread(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(side_by_side, "THREADS", 1)
    monkeypatch.setattr(side_by_side, "MANY", 2)
    monkeypatch.setattr(side_by_side, "cut_units", lambda works, count: cut(works, count, least=1))
    monkeypatch.setattr(side_by_side.ProcessWorkers, "spread", counted)
    return counts


def test_many_threads_are_several_processes(
    processes: list[int], tiny_model: Path, tiny_imatrix: Path, cli: CommandLine, tmp_path: Path
) -> None:
    """The first run ends after its third unit; the second goes on with what was recorded."""
    words = ("quantize", tiny_model, "--imatrix", tiny_imatrix, "--levels", ",".join(LEVELS), "--json")
    alone = cli(*words, "-t", "1", "--work-dir", tmp_path / "one")
    assert (alone.code, processes) == (0, [])
    many = (*words, "-t", "2", "--work-dir", tmp_path / "many")
    taken: list[int] = []
    take = SpreadPass._take

    def stopping(self: SpreadPass, number: int, result: PassedShare) -> bool:
        taken.append(number)
        if len(taken) == 3:
            raise InterruptedRunError("Stopped", "the test wants it", "Run the command again.")
        return take(self, number, result)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SpreadPass, "_take", stopping)
        assert cli(*many).code == 130
    done = cli(*many)
    assert done.code == 0, done.err
    assert processes == [2, 2]
    for level in LEVELS:
        one, other = (next((tmp_path / folder).rglob(f"*-{level}.gguf")) for folder in ("one", "many"))
        assert one.read_bytes() == other.read_bytes()
    assert not [path for path in (tmp_path / "many").rglob("*") if "ledger-" in path.name or "probe" in path.name]
    wanted, *_ = alone.document["passes"]
    (figures,) = done.document["passes"]
    assert sum(cost["pairs"] for cost in figures["types"]) < sum(cost["pairs"] for cost in wanted["types"])
