"""``calibration build`` with real tokenizers and templates: the text a model really sees, of just the size asked for."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from imatrix_runner.chat.templates import load_template
from imatrix_runner.engines.embedded.bindings import find
from imatrix_runner.engines.embedded.engine import EmbeddedEngine
from imatrix_runner.models.gguf_file import long_array, read_header
from imatrix_runner.process import Runner
from imatrix_runner.toolchain.store import cache_dir
from support.command_line import PROGRAM, Ran, RunCommand, clean_environment
from support.dialogues import TEMPLATE, dialogues, write_jsonl
from support.hub_server import HubServer, be_quick_and_anonymous
from support.in_process import CommandLine
from support.llama_tools import BareTools
from support.tiny_models import sample_text, write_hf_directory

VOCABULARIES = ("qwen2", "phi-3", "gemma-4", "command-r")
"""GGUFs that carry the templates they were published with: without BOS, SentencePiece, and two that add BOS."""


def token_ids(tools: BareTools, model: Path, text: str, folder: Path) -> list[int]:
    """What llama-tokenize says, control tokens parsed and nothing added."""
    file = folder / "text-to-tokenize.txt"
    file.write_text(text, encoding="utf-8")
    return _ids(tools, "-m", model, "-f", file, "--no-bos")


def _ids(tools: BareTools, *arguments: str | Path) -> list[int]:
    argv = [tools.toolchain.tool("llama-tokenize"), *arguments, "--ids", "--no-escape", "--log-disable"]
    done = subprocess.run([str(word) for word in argv], env=clean_environment(), capture_output=True, check=True, timeout=120)
    found = json.loads(done.stdout.decode().strip().splitlines()[-1])
    assert isinstance(found, list)
    return found


def manifest_of(text: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads(text.with_name(text.name + ".manifest.json").read_text(encoding="utf-8"))
    return read


def blocks(text: Path) -> list[str]:
    """The documents of a built text, cut out where its manifest says they are."""
    data = text.read_bytes()
    return [data[offset : offset + size].decode() for offset, size, _ in manifest_of(text)["documents"]]


def build(cli: CommandLine, *arguments: str | Path) -> Ran:
    ran = cli("calibration", "build", *arguments)
    assert ran.code == 0, ran.err
    return ran


@pytest.mark.convert
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_the_tokens_of_a_built_text_are_those_of_the_tokenizer_s_own_renderings(
    vocabulary: str, cli: CommandLine, tools: BareTools, llama_models: Path, tmp_path: Path
) -> None:
    """100 dialogues: transformers renders each, each is split alone, and that is what llama-tokenize makes of the whole."""
    from transformers.utils.chat_template_utils import render_jinja_template

    model = llama_models / f"ggml-vocab-{vocabulary}.gguf"
    rows = [row | {"messages": [m for m in row["messages"] if m["role"] != "system"]} for row in dialogues(100)]
    build(cli, write_jsonl(tmp_path / "d.jsonl", rows), "-o", "out.txt", "--model", model)
    header = read_header(model)
    special = special_texts(model)
    template = str(header.metadata["tokenizer.chat_template"])
    rendered, _ = render_jinja_template(conversations=[row["messages"] for row in rows], chat_template=template, **special)
    manifest = manifest_of(tmp_path / "out.txt")
    assert manifest["parse_special"] is True
    assert manifest["template"]["sha256"] == load_template(model).sha256

    found = blocks(tmp_path / "out.txt")
    bos = special["bos_token"] if manifest["tokens"] and adds_bos(model) else ""
    if bos and not found[0].startswith(bos):
        found[0] = bos + found[0]  # llama.cpp puts it there
    assert sorted(found) == sorted(rendered)
    engine = EmbeddedEngine(find(os.environ, cache_dir()), Runner())
    expected = engine.tokenise(model, found, parse_special=True, log=None).ids.tolist()
    text = (tmp_path / "out.txt").read_text(encoding="utf-8").removesuffix("\n")
    whole = token_ids(tools, model, text, tmp_path)
    assert ([expected[0]] if bos and expected[0] != whole[0] else []) + whole == expected
    assert manifest["tokens"] == len(expected)


def special_texts(model: Path) -> dict[str, str]:
    tokens = long_array(model, "tokenizer.ggml.tokens") or ()
    metadata = read_header(model).metadata
    keys = {"bos_token": "tokenizer.ggml.bos_token_id", "eos_token": "tokenizer.ggml.eos_token_id"}
    return {name: tokens[metadata[key]] if key in metadata else "" for name, key in keys.items()}


def adds_bos(model: Path) -> bool:
    return bool(read_header(model).metadata.get("tokenizer.ggml.add_bos_token", False))


@pytest.mark.parametrize("vocabulary", ["llama-bpe", "qwen2", "llama-spm", "gemma-4"])
def test_a_budget_of_chunks_is_met_exactly(
    vocabulary: str, cli: CommandLine, tools: BareTools, llama_models: Path, tmp_path: Path
) -> None:
    model = llama_models / f"ggml-vocab-{vocabulary}.gguf"
    build(cli, "shipped", "-o", "out.txt", "--model", model, "--chunks", "25")
    manifest = manifest_of(tmp_path / "out.txt")
    text = (tmp_path / "out.txt").read_text(encoding="utf-8").removesuffix("\n")
    n_tokens = len(plain_ids(tools, model, text, tmp_path))
    assert manifest["tokens"] == n_tokens
    assert n_tokens // 512 == manifest["chunks"] == 25


def plain_ids(tools: BareTools, model: Path, text: str, folder: Path) -> list[int]:
    """What llama-imatrix sees of a text that is not parsed for control tokens, BOS included."""
    file = folder / "plain.txt"
    file.write_text(text, encoding="utf-8")
    return _ids(tools, "-m", model, "-f", file, "--no-parse-special")


@pytest.mark.parametrize("vocabulary", ["qwen2", "llama-bpe"])
def test_a_budget_is_met_exactly_with_thousands_of_short_documents(
    vocabulary: str, cli: CommandLine, llama_models: Path, tmp_path: Path
) -> None:
    """Side by side they count thousands of tokens less than each alone with what parts it from the next."""
    model = llama_models / f"ggml-vocab-{vocabulary}.gguf"
    rows = [{"text": f"{number}. {sample_text(60, seed=number)}"} for number in range(6000)]
    write_jsonl(tmp_path / "t.jsonl", rows)
    command = ("t.jsonl", "-o", "out.txt", "--model", model, "--near-duplicates", "0", "--chunks", "120", "--json")
    ran = build(cli, *command)
    assert ran.document["chunks"] == 120
    assert ran.document["sources"][0]["documents"] > 1000
    assert "used up" not in ran.err


def test_weights_decide_the_shares_and_documents_stay_whole(cli: CommandLine, llama_models: Path, tmp_path: Path) -> None:
    model = llama_models / "ggml-vocab-qwen2.gguf"
    for name in ("a", "b"):
        rows = [{"text": f"{name} {number}: {sample_text(600, seed=number)}"} for number in range(120)]
        write_jsonl(tmp_path / f"{name}.jsonl", rows)
    ran = build(cli, "a.jsonl=3", "b.jsonl", "-o", "out.txt", "--model", model, "--chunks", "20", "--json")
    shares = [source["share"] for source in ran.document["sources"]]
    assert shares == pytest.approx([0.75, 0.25], abs=0.03)
    lines = [line for name in "ab" for line in (tmp_path / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
    kept = {json.loads(line)["text"].strip() for line in lines}
    cut = [block for block in blocks(tmp_path / "out.txt") if block not in kept]
    assert len(cut) == sum(source["cut"] for source in ran.document["sources"]) <= 1
    assert all(any(text.startswith(block) for text in kept) for block in cut)


def test_the_same_inputs_and_seed_give_the_same_bytes_and_another_seed_others(
    runner: RunCommand, chat_model: Path, tmp_path: Path
) -> None:
    write_jsonl(tmp_path / "d.jsonl", dialogues(60))

    def made(name: str, seed: int, hash_seed: str) -> tuple[bytes, dict[str, Any]]:
        command = ("calibration", "build", "d.jsonl", "code", "-o", f"{name}.txt", "--model", chat_model, "--tokens", "6000")
        ran = runner(*command, "--seed", str(seed), env={"PYTHONHASHSEED": hash_seed}, program=PROGRAM)
        assert ran.code == 0, ran.err
        return (tmp_path / f"{name}.txt").read_bytes(), manifest_of(tmp_path / f"{name}.txt") | {"text": ""}

    first = made("first", 1, "1")
    assert made("again", 1, "2") == first
    assert made("other", 2, "1")[0] != first[0]


@pytest.mark.parametrize("vocabulary", ["qwen2", "llama-bpe", "phi-3"])
def test_aligned_chunks_begin_with_documents(
    vocabulary: str, cli: CommandLine, tools: BareTools, llama_models: Path, tmp_path: Path
) -> None:
    """Short plain documents: every single chunk begins with the token that parts them."""
    model = llama_models / f"ggml-vocab-{vocabulary}.gguf"
    rows = [{"text": sample_text(100 + 13 * (number % 25), seed=number)} for number in range(250)]
    write_jsonl(tmp_path / "t.jsonl", rows)
    ran = build(cli, "t.jsonl", "-o", "out.txt", "--model", model, "--chunks", "16", "-c", "256", "--align", "--json")
    assert ran.document["chunks_at_start"] == ran.document["chunks"] == 16
    assert ran.document["parse_special"] is True
    text = (tmp_path / "out.txt").read_text(encoding="utf-8").removesuffix("\n")
    ids = token_ids(tools, model, text, tmp_path)
    special = special_texts(model)
    bos = adds_bos(model) or vocabulary == "llama-bpe"
    (parting,) = set(token_ids(tools, model, special["bos_token" if bos else "eos_token"], tmp_path))
    ids = [parting, *ids] if bos else ids
    assert [ids[place] for place in range(0, 16 * 256, 256)] == [parting] * 16


def test_equal_and_nearly_equal_documents_are_taken_once(cli: CommandLine, tmp_path: Path) -> None:
    texts = [sample_text(900, seed=number) for number in range(30)]
    near = [text.replace(" a ", " the ", 1) + " Indeed." for text in texts[:10]]
    write_jsonl(tmp_path / "t.jsonl", [{"text": text} for text in [*texts, *texts[:5], *near]])
    ran = build(cli, "t.jsonl", "-o", "out.txt", "--json")
    (source,) = ran.document["sources"]
    assert (source["records"], source["documents"], source["duplicates"], source["near_duplicates"]) == (45, 30, 5, 10)
    ran = build(cli, "t.jsonl", "-o", "all.txt", "--near-duplicates", "0", "--json")
    assert ran.document["sources"][0]["documents"] == 40


def test_without_a_model_plain_text_is_built_and_dialogues_are_refused(cli: CommandLine, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "d.jsonl", dialogues(3))
    (tmp_path / "notes.md").write_text("# Notes\n\n" + sample_text(5000), encoding="utf-8")
    ran = build(cli, "notes.md", "edge-cases", "-o", "plain.txt", "--json")
    assert ran.document["tokens"] is None
    assert not ran.document["parse_special"]
    ran = cli("calibration", "build", "d.jsonl", "-o", "chat.txt")
    assert ran.code == 2
    assert "d.jsonl, line" in ran.err
    assert "--model" in ran.err
    assert not (tmp_path / "chat.txt").exists()
    write_jsonl(tmp_path / "n.jsonl", [{"messages": [], "data": {"note": sample_text(200, seed=n)}} for n in range(4)])
    build(cli, "n.jsonl", "-o", "field.txt", "--field", "data.note")
    assert sorted(blocks(tmp_path / "field.txt")) == sorted(sample_text(200, seed=n).strip() for n in range(4))


def test_order_is_kept_without_shuffling(cli: CommandLine, tmp_path: Path) -> None:
    texts = [f"{number}. {sample_text(200, seed=number)}" for number in range(20)]
    write_jsonl(tmp_path / "t.jsonl", [{"text": text} for text in texts])
    build(cli, "t.jsonl", "-o", "out.txt", "--no-shuffle")
    assert blocks(tmp_path / "out.txt") == [text.strip() for text in texts]


def test_stdin_is_a_source(runner: RunCommand, tmp_path: Path) -> None:
    import sys

    rows = "".join(json.dumps({"text": sample_text(300, seed=number)}) + "\n" for number in range(10))
    argv = [sys.executable, "-m", "imatrix_runner", "calibration", "build", "-", "-o", "out.txt", "--json"]
    done = subprocess.run(argv, input=rows.encode(), cwd=tmp_path, env=clean_environment(), capture_output=True, check=True)
    document = json.loads(done.stdout)
    assert [(source["name"], source["documents"]) for source in document["sources"]] == [("stdin", 10)]


def test_a_folder_of_code_is_a_source(cli: CommandLine, tmp_path: Path) -> None:
    folder = tmp_path / "project"
    (folder / "pkg").mkdir(parents=True)
    for number in range(6):
        (folder / "pkg" / f"m{number}.py").write_text(f"# {sample_text(300, seed=number)}\nx = {number}\n", encoding="utf-8")
    (folder / "logo.png").write_bytes(b"\x89PNG\0\0")
    ran = build(cli, folder, "-o", "out.txt")
    assert "project: skipped 1 binary" in ran.err
    assert sorted(block[-5:] for block in blocks(tmp_path / "out.txt")) == [f"x = {number}" for number in range(6)]


def test_a_hub_s_model_lends_its_tokenizer_and_template(
    cli: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the tokenizer's files are fetched, never the weights."""
    directory = write_hf_directory(tmp_path / "hf")
    config = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))
    (directory / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": TEMPLATE}), encoding="utf-8")
    write_jsonl(tmp_path / "d.jsonl", dialogues(20))
    local = build(cli, "d.jsonl", "-o", "local.txt", "--model", directory, "--tokens", "3000", "--json").document
    be_quick_and_anonymous(monkeypatch, tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    with HubServer() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        hub.add_directory("org/chat", directory)
        fetched = build(cli, "d.jsonl", "-o", "hub.txt", "--model", "org/chat", "--tokens", "3000", "--json").document
        assert not any(name.endswith(".safetensors") for name in hub.downloads())
    assert fetched["sha256"] == local["sha256"]
    assert 3000 <= local["tokens"] < 3300


def test_a_hub_s_data_set_is_a_source_with_its_licence_and_commit(
    cli: CommandLine, chat_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pyarrow
    from pyarrow import parquet

    tables = {}
    for split, seed in (("train", 1), ("test", 2)):
        file = tmp_path / f"{split}.parquet"
        parquet.write_table(pyarrow.Table.from_pylist(dialogues(25, seed)), file)
        tables[f"data/{split}-00000-of-00001.parquet"] = file.read_bytes()
    be_quick_and_anonymous(monkeypatch, tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    with HubServer() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        held = hub.add("datasets/org/pharmacy", tables, card={"license": "cc-by-4.0"})
        command = ("org/pharmacy::test=2", "fiction", "-o", "out.txt", "--model", chat_model, "--tokens", "9000", "--json")
        document = build(cli, *command).document
        assert hub.downloads() == ["data/test-00000-of-00001.parquet"]
    first, second = document["sources"]
    assert (first["records"], first["licence"]) == (25, "cc-by-4.0")
    assert held.commit in first["revision"]
    assert second["licence"] == "MIT or CC0-1.0"
    assert first["share"] == pytest.approx(2 / 3, abs=0.12)
    # The test split's dialogues, and nobody else's, offline too.
    again = build(cli, *(word if word != "out.txt" else "again.txt" for word in command), "--offline").document
    assert again["sha256"] == document["sha256"]


@pytest.mark.convert
def test_a_directory_s_tokens_are_those_of_transformers(cli: CommandLine, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    directory = write_hf_directory(tmp_path / "hf")
    config = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))
    # LlamaTokenizerFast would build another tokenizer than the one in tokenizer.json.
    config |= {"chat_template": TEMPLATE, "tokenizer_class": "PreTrainedTokenizerFast"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    rows = dialogues(30)
    write_jsonl(tmp_path / "d.jsonl", rows)
    document = build(cli, "d.jsonl", "-o", "out.txt", "--model", directory, "--no-shuffle", "--json").document
    tokenizer = AutoTokenizer.from_pretrained(directory)
    whole = [tokenizer.apply_chat_template(row["messages"], tokenize=True, return_dict=False) for row in rows]
    assert document["tokens"] == sum(map(len, whole))


@pytest.mark.parametrize("engine", ["embedded", "binaries"])
def test_generation_parses_a_built_text_and_names_it_in_the_matrix(
    engine: str, runner: RunCommand, tools: BareTools, chat_model: Path, tmp_path: Path
) -> None:
    write_jsonl(tmp_path / "d.jsonl", dialogues(60))
    sized = ("-c", "128", "--chunks", "24")
    built = runner("calibration", "build", "d.jsonl", "-o", "chat.txt", "--model", chat_model, *sized, "--json")
    assert built.code == 0, built.err
    command = ("imatrix", "generate", chat_model, "-f", "chat.txt", "-c", "128", "--engine", engine, "--json")
    ran = runner(*command, "-o", "a.gguf")
    assert ran.code == 0, ran.err
    assert "its special tokens are parsed (--parse-special)" in ran.err
    collected = ran.document["collected"]
    assert collected["chunks"] == 24
    assert collected["tokens"] == built.document["tokens"]
    assert collected["calibration"]["manifest"] == built.document["fingerprint"]
    assert [source["name"] for source in collected["calibration"]["sources"]] == ["d.jsonl"]
    assert read_header(tmp_path / "a.gguf").metadata["imatrix_runner.calibration"] == built.document["fingerprint"]
    tools.quantize(chat_model, tmp_path / "q.gguf", "IQ2_XS", imatrix=tmp_path / "a.gguf")

    unparsed = runner(*command, "-o", "b.gguf", "--no-parse-special")
    assert unparsed.code == 0, unparsed.err
    assert "are tokenised letter by letter" in unparsed.err
    assert unparsed.document["collected"]["tokens"] > collected["tokens"]


def test_a_text_changed_since_it_was_built_is_told(runner: RunCommand, chat_model: Path, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "d.jsonl", dialogues(40))
    assert runner("calibration", "build", "d.jsonl", "-o", "chat.txt", "--model", chat_model).code == 0
    with (tmp_path / "chat.txt").open("a", encoding="utf-8") as handle:
        handle.write("One more line.\n")
    command = ("imatrix", "generate", chat_model, "-f", "chat.txt", "-c", "64", "--chunks", "4", "-o", "a.gguf", "--json")
    ran = runner(*command)
    assert ran.code == 0, ran.err
    assert "chat.txt was changed since it was built" in ran.err
    assert "its special tokens are parsed" in ran.err
    assert "manifest" not in ran.document["collected"]["calibration"]
    assert "imatrix_runner.calibration" not in read_header(tmp_path / "a.gguf").metadata


def test_nothing_of_a_user_s_is_overwritten(cli: CommandLine, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text(sample_text(3000), encoding="utf-8")
    (tmp_path / "out.txt").write_text("mine", encoding="utf-8")
    ran = cli("calibration", "build", "notes.txt", "-o", "out.txt")
    assert (ran.code, (tmp_path / "out.txt").read_text(encoding="utf-8")) == (6, "mine")
    ran = cli("calibration", "build", "notes.txt", "-o", "notes.txt", "--force")
    assert ran.code == 6
    assert "one of the sources" in ran.err
    ran = build(cli, "notes.txt", "-o", "new.txt", "--dry-run")
    assert "Would write" in ran.out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt", "out.txt"]


def test_documents_lie_where_the_manifest_says(cli: CommandLine, tmp_path: Path) -> None:
    build(cli, "languages", "code", "-o", "out.txt")
    data = (tmp_path / "out.txt").read_bytes()
    places = [(offset, size) for offset, size, _ in manifest_of(tmp_path / "out.txt")["documents"]]
    assert places[0][0] == 0
    assert all(data[a + n : b] == b"\n\n" for (a, n), (b, _) in pairwise(places))
    assert data[sum(places[-1]) :] == b"\n"
    assert manifest_of(tmp_path / "out.txt")["sha256"] == hashlib.sha256(data).hexdigest()
