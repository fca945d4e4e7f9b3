"""After a run every level can be used at once: commands for three programs, and a Modelfile that is the user's once edited."""

from __future__ import annotations

from pathlib import Path

import pytest

from imatrix_runner.chat.linear_format import linear_format
from imatrix_runner.chat.templates import ChatTemplate
from imatrix_runner.process import Runner
from support.command_line import Ran, run_command
from support.llama_tools import leftovers
from support.tiny_models import write_llama_gguf

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<s>{{ message.role }}\n{{ message.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
RUN = ("--imatrix", "none", "--levels", "Q8_0,Q4_K_M", "--engine", "embedded", "-t", "1")


def again(folder: Path, *more: str) -> Ran:
    done = run_command("run", folder / "chat-BF16.gguf", *RUN, *more, cwd=folder)
    assert done.code == 0, done.err
    return done


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ran]:
    folder = tmp_path_factory.mktemp("chat")
    write_llama_gguf(folder / "chat-BF16.gguf", metadata={"tokenizer.chat_template": TEMPLATE})
    return folder, again(folder)


def test_the_run_ends_with_commands(made: tuple[Path, Ran]) -> None:
    folder, done = made
    level = folder / "work" / "chat" / "chat-Q4_K_M"
    assert f"llama.cpp: llama-server -m {level}.gguf\n" in done.out
    assert f"Ollama: ollama create chat:q4_k_m -f {level}.Modelfile && ollama run chat:q4_k_m\n" in done.out
    assert f"LM Studio: lms import --symbolic-link --user-repo local/chat {level}.gguf\n" in done.out


def test_modelfiles_stay_until_their_level_changes_and_edited_ones_for_ever(made: tuple[Path, Ran]) -> None:
    folder, _ = made
    workspace = folder / "work" / "chat"
    files = {name: workspace / f"chat-{name}.Modelfile" for name in ("Q8_0", "Q4_K_M")}
    text = files["Q8_0"].read_text(encoding="utf-8")
    assert text.startswith("# For Ollama: ollama create chat:q8_0 -f chat-Q8_0.Modelfile\nFROM ./chat-Q8_0.gguf\n")
    assert '{{- "<s>assistant\\n" }}' in text
    assert text.endswith('PARAMETER num_ctx 2048\nPARAMETER stop "</s>"\n')
    first = {name: path.stat().st_mtime_ns for name, path in files.items()}
    files["Q4_K_M"].write_text("FROM ./mine\n", encoding="utf-8")
    files["Q8_0"].unlink()
    done = again(folder, "--pure", "--force")
    assert "chat-Q4_K_M.Modelfile" in done.out
    assert files["Q4_K_M"].read_text(encoding="utf-8") == "FROM ./mine\n"
    assert files["Q8_0"].read_text(encoding="utf-8") == text
    assert files["Q8_0"].stat().st_mtime_ns != first["Q8_0"]
    assert leftovers(workspace) == []
    (workspace / "chat-Q8_0.gguf").unlink()
    (workspace / "chat-Q4_K_M.gguf").unlink()
    again(folder, "--levels", "Q5_0")
    assert not files["Q8_0"].exists()
    assert files["Q4_K_M"].exists()


@pytest.mark.parametrize(
    ("name", "begin", "answer"),
    [
        ("Qwen-Qwen3-0.6B", "", "<|im_start|>assistant\n"),
        ("Qwen-Qwen2.5-7B-Instruct", "<|im_start|>system\n", "<|im_start|>assistant\n"),
        ("google-gemma-2-2b-it", None, ""),  # refuses system messages
        ("mistralai-Mistral-Nemo-Instruct-2407", None, ""),  # puts them into the user's last message
    ],
)
def test_published_templates_that_can_be_said_otherwise(llama_models: Path, name: str, begin: str | None, answer: str) -> None:
    source = (llama_models / "templates" / f"{name}.jinja").read_text(encoding="utf-8")
    found = linear_format(ChatTemplate(source, "<s>", "</s>", name), Runner())
    assert (found.begin, found.answer) == (begin, answer) if found is not None else begin is None


def test_a_template_that_writes_the_date_cannot_be_said_otherwise() -> None:
    dated = "{{ strftime_now('%Y-%m-%d') }}" + TEMPLATE
    assert linear_format(ChatTemplate(dated, "<s>", "</s>", "x"), Runner()) is None
    assert linear_format(ChatTemplate(TEMPLATE, "<s>", "</s>", "x"), Runner()) is not None
