"""What people really give to ``calibration build``: every refusal names the place and the remedy, and leaves nothing behind."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from support.command_line import PROGRAM, RunCommand, started
from support.dialogues import dialogues, write_jsonl
from support.in_process import CommandLine
from support.tiny_models import sample_text

LINES = "".join(json.dumps({"text": sample_text(200, seed=number)}) + "\n" for number in range(5))


Write = Callable[[Path], object]

BAD: dict[str, tuple[str, Write, tuple[str, ...]]] = {
    "a broken line": ("d.jsonl", lambda p: p.write_text(LINES + '{"text": "x\n', encoding="utf-8"), ("d.jsonl, line 6",)),
    "no object": ("d.jsonl", lambda p: p.write_text(LINES + "[1]\n", encoding="utf-8"), ("d.jsonl, line 6",)),
    "a missing field": ("d.jsonl", lambda p: p.write_text(LINES + '{"txt": "x"}\n', encoding="utf-8"), ("line 6", "txt")),
    "latin-1": ("t.txt", lambda p: p.write_bytes(b"Stra\xdfe und mehr\n" * 9), ("t.txt", "UTF-8", "iconv")),
    "latin-1 in a line": ("d.jsonl", lambda p: p.write_bytes(LINES.encode() + b'{"text": "Stra\xdfe"}\n'), ("line 6",)),
    "UTF-16": ("t.txt", lambda p: p.write_bytes(sample_text(500).encode("utf-16")), ("t.txt", "UTF-16")),
    "an empty file": ("t.txt", lambda p: p.write_bytes(b""), ("t.txt", "empty")),
    "blank lines only": ("d.jsonl", lambda p: p.write_bytes(b"\n\n\n"), ("d.jsonl",)),
    "a binary file": ("t.txt", lambda p: p.write_bytes(bytes(range(256)) * 9), ("t.txt", "binary")),
    "no Parquet": ("t.parquet", lambda p: p.write_bytes(b"PAR1" + b"x" * 90 + b"PAR1"), ("t.parquet",)),
    "broken JSON": ("t.json", lambda p: p.write_text('[{"text": "' + "x" * 90 + '"}, {', encoding="utf-8"), ("t.json",)),
    "an odd row": ("t.csv", lambda p: p.write_text(f"text,n\n{'x' * 50},1\ny,2,3\n", encoding="utf-8"), ("t.csv, line 3",)),
    "an empty folder": ("folder", lambda p: p.mkdir(), ("folder",)),
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_source_is_refused_with_its_place(what: str, cli: CommandLine, tmp_path: Path) -> None:
    name, write, told = BAD[what]
    write(tmp_path / name)
    before = sorted(path.name for path in tmp_path.iterdir())
    ran = cli("calibration", "build", name, "-o", "out.txt")
    assert ran.code == 6, ran.err
    assert "Traceback" not in ran.err
    assert len([line for line in ran.err.splitlines() if line.startswith(("Error:", "  Why:", "  Do:"))]) == 3
    for part in told:
        assert part in ran.err
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize("what", ["a broken line", "no object", "a missing field", "latin-1 in a line", "an odd row"])
def test_bad_records_are_skipped_and_counted_on_request(what: str, cli: CommandLine, tmp_path: Path) -> None:
    name, write, told = BAD[what]
    write(tmp_path / name)
    ran = cli("calibration", "build", name, "-o", "out.txt", "--skip-bad", "--min-chars", "1", "--json")
    assert ran.code == 0, ran.err
    assert ran.document["sources"][0]["bad"] == 1
    assert told[0] in ran.err


def test_a_role_that_the_template_does_not_know_is_told_in_the_template_s_words(
    cli: CommandLine, chat_model: Path, tmp_path: Path
) -> None:
    rows = dialogues(5)
    rows[3]["messages"][0]["role"] = "narrator"
    write_jsonl(tmp_path / "d.jsonl", rows)
    ran = cli("calibration", "build", "d.jsonl", "-o", "out.txt", "--model", chat_model)
    assert ran.code == 6
    assert "d.jsonl, line 4" in ran.err
    assert "no such role: narrator" in ran.err
    ran = cli("calibration", "build", "d.jsonl", "-o", "out.txt", "--model", chat_model, "--skip-bad", "--json")
    assert ran.code == 0, ran.err
    assert [(source["bad"], source["documents"]) for source in ran.document["sources"]] == [(1, 4)]


@pytest.mark.parametrize(
    ("template", "told"),
    [
        ("{% for m in messages %}{{ m.content }}", "line 1"),
        ("{{ messages[99].content.x }}", "d.jsonl, line"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "t.jinja"),
        ("", "template"),
    ],
    ids=["syntax", "undefined", "hostile", "empty"],
)
def test_a_template_that_fails_is_told(template: str, told: str, cli: CommandLine, chat_model: Path, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "d.jsonl", dialogues(3))
    (tmp_path / "t.jinja").write_text(template, encoding="utf-8")
    command = ("calibration", "build", "d.jsonl", "-o", "out.txt", "--model", chat_model)
    ran = cli(*command, "--chat-template-file", "t.jinja")
    assert ran.code == 6, ran.err
    assert told in ran.err
    assert "Traceback" not in ran.err
    assert not (tmp_path / "out.txt").exists()


def test_dialogues_longer_than_the_budget_are_left_out_and_said(cli: CommandLine, chat_model: Path, tmp_path: Path) -> None:
    rows = [*dialogues(6), {"messages": [{"role": "user", "content": sample_text(9000)}]}]
    write_jsonl(tmp_path / "d.jsonl", rows)
    command = ("calibration", "build", "d.jsonl", "-o", "out.txt", "--model", chat_model, "--json")
    ran = cli(*command, "--tokens", "1500")
    assert ran.code == 0, ran.err
    assert ran.document["sources"][0]["long"] == 1
    assert "1 dialogue is longer than the budget" in ran.err
    write_jsonl(tmp_path / "d.jsonl", rows[-1:])
    ran = cli(*command[:4], "other.txt", *command[5:], "--tokens", "1500")
    assert ran.code == 6
    assert "longer than the budget of 1500 tokens" in ran.err


def test_a_plain_document_longer_than_the_budget_is_cut_at_a_word(cli: CommandLine, chat_model: Path, tmp_path: Path) -> None:
    text = " ".join(sample_text(30_000).split())
    write_jsonl(tmp_path / "t.jsonl", [{"text": text}])
    ran = cli("calibration", "build", "t.jsonl", "-o", "out.txt", "--model", chat_model, "-c", "128", "--chunks", "4", "--json")
    assert ran.code == 0, ran.err
    assert ran.document["chunks"] == 4
    assert ran.document["sources"][0]["cut"] == 1
    built = (tmp_path / "out.txt").read_text(encoding="utf-8").strip()
    assert text.startswith(built + " ")


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_ctrl_c_ends_a_long_build_and_leaves_nothing(chat_model: Path, tmp_path: Path) -> None:
    with (tmp_path / "big.jsonl").open("w", encoding="utf-8") as handle:
        for number in range(60_000):
            handle.write(json.dumps({"text": f"{number} " + "lorem ipsum dolor sit amet " * 60}) + "\n")
    budget = ("--model", chat_model, "--chunks", "50")
    with started("calibration", "build", "big.jsonl", "-o", "out.txt", *budget, cwd=tmp_path, program=PROGRAM) as running:
        assert running.process.stderr is not None
        assert running.process.stderr.readline().decode().startswith("reading")
        running.process.send_signal(signal.SIGINT)
        ran = running.finish(60)
    assert ran.code == 130, ran.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["big.jsonl"]


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells the peak")
def test_a_large_source_takes_little_memory(runner: RunCommand, chat_model: Path, tmp_path: Path) -> None:
    """180 MB of JSON lines; the same bound holds for gigabytes, as a reservoir holds what the budget needs."""
    with (tmp_path / "big.jsonl").open("w", encoding="utf-8") as handle:
        for number in range(110_000):
            handle.write(json.dumps({"text": f"{number} " + sample_text(40, seed=number % 97) * 40}) + "\n")
    code = (
        "import resource, sys; from imatrix_runner.cli.main import run_cli; code = run_cli(sys.argv[1:]);"
        # ru_maxrss of the process itself would begin with what pytest took when it forked.
        "own = int(open('/proc/self/status').read().partition('VmHWM:')[2].split()[0]);"
        "peak = max(own, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss);"
        "print('PEAK', peak // 1024, file=sys.stderr); sys.exit(code)"
    )
    command = ("calibration", "build", "big.jsonl", "-o", "out.txt", "--model", chat_model, "--chunks", "60")
    with started(*command, cwd=tmp_path, program=(sys.executable, "-c", code)) as running:
        ran = running.finish(240)
    assert ran.code == 0, ran.err
    peak = int(ran.err.rpartition("PEAK ")[2])
    assert 50 < peak < 500
