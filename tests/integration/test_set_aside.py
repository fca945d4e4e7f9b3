"""Levels whose imatrix is of the user's own text are measured on a part of that text, which the imatrix never saw."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from imatrix_runner.journal import Journal
from imatrix_runner.report.document import read_report
from support.in_process import CommandLine
from support.tiny_models import paragraphs

LEVELS = ("--levels", "Q4_K_M", "-c", "128", "--chunks", "8", "-t", "1")


@pytest.fixture(scope="module")
def own_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("own") / "domain.txt"
    path.write_text(paragraphs(130_000), encoding="utf-8")
    return path


def text_of_the_matrix(work: Path) -> str:
    return Journal(work / "tiny" / "journal.json")["imatrix"].inputs["calibration text"]


def test_a_part_is_set_aside_measured_on_and_remembered(
    tiny_model: Path, own_text: Path, cli: CommandLine, tmp_path: Path
) -> None:
    command = ("run", tiny_model, "-f", own_text, *LEVELS, "--ab", "--work-dir", tmp_path / "work")
    done = cli(*command)
    assert done.code == 0, done.err
    assert "of domain.txt (" in done.err.replace("\n", " ")
    assert "is set aside to measure on" in done.err.replace("\n", " ")
    root = tmp_path / "work" / "tiny"
    held = (root / "texts" / "domain.held-out.txt").read_text(encoding="utf-8")
    kept = (root / "texts" / "domain.txt").read_text(encoding="utf-8")
    assert sorted((kept + held).split()) == sorted(own_text.read_text(encoding="utf-8").split())
    report = read_report(root / "report.json")
    assert report.evaluation is not None
    assert report.evaluation.text == "domain.held-out.txt"
    assert report.evaluation.overlap is not None
    assert report.evaluation.overlap < 0.2
    assert "Measured on domain.held-out.txt." in done.out
    assert not any("shipped prose" in caveat for caveat in report.caveats)
    assert report.imatrix is not None
    assert report.imatrix.datasets == ("domain.txt",)
    made = text_of_the_matrix(tmp_path / "work")

    again = cli("run", tiny_model, "-f", own_text, *LEVELS, "--work-dir", tmp_path / "work", "--json")  # nothing to measure
    assert again.code == 0, again.err
    assert again.document["plan"]["imatrix"]["action"] == "up-to-date"
    assert text_of_the_matrix(tmp_path / "work") == made
    alone = cli("evaluate", tiny_model, "--work-dir", tmp_path / "work", "--json")  # no text named: the one set aside
    assert alone.document["plan"]["text"] == "domain.held-out.txt"
    assert alone.document["plan"]["levels"][0]["reason"] == ""


def test_documents_are_held_out_when_a_text_is_built_and_measured_on_by_themselves(
    tiny_model: Path, cli: CommandLine, tmp_path: Path
) -> None:
    documents = [f"{number} {line}" for number, line in enumerate(paragraphs(90_000).split("\n\n"))]
    source = tmp_path / "documents.jsonl"
    source.write_text("".join(json.dumps({"text": each}) + "\n" for each in documents), encoding="utf-8")
    built = cli("calibration", "build", source, "-o", tmp_path / "own.txt", "--held-out", "0.2", "--json")
    assert built.code == 0, built.err
    held = tmp_path / "own.held-out.txt"
    assert built.document["held_out_path"] == str(held)
    kept = (tmp_path / "own.txt").read_text(encoding="utf-8")
    aside = [each for each in documents if each.strip() in held.read_text(encoding="utf-8")]
    assert 0.1 < len(aside) / len(documents) < 0.3
    assert not any(each.strip() in kept for each in aside)
    assert len(aside) + built.document["documents"] == len([each for each in documents if len(each) >= 40])
    again = cli("calibration", "build", source, "-o", tmp_path / "other.txt", "--held-out", "0.2", "--json")
    assert again.document["fingerprint"] == built.document["fingerprint"]
    done = cli("run", tiny_model, "-f", tmp_path / "own.txt", *LEVELS, "--evaluate", "--work-dir", tmp_path / "work")
    assert done.code == 0, done.err
    report = read_report(tmp_path / "work" / "tiny" / "report.json")
    assert report.evaluation is not None
    assert report.evaluation.text == "own.held-out.txt"


def test_a_matrix_of_the_whole_text_is_kept_and_the_text_named_that_was_measured(
    tiny_model: Path, own_text: Path, cli: CommandLine, tmp_path: Path
) -> None:
    work = ("--work-dir", tmp_path / "work")
    assert cli("imatrix", "generate", tiny_model, "-f", own_text, "-c", "128", "--chunks", "8", "-t", "1", *work).code == 0
    whole = text_of_the_matrix(tmp_path / "work")
    assert not (tmp_path / "work" / "tiny" / "texts").exists()
    done = cli("run", tiny_model, "-f", own_text, *LEVELS, "--evaluate", *work)
    assert done.code == 0, done.err
    assert "The imatrix was made from all of domain.txt" in done.err
    assert text_of_the_matrix(tmp_path / "work") == whole
    (caveat,) = [each for each in read_report(tmp_path / "work" / "tiny" / "report.json").caveats if "shipped prose" in each]
    assert "collected from domain.txt" in caveat


def test_a_half_finished_matrix_of_the_whole_text_goes_on_with_it(
    tiny_model: Path, own_text: Path, cli: CommandLine, tmp_path: Path
) -> None:
    (tmp_path / "work" / "tiny" / ".imatrix-parts").mkdir(parents=True)
    done = cli("run", tiny_model, "-f", own_text, *LEVELS, "--evaluate", "--work-dir", tmp_path / "work")
    assert done.code == 0, done.err
    assert "was begun with all of domain.txt" in done.err
    assert not (tmp_path / "work" / "tiny" / "texts").exists()


def test_a_dry_run_counts_the_parts_and_writes_no_text(
    tiny_model: Path, own_text: Path, cli: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its plan is the one that the same command then has, chunk for chunk; nothing of it is left anywhere."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    levels = ("--levels", "Q4_K_M", "-c", "128", "-t", "1")
    command = ("run", tiny_model, "-f", own_text, *levels, "--evaluate", "--work-dir", tmp_path / "work", "--json")
    dry = cli(*command, "--dry-run")
    assert dry.code == 0, dry.err
    assert "% of domain.txt (" in dry.err
    assert "will be set aside to measure on." in dry.err.replace("\n", " ")
    assert not list(tmp_path.rglob("*.txt"))
    assert list((tmp_path / "temporary").iterdir()) == []
    plan = dry.document["plan"]
    whole = cli("imatrix", "generate", tiny_model, "-f", own_text, "-c", "128", "--dry-run", "--json").document["plan"]
    assert 0.8 < plan["imatrix"]["chunks"] / whole["imatrix"]["chunks"] < 0.95
    wet = cli(*command)
    assert wet.code == 0, wet.err
    assert {key: plan[key] for key in ("imatrix", "measure")} == {
        key: wet.document["plan"][key] for key in ("imatrix", "measure")
    }
    again = cli(*command, "--dry-run")
    assert "is set aside to measure on: " in again.err.replace("\n", " ")
    assert again.document["plan"]["imatrix"]["action"] == "up-to-date"


def test_a_dry_run_counts_the_whole_text_where_all_of_it_is_in_use(
    tiny_model: Path, own_text: Path, cli: CommandLine, tmp_path: Path
) -> None:
    work = ("--work-dir", tmp_path / "work")
    assert cli("run", tiny_model, "-f", own_text, *LEVELS, *work).code == 0
    done = cli("run", tiny_model, "-f", own_text, *LEVELS, "--evaluate", "--dry-run", *work)
    assert done.code == 0, done.err
    assert "was made from all of domain.txt" in done.err
    assert "set aside" not in done.err


def test_the_command_that_renders_raw_records_names_the_user_s_file(
    tiny_model: Path, own_text: Path, cli: CommandLine, tmp_path: Path
) -> None:
    records = tmp_path / "records.jsonl"
    passages = own_text.read_text(encoding="utf-8").split("\n\n")
    records.write_text("\n\n".join(json.dumps({"text": passage}) for passage in passages), encoding="utf-8")
    command = ("run", tiny_model, "-f", records, *LEVELS, "--evaluate", "--work-dir", tmp_path / "work")
    for further in (("--dry-run",), ()):
        done = cli(*command, *further)
        assert done.code == 0, done.err
        assert "set aside to measure on" in done.err.replace("\n", " ")
        assert f"calibration build {records} " in done.err


def test_a_short_text_stays_whole(tiny_model: Path, tiny_text: Path, cli: CommandLine, tmp_path: Path) -> None:
    work = ("--work-dir", tmp_path / "work")
    for further in (("--dry-run",), ()):
        done = cli("run", tiny_model, "-f", tiny_text, *LEVELS, "--evaluate", *work, *further)
        assert "words.txt (" in done.err
        assert "too short to set a part aside" in done.err.replace("\n", " ")
