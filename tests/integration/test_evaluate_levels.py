"""``evaluate``: the engine's own figures, each computed once, whatever came between."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from imatrix_runner.app.evaluate import EvaluateResult, evaluate
from imatrix_runner.context.context import Context
from imatrix_runner.context.requests import EnvironmentRequest, EvaluateRequest, LevelsRequest, MeasureRequest, SourceRequest
from imatrix_runner.documents.corpus import open_corpus
from imatrix_runner.engines.embedded.bindings import find
from imatrix_runner.engines.embedded.engine import EmbeddedEngine
from imatrix_runner.engines.files.token_scores import read_token_scores
from imatrix_runner.engines.jobs import ChunkRange
from imatrix_runner.engines.measures import Divergence, Estimate, MeasureJob, ReferenceJob
from imatrix_runner.evaluate.disk_budget import Extent
from imatrix_runner.evaluate.kld_statistics import summarise
from imatrix_runner.events import ignore
from imatrix_runner.imatrix.obtain import calibration_facts
from imatrix_runner.mixes.mix_recipe import METADATA_KEY
from imatrix_runner.models.gguf_file import read_header
from imatrix_runner.process import Runner
from imatrix_runner.report.document import read_report
from imatrix_runner.toolchain.store import cache_dir
from support.command_line import Ran, run_command
from support.evaluations import (
    CHUNKS,
    COMPUTE,
    CONTEXT,
    LEVELS,
    OPTIONS,
    Place,
    Watch,
    break_norm,
    held_out_text,
    make_levels,
    ran_since,
)
from support.in_process import CommandLine
from support.llama_tools import BareTools, digest, fake_tools, levels_in
from support.perplexity_tools import PATIENT, perplexity_that
from support.tiny_models import write_llama_gguf

EACH = {"reference": 1, **dict.fromkeys(LEVELS, 1)}
SCORED = {f"{name}.scored" for name in (*LEVELS, "source")}


@pytest.fixture(scope="module")
def engine() -> EmbeddedEngine:
    return EmbeddedEngine(find(os.environ, cache_dir()), Runner())


@pytest.fixture(scope="module")
def made(tiny_model: Path, tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """Levels that nobody measured."""
    return make_levels(tmp_path_factory.mktemp("made"), tiny_model, tiny_text)


@pytest.fixture(scope="module")
def measured(made: Place, tmp_path_factory: pytest.TempPathFactory) -> tuple[Place, Ran]:
    """The same, measured on eight chunks; and what was told of it."""
    place = made.copy(tmp_path_factory.mktemp("measured") / "work")
    done = place.evaluate(lambda *words: run_command(*words, cwd=place.work), "--json")
    assert done.code == 0, done.err
    return place, done


def request_of(place: Place, **changes: object) -> EvaluateRequest:
    measure = MeasureRequest(text=place.text, options=OPTIONS, chunks=CHUNKS)
    measure = replace(measure, **changes)  # type: ignore[arg-type]
    return EvaluateRequest(SourceRequest(str(place.model)), EnvironmentRequest(place.work), measure, LevelsRequest(threads=1))


def watched(place: Place, **changes: object) -> tuple[EvaluateResult, Watch]:
    watch = Watch(place.workspace, ignore)
    return evaluate(request_of(place, **changes), Context(watch)), watch


@pytest.fixture(scope="module")
def paired(measured: tuple[Place, Ran], tmp_path_factory: pytest.TempPathFactory) -> tuple[Place, EvaluateResult, Watch]:
    """And compared with their baselines, watched."""
    place = measured[0].copy(tmp_path_factory.mktemp("paired") / "work")
    return place, *watched(place, baselines=True)


@pytest.fixture
def bare(made: Place, tmp_path: Path) -> Place:
    return made.copy(tmp_path / "work")


@pytest.fixture
def known(measured: tuple[Place, Ran], tmp_path: Path) -> Place:
    return measured[0].copy(tmp_path / "work")


@pytest.fixture
def compared(paired: tuple[Place, EvaluateResult, Watch], tmp_path: Path) -> Place:
    return paired[0].copy(tmp_path / "work")


@pytest.fixture(scope="module")
def base(engine: EmbeddedEngine, made: Place, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source's log-probabilities of the eight chunks, by the engine alone."""
    out = tmp_path_factory.mktemp("base") / "tiny.logits"
    engine.make_reference(
        ReferenceJob("refer", made.model, made.text, ChunkRange(0, CHUNKS), out, OPTIONS, "base", None), ignore
    )
    return out


def measured_directly(engine: EmbeddedEngine, model: Path, base: Path, out: Path) -> Divergence:
    """The engine's own figures of a file."""
    engine.measure_level(MeasureJob("judge", model, base, out, OPTIONS, "level", None), ignore)
    return summarise(read_token_scores(out, "level", CONTEXT).reshape(-1))


