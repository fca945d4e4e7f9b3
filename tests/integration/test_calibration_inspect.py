"""``calibration inspect`` with real vocabularies, manifests and held-out texts, as a user types it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from imatrix_runner.app import calibration_inspect as module
from imatrix_runner.app.calibration_inspect import Inspected, InspectRequest, inspect
from imatrix_runner.calibration.tokenisers import HuggingFaceTokeniser
from imatrix_runner.context.context import Context
from imatrix_runner.context.engine_choice import Machine
from imatrix_runner.documents import blocks
from imatrix_runner.documents.manifest import DocumentPlace, Manifest, SourceFacts, manifest_path
from imatrix_runner.engines.embedded.bindings import Bindings
from imatrix_runner.engines.embedded.engine import EmbeddedEngine
from imatrix_runner.events import Event, Finished, Progress, Started, ignore
from imatrix_runner.files import write_json
from imatrix_runner.process import Runner
from imatrix_runner.resources import CALIBRATION_TEXT, resource
from support.command_line import RunCommand
from support.in_process import CommandLine
from support.tiny_models import sample_text

CHAT = "<|im_start|>user\nHello there<|im_end|>\n<|im_start|>assistant\nGood day to you.<|im_end|>\n"


@pytest.fixture(scope="module")
def shipped() -> Path:
    return resource(CALIBRATION_TEXT)


@pytest.fixture(scope="module")
def counter() -> EmbeddedEngine:
    bindings = Machine(None).bindings
    assert isinstance(bindings, Bindings)
    return EmbeddedEngine(bindings, Runner())


def inspected(file: Path, **options: Any) -> Inspected:
    return inspect(InspectRequest(file, **options), Context(ignore))


def kinds(found: Inspected) -> dict[str, str]:
    return {finding.kind: finding.severity for finding in found.findings}


@pytest.mark.parametrize("name", ["llama-bpe", "llama-spm"])
def test_tokens_and_chunks_are_those_of_llama_imatrix(
    shipped: Path, llama_models: Path, counter: EmbeddedEngine, name: str
) -> None:
    vocabulary = llama_models / f"ggml-vocab-{name}.gguf"
    tokens = inspected(shipped, model=str(vocabulary), n_ctx=256).inspection.tokens
    assert tokens is not None
    assert tokens.n_tokens == counter.count_tokens(vocabulary, shipped, parse_special=False, log=None)
    assert tokens.n_chunks == tokens.n_tokens // 256
    assert tokens.bytes_per_token == pytest.approx(shipped.stat().st_size / tokens.n_tokens, rel=0.001)
    assert 5000 < tokens.n_seen < tokens.n_vocabulary
    assert tokens.trained_context == {"llama-bpe": 8192, "llama-spm": 4096}[name]


def test_the_vocabulary_seen_counts_each_token_once(tmp_path: Path, llama_models: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("one two one two one two\n" * 10)
    tokens = inspected(text, model=str(llama_models / "ggml-vocab-llama-bpe.gguf")).inspection.tokens
    assert tokens is not None
    # "one", " two", " one" and the newline; the beginning-of-text token before them is a control token.
    assert tokens.n_seen == 4
    assert tokens.n_vocabulary == 128_000
    assert tokens.share_seen == 4 / 128_000
    assert tokens.n_tokens == 1 + 10 * 6 + 9


def test_control_tokens_are_counted_and_read_as_asked(tmp_path: Path, llama_models: Path, counter: EmbeddedEngine) -> None:
    text = tmp_path / "chat.txt"
    text.write_text(CHAT * 30)
    vocabulary = llama_models / "ggml-vocab-qwen2.gguf"
    counts = [counter.count_tokens(vocabulary, text, parse_special=special, log=None) for special in (False, True)]
    found = [inspected(text, model=str(vocabulary), parse_special=special) for special in (False, True)]
    plain, parsed = (each.inspection.tokens for each in found)
    assert plain is not None
    assert parsed is not None
    for tokens in (plain, parsed):
        assert [(token.text, token.count) for token in tokens.special] == [("<|im_start|>", 60), ("<|im_end|>", 60)]
        assert [tokens.n_plain, tokens.n_parsed] == counts
    assert (plain.n_tokens, parsed.n_tokens) == tuple(counts)
    assert counts[0] > counts[1]
    assert kinds(found[0])["special-not-parsed"] == "warning"
    assert kinds(found[1])["special-parsed"] == "info"
    assert "special-not-parsed" not in kinds(found[1])


def test_long_texts_are_counted_in_pieces(
    shipped: Path, llama_models: Path, counter: EmbeddedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    vocabulary = llama_models / "ggml-vocab-gpt-2.gguf"
    monkeypatch.setattr(blocks, "_BLOCK", 40_000)
    monkeypatch.setattr(module, "_GGUF_BATCH", 120_000)
    tokens = inspected(shipped, model=str(vocabulary)).inspection.tokens
    whole = counter.count_tokens(vocabulary, shipped, parse_special=False, log=None)
    n_pieces = -(-shipped.stat().st_size // 40_000)
    assert tokens is not None
    assert abs(tokens.n_tokens - whole) <= n_pieces


def tokenizer_directory(folder: Path, context: object) -> Path:
    import json

    made = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<unk>", "<|im_start|>", "<|im_end|>"], show_progress=False
    )
    made.train_from_iterator([sample_text(5000)], trainer)
    folder.mkdir()
    made.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps(context))
    return folder


@pytest.mark.parametrize(
    ("config", "context"),
    [({"max_position_embeddings": 4096}, 4096), ({"text_config": {"max_position_embeddings": 99}}, 99), ({}, None)],
)
def test_a_hugging_face_directory_counts_too(tmp_path: Path, config: object, context: int | None) -> None:
    folder = tokenizer_directory(tmp_path / "model", config)
    text = tmp_path / "text.txt"
    text.write_text(sample_text(3000) + CHAT)
    tokens = inspected(text, model=str(folder), parse_special=True).inspection.tokens
    (expected,) = HuggingFaceTokeniser(folder).tokenise([text.read_text().removesuffix("\n")], parse_special=True)
    assert tokens is not None
    assert tokens.n_tokens == len(expected)
    assert {(token.text, token.count) for token in tokens.special} == {("<|im_start|>", 2), ("<|im_end|>", 2)}
    assert tokens.trained_context == context


def write_manifest(text: Path, sources: list[tuple[str, list[str]]], *, parse_special: bool) -> None:
    """A built text of these sources' documents, and its manifest."""
    data, places = b"", []
    for number, (_, documents) in enumerate(sources):
        for document in documents:
            places.append(DocumentPlace(len(data), len(document.encode()), number))
            data += document.encode() + b"\n\n"
    text.write_bytes(data)
    facts = tuple(
        SourceFacts(name, "text", "0" * 64, "", 1.0, 0.5, len(texts), len(texts), sum(map(len, texts)), None)
        for name, texts in sources
    )
    write_json(
        manifest_path(text),
        Manifest(
            text=text.name,
            bytes=len(data),
            sha256=hashlib.sha256(data).hexdigest(),
            parse_special=parse_special,
            seed=1,
            shuffled=True,
            aligned=False,
            n_ctx=512,
            tokens=None,
            chunks=None,
            model="",
            template=None,
            sources=facts,
            documents=tuple(places),
        ),
    )


