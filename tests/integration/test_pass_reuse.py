"""What a pass need not compute: tensors it finished before it was ended, and tensors that finished levels share; what it may
not believe; and what it holds in memory meanwhile."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import numpy as np
import pytest

from imatrix_runner.engines.embedded.bindings import find
from imatrix_runner.engines.embedded.engine import EmbeddedEngine
from imatrix_runner.engines.files import ledger
from imatrix_runner.engines.jobs import CheckJob
from imatrix_runner.engines.pass_parts import LedgerEntry
from imatrix_runner.events import ignore
from imatrix_runner.files import stamp
from imatrix_runner.models.gguf_file import read_header
from imatrix_runner.process import Runner
from imatrix_runner.toolchain.probe import Toolchain
from imatrix_runner.toolchain.store import cache_dir
from support.command_line import PROGRAM, Ran, RunCommand, clean_environment
from support.llama_tools import BareTools, digest, fake_tools, leftovers, levels_in
from support.oracles import quantized
from support.tiny_models import write_llama_gguf

TWO = ("Q4_K_M", "Q6_K")
VARIANTS = {"Q4_K_L": ("Q4_K_M", "--token-embedding-type", "q8_0", "--output-tensor-type", "q8_0")}
ALL = 1000
EMBEDDED = ("--engine", "embedded")

Pairs = set[tuple[str, str]]
"""Of a tensor's name and a type's, as ggml spells it in capitals."""


@pytest.fixture(scope="module")
def other_imatrix(tools: BareTools, tiny_model: Path, tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another matrix of the tiny model, under the same file name."""
    out = tmp_path_factory.mktemp("other") / "imatrix.gguf"
    tools.imatrix(tiny_model, tiny_text, out, "-c", "128", "--chunks", "3")
    return out


@dataclass(frozen=True)
class Levels:
    """``quantize`` of the tiny model in one workspace, and llama-quantize's own files beside it."""

    runner: RunCommand
    tools: BareTools
    model: Path
    imatrix: Path
    folder: Path

    @property
    def workspace(self) -> Path:
        return self.folder / "work" / self.model.stem.removesuffix("-BF16")

    def make(self, *levels: str, imatrix: Path | None = None, options: Iterable[str] = (), code: int = 0) -> Ran:
        given = ("--imatrix", imatrix or self.imatrix, "--levels", ",".join(levels))
        done = self.runner("quantize", self.model, *given, *EMBEDDED, *options, "--json")
        assert done.code == code, done.err
        return done

    def file(self, level: str) -> Path:
        return self.workspace / f"{self.workspace.name}-{level}.gguf"

    def ledger(self, level: str) -> Path:
        return self.workspace / ".ledgers" / f"{level}.jsonl"

    def half(self, level: str) -> Path:
        """Where the level grows."""
        return self.workspace / ".partial" / level / self.file(level).name

    def pairs(self, level: str) -> Pairs:
        """What the file of a finished level consists of."""
        return {(tensor.name, tensor.type_name.upper()) for tensor in read_header(self.file(level)).tensors}

    def to_compute(self, *levels: str) -> Pairs:
        """What is not the model's own type."""
        own = {(tensor.name, tensor.type_name.upper()) for tensor in read_header(self.model).tensors}
        return set().union(*(self.pairs(level) for level in levels)) - own

    def is_bare(self, *levels: str, imatrix: Path | None = None, options: Iterable[str] = ()) -> None:
        """The files of these levels are llama-quantize's, and nothing else lies around."""
        written = levels_in(self.workspace)
        for level in levels:
            ftype, *pinned = VARIANTS.get(level, (level,))
            bare = quantized(self.tools, self.model, ftype, *pinned, *options, imatrix=imatrix or self.imatrix)
            assert [written[level]] == bare.digests, level
        assert leftovers(self.workspace) == []

    def interrupt(self, **recorded: int) -> None:
        """Go back to when the pass was killed: of each finished level named so many tensors were on disk and recorded; of the
        others nothing that could be used, and nothing had its name."""
        (self.workspace / "journal.json").unlink()
        for level, count in recorded.items():
            half = self.half(level)
            half.parent.mkdir(parents=True)
            self.file(level).rename(half)
            found = ledger.read(self.ledger(level))
            assert found is not None
            head, entries = found
            self.ledger(level).unlink()
            written = list(entries.values())[:count]
            (half.parent / "ledger.jsonl").write_bytes(b"".join(msgspec.json.encode(line) + b"\n" for line in (head, *written)))
            with half.open("r+b") as handle:
                handle.write(b"\0\0\0\0")
                for entry in list(entries.values())[count:]:
                    handle.seek(entry.offset)
                    handle.write(b"\xab" * entry.bytes)

    def recorded(self, *levels: str) -> Pairs:
        """What the ledgers of half levels say."""
        found = [ledger.read(self.half(level).parent / "ledger.jsonl") for level in levels]
        return {(entry.tensor, entry.type.upper()) for head in found if head for entry in head[1].values()}

    def counts(self, level: str) -> tuple[int, int, int]:
        """Tensors of a level that the last pass computed, copied and kept, by the log."""
        lines = (self.workspace / "logs" / "levels.log").read_text(encoding="utf-8").splitlines()
        told = [json.loads(line)["level"] for line in lines if line.startswith('{"type":"passed"')]
        last = [entry for entry in told if entry and entry["name"] == level][-1]
        return last["computed"], last["copied"], last["kept"]


