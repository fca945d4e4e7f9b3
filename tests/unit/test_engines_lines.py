"""The parsers against what the real programs print, cut into pieces at any place: a pipe promises nothing better."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imatrix_runner.engines.jobs import ChunkRange, CollectJob, CollectOptions, Fallback, QuantizeJob, QuantizeOptions
from imatrix_runner.engines.llama_cpp.flags import imatrix_command, quantize_command, tokenize_command
from imatrix_runner.engines.llama_cpp.output import ImatrixOutput, Lines, QuantizeOutput, parse_token_ids
from imatrix_runner.imatrix.formats import read, write_gguf
from imatrix_runner.models.gguf_file import read_header
from imatrix_runner.process import Command, Runner, capture
from imatrix_runner.resources import CALIBRATION_TEXT, resource
from imatrix_runner.toolchain.probe import Toolchain
from support.tiny_models import write_llama_gguf

CHUNKS = 6
WEIGHTLESS = "blk.0.attn_k.weight"
Parser = ImatrixOutput | QuantizeOutput
T = TypeVar("T", ImatrixOutput, QuantizeOutput)


@dataclass(frozen=True)
class Said:
    """All that one run of a real program printed."""

    stdout: str
    stderr: str


TRIES = 60


class Recorder:
    """Runs real programs once and keeps what they said."""

    def __init__(self, tools: Toolchain, folder: Path, model: Path, imatrix: Path) -> None:
        self._tools = tools
        whole = read(imatrix).matrix
        lacking = folder / "lacking.gguf"
        write_gguf(
            replace(whole, entries={name: entry for name, entry in whole.entries.items() if name != WEIGHTLESS}), lacking
        )
        self.odd = write_llama_gguf(folder / "odd.gguf", odd=True)
        collect = CollectOptions(n_ctx=64, n_batch=128)
        self._commands: dict[str, Command] = {
            "collect": self._collect(model, folder, collect),
            "collect quietly": self._collect(model, folder, replace(collect, ppl=False)),
            "quantize": self._quantize(model, folder, "Q4_K_M", imatrix),
            "quantize without weights": self._quantize(model, folder, "Q4_K_M", lacking),
            "quantize odd": self._quantize(self.odd, folder, "Q4_K_M", None),
            "plan": self._quantize(model, folder, "Q4_K_M", imatrix, dry_run=True),
            "plan odd": self._quantize(self.odd, folder, "Q3_K_M", None, dry_run=True),
            "plan without": self._quantize(model, folder, "IQ2_XS", None, dry_run=True),
            "plan copy": self._quantize(model, folder, "COPY", None, dry_run=True),
        }
        self._said: dict[str, Said] = {}

    def _collect(self, model: Path, folder: Path, options: CollectOptions) -> Command:
        chunks = ChunkRange(0, CHUNKS)
        job = CollectJob("", model, resource(CALIBRATION_TEXT), (chunks,), folder, options, "", None)
        return imatrix_command(job, chunks, folder / "i.gguf", self._tools)

    def _quantize(self, model: Path, folder: Path, ftype: str, imatrix: Path | None, *, dry_run: bool = False) -> Command:
        job = QuantizeJob("", model, folder / "q.gguf", ftype, QuantizeOptions(), imatrix, 1, None)
        return quantize_command(job, self._tools, dry_run=dry_run)

    def __getitem__(self, name: str) -> Said:
        if name not in self._said:
            self._said[name] = self._complete(name)
        return self._said[name]

    def _complete(self, name: str) -> Said:
        """All a program says: llama-imatrix now and then loses its last lines, then it is asked again."""
        for _ in range(TRIES):
            pieces: dict[str, list[str]] = {"stdout": [], "stderr": []}
            outcome = Runner().run(self._commands[name], on_text=lambda stream, text: pieces[stream].append(text))  # noqa: B023
            assert outcome.ok, outcome.tail
            said = Said("".join(pieces["stdout"]), "".join(pieces["stderr"]))
            if name != "collect" or "Final estimate" in said.stdout:
                return said
        pytest.fail(f"llama-imatrix lost its last lines {TRIES} times")


@pytest.fixture(scope="session")
def said(toolchain: Toolchain, demo_model: Path, demo_imatrix: Path, tmp_path_factory: pytest.TempPathFactory) -> Recorder:
    return Recorder(toolchain, tmp_path_factory.mktemp("said"), demo_model, demo_imatrix)


def told_whole(parser: T, said: Said) -> T:
    parser.feed("stderr", said.stderr)
    parser.feed("stdout", said.stdout)
    return parser


def known(parser: Parser) -> tuple[object, ...]:
    """What a parser has learnt, without what it keeps for the next piece."""
    if isinstance(parser, ImatrixOutput):
        return parser.done, parser.ppl, parser.loaded, parser.n_chunks
    progress = (parser.elements, parser.index, parser.total, parser.tensor)
    return (*progress, parser.as_dry_run(), parser.without_weights)


def cut(text: str, places: list[float]) -> Iterator[str]:
    """``text`` in pieces; ``places`` are fractions of its length."""
    ends = [*sorted(int(place * len(text)) for place in places), len(text)]
    begin = 0
    for end in ends:
        yield text[begin:end]
        begin = end


PLACES = st.lists(st.floats(0, 1), max_size=40)
PARSERS: dict[str, Callable[[], Parser]] = {
    "collect": ImatrixOutput,
    "collect quietly": ImatrixOutput,
    "quantize": QuantizeOutput,
    "quantize without weights": QuantizeOutput,
    "quantize odd": QuantizeOutput,
    "plan": QuantizeOutput,
    "plan odd": QuantizeOutput,
}


@pytest.mark.parametrize("name", PARSERS)
@given(out=PLACES, err=PLACES)
def test_pieces_tell_the_same_as_the_whole(name: str, said: Recorder, out: list[float], err: list[float]) -> None:
    whole = told_whole(PARSERS[name](), said[name])
    parser = PARSERS[name]()
    changes = 0
    for stream, text, places in (("stderr", said[name].stderr, err), ("stdout", said[name].stdout, out)):
        for piece in cut(text, places):
            before = known(parser)
            if parser.feed(stream, piece):
                changes += 1
            elif isinstance(parser, ImatrixOutput):
                assert known(parser)[:3] == before[:3]
    assert known(parser) == known(whole)
    assert changes > 0


@pytest.mark.parametrize("name", ["collect", "collect quietly", "quantize"])
def test_single_characters_tell_the_same_too_and_progress_never_goes_back(name: str, said: Recorder) -> None:
    whole = told_whole(PARSERS[name](), said[name])
    parser = PARSERS[name]()
    progress: list[float] = []
    for stream, text in (("stderr", said[name].stderr), ("stdout", said[name].stdout)):
        for character in text:
            if parser.feed(stream, character):
                progress.append(parser.done if isinstance(parser, ImatrixOutput) else parser.elements)
    assert known(parser) == known(whole)
    assert progress == sorted(progress)


def test_collecting_tells_load_chunks_and_perplexity(said: Recorder) -> None:
    output = told_whole(ImatrixOutput(), said["collect"])
    assert output.loaded
    assert (output.done, output.n_chunks) == (CHUNKS, CHUNKS)
    assert output.ppl is not None
    assert f"[{CHUNKS}]{output.ppl:.4f}," in said["collect"].stdout
    assert 1 < output.ppl < 1000


def test_collecting_without_perplexity_still_tells_its_progress(said: Recorder) -> None:
    output = told_whole(ImatrixOutput(), said["collect quietly"])
    assert output.ppl is None
    assert output.n_chunks == CHUNKS
    assert 0 < output.done <= CHUNKS


@pytest.mark.parametrize(
    ("text", "ppl"), [("[1]nan,", "nan"), ("[2]-nan,", "nan"), ("[3]inf,", "inf"), ("[4]1.5e+02,", "150.0")]
)
def test_odd_perplexities_are_numbers_too(text: str, ppl: str) -> None:
    output = ImatrixOutput()
    assert output.feed("stdout", text)
    assert str(output.ppl) == ppl


def test_a_real_run_and_its_plan_agree_on_every_type(said: Recorder, demo_model: Path) -> None:
    planned = told_whole(QuantizeOutput(), said["plan"])
    written = told_whole(QuantizeOutput(), said["quantize"])
    assert planned.types == written.types
    assert set(planned.types) == {tensor.name for tensor in read_header(demo_model).tensors}
    assert planned.types["output.weight"] == "q6_K"
    assert planned.types["output_norm.weight"] == "f32"


def test_a_real_run_counts_every_weight(said: Recorder, demo_model: Path) -> None:
    tensors = read_header(demo_model).tensors
    output = told_whole(QuantizeOutput(), said["quantize"])
    assert output.elements == sum(tensor.n_elements for tensor in tensors)
    assert output.index == output.total == len(tensors)


def test_tensors_without_weights_are_told_and_keep_their_type(said: Recorder) -> None:
    output = told_whole(QuantizeOutput(), said["quantize without weights"])
    assert WEIGHTLESS in output.without_weights
    assert output.types == told_whole(QuantizeOutput(), said["quantize"]).types


def test_fallbacks_are_told_with_the_type_wanted_and_taken(said: Recorder) -> None:
    """Only the down projections of the odd model have rows that do not divide into blocks of 256."""
    output = told_whole(QuantizeOutput(), said["plan odd"])
    taken = {"q3_K": "q4_0", "q4_K": "q5_0", "q5_K": "q5_1", "q6_K": "q8_0"}
    assert [fallback.tensor for fallback in output.fallbacks] == ["blk.0.ffn_down.weight", "blk.1.ffn_down.weight"]
    for fallback in output.fallbacks:
        assert fallback == Fallback(fallback.tensor, fallback.wanted, taken[fallback.wanted])
        assert output.types[fallback.tensor] == fallback.got


def test_a_plan_tells_that_an_imatrix_is_missing(said: Recorder) -> None:
    assert told_whole(QuantizeOutput(), said["plan without"]).as_dry_run().needs_imatrix
    assert not told_whole(QuantizeOutput(), said["plan"]).as_dry_run().needs_imatrix


def test_a_copy_changes_no_type(said: Recorder, demo_model: Path) -> None:
    types = told_whole(QuantizeOutput(), said["plan copy"]).types
    assert {name: kind.upper() for name, kind in types.items()} == {
        tensor.name: tensor.type_name for tensor in read_header(demo_model).tensors
    }


def test_quantising_says_nothing_of_interest_on_stdout(said: Recorder) -> None:
    output = QuantizeOutput()
    assert not output.feed("stdout", said["plan"].stderr)
    assert known(output) == known(QuantizeOutput())


@given(st.lists(st.text(alphabet="ab\r\n"), max_size=20))
def test_lines_come_out_whole_however_they_came_in(pieces: list[str]) -> None:
    lines = Lines()
    got = [line for piece in pieces for line in lines.feed(piece)]
    text = "".join(pieces)
    assert got == [line.rstrip("\r") for line in text.split("\n")[:-1]]
    assert lines.partial == text.split("\n")[-1]


def test_the_ids_of_a_real_tokenizer_are_counted(toolchain: Toolchain, demo_model: Path, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("import os\n" * 5)
    command = tokenize_command(demo_model, tmp_path / "t.txt", toolchain, parse_special=False)
    told = capture(command, seconds=60)
    assert parse_token_ids(told.stdout) == told.stdout.count(",") + 1 > 5


@pytest.mark.parametrize(("text", "count"), [("[1, 15043]\n", 2), ("[]", 0), ("noise [7] noise", 1), ("[\n1,\n2\n]", 2)])
def test_token_ids(text: str, count: int) -> None:
    assert parse_token_ids(text) == count


@pytest.mark.parametrize("text", ["", "no list", "] [", "[1, 2"])
def test_output_without_token_ids_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="no list of token ids"):
        parse_token_ids(text)


def test_a_release_of_2024_names_its_context_and_counts_chunks_one_by_one() -> None:
    output = ImatrixOutput()
    output.feed("stderr", "llama_new_context_with_model: n_ctx      = 256\nllama_new_context_with_model: n_batch    = 128\n")
    output.feed("stderr", "compute_imatrix: computing over 8 chunks with batch_size 128\n")
    assert (output.n_chunks, output.chunk_size) == (8, 256)
    output.feed("stdout", "collect_imatrix[3]:              blk.0.attn_q.weight, MUL_MAT,   256 x   128, 0\n")
    assert output.done == 3


def test_several_chunks_at_once_have_a_context_of_their_own() -> None:
    output = ImatrixOutput()
    output.feed("stderr", "llama_context: n_ctx         = 2048\n")
    output.feed("stderr", "compute_imatrix: computing over 8 chunks, n_ctx=512, batch_size=2048, n_seq=4\n")
    assert (output.n_chunks, output.chunk_size) == (8, None)


def test_a_fallback_told_without_the_tensors_name_is_the_current_tensors() -> None:
    output = QuantizeOutput()
    said = (
        "[   4/  21]                  blk.0.attn_q.weight - [  288,   256,     1,     1], type =   bf16, \n\n"
        "llama_tensor_get_type : tensor cols 288 x 256 are not divisible by 256, required for q4_K"
        " - using fallback quantization q5_0\nconverting to q5_0 .. size =     0.14 MiB ->     0.05 MiB\n"
        "[   5/  21]               blk.0.attn_norm.weight - [  288,     1,     1,     1], type =    f32, size =    0.001 MB\n"
    )
    output.feed("stderr", said)
    planned = output.as_dry_run()
    assert planned.fallbacks == (Fallback("blk.0.attn_q.weight", "q4_K", "q5_0"),)
    assert planned.types == {"blk.0.attn_q.weight": "q5_0", "blk.0.attn_norm.weight": "f32"}
    assert output.elements == 288 * 256 + 288
