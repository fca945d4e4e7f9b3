"""The chat template of a finished file is compared with the source's and rendered as llama.cpp does; what differs is told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from imatrix_runner.chat.rendering import Unrendered, render
from imatrix_runner.chat.templates import ChatTemplate
from imatrix_runner.extras import PUBLISH
from imatrix_runner.process import Runner
from imatrix_runner.publish import template_check
from imatrix_runner.publish.conversation_set import CONVERSATIONS
from imatrix_runner.publish.template_check import TemplateCheck, check_template
from support.tiny_models import write_llama_gguf

needs_engine = pytest.mark.skipif(bool(PUBLISH.missing()), reason="ggufdoctor needs Python 3.11")

TEMPLATE = (
    "{% if tools %}<s>tools{{ tools | tojson }}</s>{% endif %}"
    "{% for message in messages %}<s>{{ message.role }}\n{{ message.content }}"
    "{% for call in message.tool_calls or [] %}{{ call.function.name }}{{ call.function.arguments | tojson }}{% endfor %}</s>\n"
    "{% endfor %}{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


def model(folder: Path, template: str | None, name: str = "m.gguf") -> Path:
    folder.mkdir(exist_ok=True)
    return write_llama_gguf(folder / name, metadata={} if template is None else {"tokenizer.chat_template": template})


def checkpoint(folder: Path, template: str, **config: str) -> Path:
    """What of a Hugging Face directory has to do with its template."""
    folder.mkdir()
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**tokens, **config}), encoding="utf-8")
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return folder


def check(file: Path, source: Path | None) -> TemplateCheck:
    return check_template(file, source, Runner())


@needs_engine
def test_the_same_template_has_no_findings(tmp_path: Path) -> None:
    found = check(model(tmp_path, TEMPLATE), checkpoint(tmp_path / "source", TEMPLATE))
    assert found == TemplateCheck(
        (), ("the source's chat template (chat_template.jinja of source)", "llama.cpp's template engine")
    )


@pytest.fixture
def without_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(PUBLISH), "missing", lambda self: self.modules)


@pytest.mark.usefixtures("without_engine")
def test_a_changed_template_is_told_with_the_place_and_the_conversations(tmp_path: Path) -> None:
    changed = TEMPLATE.replace("tools | tojson", "tools | tojson(indent=1)").replace("assistant\n", "assistant")
    found = check(model(tmp_path, changed), checkpoint(tmp_path / "source", TEMPLATE))
    texts = [each.sentence() for each in found.findings]
    assert {each.kind for each in found.findings} == {"difference"}
    assert any("where the source's chat template has" in text and "(tools, a call of a tool)" in text for text in texts)
    assert any("several turns" in text and "a finished answer" not in text for text in texts)
    assert found.not_compared[0].startswith("llama.cpp's template engine: it is not installed. Install it with: pip install")


@pytest.mark.usefixtures("without_engine")
def test_another_bos_token_is_a_difference(tmp_path: Path) -> None:
    found = check(
        model(tmp_path, "{{ bos_token }}" + TEMPLATE),
        checkpoint(tmp_path / "x", "{{ bos_token }}" + TEMPLATE, bos_token="<bos>"),
    )
    assert ["'<s><s>user" in each.what and "'<bos><s>user" in each.what for each in found.findings[:1]] == [True]


@pytest.mark.usefixtures("without_engine")
def test_a_special_token_that_the_vocabulary_lacks(tmp_path: Path) -> None:
    found = check(model(tmp_path, TEMPLATE.replace("<s>assistant", "<|im_start|>assistant")), None)
    (token,) = found.findings
    assert (token.kind, "<|im_start|>, which is no token" in token.what) == ("token", True)
    assert "a finished answer" not in token.conversations


@pytest.mark.usefixtures("without_engine")
def test_templates_that_are_missing_or_broken(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "source", TEMPLATE)
    base = model(tmp_path, None, "base.gguf")
    assert check(base, None) == TemplateCheck()
    assert [each.kind for each in check(base, source).findings] == ["difference"]
    for number, (template, words) in enumerate(
        (
            ("{{ messages", "cannot be compiled"),
            (
                "{{ messages }}{{ raise_exception('never') }}",
                "renders none of 12 conversations: the template refuses it: never",
            ),
            ("rwkv-world", "cannot be used: it never uses `messages`"),
            ("{{ messages }}{% for i in range(99999999) %}{% endfor %}", "Range too big"),
        )
    ):
        (broken,) = check(model(tmp_path, template, f"{number}.gguf"), source).findings
        assert broken.kind == "broken"
        assert words in broken.what


@needs_engine
def test_what_llama_cpp_does_not_render_or_renders_otherwise(tmp_path: Path) -> None:
    """Integer division is not in its engine's grammar, and its dictionaries print as JSON."""
    (refused,) = check(model(tmp_path, TEMPLATE + "{{ 7 // 2 }}"), None).findings
    assert (refused.kind, refused.what.split(":")[0]) == ("engine", "llama.cpp does not render what transformers does")
    assert len(refused.conversations) == len(CONVERSATIONS)
    other = check(
        model(tmp_path, TEMPLATE.replace("call.function.arguments | tojson", "call.function.arguments"), "b.gguf"), None
    )
    assert [(each.kind, each.conversations) for each in other.findings] == [("engine", ("a call of a tool",))]


@needs_engine
def test_a_template_cannot_keep_llama_cpps_engine_for_ever() -> None:
    endless = "{{ messages }}{% for i in range(10000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}"
    (text,) = render(ChatTemplate(endless, "", "", "x"), [CONVERSATIONS[0].conversation], Runner(), in_llama_cpp=True)
    assert isinstance(text, Unrendered)
    assert text.why in (
        "llama.cpp's template engine does not render it: it takes too many steps or too much memory",
        "the template took longer than 10 s",
    )


@needs_engine
def test_published_templates_agree_but_for_known_differences(llama_models: Path) -> None:
    """A few of those that llama.cpp tests itself with; docs/publishing.md has the figures for all."""
    for name, conversations in {
        "meta-llama-Llama-3.1-8B-Instruct": [],
        "Qwen-Qwen3-0.6B": [],
        "google-gemma-2-2b-it": [],
        "LFM2.5-8B-A1B": [("thinking in an earlier answer",)],
    }.items():
        source = (llama_models / "templates" / f"{name}.jinja").read_text(encoding="utf-8")
        template = ChatTemplate(source, "<s>", "</s>", name)
        found = template_check._against_llama_cpp(template, Runner())
        assert [each.conversations for each in found] == conversations
