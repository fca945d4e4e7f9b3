"""Mixes through the command line: planned, chosen, made in the single pass, equal to llama-quantize's, and kept."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import dataclass
from math import log
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from imatrix_runner.engines.measures import Estimate
from imatrix_runner.evaluate.measurements import content_of
from imatrix_runner.evaluate.mix_verdict import MixVerdict, StockFigure, describe
from imatrix_runner.imatrix.statistics import locate
from imatrix_runner.journal import Journal, StepRecord, commands_in
from imatrix_runner.mixes.cost_map import read_cost_map
from imatrix_runner.mixes.mix_recipe import METADATA_KEY, read_recipe
from imatrix_runner.models.gguf_file import read_header
from imatrix_runner.models.tensor_patterns import component
from imatrix_runner.report.document import Report, ReportMix, read_report
from imatrix_runner.resources import CALIBRATION_TEXT, resource
from imatrix_runner.steps import LEVEL_INPUT, step_id
from imatrix_runner.workspace import Workspace
from support.command_line import Ran, RunCommand, run_command
from support.llama_tools import BareTools, digest
from support.reports import divergence
from support.workspaces import measure

TARGETS = ("--like", "Q4_K_M", "--size", "1.5MiB", "--bpw", "3.5")


@dataclass(frozen=True)
class Mixed:
    """A finished run: its workspace, its document, and the command that repeats it."""

    workspace: Path
    ran: Ran
    arguments: tuple[str | Path, ...]
    folder: Path

    def again(self, *further: str) -> Ran:
        return run_command(*self.arguments, *further, cwd=self.folder)

    @property
    def levels(self) -> dict[str, Path]:
        prefix = f"{self.workspace.name}-"
        return {path.stem.removeprefix(prefix): path for path in self.workspace.glob(f"{prefix}*.gguf")}


@pytest.fixture(scope="module")
def mixed(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Mixed:
    folder = tmp_path_factory.mktemp("mixed")
    text = folder / "some.txt"
    paragraphs = resource(CALIBRATION_TEXT).read_text(encoding="utf-8").split("\n\n")
    text.write_text("\n\n".join(paragraphs[::20]), encoding="utf-8")  # of each kind, and few, for time
    arguments = ("run", demo_model, "--levels", "Q4_K_M", *TARGETS, "-f", text, "-c", "128", "--json")
    ran = run_command(*arguments, cwd=folder)
    assert ran.code == 0, ran.err
    return Mixed(folder / "work" / demo_model.stem, ran, arguments, folder)


def test_three_mixes_and_a_stock_level(mixed: Mixed) -> None:
    made = {level["level"] for level in mixed.ran.document["levels"]}
    assert "Q4_K_M" in made
    assert len(made) == 4
    assert made == mixed.levels.keys()


def test_each_is_within_its_size(mixed: Mixed) -> None:
    facts = json.loads((mixed.workspace / "journal.json").read_text())["steps"]
    sizes = {name: mixed.levels[facts[f"mix {name}"]["facts"]["level"]].stat().st_size for name in MIXES}
    assert sizes["MIX@like:Q4_K_M"] <= mixed.levels["Q4_K_M"].stat().st_size
    assert sizes["MIX@1.5MiB"] <= 1.5 * (1 << 20)
    header = read_header(mixed.levels[facts["mix MIX@3.5bpw"]["facts"]["level"]])
    data = sum(tensor.n_bytes or 0 for tensor in header.tensors)
    assert 3.4 < 8 * data / sum(tensor.n_elements for tensor in header.tensors) <= 3.5


MIXES = ("MIX@like:Q4_K_M", "MIX@1.5MiB", "MIX@3.5bpw")


def test_the_name_agrees_with_the_file_type_and_the_types_with_the_recipe(mixed: Mixed, tools: BareTools) -> None:
    numbers = {kind.name: kind.number for kind in tools.toolchain.types}
    for name, path in mixed.levels.items():
        if name == "Q4_K_M":
            continue
        recipe = read_recipe(path.with_suffix(".recipe.json"))
        header = read_header(path)
        assert name.startswith("MIX-")
        assert name.endswith(f"bpw-{recipe.ftype}")
        assert header.integer("general.file_type") == numbers[recipe.ftype]
        assert recipe.digest in (header.text(METADATA_KEY) or "")
        found = {tensor.name: tensor.type_name for tensor in header.tensors}
        assert {tensor: found[tensor] for tensor in recipe.types} == recipe.types
        assert recipe.n_bytes == path.stat().st_size


def test_llama_quantize_makes_the_same_bytes_from_the_recipe(
    mixed: Mixed, tools: BareTools, demo_model: Path, tmp_path: Path
) -> None:
    for name, path in mixed.levels.items():
        if name == "Q4_K_M":
            continue
        recipe = read_recipe(path.with_suffix(".recipe.json"))
        types = path.with_suffix(".tensor-types.txt")
        (mark,) = recipe.as_level().override_kv
        excluded = [word for tensor in recipe.unweighted for word in ("--exclude-weights", tensor)]
        options = ("--tensor-type-file", str(types), "--override-kv", mark, *excluded)
        bare = tools.quantize(
            demo_model, tmp_path / f"{name}.gguf", recipe.ftype, *options, imatrix=mixed.workspace / "imatrix.gguf"
        )
        assert digest(bare) == digest(path), name


def test_each_was_better_than_stock_where_it_was_compared(mixed: Mixed) -> None:
    paths = [path for path in mixed.workspace.glob("*.recipe.json") if not path.name.endswith(".gguf.recipe.json")]
    assert paths
    for path in paths:
        recipe = read_recipe(path)
        mixes = [row for row in recipe.measured if row.ratio is not None and row.error is not None]
        assert min(row.ratio + 2 * row.error for row in mixes if row.ratio is not None and row.error is not None) < 1
        assert any(row.name == recipe.stock for row in recipe.measured)


def test_again_nothing_is_to_do(mixed: Mixed) -> None:
    again = mixed.again()
    assert again.code == 0, again.err
    assert {level["status"] for level in again.document["levels"]} == {"skipped"}


def test_two_targets_of_one_recipe_share_it(mixed: Mixed) -> None:
    size = mixed.levels["Q4_K_M"].stat().st_size
    both = ("--size", f"{size}B", "--size", f"{size + 1}B")
    assert mixed.again(*both).code == 0
    again = mixed.again(*both)
    assert again.code == 0, again.err
    assert "recipes tried" not in again.err
    assert "other content" not in again.err
    assert {level["status"] for level in again.document["levels"]} == {"skipped"}


def test_another_target_uses_the_same_map(mixed: Mixed) -> None:
    before = (mixed.workspace / "mix.json").read_bytes()
    again = mixed.again("--like", "Q3_K_M")
    assert again.code == 0, again.err
    assert "probes of tensors" not in again.err
    assert "MIX@like:Q3_K_M: its types are chosen from the measured costs" in again.err
    assert (mixed.workspace / "mix.json").read_bytes() == before


def test_the_map_has_every_tensor(mixed: Mixed, demo_model: Path) -> None:
    found = read_cost_map(mixed.workspace / "mix.json")
    matrices = {tensor.name for tensor in read_header(demo_model).tensors if len(tensor.shape) > 1}
    assert {tensor.name for tensor in found.tensors} == matrices
    for tensor in found.tensors:
        assert len(tensor.errors) > 10
        assert tensor.sensitivity is not None
        assert tensor.sensitivity > 0
        assert len(tensor.probes) in (1, 2)
        for kind, probe in tensor.probes.items():
            assert probe.kld > 0
            assert tensor.errors[kind].weighted < tensor.norm
    twice = Counter(component(tensor.name) for tensor in found.tensors if len(tensor.probes) == 2)
    kinds = {component(tensor.name) for tensor in found.tensors if tensor.name.startswith("blk.")}
    assert {kind: twice[kind] for kind in kinds} == dict.fromkeys(kinds, 1), "of each kind one in four layers"


def test_the_report_has_the_mixes_the_costs_and_one_command_for_each(mixed: Mixed) -> None:
    report = read_report(mixed.workspace / "report.json")
    found = read_cost_map(mixed.workspace / "mix.json")
    assert report.costs is not None
    assert {(each.layer, each.kind): each.cost for each in report.costs.tensors} == {
        locate(tensor.name): tensor.sensitivity for tensor in found.tensors
    }
    levels = {level.name: level for level in report.levels}
    assert {name for name, level in levels.items() if level.mix is None} == {"Q4_K_M"}
    assert {target for level in levels.values() if level.mix is not None for target in level.mix.targets} >= {*MIXES}
    for name, level in levels.items():
        if level.mix is None:
            continue
        path = mixed.levels[name]
        recipe = read_recipe(path.with_suffix(".recipe.json"))
        assert recipe.chosen is not None
        assert level.mix.ratio == Estimate(recipe.chosen.ratio or 0, recipe.chosen.error or 0)
        assert sum(level.mix.types.values()) == len(recipe.types)
        assert [file.name for file in level.mix.files] == [f"{path.stem}.recipe.json", f"{path.stem}.tensor-types.txt"]
        assert f"--tensor-type-file {path.stem}.tensor-types.txt" in level.command
        assert "--tensor-type " not in level.command


def test_the_command_in_the_report_makes_the_same_bytes(
    mixed: Mixed, tools: BareTools, demo_model: Path, tmp_path: Path
) -> None:
    """Of the largest mix, because tables of small types take llama-quantize seconds; the others' commands differ in names."""
    commands: dict[str, tuple[str, ...]] = {}
    mixes = {level.name: level for level in read_report(mixed.workspace / "report.json").levels if level.mix is not None}
    for name, level in mixes.items():
        (commands[name],) = commands_in(level.command)
        assert commands[name][-1] == read_recipe(mixed.levels[name].with_suffix(".recipe.json")).ftype
    assert commands.keys() >= {*read_targets(mixed).values()}  # other tests add mixes to the workspace
    largest = max(mixes, key=lambda name: mixed.levels[name].stat().st_size)
    _, *options, given, imatrix, _, out, ftype = commands[largest]
    assert given == "--imatrix"
    types = (mixed.workspace / f"{Path(out).stem}.tensor-types.txt").read_text(encoding="utf-8")
    assert len(types.splitlines()) == len(read_recipe(mixed.levels[largest].with_suffix(".recipe.json")).types)
    bare = tools.quantize(demo_model, tmp_path / out, ftype, *options, imatrix=mixed.workspace / imatrix)
    assert digest(bare) == digest(mixed.levels[largest])