def test_the_figures_are_the_engine_s(measured: tuple[Place, Ran], engine: EmbeddedEngine, base: Path, tmp_path: Path) -> None:
    place, told = measured
    found = place.divergences()
    assert found.keys() == set(LEVELS)
    for name in LEVELS:
        assert found[name] == measured_directly(engine, place.workspace.level_file(name), base, tmp_path / name)
    assert told.document["measured"]["levels"]["Q4_K_M"]["kld"]["value"] == found["Q4_K_M"].kld.value
    assert found["Q8_0"].kld.value < found["Q4_K_M"].kld.value < found["IQ2_XS"].kld.value


def test_the_perplexity_ratio_is_to_what_the_source_itself_computes(
    measured: tuple[Place, Ran], engine: EmbeddedEngine, base: Path, tmp_path: Path
) -> None:
    """The reference's file holds no log-probability more than 16 below the greatest; the ratio is not to know of that."""
    place, _ = measured
    source, exact = tmp_path / "again.logits", tmp_path / "source"
    job = ReferenceJob(
        "refer", place.model, place.text, ChunkRange(0, CHUNKS), source, OPTIONS, "base", None, (exact, "itself")
    )
    engine.make_reference(job, ignore)
    truth = read_token_scores(exact, "itself", CONTEXT)["nll"].astype(np.float64)
    for name, figures in place.figures().items():
        measured_directly(engine, place.workspace.level_file(name), base, tmp_path / name)
        mine = read_token_scores(tmp_path / name, "level", CONTEXT)["nll"].astype(np.float64)
        assert figures.evaluation.ppl.value == pytest.approx(np.exp(truth.mean()), rel=1e-12)
        assert figures.ppl_ratio.value == pytest.approx(np.exp(mine.mean() - truth.mean()), rel=1e-9)
        assert figures.evaluation.n_tokens == CHUNKS * 31 == mine.size


def test_only_scored_tokens_stay(measured: tuple[Place, Ran]) -> None:
    assert measured[0].files() == SCORED
    assert not measured[0].workspace.baselines.exists()


def test_the_same_command_again_computes_nothing(known: Place, cli: CommandLine) -> None:
    """In a copied workspace, whose files the file system knows as others."""
    before, facts = known.runs(), known.facts()
    assert {name: count for name, count in before.items() if name in EACH} == EACH
    again = known.evaluate(cli, "--json")
    assert again.code == 0, again.err
    assert {level["state"] for level in again.document["plan"]["levels"]} == {"up-to-date"}
    assert again.document["measured"]["levels"].keys() == set(LEVELS)
    assert "To measure: nothing; 3 known already." in again.err
    assert ran_since(before, known) == {}
    assert known.facts() == facts


def test_a_level_made_again_is_measured_again_alone(known: Place, cli: CommandLine, tiny_text: Path) -> None:
    figures, before = known.divergences(), known.runs()
    arguments = ("-f", tiny_text, "-c", "128", "--chunks", "8", "--levels", "Q4_K_M", "--pure", "-q", "--work-dir", known.work)
    made = cli("run", known.model, *arguments)
    assert made.code == 0, made.err
    assert known.divergences().keys() == {"Q8_0", "IQ2_XS"}  # what was measured was another file
    again = known.evaluate(cli, "--json")
    assert again.code == 0, again.err
    states = {level["level"]: level["reason"] for level in again.document["plan"]["levels"]}
    assert states == {"Q8_0": "", "Q4_K_M": "changed: level file", "IQ2_XS": ""}
    assert ran_since(before, known) == {"reference": 1, "Q4_K_M": 1}
    now = known.divergences()
    assert now["Q4_K_M"] != figures["Q4_K_M"]
    assert {name: now[name] for name in ("Q8_0", "IQ2_XS")} == {name: figures[name] for name in ("Q8_0", "IQ2_XS")}
    baselines = known.evaluate(cli, "--ab", "--dry-run", "--json").document["plan"]
    why = baselines["without_twin"]["Q4_K_M"]  # a twin would differ from it by --pure too
    assert why.startswith("was made otherwise (options: Q4_K_M --pure -> Q4_K_M)")
    assert baselines["twins"] == ["Q8_0"]


def test_more_chunks_continue_and_fewer_cost_nothing(known: Place, made: Place, cli: CommandLine, tmp_path: Path) -> None:
    fresh = made.copy(tmp_path / "fresh")
    assert fresh.evaluate(cli, "--levels", "Q4_K_M", chunks=12).code == 0
    whole = fresh.divergences()["Q4_K_M"]
    log = known.workspace.log("evaluate-Q4_K_M")
    before = log.stat().st_size
    more = known.evaluate(cli, "--levels", "Q4_K_M", "--json", chunks=12)
    assert more.document["plan"]["levels"] == [{"level": "Q4_K_M", "state": "todo", "reason": "changed: chunks"}]
    assert '"first":8,' in log.read_text(encoding="utf-8")[before:]
    assert known.divergences()["Q4_K_M"] == whole
    assert known.figures()["Q4_K_M"].ppl_ratio == fresh.figures()["Q4_K_M"].ppl_ratio
    runs = known.runs()
    assert known.evaluate(cli, "--levels", "Q4_K_M,Q8_0", chunks=4).code == 0
    assert ran_since(runs, known) == {}
    assert {known.divergences()[name].n_tokens for name in ("Q4_K_M", "Q8_0")} == {4 * 31}
    assert fresh.evaluate(cli, "--levels", "Q8_0", chunks=4).code == 0
    assert known.divergences()["Q8_0"] == fresh.divergences()["Q8_0"]


