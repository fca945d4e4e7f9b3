"""The journal remembers what was made from what, and names what differs."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imatrix_runner.errors import InvalidDataError
from imatrix_runner.files import Stamp, stamp
from imatrix_runner.journal import (
    VERSION,
    Journal,
    StepOutput,
    StepRecord,
    command_line,
    commands_in,
    describe_change,
    describe_changes,
    differences,
    is_intact,
    outputs_intact,
)

INPUTS = {"model file": "sha256:1", "options": "Q4_K_M"}


def record(outputs: list[StepOutput] | None = None, **inputs: str) -> StepRecord:
    return StepRecord.now(inputs or INPUTS, outputs or [], "not made yet", 1.5, commands=[("tool", "-x")], facts={"ppl": 2.5})


def write(path: Path, content: bytes = b"content") -> StepOutput:
    path.write_bytes(content)
    return StepOutput(path.name, stamp(path), "digest")


def test_a_record_is_there_after_reopening(tmp_path: Path) -> None:
    path = tmp_path / "journal.json"
    made = record([write(tmp_path / "a.gguf")])
    Journal(path).record("level-A", made)
    again = Journal(path)
    assert again["level-A"] == again.get("level-A") == made
    assert again.get("level-B") is None
    assert list(again.steps()) == ["level-A"]
    assert made.finished.endswith("+00:00")


def test_opening_a_journal_writes_nothing(tmp_path: Path) -> None:
    Journal(tmp_path / "journal.json")
    assert list(tmp_path.iterdir()) == []


def test_changes_are_told_with_both_values() -> None:
    before = {"model file": "sha256:" + "a" * 64, "options": "-b 1", "gone": "x"}
    now = {"options": "-b 2", "model file": "sha256:" + "b" * 64, "new": "y"}
    assert describe_changes(before, now) == [
        "options: -b 1 -> -b 2",
        "model file: sha256:aaaaaaaaaaaa -> sha256:bbbbbbbbbbbb",
        "new: none -> y",
        "gone: x -> none",
    ]
    assert describe_changes(now, dict(reversed(now.items()))) == []


def test_facts_are_kept_and_an_unchanged_one_costs_no_write(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.json")
    journal.remember(model="m", levels="A,B")
    journal.path.unlink()
    journal.remember(model="m")
    assert not journal.path.exists()
    journal.remember(model="n")
    again = Journal(journal.path)
    assert (again.fact("model"), again.fact("levels"), again.fact("other")) == ("n", "A,B", None)


def test_a_hash_holds_as_long_as_the_file_is_the_same(tmp_path: Path) -> None:
    journal, path = Journal(tmp_path / "journal.json"), tmp_path / "model.gguf"
    path.write_bytes(b"weights")
    journal.remember_hash(path, stamp(path), "abc")
    again = Journal(journal.path)
    assert again.known_hash(path) == "abc"
    os.utime(path, ns=(1, 1))
    assert again.known_hash(path) is None
    assert again.known_hash(tmp_path / "another") is None


def test_a_file_overwritten_in_place_is_noticed_though_its_time_was_set_back(tmp_path: Path) -> None:
    journal, path = Journal(tmp_path / "journal.json"), tmp_path / "model.gguf"
    path.write_bytes(bytes(1 << 20))
    before = path.stat()
    journal.remember_hash(path, stamp(path), "abc")
    with path.open("r+b") as handle:  # one byte that no sample holds: only the file system knows
        handle.seek((64 << 10) + 5000)
        handle.write(b"x")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert stamp(path) == Stamp(before.st_size, before.st_mtime_ns, before.st_ino)
    assert journal.known_hash(path) is None


def test_a_hash_of_an_earlier_version_holds(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"weights")
    at = path.stat()
    entry = {"stamp": {"size": at.st_size, "mtime_ns": at.st_mtime_ns, "inode": at.st_ino}, "sha256": "abc"}
    document = {"version": 1, "hashes": {str(path): entry}}
    (tmp_path / "journal.json").write_text(json.dumps(document), encoding="utf-8")
    assert Journal(tmp_path / "journal.json").known_hash(path) == "abc"


class TestStillThere:
    """A step's files are known again by stamp, or in a copied workspace by content."""

    @staticmethod
    def made(folder: Path, content: bytes = b"weights") -> Journal:
        folder.mkdir()
        journal, path = Journal(folder / "journal.json"), folder / "a.gguf"
        path.write_bytes(content)
        journal.record("a", record([StepOutput(path.name, stamp(path), hashlib.sha256(content).hexdigest())]))
        return journal

    def test_a_copy_is_known_by_content_and_then_by_stamp(self, tmp_path: Path) -> None:
        self.made(tmp_path / "one")
        shutil.copytree(tmp_path / "one", tmp_path / "two", copy_function=shutil.copyfile)
        copied = Journal(tmp_path / "two" / "journal.json")
        assert not outputs_intact(copied["a"], tmp_path / "two")
        assert copied.still_there("a", save=False)
        assert not outputs_intact(copied["a"], tmp_path / "two")
        assert copied.still_there("a", save=True)
        assert outputs_intact(Journal(copied.path)["a"], tmp_path / "two")

    def test_of_two_files_of_a_copy_the_unchanged_one_is_known(self, tmp_path: Path) -> None:
        journal = self.made(tmp_path / "one")
        (other := tmp_path / "one" / "b.gguf").write_bytes(b"more")
        digest = hashlib.sha256(b"more").hexdigest()
        journal.record("a", record([*journal["a"].outputs, StepOutput(other.name, stamp(other), digest)]))
        shutil.copytree(tmp_path / "one", tmp_path / "two", copy_function=shutil.copyfile)
        (tmp_path / "two" / "a.gguf").write_bytes(b"WEIGHTS")
        copied = Journal(tmp_path / "two" / "journal.json")
        assert not copied.still_there("a", save=True)
        assert [is_intact(output, tmp_path / "two") for output in copied["a"].outputs] == [False, True]

    def test_a_record_without_hash_uses_one_that_was_computed_elsewhere(self, tmp_path: Path) -> None:
        journal = self.made(tmp_path / "one")
        path = tmp_path / "one" / "a.gguf"
        journal.remember_hash(path, stamp(path), journal["a"].outputs[0].sha256)
        journal.record("a", record([StepOutput("a.gguf", stamp(path))]))
        os.utime(path, ns=(1, 1))
        assert journal.still_there("a", save=True)
        assert journal["a"].outputs[0].sha256 == hashlib.sha256(b"weights").hexdigest()

    @pytest.mark.parametrize("content", [b"WEIGHTS", b"longer than it was"])
    def test_another_content_is_not_it(self, tmp_path: Path, content: bytes) -> None:
        journal = self.made(tmp_path / "one")
        (path := tmp_path / "one" / "a.gguf").write_bytes(content)
        at = journal["a"].outputs[0].stamp
        os.utime(path, ns=(at.mtime_ns, at.mtime_ns))  # as it was, and the inode too
        assert not journal.still_there("a", save=True)
        path.unlink()
        assert not journal.still_there("a", save=True)
        assert not journal.still_there("never recorded", save=True)