@pytest.fixture
def levels(runner: RunCommand, tools: BareTools, tiny_model: Path, tiny_imatrix: Path, tmp_path: Path) -> Levels:
    return Levels(runner, tools, tiny_model, tiny_imatrix, tmp_path)


def computed(done: Ran) -> int:
    """Pairs of a tensor and a type that all passes of a run computed."""
    return sum(cost["pairs"] for figures in done.document["passes"] for cost in figures["types"])


def flip(path: Path, offset: int, *, unseen: bool) -> None:
    """Another byte there, or soon after; ``unseen``: where neither the file system nor a sample of the content shows it."""
    before, seen = path.stat(), stamp(path)
    for at in range(offset, offset + (96 << 10), 1 << 10):
        _invert(path, at)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + (0 if unseen else 1)))
        if not unseen or stamp(path) == seen:
            return
        _invert(path, at)
    raise AssertionError("every place is sampled")


def _invert(path: Path, offset: int) -> None:
    with path.open("r+b") as handle:
        handle.seek(offset)
        (byte,) = handle.read(1)
        handle.seek(offset)
        handle.write(bytes([byte ^ 0xFF]))


def entries_of(path: Path) -> dict[str, LedgerEntry]:
    found = ledger.read(path)
    assert found is not None
    return found[1]


