"""``--override-kv`` and ``--tensor-type`` as people mistype them."""

from __future__ import annotations

import pytest

from imatrix_runner.errors import UsageError
from imatrix_runner.quantize.typed_options import check_override, check_tensor_type


@pytest.mark.parametrize(
    ("text", "what", "why", "todo"),
    [
        ("general.name", "has no key and value", "KEY=TYPE:VALUE", "general.name=str:Mine"),
        ("=str:x", "has no key and value", "KEY=TYPE:VALUE", "general.name=str:Mine"),
        ("general.name=Mine", "has no type", "int, float, bool or str", "--override-kv general.name=str:Mine"),
        ("a.b=string:x", "has no type", "int, float, bool or str", "a.b=str:string:x"),
        ("a.b=bool:yes", "neither true nor false", "", "a.b=bool:true"),
        ("a.b=int:abc", "is not a whole number", "would read 0", "a.b=int:2048"),
        ("a.b=int:1.5", "is not a whole number", "would read 0", "a.b=int:2048"),
        ("a.b=float:", "is not a number", "would read 0", "a.b=float:0.5"),
        ("a.b=str:" + "ä" * 64, "a text that is too long", "128 bytes; llama.cpp takes at most 127", "gguf-new-metadata"),
        ("k" * 128 + "=int:1", "a key that is too long", "128 bytes", "Shorten"),
    ],
)
def test_an_override_is_refused_by_what_is_wrong_with_it(text: str, what: str, why: str, todo: str) -> None:
    with pytest.raises(UsageError) as caught:
        check_override(text)
    assert what in caught.value.what
    assert why in caught.value.why
    assert todo in caught.value.todo
    assert len(caught.value.what) < 120


@pytest.mark.parametrize(
    "text", ["a.b=int:-3", "a=float:1e-5", "a=float:.5", "a=bool:false", "a=str:", "a=str:x=y:z", "a=str:" + "x" * 127]
)
def test_overrides(text: str) -> None:
    check_override(text)


@pytest.mark.parametrize(("text", "what"), [("ffn_down", "no type"), ("ffn_down=", "no type"), ("=q4_k", "no pattern")])
def test_a_tensor_type_without_a_part(text: str, what: str) -> None:
    with pytest.raises(UsageError, match=f"has {what}"):
        check_tensor_type(text)