def test_a_damaged_map_and_changed_files_are_left_out_of_the_report(mixed: Mixed, tmp_path: Path) -> None:
    place = tmp_path / mixed.workspace.name
    shutil.copytree(mixed.workspace, place)
    name = read_targets(mixed)["MIX@3.5bpw"]
    stem = mixed.levels[name].stem
    other = read_targets(mixed)["MIX@1.5MiB"]
    (place / "mix.json").write_text("{")
    (place / ".mixes" / f"{other}.recipe.json").write_text("{")
    (place / f"{stem}.tensor-types.txt").write_text("mine")
    (place / f"{stem}.recipe.json").unlink()
    done = run_command("report", place, "--json", cwd=tmp_path)
    assert done.code == 0, done.err
    assert "The report does not show what rounding costs" in done.err
    assert f"The report does not say how the types of {other} were chosen" in done.err
    report = read_report(place / "report.json")
    assert report.costs is None
    mixes = {level.name: level.mix for level in report.levels if level.mix is not None}
    assert mixes[name].files == ()
    assert mixes[name].stock != ""
    assert mixes[other] == ReportMix(("MIX@1.5MiB",), "", "")
    assert "--tensor-type-file" not in next(level.command for level in report.levels if level.name == name)


def test_a_mix_whose_target_has_led_to_another_one_since_is_still_a_mix(mixed: Mixed, tmp_path: Path) -> None:
    place = tmp_path / mixed.workspace.name
    shutil.copytree(mixed.workspace, place)
    journal = json.loads((place / "journal.json").read_text())
    journal["steps"] = {step: record for step, record in journal["steps"].items() if not step.startswith("mix ")}
    (place / "journal.json").write_text(json.dumps(journal))
    report = reported(place)
    assert {level.name for level in report.levels} == {*mixed.levels}
    for level in report.levels:
        if level.name != "Q4_K_M":
            assert level.mix is not None
            assert level.mix.targets == ()
            assert level.mix.ratio is not None