class TestInterrupted:
    def test_only_what_is_missing_is_computed(self, levels: Levels) -> None:
        assert computed(levels.make(*TWO)) == len(levels.to_compute(*TWO))
        wanted, n_tensors = levels.to_compute(*TWO), len(levels.pairs("Q6_K"))
        levels.interrupt(Q4_K_M=9, Q6_K=5)
        missing = wanted - levels.recorded(*TWO)
        assert 0 < len(missing) < len(wanted)
        assert computed(levels.make(*TWO)) == len(missing)
        for level, kept in (("Q4_K_M", 9), ("Q6_K", 5)):
            told = levels.counts(level)
            assert told[2] == kept
            assert sum(told) <= n_tensors  # the norms are neither computed nor copied
        levels.is_bare(*TWO)

    def test_a_tensor_that_only_another_half_level_has_is_copied(self, levels: Levels) -> None:
        """Q4_K_M has some tensors in Q6_K; here the Q6_K level was complete and the other had nothing."""
        levels.make(*TWO)
        shared = levels.to_compute("Q4_K_M") & levels.to_compute("Q6_K")
        alone = levels.to_compute("Q4_K_M") - shared
        assert shared
        levels.interrupt(Q4_K_M=0, Q6_K=ALL)
        assert computed(levels.make(*TWO)) == len(alone)
        assert levels.counts("Q4_K_M") == (len(alone), len(shared), 0)
        assert levels.counts("Q6_K") == (0, 0, len(levels.pairs("Q6_K")))
        levels.is_bare(*TWO)

    def test_everything_was_written_and_nothing_had_its_name(self, levels: Levels) -> None:
        levels.make(*TWO)
        levels.interrupt(Q4_K_M=ALL, Q6_K=ALL)
        assert computed(levels.make(*TWO)) == 0
        levels.is_bare(*TWO)

    @pytest.mark.parametrize("torn", ["the last line", "a line in the middle", "the head", "all but some zeros"])
    def test_a_torn_ledger(self, torn: str, levels: Levels) -> None:
        """Power loss: appended lines that never got to the disk, or pages of zeros in their place."""
        levels.make("Q4_K_M")
        wanted = len(levels.to_compute("Q4_K_M"))
        levels.interrupt(Q4_K_M=12)
        path = levels.half("Q4_K_M").parent / "ledger.jsonl"
        lines = path.read_bytes().splitlines(keepends=True)
        assert len(lines) == 13
        changed = {
            "the last line": [*lines[:-1], lines[-1][:-9]],
            "a line in the middle": [*lines[:5], lines[5][:40] + b"\0" * 30 + b"\n", *lines[6:]],
            "the head": [lines[0][:50] + b"\n", *lines[1:]],
            "all but some zeros": [b"\0" * 512],
        }
        path.write_bytes(b"".join(changed[torn]))
        believed = {"the last line": 11, "a line in the middle": 4}.get(torn, 0)
        done = levels.make("Q4_K_M")
        assert computed(done) > wanted - 12
        assert levels.counts("Q4_K_M")[2] == believed
        levels.is_bare("Q4_K_M")

    def test_the_power_went_before_anything_but_sizes_was_on_the_disk(self, levels: Levels) -> None:
        levels.make("Q4_K_M")
        levels.interrupt(Q4_K_M=0)
        half = levels.half("Q4_K_M")
        half.write_bytes(bytes(half.stat().st_size))
        levels.make("Q4_K_M")
        levels.is_bare("Q4_K_M")

    @pytest.mark.parametrize("size", ["shorter", "longer", "gone"])
    def test_a_half_file_of_another_size(self, size: str, levels: Levels) -> None:
        levels.make("Q4_K_M")
        wanted = len(levels.to_compute("Q4_K_M"))
        levels.interrupt(Q4_K_M=12)
        half = levels.half("Q4_K_M")
        if size == "gone":
            half.unlink()
        else:
            os.truncate(half, half.stat().st_size + (512 if size == "longer" else -512))
        assert computed(levels.make("Q4_K_M")) == wanted
        assert levels.counts("Q4_K_M")[2] == 0
        levels.is_bare("Q4_K_M")

    @pytest.mark.parametrize("changed", ["options", "name of the imatrix", "content of the imatrix"])
    def test_other_inputs_begin_anew(self, changed: str, levels: Levels, tiny_imatrix: Path, other_imatrix: Path) -> None:
        """Even where only the imatrix's name differs, for that is written into the file."""
        levels.make("Q4_K_M")
        levels.interrupt(Q4_K_M=12)
        options = ("--pure",) if changed == "options" else ()
        imatrix = tiny_imatrix
        if changed == "name of the imatrix":
            imatrix = levels.workspace / "another-name.gguf"
            shutil.copy(tiny_imatrix, imatrix)
        elif changed == "content of the imatrix":
            imatrix = other_imatrix
        done = levels.make("Q4_K_M", imatrix=imatrix, options=options)
        assert computed(done) == len(levels.to_compute("Q4_K_M"))
        assert levels.counts("Q4_K_M")[2] == 0
        levels.is_bare("Q4_K_M", imatrix=imatrix, options=options)

    def test_half_levels_that_are_no_longer_wanted_go(self, levels: Levels) -> None:
        levels.make(*TWO)
        levels.interrupt(Q4_K_M=9, Q6_K=5)
        levels.make("Q4_K_M")
        levels.is_bare("Q4_K_M")
        assert levels_in(levels.workspace).keys() == {"Q4_K_M"}


