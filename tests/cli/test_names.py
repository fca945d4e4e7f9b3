"""File names that are not UTF-8: refused by name before anything is computed, shown as text wherever they are only listed."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from imatrix_runner.errors import InvalidDataError
from imatrix_runner.files import encode_json, readable
from imatrix_runner.journal import VERSION
from support.command_line import PROGRAM, RunCommand
from support.in_process import CommandLine

pytestmark = pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="names of files are Unicode there")
NAME = os.fsdecode(b"caf\xe9")


@pytest.mark.parametrize(
    "arguments",
    [
        ("run", f"{NAME}.gguf", "--levels", "Q4_0"),
        ("run", "m.gguf", "-f", f"{NAME}.txt"),
        ("run", "m.gguf", "--work-dir", NAME, "--json"),
        ("quantize", "m.gguf", "--imatrix", f"{NAME}.dat"),
        ("imatrix", "check", f"{NAME}.dat"),
        ("calibration", "build", f"{NAME}.txt", "-o", "x.txt"),
        ("evaluate", "m.gguf", "--text", f"{NAME}.txt"),
        ("batch", f"{NAME}.yaml"),
        ("audit", f"{NAME}.gguf", "--source", "m.gguf"),
        ("rebuild", f"{NAME}.recipe.json"),
    ],
)
def test_an_argument_that_is_not_utf8_is_named(arguments: tuple[str, ...], cli: CommandLine) -> None:
    done = cli(*arguments)
    assert done.code == 6
    named = next(argument for argument in arguments if NAME in argument)
    assert f"Error: The name {readable(named)} is not UTF-8." in done.err
    assert "caf\\xe9" in done.err
    if "--json" in arguments:
        assert done.document["error"]["what"] == "The name caf\\xe9 is not UTF-8"


def test_a_current_directory_that_is_not_utf8_is_named(
    cli: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / NAME).mkdir()
    monkeypatch.chdir(tmp_path / NAME)
    done = cli("status")
    assert done.code == 6
    assert "caf\\xe9 is not UTF-8" in done.err


def test_what_is_only_listed_is_shown(runner: RunCommand, tmp_path: Path) -> None:
    """In a process of its own: its streams are strict where the test's are not."""
    folder = tmp_path / "work" / NAME
    folder.mkdir(parents=True)
    (folder / "journal.json").write_text(json.dumps({"version": VERSION, "facts": {"levels": "Q4_0"}}), encoding="utf-8")
    plain = runner("status", env={"PYTHONIOENCODING": "utf-8:strict"}, program=PROGRAM)
    assert plain.code == 0
    assert "caf\\udce9" in plain.out
    document = runner("status", "--json", program=PROGRAM).document
    assert document["workspaces"][0]["path"] == "work/caf\\xe9"
    near = runner("run", "caf.gguf", "--json", cwd=tmp_path / "work", program=PROGRAM)
    assert near.code == 6, near.err


def test_no_stored_document_takes_half_a_character() -> None:
    with pytest.raises(InvalidDataError, match=r"caf.xe9 is not UTF-8"):
        encode_json({"path": NAME})
    assert readable("a\ud800b\udce9") == "a\\x00b\\xe9"