def test_the_costs_of_another_model_are_not_drawn(mixed: Mixed, tmp_path: Path) -> None:
    place = tmp_path / mixed.workspace.name
    shutil.copytree(mixed.workspace, place)
    replace(read_cost_map(place / "mix.json"), model="sha256:0f").write(place / "mix.json")
    assert run_command("report", place, cwd=tmp_path).code == 0
    assert read_report(place / "report.json").costs is None


def test_a_mix_that_lost_on_the_held_out_text_is_named_and_not_recommended(mixed: Mixed, tmp_path: Path) -> None:
    """As it would be measured elsewhere: the mix is nearer to its source than stock, by less than two standard errors."""
    place = tmp_path / mixed.workspace.name
    shutil.copytree(mixed.workspace, place)
    name = read_targets(mixed)["MIX@like:Q4_K_M"]
    workspace, klds = Workspace(place, place.name), {"Q4_K_M": 0.0090, name: 0.0089}
    measure(workspace, klds)
    journal = Journal(workspace.journal)
    kld, stock = divergence(0.0089).kld, StockFigure("Q4_K_M", 1 << 20, divergence(0.0090).kld)
    verdict = MixVerdict(name, kld, (stock,), Estimate(0.99, 0.02), "Q4_K_M")
    inputs = {LEVEL_INPUT: content_of(journal[step_id("level", name)])}
    journal.record(step_id("against", name), StepRecord.now(inputs, [], "levels are measured", 0.0, facts=verdict))
    report = reported(place)
    assert [pick.level for pick in report.picks] == ["Q4_K_M"]
    assert f"{name} is not better than stock on held_out.txt by 2 standard errors" in " ".join(report.caveats)
    assert "Take Q4_K_M (1.00 MiB) instead." in " ".join(report.caveats)
    measure(workspace, {**klds, "Q4_K_M": 0.0095})
    again = reported(place)
    assert "not better" not in " ".join(again.caveats), "a comparison with figures that are no longer there does not count"


