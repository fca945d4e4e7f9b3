"""``imatrix merge`` and ``imatrix convert`` beside llama.cpp's own programs, and as commands."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from imatrix_runner.imatrix.formats import read, write
from imatrix_runner.imatrix.matrix import Matrix
from imatrix_runner.models.gguf_file import read_header
from support.in_process import CommandLine
from support.llama_tools import BareTools, digest
from support.tiny_models import sample_text, write_llama_gguf
from support.values import entry, matrix, same_matrix

CONTEXT, CHUNKS = 64, 5
QUERY, EXPERTS = "blk.0.attn_q.weight", "blk.0.ffn_up_exps.weight"


@dataclass(frozen=True)
class Measured:
    """One model's imatrices of three texts, in both formats: (text, suffix) -> file, all written by llama-imatrix."""

    model: Path
    files: Mapping[tuple[str, str], Path]

    def pick(self, wanted: str) -> list[Path]:
        """``a.gguf b.dat`` as files."""
        return [self.files[name[0], name[2:]] for name in wanted.split()]


@pytest.fixture(scope="module", params=["dense", "mixture"])
def measured(request: pytest.FixtureRequest, tools: BareTools, tmp_path_factory: pytest.TempPathFactory) -> Measured:
    folder = tmp_path_factory.mktemp(request.param)
    mixture = {"experts": 4, "ff": 256} if request.param == "mixture" else {}
    model = write_llama_gguf(folder / "m-BF16.gguf", **mixture)  # type: ignore[arg-type]
    files = {}
    for seed, name in enumerate("abc"):
        text = folder / f"{name}.txt"
        text.write_text(sample_text(6000, seed=seed), encoding="utf-8")
        for suffix in ("gguf", "dat"):
            files[name, suffix] = folder / f"{name}.{suffix}"
            options = ("-c", str(CONTEXT), "--chunks", str(CHUNKS + seed), "--no-ppl", "--output-format", suffix)
            tools.imatrix(model, text, files[name, suffix], *options)
    return Measured(model, files)


def agree(ours: Matrix, theirs: Matrix) -> None:
    """Equal up to float32, in which llama-imatrix adds."""
    assert (ours.chunk_size, ours.chunk_count) == (theirs.chunk_size, theirs.chunk_count)
    assert ours.datasets == tuple(dict.fromkeys(theirs.datasets))
    assert list(ours.entries) == list(theirs.entries)
    for name in ours.entries:
        assert ours.counts(name).tolist() == theirs.counts(name).tolist()
        np.testing.assert_allclose(ours.entries[name].sums, theirs.entries[name].sums, rtol=5e-7)