def test_threads_lose_nothing(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.json")
    start = threading.Barrier(8)

    def work(thread: int) -> None:
        start.wait()
        for index in range(5):
            journal.record(f"{thread}-{index}", record())

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(Journal(journal.path).steps()) == {f"{thread}-{index}" for thread in range(8) for index in range(5)}


def test_a_torn_journal_is_an_error_that_names_it(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.json")
    journal.record("a", record())
    whole = journal.path.read_bytes()
    for end in (0, 1, len(whole) // 2, len(whole) - 3):
        journal.path.write_bytes(whole[:end])
        with pytest.raises(InvalidDataError, match=r"journal\.json cannot be read") as caught:
            Journal(journal.path)
        assert "Move it away" in caught.value.todo


def test_a_journal_of_another_version_is_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "journal.json"
    path.write_text(json.dumps({"version": VERSION + 1, "steps": {}, "news": 1}))
    with pytest.raises(InvalidDataError, match="another version") as caught:
        Journal(path)
    assert f"journal version {VERSION + 1}" in caught.value.why


def test_differences_name_what_changed_came_or_went() -> None:
    before = record(model="1", options="x", gone="z")
    assert differences(before, {"model": "1", "options": "x", "gone": "z"}) == []
    assert differences(before, {"new": "n", "options": "y", "model": "1"}) == ["new", "options", "gone"]


def test_a_change_of_a_long_text_shows_only_what_differs() -> None:
    types = " ".join(f"--tensor-type ^blk\\.{layer}\\.ffn_down$=q4_k" for layer in range(9))
    assert describe_change("options", f"Q4_K_M {types} --split-max-size 2M", f"Q4_K_M {types} --split-max-size 4M") == (
        "options: … --split-max-size 2M -> … --split-max-size 4M"
    )
    assert describe_change("options", f"Q4_K_M {types}", f"Q4_K_M {types} --pure") == "options: … -> … --pure"
    assert describe_change("options", "Q4_K_M", f"Q5_K_M {types}") == f"options: Q4_K_M -> Q5_K_M {types}"


VALUES = st.dictionaries(st.sampled_from("abcdef"), st.sampled_from("123"))


@given(VALUES, VALUES)
def test_differences_are_empty_exactly_for_equal_inputs(before: dict[str, str], now: dict[str, str]) -> None:
    found = differences(StepRecord.now(before, [], "", 0.0), now)
    assert (found == []) == (before == now)
    assert len(set(found)) == len(found)


def test_outputs_are_intact_until_one_is_touched_or_gone(tmp_path: Path) -> None:
    outputs = [write(tmp_path / "a"), write(tmp_path / "b")]
    made = record(outputs)
    assert outputs_intact(made, tmp_path)
    (tmp_path / "b").write_bytes(b"longer content")
    assert not outputs_intact(made, tmp_path)
    assert [is_intact(output, tmp_path) for output in outputs] == [True, False]
    (tmp_path / "a").unlink()
    assert not is_intact(outputs[0], tmp_path)


def test_a_directory_in_the_place_of_an_output_is_not_it(tmp_path: Path) -> None:
    output = write(tmp_path / "a")
    (tmp_path / "a").unlink()
    (tmp_path / "a").mkdir()
    assert not is_intact(replace(output, stamp=stamp(tmp_path / "a")), tmp_path)


class TestConclude:
    """A step's record and the names of its files arrive together."""

    def test_files_get_their_names_and_match_the_record(self, tmp_path: Path) -> None:
        journal, part, final = Journal(tmp_path / "journal.json"), tmp_path / ".part", tmp_path / "a.gguf"
        part.write_bytes(b"new")
        journal.conclude("a", record([StepOutput(final.name, stamp(part))]), [(part, final)])
        assert final.read_bytes() == b"new"
        assert not part.exists()
        assert outputs_intact(Journal(journal.path)["a"], tmp_path)

    def test_what_the_step_made_before_gives_way(self, tmp_path: Path) -> None:
        journal, part, final = Journal(tmp_path / "journal.json"), tmp_path / ".part", tmp_path / "a.gguf"
        journal.record("a", record([write(final, b"old")]))
        part.write_bytes(b"new")
        journal.conclude("a", record([StepOutput(final.name, stamp(part))]), [(part, final)])
        assert final.read_bytes() == b"new"

    def test_a_file_of_someone_else_does_not(self, tmp_path: Path) -> None:
        journal, part, final = Journal(tmp_path / "journal.json"), tmp_path / ".part", tmp_path / "a.gguf"
        part.write_bytes(b"new")
        final.write_bytes(b"precious")
        with pytest.raises(InvalidDataError, match="in the way"):
            journal.conclude("a", record([StepOutput(final.name, stamp(part))]), [(part, final)])
        assert final.read_bytes() == b"precious"
        assert journal.get("a") is None


class TestFinishRenames:
    """Renames after a record was written: all of them, or none."""

    @staticmethod
    def made(folder: Path) -> tuple[Journal, list[StepOutput]]:
        """A step with two files in a folder of their own, neither of which has its name yet."""
        parts = folder / "parts"
        parts.mkdir()
        outputs = [replace(write(parts / name, name.encode()), name=f"m/{name}") for name in ("one", "two")]
        journal = Journal(folder / "journal.json")
        journal.record("a", record(outputs))
        return journal, outputs

    def test_they_go_on_where_they_ended(self, tmp_path: Path) -> None:
        journal, _ = self.made(tmp_path)
        (tmp_path / "m").mkdir()
        (tmp_path / "parts" / "one").replace(tmp_path / "m" / "one")
        assert journal.finish_renames("a", tmp_path / "parts")
        assert outputs_intact(journal["a"], tmp_path)
        assert not journal.finish_renames("a", tmp_path / "parts")

    @pytest.mark.parametrize("what", ["lost", "changed", "taken"])
    def test_nothing_is_renamed_if_one_cannot_be(self, what: str, tmp_path: Path) -> None:
        journal, _ = self.made(tmp_path)
        if what == "lost":
            (tmp_path / "parts" / "two").unlink()
        elif what == "changed":
            (tmp_path / "parts" / "two").write_bytes(b"others")
        else:
            (tmp_path / "m").mkdir()
            (tmp_path / "m" / "two").write_bytes(b"precious")
        assert not journal.finish_renames("a", tmp_path / "parts")
        assert (tmp_path / "parts" / "one").exists()
        assert what != "taken" or (tmp_path / "m" / "two").read_bytes() == b"precious"

    @pytest.mark.parametrize("name", ["../one", "/tmp/one", "m/../../one"])
    def test_no_name_leads_out_of_the_workspace(self, name: str, tmp_path: Path) -> None:
        root = tmp_path / "workspace"
        root.mkdir()
        journal, outputs = self.made(root)
        journal.record("a", record([replace(outputs[0], name=name)]))
        assert not journal.finish_renames("a", root / "parts")
        assert (root / "parts" / "one").exists()


@pytest.mark.parametrize(
    ("commands", "line"),
    [
        ((), ""),
        ((("tool", "-x", ""),), "tool -x ''"),
        ((("cd", "/my models"), ("tool", "--foo", "a b")), "cd '/my models' && tool --foo 'a b'"),
        ((("tool", "a && b", "&&", " && "),), "tool 'a && b' '&&' ' && '"),
    ],
)
def test_commands_are_one_line_and_come_back(commands: tuple[tuple[str, ...], ...], line: str) -> None:
    assert command_line(commands) == line
    assert commands_in(line) == commands
    assert StepRecord.now({}, [], "", 1.0, commands=commands).commands == commands


WORDS = st.text(st.sampled_from("a&\"' \\$;\n") | st.characters(codec="utf-8"), max_size=8)


@given(st.lists(st.lists(WORDS, min_size=1, max_size=4).map(tuple), max_size=3).map(tuple))
def test_every_word_comes_back_as_it_was(commands: tuple[tuple[str, ...], ...]) -> None:
    assert commands_in(command_line(commands)) == commands


@pytest.mark.parametrize("line", ["tool 'unclosed", "tool && other 'unclosed", "tool \\"])
def test_a_line_that_no_shell_would_take_has_no_commands(line: str) -> None:
    assert commands_in(line) == ()
