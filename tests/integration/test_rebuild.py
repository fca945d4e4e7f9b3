"""Levels made again from the recipes that lie next to them, and attestations that ggufpacker verifies with llama-quantize."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from imatrix_runner.audit.attestation import read_statement
from imatrix_runner.journal import Journal
from imatrix_runner.publish.how_made import how_made
from imatrix_runner.publish.local_files import ready_level
from imatrix_runner.quantize.build_recipe import read_build_recipe
from imatrix_runner.toolchain.probe import Toolchain
from imatrix_runner.workspace import Workspace
from support.command_line import Ran, run_command
from support.in_process import CommandLine
from support.llama_tools import digest
from support.passes import write_imatrix

LEVELS = ("Q4_K_M", "Q3_K_XL", "IQ4_XS")


@dataclass(frozen=True)
class Made:
    """A workspace with attested levels, in a folder of its own; the source and the matrix."""

    workspace: Path
    model: Path
    imatrix: Path

    def level(self, name: str) -> Path:
        return self.workspace / f"{self.workspace.name}-{name}.gguf"

    def recipe(self, name: str) -> Path:
        return self.workspace / f"{self.workspace.name}-{name}.gguf.recipe.json"

    def statement(self, name: str) -> Path:
        return self.workspace / f"{self.workspace.name}-{name}.gguf.derivation.json"


@pytest.fixture(scope="module")
def made(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("attested")
    imatrix = write_imatrix(folder / "im.gguf", tiny_model)
    further = ("--imatrix", imatrix, "--attest", "--tensor-type", "attn_v=q8_0")
    run = run_command("run", tiny_model, "--levels", ",".join(LEVELS[:2]), *further[:3], cwd=folder)
    assert run.code == 0, run.err
    run = run_command("run", tiny_model, "--levels", LEVELS[2], *further, cwd=folder)
    assert run.code == 0, run.err
    assert "IQ4_XS is not attested" in run.err
    return Made(folder / "work" / "tiny", tiny_model, imatrix)


def rebuilt(cli: CommandLine, made: Made, recipe: Path, out: Path, *further: str | Path) -> Ran:
    return cli("rebuild", recipe, "--source", made.model, "--imatrix", made.imatrix, "--out", out, *further)


@pytest.mark.parametrize("name", LEVELS)
def test_the_same_bytes_come_again_in_another_folder(name: str, made: Made, cli: CommandLine, tmp_path: Path) -> None:
    recipe = tmp_path / "elsewhere.recipe.json"
    recipe.write_bytes(made.recipe(name).read_bytes())
    ran = rebuilt(cli, made, recipe, tmp_path / "again", "--json")
    assert ran.code == 0, ran.err
    again = tmp_path / "again" / made.level(name).name
    assert ran.document["files"] == [str(again)]
    assert digest(again) == digest(made.level(name))
    assert [path.name for path in again.parent.iterdir()] == [again.name]


def test_a_recipe_names_no_path(made: Made) -> None:
    for name in LEVELS:
        text = made.recipe(name).read_text(encoding="utf-8")
        assert str(made.workspace) not in text
        assert str(made.model.parent) not in text
        assert read_build_recipe(made.recipe(name)).source[0].sha256 == digest(made.model)


@pytest.mark.parametrize(
    ("case", "says"),
    [
        ("source", "is not its source"),
        ("imatrix", "is not its imatrix"),
        ("missing", "its imatrix im.gguf is not at"),
        ("library", "the library is another"),
        ("types", "computes otherwise"),
        ("version", "another version"),
        ("path", "not a whole recipe"),
        ("there", "exists"),
    ],
)
def test_why_it_cannot_be_the_same_is_named(case: str, says: str, made: Made, cli: CommandLine, tmp_path: Path) -> None:
    content = json.loads(made.recipe("Q4_K_M").read_text(encoding="utf-8"))
    out, given = tmp_path / "out", ["--source", made.model, "--imatrix", made.imatrix]
    if case == "source":
        content["source"][0]["sha256"] = "0" * 64
    elif case == "imatrix":
        content["imatrix"]["sha256"] = "0" * 64
    elif case == "missing":
        given = given[:2]
    elif case in ("library", "types"):
        content["files"][0]["sha256"] = "0" * 64
        content["engine"] = "another" if case == "library" else content["engine"]
    elif case == "version":
        content["version"] = 2
    elif case == "path":
        content["files"][0]["name"] = "../../m.gguf"
    else:
        out.mkdir()
        (out / made.level("Q4_K_M").name).write_bytes(b"mine")
    recipe = tmp_path / "edited.recipe.json"
    recipe.write_text(json.dumps(content), encoding="utf-8")
    ran = cli("rebuild", recipe, *given, "--out", out)
    assert ran.code == (2 if case == "there" else 6), ran.err
    assert says in ran.err
    assert [line.split(":")[0].strip() for line in ran.err.strip().splitlines()[-3:]] == ["Error", "Why", "Do"]
    left = [path.name for path in out.iterdir()] if out.is_dir() else []
    assert left == ([made.level("Q4_K_M").name] if case == "there" else [])


def test_run_leaves_statements_that_are_true(made: Made, cli: CommandLine) -> None:
    for name in LEVELS[:2]:
        statement = read_statement(made.statement(name))
        assert (statement.file.sha256, statement.source.sha256) == (digest(made.level(name)), digest(made.model))
    given = ("--source", made.model, "--imatrix", made.imatrix, "--attestation", made.statement("Q3_K_XL"), "--json")
    assert cli("audit", made.level("Q3_K_XL"), *given).document["proven"] is True


def test_a_statement_that_is_there_stays_and_a_file_of_the_users_too(made: Made) -> None:
    """The same command again writes nothing; what is no statement is not replaced."""
    before, kept = made.statement("Q4_K_M").read_bytes(), made.statement("Q3_K_XL").read_bytes()
    made.statement("Q3_K_XL").write_text("mine", encoding="utf-8")
    folder = made.workspace.parent.parent
    run = run_command("run", made.model, "--levels", ",".join(LEVELS[:2]), "--imatrix", made.imatrix, "--attest", cwd=folder)
    assert run.code == 0, run.err
    assert made.statement("Q4_K_M").read_bytes() == before
    assert made.statement("Q3_K_XL").read_text(encoding="utf-8") == "mine"
    assert "Q3_K_XL.gguf.derivation.json is not written" in run.err
    made.statement("Q3_K_XL").write_bytes(kept)


def test_ggufpacker_accepts_ours_and_we_accept_its(made: Made, toolchain: Toolchain, cli: CommandLine, tmp_path: Path) -> None:
    pytest.importorskip("ggufpacker")
    quantize = toolchain.tool("llama-quantize")
    for path in (made.model, made.imatrix, made.level("Q4_K_M"), made.level("Q3_K_XL"), *map(made.statement, LEVELS[:2])):
        (tmp_path / path.name).symlink_to(path)

    def packer(*words: str | Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "ggufpacker.cli", *map(str, words), "--llama-quantize", str(quantize)]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120, check=False)

    for name in LEVELS[:2]:
        verified = packer("verify-attestation", made.statement(name), "--dir", tmp_path)
        assert verified.returncode == 0, verified.stderr
    out = tmp_path / "theirs.json"
    level = made.level("Q3_K_XL").name
    attested = packer("attest", level, "--source", made.model.name, "--imatrix", made.imatrix.name, "-o", out)
    assert attested.returncode == 0, attested.stderr
    given = ("--source", made.model, "--imatrix", made.imatrix, "--attestation", out, "--json")
    assert cli("audit", made.level("Q3_K_XL"), *given).document["proven"] is True


def test_recipe_and_statement_are_published_under_the_published_name(made: Made) -> None:
    workspace = Workspace(made.workspace, made.workspace.name)
    level = ready_level(workspace, Journal(workspace.journal), "Q3_K_XL", save=False)
    recipe, statement = how_made(workspace, level, ["model.Q3_K_XL.gguf"])
    assert (recipe.name, statement.name) == ("model.Q3_K_XL.gguf.recipe.json", "model.Q3_K_XL.gguf.derivation.json")
    assert json.loads(recipe.content or b"")["files"][0]["name"] == "model.Q3_K_XL.gguf"
    said = json.loads(statement.content or b"")
    assert said["subject"] == [{"name": "model.Q3_K_XL.gguf", "digest": {"sha256": digest(made.level("Q3_K_XL"))}}]
    unsaid = ready_level(workspace, Journal(workspace.journal), "IQ4_XS", save=False)
    assert [file.name for file in how_made(workspace, unsaid, ["a.gguf"])] == ["a.gguf.recipe.json"]
