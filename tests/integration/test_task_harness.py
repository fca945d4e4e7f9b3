"""The child that has lm-evaluation-harness: scores of given outcomes, code tasks in the sandbox, what cannot be loaded."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest

from imatrix_runner.engines.task_jobs import TaskOutcome, TaskRequest
from imatrix_runner.errors import ToolchainError
from imatrix_runner.evaluate.tasks.harness import Harness
from imatrix_runner.evaluate.tasks.sandbox import check_sandbox
from imatrix_runner.evaluate.tasks.task_names import parse_tasks
from imatrix_runner.process import Runner
from imatrix_runner.resources import resource

pytestmark = pytest.mark.tasks


@pytest.fixture
def harness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Harness:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return Harness(Runner(), tmp_path, tmp_path / "log.txt")


def scores(
    harness: Harness, specs: Sequence[str], outcomes: dict[str, list[TaskOutcome]], *, allow_code: bool = False
) -> dict[tuple[str, str, str], tuple[float, ...]]:
    files = {label: harness.folder / f"{label}.json" for label in outcomes}
    for label, file in files.items():
        file.write_bytes(msgspec.json.encode(outcomes[label]))
    scored = harness.score(specs, None, files, lambda done, total: None, allow_code=allow_code)
    return {(each.label, row.task, row.metric): row.values for each in scored.subjects for row in each.scores}


def requests(harness: Harness) -> list[TaskRequest]:
    return [msgspec.json.decode(line, type=TaskRequest) for line in harness.requests.read_bytes().splitlines()]


def test_right_answers_to_the_mini_set_score_one_and_empty_ones_zero(harness: Harness) -> None:
    (choice,) = parse_tasks(["mini"], allow_code=False)
    prepared = harness.prepare(choice.specs, None, allow_code=False)
    assert [(each.name, each.n_items) for each in prepared.tasks] == [
        ("mini_arithmetic", 50),
        ("mini_reading", 50),
        ("mini_format", 50),
    ]
    right, empty, number = [], [], 0
    for part in ("arithmetic", "reading", "format"):
        for line in resource(f"mini_tasks/mini_{part}.jsonl").read_text(encoding="utf-8").splitlines():
            item = json.loads(line)
            if part == "reading":
                for at in range(4):
                    value = -1.0 if at == item["answer"] else -9.0
                    right.append(TaskOutcome(number, value, at == item["answer"]))
                    empty.append(TaskOutcome(number, -10.0 - value))
                    number += 1
            else:
                right.append(TaskOutcome(number, text=f" {item['answer']}", ended=True))
                empty.append(TaskOutcome(number))
                number += 1
    found = scores(harness, choice.specs, {"right": right, "empty": empty})
    assert {key[:2]: set(values) for key, values in found.items()} == {
        (label, f"mini_{part}"): {value}
        for label, value in (("right", 1.0), ("empty", 0.0))
        for part in ("arithmetic", "reading", "format")
    }


def test_a_code_task_of_the_harness_runs_in_the_sandbox(harness: Harness, tmp_path: Path) -> None:
    try:
        check_sandbox()
    except ToolchainError as error:
        pytest.skip(str(error))
    found = importlib.util.find_spec("lm_eval")
    assert found is not None
    assert found.origin is not None
    humaneval = Path(found.origin).parent / "tasks" / "humaneval" / "humaneval.yaml"
    escaped = tmp_path / "escaped"
    items = [
        {"task_id": name, "prompt": f"def {name}(x):\n", "entry_point": name, "canonical_solution": "", "test": tests}
        for name, tests in {
            "double": "def check(f):\n    assert f(4) == 8\n",
            "wrong": "def check(f):\n    assert f(4) == 8\n",
            "endless": "def check(f):\n    assert f(4) == 8\n",
            "empty": "def check(f):\n    assert f(4) == 8\n",
            "escape": "def check(f):\n    f(4)\n",
        }.items()
    ]
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    task = tmp_path / "mine.yaml"
    task.write_text(
        f"include: {humaneval}\ntask: mine\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: items.jsonl}}}}\n",
        encoding="utf-8",
    )
    refused = harness.prepare([str(task)], None, allow_code=False)
    assert [(each.spec, each.kind) for each in refused.problems] == [(str(task), "code")]

    prepared = harness.prepare([str(task)], None, allow_code=True)
    assert [each.n_items for each in prepared.tasks] == [5]
    asked = requests(harness)
    assert (asked[0].kind, asked[0].context, asked[0].n_predict) == ("generate", "def double(x):\n", 1024)
    answers = (
        "    return 2 * x\n",
        "    return x\n",
        "    while True: pass\n",
        "",
        f"    open({str(escaped)!r}, 'w').write('out')\n",
    )
    outcomes = [TaskOutcome(number, text=text) for number, text in enumerate(answers)]
    found_scores = scores(harness, [str(task)], {"level": outcomes}, allow_code=True)
    assert found_scores == {("level", "mine", "pass@1"): (1.0, 0.0, 0.0, 0.0, 0.0)}
    assert not escaped.exists()


def test_tasks_that_cannot_be_used_are_told_apart(harness: Harness, tmp_path: Path) -> None:
    (tmp_path / "items.jsonl").write_text('{"text": "One", "answer": "two"}\n', encoding="utf-8")
    common = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: items.jsonl}}}}
test_split: test
doc_to_text: "{{{{text}}}}"
doc_to_target: "{{{{answer}}}}"
"""
    files = {
        "sampled": "output_type: generate_until\ngeneration_kwargs: {do_sample: true, temperature: 0.7, until: []}\n",
        "broken": "output_type: no_such_type\n",
        "good": "output_type: loglikelihood\nmetric_list: [{metric: acc}]\n",
        "rolling": "output_type: loglikelihood_rolling\nmetric_list: [{metric: word_perplexity}]\n",
    }
    paths = []
    for name, text in files.items():
        paths.append(tmp_path / f"{name}.yaml")
        paths[-1].write_text(common.format(name=name) + text, encoding="utf-8")
    (tmp_path / "nothing.yaml").write_text("task: nothing\n", encoding="utf-8")
    (tmp_path / "torn.yaml").write_text("task: [", encoding="utf-8")
    paths += [tmp_path / "nothing.yaml", tmp_path / "torn.yaml"]
    prepared = harness.prepare([str(path) for path in paths], None, allow_code=False)
    assert {Path(each.spec).stem: each.kind for each in prepared.problems}.items() >= {"sampled": "unfit"}.items()
    assert {Path(each.spec).stem for each in prepared.problems} == {"sampled", "broken", "nothing", "torn"}
    assert [each.name for each in prepared.tasks] == ["good", "rolling"]
    assert [each.kind for each in requests(harness)] == ["loglikelihood", "rolling"]
    specs = [each.spec for each in prepared.tasks]
    found = scores(harness, specs, {"level": [TaskOutcome(0, -2.0, True), TaskOutcome(1, -3.0)]})
    assert found == {("level", "good", "acc"): (1.0,), ("level", "rolling", "word_perplexity"): (-3.0,)}
