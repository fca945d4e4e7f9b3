"""``imatrix stats`` as typed: table, JSON, CSV, order, one layer, and what it refuses."""

from __future__ import annotations

import csv
import io
import math
import re
import struct
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest

from imatrix_runner.imatrix.formats import write_gguf
from support.command_line import Ran
from support.in_process import CommandLine
from support.values import entry, matrix

KEYS = ["layer", "tensor", "sum", "min", "max", "mean", "sigma", "active", "n", "entropy", "entropy_norm", "zd", "cosine"]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Two layers with a mixture of experts, one of them untouched; one tensor without data; one outside the blocks."""
    path = tmp_path / "imatrix.gguf"
    entries = {
        "blk.0.attn_q.weight": entry([1, 1, 2, 4], 1),
        "blk.1.attn_q.weight": entry([40, 40, 80, 160], 10),
        "blk.1.attn_v.weight": entry([0, 0], 0),
        "blk.1.ffn_up_exps.weight": entry([[2, 4], [0, 0], [30, 50]], [2, 0, 10]),
        "output.weight": entry([100, 100], 1),
    }
    write_gguf(matrix(entries), path)
    return path


class Stats:
    """``stats(file)`` runs ``imatrix stats FILE``, checks its exit code and gives what it said."""

    def __init__(self, cli: CommandLine) -> None:
        self._cli = cli

    def __call__(self, *arguments: str | Path, code: int = 0) -> Ran:
        ran = self._cli("imatrix", "stats", *arguments)
        assert ran.code == code, ran.err
        return ran

    def document(self, *arguments: str | Path, code: int = 0) -> dict[str, Any]:
        return self(*arguments, "--json", code=code).document


@pytest.fixture
def stats(cli: CommandLine) -> Stats:
    return Stats(cli)


def rows_below(out: str, title: str) -> list[str]:
    """The rows of the table of that title, with one blank between cells."""
    lines = [" ".join(line.split()) for line in out.split(title, 1)[1].splitlines()[2:]]
    return list(takewhile(re.compile(r"(-|\d+) ").match, lines))


def test_the_tables_begin_with_the_strongest_signal(file: Path, stats: Stats) -> None:
    ran = stats(file)
    out = ran.out
    assert out.splitlines()[0] == f"{file}: GGUF, 5 entries, 2 chunks of 64 tokens, text.txt"
    assert rows_below(out, "Tensors, by sum")[:3] == [
        "- output 200.00 100.0000 100.0000 100.00 0.00 100.00% 2 1.0000 100.00% 0.00% 0.0000",
        "1 attn_q 32.00 4.0000 16.0000 8.00 4.90 100.00% 4 1.7500 87.50% 25.00% 1.0000",
        "1 ffn_up_exps 11.00 1.0000 5.0000 2.75 1.48 100.00% 4 1.7899 89.50% 25.00% 0.0000",
    ]
    assert rows_below(out, "Layers") == ["0 1 4 8.00 25.0000% 0.0000", "1 2 8 21.50 25.0000% 0.5000"]
    assert rows_below(out, "Experts, in tokens") == ["1 ffn_up_exps 3 1 0 2 10"]
    assert "Without any data: blk.1.attn_v.weight" in out
    assert ran.err == ""


def test_every_column_is_explained_unless_quiet(file: Path, stats: Stats) -> None:
    out = stats(file).out
    for heading in ("Σ(Act²)", "σ", "Active", "E(norm)", "ZD", "CosSim", "μCosSim", "Untouched"):
        assert any(line.startswith(f"  {heading} ") for line in out.splitlines()), heading
    assert "  CosSim " not in stats(file, "-q").out.replace("μCosSim", "")


def test_a_narrow_terminal_gets_whole_columns_and_the_names_of_the_others(
    file: Path, stats: Stats, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("imatrix_runner.cli.views.console._PIPE_WIDTH", 80)
    out = stats(file, "--sort", "min").out
    assert "Too narrow a terminal to show " in out
    heading = out.splitlines()[2].split()
    assert {"Min", "Σ(Act²)", "CosSim"} <= set(heading)
    assert "Entropy" not in heading
    assert "…" not in out
    assert max(len(line.rstrip()) for line in out.splitlines()[1:]) <= 80


def test_json_is_one_versioned_document(file: Path, stats: Stats) -> None:
    document = stats.document(file)
    assert (document["schema"], document["version"], document["exit_code"]) == ("imatrix-runner/imatrix-stats", 1, 0)
    assert document["imatrix"] == {
        "path": str(file),
        "format": "gguf",
        "entries": 5,
        "chunks": 2,
        "chunk_size": 64,
        "datasets": ["text.txt"],
    }
    assert list(document["columns"]) == KEYS
    assert [list(row) for row in document["tensors"]] == [["name", *KEYS]] * 4
    assert document["tensors"][0]["layer"] is None
    assert document["tensors"][1] == {
        "name": "blk.1.attn_q.weight",
        "layer": 1,
        "tensor": "attn_q",
        "sum": 32,
        "min": 4,
        "max": 16,
        "mean": 8,
        "sigma": pytest.approx(24**0.5),
        "active": 100,
        "n": 4,
        "entropy": 1.75,
        "entropy_norm": 87.5,
        "zd": 25,
        "cosine": pytest.approx(1),
    }
    assert document["layers"][1] == {"layer": 1, "tensors": 2, "n": 8, "sum": 21.5, "zd": 25, "cosine": pytest.approx(0.5)}
    assert document["experts"] == [
        {
            "name": "blk.1.ffn_up_exps.weight",
            "layer": 1,
            "tensor": "ffn_up_exps",
            "experts": 3,
            "without_tokens": 1,
            "fewest": 0,
            "median": 2,
            "most": 10,
        }
    ]
    assert document["without_data"] == ["blk.1.attn_v.weight"]


def test_csv_holds_the_same_figures(file: Path, stats: Stats) -> None:
    out = stats(file, "--csv").out
    assert "\r" not in out
    rows = list(csv.DictReader(io.StringIO(out)))
    assert list(rows[0]) == ["name", *KEYS]
    assert rows[0]["layer"] == ""
    wanted = stats.document(file)["tensors"]
    for row, item in zip(rows, wanted, strict=True):
        assert row["name"] == item["name"]
        assert {key: float(row[key]) for key in KEYS[2:]} == {key: item[key] for key in KEYS[2:]}


@pytest.mark.parametrize("key", KEYS)
def test_any_column_sorts_every_form(file: Path, stats: Stats, key: str) -> None:
    rows = stats.document(file, "--sort", key)["tensors"]
    there = [row[key] for row in rows if row[key] is not None]
    assert there == sorted(there, reverse=key not in ("layer", "tensor"))
    if key == "layer":
        assert rows[-1]["name"] == "output.weight"
    names = [row["name"] for row in rows]
    assert [row["name"] for row in csv.DictReader(io.StringIO(stats(file, "--sort", key, "--csv").out))] == names
    assert [row["name"] for row in stats.document(file, "--sort", key, "--reverse")["tensors"]] == names[::-1]


def test_one_layer_only(file: Path, stats: Stats) -> None:
    document = stats.document(file, "--layer", "1")
    assert {row["layer"] for row in document["tensors"]} == {1}
    assert [row["layer"] for row in document["layers"]] == [1]
    assert (len(document["experts"]), document["without_data"]) == (1, ["blk.1.attn_v.weight"])
    # The layer before still counts for the cosine, though it is not shown.
    assert document["tensors"][0]["cosine"] == pytest.approx(1)
    assert stats.document(file, "--layer", "0")["experts"] == []
    assert "Experts" not in stats(file, "--layer", "0").out


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--csv", "--json"], "exclude each other"),
        (["--layer", "7"], "its layers with data are 0 to 1"),
        (["--layer", "-1"], "--layer"),
        (["--sort", "colour"], "--sort"),
    ],
)
def test_misuse_is_told(file: Path, stats: Stats, options: list[str], told: str) -> None:
    assert told in stats(file, *options, code=2).err


@pytest.mark.parametrize("content", [None, b"", b"no imatrix at all", b"GGUF\x03\x00\x00\x00"])
def test_other_files_are_refused(tmp_path: Path, stats: Stats, content: bytes | None) -> None:
    path = tmp_path / "other"
    if content is not None:
        path.write_bytes(content)
    document = stats.document(path, code=6)
    assert (document["schema"], document["error"]["kind"]) == ("imatrix-runner/error", "invalid-data")


def test_numbers_that_mean_nothing_are_refused(tmp_path: Path, stats: Stats) -> None:
    path = tmp_path / "nan.gguf"
    write_gguf(matrix({"blk.0.attn_q.weight": entry([1, 12345], 1)}), path)
    path.write_bytes(path.read_bytes().replace(struct.pack("<f", 12345), struct.pack("<f", math.nan)))  # we write no NaN
    assert "blk.0.attn_q.weight holds NaN" in stats(path, code=6).err
