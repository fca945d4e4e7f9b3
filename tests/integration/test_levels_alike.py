"""Levels of the same tensors with llama.cpp's programs: llama-quantize runs for one, and the copies are its own bytes, too."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Sequence
from pathlib import Path

import pytest

from imatrix_runner.imatrix.formats import read
from imatrix_runner.models.gguf_file import read_header
from imatrix_runner.toolchain.probe import Toolchain
from support.command_line import Ran, RunCommand, started
from support.llama_tools import BareTools, digest, fake_tools, leftovers, levels_in
from support.oracles import quantized
from support.tiny_models import write_llama_gguf

LEVELS = ("Q3_K_S", "Q3_K_M", "Q2_K", "IQ4_XS", "IQ4_NL", "Q4_K_M", "Q8_0")
"""Rows of 96 divide into no K-quant's blocks: some of these become the same types throughout."""

# The type is what stands behind the two files.
COUNTS = """
case " $* " in *" --help "*|*" --dry-run "*) exec "$real" "$@";; esac
for word in "$@"; do
    case "$word" in *.gguf) out=$word;; esac
    case "$last" in "$out") [ -n "$last" ] && echo "$word" >> {log};; esac
    last=$word
done
"""


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama_gguf(tmp_path_factory.mktemp("narrow") / "narrow-BF16.gguf", hidden=96, ff=160, fluent=True)


@pytest.fixture(scope="module")
def narrow_matrix(tools: BareTools, narrow: Path, tiny_text: Path) -> Path:
    out = narrow.with_name("imatrix.gguf")
    tools.imatrix(narrow, Path(tiny_text.name), out, "-c", "128", "--chunks", "4", folder=tiny_text.parent)
    return out


class Counted:
    """llama.cpp's programs, and which levels llama-quantize was asked for."""

    def __init__(self, toolchain: Toolchain, folder: Path) -> None:
        self._log = folder / "asked"
        self.directory = fake_tools(toolchain, folder / "tools", llama_quantize=COUNTS.format(log=self._log))
        self.arguments = ("--llama-cpp", self.directory, "--engine", "binaries")

    @property
    def asked(self) -> list[str]:
        return self._log.read_text(encoding="utf-8").split() if self._log.exists() else []


@pytest.fixture
def counted(toolchain: Toolchain, tmp_path: Path) -> Counted:
    return Counted(toolchain, tmp_path)


def copies(done: Ran) -> dict[str, str]:
    return {level["level"]: level["copied_from"] for level in done.document["levels"] if level["copied_from"]}


def bare(tools: BareTools, model: Path, levels: Sequence[str], *options: str, imatrix: Path | None) -> dict[str, str]:
    """llama-quantize's own files, by level."""
    return {name: quantized(tools, model, name, *options, imatrix=imatrix).digests[0] for name in levels}


@pytest.mark.parametrize("with_matrix", [True, False], ids=["imatrix", "no imatrix"])
def test_each_is_made_once_and_is_llama_quantize_s_own_file(
    with_matrix: bool,
    narrow: Path,
    narrow_matrix: Path,
    counted: Counted,
    tools: BareTools,
    runner: RunCommand,
    tmp_path: Path,
) -> None:
    levels = (*LEVELS, "COPY", "BF16")
    imatrix = narrow_matrix if with_matrix else None
    given = imatrix or "none"
    done = runner("run", narrow, "--imatrix", given, "--levels", ",".join(levels), "--json", *counted.arguments)
    assert done.code == 0, done.err
    made = copies(done)
    assert {"Q3_K_S", "Q2_K", "IQ4_XS", "IQ4_NL"} & made.keys()
    assert "BF16" in made
    assert "COPY" not in made  # its file type is the source's own
    assert sorted(counted.asked) == sorted(set(levels) - made.keys())
    workspace = tmp_path / "work" / "narrow"
    assert levels_in(workspace) == bare(tools, narrow, levels, imatrix=imatrix)
    assert leftovers(workspace) == []
    for name, original in made.items():
        (line,) = [line for line in done.err.splitlines() if line.startswith(f"{name}: done in ")]
        assert line.endswith(f", copied from {original}, which holds the same tensors)")
        one, other = (read_header(workspace / f"narrow-{level}.gguf") for level in (name, original))
        differing = {key for key in one.metadata if one.metadata[key] != other.metadata[key]}
        assert differing == (set() if original == "COPY" else {"general.file_type"})
    again = runner("run", narrow, "--imatrix", given, "--levels", ",".join(levels), "--json", *counted.arguments)
    assert {level["status"] for level in again.document["levels"]} == {"skipped"}


def test_one_that_was_finished_before_is_copied_and_one_that_was_changed_is_not(
    narrow: Path, counted: Counted, tools: BareTools, runner: RunCommand, tmp_path: Path
) -> None:
    arguments = ("run", narrow, "--imatrix", "none", "--json", *counted.arguments, "--levels")
    workspace = tmp_path / "work" / "narrow"
    assert runner(*arguments, "IQ4_NL").code == 0
    done = runner(*arguments, "IQ4_XS")
    assert copies(done) == {"IQ4_XS": "IQ4_NL"}
    assert counted.asked == ["IQ4_NL"]
    (workspace / "narrow-IQ4_XS.gguf").unlink()
    original = workspace / "narrow-IQ4_NL.gguf"
    data = bytearray(original.read_bytes())
    data[-100] ^= 1
    original.write_bytes(data)
    done = runner(*arguments, "IQ4_XS")
    assert copies(done) == {}
    assert counted.asked == ["IQ4_NL", "IQ4_XS"]
    assert digest(workspace / "narrow-IQ4_XS.gguf") == bare(tools, narrow, ["IQ4_XS"], imatrix=None)["IQ4_XS"]