class TestMerge:
    """Sums of files."""

    @pytest.mark.parametrize(
        ("files", "context"),
        [
            ("a.gguf b.gguf", CONTEXT),
            ("a.gguf b.gguf c.gguf", CONTEXT),
            ("a.dat b.dat", 512),
            ("a.gguf b.dat", CONTEXT),
            ("b.dat a.gguf", CONTEXT),
            ("c.dat a.gguf b.dat", CONTEXT),
        ],
    )
    def test_it_is_llama_imatrix_s_own_sum(
        self, measured: Measured, tools: BareTools, cli: CommandLine, tmp_path: Path, files: str, context: int
    ) -> None:
        inputs = measured.pick(files)
        theirs = tools.merge(inputs, tmp_path / "theirs.gguf", "-c", str(context))
        done = cli("imatrix", "merge", *inputs, "-o", "ours.gguf")
        assert done.code == 0, done.err
        agree(read(tmp_path / "ours.gguf").matrix, read(theirs).matrix)

    def test_a_weight_is_the_file_several_times(
        self, measured: Measured, tools: BareTools, cli: CommandLine, tmp_path: Path
    ) -> None:
        a, b = measured.pick("a.gguf b.gguf")
        theirs = tools.merge([a, a, b], tmp_path / "theirs.gguf", "-c", str(CONTEXT))
        assert cli("imatrix", "merge", a, b, "-o", "ours.gguf", "--weight", "2,1").code == 0
        agree(read(tmp_path / "ours.gguf").matrix, read(theirs).matrix)
        assert cli("imatrix", "merge", a, a, b, "-o", "thrice.gguf").code == 0
        assert same_matrix(read(tmp_path / "thrice.gguf").matrix, read(tmp_path / "ours.gguf").matrix)

    def test_llama_imatrix_reads_the_result(
        self, measured: Measured, tools: BareTools, cli: CommandLine, tmp_path: Path
    ) -> None:
        assert cli("imatrix", "merge", *measured.pick("a.gguf b.dat"), "-o", "ours.gguf").code == 0
        again = tools.merge([tmp_path / "ours.gguf"], tmp_path / "again.gguf", "-c", str(CONTEXT))
        assert same_matrix(read(again).matrix, read(tmp_path / "ours.gguf").matrix)

    def test_what_it_says(self, measured: Measured, cli: CommandLine, tmp_path: Path) -> None:
        a, old = measured.pick("a.gguf a.dat")
        done = cli("imatrix", "merge", a, old, "-o", "both.gguf")
        assert done.out.startswith("Wrote both.gguf: GGUF, ")
        assert "10 chunks of 64 tokens, a.txt" in done.out
        assert done.err.splitlines() == [
            "Note: a.dat (legacy) counted in chunks of 64 tokens, as in the others.",
            f"Note: the same dataset counts more than once: {a.with_suffix('.txt')}.",
        ]
        document = cli("imatrix", "merge", a, old, "-o", "json.dat", "--json").document
        assert (document["schema"], document["version"], document["exit_code"]) == ("imatrix-runner/imatrix-file", 1, 0)
        assert (document["imatrix"]["format"], document["imatrix"]["chunks"]) == ("dat", 10)
        assert len(document["remarks"]) == 2
        quiet = cli("imatrix", "merge", a, old, "-o", "quiet.gguf", "-q")
        assert (quiet.code, quiet.out, quiet.err) == (0, "", "")

    def test_files_of_yours_are_not_overwritten(self, measured: Measured, cli: CommandLine, tmp_path: Path) -> None:
        a, b = (Path(shutil.copy(file, tmp_path)) for file in measured.pick("a.gguf b.gguf"))
        (tmp_path / "out.gguf").write_text("notes")
        before = digest(a)
        done = cli("imatrix", "merge", a, b, "-o", "out.gguf")
        assert done.code == 6
        assert "overwrite it with --force" in done.err
        assert (tmp_path / "out.gguf").read_text() == "notes"
        assert cli("imatrix", "merge", a, b, "-o", "out.gguf", "--force").code == 0
        assert read(tmp_path / "out.gguf").format == "gguf"
        (tmp_path / "alias.gguf").symlink_to(a)
        for out in ("a.gguf", "alias.gguf"):
            done = cli("imatrix", "merge", a, b, "-o", out, "--force")
            assert done.code == 6
            assert "it is one of the inputs" in done.err
        assert digest(a) == before
        assert sorted(path.name for path in tmp_path.iterdir()) == ["a.gguf", "alias.gguf", "b.gguf", "out.gguf"]

    @pytest.mark.parametrize("weight", ["2", "2,0", "a,b", "", "1,-1", "0.123456,1"])
    def test_impossible_weights_are_usage_errors(
        self, measured: Measured, cli: CommandLine, tmp_path: Path, weight: str
    ) -> None:
        done = cli("imatrix", "merge", *measured.pick("a.gguf b.gguf"), "-o", "out.gguf", "--weight", weight)
        assert done.code == 2
        assert "--weight" in done.err
        assert list(tmp_path.iterdir()) == []

    def test_another_model_is_refused(self, measured: Measured, cli: CommandLine, tmp_path: Path) -> None:
        write(matrix({QUERY: entry([1, 2], 64)}), tmp_path / "other.gguf", "gguf")
        done = cli("imatrix", "merge", *measured.pick("a.gguf"), "other.gguf", "-o", "out.gguf", "--json")
        assert done.code == 6
        assert done.document["error"]["why"] == f"{QUERY} has 256 values in one and 2 in the other"
        assert not (tmp_path / "out.gguf").exists()


