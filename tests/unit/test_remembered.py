"""What took time to find out is kept under everything it depends on, and not for ever."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from imatrix_runner.remembered import fact_file, recall, remember


class Number(msgspec.Struct, frozen=True):
    key: str
    value: int


def _key(number: int) -> str:
    return f"{number:064x}"[::-1]


def test_facts_under_several_keys_are_kept_and_the_oldest_go(tmp_path: Path) -> None:
    folder = tmp_path / "facts"
    for number in range(40):
        remember(folder, Number(_key(number), number))
        os.utime(fact_file(folder, _key(number)), (number, number))
    known = [number for number in range(40) if recall(folder, _key(number), Number) == Number(_key(number), number)]
    assert len(known) == 32
    assert 39 in known
    assert 0 not in known


def test_what_is_damaged_or_of_another_key_is_not_believed(tmp_path: Path) -> None:
    remember(tmp_path, Number(_key(1), 1))
    fact_file(tmp_path, _key(1)).write_text('{"key": "other", "value": 1}', encoding="utf-8")
    assert recall(tmp_path, _key(1), Number) is None
    fact_file(tmp_path, _key(1)).write_text('{"key"', encoding="utf-8")
    assert recall(tmp_path, _key(1), Number) is None
    assert recall(tmp_path / "none", _key(1), Number) is None


def test_a_folder_that_cannot_be_written_to_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    remember(tmp_path / "file", Number(_key(1), 1))
