"""What returns from workers of a pass that do not see its outputs."""

from __future__ import annotations

from pathlib import Path

from imatrix_runner.cluster.spread_pass import ReturnedPairs
from imatrix_runner.engines.files.ledger import VERSION, Ledger, LedgerHead, part_ledgers, read
from imatrix_runner.engines.jobs import LEDGER_NAME, PassLevel, QuantizeJob, QuantizeOptions
from imatrix_runner.engines.pass_parts import LedgerEntry, WrittenPair


def test_what_returns_in_blocks_is_written_at_its_places_and_recorded(tmp_path: Path) -> None:
    """Two pairs, one of them in two levels, whose content comes cut anywhere; a third lies in the output already."""
    head = LedgerHead(VERSION, "lineage", "print", 32)
    levels = []
    for name in ("A", "B"):
        out = tmp_path / name / "m.gguf"
        out.parent.mkdir()
        out.write_bytes(bytes(100))
        Ledger(out.parent / LEDGER_NAME, head).close()
        job = QuantizeJob("", tmp_path / "source", out, name, QuantizeOptions(), None, None, None)
        levels.append(PassLevel(name, job, (), "print"))
    first = WrittenPair({"A": entry("t", 10, 30), "B": entry("t", 50, 30)}, 0)
    second = WrittenPair({"B": entry("u", 20, 25)}, 30)
    content = bytes(range(1, 56))
    returned = ReturnedPairs(levels)
    returned.take([first, second], [(place, content[place : place + 7]) for place in range(0, len(content), 7)])
    returned.take([WrittenPair({"A": entry("v", 60, 10)})], [])
    assert part_ledgers(tmp_path / "A") == []  # recorded together, from time to time
    returned.record()
    a, b = ((tmp_path / name / "m.gguf").read_bytes() for name in ("A", "B"))
    assert a == bytes(10) + content[:30] + bytes(60)
    assert b == bytes(20) + content[30:] + bytes(5) + content[:30] + bytes(20)
    (ledger,) = part_ledgers(tmp_path / "A")
    assert read(ledger) == (head, {"t": entry("t", 10, 30), "v": entry("v", 60, 10)})


def entry(tensor: str, offset: int, n_bytes: int) -> LedgerEntry:
    return LedgerEntry(tensor, "q4_0", "", 0, offset, n_bytes, 7)