def reported(place: Path) -> Report:
    """The report that the command makes of a workspace."""
    done = run_command("report", place, cwd=place)
    assert done.code == 0, done.err
    return read_report(place / "report.json")


def read_targets(mixed: Mixed) -> dict[str, str]:
    """The level that each target led to."""
    steps = json.loads((mixed.workspace / "journal.json").read_text())["steps"]
    return {target: steps[f"mix {target}"]["facts"]["level"] for target in MIXES}


def test_evaluate_compares_mixes_with_stock_on_the_held_out_text(mixed: Mixed, demo_model: Path, tmp_path: Path) -> None:
    """A mix of Q4_K_M's size with that level; of one that is smaller than every stock level there nothing can be said."""
    work = tmp_path / "work"
    shutil.copytree(mixed.workspace.parent, work)
    done = run_command(
        *("evaluate", demo_model, "--work-dir", work, "--chunks", "12", "--ab", "--json", "--levels"),
        "Q4_K_M,MIX@like:Q4_K_M,MIX@3.5bpw",
        cwd=tmp_path,
    )
    assert done.code == 0, done.err
    chosen = read_targets(mixed)
    like, small = chosen["MIX@like:Q4_K_M"], chosen["MIX@3.5bpw"]
    assert f"{small} is not compared with stock" in done.err
    measured = done.document["measured"]
    (verdict,) = measured["mixes"]
    assert verdict["level"] == like
    assert [each["level"] for each in verdict["stock"]] == ["Q4_K_M"]
    klds = {name: found["kld"]["value"] for name, found in measured["levels"].items()}
    assert verdict["ratio"]["value"] == pytest.approx(klds[like] / klds["Q4_K_M"])
    assert 0 < verdict["ratio"]["error"] < verdict["ratio"]["value"]
    assert done.document["plan"]["without_twin"][like] == "has no baseline: its types were chosen with the imatrix"
    report = read_report(work / mixed.workspace.name / "report.json")
    (level,) = [level for level in report.levels if level.name == like]
    assert level.mix is not None
    assert level.mix.held_out is not None
    said = describe(level.mix.held_out, "held_out.txt")
    shown = run_command("report", work / mixed.workspace.name, cwd=tmp_path)
    assert " ".join(said.split()) in " ".join(shown.out.split())


