"""A workspace belongs to one source: another of the same name never touches what was made from the first."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from imatrix_runner.context.ownership import find_workspace
from imatrix_runner.models.model import parse_source
from support.in_process import CommandLine
from support.llama_tools import digest
from support.tiny_models import write_hf_directory, write_llama_gguf

LEVELS = ("--imatrix", "none", "--levels", "Q8_0")


def model(path: Path, seed: int = 0) -> Path:
    path.parent.mkdir(exist_ok=True)
    return write_llama_gguf(path, hidden=64, ff=64, layers=1, seed=seed)


def states(cli: CommandLine, source: Path | str, *further: str) -> tuple[Path, str]:
    """The workspace that a run of a source takes, and what it does to Q8_0 there."""
    ran = cli("run", source, *LEVELS, "--json", *further)
    assert ran.code == 0, ran.err
    plan = ran.document["plan"]
    return Path(plan["workspace"]), plan["levels"][0]["state"]


@pytest.fixture
def first(cli: CommandLine, tmp_path: Path) -> Path:
    """A model whose level is made in work/m."""
    path = model(tmp_path / "x" / "m-BF16.gguf")
    assert states(cli, path) == (tmp_path / "work" / "m", "todo")
    return path


def test_a_second_model_of_the_same_name_gets_a_workspace_of_its_own(cli: CommandLine, first: Path, tmp_path: Path) -> None:
    level = tmp_path / "work" / "m" / "m-Q8_0.gguf"
    before = digest(level)
    second = model(tmp_path / "y" / "m-BF16.gguf", seed=1)
    dry = cli("run", second, *LEVELS, "--dry-run", "--json")
    assert f"{level.parent} belongs to {first}" in dry.err
    own, state = states(cli, second)
    assert Path(dry.document["plan"]["workspace"]) == own != level.parent
    assert (own.name[:2], state) == ("m-", "todo")
    assert (own / f"{own.name}-Q8_0.gguf").is_file()
    assert digest(level) == before
    assert states(cli, second) == (own, "up-to-date")
    assert states(cli, first) == (level.parent, "up-to-date")
    assert {entry["model"] for entry in cli("status", "--json").document["workspaces"]} == {"m", own.name}


def test_other_precisions_are_other_models(cli: CommandLine, first: Path) -> None:
    """Both are called m, and levels of one are not levels of the other."""
    half = write_llama_gguf(first.with_name("m-F16.gguf"), hidden=64, ff=64, layers=1, dtype="f16")
    assert states(cli, half)[0].name != "m"


def test_force_takes_the_workspace_over_and_counts_nothing_of_before(cli: CommandLine, first: Path, tmp_path: Path) -> None:
    assert cli("run", first, "--imatrix", "none", "--levels", "Q4_0,Q8_0").code == 0
    second = model(tmp_path / "y" / "m-BF16.gguf", seed=1)
    taken = cli("run", second, *LEVELS, "--force")
    assert taken.code == 0, taken.err
    assert f"now belongs to {second}" in taken.err
    assert "Q4_0" in next(line for line in taken.err.splitlines() if "made from another source" in line)
    (entry,) = cli("status", "--json").document["workspaces"]
    assert (entry["levels_done"], entry["levels_wanted"], entry["state"]) == (1, 1, "done")
    report = json.loads((tmp_path / "work" / "m" / "report.json").read_text(encoding="utf-8"))
    assert [level["name"] for level in report["levels"]] == ["Q8_0"]
    asked = cli("evaluate", second, "--levels", "Q4_0")
    assert asked.code == 2
    assert "Q4_0 cannot be measured against this m" in asked.err


def test_a_new_version_at_the_same_place_continues(cli: CommandLine, first: Path, tmp_path: Path) -> None:
    model(first, seed=1)
    ran = cli("evaluate", first)
    assert ran.code == 2
    assert "or an earlier version of this one" in ran.err
    assert states(cli, first) == (tmp_path / "work" / "m", "todo")
    assert states(cli, first) == (tmp_path / "work" / "m", "up-to-date")


def test_a_moved_and_a_copied_model_continue(cli: CommandLine, first: Path, tmp_path: Path) -> None:
    moved = tmp_path / "z" / first.name
    moved.parent.mkdir()
    first.rename(moved)
    assert states(cli, moved) == (tmp_path / "work" / "m", "up-to-date")
    copied = Path(shutil.copyfile(moved, tmp_path / first.name))  # another inode, another time
    assert states(cli, copied) == (tmp_path / "work" / "m", "up-to-date")
    assert states(cli, moved) == (tmp_path / "work" / "m", "up-to-date")
    link = tmp_path / "x" / first.name
    link.symlink_to(moved)
    assert states(cli, link) == (tmp_path / "work" / "m", "up-to-date")


def test_a_place_may_be_written_in_many_ways(cli: CommandLine, first: Path, tmp_path: Path) -> None:
    second = model(tmp_path / "y" / "m-BF16.gguf", seed=1)
    own, _ = states(cli, second)
    assert states(cli, Path("y/../y") / second.name) == (own, "up-to-date")
    assert states(cli, Path("x/../x") / first.name) == (tmp_path / "work" / "m", "up-to-date")


def test_a_workspace_of_an_earlier_version_is_its_source_s(cli: CommandLine, first: Path, tmp_path: Path) -> None:
    """It has no claim, but the source as it was typed, and hashes."""
    journal = tmp_path / "work" / "m" / "journal.json"
    document = json.loads(journal.read_text(encoding="utf-8"))
    kept = ("model", "source", "levels", "command", "finished")
    document["facts"] = {name: value for name, value in document["facts"].items() if name in kept}
    old = json.dumps(document)
    journal.write_text(old, encoding="utf-8")
    assert states(cli, first) == (journal.parent, "up-to-date")
    journal.write_text(old, encoding="utf-8")
    copied = Path(shutil.copyfile(first, tmp_path / first.name))
    assert states(cli, copied) == (journal.parent, "up-to-date")
    journal.write_text(old, encoding="utf-8")
    assert states(cli, model(tmp_path / "y" / "m-BF16.gguf", seed=1))[0] != journal.parent


def test_a_workspace_in_which_nothing_was_begun_is_anybody_s(cli: CommandLine, tmp_path: Path) -> None:
    """An imatrix may be put there before the first run."""
    (tmp_path / "work" / "m").mkdir(parents=True)
    (tmp_path / "work" / "m" / "notes.txt").touch()
    assert states(cli, model(tmp_path / "y" / "m-BF16.gguf"))[0] == tmp_path / "work" / "m"


def workspace_of(text: str, work: Path) -> Path:
    from imatrix_runner.events import ignore
    from imatrix_runner.signals import Stop

    return find_workspace(parse_source(text), text, work, ignore, Stop()).root


def begun(work: Path, name: str, **facts: str) -> Path:
    root = work / name
    root.mkdir(parents=True)
    (root / "journal.json").write_text(json.dumps({"version": 1, "facts": facts}), encoding="utf-8")
    return root


def test_hub_ids_with_one_last_part(tmp_path: Path) -> None:
    root = begun(tmp_path, "name", source="org/name", hub=f"org/name@{'a' * 40}", source_at="hub:org/name@main")
    assert workspace_of("org/name", tmp_path) == root
    assert workspace_of(f"org/name@{'a' * 40}", tmp_path) == root
    assert workspace_of("org/name@main", tmp_path) == root
    others = {workspace_of(text, tmp_path) for text in ("other/name", "org/name@v2", f"org/name@{'b' * 40}")}
    assert len(others) == 3
    assert root not in others


def test_a_second_model_keeps_its_workspace_when_the_first_one_s_is_gone(tmp_path: Path) -> None:
    root = begun(tmp_path, "name", source="org/name", source_at="hub:org/name@main")
    own = workspace_of("other/name", tmp_path)
    begun(tmp_path, own.name, source="other/name", source_at="hub:other/name@main")
    assert workspace_of("other/name", tmp_path) == own
    shutil.rmtree(root)
    assert workspace_of("other/name", tmp_path) == own
    assert workspace_of("org/name", tmp_path) == root


def test_a_hub_id_of_an_earlier_version(tmp_path: Path) -> None:
    root = begun(tmp_path, "name", source="org/name", hub=f"org/name@{'a' * 40}")
    assert workspace_of("org/name", tmp_path) == root
    assert workspace_of("other/name", tmp_path) != root


def test_a_hub_id_and_its_folder_in_the_cache_are_one_source(tmp_path: Path) -> None:
    commit = "a" * 40
    snapshot = write_hf_directory(tmp_path / "models--org--name" / "snapshots" / commit, layers=1)
    work = tmp_path / "work"
    root = begun(work, "name", source="org/name", hub=f"org/name@{commit}", source_at="hub:org/name@main")
    assert workspace_of(str(snapshot), work) == root
    shutil.rmtree(work)
    root = begun(work, "name", source=str(snapshot), source_at=str(snapshot))
    assert workspace_of("org/name", work) == root
    assert workspace_of("other/name", work) != root


def test_a_checkpoint_is_known_by_its_weights(tmp_path: Path) -> None:
    """Wherever it lies, whatever its files' times; a card that is edited makes no other model."""
    from imatrix_runner.context.ownership import claim, place_of
    from imatrix_runner.context.source_hashes import Hasher, checkpoint_content
    from imatrix_runner.events import ignore
    from imatrix_runner.journal import Journal
    from imatrix_runner.signals import Stop

    work, directory = tmp_path / "work", write_hf_directory(tmp_path / "x" / "name", layers=1)
    root = begun(work, "name")
    content = checkpoint_content(directory, Hasher(Journal(root / "journal.json"), ignore, Stop(), keep=False))
    claim(Journal(root / "journal.json"), place_of(parse_source(str(directory))), content.weights, content.n_bytes)
    copied = Path(shutil.copytree(directory, tmp_path / "y" / "name", copy_function=shutil.copyfile))
    (copied / "README.md").write_text("edited", encoding="utf-8")
    os.utime(copied / "model.safetensors", (1, 1))
    assert workspace_of(str(copied), work) == root
    other = write_hf_directory(tmp_path / "z" / "name", layers=1, seed=1)
    assert workspace_of(str(other), work) != root


