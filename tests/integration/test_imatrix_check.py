"""The preflight against reality: what ``imatrix check`` foretells is what the real llama-quantize then does."""

from __future__ import annotations

import re
import shutil
import struct
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from imatrix_runner.app.run import run as run_workflow
from imatrix_runner.context.context import Context
from imatrix_runner.context.requests import EnvironmentRequest, ImatrixRequest, LevelsRequest, RunRequest, SourceRequest
from imatrix_runner.events import ignore
from imatrix_runner.imatrix.formats import read, write_gguf
from imatrix_runner.imatrix.matrix import Matrix, MatrixEntry, held
from imatrix_runner.models.gguf_file import read_header
from imatrix_runner.quantize.usable_imatrix import NEVER_WEIGHED
from support.command_line import Ran, RunCommand
from support.in_process import CommandLine
from support.llama_tools import BareTools, digest, times
from support.oracles import quantized
from support.tiny_models import sample_text, write_llama_gguf

LAYERS, EXPERTS = 3, 4
BARE = 0  # the block without data comes first: llama-quantize meets it before it computes the tables of the IQ types
PARTLY, UNCOUNTED, ZERO, DEAD = (
    *("blk.1.ffn_down_exps.weight", "blk.2.ffn_up_exps.weight"),
    *("blk.1.attn_output.weight", "blk.2.attn_output.weight"),
)
REFUSED = re.compile(
    r"Missing importance matrix for tensor (\S+) in a very low-bit|imatrix size \d+ is different from .* for (\S+)"
)
WITHOUT = re.compile(r"did not find weights for (\S+)")


@dataclass(frozen=True)
class Mixture:
    """A mixture of three layers and llama-imatrix's matrix of it, whole and with all that can be wrong with one."""

    model: Path
    whole: Path
    flawed: Path


@pytest.fixture(scope="module")
def mixture(tools: BareTools, tmp_path_factory: pytest.TempPathFactory) -> Mixture:
    folder = tmp_path_factory.mktemp("mixture")
    model = write_llama_gguf(folder / "moe-BF16.gguf", layers=LAYERS, experts=EXPERTS, ff=256)
    text = folder / "text.txt"
    text.write_text(sample_text(9000), encoding="utf-8")
    whole = folder / "whole" / "imatrix.gguf"
    tools.imatrix(model, Path(text.name), whole, "-c", "64", "--chunks", "12", "--no-ppl", folder=folder)
    matrix = held(read(whole).matrix)
    flawed = folder / "flawed" / "imatrix.gguf"
    entries = {name: value for name, value in matrix.entries.items() if not name.startswith(f"blk.{BARE}.")}
    entries[PARTLY] = with_counts(entries[PARTLY], [0, 999, 0, 63])
    entries[UNCOUNTED] = with_counts(entries[UNCOUNTED], [0] * EXPERTS)
    entries[ZERO] = replace(entries[ZERO], sums=np.zeros_like(entries[ZERO].sums))
    entries[DEAD] = replace(entries[DEAD], sums=np.where(np.arange(256) == 7, 0, entries[DEAD].sums))
    entries["blk.9.attn_q.weight"] = entries[DEAD]
    write_gguf(replace(matrix, entries=entries), flawed)
    return Mixture(model, whole, flawed)


def with_counts(entry: MatrixEntry, counts: list[int]) -> MatrixEntry:
    """The entry as if its experts had seen so many tokens."""
    new = np.array(counts, np.int64)
    return MatrixEntry(np.where(new[:, None] > 0, entry.sums, 0), new)


def of_block(model: Path, block: int) -> set[str]:
    """The tensors of a block that are quantised."""
    names = {tensor.name for tensor in read_header(model).tensors if tensor.name.startswith(f"blk.{block}.")}
    return {name for name in names if "norm" not in name and "gate_inp" not in name}


def types_of(file: Path) -> dict[str, str]:
    return {tensor.name: tensor.type_name for tensor in read_header(file).tensors}


def check(cli: CommandLine, matrix: Path, model: Path, levels: str, *more: str) -> dict[str, Any]:
    done = cli("imatrix", "check", matrix, "--model", model, "--levels", levels, "--json", *more)
    document = done.document
    assert document["schema"] == "imatrix-runner/imatrix-check", done.err
    assert document["exit_code"] == done.code
    return document