class TestFinished:
    """Levels that are there give to levels that come later."""

    def test_a_later_level_copies_what_it_shares(self, levels: Levels) -> None:
        levels.make(*TWO)
        done = levels.make("Q5_K_M")
        shared = levels.to_compute("Q5_K_M") & levels.to_compute(*TWO)
        alone = levels.to_compute("Q5_K_M") - shared
        assert {kind for _, kind in shared} == {"Q6_K"}
        assert {kind for _, kind in alone} == {"Q5_K"}
        assert computed(done) == len(alone)
        assert levels.counts("Q5_K_M") == (len(alone), len(shared), 0)
        levels.is_bare(*TWO, "Q5_K_M")
        assert [level["status"] for level in levels.make(*TWO, "Q5_K_M").document["levels"]] == ["skipped"] * 3

    def test_a_level_that_is_deleted_is_whole_again_from_its_siblings(self, levels: Levels) -> None:
        levels.make(*TWO)
        shared = levels.to_compute("Q4_K_M") & levels.to_compute("Q6_K")
        levels.file("Q4_K_M").unlink()
        done = levels.make(*TWO)
        assert [level["status"] for level in done.document["levels"]] == ["done", "skipped"]
        assert computed(done) == len(levels.to_compute("Q4_K_M") - shared)
        levels.is_bare(*TWO)

    def test_another_imatrix_shares_only_types_that_ignore_it(self, levels: Levels, other_imatrix: Path) -> None:
        """``_L`` levels have embeddings and output in Q8_0."""
        levels.make("Q8_0", "Q4_K_M", "F16")
        done = levels.make("Q4_K_L", imatrix=other_imatrix)
        assert {("token_embd.weight", "Q8_0"), ("output.weight", "Q8_0")} < levels.to_compute("Q4_K_L")
        assert computed(done) == len(levels.to_compute("Q4_K_L")) - 2
        assert levels.counts("Q4_K_L")[1] == 2
        again = levels.make("Q8_0", "F16", imatrix=other_imatrix)  # their metadata name the matrix
        assert [level["status"] for level in again.document["levels"]] == ["done", "done"]
        assert computed(again) == 0
        levels.is_bare("Q4_K_L", "Q8_0", "F16", imatrix=other_imatrix)
        levels.is_bare("Q4_K_M")

    def test_tensors_without_weights_are_shared_by_what_they_are(self, levels: Levels, tiny_imatrix: Path) -> None:
        """The imatrix has no data for embeddings and output: in Q6_K they are the same with it and without. What it has data
        for is not."""
        levels.make("Q6_K")
        done = levels.make("Q5_K_M", options=("--exclude-weights", "ffn_down"))
        weighed = {(name, kind) for name, kind in levels.to_compute("Q5_K_M") if kind == "Q6_K" and "ffn_down" in name}
        shared = (levels.to_compute("Q5_K_M") & levels.to_compute("Q6_K")) - weighed
        assert weighed
        assert shared
        assert computed(done) == len(levels.to_compute("Q5_K_M")) - len(shared)
        levels.is_bare("Q5_K_M", options=("--exclude-weights", "ffn_down"))

    def test_a_donor_that_rotted_is_found_out(self, levels: Levels) -> None:
        """A byte of two tensors, size and time unchanged: only these are computed again."""
        levels.make("Q6_K")
        shared = ("blk.1.attn_v.weight", "blk.1.ffn_down.weight", "output.weight")
        found = entries_of(levels.ledger("Q6_K"))
        flip(levels.file("Q6_K"), found["blk.1.attn_v.weight"].offset, unseen=True)
        flip(levels.file("Q6_K"), found["output.weight"].offset + found["output.weight"].bytes - 1, unseen=True)
        done = levels.make("Q5_K_M")
        alone = {(name, kind) for name, kind in levels.to_compute("Q5_K_M") if name not in shared}
        assert levels.counts("Q5_K_M") == (len(alone) + 2, 1, 0)
        assert computed(done) == len(alone) + 2
        levels.is_bare("Q5_K_M")

    def test_another_donor_may_still_have_it(self, levels: Levels) -> None:
        levels.make(*TWO)
        for level in TWO:
            flip(levels.file(level), entries_of(levels.ledger(level))["blk.1.attn_v.weight"].offset + 7, unseen=True)
        flip(levels.file("Q6_K"), entries_of(levels.ledger("Q6_K"))["output.weight"].offset + 7, unseen=True)
        flip(levels.file("Q4_K_M"), entries_of(levels.ledger("Q4_K_M"))["blk.1.ffn_down.weight"].offset + 7, unseen=True)
        levels.make("Q5_K_M")
        assert levels.counts("Q5_K_M") == (14, 2, 0)
        levels.is_bare("Q5_K_M")

    @pytest.mark.parametrize("what", ["changed", "deleted", "replaced", "without its ledger", "torn ledger"])
    def test_a_donor_that_cannot_be_trusted_gives_nothing(self, what: str, levels: Levels, other_imatrix: Path) -> None:
        levels.make("Q6_K")
        file, log = levels.file("Q6_K"), levels.ledger("Q6_K")
        if what == "changed":
            flip(file, file.stat().st_size - 40, unseen=False)
        elif what == "deleted":
            file.unlink()
        elif what == "replaced":
            other = levels.tools.quantize(levels.model, levels.folder / "other.gguf", "Q6_K", imatrix=other_imatrix)
            other.replace(file)
        elif what == "without its ledger":
            log.unlink()
        else:
            log.write_bytes(log.read_bytes()[:60])
        done = levels.make("Q5_K_M")
        assert computed(done) == len(levels.to_compute("Q5_K_M"))
        assert levels.counts("Q5_K_M")[1] == 0
        levels.is_bare("Q5_K_M")

    def test_a_ledger_that_belongs_to_a_longer_file(self, levels: Levels) -> None:
        """As when the level was made again and the power went before its new ledger was in place of the old."""
        levels.make(*TWO)
        shutil.copy(levels.ledger("Q6_K"), levels.ledger("Q4_K_M"))
        levels.file("Q6_K").unlink()
        levels.make("Q5_K_M")
        levels.is_bare("Q5_K_M")

    def test_another_model_of_the_same_name_gives_nothing(self, levels: Levels, tmp_path: Path) -> None:
        levels.make("Q6_K")
        (tmp_path / "new").mkdir()
        model = write_llama_gguf(tmp_path / "new" / levels.model.name, seed=5)
        other = replace(levels, model=model)
        assert computed(other.make("Q5_K_M", options=("--force",))) == len(other.to_compute("Q5_K_M"))
        other.is_bare("Q5_K_M")

    def test_one_by_one_the_later_copy_from_the_earlier(self, levels: Levels) -> None:
        done = levels.make("Q6_K", "Q4_K_M", "Q5_K_M", options=("--one-by-one",))
        figures = [{cost["type"].upper(): cost["pairs"] for cost in entry["types"]} for entry in done.document["passes"]]
        assert figures == [{"Q4_K": 13, "Q6_K": 3}, {"Q5_K": 13}, {"Q6_K": 13}]
        levels.is_bare("Q4_K_M", "Q5_K_M", "Q6_K")