def test_stock_levels_are_predicted_from_the_map_and_then_measured(mixed: Mixed, demo_model: Path, tmp_path: Path) -> None:
    """First from what was tried on the calibration text, then from a measured level; ``advise`` says the same."""
    work, names = tmp_path / "work", ["Q5_K_S", "IQ4_XS", "Q3_K_M", "Q2_K"]
    shutil.copytree(mixed.workspace.parent, work)
    place = ("--work-dir", work)
    command = ("run", demo_model, *place, "--imatrix", mixed.workspace / "imatrix.gguf", "--levels")
    every, few = ",".join(["Q4_K_M", *names, "IQ1_S"]), ",".join(names)
    tried = predicted(run_command(*command, every, "--dry-run", "--json", cwd=tmp_path))
    assert {*names} <= tried.keys()
    assert "IQ1_S" not in tried, "the map has no costs of its types"
    assert {each["text"] for each in tried.values()} == {"some.txt"}
    assert {"Q4_K_M"} <= {*next(iter(tried.values()))["scaled_by"]}
    assert run_command("evaluate", demo_model, *place, "--levels", "Q4_K_M", "--chunks", "12", cwd=tmp_path).code == 0
    scaled = predicted(run_command(*command, every, "--dry-run", "--json", cwd=tmp_path))
    assert scaled.keys() == {*names}, "Q4_K_M is measured"
    assert {(each["text"], *each["scaled_by"]) for each in scaled.values()} == {("held_out.txt", "Q4_K_M")}
    shown = run_command(*command, every, "--dry-run", cwd=tmp_path).out
    assert f"{scaled['Q2_K']['kld']:.4f}" in shown
    assert "Predicted KLD: in nats on held_out.txt" in " ".join(shown.split())
    advised = run_command("advise", demo_model, *place, "--levels", few, "--no-probe", "--json", cwd=tmp_path)
    assert {each["level"]: each["predicted_kld"] for each in advised.document["levels"]} == scaled
    done = run_command(*command, few, cwd=tmp_path)
    assert done.code == 0, done.err
    done = run_command("evaluate", demo_model, *place, "--levels", few, "--chunks", "12", "--json", cwd=tmp_path)
    measured = {name: found["kld"]["value"] for name, found in done.document["measured"]["levels"].items()}
    off = {name: abs(log(scaled[name]["kld"] / measured[name])) / log(scaled[name]["factor"]) for name in names}
    assert sum(each <= 1 for each in off.values()) >= len(names) - 1, off
    assert max(off.values()) < 1.5, off


def predicted(ran: Ran) -> dict[str, Any]:
    """The predictions of a plan, by level."""
    assert ran.code == 0, ran.err
    levels = ran.document["plan"]["levels"]
    return {level["level"]: level["predicted_kld"] for level in levels if level["predicted_kld"] is not None}


def test_nothing_is_predicted_with_another_imatrix_or_a_map_of_another_model(
    mixed: Mixed, demo_model: Path, tmp_path: Path
) -> None:
    work = tmp_path / "work"
    shutil.copytree(mixed.workspace.parent, work)
    command = ("run", demo_model, "--work-dir", work, "--levels", "Q3_K_M", "--dry-run", "--json", "--imatrix")
    assert predicted(run_command(*command, mixed.workspace / "imatrix.gguf", cwd=tmp_path)) != {}
    assert predicted(run_command(*command, "none", cwd=tmp_path)) == {}
    path = work / mixed.workspace.name / "mix.json"
    replace(read_cost_map(path), model="sha256:0f").write(path)
    assert predicted(run_command(*command, mixed.workspace / "imatrix.gguf", cwd=tmp_path)) == {}
    path.write_text("{")
    damaged = run_command(*command, mixed.workspace / "imatrix.gguf", cwd=tmp_path)
    assert predicted(damaged) == {}
    assert "No KLD is predicted" in damaged.err


