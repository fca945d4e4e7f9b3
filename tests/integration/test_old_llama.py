"""llama.cpp of August 2024, named with --llama-cpp: legacy imatrix, no --dry-run, no --tensor-type, other lines and options."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest

from imatrix_runner.imatrix.formats import read
from imatrix_runner.toolchain.capabilities import Capabilities, capabilities
from imatrix_runner.toolchain.probe import Toolchain
from support.command_line import RunCommand, clean_environment
from support.llama_tools import digest, leftovers, levels_in
from support.old_llama import build_old_tools
from support.tiny_models import sample_text

LEVELS = ("Q4_K_M", "IQ2_XS", "Q4_0_4_4")
"""A mixture, a type that needs the imatrix, and one that llama.cpp has dropped since: its size is not known here."""


@pytest.fixture(scope="module")
def old() -> Toolchain:
    return build_old_tools()


@pytest.fixture(scope="module")
def old_matrix(old: Toolchain, tiny_model: Path, tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The old llama-imatrix's own file, over 8 chunks of 128 tokens."""
    out = tmp_path_factory.mktemp("old") / "imatrix.dat"
    files = ("-m", str(tiny_model), "-f", str(tiny_text), "-o", str(out))
    _bare(old, "llama-imatrix", *files, "-c", "128", "--chunks", "8", folder=out.parent)
    return out


def _bare(tools: Toolchain, tool: str, *arguments: str, folder: Path) -> None:
    argv = [str(tools.tool(tool)), *arguments]
    done = subprocess.run(argv, cwd=folder, env=clean_environment(), capture_output=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr.decode()


def test_what_its_programs_can_do_is_found_out_once(old: Toolchain, tmp_path: Path) -> None:
    assert capabilities(old, tmp_path) == Capabilities(reads="dat", plans=False, counts_experts=False)
    assert len(list(tmp_path.rglob("*.json"))) == 1
    assert capabilities(old, tmp_path).reads == "dat"
    usage = old.takes("llama-imatrix")
    assert (usage.escapes, usage.named_layers, usage.legacy_matrix, usage.leaves_log) == (True, False, True, True)
    assert "-fa" in usage.flags


def test_current_programs_read_and_write_the_gguf_format(toolchain: Toolchain, tmp_path: Path) -> None:
    assert capabilities(toolchain, tmp_path) == Capabilities()


def test_from_the_text_to_measured_levels(
    old: Toolchain, old_matrix: Path, tiny_model: Path, tiny_text: Path, runner: RunCommand, tmp_path: Path
) -> None:
    arguments = ("run", tiny_model, "-f", tiny_text, "-c", "128", "--chunks", "8", "--levels", ",".join(LEVELS))
    done = runner(*arguments, "--imatrix", "generate", "--llama-cpp", old.directory, "--json")
    assert done.code == 0, done.err
    planned = {level["level"]: level["bytes"] for level in done.document["plan"]["levels"]}
    assert planned == {level["level"]: level["bytes"] for level in done.document["levels"]}
    workspace = tmp_path / "work" / "tiny"
    assert leftovers(workspace) == []
    assert not (tmp_path / "llama.log").exists()
    ours, theirs = read(workspace / "imatrix.gguf").matrix, read(old_matrix).matrix
    assert ours.entries.keys() == theirs.entries.keys()
    for name in ours.entries:
        assert ours.counts(name).tolist() == [8 * 128]
        mean = ours.entries[name].sums / ours.counts(name)[0]
        np.testing.assert_allclose(mean, theirs.entries[name].sums / theirs.counts(name)[0], rtol=1e-6)

    text = tmp_path / "held-out.txt"
    text.write_text(sample_text(450 * 6, seed=5), encoding="utf-8")
    measure = ("evaluate", tiny_model, "--text", text, "-c", "128", "--chunks", "4", "--llama-cpp", old.directory, "--json")
    measured = runner(*measure)
    assert measured.code == 0, measured.err
    levels = measured.document["measured"]["levels"]
    figures = {name: level["kld"]["value"] for name, level in levels.items()}
    assert {"1.0", "0.99", "0.5", "0.0"} <= levels["Q4_K_M"]["kld_at"].keys()
    assert 0 < max(figures["Q4_K_M"], figures["Q4_0_4_4"]) < figures["IQ2_XS"] < 10


def test_levels_are_those_of_the_bare_program(
    old: Toolchain, old_matrix: Path, tiny_model: Path, runner: RunCommand, tmp_path: Path
) -> None:
    arguments = ("quantize", tiny_model, "--imatrix", old_matrix, "--levels", ",".join(LEVELS))
    done = runner(*arguments, "--llama-cpp", old.directory)
    assert done.code == 0, done.err
    bare: dict[str, str] = {}
    for level in LEVELS:
        out = tmp_path / f"bare-{level}.gguf"
        files = ("--imatrix", old_matrix.name, str(tiny_model), str(out), level)
        _bare(old, "llama-quantize", *files, folder=old_matrix.parent)
        bare[level] = digest(out)
    assert levels_in(tmp_path / "work" / "tiny") == bare


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (("--imatrix", "none"), "it needs an importance matrix and there is none"),
        (("--exclude-weights", "attn_k"), "blk.0.attn_k.weight"),
    ],
    ids=["no imatrix", "without weights"],
)
def test_what_it_cannot_do_is_said_in_the_plan(
    options: tuple[str, ...], why: str, old: Toolchain, old_matrix: Path, tiny_model: Path, runner: RunCommand
) -> None:
    given = options if "--imatrix" in options else ("--imatrix", old_matrix, *options)
    done = runner("quantize", tiny_model, *given, "--levels", "IQ2_XS", "--llama-cpp", old.directory, "--dry-run", "--json")
    (level,) = done.document["plan"]["levels"]
    assert level["state"] == "fails"
    assert why in level["reason"]


@pytest.mark.parametrize("option", ["--tensor-type attn_q=q6_k", "--prune-layers 1"])
def test_an_option_that_it_lacks_is_refused_by_name(
    option: str, old: Toolchain, old_matrix: Path, tiny_model: Path, runner: RunCommand
) -> None:
    arguments = ("quantize", tiny_model, "--imatrix", old_matrix, "--levels", "Q4_K_M", *option.split())
    done = runner(*arguments, "--llama-cpp", old.directory, "--dry-run")
    assert done.code == 2
    assert f"This llama-quantize has no {option.split()[0]}" in done.err


def test_special_tokens_are_not_parsed_by_it(old: Toolchain, tiny_model: Path, tiny_text: Path, runner: RunCommand) -> None:
    arguments = ("imatrix", "generate", tiny_model, "-f", tiny_text, "-c", "128", "--parse-special")
    done = runner(*arguments, "--llama-cpp", old.directory)
    assert done.code == 2
    assert "This llama-imatrix has no --parse-special" in done.err