def test_again_measures_all_of_it_again(known: Place, cli: CommandLine) -> None:
    before, facts = known.runs(), known.facts()
    again = known.evaluate(cli, "--again", "--levels", "Q4_K_M", "--json")
    assert again.document["plan"]["levels"] == [{"level": "Q4_K_M", "state": "todo", "reason": "asked for"}]
    assert ran_since(before, known) == {"reference": 1, "Q4_K_M": 1}
    assert known.facts() == facts


def test_what_the_source_said_is_computed_again_when_it_is_lost(known: Place, cli: CommandLine) -> None:
    """Without it the ratio would be another one, though every level's tokens are there."""
    facts = known.facts()
    (known.workspace.evaluation / "source.scored").unlink()
    assert known.evaluate(cli, chunks=4).code == 0
    assert known.evaluate(cli).code == 0
    assert known.facts() == facts
    assert known.files() == SCORED


def test_another_source_of_the_same_name_has_no_levels(known: Place, cli: CommandLine, tmp_path: Path) -> None:
    other = replace(known, model=write_llama_gguf(tmp_path / "tiny-BF16.gguf", seed=1))
    done = other.evaluate(cli, "--levels", "Q8_0")
    assert done.code == 2
    assert f"{known.workspace.root} belongs to {known.model}" in done.err
    assert "There is nothing to measure in" in done.err


def extent_of(place: Place, n_levels: int) -> Extent:
    return Extent(494, CONTEXT, CHUNKS, 4, n_levels, further_bytes=place.text.stat().st_size)


def test_little_room_means_several_passes_and_exactly_the_same_figures(bare: Place, measured: tuple[Place, Ran]) -> None:
    extent = extent_of(bare, len(LEVELS))
    limit = extent.kept_bytes + extent.further_bytes + extent.reference_bytes(4) + 100
    result, watch = watched(bare, max_disk=limit)
    fit = result.plan.held_out.fit
    assert (fit.chunks, fit.n_passes) == (4, 2)
    assert 0.9 * fit.n_bytes < watch.most <= fit.n_bytes <= limit
    assert bare.facts() == measured[0].facts()
    assert bare.files() == SCORED
    assert bare.runs() == dict.fromkeys(EACH, 2)


def test_too_little_room_is_refused_before_anything_is_computed(bare: Place, cli: CommandLine) -> None:
    done = bare.evaluate(cli, "--max-disk", "50KiB")
    assert done.code == 8
    assert "Error: There is no room to measure." in done.err
    assert "raise --max-disk" in done.err
    assert bare.runs() == {}


def test_a_leftover_reference_does_not_count_as_taken(bare: Place, cli: CommandLine) -> None:
    """The killed run's own file fills what there is: the next one uses it, or writes over it."""
    place = bare.workspace.evaluation
    place.mkdir()
    with (place / "reference.logits").open("wb") as file:
        file.truncate(1 << 40)  # more than is free; it takes nothing, but looks so
    found = bare.evaluate(cli, "--dry-run", "--json", "--max-disk", "900GiB", chunks=None)
    assert found.code == 0, found.err


# --- somebody's log-probabilities


def test_log_probabilities_of_llama_perplexity_s_own_give_the_same_figures(
    bare: Place, measured: tuple[Place, Ran], tools: BareTools, cli: CommandLine, tmp_path: Path
) -> None:
    given = bare_base(tools, bare, tmp_path)
    arguments = ("--kl-divergence-base", given, "--levels", "Q4_K_M")
    first = bare.evaluate(cli, *arguments, chunks=4, text=False)
    assert first.code == 0, first.err
    assert "is tiny.logits of tiny: done" in first.err
    done = bare.evaluate(cli, *arguments, "--json", text=False)
    assert done.code == 0, done.err
    assert done.document["plan"]["text"] == "tiny.logits"
    found, mine = bare.divergences()["Q4_K_M"], measured[0].divergences()["Q4_K_M"]
    assert found.n_tokens == mine.n_tokens
    assert found.kld.value == pytest.approx(mine.kld.value, rel=1e-3)  # the second half set beside the file's second half
    assert found.ppl.value == mine.ppl.value
    assert given.exists()
    assert bare.files() == {"Q4_K_M.scored"}
    runs = bare.runs()
    assert bare.evaluate(cli, *arguments, text=False).code == 0
    assert ran_since(runs, bare) == {}


