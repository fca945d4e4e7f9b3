"""Mixes of models, texts and workspaces that are not as they should be: three lines that say why, or the same bytes all the
same."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from imatrix_runner.mixes.cost_map import read_cost_map
from imatrix_runner.models.gguf_file import read_header
from support.command_line import Ran, RunCommand, run_command, started
from support.llama_tools import digest, levels_in
from support.mounts import mounted
from support.passes import set_floats
from support.tiny_architectures import write_architecture
from support.tiny_models import write_llama_gguf

FAST = ("-c", "128", "--types", "q4_k,q6_k")
"""Options of a mix whose costs are measured in a second."""


@pytest.fixture(scope="module")
def text(tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(tiny_text.read_text(encoding="utf-8")[:9000], encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def short_text(text: Path) -> Path:
    """As few chunks as suffice."""
    path = text.with_name("short.txt")
    path.write_text(text.read_text(encoding="utf-8")[:3500], encoding="utf-8")
    return path


def refused(ran: Ran, code: int = 6) -> tuple[str, str, str]:
    """The three lines of an error: what, why, what to do."""
    assert ran.code == code, ran.err
    assert "Traceback" not in ran.err
    found = re.search(r"Error: (.*)\.\n  Why: (.*)\.\n  Do:  (.*)\n", ran.err)
    assert found, ran.err
    return found[1], found[2], found[3]


class TestTexts:
    def test_a_text_that_is_not_there(self, tiny_model: Path, tiny_imatrix: Path, runner: RunCommand) -> None:
        done = runner("run", tiny_model, "--imatrix", tiny_imatrix, "--like", "Q4_K_M", "-f", "nowhere.txt")
        what, why, _ = refused(done)
        assert what == "The file system refused while reading the calibration text"
        assert why == "nowhere.txt: No such file or directory"

    def test_an_empty_text(self, tiny_model: Path, tiny_imatrix: Path, runner: RunCommand, tmp_path: Path) -> None:
        (tmp_path / "empty.txt").write_text("")
        done = runner("run", tiny_model, "--imatrix", tiny_imatrix, "--like", "Q4_K_M", "-f", "empty.txt")
        assert refused(done)[:2] == ("empty.txt cannot be used as calibration text", "it is empty")


class TestModels:
    def test_a_number_that_is_none(self, text: Path, runner: RunCommand, tmp_path: Path) -> None:
        model = write_llama_gguf(tmp_path / "nan-BF16.gguf", fluent=True)
        set_floats(model, "blk.0.ffn_norm.weight", [float("nan")])
        done = runner("run", model, "--imatrix", "none", "--like", "Q4_K_M", "-f", text, *FAST)
        what, why, _ = refused(done)
        assert what == "nan-BF16.gguf produced NaN or infinite numbers"
        assert why == "numbers in its tensor blk.0.ffn_norm.weight are NaN or infinite"

    def test_activations_that_overflow(self, text: Path, runner: RunCommand, tmp_path: Path) -> None:
        model = write_llama_gguf(tmp_path / "large-BF16.gguf", fluent=True)
        set_floats(model, "blk.0.ffn_norm.weight", [3e38] * 256)
        done = runner("run", model, "--imatrix", "none", "--like", "Q4_K_M", "-f", text, *FAST)
        what, why, _ = refused(done)
        assert what == "large-BF16.gguf produced NaN or infinite numbers"
        assert why.startswith("its logits in chunk ")

    def test_rows_that_no_type_divides(self, text: Path, runner: RunCommand, tmp_path: Path) -> None:
        model = write_llama_gguf(tmp_path / "stiff-BF16.gguf", hidden=72, ff=72)
        done = runner("run", model, "--imatrix", "none", "--like", "Q4_K_M", "-f", text, "-c", "128")
        assert refused(done) == (
            "No mix of this model can be made",
            "no type that is allowed fits output.weight with rows of 72 numbers",
            "Use the model as it is.",
        )

    def test_rows_that_none_of_the_named_types_divides(self, text: Path, runner: RunCommand, tmp_path: Path) -> None:
        model = write_llama_gguf(tmp_path / "narrow-BF16.gguf", hidden=64, ff=96)
        arguments = ("run", model, "--imatrix", "none", "--size", "200KiB", "-f", text, "-c", "128")
        what, why, todo = refused(runner(*arguments, "--types", "q4_k"))
        assert what == "No mix of this model can be made"
        assert why == "no type that is allowed fits output.weight with rows of 64 numbers"
        assert "add q4_0, q5_0, iq4_nl or q8_0 to --types" in todo
        done = runner(*arguments, "--types", "q4_k,q4_0,q8_0")
        assert done.code == 0, done.err

    def test_some_rows_that_none_of_the_named_types_divides(self, text: Path, runner: RunCommand, tmp_path: Path) -> None:
        """They keep their type, which is said, and counts in the size."""
        model = write_llama_gguf(tmp_path / "odd-BF16.gguf", odd=True)
        done = runner("run", model, "--imatrix", "none", "--size", "1.3MiB", "-f", text, *FAST)
        assert done.code == 0, done.err
        assert (
            "Warning: 2 tensors keep their types: no type that is allowed fits blk.0.ffn_down.weight with rows of 544"
            in done.err
        )
        tight = runner("run", model, "--imatrix", "none", "--like", "Q4_K_M", "-f", text, *FAST)
        what, _, todo = refused(tight)
        assert what == "MIX@like:Q4_K_M cannot be reached"
        assert todo.startswith("Ask for more. Types of small blocks fit")

    def test_experts_that_are_never_reached(self, short_text: Path, runner: RunCommand, tmp_path: Path) -> None:
        """Two of 48 are used: the text leaves some without a token."""
        model = write_llama_gguf(tmp_path / "experts-BF16.gguf", experts=48, layers=1, ff=256)
        done = runner("run", model, "--like", "Q4_K_M", "-f", short_text, "-c", "128", "--types", "q3_k,q4_k,q6_k", "--json")
        assert done.code == 0, done.err
        (level,) = done.document["levels"]
        assert level["status"] == "done"

    def test_blocks_that_are_never_computed(self, short_text: Path, runner: RunCommand, tmp_path: Path) -> None:
        """They get types by what tensors of their kind cost, and are left out where recipes are tried."""
        model = write_architecture("glm4moe", tmp_path / "mtp-BF16.gguf", dtype="BF16")
        done = runner("run", model, "--like", "Q4_K_M", "-f", short_text, *FAST)
        assert done.code == 0, done.err
        (out,) = (tmp_path / "work" / "mtp").glob("mtp-*.gguf")
        found = {tensor.name: tensor.type_name for tensor in read_header(out).tensors}
        assert {found[f"blk.2.ffn_{name}_exps.weight"] for name in ("gate", "up", "down")} <= {"Q4_K", "Q6_K"}

    def test_blocks_that_are_never_computed_can_be_kept(self, short_text: Path, runner: RunCommand, tmp_path: Path) -> None:
        model = write_architecture("glm4moe", tmp_path / "mtp-BF16.gguf", dtype="BF16")
        done = runner(
            "run", model, "--like", "Q4_K_M", "-f", short_text, "-c", "128", "--types", "q4_k,q6_k", "--uncovered", "keep"
        )
        assert done.code == 0, done.err
        (out,) = (tmp_path / "work" / "mtp").glob("mtp-*.gguf")
        found = {tensor.name: tensor.type_name for tensor in read_header(out).tensors}
        assert {found[f"blk.2.ffn_{name}_exps.weight"] for name in ("gate", "up", "down")} == {"BF16"}
        assert found["blk.1.ffn_up.weight"] in ("Q4_K", "Q6_K")


class TestTargets:
    def test_a_size_above_the_model(self, tiny_model: Path, tiny_imatrix: Path, text: Path, runner: RunCommand) -> None:
        done = runner("run", tiny_model, "--imatrix", tiny_imatrix, "--size", "40MiB", "-f", text, *FAST)
        what, why, todo = refused(done)
        assert what == "MIX@40MiB leaves nothing to choose"
        assert re.fullmatch(r"it allows 40\.00 MiB; files of this model take [\d.]+ KiB to [\d.]+ MiB", why)
        assert todo == "Ask for less, or use the model as it is."

    def test_like_a_level_that_fails(self, tiny_model: Path, text: Path, runner: RunCommand) -> None:
        done = runner("run", tiny_model, "--imatrix", "none", "--like", "IQ2_XXS", "-f", text, *FAST)
        what, why, _ = refused(done)
        assert what == "MIX@like:IQ2_XXS names a level that cannot be made"
        assert why == "it needs an importance matrix and there is none"


@dataclass(frozen=True)
class Chosen:
    """A finished command with a mix, and the digests of its costs, its map and its file."""

    arguments: tuple[str | Path, ...]
    workspace: Path
    files: dict[str, str]


def measured_files(workspace: Path) -> dict[str, str]:
    files = (*workspace.glob(".mixes/*"), workspace / "mix.json", *workspace.glob("*.gguf"))
    return {path.relative_to(workspace).as_posix(): digest(path) for path in files}


@pytest.fixture(scope="module")
def chosen(tiny_model: Path, tiny_imatrix: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Chosen:
    folder = tmp_path_factory.mktemp("chosen")
    arguments = ("run", tiny_model, "--imatrix", tiny_imatrix, "--size", "900KiB", "-f", text, *FAST, "--engine", "embedded")
    done = run_command(*arguments, cwd=folder)
    assert done.code == 0, done.err
    workspace = folder / "work" / "tiny"
    return Chosen(arguments, workspace, measured_files(workspace))


def of_another_model(path: Path) -> None:
    """As if the costs had been measured with other inputs."""
    head, *lines = path.read_bytes().splitlines(keepends=True)
    document = json.loads(head)
    document["fingerprint"] = "sha256:" + "0" * 64
    path.write_bytes(json.dumps(document, separators=(",", ":")).encode() + b"\n" + b"".join(lines))


def of_another_version(path: Path) -> None:
    head, *lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(head.replace(b'"version":1', b'"version":9') + b"".join(lines))


def damaged(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("change", [of_another_model, of_another_version, damaged])
def test_costs_that_do_not_count_are_measured_again(change: Callable[[Path], None], chosen: Chosen, tmp_path: Path) -> None:
    workspace = tmp_path / "work" / "tiny"
    (workspace / ".mixes").mkdir(parents=True)
    for path in (chosen.workspace / ".mixes").glob("*.jsonl"):
        copy = workspace / ".mixes" / path.name
        copy.write_bytes(path.read_bytes())
        change(copy)
        assert digest(copy) != digest(path)
    done = run_command(*chosen.arguments, cwd=tmp_path)
    assert done.code == 0, done.err
    assert measured_files(workspace) == chosen.files


def test_a_map_of_another_version_is_written_again(chosen: Chosen, tmp_path: Path) -> None:
    """It is made from the costs, so that nothing is lost."""
    workspace = tmp_path / "work" / "tiny"
    (workspace / ".mixes").mkdir(parents=True)
    for path in (chosen.workspace / ".mixes").glob("*.jsonl"):
        (workspace / ".mixes" / path.name).write_bytes(path.read_bytes())
    (workspace / "mix.json").write_text('{"version": 99, "errors": "other"}')
    done = run_command(*chosen.arguments, cwd=tmp_path)
    assert done.code == 0, done.err
    assert "probes of tensors" not in done.err
    assert read_cost_map(workspace / "mix.json").version == 1
    assert measured_files(workspace) == chosen.files


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "size=6m", "tmpfs") as point:
        yield point


@pytest.mark.parametrize("step", ["errors", "probes"])
def test_a_disk_that_becomes_full_under_the_costs(step: str, chosen: Chosen, small_disk: Path, tmp_path: Path) -> None:
    workspace, filler = small_disk / "tiny", small_disk / "filler"
    arguments = (*chosen.arguments, "--work-dir", small_disk)
    with started(*arguments, cwd=tmp_path) as running:
        running.wait_for(lambda: list((workspace / ".mixes").glob(f"{step}-*.jsonl")))
        with pytest.raises(OSError, match="No space left"), filler.open("wb", buffering=0) as handle:  # noqa: PT012
            while True:
                handle.write(bytes(4096))
        done = running.finish()
    refused(done, 8)
    assert levels_in(workspace) == {}
    filler.unlink()
    again = run_command(*arguments, cwd=tmp_path)
    assert again.code == 0, again.err
    assert measured_files(workspace) == chosen.files
