"""Levels in shards (``--split-max-size``, ``--split-max-tensors``): llama-gguf-split's bytes, and a level like any other."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from imatrix_runner.engines.jobs import QuantizeOptions
from imatrix_runner.models.gguf_file import read_header
from imatrix_runner.toolchain.probe import Toolchain
from support.command_line import Ran, RunCommand, run_command
from support.hub_server import HubServer
from support.llama_tools import BareTools, digest, fake_tools, leftovers
from support.passes import Passes, engine_of, write_imatrix
from support.publishing import TO, TOKEN, contents, environment, published, titles
from support.tiny_architectures import write_architecture
from support.tiny_models import paragraphs, write_llama_gguf
from support.workspaces import run_here

pytestmark = pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed")


@pytest.fixture(scope="module")
def passes(toolchain: Toolchain, tools: BareTools) -> Passes:
    return Passes(engine_of(toolchain), tools)


def dense(path: Path) -> Path:
    return write_llama_gguf(path, hidden=512, ff=1024)


MODELS: dict[str, Callable[[Path], Path]] = {
    "dense": dense,
    "tied": lambda path: write_llama_gguf(path, hidden=512, ff=1024, tied=True),
    "mixture": lambda path: write_llama_gguf(path, hidden=512, layers=1, experts=4),
    "a tensor larger than a shard": lambda path: write_llama_gguf(path, extra={"blk.1.huge.weight": (4096, 1024)}),
    "sizes that are padded": lambda path: write_llama_gguf(path, extra={"a.weight": (5, 33), "zz.weight": (1000, 1)}),
    "recurrent": lambda path: write_architecture("jamba", path, dtype="BF16"),
}


def split_names(path: Path) -> dict[str, str]:
    """Digests of the shards in a folder by name."""
    return {shard.name: digest(shard) for shard in sorted(path.glob("*-of-*.gguf"))}


def bare_split(tools: BareTools, whole: Path, folder: Path, limit: str) -> dict[str, str]:
    """What llama-gguf-split makes of a level; ``limit`` is a size or a number of tensors."""
    size = limit if limit.endswith("M") else ""
    tools.split(whole, folder / whole.stem / whole.stem, 0 if size else int(limit), max_size=size)
    return split_names(folder / whole.stem)


@pytest.mark.parametrize("name", MODELS)
def test_the_bytes_are_those_of_gguf_split(name: str, passes: Passes, tools: BareTools, tmp_path: Path) -> None:
    model = MODELS[name](tmp_path / "model.gguf")
    imatrix = write_imatrix(tmp_path / "imatrix.gguf", model)
    whole = {
        level: tools.quantize(model, tmp_path / "whole" / f"m-{level}.gguf", level, imatrix=imatrix)
        for level in ("Q8_0", "Q4_K_M")
    }
    options = {
        "1M": QuantizeOptions(split_max_size=1),
        "2M": QuantizeOptions(split_max_size=2),
        "5": QuantizeOptions(split_max_tensors=5),
    }
    n_split = 0
    for limit, option in options.items():
        plan = passes.plan(model, tuple(whole), tmp_path / limit, option, imatrix)
        made = passes.run(plan)
        assert made.spoiled == {}
        for level in plan.levels:
            found = {path.name: digest(path) for path in made.files(level.name)}
            if level.job.shards:
                assert found == bare_split(tools, whole[level.name], tmp_path / "bare" / limit, limit), level.name
                n_split += 1
            else:  # one plain file, which llama-gguf-split would call 00001-of-00001
                assert found == {f"m-{level.name}.gguf": digest(whole[level.name])}
    assert n_split >= 3


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return dense(tmp_path_factory.mktemp("split") / "m-BF16.gguf")


@pytest.fixture(scope="module")
def bare(model: Path, tools: BareTools, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """Shards of at most 2 MB of the levels that the tests make, without imatrix."""
    folder = tmp_path_factory.mktemp("bare")
    whole = {level: tools.quantize(model, folder / f"m-{level}.gguf", level) for level in ("Q8_0", "Q4_K_M")}
    return {level: bare_split(tools, path, folder, "2M") for level, path in whole.items()}


@pytest.mark.parametrize("engine", ["embedded", "binaries"])
def test_from_the_plan_to_the_figures(
    engine: str, model: Path, bare: dict[str, dict[str, str]], runner: RunCommand, tmp_path: Path
) -> None:
    arguments = ("quantize", model, "--imatrix", "none", "--levels", "Q8_0,Q4_K_M", "--engine", engine, "-t", "1", "--json")
    plan = runner(*arguments, "--split-max-size", "2M", "--dry-run").document["plan"]
    done = runner(*arguments, "--split-max-size", "2M")
    assert done.code == 0, done.err
    workspace = tmp_path / "work" / "m"
    for level, planned in zip(done.document["levels"], plan["levels"], strict=True):
        name = level["level"]
        assert level["files"] == planned["files"] == [str(workspace / f"m-{name}" / shard) for shard in bare[name]]
        assert split_names(workspace / f"m-{name}") == bare[name]
        assert level["bytes"] == planned["bytes"] == sum(Path(file).stat().st_size for file in level["files"])
    assert leftovers(workspace) == []
    assert runner("status", "--json").document["workspaces"][0]["n_bytes"] == sum(each["bytes"] for each in plan["levels"])
    again = runner(*arguments, "--split-max-size", "2M")
    assert [level["status"] for level in again.document["levels"]] == ["skipped", "skipped"]
    card = (workspace / "report.md").read_text(encoding="utf-8")
    assert "--include 'm-Q4_K_M/m-Q4_K_M-*'" in card
    assert "llama-cli -m m-Q4_K_M/m-Q4_K_M-00001-of-0000" in card
    assert "llama-gguf-split --split --split-max-size 2M m-Q4_K_M.gguf m-Q4_K_M" in card


def test_a_level_in_shards_is_measured(tiny_model: Path, tiny_imatrix: Path, runner: RunCommand, tmp_path: Path) -> None:
    """llama.cpp loads all shards by the first: the figures are those of the level in one file. Its baseline is one file."""
    text = tmp_path / "held_out.txt"
    text.write_text(paragraphs(4000), encoding="utf-8")
    figures = []
    ways: dict[str, tuple[str, ...]] = {"whole": (), "cut": ("--split-max-tensors", "4")}
    for work, options in ways.items():
        made = ("run", tiny_model, "--imatrix", tiny_imatrix, "--levels", "Q4_K_M", "-t", "1", "--work-dir", work, *options)
        done = runner(*made, "--evaluate", "--text", text, "-c", "128", "--json")
        assert done.code == 0, done.err
        report = json.loads((tmp_path / work / "tiny" / "report.json").read_text(encoding="utf-8"))
        (level,) = report["levels"]
        assert len(level["files"]) == (6 if options else 1)
        figures.append(level["measured"]["kld"])
    assert figures[0] == figures[1]
    compared = ("evaluate", tiny_model, "--text", text, "-c", "128", "--work-dir", "cut", "--ab", "--dry-run", "--json")
    assert runner(*compared).document["plan"]["twins"] == ["Q4_K_M"]


class TestChanges:
    """What is there already, and another limit."""

    @staticmethod
    def make(folder: Path, model: Path, *options: str, levels: str = "Q4_K_M", code: int = 0) -> Ran:
        common: tuple[str | Path, ...] = ("quantize", model, "--imatrix", "none", "--levels", levels, "-t", "1", "--json")
        done = run_command(*common, *options, cwd=folder)
        assert done.code == code, done.err
        return done

    def test_cut_otherwise_and_put_together_again(
        self, model: Path, bare: dict[str, dict[str, str]], tools: BareTools, tmp_path: Path
    ) -> None:
        """Tensors are copied, whatever shards they lie in; no shard of before remains."""
        workspace = tmp_path / "work" / "m"
        self.make(tmp_path, model, "--split-max-tensors", "3")
        cut = ("--split-max-size", "2M")
        for options in (cut, (), cut):
            done = self.make(tmp_path, model, *options)
            assert done.document["passes"][0]["types"] == []
            assert split_names(workspace / "m-Q4_K_M") == (bare["Q4_K_M"] if options else {})
            assert (workspace / "m-Q4_K_M").exists() == bool(options)
            if not options:
                whole = tools.quantize(model, tmp_path / "whole.gguf", "Q4_K_M")
                assert digest(workspace / "m-Q4_K_M.gguf") == digest(whole)
        assert leftovers(workspace) == []

    def test_a_level_that_fits_stays_as_it_is(self, model: Path, tmp_path: Path) -> None:
        """Also one that was made without the option, or is made without it afterwards."""
        self.make(tmp_path, model)
        workspace = tmp_path / "work" / "m"
        before = (workspace / "m-Q4_K_M.gguf").stat().st_mtime_ns
        for options in (("--split-max-size", "9G"), (), ("--split-max-tensors", "1000")):
            assert self.make(tmp_path, model, *options).document["levels"][0]["status"] == "skipped"
        assert (workspace / "m-Q4_K_M.gguf").stat().st_mtime_ns == before
        made = self.make(tmp_path, model, "--split-max-size", "9G", levels="Q4_0,Q4_K_M").document["levels"]
        assert [(level["status"], len(level["files"])) for level in made] == [("done", 1), ("skipped", 1)]
        assert self.make(tmp_path, model, levels="Q4_0").document["levels"][0]["status"] == "skipped"

    def test_a_later_level_copies_from_shards(self, model: Path, tmp_path: Path) -> None:
        self.make(tmp_path, model, "--split-max-size", "1M", levels="Q4_K_M")
        done = self.make(tmp_path, model, levels="Q4_K_S")
        log = (tmp_path / "work" / "m" / "logs" / "levels.log").read_text(encoding="utf-8").splitlines()
        passed = [json.loads(line)["level"] for line in log if line.startswith('{"type":"passed"')]
        (last,) = [level for level in passed if level and level["name"] == "Q4_K_S"]
        assert last["copied"] > 10
        assert len(done.document["levels"][0]["files"]) == 1

    def test_one_by_one(self, model: Path, bare: dict[str, dict[str, str]], tmp_path: Path) -> None:
        self.make(tmp_path, model, "--split-max-size", "2M", "--one-by-one", "--verify", "full", levels="Q8_0,Q4_K_M")
        assert {name: split_names(tmp_path / "work" / "m" / f"m-{name}") for name in bare} == bare

    def test_a_file_of_the_user_s_is_in_the_way(self, model: Path, tmp_path: Path) -> None:
        taken = tmp_path / "work" / "m" / "m-Q4_K_M" / "m-Q4_K_M-00002-of-00004.gguf"
        taken.parent.mkdir(parents=True)
        taken.write_bytes(b"mine")
        done = self.make(tmp_path, model, "--split-max-tensors", "6", code=6)
        assert f"{taken.name} is there but damaged" in done.err
        assert taken.read_bytes() == b"mine"

    def test_what_else_lies_in_the_folder_stays(self, model: Path, tmp_path: Path) -> None:
        self.make(tmp_path, model, "--split-max-tensors", "6")
        note = tmp_path / "work" / "m" / "m-Q4_K_M" / "README.md"
        note.write_text("mine", encoding="utf-8")
        self.make(tmp_path, model)
        assert [path.name for path in note.parent.iterdir()] == ["README.md"]

    def test_a_lost_shard_is_made_again(self, model: Path, bare: dict[str, dict[str, str]], tmp_path: Path) -> None:
        self.make(tmp_path, model, "--split-max-size", "2M")
        folder = tmp_path / "work" / "m" / "m-Q4_K_M"
        sorted(folder.iterdir())[1].unlink()
        assert self.make(tmp_path, model, "--split-max-size", "2M").document["levels"][0]["status"] == "done"
        assert split_names(folder) == bare["Q4_K_M"]


def test_sources_in_shards(model: Path, bare: dict[str, dict[str, str]], tools: BareTools, tmp_path: Path) -> None:
    """A level is cut by its own rule, however the source is. (llama-quantize orders the tensors of a split source alike.)"""
    shards = tools.split(model, tmp_path / "shards" / "m-BF16", 7)
    TestChanges.make(tmp_path, shards[0], "--split-max-size", "2M", levels="Q8_0")
    assert split_names(tmp_path / "work" / "m" / "m-Q8_0") == bare["Q8_0"]


def test_pinned_tensors_and_another_rounding(model: Path, tiny_text: Path, tmp_path: Path) -> None:
    imatrix = write_imatrix(tmp_path / "imatrix.gguf", model, without=("ffn_down",))
    options = ("--uncovered", "q6_k", "--split-max-tensors", "8", "-f", tiny_text, "-c", "128")
    arguments = ("run", model, "--imatrix", imatrix, "--levels", "Q2_K,REFINED-Q4_0", "-t", "1", *options, "--json")
    done = run_command(*arguments, cwd=tmp_path)
    assert done.code == 0, done.err
    assert [len(level["files"]) for level in done.document["levels"]] == [3, 3]
    again = run_command(*arguments, cwd=tmp_path)
    assert [level["status"] for level in again.document["levels"]] == ["skipped", "skipped"]
    types = {
        tensor.name: tensor.type_name
        for file in done.document["levels"][0]["files"]
        for tensor in read_header(Path(file)).tensors
    }
    assert types["blk.0.ffn_down.weight"] == "Q6_K"


def test_shards_are_published_in_their_folder(tiny_model: Path, tmp_path: Path) -> None:
    """All of a level in one commit, under the names that they have here."""
    options = ("--imatrix", "none", "--levels", "Q4_K_M", "-t", "1", "--split-max-tensors", "8")
    workspace = run_here(tmp_path, "quantize", tiny_model, *options)
    with HubServer(token=TOKEN) as hub:
        done = run_command("publish", workspace.root, "--to", TO, cwd=tmp_path, env=environment(hub))
        assert done.code == 0, done.err
        repository = published(hub)
        shards = {f"tiny-Q4_K_M/{name}": content for name, content in split_names(workspace.root / "tiny-Q4_K_M").items()}
        assert len(shards) == 3
        assert shards.items() <= contents(repository).items()
        assert titles(repository).count("Upload Q4_K_M") == 1
        assert "--include 'tiny-Q4_K_M/tiny-Q4_K_M-*'" in repository.content("README.md").decode()


class TestRefused:
    @pytest.mark.parametrize(
        ("options", "said"),
        [
            (("--split-max-size", "0M"), "Invalid --split-max-size '0M'"),
            (("--split-max-size", "-1G"), "Invalid --split-max-size '-1G'"),
            (("--split-max-size", "x"), "Invalid --split-max-size 'x'"),
            (("--split-max-tensors", "0"), "--split-max-tensors"),
            (("--split-max-size", "1G", "--split-max-tensors", "5"), "exclude each other"),
            (("--split-max-size", "1G", "--keep-split"), "exclude each other"),
        ],
        ids=" ".join,
    )
    def test_values(self, options: tuple[str, ...], said: str, model: Path, tmp_path: Path) -> None:
        done = run_command("quantize", model, *options, cwd=tmp_path)
        assert done.code == 2
        assert said in done.err
        assert not (tmp_path / "work").exists()

    def test_a_first_tensor_that_is_too_large(self, tools: BareTools, tmp_path: Path) -> None:
        """llama-gguf-split refuses, too; a larger tensor elsewhere is alone in its shard."""
        model = write_llama_gguf(tmp_path / "m-BF16.gguf", hidden=512, vocab=3000)
        done = TestChanges.make(tmp_path, model, "--split-max-size", "1M", levels="Q8_0", code=6)
        assert "the first tensor, output.weight, takes" in done.err
        assert "Give at least --split-max-size 2M" in done.err
        whole = tools.quantize(model, tmp_path / "whole.gguf", "Q8_0")
        with pytest.raises(AssertionError, match="one of splits have 0 tensors"):
            tools.split(whole, tmp_path / "bare", max_size="1M")
        TestChanges.make(tmp_path, model, levels="Q8_0")  # and a finished level does not hide it
        assert "takes" in TestChanges.make(tmp_path, model, "--split-max-size", "1M", levels="Q8_0", code=6).err
        TestChanges.make(tmp_path, model, "--split-max-size", "2M", levels="Q8_0")

    def test_programs_without_gguf_split(self, model: Path, toolchain: Toolchain, tmp_path: Path) -> None:
        folder = fake_tools(toolchain, tmp_path / "tools")
        options = ("--engine", "binaries", "--llama-cpp", str(folder), "--split-max-size", "1M")
        done = TestChanges.make(tmp_path, model, *options, levels="Q8_0", code=6)
        assert "need llama-gguf-split" in done.err
        assert "use --engine embedded" in done.err