def bare_base(tools: BareTools, place: Place, folder: Path) -> Path:
    from support.divergence import save_logits

    return save_logits(tools, place.model, place.text, folder / "tiny.logits", n_ctx=CONTEXT)


def shortened(base: Path, copy: Path) -> Path:
    copy.write_bytes(base.read_bytes()[:-1])
    return copy


def patched(base: Path, copy: Path, at: int, data: bytes) -> Path:
    content = bytearray(base.read_bytes())
    content[at : at + len(data)] = data
    copy.write_bytes(content)
    return copy


@pytest.mark.parametrize(
    ("fault", "what", "why"),
    [
        ("missing", "cannot be compared with", "No such file"),
        ("empty", "cannot be compared with", "does not begin with _logits_"),
        ("truncated", "cannot be compared with", "the run that wrote it was interrupted"),
        ("another vocabulary", "was not written from tiny", "its vocabulary has 300 tokens, the model's 494"),
        ("another model", "was written by another model than tiny", "nats apart"),
        ("strange tokens", "cannot be compared with", "tokens outside its vocabulary of 494"),
        ("no numbers", "cannot be compared with", "its chunk 0 has log-probabilities that are NaN or infinite"),
        ("absurd numbers", "cannot be compared with", "its chunk 0 has log-probabilities that are NaN or infinite"),
    ],
)
def test_log_probabilities_that_are_not_this_model_s_are_refused(
    fault: str, what: str, why: str, bare: Place, engine: EmbeddedEngine, base: Path, cli: CommandLine, tmp_path: Path
) -> None:
    rows = 20 + 4 * CHUNKS * CONTEXT
    given = tmp_path / "given.logits"
    match fault:
        case "empty":
            given.touch()
        case "truncated":
            shortened(base, given)
        case "another vocabulary" | "another model":
            vocab = 300 if "vocabulary" in fault else 512
            other = write_llama_gguf(tmp_path / "other.gguf", seed=1, vocab=vocab, fluent=True)
            job = ReferenceJob("refer", other, bare.text, ChunkRange(0, CHUNKS), given, OPTIONS, "other", None)
            engine.make_reference(job, ignore)
        case "strange tokens":
            patched(base, given, 20 + 4 * 70, (494).to_bytes(4, "little"))
        case "no numbers":
            patched(base, given, rows, np.array([np.nan], "<f4").tobytes())
        case "absurd numbers":
            patched(base, given, rows, np.array([3e38], "<f4").tobytes())
    done = bare.evaluate(cli, "--kl-divergence-base", given, text=False)
    assert done.code == 6, done.err
    assert f"{what}." in done.err or what in done.err.splitlines()[-3]
    assert why in done.err.splitlines()[-2]
    assert "leave it out to have one made" in done.err.splitlines()[-1]
    assert set(bare.runs()) <= {"check"}
    assert bare.figures() == {}


# --- levels that hold the same tensors, a quantised source, the source itself


def test_levels_of_the_same_tensors_are_measured_once_and_shown_once(tiny_text: Path, cli: CommandLine, tmp_path: Path) -> None:
    """Rows of 96 fit no K-quant's blocks; what falls back to the same types is one level under several names."""
    model = write_llama_gguf(tmp_path / "narrow-BF16.gguf", hidden=96, ff=160, fluent=True)
    place = make_levels(tmp_path, model, tiny_text, levels=("Q8_0", "Q3_K_S", "Q2_K", "IQ4_XS", "IQ4_NL"))
    done = place.evaluate(cli, "--ab")
    assert done.code == 0, done.err
    assert "IQ4_XS holds the same tensors as IQ4_NL, and gets its figures." in done.err
    measured = [name for name in place.runs() if name in ("Q8_0", "Q3_K_S", "Q2_K", "IQ4_XS", "IQ4_NL")]
    report = read_report(place.root / "report.json")
    rows = {level.name: level.others for level in report.rows}
    assert sorted(measured) == sorted(rows)
    assert len(rows) < 5
    hidden = [level for level in report.levels if level.same_as]
    assert {level.name: level.same_as for level in hidden} == {name: of for of, others in rows.items() for name in others}
    figures = place.divergences()
    assert set(figures) == {"Q8_0", "Q3_K_S", "Q2_K", "IQ4_XS", "IQ4_NL"}
    assert all(figures[level.name] == figures[level.same_as] for level in hidden)
    assert not {pick.level for pick in report.picks} & {level.name for level in hidden}
    assert {pair.level for pair in report.comparisons} <= set(rows)
    runs = place.runs()
    assert place.evaluate(cli, "--ab").code == 0
    assert place.runs() == runs