def test_a_manifest_tells_documents_sources_and_how_to_read_it(tmp_path: Path, llama_models: Path) -> None:
    text = tmp_path / "built.txt"
    prose = [sample_text(300, seed=number) for number in range(60)]
    write_manifest(text, [("chats.jsonl", [CHAT] * 10), ("notes/", prose)], parse_special=True)
    found = inspected(text, model=str(llama_models / "ggml-vocab-qwen2.gguf"))
    facts = found.inspection
    assert facts.text.n_documents == 70
    assert [domain.name for domain in facts.text.domains] == ["chats.jsonl", "notes/"]
    assert facts.tokens is not None
    assert facts.parse_special == facts.tokens.parse_special == "manifest"
    assert facts.tokens.n_tokens == facts.tokens.n_parsed < facts.tokens.n_plain
    assert found.manifest is not None
    assert not {"special-parsed", "special-not-parsed", "stale-manifest", "one-source"} & set(kinds(found))


def test_a_manifest_of_another_text_is_ignored_and_told(tmp_path: Path) -> None:
    text = tmp_path / "built.txt"
    write_manifest(text, [("one", [sample_text(300)])], parse_special=True)
    text.write_text(text.read_text() + "edited")
    found = inspected(text)
    assert kinds(found)["stale-manifest"] == "warning"
    assert found.manifest is None
    assert found.inspection.text.n_documents is None
    assert found.inspection.parse_special == ""


