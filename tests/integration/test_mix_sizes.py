"""The size that a mix is chosen for is the size of its file, to the byte."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from imatrix_runner.engines.cost_jobs import RoundingError, Trial, TrialResult
from imatrix_runner.engines.levels import Level
from imatrix_runner.imatrix.formats import read
from imatrix_runner.mixes import mix_recipe
from imatrix_runner.mixes.mix_candidates import Candidate, Candidates
from imatrix_runner.mixes.mix_problem import MixProblem
from imatrix_runner.mixes.sensitivity import CostModel
from imatrix_runner.quantize.recipe import Recipe
from imatrix_runner.quantize.resolve import bits
from support.llama_tools import BareTools
from support.mixing import Mixing
from support.passes import write_imatrix

BUDGETS = 200
FILES = 5


@pytest.fixture(scope="module")
def mixing(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Mixing:
    folder = tmp_path_factory.mktemp("sizes")
    return Mixing.of(demo_model, write_imatrix(folder / "imatrix.gguf", demo_model), folder / "demo")


def drawn_costs(problem: MixProblem, chooser: random.Random) -> CostModel:
    """Costs of all tensors and types, each tensor with a sensitivity of its own."""
    errors, trials, results = [], [], []
    for tensor in problem.tensors:
        for kind in tensor.types:
            error = 4 ** -bits(kind) * math.exp(chooser.gauss(0, 0.1))
            errors.append(RoundingError(tensor.rounded(kind), error, error, 1.0))
        trials.append(Trial(tensor.name, (tensor.rounded(tensor.types[0]),)))
        kld = 4.0 * math.exp(chooser.gauss(0, 1.2))
        results.append(TrialResult(tensor.name, (0, 1), (64, 64), (kld, kld), (60, 60), (1.0, 1.0), (1.0, 1.0)))
    return CostModel.of(errors, trials, results)


def solved(problem: MixProblem, n_budgets: int, seed: int) -> list[Candidate]:
    """A candidate for each of some budgets between the smallest file and the largest, ten for the same costs."""
    chooser = random.Random(seed)
    least, most = problem.range
    found = []
    for number in range(n_budgets):
        if number % 10 == 0:
            candidates = Candidates(problem, drawn_costs(problem, chooser))
        budget = chooser.randint(least, most)
        candidate = candidates.within(budget)[0]
        assert least <= candidate.n_bytes <= budget
        found.append(replace(candidate, name=f"mix {number}"))
    return found


def recipes_of(mixing: Mixing, candidates: Sequence[Candidate]) -> dict[str, Recipe]:
    """llama.cpp's dry runs of them."""
    return mixing.planner.recipes([level_of(each) for each in candidates], read(mixing.imatrix), mixing.input)


def level_of(candidate: Candidate) -> Level:
    return mix_recipe.level_of(candidate.name, "Q4_K_M", candidate.types)


def test_two_hundred_budgets(mixing: Mixing) -> None:
    candidates = solved(mixing.problem(), BUDGETS, 15)
    assert len({candidate.n_bytes for candidate in candidates}) > BUDGETS // 2
    recipes = recipes_of(mixing, candidates)
    for candidate in candidates:
        recipe = recipes[candidate.name]
        assert not recipe.failures
        assert recipe.file_bytes == candidate.n_bytes
        assert {tensor.name: tensor.type for tensor in recipe.tensors if tensor.name in candidate.types} == candidate.types


def test_files_by_llama_quantize(mixing: Mixing, tools: BareTools, demo_model: Path, tmp_path: Path) -> None:
    candidates = solved(mixing.problem(("k", "legacy")), FILES, 16)
    recipes = recipes_of(mixing, candidates)
    for candidate in candidates:
        level = level_of(candidate)
        pins = [word for pin in level.pins for word in ("--tensor-type", pin)]
        marks = [word for mark in level.override_kv for word in ("--override-kv", mark)]
        out = tmp_path / f"{candidate.n_bytes}.gguf"
        tools.quantize(demo_model, out, level.ftype, *pins, *marks, imatrix=mixing.imatrix)
        assert out.stat().st_size == candidate.n_bytes == recipes[candidate.name].file_bytes


def test_types_that_an_option_decides_count_too(demo_model: Path, mixing: Mixing, tmp_path: Path) -> None:
    fixed = Mixing.of(demo_model, mixing.imatrix, tmp_path / "demo", "ffn_up=q8_0", "attn_v=bf16")
    problem = fixed.problem(("k",))
    assert {tensor.types for tensor in problem.tensors if tensor.name.endswith("ffn_up.weight")} == {("Q8_0",)}
    assert not any(tensor.name.endswith("attn_v.weight") for tensor in problem.tensors)
    candidates = solved(problem, 20, 17)
    recipes = recipes_of(fixed, candidates)
    assert [recipes[candidate.name].file_bytes for candidate in candidates] == [each.n_bytes for each in candidates]