def test_a_quantised_source_is_named_and_never_picked(tiny_model: Path, cli: CommandLine, tmp_path: Path) -> None:
    work = ("--work-dir", tmp_path / "first")
    assert cli("quantize", tiny_model, "--levels", "Q8_0", *work).code == 0
    source = tmp_path / "first" / "tiny" / "tiny-Q8_0.gguf"
    levels = ("--levels", "Q8_0,F16,Q6_K", "--allow-requantize", "--work-dir", tmp_path / "work")
    done = cli("quantize", source, *levels)
    assert done.code == 0, done.err
    place = Place(tmp_path / "work", source, held_out_text(tmp_path / "held-out.txt"))
    (folder,) = place.work.iterdir()
    done = cli("evaluate", source, "--text", place.text, *COMPUTE, "--work-dir", place.work)
    assert done.code == 0, done.err
    report = read_report(folder / "report.json")
    assert report.model.quantised == "Q8_0"
    assert {level.name for level in report.levels if level.is_source} == {"Q8_0"}
    assert {pick.level for pick in report.picks} <= {"Q6_K"}  # neither the source nor what is larger
    assert "The source is quantised Q8_0" in report.caveats[0]
    assert "against the quantised Q8_0 source" in done.out.replace("\n", " ")


def test_levels_that_cannot_exist_without_a_matrix_are_named_in_the_report(known: Place, cli: CommandLine) -> None:
    done = known.evaluate(cli, "--ab")
    assert done.code == 0, done.err
    report = read_report(known.root / "report.json")
    assert [each.level for each in report.without_twin] == ["IQ2_XS"]
    assert "cannot be made without an imatrix" in report.without_twin[0].why
    assert "IQ2_XS cannot be made without an imatrix" in done.out


# --- sources that say nothing about the text


@pytest.mark.parametrize("engine_name", ["embedded", "binaries"])
@pytest.mark.parametrize(
    ("fault", "why"),
    [("random", "and a uniform guess among its 494 tokens has 494"), ("without output", "")],
)
def test_a_source_that_guesses_is_refused_in_words(
    engine_name: str, fault: str, why: str, tiny_text: Path, cli: CommandLine, tmp_path: Path
) -> None:
    """Every level is next to nothing away from a source that predicts nothing: such figures are not written down."""
    model = write_llama_gguf(tmp_path / "guess-BF16.gguf", fluent=fault != "random")
    if fault != "random":
        zero_output(model)
    work = ("--work-dir", tmp_path / "work")
    assert cli("quantize", model, "--levels", "Q8_0", *work).code == 0
    place = Place(tmp_path / "work", model, held_out_text(tmp_path / "held-out.txt"))
    for _ in range(2):  # what a refused run left is not believed the second time
        done = place.evaluate(cli, "--engine", engine_name)
        assert done.code == 6, done.err
        what, reason, todo = done.err.splitlines()[-3:]
        assert "guess-BF16.gguf cannot be measured against" in what or "guess cannot be measured against" in what
        assert why in reason
        assert "would mean nothing" in reason
        assert "causal language model" in todo
        assert place.figures() == {}


def zero_output(model: Path) -> None:
    """As a damaged or half-initialised file: every logit is 0."""
    header = read_header(model)
    output = next(tensor for tensor in header.tensors if tensor.name == "output.weight")
    assert output.n_bytes is not None
    with model.open("r+b") as file:
        file.seek(header.data_offset + output.offset)
        file.write(bytes(output.n_bytes))


# --- texts


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "it is empty"),
        (b" \n\n ", "it is empty"),
        (b"Words, and then\0bytes.", "it is a binary file"),
        ("Wörter".encode("latin-1"), "is not valid UTF-8"),
        (b"A short sentence.", "2 chunks of 64 need 128"),
    ],
    ids=["empty", "blank", "binary", "latin1", "short"],
)
def test_a_text_that_is_none_is_refused(content: bytes, why: str, bare: Place, cli: CommandLine, tmp_path: Path) -> None:
    text = tmp_path / "mine.txt"
    text.write_bytes(content)
    done = replace(bare, text=text).evaluate(cli)
    assert done.code == 6
    assert "mine.txt" in done.err.splitlines()[-3]
    assert why in done.err.splitlines()[-2]
    assert " -f" not in done.err.replace("iconv -f", "")  # that is the calibration's option
    assert "calibration" not in done.err
    assert bare.runs() == {}


def test_a_text_that_is_not_there_is_refused(bare: Place, cli: CommandLine, tmp_path: Path) -> None:
    for text in (tmp_path / "nowhere.txt", tmp_path):
        done = replace(bare, text=text).evaluate(cli)
        assert done.code in (2, 6)
        assert "Traceback" not in done.err
        assert str(text) in done.err


def test_the_text_of_the_calibration_is_refused(bare: Place, tiny_text: Path, cli: CommandLine) -> None:
    done = replace(bare, text=tiny_text).evaluate(cli)
    assert done.code == 6
    assert "words.txt cannot say how good the levels are." in done.err
    assert "100% of it also occurs in words.txt, from which the imatrix was collected" in done.err
    assert bare.runs() == {}