def test_one_source_is_warned_of(tmp_path: Path) -> None:
    text = tmp_path / "built.txt"
    write_manifest(text, [("only.txt", [sample_text(300, seed=number) for number in range(60)])], parse_special=False)
    assert kinds(inspected(text))["one-source"] == "warning"


def test_two_unrelated_domains_are_warned_of(tmp_path: Path, shipped: Path) -> None:
    from imatrix_runner.calibration.parts import shipped_parts

    parts = {part.name: part.text for part in shipped_parts()}
    text = tmp_path / "two.txt"
    for other, told in (("code", True), ("science-prose", False)):
        both = (("fiction", parts["fiction"][:20_000]), (other, parts[other][:20_000]))
        text.write_text("\n\n".join(f"=== part: {name} ===\n\n{part}" for name, part in both))
        assert ("unrelated-domains" in kinds(inspected(text))) is told
    assert kinds(inspected(shipped))["general-text"] == "info"


def test_a_held_out_text_is_compared(tmp_path: Path, shipped: Path) -> None:
    held = tmp_path / "held.txt"
    held.write_text(sample_text(4000))
    assert kinds(inspected(shipped, against=held))["held-out-fresh"] == "info"
    text = shipped.read_text(encoding="utf-8")
    held.write_text(text[50_000:60_000] + sample_text(4000))
    found = inspected(shipped, against=held)
    assert kinds(found)["held-out-void"] == "error"
    assert found.inspection.overlap is not None
    assert 9_900 <= found.inspection.overlap.longest <= 10_000
    assert kinds(inspected(shipped, against=shipped))["held-out-void"] == "error"


def test_the_document_has_a_shape_that_others_rely_on(cli: CommandLine, shipped: Path, llama_models: Path) -> None:
    model = llama_models / "ggml-vocab-gpt-2.gguf"
    ran = cli("calibration", "inspect", shipped, "--model", model, "--against", shipped, "--json")
    assert ran.code == 0
    document = ran.document
    assert document["schema"] == "imatrix-runner/calibration-inspect"
    plain = {"version": 1, "exit_code": 0, "manifest": None, "manifest_stale": False, "parse_special": "", "n_ctx": 512}
    assert {key: document[key] for key in plain} == plain
    assert set(document) == {*plain, "schema", "program", "text", "tokens", "held_out", "judgements"}
    assert set(document["text"]) == {
        *("path", "n_bytes", "sha256", "n_lines", "n_characters", "n_words", "n_passages", "n_documents", "compression"),
        *("domain_kind", "domains", "similarities", "scripts", "languages", "guessed", "lines", "passages", "near", "encoding"),
    }
    assert set(document["tokens"]) == {
        *("model", "n_ctx", "n_tokens", "n_chunks", "n_plain", "n_parsed", "n_vocabulary", "n_seen", "bytes_per_token"),
        *("parse_special", "special", "trained_context", "share_seen"),
    }
    assert set(document["held_out"]) == {
        *("name", "verdict", "share", "n_shingles", "longest", "example", "n_compared", "identical"),
    }
    assert document["held_out"]["verdict"] == "void"
    assert [set(finding) for finding in document["judgements"]] == [
        {"severity", "kind", "figure", "text", "todo"} for _ in document["judgements"]
    ]
    assert document["judgements"][0]["kind"] == "held-out-void"
    assert document["text"]["domains"][0] == {
        "name": "science-prose",
        "n_bytes": document["text"]["domains"][0]["n_bytes"],
        "share": document["text"]["domains"][0]["share"],
    }