def test_the_plan_says_what_comes_first(demo_model: Path, runner: RunCommand) -> None:
    done = runner("run", demo_model, "--like", "q4_k_m", "--dry-run")
    assert done.code == 0, done.err
    assert "MIX@like:Q4_K_M: its types are chosen after" in done.out
    assert "time not known: no imatrix was collected here with this engine" in " ".join(done.out.split())


def test_the_time_is_named_at_the_start_and_what_is_measured_is_not_counted_again(mixed: Mixed) -> None:
    assert "at the speed of the imatrix)" in " ".join(mixed.ran.err.split())
    planned = mixed.again("--like", "Q5_K_M", "--dry-run").document["plan"]["mixing"]
    assert (planned["n_rounded"], planned["n_probes"], planned["rounding_seconds"]) == (0, 0, 0.0)
    assert planned["trial_seconds"] == pytest.approx(planned["n_tokens"] / planned["tokens_per_second"])


class TestRefusals:
    def test_a_size_below_the_smallest(self, tiny_model: Path, tiny_imatrix: Path, runner: RunCommand) -> None:
        done = runner("run", tiny_model, "--imatrix", tiny_imatrix, "--size", "100KiB")
        assert done.code == 6
        assert "MIX@100KiB cannot be reached" in done.err
        assert "KiB to " in done.err

    def test_a_level_that_is_unknown(self, tiny_model: Path, tiny_imatrix: Path, runner: RunCommand) -> None:
        done = runner("run", tiny_model, "--imatrix", tiny_imatrix, "--like", "Q4_K_Z")
        assert done.code == 2
        assert "Choose among" in done.err

    def test_types_that_are_unknown(self, tiny_model: Path, tiny_imatrix: Path, runner: RunCommand) -> None:
        done = runner("run", tiny_model, "--imatrix", tiny_imatrix, "--like", "Q4_K_M", "--types", "k,zz")
        assert done.code == 2
        assert "Invalid --types 'zz'" in done.err

    def test_a_short_text(self, tiny_model: Path, tiny_imatrix: Path, runner: RunCommand, tmp_path: Path) -> None:
        (tmp_path / "short.txt").write_text("words and words " * 20)
        done = runner("run", tiny_model, "--imatrix", tiny_imatrix, "--like", "Q4_K_M", "-f", "short.txt", "-c", "128")
        assert done.code == 6
        assert "too short" in done.err

    def test_the_other_engine(self, tiny_model: Path, tiny_imatrix: Path, runner: RunCommand) -> None:
        done = runner("run", tiny_model, "--imatrix", tiny_imatrix, "--like", "Q4_K_M", "--engine", "binaries")
        assert done.code == 3
        assert "Mixes need the embedded engine" in done.err

    def test_pruned_layers(self, tiny_model: Path, tiny_imatrix: Path, runner: RunCommand) -> None:
        done = runner("run", tiny_model, "--imatrix", tiny_imatrix, "--like", "Q4_K_M", "--prune-layers", "0")
        assert done.code == 2
        assert "--prune-layers exclude each other" in done.err

    def test_a_quantised_source(self, tiny_model: Path, tools: BareTools, runner: RunCommand, tmp_path: Path) -> None:
        model = tools.quantize(tiny_model, tmp_path / "tiny-Q8_0.gguf", "Q8_0")
        done = runner("run", model, "--like", "Q4_K_M", "--imatrix", "none", "--allow-requantize")
        assert done.code == 6
        assert "source that is not quantised" in done.err


def test_stock_is_kept_where_no_mix_is_better(tiny_model: Path, tiny_imatrix: Path, runner: RunCommand, tmp_path: Path) -> None:
    """All tensors Q4_0 is what is left of the types; the stock level has a larger output, and the mix may not be larger."""
    done = runner("run", tiny_model, "--imatrix", tiny_imatrix, "--like", "Q4_0", "--types", "q4_0", "-c", "128")
    assert done.code == 0, done.err
    assert "stock Q4_0 is kept" in done.err
    assert [path.name for path in (tmp_path / "work" / "tiny").glob("*.gguf") if "Q4_0" in path.name] == ["tiny-Q4_0.gguf"]