@pytest.mark.parametrize(("stolen", "code"), [(500, 0), (9000, 6)])
def test_a_text_that_shares_passages_with_the_calibration(
    stolen: int, code: int, bare: Place, tiny_text: Path, cli: CommandLine, tmp_path: Path
) -> None:
    """A few are told, many refused."""
    text = tmp_path / "mixed.txt"
    text.write_text(bare.text.read_text("utf-8") + tiny_text.read_text("utf-8")[:stolen], encoding="utf-8")
    done = replace(bare, text=text).evaluate(cli, "--dry-run", "--json")
    assert done.code == code
    if code == 0:
        assert 0.01 < done.document["plan"]["overlap"] < 0.2
        assert "% of mixed.txt also occurs in words.txt, for example: " in done.err
    else:
        assert "cannot say how good the levels are" in done.err


def test_a_calibration_text_named_by_a_short_path_is_found_from_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.txt").write_text("Some words.", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert calibration_facts(open_corpus(Path("mine.txt"))).path == str(tmp_path / "mine.txt")


# --- nothing to measure


def test_without_a_workspace_the_next_command_is_told(cli: CommandLine, tiny_model: Path, tmp_path: Path) -> None:
    done = cli("evaluate", tiny_model)
    assert done.code == 2
    assert "Error: There is nothing to measure in " in done.err
    assert f"Do:  Make some first: imatrix-runner run {tiny_model}" in done.err
    assert not (tmp_path / "work").exists()


def test_a_level_that_is_not_there_is_told_with_those_that_are(bare: Place, cli: CommandLine) -> None:
    done = bare.evaluate(cli, "--levels", "Q4_K_M,Q5_K_M")
    assert done.code == 2
    assert "Error: Q5_K_M cannot be measured." in done.err
    assert all(name in done.err.splitlines()[-2] for name in LEVELS)
    assert f"imatrix-runner run {bare.model} --levels Q5_K_M" in done.err
    assert bare.runs() == {}


def test_levels_whose_files_are_gone_or_changed_are_not_measured(bare: Place, cli: CommandLine) -> None:
    bare.workspace.level_file("Q8_0").unlink()
    with bare.workspace.level_file("IQ2_XS").open("ab") as file:
        file.write(b"more")
    done = bare.evaluate(cli, "--dry-run", "--json")
    assert [level["level"] for level in done.document["plan"]["levels"]] == ["Q4_K_M"]
    bare.workspace.level_file("Q4_K_M").unlink()
    done = bare.evaluate(cli)
    assert done.code == 2
    assert "no level was made there, or their files are gone" in done.err


# --- files that compute no numbers


@pytest.mark.parametrize(
    ("number", "why"),
    [
        (np.nan, "numbers in its tensor output_norm.weight are NaN or infinite"),
        (3e38, "its logits in chunk 1 are NaN or infinite"),
    ],
)
def test_a_level_that_computes_no_numbers_is_named_and_the_others_are_measured(
    number: float, why: str, known: Place, measured: tuple[Place, Ran], cli: CommandLine
) -> None:
    """NaN becomes some number where activations are quantised, so that logits do not tell."""
    known.spoil("Q4_K_M", number)
    done = known.evaluate(cli, "--json")
    assert done.code == 100
    assert done.document["exit_code"] == 100
    failed = done.document["measured"]["failed"]
    assert failed.keys() == {"Q4_K_M"}
    assert failed["Q4_K_M"]["what"] == "tiny-Q4_K_M.gguf produced NaN or infinite numbers"
    assert failed["Q4_K_M"]["why"] == why
    assert "create it again" in failed["Q4_K_M"]["do"]
    assert done.document["measured"]["levels"].keys() == {"Q8_0", "IQ2_XS"}
    assert known.divergences() == {name: figures for name, figures in measured[0].divergences().items() if name != "Q4_K_M"}
    plain = known.evaluate(cli)
    assert plain.code == 100
    assert "Q4_K_M: tiny-Q4_K_M.gguf produced NaN or infinite numbers" in plain.out


def test_a_source_that_computes_no_numbers_is_named(bare: Place, cli: CommandLine, tmp_path: Path) -> None:
    broken = tmp_path / bare.model.name
    broken.write_bytes(bare.model.read_bytes())
    break_norm(broken)
    # llama.cpp makes no level of such a source: have the journal say that these are its levels.
    told = bare.workspace.journal.read_text(encoding="utf-8").replace(digest(bare.model), digest(broken))
    bare.workspace.journal.write_text(told, encoding="utf-8")
    done = replace(bare, model=broken).evaluate(cli)
    assert done.code == 6
    assert "Error: tiny-BF16.gguf produced NaN or infinite numbers." in done.err
    assert bare.figures() == {}


