"""Arguments for MODEL that are neither a path nor a hub id, and the advice for them."""

from __future__ import annotations

from pathlib import Path

import pytest

from imatrix_runner.errors import InvalidDataError, UsageError
from imatrix_runner.models.model import parse_source


@pytest.mark.parametrize(
    ("text", "why", "todo"),
    [
        ("https://hub.example/org/name", "web address", "imatrix-runner run org/name"),
        ("https://hub.example/org/name/blob/main/sub/x.gguf?download=true", "web address", "run org/name:sub/x.gguf"),
        ("https://hub.example/org/name/resolve/v2/x.gguf", "web address", "run org/name@v2:x.gguf"),
        ("https://hub.example/org/name/blob/main/config.json", "web address", "run org/name"),
        ("hub.example/org/name/tree/main", "web address", "run org/name"),
        ("hub.example/org/name:Q4_K_M", "web address", "run org/name"),
        ("hf://org/name", "web address", "run org/name"),
        ("https://hub.example/a", "web address", "org/name:file.gguf"),
        ("file:///data/my%20model.gguf", "by its path", "run '/data/my model.gguf'"),
        ("org/name:Q4_K_M", "'Q4_K_M' is a tag", "imatrix-runner run org/name"),
        ("org/name/sub/x.gguf", "after a colon", "run org/name:sub/x.gguf"),
        ("llama3:8b", "Ollama model", "--modelfile"),
        ("'org/name'", "quotation marks", "run org/name"),
        (" org/name\n", "spaces", "run org/name"),
        ("\\\\server\\m.gguf", "Windows path", "org/name"),
        ("C:\\models\\m.gguf", "Windows path", ""),
        ("shards/*.gguf", "pattern", "first shard"),
        ("Qwen3-0.6B", "not a hub id (org/name)", "org/name"),
        ("  ", "is empty", "org/name"),
    ],
)
def test_a_name_that_is_none_is_answered_with_what_was_meant(
    text: str, why: str, todo: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises((InvalidDataError, UsageError)) as caught:
        parse_source(text)
    assert "No model" in caught.value.what
    assert why in caught.value.why
    assert todo in caught.value.todo


def test_a_path_in_quotation_marks(tmp_path: Path) -> None:
    with pytest.raises(InvalidDataError) as caught:
        parse_source(f'"{tmp_path}"')
    assert caught.value.todo == f"Without them: imatrix-runner run {tmp_path}"
