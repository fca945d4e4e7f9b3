"""Imatrices made by us against those llama-imatrix makes in one run over the same text."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import numpy as np
import pytest

from imatrix_runner.imatrix.formats import read
from imatrix_runner.imatrix.matrix import Matrix
from imatrix_runner.resources import CALIBRATION_TEXT, resource
from support.command_line import Ran, RunCommand, run_command, started
from support.llama_tools import BareTools, digest, leftovers
from support.tiny_models import sample_text, write_llama_gguf

CLOSE = 5e-5
"""Relative difference of sums: float32 accumulated in one run against float32 per range, then float64."""

ONE_BY_ONE = ("-c", "128", "-b", "128")
"""One chunk a batch, so that ranges change nothing but the order of summation."""


def matrix(path: Path) -> Matrix:
    return read(path).matrix


def assert_same(ours: Path, theirs: Path, rtol: float = CLOSE) -> None:
    mine, other = matrix(ours), matrix(theirs)
    assert list(mine.entries) == list(other.entries)
    assert (mine.chunk_size, mine.chunk_count) == (other.chunk_size, other.chunk_count)
    for name, entry in other.entries.items():
        assert np.array_equal(mine.entries[name].counts, entry.counts), name
        np.testing.assert_allclose(mine.entries[name].sums, entry.sums, rtol=rtol, atol=1e-6, err_msg=name)


def generate(folder: Path, model: Path, text: Path, *options: str | Path, out: str = "ours.gguf") -> Ran:
    return run_command("imatrix", "generate", model, "-f", text, "-o", out, "--engine", "binaries", *options, cwd=folder)


@pytest.mark.parametrize("frequency", ["8", "7", "1"])
def test_ranges_add_up_to_one_run(frequency: str, demo_model: Path, tools: BareTools, tmp_path: Path) -> None:
    """Whatever was asked for: ranges are whole batches, because in others flash attention would round otherwise."""
    text = tmp_path / "words.txt"
    text.write_text(sample_text(6000), encoding="utf-8")
    options = ("-c", "64", "-b", "256")  # four chunks a batch
    done = generate(tmp_path, demo_model, text, *options, "--output-frequency", frequency)
    assert done.code == 0, done.err
    tools.imatrix(demo_model, text, tmp_path / "theirs.gguf", *options)
    assert_same(tmp_path / "ours.gguf", tmp_path / "theirs.gguf")
    assert matrix(tmp_path / "ours.gguf").datasets == ("words.txt",)
    assert leftovers(tmp_path / "work" / "demo-model") == []


@pytest.mark.parametrize("chunks", [5, 6, 7])
def test_chunks_that_fill_no_batch_lose_what_llama_imatrix_loses(
    chunks: int, demo_model: Path, tools: BareTools, tmp_path: Path
) -> None:
    """The last of 7 chunks' two batches is computed in pieces of 3 x 170 tokens and a rest of 6, which is not counted."""
    done = run_command("imatrix", "generate", demo_model, "--chunks", str(chunks), "--engine", "binaries", cwd=tmp_path)
    assert done.code == 0, done.err
    tools.imatrix(demo_model, resource(CALIBRATION_TEXT), tmp_path / "theirs.gguf", "--chunks", str(chunks))
    ours = tmp_path / "work" / "demo-model" / "imatrix.gguf"
    assert_same(ours, tmp_path / "theirs.gguf", rtol=0)
    assert matrix(ours).chunk_count == (6 if chunks == 7 else chunks)
    assert f"{chunks} chunks, 28 entries" in done.err


def test_one_range_is_llama_imatrix_to_the_last_bit(
    tiny_model: Path, tiny_text: Path, tools: BareTools, tmp_path: Path
) -> None:
    """The perplexity too, to the 4 decimals it prints; where it loses its last lines, that of the chunks it told of."""
    options = (*ONE_BY_ONE, "--chunks", "12")
    done = generate(tmp_path, tiny_model, tiny_text, *options, "--output-frequency", "50")
    shown = re.search(r"12 chunks, 14 entries, PPL ([\d.]+)(?: over (\d+) chunks)?\)", done.err)
    assert shown is not None, done.err
    chunks = int(shown[2] or 12)
    told: dict[int, str] = {}
    for _ in range(20):  # it may lose the same line, though hardly every time
        if chunks not in told:
            told = tools.imatrix(tiny_model, tiny_text, tmp_path / "theirs.gguf", *options)
    assert_same(tmp_path / "ours.gguf", tmp_path / "theirs.gguf", rtol=0)
    assert told[chunks] == shown[1]


