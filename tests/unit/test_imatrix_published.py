"""Publishers' names, refusals and ranking, and telling whose weights a model is: no network, no hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from imatrix_runner.errors import UsageError
from imatrix_runner.imatrix.published.publishers import (
    MOST_BYTES,
    MatrixCandidate,
    format_by_name,
    is_named_imatrix,
    made_from_another,
    names_model,
    parse_wanted,
    places,
    rank,
    refusal,
)
from imatrix_runner.models.model import HubId
from imatrix_runner.models.origin import Origin, given_origin, origin_of_directory, origin_of_gguf, repository_in

ORIGIN = Origin("Qwen/Qwen3-0.6B", "test")


def test_every_publisher_has_its_place() -> None:
    found = {(place.repo_type, place.repo) for place in places(ORIGIN)}
    assert found == {
        ("model", "bartowski/Qwen3-0.6B-GGUF"),
        ("model", "bartowski/Qwen_Qwen3-0.6B-GGUF"),
        ("model", "mradermacher/Qwen3-0.6B-i1-GGUF"),
        ("model", "unsloth/Qwen3-0.6B-GGUF"),
        ("model", "ubergarm/Qwen3-0.6B-GGUF"),
        ("model", "legraphista/Qwen3-0.6B-IMat-GGUF"),
        ("model", "AesSedai/Qwen3-0.6B-GGUF"),
        ("dataset", "ikawrakow/imatrix-from-wiki-train"),
        ("model", "Qwen/Qwen3-0.6B"),
    }


@pytest.mark.parametrize(
    ("file", "told"),
    [
        ("Meta-Llama-3-8B.imatrix", "dat"),
        ("Qwen_Qwen3-0.6B.imatrix", "dat"),
        ("Qwen_Qwen3.6-35B-A3B-imatrix.gguf", "gguf"),
        ("imatrix.dat", "dat"),
        ("Qwen3-0.6B.imatrix.gguf", "gguf"),
        ("imatrix_unsloth.dat", "dat"),
        ("imatrix_unsloth.gguf_file", "gguf"),
        ("imatrix_unsloth.gguf", "gguf"),
        ("imatrix-Qwen3-0.6B-BF16.dat", "dat"),
        ("imatrix-Qwen3-0.6B-Q8_0.dat", "dat"),
        ("imatrix.gguf", "gguf"),
        ("deep/folder/imatrix.gguf", "gguf"),
    ],
)
def test_published_names_are_known(file: str, told: str) -> None:
    assert is_named_imatrix(file)
    assert refusal(file, 5_000_000, "Qwen3-0.6B") is None
    assert format_by_name(file) == told


@pytest.mark.parametrize("file", ["imatrix.dataset", "imatrix.log", "README.md", "model-Q4_K_M.gguf", "imatrix/model.gguf"])
def test_other_names_are_not(file: str) -> None:
    assert not is_named_imatrix(file)


@pytest.mark.parametrize(
    ("file", "size", "said"),
    [
        ("Qwen3-imatrix-IQ1_M.gguf", 5_000_000, "IQ1_M in the name"),
        ("Qwen3.imatrix-q4_k_m.gguf", None, "Q4_K_M in the name"),
        ("Qwen3-imatrix-MXFP4.gguf", 5_000_000, "MXFP4"),
        ("Qwen3-imatrix.gguf", MOST_BYTES + 1, "2.00 GiB"),
        ("imatrix.dat", 86 << 30, "86.00 GiB"),
        ("Qwen3-imatrix-00001-of-00003.gguf", 5_000_000, "split"),
        ("imatrix.dat", 0, "empty"),
    ],
)
def test_quantised_weights_are_refused_by_name_and_size(file: str, size: int | None, said: str) -> None:
    why = refusal(file, size, "Qwen3")
    assert why is not None
    assert said in why


def test_a_quant_token_of_the_model_itself_does_not_count() -> None:
    model = "gemma-3-4b-it-qat-q4_0-unquantized"
    assert refusal(f"google_{model}-imatrix.gguf", 5_000_000, model) is None
    assert refusal(f"google_{model}-imatrix-Q5_K.gguf", 5_000_000, model) is not None


@pytest.mark.parametrize(
    ("file", "model", "same"),
    [
        ("mistral-7b.imatrix", "Mistral-7B", True),
        ("llama-v2-7b.imatrix", "Llama-2-7b-hf", True),
        ("mixtral-8x7b-instruct-v0.1.imatrix", "Mixtral-8x7B-Instruct-v0.1", True),
        ("mistral-7b.imatrix", "Mistral-7B-Instruct-v0.2", False),
        ("llama-v2-70b.imatrix", "Llama-2-7b-hf", False),
        (".imatrix", "hf", False),
    ],
)
def test_shared_repositories_are_told_apart_by_name(file: str, model: str, same: bool) -> None:
    assert names_model(file, model) is same


def test_a_namesake_of_another_organisation_is_a_stranger() -> None:
    assert made_from_another("p/M-GGUF", None, (), ORIGIN) is None
    assert made_from_another("p/M-GGUF", "qwen/qwen3-0.6b", (), ORIGIN) is None
    assert made_from_another("p/M-GGUF", "x/y", ("Qwen/Qwen3-0.6B",), ORIGIN) is None
    assert made_from_another("Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B-Base", (), ORIGIN) is None
    assert "someone/Qwen3-0.6B" in (made_from_another("p/M-GGUF", "someone/Qwen3-0.6B", (), ORIGIN) or "")


def candidate(repo: str, file: str, date: str = "2026-01-01", **more: Any) -> MatrixCandidate:
    return MatrixCandidate(repo, "model", "0" * 40, file, 1000, date, format_by_name(file), **more)


def test_ranking() -> None:
    ranked = [
        candidate("bartowski/a", "a-imatrix.gguf", "2024-01-01"),
        candidate("bartowski/a", "a.imatrix", "2026-01-01"),
        candidate("zed/a", "imatrix.gguf", "2023-01-01", chunks=300, checked=True),
        candidate("zed/a", "other-imatrix.gguf", "2026-02-01", chunks=100, checked=True),
        candidate("unsloth/a", "imatrix_unsloth.gguf", "2026-02-01"),
        candidate("mradermacher/a", "a.imatrix.gguf", "2026-01-01"),
        candidate("ubergarm/a", "imatrix.dat", "2026-03-01"),
        candidate("legraphista/a", "imatrix.dat", "2026-02-01"),
    ]
    assert list(rank(reversed(ranked))) == ranked
    assert list(rank([*ranked, *ranked])) == ranked


def test_what_from_takes() -> None:
    assert parse_wanted("org/name") == HubId("org/name")
    assert parse_wanted("org/name:deep/imatrix.dat") == HubId("org/name", file="deep/imatrix.dat")
    for wrong in ("org/", "a/b/c", "https://example.org/a/b", "org/../x:f", "org/name@v1"):
        with pytest.raises(UsageError, match="is not a repository of a hub"):
            parse_wanted(wrong)


def test_repositories_in_addresses() -> None:
    assert repository_in("https://huggingface.co/Qwen/Qwen3-0.6B") == "Qwen/Qwen3-0.6B"
    assert repository_in("https://huggingface.co/Qwen/Qwen3-0.6B/tree/main") == "Qwen/Qwen3-0.6B"
    assert repository_in("https://huggingface.co/unsloth") is None
    assert repository_in("./local/path") is None
    assert repository_in(7) is None


BASE = {"general.base_model.count": 1, "general.base_model.0.name": "Qwen3 0.6B"}
BASE_URL = {**BASE, "general.base_model.0.repo_url": "https://huggingface.co/Qwen/Qwen3-0.6B"}


@pytest.mark.parametrize(
    ("metadata", "repo", "sure"),
    [
        ({"general.source.repo_url": "https://huggingface.co/org/model"}, "org/model", True),
        ({"general.source.huggingface.repository": "org/model", **BASE_URL}, "org/model", True),
        ({"general.name": "Qwen3-0.6B", **BASE_URL}, "Qwen/Qwen3-0.6B", True),
        ({"general.name": "Qwen3-0.6B", "general.url": "https://hub.example/unsloth", **BASE_URL}, "Qwen/Qwen3-0.6B", True),
        ({"general.repo_url": "https://h.co/x/M-GGUF", "general.name": "Qwen3 0.6b", **BASE_URL}, "Qwen/Qwen3-0.6B", True),
        ({"general.name": "My Fine Tune", **BASE_URL}, "Qwen/Qwen3-0.6B", False),
        ({"general.name": "Qwen3 0.6B", "general.base_model.0.organization": "Qwen", **BASE}, "Qwen/Qwen3-0.6B", True),
        ({"general.name": "Qwen3 0.6B", "general.organization": "Qwen"}, "Qwen/Qwen3-0.6B", False),
    ],
)  # fmt: skip
def test_the_origin_of_a_gguf(metadata: dict[str, Any], repo: str, sure: bool) -> None:
    origin = origin_of_gguf(metadata)
    assert origin is not None
    assert (origin.repo, origin.sure) == (repo, sure)
    assert origin.how


@pytest.mark.parametrize(
    "metadata",
    [{}, {"general.name": "tiny"}, {**BASE_URL, "general.base_model.count": 2}, {"general.source.repo_url": 5}],
)
def test_a_gguf_that_does_not_say(metadata: dict[str, Any]) -> None:
    assert origin_of_gguf(metadata) is None


def directory(path: Path, config: object = None, card: str = "") -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text(config if isinstance(config, str) else json.dumps(config or {}))
    if card:
        (path / "README.md").write_text(card)
    return path


@pytest.mark.parametrize("card", ["base_model: org/Base", "base_model:\n- org/Base", 'base_model: ["org/Base"]'])
def test_the_origin_of_a_directory(tmp_path: Path, card: str) -> None:
    front = f"---\nlicense: mit\n{card}\n---\n# Title\n"
    cached = directory(tmp_path / "models--org--Name" / "snapshots" / "abc", {"_name_or_path": "x/y"})
    assert origin_of_directory(cached) == Origin("org/Name", "the name of the folder in the hub's cache")
    named = directory(tmp_path / "Base", {"_name_or_path": "other/Thing"}, front)
    assert origin_of_directory(named) == Origin("org/Base", "README.md")
    tuned = directory(tmp_path / "mine", {}, front)
    assert origin_of_directory(tuned) == Origin("org/Base", "README.md", sure=False)


@pytest.mark.parametrize(
    ("config", "card"), [({}, ""), ("not json", "base_model: org/x"), ([1], "---\nbase_model: ../x\n---\n")]
)
def test_a_directory_that_does_not_say(tmp_path: Path, config: object, card: str) -> None:
    assert origin_of_directory(directory(tmp_path / "d", config, card)) is None


def test_a_base_model_is_checked() -> None:
    assert given_origin("https://huggingface.co/org/name").repo == "org/name"
    with pytest.raises(UsageError, match="not a hub id"):
        given_origin("just-a-name")