@pytest.fixture(scope="module")
def engine(toolchain: Toolchain) -> EmbeddedEngine:
    bindings = find({"LLAMA_CPP_LIB_PATH": str(toolchain.directory)}, cache_dir())
    return EmbeddedEngine(bindings, Runner())


class TestReadAgain:
    """``--verify full``."""

    def test_every_row_and_every_byte_is_looked_at(self, levels: Levels, engine: EmbeddedEngine, tmp_path: Path) -> None:
        """With a ledger any byte, without one a number that is none: in Q4_K the first two bytes of a block are its scale."""
        levels.make("Q4_K_M")
        file, log = levels.file("Q4_K_M"), levels.ledger("Q4_K_M")

        def check(path: Path, *, with_ledger: bool) -> tuple[str, str]:
            return engine.check(CheckJob("level", (path,), log if with_ledger else None, 2, None), ignore)

        assert check(file, with_ledger=True) == check(file, with_ledger=False) == ("", "")
        entries = entries_of(log)
        names = ("token_embd.weight", "blk.0.attn_norm.weight", "output.weight")
        for name in names:
            for place in (entries[name].offset, entries[name].offset + entries[name].bytes - 1):
                bad = Path(shutil.copy(file, tmp_path / "bad.gguf"))
                flip(bad, place, unseen=False)
                assert check(bad, with_ledger=True)[0] == name
        last_block = entries["blk.0.attn_q.weight"].offset + entries["blk.0.attn_q.weight"].bytes - 144
        bad = Path(shutil.copy(file, tmp_path / "bad.gguf"))
        with bad.open("r+b") as handle:
            handle.seek(last_block)
            handle.write(np.array([np.nan], "<f2").tobytes())
        assert check(bad, with_ledger=False) == ("blk.0.attn_q.weight", "it has NaN or infinite numbers")
        assert check(bad, with_ledger=True) == ("blk.0.attn_q.weight", "it has NaN or infinite numbers")

    @pytest.mark.parametrize("engine_name", ["embedded", "binaries"])
    def test_good_levels_pass(self, engine_name: str, levels: Levels) -> None:
        levels.make("Q4_K_M", "Q5_1", options=("--verify", "full", "--engine", engine_name))
        levels.is_bare("Q4_K_M", "Q5_1")
        assert '"type":"checked"' in (levels.workspace / "logs" / "level-Q5_1.log").read_text(encoding="utf-8")

    def test_a_half_file_that_rotted_is_told_and_made_again(self, levels: Levels) -> None:
        levels.make("Q4_K_M")
        entry = entries_of(levels.ledger("Q4_K_M"))["blk.0.ffn_up.weight"]
        levels.interrupt(Q4_K_M=ALL)
        flip(levels.half("Q4_K_M"), entry.offset + 5, unseen=True)
        told = levels.make("Q4_K_M", options=("--verify", "full"), code=100)
        (level,) = told.document["levels"]
        assert level["error"]["what"] == "The Q4_K_M file is damaged"
        assert level["error"]["why"] == "blk.0.ffn_up.weight: its bytes differ from those that were written"
        assert not levels.file("Q4_K_M").exists()
        levels.make("Q4_K_M", options=("--verify", "full"))
        levels.is_bare("Q4_K_M")

    def test_what_llama_quantize_wrote_wrongly_is_told(self, levels: Levels, tmp_path: Path) -> None:
        """A program that writes NaN into the first block of the embeddings, and nothing else is wrong."""
        spoil = """
"$real" "$@" || exit $?
for word in "$@"; do case "$word" in */.partial/*.gguf) out=$word;; esac; done
[ -n "$out" ] && [ -f "$out" ] && printf '\\000\\176' | dd of="$out" bs=1 seek=PLACE conv=notrunc 2>/dev/null
exit 0
"""
        levels.make("Q4_0")
        place = entries_of(levels.ledger("Q4_0"))["token_embd.weight"].offset
        levels.file("Q4_0").unlink()
        fake = fake_tools(levels.tools.toolchain, tmp_path / "fake", llama_quantize=spoil.replace("PLACE", str(place)))
        options = ("--engine", "binaries", "--llama-cpp", str(fake), "--verify", "full")
        told = levels.make("Q4_0", options=options, code=100)
        (level,) = told.document["levels"]
        assert level["error"]["what"] == "The Q4_0 file is damaged"
        assert "token_embd.weight: it has NaN or infinite numbers" in level["error"]["why"]
        assert not levels.file("Q4_0").exists()
        levels.make("Q4_0", options=("--verify", "full"))
        levels.is_bare("Q4_0")


