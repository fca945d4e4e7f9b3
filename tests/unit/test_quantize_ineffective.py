"""Options of llama-quantize that change nothing on a model are told, with the nearest name that would."""

from __future__ import annotations

from pathlib import Path

import pytest

from imatrix_runner.engines.jobs import QuantizeOptions
from imatrix_runner.engines.levels import Level
from imatrix_runner.models.gguf_file import TensorInfo, read_header
from imatrix_runner.models.tensor_patterns import broad, component, nearest, overrides, unmatched
from imatrix_runner.quantize.ineffective_options import ineffective_options, ineffective_types
from support.tiny_models import write_llama_gguf

NAMES = (
    *("token_embd.weight", "output.weight", "output_norm.weight", "blk.0.attn_q.weight", "blk.0.attn_q_norm.weight"),
    *("blk.0.attn_qkv.weight", "blk.0.ffn_down.weight", "blk.1.ffn_down.weight", "blk.1.ffn_down_exps.weight"),
)
Q4, Q6 = Level("Q4_K_M", "Q4_K_M"), Level("Q6_K", "Q6_K")


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama_gguf(tmp_path_factory.mktemp("m") / "untied.gguf", hidden=64, ff=64, layers=2)


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama_gguf(tmp_path_factory.mktemp("m") / "tied.gguf", hidden=64, ff=64, layers=2, tied=True)


def told(model: Path, *, imatrix: bool = True, entries: tuple[str, ...] | None = None, **options: object) -> list[str]:
    header = read_header(model)
    given = QuantizeOptions(**options)  # type: ignore[arg-type]
    return ineffective_options(given, header, header.tensors, imatrix=imatrix, entries=entries)


def types(*entries: str) -> list[str]:
    return list(unmatched(overrides([("--tensor-type", entry) for entry in entries], NAMES), NAMES))


@pytest.mark.parametrize(
    ("entry", "meant"),
    [
        ("ffn_dwon=q8_0", "ffn_down"),
        (r"blk\.(0|1)\.ffn_dwn\.weight=q8_0", "ffn_down"),
        ("blk.0.atn_q.weight=q8_0", "attn_q"),
        ("token_embed=q8_0", "token_embd"),
    ],
)
def test_a_pattern_that_matches_nothing_names_the_nearest(entry: str, meant: str) -> None:
    (text,) = types(entry)
    assert f"--tensor-type {entry} matches no tensor" in text
    assert text.endswith(f"Did you mean {meant}?")


def test_without_anything_near_nothing_is_guessed() -> None:
    (text,) = types("zzz=q8_0")
    assert text.endswith("matches no tensor of this model.")
    assert nearest("", NAMES) == ""


def test_the_first_pattern_wins_and_the_later_one_is_told() -> None:
    (text,) = types("attn_q=q8_0", r"attn_q(kv)?\.weight=q4_k", "ffn_down=q6_k")
    assert (
        text == r"--tensor-type attn_q(kv)?\.weight=q4_k has no effect: attn_q=q8_0 comes first and matches the same tensors."
    )
    assert types("ffn_down=q8_0", "ffn=q4_k", "attn=q4_k") == [
        "--tensor-type ffn=q4_k has no effect: ffn_down=q8_0 comes first and matches the same tensors."
    ]


def test_a_pattern_that_python_cannot_read_is_left_to_llama_cpp() -> None:
    assert types("[[:alpha:]]+=q8_0", "(=q8_0") == []


def test_a_word_that_is_part_of_longer_names_says_what_else_it_hits() -> None:
    tensors = [TensorInfo(name, (64, 64), 0, "F32", 0, 16384) for name in NAMES]
    (text,) = broad(overrides([("--tensor-type", "attn_q=q8_0")], NAMES), tensors)
    assert "also matches attn_q_norm, attn_qkv" in text
    assert not [*broad(overrides([("--tensor-type", r"attn_q\.=q8_0"), ("--tensor-type", "ffn=q8_0")], NAMES), tensors)]


@pytest.mark.parametrize(
    ("name", "expected"),
    [("blk.12.ffn_down.weight", "ffn_down"), ("output.weight", "output"), ("dec.blk.1.attn_q.bias", "attn_q")],
)
def test_components(name: str, expected: str) -> None:
    assert component(name) == expected