# --- baselines


def test_baselines_are_made_measured_and_removed(
    paired: tuple[Place, EvaluateResult, Watch], measured: tuple[Place, Ran]
) -> None:
    place, result, watch = paired
    assert list(result.plan.baselines) == ["Q8_0", "Q4_K_M"]
    assert result.plan.alone.keys() == {"IQ2_XS"}
    assert result.plan.alone["IQ2_XS"].startswith("cannot be made without an imatrix: ")
    assert [pair.level for pair in result.comparisons] == ["Q8_0", "Q4_K_M"]
    assert not place.workspace.baselines.exists()
    assert place.files() == SCORED | {"Q8_0-without-imatrix.scored", "Q4_K_M-without-imatrix.scored"}
    assert levels_in(place.root) == levels_in(measured[0].root)
    assert {name: place.figures()[name] for name in LEVELS} == measured[0].figures()
    assert watch.most_baselines == 2
    assert watch.most <= result.plan.held_out.fit.n_bytes


def test_a_baseline_s_figures_are_those_of_llama_quantize_s_file_without_imatrix(
    paired: tuple[Place, EvaluateResult, Watch], tools: BareTools, engine: EmbeddedEngine, base: Path, tmp_path: Path
) -> None:
    place = paired[0]
    for name, pair in place.pairs().items():
        bare = tools.quantize(place.model, tmp_path / f"{name}.gguf", name)
        assert pair.without == measured_directly(engine, bare, base, tmp_path / name)
        assert pair.with_imatrix == place.divergences()[name]
        assert pair.kld.value == pytest.approx(pair.with_imatrix.kld.value - pair.without.kld.value, abs=1e-12)
    same = place.pairs()["Q8_0"]  # which makes no use of one
    assert (same.saved, same.ppl, same.verdict, same.sure) == (Estimate(0.0, 0.0), Estimate(0.0, 0.0), "not needed", False)


def test_baselines_are_not_made_a_second_time(compared: Place, cli: CommandLine) -> None:
    before, pairs = compared.runs(), compared.pairs()
    again = compared.evaluate(cli, "--ab", "--json")
    assert again.code == 0, again.err
    assert again.document["plan"]["twins"] == []
    assert [pair["level"] for pair in again.document["measured"]["comparisons"]] == ["Q8_0", "Q4_K_M"]
    assert ran_since(before, compared) == {}
    assert "levels in one pass" not in again.err
    fewer = compared.evaluate(cli, "--ab", "--json", chunks=4)
    assert fewer.document["plan"]["twins"] == ["Q8_0", "Q4_K_M"]
    assert ran_since(before, compared) == {}
    assert "levels in one pass" not in fewer.err  # their tokens are known: no file is needed
    assert compared.pairs()["Q4_K_M"].without.n_tokens == 4 * 31
    back = compared.evaluate(cli, "--ab")
    assert back.code == 0
    assert compared.pairs() == pairs
    assert ran_since(before, compared) == {}


def test_with_little_room_there_is_one_baseline_at_a_time(known: Place, paired: tuple[Place, EvaluateResult, Watch]) -> None:
    extent = extent_of(known, len(LEVELS) + 2)
    largest = known.workspace.level_file("Q8_0").stat().st_size
    limit = extent.kept_bytes + extent.further_bytes + extent.reference_bytes(CHUNKS) + largest + 1000
    result, watch = watched(known, baselines=True, max_disk=limit)
    assert watch.most_baselines == 1
    assert watch.most <= result.plan.held_out.fit.n_bytes <= limit
    assert known.pairs() == paired[0].pairs()
    assert not known.workspace.baselines.exists()


def test_levels_made_with_options_are_compared_by_the_run_that_knows_them(
    tiny_text: Path, made: Place, cli: CommandLine, tmp_path: Path
) -> None:
    types = tmp_path / "types.txt"
    types.write_text("ffn_down=q8_0\n", encoding="utf-8")
    place = replace(made, work=tmp_path / "work")
    done = cli(*run_and_evaluate(place, tiny_text, "--levels", "Q4_0", "--tensor-type-file", types, "--ab"))
    assert done.code == 0, done.err
    assert [pair["level"] for pair in done.document["measured"]["comparisons"]] == ["Q4_0"]
    told = place.evaluate(cli, "--ab", "--dry-run", "--json")
    assert told.document["plan"]["without_twin"]["Q4_0"].startswith("was made otherwise (options: Q4_0 --tensor-type-file")