PEAK = """
import resource, subprocess, sys
done = subprocess.run(sys.argv[1:], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * (1 if sys.platform == "darwin" else 1024))
sys.exit(done.returncode)
"""


def write_one_large_tensor(path: Path, *, experts: int, rows: int, columns: int) -> Path:
    """A model of one layer with experts in one tensor; its numbers repeat every 2 MiB."""
    from gguf import GGMLQuantizationType, GGUFWriter

    writer = GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(columns)
    writer.add_block_count(1)
    writer.add_feed_forward_length(columns)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_expert_count(experts)
    writer.add_expert_used_count(2)
    writer.add_file_type(1)
    name = "blk.0.ffn_down_exps.weight"
    shape = (experts, rows, columns)
    writer.add_tensor_info(name, shape, np.dtype(np.float16), 2 * experts * rows * columns, GGMLQuantizationType.F16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    block = np.random.default_rng(0).standard_normal(1 << 20).astype(np.float16).tobytes()
    with path.open("r+b") as handle:
        handle.seek(0, os.SEEK_END)
        handle.write(bytes(-handle.tell() % 32))
        for _ in range(experts * rows * columns >> 20):
            handle.write(block)
    return path


def test_memory_is_bounded_whatever_a_tensor_s_size(tools: BareTools, tmp_path: Path) -> None:
    """A tensor of 512 MiB, and buffers of 32 MiB: no process of ours is larger than these and 300 MB."""
    model = write_one_large_tensor(tmp_path / "large-F16.gguf", experts=64, rows=1024, columns=4096)
    assert model.stat().st_size > 512 << 20
    arguments = ("quantize", model, "--levels", "Q4_0,Q8_0", "--max-buffer-size", "32", "--verify", "full", *EMBEDDED)
    command = (sys.executable, "-c", PEAK, *PROGRAM, *map(str, arguments))
    done = subprocess.run(command, cwd=tmp_path, env=clean_environment(), capture_output=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr.decode()
    peak = int(done.stdout)
    assert peak < (32 << 20) + 300_000_000
    print(f"peak {peak / 1e6:.0f} MB")
    written = levels_in(tmp_path / "work" / "large")
    bare = tools.quantize(model, tmp_path / "bare.gguf", "Q4_0", "--max-buffer-size", "64")
    assert written["Q4_0"] == digest(bare)
