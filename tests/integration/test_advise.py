"""Advice against reality: contexts as llama.cpp allocates them, sizes as levels get them, times of the real engines."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from imatrix_runner.advise.memory import context_memory
from imatrix_runner.app.advise import Advice, AdviseRequest, advise
from imatrix_runner.context.context import Context
from imatrix_runner.context.requests import EnvironmentRequest, LevelsRequest, SourceRequest
from imatrix_runner.engines.embedded.bindings import find
from imatrix_runner.engines.jobs import CollectOptions
from imatrix_runner.errors import InterruptedRunError, InvalidDataError, UsageError
from imatrix_runner.evaluate.measurements import Measured, content_of
from imatrix_runner.events import Event, Finished, Started, ignore
from imatrix_runner.files import Stamp
from imatrix_runner.journal import Journal, StepOutput, StepRecord
from imatrix_runner.models.gguf_file import read_header
from imatrix_runner.models.model import open_gguf
from imatrix_runner.steps import LEVEL_INPUT
from imatrix_runner.toolchain.store import cache_dir
from support.children import python
from support.in_process import CommandLine
from support.reports import sample_report
from support.tiny_architectures import ARCHITECTURES, write_architecture
from support.tiny_models import sample_text, write_hf_directory, write_llama_gguf

ALLOCATE = """
    import os, sys
    import llama_cpp

    @llama_cpp.llama_log_callback
    def log(level, text, data):
        os.write(1, text)

    llama_cpp.llama_log_set(log, None)
    for path in sys.argv[2:]:
        os.write(1, f"\\n== {path}\\n".encode())
        model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_seq_max, params.swa_full = int(sys.argv[1]), 1, False
        context = llama_cpp.llama_init_from_model(model, params)
        llama_cpp.llama_free(context)
        llama_cpp.llama_model_free(model)
