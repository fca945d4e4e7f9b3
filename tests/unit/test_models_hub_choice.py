"""The choice of a repository's files, on listings like those of real publishers."""

from __future__ import annotations

import pytest

from imatrix_runner.errors import DownloadError, InvalidDataError
from imatrix_runner.models.hub.choose_files import ChosenFiles, RepoFile, choose
from imatrix_runner.models.hub.listing import plain_files
from imatrix_runner.models.model import HubId

CHECKPOINT = ["README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "merges.txt"]


def pick(
    names: list[str], hub_id: str = "org/name", file: str | None = None, trust: bool = False, base: str | None = None
) -> ChosenFiles:
    listing = [RepoFile(name, 10) for name in names]
    return choose(HubId(hub_id, None, file), listing, trust_remote_code=trust, base_model=base)


def names_of(choice: ChosenFiles) -> list[str]:
    return [file.name for file in choice.files]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["m-F16.gguf", "m-BF16.gguf", "m-F32.gguf"], ["m-BF16.gguf"]),
        (["m-F32.gguf", "m.fp16.gguf", "m-Q8_0.gguf"], ["m.fp16.gguf"]),
        (["m-f32.gguf"], ["m-f32.gguf"]),
        (["m-BF16.gguf", *CHECKPOINT], ["m-BF16.gguf"]),
        (["mmproj-m-BF16.gguf", "m-imatrix-BF16.gguf", "m-F16.gguf"], ["m-F16.gguf"]),
        (
            ["x/m-BF16-00002-of-00002.gguf", "x/m-BF16-00001-of-00002.gguf"],
            ["x/m-BF16-00001-of-00002.gguf", "x/m-BF16-00002-of-00002.gguf"],
        ),
        (
            ["BF16/m-00001-of-00002.gguf", "BF16/m-00002-of-00002.gguf"],
            ["BF16/m-00001-of-00002.gguf", "BF16/m-00002-of-00002.gguf"],
        ),
        (["m-BF16-00001-of-00002.gguf", "m-F16.gguf"], ["m-F16.gguf"]),
        (["BF16/m-Q4_K_M.gguf", "m-F16.gguf"], ["m-F16.gguf"]),
        (["m.gguf", "m-Q4_0.gguf"], ["m.gguf"]),
    ],
)
def test_prefers_full_precision(names: list[str], expected: list[str]) -> None:
    choice = pick(names)
    assert choice.kind == "gguf"
    assert names_of(choice) == expected


def test_else_the_checkpoint_without_code_and_pickles() -> None:
    names = [
        *CHECKPOINT,
        "pytorch_model.bin",
        "modeling.py",
        "consolidated.safetensors",
        "onnx/model.safetensors",
        "x-Q4_0.gguf",
    ]
    choice = pick(names)
    assert choice.kind == "checkpoint"
    assert set(names_of(choice)) == set(CHECKPOINT)
    assert "modeling.py" in names_of(pick(names, trust=True))


def test_a_named_file_is_taken_with_its_set() -> None:
    names = ["m-BF16.gguf", "Q8/m-Q8_0-00001-of-00002.gguf", "Q8/m-Q8_0-00002-of-00002.gguf"]
    assert names_of(pick(names, file="Q8/m-Q8_0-00002-of-00002.gguf")) == names[1:]


def test_a_missing_file_names_near_ones() -> None:
    with pytest.raises(DownloadError) as caught:
        pick(["model-BF16.gguf", "model-Q8_0.gguf"], file="model-BF61.gguf")
    assert "model-BF16.gguf" in caught.value.why
    assert "org/name:model-BF16.gguf" in caught.value.todo
    with pytest.raises(DownloadError, match="no GGUF"):
        pick(CHECKPOINT, file="m.gguf")


def test_an_incomplete_set_is_refused() -> None:
    with pytest.raises(InvalidDataError, match="incomplete"):
        pick(["m-00001-of-00002.gguf"], file="m-00001-of-00002.gguf")


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["a-BF16.gguf", "b-BF16.gguf"], "several models"),
        (["a-Q8_0.gguf", "a-IQ2_M.gguf"], "already quantised"),
        (["config.json", "pytorch_model.bin"], "pickle"),
        (["adapter_config.json", "adapter_model.safetensors"], "adapter"),
        (["README.md"], "has no model"),
        (["mmproj-F16.gguf"], "no model in full precision"),
    ],
)
def test_says_why_nothing_fits(names: list[str], said: str) -> None:
    with pytest.raises(InvalidDataError, match=said) as caught:
        pick(names)
    assert caught.value.todo


def test_advises_the_base_model() -> None:
    with pytest.raises(InvalidDataError) as caught:
        pick(["a-Q8_0.gguf"], base="org/base")
    assert "imatrix-runner run org/base" in caught.value.todo


def test_files_whose_names_lead_elsewhere_are_not_listed() -> None:
    kept = ["config.json", "sub/model.gguf", "a..b", "a b"]
    odd = [
        "../x",
        "/x",
        "a/../../x",
        "a//b",
        "./x",
        "..",
        "",
        "C:/x",
        "C:x",
        "a\\b",
        "..\\x",
        "a\nb",
        "a\0b",
        "a\x1b[31m",
        "a/",
    ]
    assert [file.name for file in plain_files((name, 1) for name in [*kept, *odd])] == kept