def findings(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    found = {finding["kind"]: finding for finding in document["findings"] if finding["severity"] != "info"}
    assert len(found) == sum(finding["severity"] != "info" for finding in document["findings"])
    return found


def verdicts(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {level["level"]: level for level in document["levels"]}


def test_every_flaw_is_named(mixture: Mixture, cli: CommandLine) -> None:
    document = check(cli, mixture.flawed, mixture.model, "Q4_K_M")
    found = findings(document)
    assert {kind: set(finding["tensors"]) for kind, finding in found.items()} == {
        "block-without-data": of_block(mixture.model, BARE),
        "extra": {"blk.9.attn_q.weight"},
        "zero": {ZERO},
        "columns": {DEAD, "blk.9.attn_q.weight"},
        "uncounted": {UNCOUNTED},
        "experts-without-data": {PARTLY, UNCOUNTED},
        "experts-with-few-tokens": set(found["experts-with-few-tokens"]["tensors"]) | {PARTLY},
    }
    assert f"block {BARE} without any data" in found["block-without-data"]["text"]
    experts = {entry["tensor"]: entry for entry in document["experts"]}
    assert (experts[PARTLY]["unseen"], experts[PARTLY]["few"], experts[PARTLY]["n_experts"]) == ([0, 2], [3], EXPERTS)
    assert experts[UNCOUNTED]["unseen"] == [0, 1, 2, 3]
    assert document["usable"]
    (level,) = document["levels"]
    assert level["verdict"] == "weaker"
    assert set(level["without_weights"]) == of_block(mixture.model, BARE)
    assert level["unseen"] == [UNCOUNTED]
    assert document["exit_code"] == 0


def test_a_whole_matrix_is_fine_for_every_type(mixture: Mixture, cli: CommandLine) -> None:
    done = cli("imatrix", "check", mixture.whole, "--model", mixture.model, "--preset", "all", "--json")
    assert done.code == 0
    assert {level["verdict"] for level in done.document["levels"]} == {"fine"}
    assert findings(done.document).keys() <= {"experts-with-few-tokens"}
    shown = cli("imatrix", "check", mixture.whole, "--model", mixture.model, "--levels", "Q4_K_M,IQ2_XXS")
    assert re.search(r"^Q4_K_M +fine", shown.out, re.MULTILINE)
    assert "--uncovered" not in shown.out


@dataclass(frozen=True)
class Happened:
    """What the real llama-quantize did: its exit code, the tensor it stopped at, those it had no weights for."""

    code: int
    stopped_at: str | None
    without: set[str]


def really(tools: BareTools, model: Path, matrix: Path) -> Mapping[str, Happened]:
    """Every type llama-quantize offers, for real."""
    types = [kind.name for kind in tools.toolchain.types if not kind.alias_of]
    assert len(types) == 36

    def one(name: str) -> Happened:
        theirs = quantized(tools, model, name, imatrix=matrix)
        stopped, without = REFUSED.search(theirs.said), set(WITHOUT.findall(theirs.said)) - {*NEVER_WEIGHED}
        return Happened(theirs.code, (stopped[1] or stopped[2]) if stopped else None, without)

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(types, pool.map(one, types), strict=True))


UNWEIGHED = ("F16", "F32", "Q8_0", "MXFP4_MOE", "Q1_0", "Q2_0", "TQ1_0", "TQ2_0")
"""Levels whose types do not use the weights in rounding: missing data costs them nothing."""


def prediction_is_right(document: dict[str, Any], happened: Mapping[str, Happened]) -> None:
    """Fails, weaker or fine, each with exactly the right tensors. (llama-quantize loses the last lines it says now and then:
    where it stopped is compared when it tells.)"""
    levels = verdicts(document)
    assert levels.keys() == {name.upper() for name in happened}
    assert {name for name, level in levels.items() if level["verdict"] == "fails"} == {
        name.upper() for name, real in happened.items() if real.code != 0
    }
    for name, real in happened.items():
        level = levels[name.upper()]
        if real.code == 0:
            assert set(level["without_weights"]) == real.without, name
        elif real.stopped_at is not None:
            assert real.stopped_at in level["failures"][0], name
    assert document["exit_code"] == 6


def test_every_type_does_what_was_foretold(mixture: Mixture, tools: BareTools, cli: CommandLine, tmp_path: Path) -> None:
    """The issue's Show: untouched experts, a missing block; all 36 types, for real."""
    happened = really(tools, mixture.model, mixture.flawed)
    document = check(cli, mixture.flawed, mixture.model, ",".join(happened))
    prediction_is_right(document, happened)
    levels = verdicts(document)
    bare = of_block(mixture.model, BARE)
    assert {name for name, level in levels.items() if level["verdict"] == "fails"} == {
        *("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "IQ3_XXS", "IQ3_XS", "Q2_K_S"),
    }
    for name, level in levels.items():
        if level["verdict"] == "fails":
            assert re.fullmatch(
                rf"blk\.{BARE}\.\S+ becomes \S+( \(and \d+ more tensors likewise\))?, which requires .*",
                level["reason"],
            ), name
        elif name in ("COPY", "BF16"):
            assert (level["verdict"], level["reason"]) == ("fine", "")
        else:
            assert set(level["without_weights"]) == bare, name
            assert level["unseen"] == [UNCOUNTED], name
            said = f"experts without data in 1 tensors, first {PARTLY}" in level["reason"]
            assert (level["verdict"], said) == (("fine", False) if name in UNWEIGHED else ("weaker", True)), name


def test_a_wrong_size_is_foretold_for_every_type(mixture: Mixture, tools: BareTools, cli: CommandLine, tmp_path: Path) -> None:
    """Two experts fewer: an error wherever the tensor changes its type."""
    name = "blk.0.ffn_up_exps.weight"
    whole = held(read(mixture.whole).matrix)
    fewer = MatrixEntry(whole.entries[name].sums[:2], whole.entries[name].counts[:2])
    matrix = tmp_path / "imatrix.gguf"
    write_gguf(replace(whole, entries={**whole.entries, name: fewer}), matrix)
    types = "Q4_K_M,IQ4_NL,Q8_0,F16,F32,COPY,BF16,Q2_K"
    document = check(cli, matrix, mixture.model, types)
    assert findings(document)["size"]["text"] == f"{name} has 512 values, the model needs 1024: another number of experts"
    assert not document["usable"]
    for level, verdict in verdicts(document).items():
        theirs = quantized(tools, mixture.model, level, imatrix=matrix)
        assert (theirs.code != 0) == (verdict["verdict"] == "fails"), level
        assert (name in "".join(verdict["failures"])) == ("is different from tensor size" in theirs.said), level
    assert document["exit_code"] == 6


@pytest.mark.parametrize(
    ("value", "kind"), [(float("nan"), "nan-or-infinite"), (float("inf"), "nan-or-infinite"), (-1.0, "negative")]
)
def test_impossible_numbers(
    mixture: Mixture, tools: BareTools, cli: CommandLine, tmp_path: Path, value: float, kind: str
) -> None:
    """llama-quantize refuses NaN at every level, even COPY; a negative number it takes, we do not."""
    matrix = Path(shutil.copy(mixture.whole, tmp_path / "imatrix.gguf"))
    header = read_header(matrix)
    at = header.data_offset + next(tensor.offset for tensor in header.tensors if tensor.name == f"{DEAD}.in_sum2")
    data = matrix.read_bytes()
    matrix.write_bytes(data[:at] + struct.pack("<f", value) + data[at + 4 :])
    document = check(cli, matrix, mixture.model, "Q4_K_M,COPY")
    assert findings(document)[kind]["tensors"] == [DEAD]
    assert not document["usable"]
    assert document["exit_code"] == 6
    for level, verdict in verdicts(document).items():
        theirs = quantized(tools, mixture.model, level, imatrix=matrix)
        assert (theirs.code != 0) == (verdict["verdict"] == "fails") == (kind != "negative")
    done = cli("quantize", mixture.model, "--imatrix", matrix, "--levels", "Q4_K_M")
    assert done.code == 6
    assert DEAD in done.err


def test_a_dense_legacy_matrix_as_publishers_give_it(
    tiny_model: Path, tiny_imatrix: Path, tools: BareTools, cli: CommandLine, tmp_path: Path
) -> None:
    old = tools.merge([tiny_imatrix], tmp_path / "imatrix.dat", "-c", "128", "--output-format", "dat")
    document = check(cli, old, tiny_model, "Q4_K_M,IQ2_XXS,Q2_K_S")
    assert findings(document) == {}
    assert {level["verdict"] for level in document["levels"]} == {"fine"}
    assert (document["imatrix"]["format"], document["imatrix"]["chunks"], document["imatrix"]["chunk_size"]) == ("dat", 20, 0)
    shown = cli("imatrix", "check", old, "--model", tiny_model, "--levels", "Q4_K_M")
    assert "legacy .dat, 14 entries, 20 chunks, words.txt" in shown.out


def test_a_layer_for_prediction_has_no_data(tools: BareTools, cli: CommandLine, tmp_path: Path) -> None:
    """MTP / NextN: the block is in the model, no token ever passes it while collecting."""
    trunk = write_llama_gguf(tmp_path / "trunk-BF16.gguf", layers=2)
    (tmp_path / "t.txt").write_text(sample_text(4000), encoding="utf-8")
    matrix = tmp_path / "imatrix.gguf"
    tools.imatrix(trunk, Path("t.txt"), matrix, "-c", "64", "--chunks", "4", "--no-ppl", folder=tmp_path)
    extra = {"blk.2.attn_q.weight": (256, 256), "blk.2.nextn.eh_proj.weight": (256, 512)}
    model = write_llama_gguf(tmp_path / "mtp-BF16.gguf", layers=2, extra=extra)
    document = check(cli, matrix, model, "Q4_K_M,IQ2_XXS")
    finding = findings(document)["block-without-data"]
    assert finding["text"] == "block 2 without any data: MTP / NextN layers are never run while collecting"
    assert finding["tensors"] == sorted(extra)
    assert [level["verdict"] for level in document["levels"]] == ["weaker", "fails"]
    theirs = quantized(tools, model, "Q4_K_M", imatrix=matrix)
    assert theirs.code == 0
    assert set(WITHOUT.findall(theirs.said)) - {*NEVER_WEIGHED} == set(extra)


def test_another_model_is_refused(mixture: Mixture, cli: CommandLine, tmp_path: Path) -> None:
    write_gguf(
        Matrix({"blk.0.ssm_in.weight": MatrixEntry(np.ones((1, 4)), np.ones(1, np.int64))}, 64, 1, ("a",)), tmp_path / "i.gguf"
    )
    document = check(cli, tmp_path / "i.gguf", mixture.model, "Q8_0")
    assert "none of its entries names a tensor of this model" in findings(document)["other-model"]["text"]
    assert (document["usable"], document["exit_code"]) == (False, 6)


def test_a_mix_is_refused(mixture: Mixture, cli: CommandLine) -> None:
    """Its types follow from the imatrix: there is nothing to check before they are chosen."""
    ran = cli("imatrix", "check", mixture.flawed, "--model", mixture.model, "--levels", "Q8_0,MIX@4GiB")
    assert (ran.code, ran.out) == (2, "")
    what, why, todo = ran.err.splitlines()
    assert what == "Error: MIX@4GiB cannot be checked."
    assert why.startswith("  Why: ")
    assert todo.startswith("  Do:  ")


class TestUncovered:
    """``--uncovered``: exactly the tensors without data are pinned, and what is shown is what is written."""

    LEVELS = "IQ2_XXS,Q3_K_M,Q6_K"

    def dry(
        self, mixture: Mixture, uncovered: str, work: Path
    ) -> dict[str, tuple[dict[str, str], tuple[str, ...], tuple[str, ...]]]:
        """The plan of a dry run: level -> (tensor -> type, the pinned, the options for them)."""
        request = RunRequest(
            SourceRequest(str(mixture.model)),
            EnvironmentRequest(work_dir=work),
            ImatrixRequest(mode=str(mixture.flawed)),
            LevelsRequest(tuple(self.LEVELS.split(",")), uncovered=uncovered),
        )
        plan = run_workflow(request, Context(ignore), dry_run=True).plan
        assert not work.exists()
        told = {}
        for step in plan.levels:
            assert step.resolved is not None
            types = {tensor.name: tensor.type for tensor in step.resolved.recipe.tensors}
            told[step.level.name] = (types, step.resolved.pinned, step.resolved.options.pins)
        return told

    def run(self, mixture: Mixture, runner: RunCommand, *more: str) -> Ran:
        return runner("run", mixture.model, "--imatrix", mixture.flawed, "--levels", self.LEVELS, *more)

    def test_the_recipe_shown_is_the_recipe_written(
        self, mixture: Mixture, runner: RunCommand, tools: BareTools, tmp_path: Path
    ) -> None:
        planned = self.dry(mixture, "q4_k", tmp_path / "work")
        done = self.run(mixture, runner, "--uncovered", "q4_k")
        assert done.code == 0, done.err
        uncovered = of_block(mixture.model, BARE) | {UNCOUNTED}
        for level, (types, pinned, options) in planned.items():
            written = tmp_path / "work" / "moe" / f"moe-{level}.gguf"
            assert types_of(written) == types
            assert set(pinned) == {name for name in uncovered if f"^{re.escape(name)}$=q4_k" in options}
            assert {types[name] for name in pinned} <= {"Q4_K"}
            pins = [word for option in options for word in ("--tensor-type", option)]
            bare = quantized(tools, mixture.model, level, *pins, imatrix=mixture.flawed)
            assert [digest(written)] == bare.digests, level
        # Of those in IQ2_XXS llama.cpp makes attn_v Q4_K by itself.
        assert set(planned["IQ2_XXS"][1]) == uncovered - {"blk.0.attn_v.weight"}
        assert planned["Q6_K"][1] == ()
        # Where nothing is smaller than the type asked for, nothing is touched.
        assert planned["Q6_K"][0] == self.dry(mixture, "fail", tmp_path / "none")["Q6_K"][0]

    def test_keep_leaves_them_as_they_are(self, mixture: Mixture, tmp_path: Path) -> None:
        for level, (types, pinned, _) in self.dry(mixture, "keep", tmp_path / "work").items():
            assert set(pinned) == of_block(mixture.model, BARE) | {UNCOUNTED}, level
            assert {types[name] for name in pinned} == {"BF16"}

    def test_another_choice_remakes_only_what_depends_on_it(self, mixture: Mixture, runner: RunCommand, tmp_path: Path) -> None:
        workspace = tmp_path / "work" / "moe"
        done = self.run(mixture, runner)
        assert done.code == 100
        assert "IQ2_XXS will fail: blk.0." in done.err
        files = [workspace / f"moe-{level}.gguf" for level in ("Q3_K_M", "Q6_K")]
        before = times(files)
        done = self.run(mixture, runner, "--uncovered", "q4_k", "--json")
        assert done.code == 0, done.err
        assert [level["status"] for level in done.document["levels"]] == ["done", "done", "skipped"]
        pinned = {level["level"]: level["pinned"] for level in done.document["plan"]["levels"]}
        assert set(pinned["IQ2_XXS"]) == of_block(mixture.model, BARE) - {"blk.0.attn_v.weight"} | {UNCOUNTED}
        assert pinned["Q6_K"] == []
        after = times(files)
        assert (before["moe-Q3_K_M.gguf"] != after["moe-Q3_K_M.gguf"], before["moe-Q6_K.gguf"]) == (
            True,
            after["moe-Q6_K.gguf"],
        )
        again = self.run(mixture, runner, "--uncovered", "Q4_K", "--json")
        assert [level["status"] for level in again.document["levels"]] == ["skipped"] * 3
        assert times(files) == after

    @pytest.mark.parametrize("by_file", [False, True])
    def test_a_user_s_own_type_wins(self, by_file: bool, mixture: Mixture, cli: CommandLine, tmp_path: Path) -> None:
        own = r"blk\.0\.attn_k\.weight=q5_k"
        (tmp_path / "types.txt").write_text(own)
        asked = ("--tensor-type-file", str(tmp_path / "types.txt")) if by_file else ("--tensor-type", own)
        (level,) = check(cli, mixture.flawed, mixture.model, "IQ2_XXS", *asked, "--uncovered", "q8_0")["levels"]
        assert set(level["pinned"]) == (of_block(mixture.model, BARE) | {UNCOUNTED}) - {"blk.0.attn_k.weight"}
        assert level["verdict"] == "weaker"

    def test_a_pin_that_shifts_another_tensor_below_the_safe_type_pins_that_too(
        self, tools: BareTools, cli: CommandLine, tmp_path: Path
    ) -> None:
        """Of 8 layers Q4_K_M gives ffn_down 0, 3, 6 and 7 six bits, and does not count overridden ones: with layer 1 pinned,
        layer 3 is the third and would get four."""
        model = write_llama_gguf(tmp_path / "deep-BF16.gguf", layers=8, ff=256)
        entries = {}
        for tensor in read_header(model).tensors:
            if tensor.name.startswith("blk.") and len(tensor.shape) > 1:
                entries[tensor.name] = MatrixEntry(np.ones((1, tensor.shape[0])), np.full(1, 640))
        lacking = [f"blk.{layer}.ffn_down.weight" for layer in (1, 3)]
        for name in lacking:
            del entries[name]
        matrix = tmp_path / "imatrix.gguf"
        write_gguf(Matrix(entries, 64, 10, ("a.txt",)), matrix)
        plain = tools.quantize(model, tmp_path / "plain.gguf", "Q4_K_M", imatrix=matrix)
        assert [types_of(plain)[name] for name in lacking] == ["Q4_K", "Q6_K"]
        (level,) = check(cli, matrix, model, "Q4_K_M", "--uncovered", "q5_k")["levels"]
        assert level["pinned"] == lacking
        done = cli("run", model, "--imatrix", matrix, "--levels", "Q4_K_M", "--uncovered", "q5_k")
        assert done.code == 0, done.err
        assert [types_of(tmp_path / "work" / "deep" / "deep-Q4_K_M.gguf")[name] for name in lacking] == ["Q5_K", "Q5_K"]

    def test_pruned_layers_are_pinned_by_their_new_names(self, mixture: Mixture, cli: CommandLine, tmp_path: Path) -> None:
        """Without layer 1 the old layer 2 is the new layer 1; told are the model's names, as in the imatrix."""
        given = ("--levels", "Q4_0", "--prune-layers", "1", "--uncovered", "q8_0", "--json")
        done = cli("run", mixture.model, "--imatrix", mixture.flawed, *given)
        assert done.code == 0, done.err
        (level,) = done.document["plan"]["levels"]
        assert set(level["pinned"]) == of_block(mixture.model, BARE) | {UNCOUNTED}
        types = types_of(tmp_path / "work" / "moe" / "moe-Q4_0.gguf")
        assert types[UNCOUNTED.replace("blk.2", "blk.1")] == "Q8_0"
        assert types["blk.1.attn_q.weight"] == "Q4_0"

    def test_types_that_take_no_pins(self, mixture: Mixture, cli: CommandLine, tmp_path: Path) -> None:
        """llama-quantize ignores --tensor-type for plain types."""
        model = write_llama_gguf(tmp_path / "f32.gguf", layers=LAYERS, experts=EXPERTS, ff=256, dtype="f32")
        document = check(cli, mixture.flawed, model, "F16,Q8_0", "--uncovered", "keep")
        assert [len(level["pinned"]) for level in document["levels"]] == [0, len(of_block(model, BARE)) + 1]

    def test_check_and_the_run_tell_the_same(self, mixture: Mixture, cli: CommandLine, tmp_path: Path) -> None:
        for uncovered in ("fail", "keep", "q4_k"):
            told = verdicts(check(cli, mixture.flawed, mixture.model, self.LEVELS, "--uncovered", uncovered))
            for command in ("run", "quantize"):
                given = (mixture.model, "--imatrix", mixture.flawed, "--levels", self.LEVELS, "--uncovered", uncovered)
                done = cli(command, *given, "--dry-run", "--json")
                planned = {level["level"]: level for level in done.document["plan"]["levels"]}
                assert {name: level["verdict"] == "fails" for name, level in told.items()} == {
                    name: level["state"] == "fails" for name, level in planned.items()
                }
                for name, level in planned.items():
                    assert level["pinned"] == told[name]["pinned"]
                    assert level["unseen"] == told[name]["unseen"]
                    assert level["without_weights"] == told[name]["without_weights"]
                for words in ("block 0 without any data", "saw no token", "hold only zeros", "name no tensor of the model"):
                    assert words in done.err

    @pytest.mark.parametrize("value", ["q4_k_m", "", "iq9", "nothing"])
    def test_what_is_no_type_is_a_usage_error(self, mixture: Mixture, cli: CommandLine, value: str) -> None:
        done = cli("imatrix", "check", mixture.whole, "--model", mixture.model, "--uncovered", value)
        assert done.code == 2
        assert "--uncovered" in done.err

    def test_a_type_that_needs_data_itself_is_no_help(self, mixture: Mixture, cli: CommandLine) -> None:
        (level,) = check(cli, mixture.flawed, mixture.model, "IQ2_XXS", "--uncovered", "iq3_xxs")["levels"]
        assert level["verdict"] == "fails"
