"""Lists of models: what they may say, and three lines for everything else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imatrix_runner.batch.batch_list import BatchEntry, read_additions, read_list
from imatrix_runner.errors import RunnerError, UsageError
from imatrix_runner.untrusted import UnreadableError, from_yaml

KNOWN = frozenset(("levels", "preset", "imatrix", "text", "evaluate", "rounding", "flash_attn", "tensor_type", "private"))


def listed(tmp_path: Path, text: str | bytes, name: str = "models.yaml") -> tuple[BatchEntry, ...]:
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_list(path, KNOWN)


def test_a_list_may_be_names_alone(tmp_path: Path) -> None:
    assert [entry.model for entry in listed(tmp_path, "- org/a\n- ./b.gguf\n")] == ["org/a", "./b.gguf"]


def test_defaults_stand_under_what_an_entry_says(tmp_path: Path) -> None:
    text = """
defaults:
  preset: bartowski
  publish: my-org
  evaluate: true
  priority: 2
models:
  - org/a
  - model: org/b
    levels: [Q4_K_M, iq3_xxs]
    mix: 4GiB
    calibration: text.txt
    flash-attn: on
    priority: -1
    publish: other/{model}-i1-GGUF
    private: yes
"""
    first, second = listed(tmp_path, text)
    assert first.options == {"preset": "bartowski", "evaluate": "true"}
    assert (first.publish, first.priority) == ("my-org/{model}-GGUF", 2)
    assert first.repository("a") == "my-org/a-GGUF"
    # What to make is replaced as a whole, and words stay words: "on" is llama.cpp's value, not a switch.
    assert second.options == {
        "evaluate": "true",
        "levels": ("Q4_K_M", "iq3_xxs", "MIX@4GiB"),
        "text": "text.txt",
        "flash_attn": "on",
        "private": "yes",
    }
    assert (second.publish, second.priority) == ("other/{model}-i1-GGUF", -1)


def test_json_lines_say_the_same(tmp_path: Path) -> None:
    lines = [{"defaults": {"evaluate": True}}, "org/a", {"model": "org/b", "levels": ["Q4_0"], "priority": 3}]
    first, second = listed(tmp_path, "\n".join(map(json.dumps, lines)) + "\n", "models.jsonl")
    assert first.options == {"evaluate": "true"}
    assert second.options == {"evaluate": "true", "levels": ("Q4_0",)}
    assert second.priority == 3


def test_a_fingerprint_counts_what_is_made_and_not_where_it_stands(tmp_path: Path) -> None:
    (one,) = listed(tmp_path, "- model: org/a\n  levels: Q4_0\n")
    (again,) = listed(tmp_path, "# moved\n\n- {levels: Q4_0, model: org/a, priority: 9}\n", "other.yaml")
    (other,) = listed(tmp_path, "- model: org/a\n  levels: Q4_1\n")
    assert one.fingerprint == again.fingerprint != other.fingerprint


BAD: dict[str, tuple[str | bytes, str]] = {
    "unknown key": ("- model: a/b\n  levles: Q4_0\n", "'levels'"),
    "unknown key at the top": ("modles: []\n", "'models'"),
    "a level twice": ("- model: a/b\n  levels: Q4_0,q4_0\n", "twice"),
    "a level twice by its mix": ("- model: a/b\n  mix: [4GiB, MIX@4GiB]\n", "twice"),
    "a model twice": ("- a/b\n- a/b@main\n", "twice"),
    "a key twice": ("- model: a/b\n  preset: x\n  preset: y\n", "twice"),
    "two names of a key": ("- model: a/b\n  text: x\n  file: y\n", "another name"),
    "one repository for two": ("- {model: a/b, publish: o/x}\n- {model: a/c, publish: O/X}\n", "published to"),
    "no model": ("- levels: Q4_0\n", "no model"),
    "an empty list": ("models:\n", "no models"),
    "nothing at all": ("", "no models"),
    "a text": ("hello\n", "no list of models"),
    "an entry that is a list": ("- [a, b]\n", "is a list"),
    "defaults that are a text": ("defaults: x\nmodels: [a/b]\n", "is a text"),
    "a value without text": ("- model: a/b\n  preset:\n", "no usable value"),
    "a nested value": ("- model: a/b\n  preset: {a: b}\n", "no usable value"),
    "a priority that is no number": ("- model: a/b\n  priority: high\n", "priority"),
    "a priority without end": (f"- model: a/b\n  priority: {'9' * 17}\n", "priority"),
    "a target that is none": ("- model: a/b\n  publish: ../x\n", "publish target"),
    "a control character": ('- "a\\e[31mb"\n', "no usable value"),
    "anchors": ("a: &a [x]\nb: *a\n", "anchors"),
    "a bomb of aliases": ("a: &a [x,x]\nb: &b [*a,*a]\nmodels: [*b,*b]\n", "anchors"),
    "tags": ("- !!python/object/apply:os.system [ls]\n", "tags"),
    "deep nesting": ("[" * 5000, "nested"),
    "not UTF-8": (b"- a/\xff\n", "UTF-8"),
    "cut short": ("- {model: a/b\n", "line"),
    "tabs": ("-\tmodel: a\n\t  x: y\n", "line"),
    "two documents": ("- a/b\n---\n- a/c\n", "second document"),
    "too large": ("- a/b\n" + "#" * (1 << 20), "too large"),
    "too many": ("- a\n" * 1001, "too many"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_list_is_refused_with_three_lines(what: str, tmp_path: Path) -> None:
    text, said = BAD[what]
    with pytest.raises(UsageError) as caught:
        listed(tmp_path, text)
    error = caught.value
    assert error.exit_code == 2
    assert said in error.sentence(), error.sentence()
    assert error.what
    assert error.why
    assert error.todo
    assert str(error).isprintable()


def test_a_missing_list_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        read_list(tmp_path / "none.yaml", KNOWN)


def test_additions_that_are_not_understood_are_left_out(tmp_path: Path) -> None:
    there = listed(tmp_path, "- org/a\n")
    path = tmp_path / "added.jsonl"
    lines = ['{"model": "org/b", "levels": "Q4_0"}', "{broken", '{"model": "org/a"}', '{"model": "org/c", "levles": 1}']
    lines.append('"org/d"')
    path.write_text("\n".join(lines) + '\n{"model": "org/to', encoding="utf-8")
    entries, faults = read_additions(path, KNOWN, there, {"evaluate": "true", "preset": "bartowski"})
    assert [entry.model for entry in entries] == ["org/b", "org/d"]
    assert entries[0].options == {"evaluate": "true", "levels": ("Q4_0",)}
    assert entries[1].options == {"evaluate": "true", "preset": "bartowski"}
    assert len(faults) == 3
    assert all(isinstance(fault, RunnerError) and "added.jsonl, line" in fault.sentence() for fault in faults)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@given(VALUES)
def test_no_value_is_anything_but_entries_or_an_error(tmp_path_factory: pytest.TempPathFactory, value: Any) -> None:
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    path.write_text(json.dumps(value) + "\n", encoding="utf-8")
    try:
        entries = read_list(path, KNOWN)
    except RunnerError:
        return
    assert all(entry.model and isinstance(entry.priority, int) for entry in entries)


@given(st.text(alphabet="ab:-[]{},&*!'\"#|>%@\n \t?0", max_size=60))
def test_no_yaml_is_anything_but_a_value_or_an_error(text: str) -> None:
    try:
        value = from_yaml(text.encode())
    except UnreadableError:
        return
    waiting = [value]
    while waiting:
        each = waiting.pop()
        assert each is None or isinstance(each, (str, list, dict))
        waiting += each if isinstance(each, list) else each.values() if isinstance(each, dict) else []
