"""The shipped mini set: made by its script, 200 different items, and solutions that pass their tests."""

from __future__ import annotations

import json
import re
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from typing import Any

import yaml

from imatrix_runner.evaluate.tasks.task_names import parse_tasks
from imatrix_runner.resources import resource

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("arithmetic", "reading", "format", "code")


def items(part: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in resource(f"mini_tasks/mini_{part}.jsonl").read_text(encoding="utf-8").splitlines()]


def test_the_files_are_what_the_script_writes() -> None:
    loader = SourceFileLoader("make_mini_tasks", str(ROOT / "scripts" / "make_mini_tasks"))
    spec = spec_from_loader(loader.name, loader)
    assert spec is not None
    script = module_from_spec(spec)
    loader.exec_module(script)
    assert {part: items(part) for part in PARTS} == json.loads(json.dumps(script.parts()))


def test_all_items_differ_and_every_part_has_fifty() -> None:
    prompts = [item["prompt"] for part in PARTS for item in items(part)]
    assert len(prompts) == len(set(prompts)) == 4 * 50


def test_answers_are_right() -> None:
    for item in items("arithmetic"):
        question = item["prompt"].rpartition("Question: ")[2]
        numbers = [int(number) for number in re.findall(r"\d+", question)]
        sign = next((sign for sign in "+-*" if f" {sign} " in question), "")
        sign = sign or ("+" if "more" in question else "-" if "gives away" in question else "*")
        assert {"+": sum(numbers), "-": numbers[0] - numbers[-1], "*": numbers[0] * numbers[-1]}[sign] == int(item["answer"])
    for item in items("reading"):
        assert item["choices"][item["answer"]] in item["prompt"]
        assert len(set(item["choices"])) == 4
    for item in items("format"):
        words = re.findall(r"\w+", item["prompt"].rpartition("Input: ")[2].partition("\n")[0])
        assert all(word.lower() in words or word in (*words, "name", "age") for word in re.findall(r"\w+", item["answer"]))
    for item in items("code"):
        space: dict[str, object] = {}
        exec(f"{item['prompt']}{item['solution']}\n{item['tests']}", space)


def test_the_code_part_is_taken_only_where_programs_may_run() -> None:
    (without,), (with_code,) = parse_tasks(["mini"], allow_code=False), parse_tasks(["mini"], allow_code=True)
    assert [Path(spec).stem for spec in with_code.specs] == [f"mini_{part}" for part in PARTS]
    assert with_code.specs[:-1] == without.specs
    code = Path(with_code.specs[-1]).read_text(encoding="utf-8").replace("!function ", "")
    assert yaml.safe_load(code)["unsafe_code"] is True
