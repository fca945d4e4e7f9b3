"""A decoder whose vocabulary ends every text with a token: llama.cpp's tools abort on it, and it is calibrated without."""

from __future__ import annotations

from pathlib import Path

import pytest

from imatrix_runner.models.gguf_file import read_header
from imatrix_runner.resources import HELD_OUT_TEXT, resource
from support.in_process import CommandLine
from support.llama_tools import digest

KEY = b"tokenizer.ggml.add_eos_token"
SHORT = ("-c", "128", "--chunks", "8", "--levels", "Q4_0", "--text")


def with_end(demo_model: Path, path: Path, *, ends: bool) -> Path:
    """The demo model whose vocabulary ends every text with its EOS, or says that it does not."""
    data = bytearray(demo_model.read_bytes())
    data[data.index(KEY) + len(KEY) + 4] = ends  # after the type of a bool
    path.parent.mkdir()
    path.write_bytes(data)
    assert read_header(path).metadata[KEY.decode()] is ends
    return path


@pytest.mark.parametrize("engine", ["embedded", "binaries"])
def test_it_is_calibrated_and_measured_as_if_texts_had_no_end(
    engine: str, cli: CommandLine, demo_model: Path, tiny_text: Path, tmp_path: Path
) -> None:
    held_out = tmp_path / "held_out.txt"
    held_out.write_text("\n".join(resource(HELD_OUT_TEXT).read_text(encoding="utf-8").splitlines()[:60]), encoding="utf-8")
    found = []
    for ends in (True, False):
        model = with_end(demo_model, tmp_path / str(ends) / "model.gguf", ends=ends)
        options = ("-f", tiny_text, *SHORT, held_out, "--engine", engine, "--work-dir", tmp_path / f"work-{ends}", "--json")
        done = cli("run", model, *options)
        assert done.code == 0, done.err
        measured = done.document["measured"]["levels"]["Q4_0"]
        matrix = digest(tmp_path / f"work-{ends}" / "model" / "imatrix.gguf")
        found.append((matrix, measured["n_tokens"], measured["kld"], done.document["collected"]["tokens"]))
    assert found[0] == found[1]