def test_a_copied_workspace_knows_its_own_matrix_and_levels(cli: CommandLine, tiny_model: Path, tiny_text: Path) -> None:
    """A copy has other inodes and times; nothing in it is made again, and nothing is taken for somebody else's."""
    arguments = ("run", tiny_model, "-f", tiny_text, "-c", "128", "--chunks", "4", "--levels", "Q4_0", "--json")
    first = cli(*arguments)
    assert first.code == 0, first.err
    shutil.copytree("work", "copy", copy_function=shutil.copyfile)
    assert [entry["state"] for entry in cli("status", "--work-dir", "copy", "--json").document["workspaces"]] == ["done"]
    again = cli(*arguments, "--work-dir", "copy")
    assert again.code == 0, again.err
    assert again.document["plan"]["imatrix"]["action"] == "up-to-date"
    assert again.document["collected"] == first.document["collected"]
    assert [level["status"] for level in again.document["levels"]] == ["skipped"]


def test_a_converted_model_may_be_named_itself(tmp_path: Path) -> None:
    root = begun(tmp_path, "name", source="x/name", source_at="/elsewhere/x/name", source_content="sha256:1")
    converted = model(root / "name-BF16.gguf")
    assert workspace_of(str(converted), tmp_path) == root


def test_a_matrix_of_an_earlier_version_is_said_to_be_one(cli: CommandLine, tmp_path: Path, tiny_text: Path) -> None:
    path = model(tmp_path / "m-BF16.gguf")
    collected = cli("imatrix", "generate", path, "-f", tiny_text, "-c", "128", "--chunks", "4")
    assert collected.code == 0, collected.err
    assert "another version" not in cli("quantize", path, "--levels", "Q4_0", "--dry-run").err
    model(path, seed=1)
    assert "imatrix.gguf was collected from another version of m" in cli("quantize", path, "--levels", "Q4_0", "--dry-run").err