def test_a_change_that_no_stamp_shows_is_noticed_while_it_is_copied(
    narrow: Path, counted: Counted, tools: BareTools, runner: RunCommand, tmp_path: Path
) -> None:
    """As the journal would have it if the disk had lost a bit."""
    arguments = ("run", narrow, "--imatrix", "none", "--json", *counted.arguments, "--levels")
    workspace = tmp_path / "work" / "narrow"
    assert runner(*arguments, "IQ4_NL").code == 0
    journal = json.loads((workspace / "journal.json").read_text(encoding="utf-8"))
    journal["steps"]["level-IQ4_NL"]["outputs"][0]["sha256"] = "0" * 64
    (workspace / "journal.json").write_text(json.dumps(journal), encoding="utf-8")
    done = runner(*arguments, "IQ4_XS")
    assert done.code == 0
    assert "IQ4_NL is no longer the file that was verified, so IQ4_XS is not copied from it." in done.err
    assert counted.asked == ["IQ4_NL", "IQ4_XS"]
    assert digest(workspace / "narrow-IQ4_XS.gguf") == bare(tools, narrow, ["IQ4_XS"], imatrix=None)["IQ4_XS"]


@pytest.mark.parametrize(
    "options",
    [
        ("--override-kv", "general.name=str:another"),
        ("--exclude-weights", "ffn_down"),
        ("--override-kv", "general.file_type=int:7"),
    ],
    ids=" ".join,
)
def test_other_options_than_types_make_another_file(
    options: tuple[str, str],
    narrow: Path,
    narrow_matrix: Path,
    counted: Counted,
    tools: BareTools,
    runner: RunCommand,
    tmp_path: Path,
) -> None:
    arguments = ("run", narrow, "--imatrix", narrow_matrix, "--json", *counted.arguments, "--levels")
    assert runner(*arguments, "IQ4_NL").code == 0
    done = runner(*arguments, "IQ4_XS", *options)
    assert done.code == 0, done.err
    assert copies(done) == {}
    workspace = tmp_path / "work" / "narrow"
    theirs = bare(tools, narrow, ["IQ4_XS"], *options, imatrix=narrow_matrix)
    assert digest(workspace / "narrow-IQ4_XS.gguf") == theirs["IQ4_XS"]


def test_shards_are_copied_one_by_one(
    narrow: Path, counted: Counted, tools: BareTools, runner: RunCommand, tmp_path: Path
) -> None:
    first, *_ = tools.split(narrow, tmp_path / "split" / "narrow", 8)
    done = runner("run", first, "--imatrix", "none", "--keep-split", "--levels", "IQ4_NL,IQ4_XS", "--json", *counted.arguments)
    assert done.code == 0, done.err
    assert len(copies(done)) == 1
    for name in ("IQ4_NL", "IQ4_XS"):
        tools.quantize(first, tmp_path / "bare" / f"narrow-{name}", name, "--keep-split")
    theirs = {path.name: digest(path) for path in (tmp_path / "bare").glob("*.gguf")}
    assert len(theirs) > 2
    assert {path.name: digest(path) for path in (tmp_path / "work" / "narrow").glob("narrow-IQ4*.gguf")} == theirs


def test_weights_that_are_missing_are_named_for_the_copy_too(
    narrow: Path, narrow_matrix: Path, counted: Counted, runner: RunCommand, tmp_path: Path
) -> None:
    options = ("--exclude-weights", "ffn_down", "--levels", "IQ4_NL,IQ4_XS", "--json")
    done = runner("run", narrow, "--imatrix", narrow_matrix, *options, *counted.arguments)
    assert done.code == 0, done.err
    assert copies(done)
    one, other = (level["without_weights"] for level in done.document["levels"])
    assert one == other != []
    assert len(read(narrow_matrix).matrix.entries) > len(one)


def test_killed_in_the_copy_it_goes_on_to_the_same_bytes(
    counted: Counted, tools: BareTools, runner: RunCommand, tmp_path: Path
) -> None:
    model = write_llama_gguf(tmp_path / "wide-BF16.gguf", hidden=96, layers=1, ff=160, vocab=65536)
    types = ("--token-embedding-type", "q8_0", "--output-tensor-type", "q8_0")  # quick to make, and 13 MB to copy
    arguments = ("run", model, "--imatrix", "none", "--levels", "IQ4_NL,IQ4_XS", *types, *counted.arguments)
    workspace = tmp_path / "work" / "wide"

    def half() -> bool:
        return len(levels_in(workspace)) == 1 and any((workspace / ".partial").glob("*/*.gguf"))

    with started(*arguments, cwd=tmp_path) as running:
        running.wait_for(half)
        os.kill(running.pid, signal.SIGSTOP)
        assert running.kill_tree()
    assert len(levels_in(workspace)) == 1
    done = runner(*arguments, "--json")
    assert done.code == 0, done.err
    assert len(copies(done)) == 1
    assert len(counted.asked) == 1
    assert levels_in(workspace) == bare(tools, model, ["IQ4_NL", "IQ4_XS"], *types, imatrix=None)
    assert leftovers(workspace) == []
