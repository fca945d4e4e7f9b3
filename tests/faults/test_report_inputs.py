"""Reports where something stands in the way, of models whose metadata is hostile, and killed while they are written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from imatrix_runner.app import report as report_flow
from imatrix_runner.chat.prompt_format import prompt_format
from imatrix_runner.errors import InvalidDataError, NoSpaceError
from imatrix_runner.journal import Journal, outputs_intact
from imatrix_runner.models.gguf_file import read_header
from imatrix_runner.process import Runner
from imatrix_runner.report.document import read_report
from imatrix_runner.report.facts.gather_model import base_models
from imatrix_runner.workspace import Workspace
from support.command_line import run_command
from support.llama_tools import digest
from support.tiny_models import write_llama_gguf
from support.workspaces import Heard, copy, measure, report_files, reported, run_here, timeless, unreported

HUB = "https://huggingface.co/"
LEVELS = {"Q8_0": 0.001, "Q4_0": 0.05}


@pytest.fixture(scope="module")
def made(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    folder = tmp_path_factory.mktemp("made")
    workspace = unreported(run_here(folder, "run", tiny_model, "--levels", ",".join(LEVELS), "--imatrix", "none"))
    measure(workspace, LEVELS)
    return workspace


@pytest.fixture
def own(made: Workspace, tmp_path: Path) -> Workspace:
    return copy(made, tmp_path)


# -- in the way ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["report.html", "report.md", "report.json", "report.png"])
def test_a_file_of_the_users_is_refused_and_nothing_is_written(own: Workspace, name: str) -> None:
    (own.root / name).write_text("mine", encoding="utf-8")
    with pytest.raises(InvalidDataError) as caught:
        report_files(own)
    assert name in caught.value.what
    assert "not made here" in caught.value.why
    assert f"imatrix-runner report {own.root}" in caught.value.todo
    assert [path.name for path in own.root.glob("*report*")] == [name]
    assert (own.root / name).read_text(encoding="utf-8") == "mine"


def test_a_card_that_was_edited_is_kept_and_so_are_the_others(own: Workspace) -> None:
    files = report_files(own)
    card = files.markdown.read_text(encoding="utf-8") + "\nMy own words.\n"
    files.markdown.write_text(card, encoding="utf-8")
    before = digest(files.html)
    with pytest.raises(InvalidDataError, match="changed since it was made"):
        report_files(own)
    assert files.markdown.read_text(encoding="utf-8") == card
    assert digest(files.html) == before
    files.markdown.rename(own.root / "README.md")
    assert report_files(own).markdown.is_file()
    assert (own.root / "README.md").read_text(encoding="utf-8") == card


def test_a_picture_of_the_users_is_left_alone_where_none_is_made(made: Workspace, own: Workspace) -> None:
    (own.root / "tiny-Q8_0.gguf").unlink()
    (own.root / "report.png").write_bytes(b"mine")
    files = report_files(own)
    assert files.picture is None
    assert (own.root / "report.png").read_bytes() == b"mine"


def test_a_folder_with_a_reports_name_is_in_the_way(own: Workspace) -> None:
    (own.root / "report.md").mkdir()
    with pytest.raises(InvalidDataError, match="not made here"):
        report_files(own)


def test_a_full_disk_leaves_the_old_report(own: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    files = report_files(own)
    before = {path: digest(path) for path in files.paths}
    measure(own, {"Q4_0": 0.06})
    write = Path.write_bytes

    def full(self: Path, data: bytes) -> int:
        if self.name == ".report.png.part":
            raise OSError(28, "No space left on device")
        return write(self, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(NoSpaceError):
        report_files(own)
    assert {path: digest(path) for path in files.paths} == before
    assert not list(own.root.glob(".report*"))
    monkeypatch.undo()
    assert report_files(own).made


@pytest.mark.parametrize("moment", [1, 3, 6])
def test_killed_between_two_files_the_next_time_makes_them_all(made: Workspace, own: Workspace, moment: int) -> None:
    report_files(own)
    measure(own, {"Q4_0": 0.06})
    ran = run_command("report", own.root, cwd=own.root.parent, dies_after=moment)
    assert ran.code in (-9, 0)
    assert (ran.code == -9) == (moment <= 5)  # the journal, then the four files
    files = report_files(own)
    assert outputs_intact(Journal(own.journal)["report"], own.root)
    assert timeless(read_report(files.json)) == timeless(reported(own))
    assert sorted(path.name for path in own.root.glob("*report*")) == ["report.html", "report.json", "report.md", "report.png"]
    assert not list(own.root.glob(".report*"))


# -- hostile metadata ---------------------------------------------------------------------------------------------------------

MARK = "A" * 24


def hostile(folder: Path, metadata: dict[str, Any], spoil: bytes = b"") -> Workspace:
    """A workspace of a model with this metadata; ``spoil`` takes the place of every :data:`MARK` in its file."""
    model = write_llama_gguf(folder / "tiny-BF16.gguf", layers=1, metadata=metadata)
    model.write_bytes(model.read_bytes().replace(MARK.encode(), spoil.ljust(len(MARK), b"A")))
    return run_here(folder, "run", model, "--levels", "Q4_0", "--imatrix", "none")


def commands_the_terminal(text: str) -> bool:
    return any(not character.isprintable() and character not in "\n\t" for character in text)


def test_words_that_are_too_long_are_left_out_not_cut(tmp_path: Path) -> None:
    long = {
        "general.license": "l" * (1 << 20),
        "general.license.name": "n" * 201,
        "general.license.link": "k" * 501,
        "general.languages": ["en", "x" * 101, *(f"l{number}" for number in range(300))],
        "general.tags": ["ok", "t" * 5000],
        "tokenizer.chat_template": "{{ messages }}" + "{#" + "c" * (1 << 20) + "#}",
    }
    heard = Heard()
    model = reported(hostile(tmp_path, long), heard).model
    assert (model.license, model.license_name, model.license_link, model.prompt_format) == ("", "", "", "")
    assert model.tags == ("ok",)
    assert (len(model.languages), model.languages[0]) == (200, "en")
    assert heard.told("warning", "general.license ", "1048576 characters")
    assert heard.told("warning", "general.languages", "200 of 302")
    assert heard.told("warning", "general.tags", "1 of 2")
    assert heard.told("detail", "no prompt format", "1 MiB")


@pytest.mark.parametrize(
    "spoil",
    [b"\xff\xfe\xfa", b"\x1b]0;owned\x07", b"\xc2\x9b2J\r\n", "\u202eevil".encode()],
    ids=["bytes", "escape", "c1", "bidi"],
)
def test_no_metadata_commands_a_terminal(spoil: bytes, tmp_path: Path) -> None:
    metadata = {
        "general.license": MARK,
        "general.license.name": MARK,
        "general.license.link": MARK,
        "general.languages": [MARK],
        "general.tags": [MARK],
        "tokenizer.chat_template": "{% for m in messages %}" + MARK + "{{ m.content }}{% endfor %}",
    }
    workspace = hostile(tmp_path, metadata, spoil)
    model = reported(workspace).model
    told = (model.license, model.license_name, model.license_link, *model.languages, *model.tags, model.prompt_format)
    assert all("AAA" in text and "\ufffd" in text and not commands_the_terminal(text) for text in told)
    for name in ("report.json", "report.md"):
        assert not commands_the_terminal((workspace.root / name).read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("template", "format"),
    [
        ("{{ raise_exception('no') if messages[0].role == 'system' }}{{ messages[0].content }}!", "{prompt}!"),
        (
            "{% for m in messages %}{{ m.content }} {% endfor %}{% if add_generation_prompt %}>{% endif %}",
            "{system_prompt} {prompt} >",
        ),
        ("{{ messages | length }}", ""),
        ("{{ raise_exception('never') }}{{ messages }}", ""),
        ("{% for broken", ""),
        ("rwkv-world", ""),
        ("{{ messages[-1].content * 100000 }}", ""),
        ("{{ messages[-1].content }}{{ ''.__class__.__mro__ }}", ""),
    ],
)
def test_a_template_gives_a_format_or_none(template: str, format: str, tmp_path: Path) -> None:  # noqa: A002
    model = write_llama_gguf(tmp_path / "m.gguf", layers=1, metadata={"tokenizer.chat_template": template})
    heard = Heard()
    assert prompt_format(read_header(model), Runner(), heard) == format
    assert heard.told("detail", "no prompt format") == (not format)


@pytest.mark.parametrize(
    ("url", "ids"),
    [
        ("https://huggingface.co/org/name", ("org/name",)),
        ("http://www.huggingface.co/org/name/", ("org/name",)),
        ("https://huggingface.co/org/../../etc", ()),
        ("https://huggingface.co/org/name?x=<script>", ()),
        ("https://huggingface.co.evil.example/org/name", ()),
        ("javascript:alert(1)//huggingface.co/org/name", ()),
        ("org/name", ()),
    ],
)
def test_only_addresses_of_the_hub_become_hub_ids(url: str, ids: tuple[str, ...], tmp_path: Path) -> None:
    model = write_llama_gguf(tmp_path / "m.gguf", layers=1, metadata={"general.repo_url": url})
    assert base_models(read_header(model), "") == ids


def test_a_model_whose_own_id_is_not_known_is_not_said_to_be_its_base(tmp_path: Path) -> None:
    metadata = {"general.base_model.0.repo_url": "https://huggingface.co/org/base"}
    header = read_header(write_llama_gguf(tmp_path / "m.gguf", layers=1, metadata=metadata))
    assert base_models(header, "") == ()
    assert base_models(header, "org/tuned") == ("org/tuned", "org/base")


@pytest.mark.parametrize(
    ("metadata", "repo", "ids"),
    [
        ({"general.source.url": "https://huggingface.co/org/Tiny"}, "", ("org/Tiny",)),
        ({"general.source.url": "https://huggingface.co/org/Tiny-GGUF"}, "", ()),
        (
            {"general.name": "Tiny 1B", "general.base_model.0.repo_url": "https://huggingface.co/org/Tiny-1B"},
            "",
            ("org/Tiny-1B",),
        ),
        ({"general.source.url": "https://huggingface.co/org/Tiny"}, "copier/Tiny-GGUF", ("org/Tiny",)),
        ({}, "copier/Tiny-GGUF", ("copier/Tiny-GGUF",)),
        ({"general.source.url": "https://huggingface.co/org/Tiny"}, "other/Tuned", ("other/Tuned",)),
    ],
)
def test_a_source_names_its_own_hub_id(metadata: dict[str, str], repo: str, ids: tuple[str, ...], tmp_path: Path) -> None:
    header = read_header(write_llama_gguf(tmp_path / "m.gguf", layers=1, metadata=metadata))
    assert base_models(header, repo) == ids


def test_a_folder_of_the_hubs_cache_names_the_model_that_was_converted(tmp_path: Path) -> None:
    folder = tmp_path / "models--org--Tiny" / "snapshots" / ("0" * 40)
    folder.mkdir(parents=True)
    header = read_header(write_llama_gguf(tmp_path / "m.gguf", layers=1))
    assert base_models(header, "", folder) == ("org/Tiny",)
    assert base_models(header, "", tmp_path) == ()


# -- a damaged memory ---------------------------------------------------------------------------------------------------------


def spoiled(workspace: Workspace, change: Callable[[dict[str, Any]], object]) -> None:
    journal = json.loads(workspace.journal.read_text(encoding="utf-8"))
    change(journal)
    workspace.journal.write_text(json.dumps(journal), encoding="utf-8")


def test_figures_that_nobody_wrote_are_an_error_of_ours(own: Workspace) -> None:
    spoiled(own, lambda journal: journal["steps"]["evaluate Q4_0"]["facts"].update(divergence={"n_tokens": "many"}))
    with pytest.raises(InvalidDataError, match="not what this program wrote"):
        report_files(own)


def test_a_report_of_another_program_is_replaced(own: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it made may be read differently, or not at all; it is ours all the same."""
    files = report_files(own)
    monkeypatch.setattr(report_flow, "__version__", "0.0.9")
    assert report_files(own).made
    assert files.json.is_file()