def test_types_that_are_there_anyway_or_are_never_made() -> None:
    given = overrides([("--tensor-type", "ffn_down=q6_k"), ("--tensor-type", "norm=q8_0")], NAMES)
    plain = dict.fromkeys(NAMES, "Q6_K") | {"output_norm.weight": "F32", "blk.0.attn_q_norm.weight": "F32"}
    kept = ineffective_types(given, {Q6: (plain, plain)}, QuantizeOptions())
    assert kept[0] == "--tensor-type ffn_down=q6_k changes nothing: Q6_K has Q6_K there anyway."
    assert "llama.cpp keeps output_norm.weight, blk.0.attn_q_norm.weight as F32" in kept[1]


def test_a_type_that_changes_one_level_of_several_is_not_told() -> None:
    given = overrides([("--tensor-type", "ffn_down=q6_k")], NAMES)
    six, four = dict.fromkeys(NAMES, "Q6_K"), dict.fromkeys(NAMES, "Q4_K")
    changed = four | {name: "Q6_K" for name in NAMES if "ffn_down" in name}
    assert ineffective_types(given, {Q6: (six, six), Q4: (changed, four)}, QuantizeOptions()) == []


def test_a_stronger_option_is_named() -> None:
    given = overrides([("--tensor-type", "token_embd=q4_k"), ("--tensor-type", r"^output\.weight=q4_k")], NAMES)
    large = Level("Q4_K_L", "Q4_K_M", "q8_0", "q8_0")
    plain = dict.fromkeys(NAMES, "Q8_0")
    first, second = ineffective_types(given, {large: (plain, plain)}, QuantizeOptions())
    assert "the type of the embeddings of Q4_K_L is Q8_0" in first
    assert "the type of output.weight of Q4_K_L is Q8_0" in second


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"leave_output_tensor": True}, "this model has no output.weight"),
        ({"output_tensor_type": "q8_0", "pure": True}, "--pure decides"),
        ({"output_tensor_type": "q8_0", "token_embedding_type": "q6_k"}, "--token-embedding-type decides"),
    ],
)
def test_options_for_an_output_that_tied_embeddings_replace(
    tied: Path, untied: Path, options: dict[str, object], said: str
) -> None:
    (text,) = told(tied, **options)
    assert said in text
    assert told(untied, **options) == []


def test_an_output_that_is_kept_has_no_other_type(untied: Path) -> None:
    (text,) = told(untied, leave_output_tensor=True, output_tensor_type="q8_0")
    assert "--leave-output-tensor keeps output.weight" in text


def test_weights_that_match_no_entry(untied: Path) -> None:
    entries = ("blk.0.attn_q.weight", "blk.0.ffn_down.weight")
    (text,) = told(untied, entries=entries, exclude_weights=("atn_q", "ffn_down"))
    assert text == "--exclude-weights atn_q matches no entry of the imatrix. Did you mean attn_q?"
    (text,) = told(untied, entries=None, include_weights=("ffn_dn",))
    assert "matches no tensor of this model. Did you mean ffn_" in text
    (text,) = told(untied, imatrix=False, include_weights=("ffn_down",))
    assert "no imatrix is used" in text


def test_layers_that_are_not_there(untied: Path) -> None:
    assert told(untied, prune_layers="1,2,7") == ["--prune-layers 2,7: no such layer; this model has layers 0 to 1."]
    assert told(untied, prune_layers="0") == []


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("llama.contxt_length=int:99", "Did you mean llama.context_length?"),
        ("llama.context_length=int:2048", "changes nothing"),
        ("general.name=str:tiny llama", "changes nothing"),
        ("general.name=int:4", "turns str into int"),
        ("llama.context_length=float:4", "turns int into float"),
        ("tokenizer.ggml.tokens=str:a", "turns an array into str"),
    ],
)
def test_metadata_that_is_misspelt_or_the_same(untied: Path, override: str, said: str) -> None:
    (text,) = told(untied, override_kv=(override,))
    assert said in text


def test_metadata_that_is_new_or_changed_needs_no_word(untied: Path) -> None:
    assert told(untied, override_kv=("my.note=str:hello", "llama.context_length=int:512")) == []
    (text,) = told(untied, override_kv=("llama.context_length=int:512", "llama.context_length=int:256"))
    assert "given twice" in text
