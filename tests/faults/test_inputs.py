"""Inputs that are wrong, change, or are wanted by two at once."""

from __future__ import annotations

import os
import re
import shutil
import struct
from pathlib import Path

import pytest

from support.command_line import RunCommand, started
from support.in_process import CommandLine
from support.llama_tools import levels_in


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "it is empty"),
        (b" \n\t\n", "it is empty"),
        (b"text\0with a hole" * 100, "it is a binary file (it contains NUL bytes)"),
        ("Ein schöner Tag".encode("latin-1") * 100, "byte 7 is not valid UTF-8"),
        (None, "No such file or directory"),
    ],
    ids=["empty", "blank", "binary", "latin-1", "missing"],
)
def test_a_bad_calibration_text(content: bytes | None, why: str, tiny_model: Path, runner: RunCommand, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    if content is not None:
        text.write_bytes(content)
    done = runner("run", tiny_model, "-f", text, "--levels", "Q4_0")
    assert done.code == 6
    assert why in done.err
    assert "\n  Do:  " in done.err
    assert levels_in(tmp_path / "work" / "tiny") == {}


@pytest.mark.parametrize("options", [("IQ2_XXS", "--pure"), ("Q4_K_M", "--token-embedding-type", "iq2_xs")])
def test_embeddings_of_a_type_that_needs_weights(
    options: tuple[str, ...], tiny_model: Path, runner: RunCommand, tmp_path: Path
) -> None:
    """llama-quantize would abort on them, after hours of generation."""
    done = runner("run", tiny_model, "--levels", *options)
    assert done.code == 6
    assert "weight becomes IQ2_X" in done.err
    todo = "Choose another --token-embedding-type" if "--token-embedding-type" in options else "--uncovered q4_k"
    assert todo in done.err
    assert not (tmp_path / "work" / "tiny" / ".imatrix-parts").exists()


def test_two_runs_at_once(tiny_model: Path, tiny_imatrix: Path, runner: RunCommand, tmp_path: Path) -> None:
    # Its tables take ten seconds: the first still works when the others come.
    arguments = ("quantize", tiny_model, "--imatrix", tiny_imatrix, "--levels", "IQ1_S")
    with started(*arguments, cwd=tmp_path) as first:
        first.wait_for(lambda: (tmp_path / "work" / "tiny" / ".partial").exists())
        second = runner(*arguments)
        assert second.code == 7
        assert f"process {first.pid} on " in second.err
        assert "imatrix-runner quantize" in second.err  # what the other is doing
        dry = runner(*arguments, "--dry-run")  # writes nothing, so it may look
        assert dry.code == 0
        elsewhere = runner("quantize", tiny_model, "--levels", "Q4_0", "--work-dir", "elsewhere")
        assert elsewhere.code == 0
        assert first.finish().code == 0
    assert "1 was up to date" in runner(*arguments).out


@pytest.mark.parametrize("stage", ["imatrix", "levels"])
def test_a_model_that_changes_while_it_is_used(
    stage: str, tiny_model: Path, tiny_text: Path, runner: RunCommand, tmp_path: Path
) -> None:
    model = Path(shutil.copy(tiny_model, tmp_path))
    workspace = tmp_path / "work" / "tiny"
    arguments = ("run", model, "-f", tiny_text, "-c", "128", "-b", "128", "--chunks", "48", "--levels", "IQ3_S")
    arguments += ("--output-frequency", "2")
    with started(*arguments, cwd=tmp_path) as running:
        if stage == "imatrix":
            running.wait_for(lambda: (workspace / ".imatrix-parts" / "checkpoint.gguf").exists())
        else:
            running.wait_for(lambda: any((workspace / ".partial").rglob("*.gguf")))
        os.utime(model)
        done = running.finish()
    assert done.code == 6
    assert "The model file tiny-BF16.gguf changed while it was in use" in done.err
    assert levels_in(workspace) == {}
    again = runner(*arguments)
    assert again.code == 0, again.err
    if stage == "levels":
        assert "made before from the same inputs" in again.err  # the content is the same


def test_a_journal_that_cannot_be_read(tiny_model: Path, runner: RunCommand, tmp_path: Path) -> None:
    journal = tmp_path / "work" / "tiny" / "journal.json"
    journal.parent.mkdir(parents=True)
    journal.write_bytes(b'{"version": 1, "steps": {"lev')
    done = runner("quantize", tiny_model, "--levels", "Q4_0")
    assert done.code == 6
    assert f"{journal} cannot be read" in done.err
    assert "Move it away" in done.err


def test_layers_for_a_gpu_that_is_not_there(tiny_model: Path, runner: RunCommand, toolchain: object) -> None:
    if getattr(toolchain, "devices", ()):
        pytest.skip("these tools see a GPU")
    done = runner("run", tiny_model, "-ngl", "99", "--levels", "Q4_0", "--dry-run")
    assert done.code == 0
    assert re.search(r"Warning: -ngl 99 has no effect: llama-cpp-python sees no GPU", done.err)


@pytest.mark.parametrize("engine", ["embedded", "binaries"])
def test_weights_that_do_not_fit_the_metadata_are_named(
    engine: str, tiny_model: Path, tiny_text: Path, cli: CommandLine, tmp_path: Path
) -> None:
    """As a merge leaves them whose configuration is another model's: llama.cpp's own line is the reason."""
    key, size = b"llama.feed_forward_length", struct.pack("<I", 4)
    data = tiny_model.read_bytes()
    at = data.index(key) + len(key) + len(size)
    model = tmp_path / "merged.gguf"
    model.write_bytes(data[:at] + struct.pack("<I", 384) + data[at + 4 :])
    done = cli("run", model, "--engine", engine, "-f", tiny_text, "-c", "64", "-b", "64", "--levels", "Q8_0")
    assert done.code == 6, done.err
    assert re.search(r"blk\.0\.ffn_\w+\.weight has the shape [\d, ]+, but the model's own metadata requires [\d, ]+", done.err)
    assert "config.json that fits its weights" in done.err


@pytest.mark.parametrize("command", [("run", "--levels", "Q8_0"), ("advise",), ("imatrix", "generate")])
def test_a_folder_as_text_is_answered_with_the_command_that_makes_one(
    command: tuple[str, ...], tiny_model: Path, cli: CommandLine, tmp_path: Path
) -> None:
    (tmp_path / "notes").mkdir()
    done = cli(*command, tiny_model, "-f", "notes")
    assert done.code == 6, done.err
    assert "imatrix-runner calibration build notes -o notes.txt --model MODEL" in done.err


def test_chat_messages_as_text_are_warned_of_with_the_command_that_renders_them(
    tiny_model: Path, cli: CommandLine, tmp_path: Path
) -> None:
    message = '{"role": "user", "content": "The lighthouse keeper writes down the weather every morning."}\n'
    (tmp_path / "chat.jsonl").write_text(message * 400)
    done = cli("run", tiny_model, "-f", "chat.jsonl", "--levels", "Q8_0", "--dry-run")
    assert done.code == 0, done.err
    assert "Warning: chat.jsonl contains JSON lines, each a chat message, and the model would see their syntax" in done.err
    assert f"imatrix-runner calibration build chat.jsonl -o chat.txt --model {tiny_model}" in done.err.replace("\n", "")
