"""``evaluate --tasks``: source and levels on the same items, verdicts, what cannot be used, and how it continues."""

from __future__ import annotations

import json
import random
import string
from pathlib import Path

import pytest

from imatrix_runner.models.gguf_file import read_header
from imatrix_runner.resources import HELD_OUT_TEXT, resource
from support.command_line import run_command
from support.evaluations import Place, make_levels, zero_tensors
from support.in_process import CommandLine

pytestmark = pytest.mark.tasks

LEVELS = ("Q8_0", "Q4_K_M")


@pytest.fixture(autouse=True, scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Data sets are cached in a folder of the tests, and there is no network."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("hf")))
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield


@pytest.fixture(scope="module")
def place(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """Two levels of the demo model, which has learnt some English, and one that has forgotten it."""
    folder = tmp_path_factory.mktemp("tasks")
    text = resource(HELD_OUT_TEXT)
    made = make_levels(folder, demo_model, text, "--imatrix", "none", levels=(*LEVELS, "Q5_K_M"))
    broken = made.workspace.level_file("Q5_K_M")
    layers = [
        tensor.name for tensor in read_header(broken).tensors if tensor.name.endswith(("attn_output.weight", "ffn_down.weight"))
    ]
    zero_tensors(broken, *layers)
    made.accept("Q5_K_M")
    return made


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A task in a file of its own: which of two pieces of text is in the right order. Its data lie next to it."""
    folder = tmp_path_factory.mktemp("order")
    words, draw = resource(HELD_OUT_TEXT).read_text(encoding="utf-8").split(), random.Random(7)
    rows = []
    for at in range(0, 120 * 24, 24):
        right, wrong = words[at + 12 : at + 24], words[at + 12 : at + 24]
        draw.shuffle(wrong)
        choices = [" ".join(right), " ".join(wrong)]
        answer = draw.randrange(2)
        rows.append({"text": " ".join(words[at : at + 12]), "choices": choices[:: 1 - 2 * answer], "answer": answer})
    (folder / "order.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "order.yaml").write_text(
        """
task: order
dataset_path: json
dataset_kwargs: {data_files: {test: order.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
""",
        encoding="utf-8",
    )
    return folder / "order.yaml"


def test_a_level_that_forgot_raises_the_alarm_and_a_close_one_does_not(place: Place, task: Path, cli: CommandLine) -> None:
    done = place.evaluate(cli, "--tasks", task, "--json", "-q", chunks=2)
    assert (done.code, done.err) == (0, "")
    found = {each["level"]: each["comparisons"] for each in done.document["measured"]["tasks"]}
    close, broken = found["Q8_0"][0], found["Q5_K_M"][0]
    assert (close["task"], close["metric"], close["n_items"], close["test"]) == ("order", "acc", 120, "McNemar")
    assert close["source"]["value"] > 0.75
    assert close["verdict"] == "no difference seen"
    assert broken["verdict"] == "alarm"
    assert broken["lost"] - broken["gained"] == round(-120 * broken["difference"]["value"]) > 6

    again = place.evaluate(cli, "--tasks", task, chunks=2)
    assert "computes the tasks" not in again.err
    assert "ALARM" in again.out
    report = json.loads((place.root / "report.json").read_text(encoding="utf-8"))
    assert [each["level"] for each in report["tasks"]] == ["Q8_0", "Q5_K_M", "Q4_K_M"]
    for name in ("report.html", "report.md"):
        assert "no difference seen with 120 items" in (place.root / name).read_text(encoding="utf-8")


def test_what_cannot_be_used_is_named_and_the_others_go_on(place: Place, task: Path, cli: CommandLine) -> None:
    code = task.with_name("code.yaml")
    code.write_text(f"include: {task}\ntask: code\nunsafe_code: true\n", encoding="utf-8")
    gone = task.with_name("gone.yaml")
    gone.write_text(
        "task: gone\ndataset_path: nobody/has_this\ntest_split: test\noutput_type: multiple_choice\n", encoding="utf-8"
    )
    silent = task.with_name("silent.yaml")
    ends = json.dumps(list(string.printable))  # any of them ends the answer before it begins
    generation = (
        f"generation_kwargs: {{until: {ends}, max_gen_toks: 8, do_sample: false}}\nmetric_list: [{{metric: exact_match}}]"
    )
    silent.write_text(
        "task: silent\ndataset_path: json\ndataset_kwargs: {data_files: {test: order.jsonl}}\ntest_split: test\n"
        f'output_type: generate_until\ndoc_to_text: "{{{{text}}}}"\ndoc_to_target: "x"\n{generation}\n',
        encoding="utf-8",
    )
    some = ("--limit", "30", "--levels", "Q4_K_M", "--json", "-q")
    done = place.evaluate(cli, "--tasks", f"{task},{code},{gone},{silent}", *some, chunks=2)
    assert done.code == 100
    measured = done.document["measured"]
    assert [each["comparisons"][0]["n_items"] for each in measured["tasks"]] == [30]
    assert {name: error["kind"] for name, error in measured["failed"].items()} == {
        "task code": "usage",
        "task gone": "invalid-data",
        "task silent": "invalid-data",
    }
    assert "every answer is empty" in str(measured["failed"]["task silent"])
    assert "--allow-code-execution" in str(measured["failed"]["task code"])

    alone = place.evaluate(cli, "--tasks", gone, chunks=2)
    assert alone.code == 6
    assert "The data of the task gone cannot be had" in alone.err


def test_a_killed_command_continues(place: Place, task: Path, tmp_path: Path, cli: CommandLine) -> None:
    copy = place.copy(tmp_path / "work")
    arguments = copy.arguments("--tasks", task, "--levels", "Q8_0", "--again", "--json", "-q", chunks=2)
    whole = run_command(*arguments, cwd=tmp_path).document["measured"]["tasks"]
    folder = copy.workspace.evaluation / "tasks"
    files = {name: (folder / f"{name}.outcomes") for name in ("source", "Q8_0")}
    bytes_before = {name: file.read_bytes() for name, file in files.items()}
    # as after a kill while the source's outcomes were written
    files["source"].write_bytes(bytes_before["source"][: len(bytes_before["source"]) // 2])
    files["Q8_0"].unlink()
    journal = json.loads(copy.workspace.journal.read_text(encoding="utf-8"))
    del journal["steps"]["tasks Q8_0"]
    copy.workspace.journal.write_text(json.dumps(journal), encoding="utf-8")
    done = copy.evaluate(cli, "--tasks", task, "--levels", "Q8_0", "--json", "-q", chunks=2)
    assert done.document["measured"]["tasks"] == whole
    assert {name: file.read_bytes() for name, file in files.items()} == bytes_before