"""
SHORT = CollectOptions(n_ctx=128)


Ask = Callable[..., Advice]
"""``ask(model)``: what is advised for two levels of it and a short text, without a probe; any part of it may change."""


@pytest.fixture
def requested(tiny_text: Path, tmp_path: Path) -> Callable[..., AdviseRequest]:
    def request(model: Path | str, **changes: Any) -> AdviseRequest:
        usual = AdviseRequest(
            SourceRequest(str(model)),
            EnvironmentRequest(tmp_path / "work"),
            LevelsRequest(("Q4_K_M", "IQ2_XXS")),
            text=tiny_text,
            options=SHORT,
            probe=False,
        )
        return replace(usual, **changes)

    return request


@pytest.fixture
def ask(requested: Callable[..., AdviseRequest]) -> Ask:
    return lambda model, **changes: advise(requested(model, **changes), Context(ignore))


def kinds(advice: Advice) -> set[str]:
    return {finding.kind for finding in advice.text.findings}


@pytest.mark.parametrize("n_ctx", [512, 4096])
def test_a_context_takes_what_llama_cpp_allocates(n_ctx: int, tmp_path: Path) -> None:
    """Every architecture: plain, sliding, latent attention, recurrent and mixed. llama.cpp prints MiB with two decimals."""
    models = [write_architecture(name, tmp_path / f"{name}.gguf") for name in ARCHITECTURES]
    library = find(os.environ, cache_dir()).library
    surroundings = {**os.environ, **({"LLAMA_CPP_LIB_PATH": str(library)} if library is not None else {})}
    command = python(ALLOCATE, str(n_ctx), *map(str, models)).argv
    told = subprocess.run(command, env=surroundings, capture_output=True, check=True, timeout=120).stdout.decode()
    allocated = {}
    for part in told.split("\n== ")[1:]:
        name, _, log = part.partition("\n")
        allocated[Path(name).stem] = sum(map(float, re.findall(r": size =\s+([\d.]+) MiB \(", log)))
    assert allocated.keys() == set(ARCHITECTURES)
    assert all(allocated.values())
    contexts = {path.stem: context_memory(open_gguf(path, allow_requantize=False), n_ctx) for path in models}
    mebibytes = {name: (context.n_bytes or 0) / (1 << 20) for name, context in contexts.items()}
    assert mebibytes == pytest.approx(allocated, abs=0.006 * 2)  # two caches, each rounded
    assert {name for name, context in contexts.items() if context.certainty != "exact"} == {"gemma3", "lfm2", "jamba"}


def test_sizes_are_those_of_the_plan_of_a_run(ask: Ask, tiny_model: Path, tiny_text: Path, cli: CommandLine) -> None:
    names = ("Q8_0", "Q6_K_L", "Q4_K_M", "IQ3_XXS")
    planned = cli("run", tiny_model, "-f", tiny_text, "-c", "128", "--levels", ",".join(names), "--dry-run", "--json").document
    advice = ask(tiny_model, levels=LevelsRequest(names))
    assert {each.level: (each.n_bytes, each.bits_per_weight) for each in advice.levels} == {
        each["level"]: (each["bytes"], each["bits_per_weight"]) for each in planned["plan"]["levels"]
    }
    assert [each.n_bytes for each in advice.levels] == sorted((each.n_bytes for each in advice.levels), reverse=True)


def test_every_level_is_judged_but_those_for_models_trained_so(ask: Ask, tiny_model: Path) -> None:
    advice = ask(tiny_model, levels=LevelsRequest())
    needs = {each.level: each.benefit.need for each in advice.levels}
    assert len(needs) > 20
    assert {"TQ1_0", "TQ2_0", "MXFP4_MOE"} <= set(advice.left_out)
    assert not set(advice.left_out) & needs.keys()
    required = {"IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "IQ3_XXS", "IQ3_XS", "Q2_K_S"}
    assert {level for level, need in needs.items() if need == "required"} == required
    assert {level for level, need in needs.items() if need == "marginal"} == {"Q5_0", "Q5_1", "Q5_K_S", "Q5_K_M", "Q6_K"}
    assert {level for level, need in needs.items() if need == "none"} == {"Q8_0"}
    assert {level for level, need in needs.items() if need == "unknown"} == set()


def test_huge_embeddings_do_not_hide_what_an_imatrix_brings(
    ask: Ask, tiny_text: Path, cli: CommandLine, tmp_path: Path
) -> None:
    """Most of the weights are embeddings that come out in Q8_0; what A/B measures on the layers is what advise says."""
    model = write_llama_gguf(tmp_path / "wide-BF16.gguf", hidden=288, vocab=12_000, fluent=True)
    found = {each.level: each for each in ask(model, levels=LevelsRequest(("Q4_K_M", "Q8_0"))).levels}
    assert found["Q4_K_M"].benefit.need == "strongly useful"
    assert found["Q8_0"].benefit.need == "none"
    done = cli(
        *("run", model, "-f", tiny_text, "-c", "128", "--chunks", "16", "--levels", "Q4_K_M,Q8_0", "--ab", "--json"),
        *("--text", _held_out(tmp_path), "--work-dir", tmp_path / "made"),
    )
    assert done.code == 0, done.err
    saved = {each["level"]: each["saved"] for each in done.document["measured"]["comparisons"]}
    assert saved["Q4_K_M"]["value"] > 2 * saved["Q4_K_M"]["error"]
    assert saved["Q8_0"]["value"] == 0


def _held_out(folder: Path) -> Path:
    path = folder / "held-out.txt"
    path.write_text(sample_text(20_000, seed=5), encoding="utf-8")
    return path


def test_q8_0_really_does_not_look_at_an_imatrix_and_q4_k_does(
    tiny_model: Path, tiny_imatrix: Path, cli: CommandLine, tmp_path: Path
) -> None:
    arguments = ("quantize", tiny_model, "--levels", "Q8_0,Q4_K_S")
    assert cli(*arguments, "--imatrix", "none", "--work-dir", "without").code == 0
    assert cli(*arguments, "--imatrix", tiny_imatrix, "--work-dir", "with").code == 0

    def tensors(folder: str, level: str) -> bytes:
        path = tmp_path / folder / "tiny" / f"tiny-{level}.gguf"
        return path.read_bytes()[read_header(path).data_offset :]

    assert tensors("with", "Q8_0") == tensors("without", "Q8_0")
    assert tensors("with", "Q4_K_S") != tensors("without", "Q4_K_S")


class TestTheProbe:
    @pytest.mark.parametrize("engine", ["embedded", "binaries"])
    def test_two_pairs_of_chunks_are_timed_and_nothing_is_left(
        self,
        requested: Callable[..., AdviseRequest],
        engine: str,
        tiny_model: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        (tmp_path / "tmp").mkdir()
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
        events: list[Event] = []
        asked = requested(
            tiny_model,
            environment=EnvironmentRequest(tmp_path / "work", engine=engine),
            probe=True,
        )
        advice = advise(asked, Context(events.append))
        timing = advice.timing
        assert timing is not None
        assert timing.second is not None
        assert 0 < timing.second < 30
        assert 0 < timing.expected(10) - timing.expected(5) == pytest.approx(5 * timing.seconds_per_chunk)
        assert (advice.engine, advice.untimed) == (engine, "")
        assert [event.total for event in events if isinstance(event, Started)] == [4]
        assert [event.status for event in events if isinstance(event, Finished)] == ["done"]
        assert list((tmp_path / "tmp").iterdir()) == []
        assert not (tmp_path / "work").exists()

    def test_a_text_of_less_than_two_chunks_is_not_timed(self, ask: Ask, tiny_model: Path, tmp_path: Path) -> None:
        text = tmp_path / "short.txt"
        text.write_text(sample_text(600), encoding="utf-8")
        advice = ask(tiny_model, text=text, options=CollectOptions(), probe=True)
        assert advice.timing is None
        assert "an imatrix needs 2 chunks of 512" in advice.untimed
        assert "few-chunks" in kinds(advice)

    def test_a_text_of_three_chunks_gives_one_pair(self, ask: Ask, tiny_model: Path, tmp_path: Path) -> None:
        text = tmp_path / "short.txt"
        text.write_text(sample_text(1300), encoding="utf-8")
        advice = ask(tiny_model, text=text, probe=True)
        assert 2 <= advice.text.n_chunks <= 3
        assert advice.timing is not None
        assert advice.timing.second is None

    def test_a_stop_stops_it(self, requested: Callable[..., AdviseRequest], tiny_model: Path) -> None:
        def hear(event: Event) -> None:
            if isinstance(event, Started):
                context.stop.request()

        context = Context(hear)
        with pytest.raises(InterruptedRunError):
            advise(requested(tiny_model, probe=True), context)


class TestTheText:
    def test_the_shipped_one_unless_another_is_given(self, ask: Ask, tiny_model: Path, tiny_text: Path) -> None:
        assert ask(tiny_model, text=None).text.shipped
        advice = ask(tiny_model, text=tiny_text)
        assert not advice.text.shipped
        assert advice.text.n_chunks == advice.text.n_tokens // 128 > 40
        assert "few-chunks" in kinds(advice)

    def test_a_chat_model_wants_its_template(self, ask: Ask, tiny_model: Path, chat_model: Path) -> None:
        assert "no-template" in kinds(ask(tiny_model, use="chat"))
        advice = ask(chat_model, use="chat")
        assert advice.has_template
        assert "not-rendered" in kinds(advice)

    def test_a_text_that_was_built_with_a_template_is_parsed(
        self, ask: Ask, chat_model: Path, cli: CommandLine, tmp_path: Path
    ) -> None:
        lines = [{"messages": [{"role": "user", "content": sample_text(80, seed)}]} for seed in range(60)]
        (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
        built = cli("calibration", "build", "chats.jsonl", "-o", "chat.txt", "--model", chat_model)
        assert built.code == 0, built.err
        advice = ask(chat_model, use="chat", text=tmp_path / "chat.txt")
        assert "rendered" in kinds(advice)
        letters = ask(chat_model, use="chat", text=tmp_path / "chat.txt", parse_as_built=False)
        assert letters.text.n_tokens > advice.text.n_tokens

    def test_experts_get_few_tokens_of_a_short_text(self, ask: Ask, tmp_path: Path) -> None:
        model = write_architecture("qwen3moe", tmp_path / "moe.gguf")
        text = tmp_path / "short.txt"
        text.write_text(sample_text(500), encoding="utf-8")
        assert "few-expert-tokens" in kinds(ask(model, text=text))
        assert "expert-tokens" in kinds(ask(model))


class TestTheMachine:
    def test_another_machine_s_memory(self, ask: Ask, demo_model: Path) -> None:
        """Of five layers (the output is one) as many as 1 MiB beside what is left free has room for."""
        advice = ask(demo_model, ram=2 << 30, vram=(1 << 30) + (1 << 20), levels=LevelsRequest(("Q8_0",)))
        (level,) = advice.levels
        assert level.fit is not None
        assert level.fit.place == "GPU and RAM"
        assert 0 < level.fit.n_gpu_layers < level.fit.n_layers == 5
        assert [each.place for each in advice.recommendations] == ["RAM"]
        assert advice.machine.planned

    def test_too_little_for_anything(self, ask: Ask, demo_model: Path) -> None:
        advice = ask(demo_model, ram=1 << 30)
        assert [each.fit.place for each in advice.levels if each.fit is not None] == ["nowhere", "nowhere"]
        assert advice.recommendations == ()

    def test_the_context_is_what_the_model_is_made_for_at_most(self, ask: Ask, demo_model: Path, tiny_model: Path) -> None:
        assert ask(demo_model).context.n_ctx == 512
        assert ask(tiny_model).context.n_ctx == 2048
        assert ask(tiny_model, n_ctx=8192).context.n_ctx == 8192


class TestTheModel:
    def test_what_lies_in_the_workspace_makes_no_difference(
        self, ask: Ask, tiny_model: Path, cli: CommandLine, tmp_path: Path
    ) -> None:
        before = ask(tiny_model)
        assert cli("run", tiny_model, "--imatrix", "none", "--levels", "Q4_K_M").code == 0
        foreign = tmp_path / "work" / "tiny" / "tiny-IQ2_XXS.gguf"
        foreign.write_bytes(b"mine")
        assert ask(tiny_model).levels == before.levels
        assert foreign.read_bytes() == b"mine"

    def test_levels_that_were_measured_already_are_named(self, ask: Ask, tiny_model: Path, tmp_path: Path) -> None:
        report = sample_report()
        level = next(level for level in report.levels if level.measured is not None)
        assert level.measured is not None
        assert report.evaluation is not None
        journal = Journal(tmp_path / "work" / "tiny" / "journal.json")
        made = StepRecord.now({}, [StepOutput("tiny-Q4_K_M.gguf", Stamp(1, 1, 1), "0" * 64)], "made", 1.0)
        journal.record("level-Q4_K_M", made)
        facts = Measured(level.measured, level.measured.ratio, report.evaluation)
        journal.record("evaluate Q4_K_M", StepRecord.now({LEVEL_INPUT: content_of(made)}, [], "measured", 1.0, facts=facts))
        assert ask(tiny_model).measured == ("Q4_K_M",)

    def test_a_level_that_cannot_be_made_is_no_recommendation(self, ask: Ask, tmp_path: Path) -> None:
        model = write_llama_gguf(tmp_path / "narrow-BF16.gguf", hidden=192)
        options = replace(LevelsRequest().options, token_embedding_type="q4_k")
        advice = ask(model, levels=LevelsRequest(("Q8_0",), "", options))
        (level,) = advice.levels
        assert "which Q4_K (blocks of 256) cannot hold" in level.failure
        assert (level.n_bytes, level.fit, advice.recommendations) == (None, None, ())

    def test_a_hub_s_model_must_be_fetched_first(self, ask: Ask) -> None:
        with pytest.raises(UsageError, match="before it is downloaded") as refused:
            ask("org/name")
        assert "imatrix-runner quantize org/name" in refused.value.todo
        with pytest.raises(UsageError) as refused:
            ask("org/name@v1:sub/model.gguf")
        assert "hf download org/name sub/model.gguf --revision v1" in refused.value.todo

    def test_one_converted_before_is_named(self, ask: Ask, tiny_model: Path, tmp_path: Path) -> None:
        there = tmp_path / "work" / "name" / "name-BF16.gguf"
        there.parent.mkdir(parents=True)
        there.write_bytes(tiny_model.read_bytes())
        with pytest.raises(UsageError) as refused:
            ask("org/name")
        assert refused.value.todo.endswith(f"imatrix-runner advise {there}")

    def test_a_directory_must_be_converted_first(self, ask: Ask, tmp_path: Path) -> None:
        write_hf_directory(tmp_path / "checkpoint")
        with pytest.raises(UsageError, match="before it is converted") as refused:
            ask(tmp_path / "checkpoint")
        assert "--imatrix none --levels Q8_0" in refused.value.todo
        assert not (tmp_path / "work").exists()

    def test_one_already_quantised_is_refused_unless_allowed(
        self, ask: Ask, tiny_model: Path, cli: CommandLine, tmp_path: Path
    ) -> None:
        assert cli("run", tiny_model, "--imatrix", "none", "--levels", "Q8_0").code == 0
        quantised = tmp_path / "work" / "tiny" / "tiny-Q8_0.gguf"
        with pytest.raises(InvalidDataError, match="already quantised"):
            ask(quantised)
        options = replace(LevelsRequest().options, allow_requantize=True)
        assert ask(quantised, levels=LevelsRequest(("Q4_K_M",), "", options)).levels[0].fit is not None


def test_a_model_that_predicts_no_text_is_advised_without_an_imatrix(cli: CommandLine, tmp_path: Path) -> None:
    model = write_architecture("bert", tmp_path / "bert.gguf", dtype="BF16")
    document = cli("advise", model, "--json").document
    (command,) = document["commands"]
    assert command.startswith("imatrix-runner quantize")
    assert command.endswith("--imatrix none")
    assert cli(*command.split()[1:], "--dry-run").code == 0