@pytest.mark.parametrize(
    ("options", "theirs"),
    [
        (["--chunk", "3", "--chunks", "7"], None),
        (["--from-chunk", "40"], None),
        (["--no-ppl", "--chunks", "9"], None),
        (["--process-output", "--chunks", "8"], None),
        (["-ub", "64", "--chunks", "6"], None),
        (["-t", "1", "--chunks", "6"], None),
        (["--chunks", "6", "--", "-fa", "off"], ["--chunks", "6", "-fa", "off"]),
        (["--chunks", "6", "-ngl", "0"], None),
        (["--chunks", "6", "-fa", "off", "-ts", "3,1", "-sm", "layer", "-mg", "0", "-ot", "ffn=CPU"], None),
        (["--chunks", "6", "--no-mmap"], ["--chunks", "6", "--load-mode", "none"]),
    ],
    ids=lambda value: " ".join(value) if value else "same",
)
def test_options_mean_what_they_mean_to_llama_imatrix(
    options: list[str], theirs: list[str] | None, tiny_model: Path, tiny_text: Path, tools: BareTools, tmp_path: Path
) -> None:
    common = [*ONE_BY_ONE]
    done = generate(tmp_path, tiny_model, tiny_text, *common, "--output-frequency", "4", *options)
    assert done.code == 0, done.err
    tools.imatrix(tiny_model, tiny_text, tmp_path / "theirs.gguf", *common, *(theirs or options))
    assert_same(tmp_path / "ours.gguf", tmp_path / "theirs.gguf")
    assert ("output.weight" in matrix(tmp_path / "ours.gguf").entries) == ("--process-output" in options)
    assert ("PPL" in done.err) == ("--no-ppl" not in options)


def test_special_tokens_are_parsed_when_asked_for(tiny_model: Path, tools: BareTools, tmp_path: Path) -> None:
    text = tmp_path / "chat.txt"
    text.write_text(sample_text(6000).replace("\n", "</s><s>"), encoding="utf-8")
    counts: list[int] = []
    for options in ([], ["--parse-special"]):
        out = f"ours{len(options)}.gguf"
        assert generate(tmp_path, tiny_model, text, "-c", "128", *options, out=out).code == 0
        tools.imatrix(tiny_model, text, tmp_path / "theirs.gguf", "-c", "128", *options)
        assert_same(tmp_path / out, tmp_path / "theirs.gguf")
        counts.append(matrix(tmp_path / out).chunk_count)
    assert counts[1] < counts[0]  # four characters each became one token


def test_a_mixture_of_experts_counts_per_expert(tiny_text: Path, tools: BareTools, tmp_path: Path) -> None:
    model = write_llama_gguf(tmp_path / "moe-F16.gguf", experts=4, dtype="f16")
    assert generate(tmp_path, model, tiny_text, *ONE_BY_ONE, "--chunks", "10", "--output-frequency", "4").code == 0
    tools.imatrix(model, tiny_text, tmp_path / "theirs.gguf", *ONE_BY_ONE, "--chunks", "10")
    assert_same(tmp_path / "ours.gguf", tmp_path / "theirs.gguf")
    counts = matrix(tmp_path / "ours.gguf").entries["blk.0.ffn_gate_exps.weight"].counts
    assert counts.shape == (4,)
    assert counts.sum() == 2 * 10 * 128  # two experts a token
    assert len(set(counts.tolist())) > 1