def test_levels_without_imatrix_or_unknown_here_have_no_baseline(bare: Place, cli: CommandLine) -> None:
    plain = cli("quantize", bare.model, "--imatrix", "none", "--levels", "Q4_1", "-q", "--work-dir", bare.work)
    assert plain.code == 0, plain.err
    journal = bare.journal
    journal.record("level-FORK_2", journal["level-Q8_0"])
    mix = journal["level-Q4_K_M"]
    marked = {**mix.inputs, "options": f"Q4_K_M --override-kv {METADATA_KEY}=str:types by measured sensitivity"}
    journal.record("level-MIX-4.94bpw-Q4_K_M", replace(mix, inputs=marked))
    done = bare.evaluate(cli, "--ab", "--levels", "Q4_1,FORK_2,MIX-4.94bpw-Q4_K_M", "--dry-run", "--json")
    assert done.code == 0, done.err
    assert done.document["plan"]["without_twin"] == {
        "Q4_1": "was made without an imatrix itself",
        "FORK_2": "has no baseline: the llama.cpp in use does not offer it",
        "MIX-4.94bpw-Q4_K_M": "has no baseline: its types were chosen with the imatrix",
    }


# --- targets, run, dry runs, the other engine


def test_a_target_names_a_measured_level(known: Place, cli: CommandLine) -> None:
    runs = known.runs()
    kld = known.evaluate(cli, "--target-kld", "0.1", "--json").document["measured"]["target"]
    assert (kld["level"], kld["why"]) == ("Q4_K_M", "target")
    size = known.evaluate(cli, "--target-size", "1MiB", "--json").document
    assert size["measured"]["target"]["level"] == "Q4_K_M"
    assert size["picks"][0] == size["measured"]["target"]
    none = known.evaluate(cli, "--target-kld", "0.00001", "--json")
    assert none.code == 0
    assert none.document["measured"]["target"] is None
    assert "No measured level meets the target; the closest to the source is Q8_0 with 0.00" in none.err
    assert ran_since(runs, known) == {}


def run_and_evaluate(place: Place, text: Path, *further: str | Path) -> tuple[str | Path, ...]:
    run = ("run", place.model, "-f", text, "-c", "128", "--chunks", "8", "-t", "1", "--text", place.text, *further)
    return (*run[:2], "--json", "--work-dir", place.work, *run[2:])


def test_run_with_a_size_leaves_out_what_is_larger_and_measures_the_rest_once(
    made: Place, tiny_text: Path, cli: CommandLine, tmp_path: Path
) -> None:
    place = replace(made, work=tmp_path / "work")
    arguments = run_and_evaluate(place, tiny_text, "--levels", "Q8_0,Q4_K_M", "--target-size")
    done = cli(*arguments, "1MiB")
    assert done.code == 0, done.err
    assert levels_in(place.root).keys() == {"Q4_K_M"}
    assert done.document["measured"]["target"]["level"] == "Q4_K_M"
    assert done.document["measured"]["levels"].keys() == {"Q4_K_M"}
    assert Path(done.document["report"][0]).is_file()
    before = place.runs()
    again = cli(*arguments, "1MiB")
    assert again.code == 0, again.err
    assert {level["status"] for level in again.document["levels"]} == {"skipped"}
    assert again.document["measured"]["levels"] == done.document["measured"]["levels"]
    assert ran_since(before, place) == {}
    (entry,) = cli("status", "--json", "--work-dir", place.work).document["workspaces"]
    assert (entry["state"], entry["levels_wanted"]) == ("done", 1)
    small = cli(*arguments, "10KiB")
    assert small.code == 6
    assert "No level is as small as 10.00 KiB" in small.err


def test_a_dry_run_writes_nothing(known: Place, cli: CommandLine) -> None:
    before = known.tree()
    done = known.evaluate(cli, "--ab", "--again", "--dry-run")
    assert done.code == 0, done.err
    assert known.tree() == before
    assert "To measure: Q8_0, Q4_K_M, IQ2_XS." in done.out
    assert "Made without imatrix, measured and removed: Q8_0, Q4_K_M." in done.out
    assert "Disk: at most " in done.out


def test_the_other_engine_s_figures_are_the_same_as_far_as_it_prints_them(
    bare: Place, measured: tuple[Place, Ran], tools: BareTools, cli: CommandLine, tmp_path: Path
) -> None:
    folder = fake_tools(tools.toolchain, tmp_path / "tools")
    perplexity_that(PATIENT, tools.toolchain, folder)
    arguments = ("--engine", "binaries", "--llama-cpp", folder, "--levels", "Q4_K_M")
    done = bare.evaluate(cli, *arguments, "--json")
    assert done.code == 0, done.err
    mine, theirs = measured[0].divergences()["Q4_K_M"], bare.divergences()["Q4_K_M"]
    assert theirs.n_tokens == mine.n_tokens
    assert theirs.kld.value == pytest.approx(mine.kld.value, abs=2e-6)
    assert theirs.ppl.value == pytest.approx(mine.ppl.value, rel=1e-5)
    assert theirs.same_top.value == pytest.approx(mine.same_top.value, abs=1.1e-5)
    assert "reference.logits" not in bare.files()
    before = bare.runs()
    assert bare.evaluate(cli, *arguments).code == 0
    assert ran_since(before, bare) == {}
