"""What a model can be used for, according to its header alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from imatrix_runner.errors import InvalidDataError
from imatrix_runner.models.kind import require_calibratable, require_loadable, require_measurable
from imatrix_runner.models.model import Model, open_gguf
from support.tiny_architectures import ARCHITECTURES, write_architecture
from support.tiny_models import write_llama_gguf


def edited(path: Path, key: str, value: bytes) -> Model:
    """The model with a string or number of its metadata overwritten by the same number of bytes."""
    data = bytearray(path.read_bytes())
    at = data.index(key.encode()) + len(key) + 4
    kind = int.from_bytes(data[at - 4 : at], "little")
    at += 8 if kind == 8 else 0
    data[at : at + len(value)] = value
    path.write_bytes(data)
    return open_gguf(path, allow_requantize=False)


def why(model: Model) -> tuple[str, str]:
    with pytest.raises(InvalidDataError) as caught:
        require_calibratable(model)
    return caught.value.why, caught.value.todo


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_models_that_predict_text_can_be_used_for_everything(name: str, tmp_path: Path) -> None:
    model = open_gguf(write_architecture(name, tmp_path / "m.gguf"), allow_requantize=False)
    require_loadable(model)
    require_calibratable(model)
    require_measurable(model)


@pytest.mark.parametrize(
    ("architecture", "kind"),
    [
        ("rnd1", "a diffusion model"),
        ("dream", "a diffusion model"),
        ("t5", "an encoder-decoder model"),
        ("eagle3", "a draft head"),
    ],
)
def test_other_kinds_of_model_are_not_calibrated(architecture: str, kind: str, tmp_path: Path) -> None:
    model = open_gguf(write_llama_gguf(tmp_path / "m.gguf", layers=1), allow_requantize=False)
    other = Model(**{**vars(model), "architecture": architecture})
    reason, todo = why(other)
    assert reason.startswith(f"it is {kind}")
    assert f"({architecture})" in reason
    assert "--imatrix none" in todo
    require_loadable(other)  # it can still be quantised without


def test_an_encoder_is_not_measured(tmp_path: Path) -> None:
    model = open_gguf(write_architecture("bert", tmp_path / "m.gguf"), allow_requantize=False)
    with pytest.raises(InvalidDataError, match="embedding model") as caught:
        require_measurable(model)
    assert "--evaluate" in caught.value.todo


@pytest.mark.parametrize(
    ("metadata", "calibrated", "reason"),
    [
        ({"llama.attention.causal": False}, False, "attention is not causal"),
        ({"llama.nextn_predict_layers": 1}, False, "only MTP / NextN blocks"),
        ({"llama.pooling_type": 3}, True, "computes embeddings"),
    ],
)
def test_metadata_tells_what_an_architecture_s_name_does_not(
    metadata: dict[str, str | float | bool], calibrated: bool, reason: str, tmp_path: Path
) -> None:
    model = open_gguf(write_llama_gguf(tmp_path / "m.gguf", layers=1, metadata=metadata), allow_requantize=False)
    if calibrated:
        require_calibratable(model)
    else:
        assert reason in why(model)[0]
    with pytest.raises(InvalidDataError, match=reason):
        require_measurable(model)


def test_a_model_without_vocabulary_has_no_text(tmp_path: Path) -> None:
    path = write_llama_gguf(tmp_path / "m.gguf", layers=1)
    reason, todo = why(edited(path, "tokenizer.ggml.model", b"none"))
    assert reason == "it has no vocabulary (tokenizer.ggml.model is none)"
    assert "tokenizer files" in todo


@pytest.mark.parametrize("rows", [493, 495, 2000])
def test_vocabulary_and_embeddings_must_agree(rows: int, tmp_path: Path) -> None:
    """llama-quantize writes every level of such a model, but nothing can load it."""
    path = write_llama_gguf(tmp_path / "m.gguf", layers=1, rows=rows)
    with pytest.raises(InvalidDataError) as caught:
        require_loadable(open_gguf(path, allow_requantize=False))
    assert caught.value.why == f"its vocabulary has 494 tokens, and token_embd.weight has {rows} rows"