def test_an_interrupted_collection_gives_the_same_file(tiny_model: Path, tiny_text: Path, tmp_path: Path) -> None:
    options = ("-c", "128", "-b", "128", "--chunks", "30", "--output-frequency", "5")
    command = ("imatrix", "generate", tiny_model, "-f", tiny_text, *options, "--engine", "binaries")
    with started(*command, cwd=tmp_path) as running:
        parts = tmp_path / "work" / "tiny" / ".imatrix-parts"
        running.wait_for(lambda: (parts / "checkpoint.gguf").exists())
        os.kill(running.pid, signal.SIGINT)
        assert running.finish().code == 130
    kept = read(parts / "checkpoint.gguf", exact=True).matrix.chunk_count
    assert kept in (5, 10, 15, 20, 25)
    again = run_command(*command, cwd=tmp_path)
    assert again.code == 0, again.err
    assert f"30 chunks, 14 entries, {kept} chunks kept, PPL" in again.err
    assert generate(tmp_path, tiny_model, tiny_text, *options, out="undisturbed.gguf").code == 0
    assert digest(tmp_path / "work" / "tiny" / "imatrix.gguf") == digest(tmp_path / "undisturbed.gguf")
    assert not parts.exists()


def test_snapshots_are_whole_files_of_the_first_chunks(
    tiny_model: Path, tiny_text: Path, tools: BareTools, tmp_path: Path
) -> None:
    done = generate(tmp_path, tiny_model, tiny_text, *ONE_BY_ONE, "--chunks", "20", "--save-frequency", "8", "-v")
    assert done.code == 0, done.err
    snapshots = sorted(tmp_path.glob("ours.gguf.at_*"))
    assert [path.name for path in snapshots] == ["ours.gguf.at_16", "ours.gguf.at_8"]
    for path in snapshots:
        chunks = path.name.rpartition("_")[2]
        tools.imatrix(tiny_model, tiny_text, tmp_path / "theirs.gguf", *ONE_BY_ONE, "--chunks", chunks)
        assert_same(path, tmp_path / "theirs.gguf")
        assert f"Saved {path} (imatrix of the first {chunks} chunks" in done.err
    assert generate(tmp_path, tiny_model, tiny_text, *ONE_BY_ONE, "--chunks", "20", out="plain.gguf").code == 0
    assert_same(tmp_path / "ours.gguf", tmp_path / "plain.gguf")


def test_snapshots_lie_between_batches_and_it_is_said_once(demo_model: Path, tiny_text: Path, tmp_path: Path) -> None:
    options = ("-c", "64", "-b", "256", "--chunks", "34", "--save-frequency", "10", "--output-frequency", "6")
    done = generate(tmp_path, demo_model, tiny_text, *options)
    assert done.code == 0, done.err
    assert sorted(path.suffix for path in tmp_path.glob("ours.gguf.at_*")) == [".at_12", ".at_20", ".at_32"]
    said = (
        "4 chunks are computed at once, so the imatrix is saved every 8 chunks and snapshots are left after 12, 20, 32 chunks."
    )
    assert done.err.count(said) == 1


def test_it_stops_when_the_matrix_no_longer_moves(demo_model: Path, tiny_text: Path, tools: BareTools, tmp_path: Path) -> None:
    """The ranges it visited, scattered over the text, are summed; the curve is told and kept."""
    options = ("-c", "64", "-b", "64", "--until-converged", "0.3", "--output-frequency", "5")
    done = generate(tmp_path, demo_model, tiny_text, *options, "--json")
    assert done.code == 0, done.err
    made = done.document["collected"]
    assert made["stopped"] == "converged"
    assert made["chunks"] == matrix(tmp_path / "ours.gguf").chunk_count < done.document["plan"]["imatrix"]["chunks"]
    assert [point["worst"] <= 0.3 for point in made["curve"]][-2:] == [True, True]
    last = made["curve"][-1]
    assert last.keys() == {"chunks", "worst", "tensor", "median"}
    assert f"converged after {made['chunks']} of " in done.err
    assert f"worst {last['worst']:.3f} ({last['tensor']}), median {last['median']:.3f}" in done.err
    sums: dict[str, float] = {}
    for index, chunks in enumerate(made["ranges"].split(",")):
        first, end = map(int, chunks.split("-"))
        piece = tmp_path / f"{index}.gguf"
        tools.imatrix(demo_model, tiny_text, piece, "-c", "64", "-b", "64", "--chunk", str(first), "--chunks", str(end - first))
        for name, entry in matrix(piece).entries.items():
            sums[name] = sums.get(name, 0) + entry.sums
    assert abs(int(made["ranges"].split(",")[1].split("-")[0]) - int(made["ranges"].split("-")[0])) > 5
    for name, entry in matrix(tmp_path / "ours.gguf").entries.items():
        np.testing.assert_allclose(entry.sums, sums[name], rtol=CLOSE)
    again = generate(tmp_path, demo_model, tiny_text, *options, "--json")
    assert again.document["plan"]["imatrix"]["action"] == "up-to-date"
    assert again.document["collected"] == made