def test_people_read_figures_first_and_findings_last(cli: CommandLine, tmp_path: Path) -> None:
    (tmp_path / "small.txt").write_text(sample_text(3000) * 3)
    ran = cli("calibration", "inspect", "small.txt")
    assert ran.code == 0
    lines = [line.rstrip() for line in ran.out.splitlines()]
    assert lines[0] == "small.txt"
    assert any(line.startswith("Repeated") and "lines (66." in line for line in lines)
    assert any(line.startswith("Language ") and "Script" in line for line in lines)
    first = next(number for number, line in enumerate(lines) if line.startswith("Warning"))
    assert first > max(number for number, line in enumerate(lines) if line.startswith("English"))
    assert not any("No problems found" in line for line in lines)
    assert ran.err == ""


def test_the_shipped_text_gets_no_warning(cli: CommandLine, shipped: Path, llama_models: Path) -> None:
    ran = cli("calibration", "inspect", shipped, "--model", llama_models / "ggml-vocab-llama-bpe.gguf")
    assert ran.code == 0
    assert "No problems found." in ran.out
    assert "Warning" not in ran.out


def test_quiet_says_nothing(cli: CommandLine, tmp_path: Path) -> None:
    (tmp_path / "small.txt").write_text("Only one line.\n")
    ran = cli("calibration", "inspect", "small.txt", "-q")
    assert (ran.code, ran.out, ran.err) == (0, "", "")


def test_a_text_cannot_command_the_terminal(cli: CommandLine, tmp_path: Path) -> None:
    line = "\x1b]0;owned\x07 a line that comes again \x1b[31m\n"
    (tmp_path / "evil.txt").write_text(line * 5)
    (tmp_path / "held.txt").write_text(line * 5)
    ran = cli("calibration", "inspect", "evil.txt", "--against", "held.txt")
    assert ran.code == 0
    assert "a line that comes again" in ran.out
    assert not {"\x1b", "\x07"} & set(ran.out)


@pytest.mark.parametrize(
    ("data", "why"),
    [(b"", "empty"), (b"a\0b", "binary"), (b"caf\xe9 au lait", "byte 3 (line 1) is not valid UTF-8")],
)
def test_what_cannot_be_used_ends_with_three_lines_and_code_6(
    runner: RunCommand, tmp_path: Path, data: bytes, why: str
) -> None:
    (tmp_path / "bad.txt").write_bytes(data)
    ran = runner("calibration", "inspect", "bad.txt")
    assert ran.code == 6
    assert ran.out == ""
    error, reason, todo = ran.err.splitlines()
    assert error == "Error: bad.txt cannot be used as calibration text."
    assert why in reason
    assert todo.startswith("  Do:  ")


def test_a_model_that_is_none_is_an_error(cli: CommandLine, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(sample_text(500))
    (tmp_path / "model.gguf").write_text("no model at all")
    ran = cli("calibration", "inspect", "text.txt", "--model", "model.gguf")
    assert ran.code == 6
    assert "model.gguf" in ran.err
    assert "Traceback" not in ran.err


def test_long_work_tells_how_far_it_is_and_short_work_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, llama_models: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(sample_text(40_000))
    monkeypatch.setattr(blocks, "_BLOCK", 4000)
    monkeypatch.setattr(module, "_GGUF_BATCH", 25_000)
    model = str(llama_models / "ggml-vocab-gpt-2.gguf")
    events: list[Event] = []
    inspect(InspectRequest(text, model=model, against=text), Context(events.append))
    patient = len(events)
    monkeypatch.setattr(module, "_SILENT_SECONDS", -1.0)
    inspect(InspectRequest(text, model=model, against=text), Context(events.append))
    told = events[patient:]
    started = [event for event in told if isinstance(event, Started)]
    assert [event.step for event in started] == ["read", "count", "compare"]
    assert [event.step for event in told if isinstance(event, Finished)] == ["read", "count", "compare"]
    far = [event.done for event in told if isinstance(event, Progress) and event.step == "read"]
    assert far == sorted(far)
    assert far[-1] == text.stat().st_size == started[0].total


def test_a_stop_ends_it_between_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from imatrix_runner.errors import InterruptedRunError

    text = tmp_path / "text.txt"
    text.write_text(sample_text(40_000))
    monkeypatch.setattr(blocks, "_BLOCK", 4000)
    context = Context(ignore)
    context.stop.request()
    with pytest.raises(InterruptedRunError):
        inspect(InspectRequest(text), context)
