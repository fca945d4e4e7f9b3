"""From a real workspace to its report: what is told, by whom, and what is left when files are gone."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from imatrix_runner.app.report import remember_target
from imatrix_runner.errors import InvalidDataError
from imatrix_runner.files import Stamp, joint_sha256, sha256, stamp
from imatrix_runner.imatrix.formats import read, write_gguf
from imatrix_runner.imatrix.matrix import Matrix, MatrixEntry
from imatrix_runner.imatrix.statistics import statistics
from imatrix_runner.journal import Journal
from imatrix_runner.models.model import open_gguf
from imatrix_runner.report.document import encode_report, read_report
from imatrix_runner.report.facts.gather_model import find_source
from imatrix_runner.workspace import Workspace
from support.command_line import RunCommand
from support.dialogues import TEMPLATE
from support.hub_server import HubServer
from support.reports import hashed
from support.tiny_models import write_llama_gguf
from support.workspaces import (
    KLDS,
    LEVELS,
    Heard,
    compare_and_answer,
    copy,
    measure,
    measured_kld,
    report_files,
    reported,
    run_here,
    timeless,
    unreported,
)

RUN = ("--levels", ",".join(LEVELS), "-c", "128", "--chunks", "20")
METADATA = {
    "tokenizer.chat_template": TEMPLATE,
    "general.license": "apache-2.0",
    "general.license.link": "https://example.org/LICENSE",
    "general.repo_url": "https://huggingface.co/tiny-org/Tiny",
    "general.base_model.0.repo_url": "https://huggingface.co/tiny-org/Tiny-Base/",
    "general.base_model.1.repo_url": "https://example.org/elsewhere",
    "general.languages": ["en", "de"],
    "general.tags": ["poetry"],
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("secret-source")
    return write_llama_gguf(folder / "tiny-BF16.gguf", metadata=METADATA)


@pytest.fixture(scope="module")
def made(source: Path, tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """Three levels and their imatrix, measured, without a report; for those who only read."""
    workspace = unreported(run_here(tmp_path_factory.mktemp("secret-work"), "run", source, *RUN, "-f", tiny_text))
    measure(workspace)
    compare_and_answer(workspace, "Q4_K_M")
    return workspace


@pytest.fixture
def own(made: Workspace, tmp_path: Path) -> Workspace:
    """A copy to change."""
    return copy(made, tmp_path)


def test_the_model_is_told_by_its_file(made: Workspace, source: Path) -> None:
    model, there = reported(made).model, open_gguf(source, allow_requantize=False)
    assert (model.name, model.architecture, model.type, model.origin) == ("tiny", "llama", "BF16", "tiny-BF16.gguf")
    assert (model.n_params, model.n_bytes) == (there.n_params, source.stat().st_size)
    assert (model.context_length, model.n_layers, model.n_experts) == (2048, 2, 0)
    (file,) = model.files
    assert (file.name, file.n_bytes, file.sha256) == (source.name, source.stat().st_size, sha256(source))
    assert model.fingerprint == f"sha256:{sha256(source)}"
    assert (model.license, model.license_name, model.license_link) == ("apache-2.0", "", "https://example.org/LICENSE")
    assert (model.languages, model.tags) == (("en", "de"), ("poetry",))
    assert model.base_models == ("tiny-org/Tiny", "tiny-org/Tiny-Base")
    assert (model.repo, model.commit) == ("", "")


def test_the_prompt_format_is_the_template_up_to_the_answer(made: Workspace) -> None:
    assert reported(made).model.prompt_format == "<s>system\n{system_prompt}</s>\n<s>user\n{prompt}</s>\n"


def test_levels_are_those_of_the_journal_the_largest_first(made: Workspace) -> None:
    levels = reported(made).levels
    assert [level.name for level in levels] == ["Q8_0", "Q4_K_M", "IQ2_XS"]
    for level in levels:
        (file,) = level.files
        path = made.root / file.name
        assert (file.n_bytes, file.sha256) == (path.stat().st_size, sha256(path))
        assert level.n_bytes == file.n_bytes
        assert level.bits_per_weight == pytest.approx(8 * level.n_bytes / reported(made).model.n_params, rel=0.03)
        assert level.used_imatrix
        assert level.seconds > 0
    assert [level.needs_imatrix for level in levels] == [False, False, True]


def test_the_imatrix_is_told_by_its_file_and_the_journal(made: Workspace, tiny_text: Path) -> None:
    found, path = reported(made).imatrix, made.root / "imatrix.gguf"
    assert found is not None
    assert (found.file.name, found.file.sha256) == ("imatrix.gguf", sha256(path))
    assert (found.format, found.entries, found.chunks, found.chunk_size, found.tokens) == ("gguf", 14, 20, 128, 2560)
    assert (found.made_here, found.stopped, found.origin) == (True, "chunks", "")
    assert found.ppl is not None
    assert found.ppl > 1
    there = statistics(read(path).matrix)
    assert [(each.layer, each.kind, each.total) for each in found.tensors] == [
        (each.layer, each.tensor, each.total) for each in there.tensors
    ]
    assert all(0 < each.entropy <= 1 and 0 <= each.active <= 1 for each in found.tensors)
    assert found.calibration is not None
    assert (found.calibration.name, found.calibration.sha256) == (tiny_text.name, sha256(tiny_text))
    assert found.calibration.n_bytes == tiny_text.stat().st_size


def test_figures_pairs_and_answers_come_with_their_levels(made: Workspace) -> None:
    report = reported(made)
    assert measured_kld(report) == KLDS
    assert report.evaluation is not None
    assert (report.evaluation.text, report.evaluation.seconds) == ("held_out.txt", 10.5)
    assert [pair.level for pair in report.comparisons] == ["Q4_K_M"]
    assert [found.level for found in report.domain] == ["Q4_K_M"]
    assert report.picks[0].why == "quality"


def test_every_step_is_told_in_order_with_its_command(made: Workspace) -> None:
    steps = reported(made).steps
    assert {step.what for step in steps} == {"imatrix", *LEVELS, "evaluation", "answers"}
    assert [step.finished for step in steps] == sorted(step.finished for step in steps)
    commands = {step.what: step.command for step in steps}
    assert commands["imatrix"] == (
        "llama-imatrix -m tiny-BF16.gguf -f words.txt -o imatrix.gguf -c 128 --chunks 20 -b 2048 -ub 512"
    )
    assert commands["Q4_K_M"] == "llama-quantize --imatrix imatrix.gguf tiny-BF16.gguf tiny-Q4_K_M.gguf Q4_K_M"


@pytest.mark.parametrize("kept", [True, False])
def test_arguments_for_llama_imatrix_are_told_word_for_word(
    kept: bool, tiny_model: Path, tiny_text: Path, runner: RunCommand, tmp_path: Path
) -> None:
    """Of a workspace of an earlier program, which kept no command of the imatrix, as far as its text of options tells."""
    extra = ("--", "--override-kv", "general.name=str:a b")
    options = ("--levels", "Q8_0", "-c", "128", "--chunks", "4", "-f", tiny_text, "--engine", "binaries")
    done = runner("run", tiny_model, *options, *extra)
    assert done.code == 0, done.err
    workspace = Workspace(tmp_path / "work" / "tiny", "tiny")
    if not kept:
        journal = json.loads(workspace.journal.read_text(encoding="utf-8"))
        journal["steps"]["imatrix"]["command"] = ""
        workspace.journal.write_text(json.dumps(journal), encoding="utf-8")
    report = reported(workspace)
    assert report.command.endswith("--engine binaries -- --override-kv 'general.name=str:a b'")
    (command,) = [step.command for step in report.steps if step.what == "imatrix"]
    line = f"llama-imatrix -m {tiny_model.name} -f {tiny_text.name} -o imatrix.gguf -c 128 --chunks 4 -b 2048 -ub 512 "
    assert command == line + ("--override-kv 'general.name=str:a b'" if kept else "--override-kv general.name=str:a b")
    words = shlex.split(command)
    assert (words[-1] == "general.name=str:a b") is kept


def test_a_report_tells_nothing_of_folders(made: Workspace, source: Path, tiny_text: Path) -> None:
    text = encode_report(reported(made)).decode()
    for path in (made.root, source, tiny_text):
        assert not any(part in text for part in path.parent.parts[1:] if part != "work")


def test_gathering_changes_nothing(made: Workspace) -> None:
    def state() -> dict[Path, Stamp]:
        return {path: stamp(path) for path in made.root.rglob("*")}

    before = state()
    reported(made)
    assert state() == before


# -- the files ----------------------------------------------------------------------------------------------------------------


def test_a_report_is_four_files_and_stays_until_something_changes(own: Workspace) -> None:
    first = report_files(own)
    assert first.made
    assert [path.name for path in first.paths] == ["report.html", "report.md", "report.png", "report.json"]
    assert read_report(first.json) == first.report
    assert first.html.read_text(encoding="utf-8").startswith("<!")
    assert first.markdown.read_text(encoding="utf-8").startswith("---\n")
    assert first.picture is not None
    assert first.picture.read_bytes().startswith(b"\x89PNG")
    stamps = [stamp(path) for path in first.paths]
    again = report_files(own)
    assert (again.made, again.report) == (False, first.report)
    assert [stamp(path) for path in again.paths] == stamps
    measure(own, {"IQ2_XS": 0.44})
    third = report_files(own)
    assert third.made
    assert measured_kld(read_report(third.json)) == {**KLDS, "IQ2_XS": 0.44}
    assert not list(own.root.glob("*.part"))


def test_a_picture_needs_two_measured_levels_and_goes_with_them(own: Workspace) -> None:
    assert report_files(own).picture is not None
    for level in ("Q8_0", "IQ2_XS"):
        (own.root / f"tiny-{level}.gguf").unlink()
    assert report_files(own).picture is None
    assert not (own.root / "report.png").exists()


def test_a_lost_file_of_the_report_is_made_again(own: Workspace) -> None:
    files = report_files(own)
    files.markdown.unlink()
    assert report_files(own).made
    assert files.markdown.is_file()


def test_whom_the_card_names_is_remembered(own: Workspace) -> None:
    assert report_files(own, quantized_by="ada").report.quantized_by == "ada"
    assert report_files(own).report.quantized_by == "ada"


def test_the_level_that_meets_a_target_is_named_first_until_it_is_forgotten(own: Workspace) -> None:
    report_files(own)
    journal = Journal(own.journal)
    remember_target(journal, 0.05, None)
    picks = reported(own).picks
    assert (picks[0].why, picks[0].level) == ("target", "Q4_K_M")
    remember_target(journal, None, None)
    assert "target" not in {pick.why for pick in reported(own).picks}


# -- what is gone, moved or changed --------------------------------------------------------------------------------------------


def test_a_moved_workspace_gives_the_same_report(own: Workspace, tmp_path: Path) -> None:
    before = report_files(own)
    root = own.root.rename(tmp_path / "elsewhere")
    assert timeless(reported(Workspace(root, root.name))) == timeless(before.report)
    assert not report_files(Workspace(root, root.name)).made


def test_a_copied_workspace_gives_the_same_report(made: Workspace, own: Workspace) -> None:
    """Its files carry other stamps; their content says that they are the same."""
    assert timeless(report_files(own).report) == timeless(reported(made))


def test_a_level_that_is_gone_or_changed_is_left_out(own: Workspace) -> None:
    report_files(own)
    (own.root / "tiny-Q8_0.gguf").unlink()
    with (own.root / "tiny-IQ2_XS.gguf").open("ab") as handle:
        handle.write(b"x")
    heard = Heard()
    report = reported(own, heard)
    assert [level.name for level in report.levels] == ["Q4_K_M"]
    assert [step.what for step in report.steps if step.what in LEVELS] == ["Q4_K_M"]
    assert heard.told("Q8_0", "gone or was changed")
    assert heard.told("IQ2_XS", "gone or was changed")


def test_a_source_that_is_gone_is_told_as_it_was(source: Path, tiny_text: Path, tmp_path: Path) -> None:
    own_source = tmp_path / source.name
    own_source.write_bytes(source.read_bytes())
    workspace = run_here(tmp_path, "run", own_source, "--levels", "Q4_0", "--imatrix", "none")
    before = report_files(workspace).report
    own_source.unlink()
    assert timeless(reported(workspace)) == timeless(before)


def forget_place(workspace: Workspace, folder: str) -> None:
    """As if what lay in ``folder`` had been hashed in another one, which is gone."""
    journal = json.loads(workspace.journal.read_text(encoding="utf-8"))
    moved = {path.replace(folder, "no-more"): found for path, found in journal["hashes"].items()}
    workspace.journal.write_text(json.dumps({**journal, "hashes": moved}), encoding="utf-8")


def test_a_source_that_went_before_any_report_is_told_by_a_level(made: Workspace, own: Workspace) -> None:
    whole = reported(made).model
    forget_place(own, "secret-source")
    heard = Heard()
    told = report_files(own, heard).report.model
    assert told == replace(whole, type="")
    assert heard.told("source of tiny is gone", "tiny-Q8_0.gguf")


def test_an_imatrix_that_is_gone_is_told_by_the_journal_and_a_level(made: Workspace, own: Workspace) -> None:
    whole = reported(made).imatrix
    (own.root / "imatrix.gguf").unlink()
    forget_place(own, "secret-work")
    told = report_files(own).report.imatrix
    assert whole is not None
    assert told == replace(whole, tensors=(), experts=(), without_data=())


def test_levels_without_imatrix_make_no_report_of_one_that_lies_there(own: Workspace) -> None:
    journal = Journal(own.journal)
    for name in LEVELS:
        record = journal[f"level-{name}"]
        journal.record(f"level-{name}", replace(record, inputs={**record.inputs, "imatrix": "none"}))
    report = report_files(own).report
    assert report.imatrix is None
    assert not any(level.used_imatrix for level in report.levels)


def test_levels_of_another_source_or_imatrix_are_not_mixed_in(own: Workspace) -> None:
    report_files(own)
    journal, heard = Journal(own.journal), Heard()
    old, odd = journal["level-Q8_0"], journal["level-Q4_K_M"]
    journal.record(
        "level-Q8_0", replace(old, inputs={**old.inputs, "model file": "sha256:0"}, finished="2020-01-01T00:00:00+00:00")
    )
    journal.record("level-Q4_K_M", replace(odd, inputs={**odd.inputs, "imatrix": "x.dat sha256:1"}, finished="2020"))
    report = reported(own, heard)
    assert [level.name for level in report.levels] == ["Q4_K_M", "IQ2_XS"]
    assert heard.told("warning", "another source", "Q8_0")
    assert heard.told("warning", "another imatrix", "Q4_K_M")
    assert report.imatrix is not None
    assert report.imatrix.file.name == "imatrix.gguf"


def test_figures_of_another_text_are_not_mixed_in(own: Workspace) -> None:
    journal = Journal(own.journal)
    for name in LEVELS:
        record = journal[f"evaluate {name}"]
        journal.record(f"evaluate {name}", replace(record, finished="2020-01-01T00:00:00+00:00"))
    measure(own, {"Q4_K_M": 0.02, "IQ2_XS": 0.5}, sha256=hashed("another text"), text="other.txt")
    heard = Heard()
    report = report_files(own, heard).report
    assert measured_kld(report) == {"Q4_K_M": 0.02, "IQ2_XS": 0.5}
    assert report.evaluation is not None
    assert report.evaluation.text == "other.txt"
    assert report.comparisons == ()  # its level was measured again since
    assert heard.told("warning", "Q8_0", "measured on another text or reference")


def test_a_split_source_is_found_by_what_its_shards_were(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "work" / "m", "m")
    workspace.root.mkdir(parents=True)
    shards = [tmp_path / f"m-BF16-{number:05d}-of-00002.gguf" for number in (1, 2)]
    journal = Journal(workspace.journal)
    for shard in shards:
        shard.write_bytes(shard.name.encode())
        journal.remember_hash(shard, stamp(shard), sha256(shard))
    whole = joint_sha256([sha256(shard) for shard in shards])
    assert find_source(workspace, journal, whole).paths == tuple(shards)
    assert find_source(workspace, journal, journal.hashes()[str(shards[0])].sha256).files == ()
    shards[1].write_bytes(b"another")
    found = find_source(workspace, journal, whole)
    assert (found.paths, [file.name for file in found.files]) == ((), [shard.name for shard in shards])


def test_an_imatrix_alone_is_reported_with_its_experts(tiny_text: Path, tmp_path: Path) -> None:
    model = write_llama_gguf(tmp_path / "moe-BF16.gguf", experts=4, layers=1)
    workspace = run_here(tmp_path, "imatrix", "generate", model, "-f", tiny_text, "-c", "128", "--chunks", "4")
    report = report_files(workspace).report
    assert (report.levels, report.model.n_experts) == ((), 4)
    assert report.imatrix is not None
    assert report.imatrix.made_here
    assert {each.kind for each in report.imatrix.experts} == {"ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"}
    assert all(each.experts == 4 for each in report.imatrix.experts)
    assert [step.what for step in report.steps] == ["imatrix"]
    assert report.toolchain == report.imatrix.engine


def test_a_hubs_model_and_a_published_imatrix_are_told_with_repository_and_commit(runner: RunCommand, tmp_path: Path) -> None:
    model = write_llama_gguf(tmp_path / "Tiny-BF16.gguf", layers=1)
    names = {tensor.name: tensor.shape[0] for tensor in open_gguf(model, allow_requantize=False).tensors}
    entries = {
        name: MatrixEntry(np.ones((1, n)), np.array([512])) for name, n in names.items() if name.startswith("blk.") and n > 1
    }
    entries = {name: each for name, each in entries.items() if "norm" not in name}
    write_gguf(Matrix(entries, 512, 64, ("theirs.txt",)), tmp_path / "published.gguf")
    with HubServer() as hub:
        hub.add("tiny-org/Tiny", {"Tiny-BF16.gguf": model})
        hub.add("bartowski/tiny-org_Tiny-GGUF", {"tiny-org_Tiny-imatrix.gguf": tmp_path / "published.gguf"})
        surroundings = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1"}
        assert runner("run", "tiny-org/Tiny", "--levels", "Q4_0", env=surroundings).code == 0
        source, published = hub.find("tiny-org/Tiny"), hub.find("bartowski/tiny-org_Tiny-GGUF")
    assert source is not None
    assert published is not None
    report = reported(Workspace(tmp_path / "work" / "Tiny", "Tiny"))
    assert (report.model.origin, report.model.repo, report.model.commit) == ("tiny-org/Tiny", "tiny-org/Tiny", source.commit)
    assert report.model.base_models == ("tiny-org/Tiny",)
    assert report.command == "imatrix-runner run tiny-org/Tiny --levels Q4_0"
    assert report.imatrix is not None
    assert (report.imatrix.made_here, report.imatrix.datasets) == (False, ("theirs.txt",))
    assert report.imatrix.origin == f"bartowski/tiny-org_Tiny-GGUF@{published.commit}:tiny-org_Tiny-imatrix.gguf"


def test_there_is_nothing_to_report_of_a_workspace_where_nothing_was_finished(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path, "empty")
    Journal(workspace.journal).remember(command="imatrix-runner run m.gguf", finished="no")
    with pytest.raises(InvalidDataError, match="neither a level nor an imatrix"):
        report_files(workspace)
    assert not list(tmp_path.glob("report*"))