def test_it_goes_on_until_every_expert_was_met(tiny_text: Path, tmp_path: Path) -> None:
    model = write_llama_gguf(tmp_path / "moe-F16.gguf", experts=4, dtype="f16")
    options = (*ONE_BY_ONE, "--chunks", "2", "--output-frequency", "2", "--min-expert-tokens")
    met = generate(tmp_path, model, tiny_text, *options, "300", "--json")
    assert met.code == 0, met.err
    assert met.document["collected"]["stopped"] == "covered"
    assert met.document["collected"]["chunks"] > 2
    found = matrix(tmp_path / "ours.gguf")
    counts = [found.counts(name) for name in found.entries if found.counts(name).size > 1]
    assert len(counts) == 6
    assert min(int(values.min()) for values in counts) >= 300
    assert "every expert saw at least 300 tokens" in met.err
    never = generate(tmp_path, model, tiny_text, *options, "1000000", out="all.gguf")
    assert never.code == 0, never.err
    assert re.search(r"before every expert saw 1000000 tokens: blk.0.ffn_\w+_exps: experts 0, 1, 2, 3 of 4 saw", never.err)


def test_text_that_is_too_short_is_refused_with_the_numbers(tiny_model: Path, tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text("One line, no more.\n", encoding="utf-8")
    done = generate(tmp_path, tiny_model, text)
    assert done.code == 6
    assert re.search(r"it has \d+ tokens, 0 chunks of 512; at least 2 must remain", done.err)
    assert not (tmp_path / "ours.gguf").exists()


def test_few_chunks_are_warned_about(tiny_model: Path, tiny_text: Path, tmp_path: Path) -> None:
    done = generate(tmp_path, tiny_model, tiny_text, "-c", "128", "--chunks", "3")
    assert "Warning: The imatrix will see 3 chunks (384 tokens of words.txt); fewer than 100" in done.err
    dry = generate(tmp_path, tiny_model, tiny_text, "-c", "32", "--dry-run")
    assert "fewer than" not in dry.err


def test_a_file_that_is_not_ours_is_never_overwritten(tiny_model: Path, tiny_text: Path, tmp_path: Path) -> None:
    options = ("-c", "128", "--chunks", "3")
    mine = tmp_path / "ours.gguf"
    mine.write_text("precious")
    done = generate(tmp_path, tiny_model, tiny_text, *options)
    assert done.code == 6
    assert f"{mine} is in the way" in done.err
    assert mine.read_text() == "precious"
    mine.unlink()
    assert generate(tmp_path, tiny_model, tiny_text, *options).code == 0
    # A second place does not make a stranger of the first; a changed option replaces what is ours.
    assert generate(tmp_path, tiny_model, tiny_text, *options, out="second.gguf").code == 0
    before = mine.stat().st_mtime_ns
    again = generate(tmp_path, tiny_model, tiny_text, *options)
    assert "made before from the same inputs" in again.err
    assert mine.stat().st_mtime_ns == before
    changed = generate(tmp_path, tiny_model, tiny_text, "-c", "128", "--chunks", "4")
    assert "changed: chunks: 3 from 0 -> 4 from 0" in changed.err
    assert matrix(mine).chunk_count == 4
    mine.write_bytes(mine.read_bytes() + b"edited")
    assert generate(tmp_path, tiny_model, tiny_text, *options).code == 6
    assert mine.read_bytes().endswith(b"edited")


def test_the_shipped_text_is_used_without_f(tiny_model: Path, runner: RunCommand, tmp_path: Path) -> None:
    assert runner("imatrix", "generate", tiny_model, "-c", "128", "--chunks", "3", "--engine", "binaries").code == 0
    assert matrix(tmp_path / "work" / "tiny" / "imatrix.gguf").datasets == ("imatrix_data.txt",)