class TestConvert:
    """One format to the other."""

    def test_our_legacy_file_is_llama_imatrix_s_to_the_byte(self, measured: Measured, cli: CommandLine, tmp_path: Path) -> None:
        """Its own ``--output-format dat`` of the same text, a run of its own."""
        for name in "ab":
            done = cli("imatrix", "convert", measured.files[name, "gguf"], "-o", f"{name}.dat")
            assert done.code == 0, done.err
            assert (tmp_path / f"{name}.dat").read_bytes() == measured.files[name, "dat"].read_bytes()

    def test_unseen_experts_are_written_as_llama_imatrix_writes_them(
        self, tools: BareTools, cli: CommandLine, tmp_path: Path
    ) -> None:
        value = {
            EXPERTS: entry([[3, 5], [0, 0], [7, 1]], [100, 0, 17]),
            "blk.0.ffn_gate_exps.weight": entry([[0, 0]], [0]),
            QUERY: entry([1, 10], 117),
        }
        write(matrix(value, chunk_count=1, datasets=("a.txt", "b.txt")), tmp_path / "i.gguf", "gguf")
        theirs = tools.merge([tmp_path / "i.gguf"], tmp_path / "theirs.dat", "-c", "64", "--output-format", "dat")
        done = cli("imatrix", "convert", "i.gguf", "-o", "ours.dat")
        assert (tmp_path / "ours.dat").read_bytes() == theirs.read_bytes()
        assert done.err.splitlines() == [
            "Note: counts per expert of 1 tensors are lost: a legacy file holds one.",
            "Note: 1 experts without data in 1 tensors become 1, an equal weight for all columns.",
            "Note: 1 entries without any data are left out, the first is blk.0.ffn_gate_exps.weight.",
            "Note: of 2 dataset names only the last is kept.",
        ]

    def test_our_gguf_of_a_legacy_file_is_llama_imatrix_s(
        self, measured: Measured, tools: BareTools, cli: CommandLine, tmp_path: Path
    ) -> None:
        (old,) = measured.pick("a.dat")
        theirs = tools.merge([old], tmp_path / "theirs.gguf", "-c", str(CONTEXT))
        assert cli("imatrix", "convert", old, "-o", "ours.gguf", "--chunk-size", str(CONTEXT)).code == 0
        assert same_matrix(read(tmp_path / "ours.gguf").matrix, read(theirs).matrix)

    def test_there_and_back(self, measured: Measured, cli: CommandLine, tmp_path: Path) -> None:
        """dat -> gguf -> dat keeps the means to one unit of float32; gguf -> dat -> gguf those of the dense tensors too."""
        gguf, dat = measured.pick("a.gguf a.dat")
        for number, (source, there, back) in enumerate(((dat, "gguf", "dat"), (gguf, "dat", "gguf"))):
            middle = f"{number}.{there}"
            assert cli("imatrix", "convert", source, "-o", middle, "--chunk-size", str(CONTEXT)).code == 0
            assert cli("imatrix", "convert", middle, "-o", f"{number}b.{back}", "--chunk-size", str(CONTEXT)).code == 0
            before, after = read(source).matrix, read(tmp_path / f"{number}b.{back}").matrix
            assert (before.chunk_size, before.chunk_count) == (after.chunk_size, after.chunk_count)
            assert before.datasets == after.datasets
            assert list(before.entries) == list(after.entries)
            for name in (name for name in before.entries if "exps" not in name or back == "dat"):
                one, other = before.entries[name], after.entries[name]
                np.testing.assert_allclose(one.sums / one.counts[0], other.sums / other.counts[0], rtol=5e-7)

    @pytest.mark.parametrize(("chunks", "same"), [(4, True), (5, False)])
    def test_llama_quantize_gives_the_same_bytes_from_our_legacy_file(
        self, tiny_model: Path, tiny_text: Path, tools: BareTools, cli: CommandLine, tmp_path: Path, chunks: int, same: bool
    ) -> None:
        """A legacy value is ``sum / count * chunks`` in float32, and llama-quantize divides by ``chunks``: with a power of two
        that is exact and so are the levels; else the last bit of a weight may differ, and few bytes with it."""
        gguf, dat = tmp_path / "gguf" / "imatrix", tmp_path / "dat" / "imatrix"
        tools.imatrix(tiny_model, tiny_text, gguf, "-c", "64", "--chunks", str(chunks), "--no-ppl", "--output-format", "gguf")
        assert cli("imatrix", "convert", gguf, "-o", dat, "--format", "dat").code == 0
        assert (read(gguf).format, read(dat).format) == ("gguf", "dat")
        for level in ("Q4_K_S", "Q3_K_M", "Q2_K_S"):
            outs = [
                tools.quantize(tiny_model, tmp_path / f"{source.parent.name}-{level}.gguf", level, imatrix=source)
                for source in (gguf, dat)
            ]
            one, other = (np.frombuffer(out.read_bytes(), np.uint8) for out in outs)
            assert len(one) == len(other)
            differing = int((one != other).sum())
            assert differing == 0 if same else differing < 0.01 * len(one)

    def test_dense_weights_of_three_dimensions(self, tools: BareTools, cli: CommandLine, tmp_path: Path) -> None:
        """MLA's attn_k_b: all heads' columns in one row, one count; merged, converted and used."""
        name = "blk.0.attn_k_b.weight"
        model = write_llama_gguf(tmp_path / "mla-BF16.gguf", layers=1, extra={name: (4, 32, 256)})
        shape = next(tensor.shape for tensor in read_header(model).tensors if tensor.name == name)
        assert shape == (256, 32, 4)
        columns = np.random.default_rng(0).random(4 * 256)
        write(matrix({name: entry(columns.tolist(), 128)}), tmp_path / "one.gguf", "gguf")
        assert cli("imatrix", "merge", "one.gguf", "one.gguf", "-o", "two.gguf").code == 0
        assert cli("imatrix", "convert", "two.gguf", "-o", "two.dat").code == 0
        theirs = tools.merge([tmp_path / "one.gguf"] * 2, tmp_path / "theirs.gguf", "-c", "64")
        assert same_matrix(
            read(tmp_path / "two.gguf").matrix, Matrix(**{**vars(read(theirs).matrix), "datasets": ("text.txt",)})
        )
        assert read(tmp_path / "two.dat").matrix.shape(name) == (1, 1024)
        outs = []
        for source in ("one.gguf", "two.gguf", "two.dat"):
            folder = tmp_path / source.replace(".", "-")
            folder.mkdir()
            shutil.copy(tmp_path / source, folder / "imatrix")
            code, said = tools.try_quantize(model, folder / "o.gguf", "Q4_K_S", imatrix=folder / "imatrix")
            assert code == 0, said
            assert f"did not find weights for {name}" not in said
            header = read_header(folder / "o.gguf")
            tensor = next(tensor for tensor in header.tensors if tensor.name == name)
            at = header.data_offset + tensor.offset
            outs.append((folder / "o.gguf").read_bytes()[at : at + (tensor.n_bytes or 0)])
        assert outs[0] == outs[1] == outs[2]

    def test_a_chunk_size_is_assumed_only_where_none_is_told(
        self, measured: Measured, cli: CommandLine, tmp_path: Path
    ) -> None:
        gguf, dat = measured.pick("a.gguf a.dat")
        done = cli("imatrix", "convert", dat, "-o", "a.gguf")
        assert "512 assumed (--chunk-size says another)" in done.err
        assert read(tmp_path / "a.gguf").matrix.chunk_size == 512
        done = cli("imatrix", "convert", gguf, "-o", "b.dat", "--chunk-size", "512")
        assert "the file states its chunk size, 64; --chunk-size 512 is not used" in done.err
        assert cli("imatrix", "convert", gguf, "-o", "c.gguf", "--chunk-size", "0").code == 2

    def test_the_format_follows_the_name_or_the_option_never_the_input_s_name(
        self, measured: Measured, cli: CommandLine, tmp_path: Path
    ) -> None:
        shutil.copy(measured.files["a", "gguf"], tmp_path / "misnamed.dat")
        cli("imatrix", "convert", "misnamed.dat", "-o", "x.imatrix", "--format", "dat")
        cli("imatrix", "convert", "misnamed.dat", "-o", "y.imatrix")
        assert [read(tmp_path / f"{name}.imatrix").format for name in "xy"] == ["dat", "gguf"]

    def test_a_model_is_no_imatrix(self, measured: Measured, cli: CommandLine, tmp_path: Path) -> None:
        done = cli("imatrix", "convert", measured.model, "-o", "out.dat")
        assert done.code == 6
        assert "a GGUF of model weights (llama)" in done.err
        assert list(tmp_path.iterdir()) == []
