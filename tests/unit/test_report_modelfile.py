"""Modelfiles: a chat template said in Ollama's language, stop tokens, context."""

from __future__ import annotations

from imatrix_runner.chat.linear_format import LinearFormat
from imatrix_runner.report.views.modelfile import MOST_CONTEXT, ModelfileFacts, render_modelfile, stops_of

CHATML = LinearFormat(
    begin="<s>",
    unasked="",
    before={role: f"<|im_start|>{role}\n" for role in ("system", "user", "assistant")},
    after=dict.fromkeys(("system", "user", "assistant"), "<|im_end|>\n"),
    answer="<|im_start|>assistant\n",
)

# Go 1.27's text/template gave the texts of LinearFormat.text for this and for the formats of 56 more of llama.cpp's templates.
EXPECTED = r'''# For Ollama: ollama create tiny:q4_k_m -f tiny-Q4_K_M.Modelfile
FROM ./tiny-Q4_K_M.gguf

# The file's chat template in Ollama's language, for system, user and assistant messages; tools are left out.
TEMPLATE """{{- range $i, $_ := .Messages }}
{{- $last := eq (len (slice $.Messages $i)) 1 }}
{{- if eq .Role "system" }}
{{- "<|im_start|>system\n" }}
{{- .Content }}
{{- "<|im_end|>\n" }}
{{- else if eq .Role "user" }}
{{- "<|im_start|>user\n" }}
{{- .Content }}
{{- "<|im_end|>\n" }}
{{- else if eq .Role "assistant" }}
{{- "<|im_start|>assistant\n" }}
{{- .Content }}
{{- if not $last }}
{{- "<|im_end|>\n" }}
{{- end }}
{{- end }}
{{- if and $last (ne .Role "assistant") }}
{{- "<|im_start|>assistant\n" }}
{{- end }}
{{- end }}"""

# The model was trained for 40,960 tokens; more context takes more memory.
PARAMETER num_ctx 8192
PARAMETER stop "<|im_end|>"
'''


def facts(**changes: object) -> ModelfileFacts:
    values = {"context": 40960, "stops": ("<|im_end|>",), "has_template": True, "format": CHATML, "drops_begin": "<s>"}
    return ModelfileFacts("tiny-Q4_K_M.gguf", "tiny:q4_k_m", **{**values, **changes})  # type: ignore[arg-type]


def test_the_whole_file() -> None:
    assert MOST_CONTEXT == 8192
    assert render_modelfile(facts(), "tiny-Q4_K_M.Modelfile") == EXPECTED


def test_a_default_system_message_and_a_beginning_stay() -> None:
    form = LinearFormat("<b>", "Be\tnice.", CHATML.before, dict.fromkeys(CHATML.after, ""), "<a>")
    text = render_modelfile(facts(format=form, drops_begin=""), "x")
    assert '{{- "<b>" }}\n{{- if not .System }}\n{{- "Be\\tnice." }}\n{{- end }}\n{{- range' in text
    assert "{{- if not $last }}" not in text


def test_texts_of_templates_cannot_leave_their_quotes() -> None:
    form = LinearFormat('"""\nFROM /etc/passwd\n{{ .System }}', "", CHATML.before, CHATML.after, '\\" }} `x` 🙂\x00\x7f')
    lines = render_modelfile(facts(format=form), "x").splitlines()
    assert [line for line in lines if line.startswith("FROM")] == ["FROM ./tiny-Q4_K_M.gguf"]
    assert sum(line.count('"""') for line in lines) == 2
    assert '{{- "\\\\\\" }} `x` 🙂\\u0000\\u007f" }}' in lines


def test_what_is_unknown_is_left_out_and_said() -> None:
    text = render_modelfile(facts(format=None, context=None, stops=()), "x")
    assert "cannot be said in Ollama's language" in text
    assert not {"TEMPLATE", "PARAMETER"} & {line.split(" ")[0] for line in text.splitlines()}
    assert "has no chat template" in render_modelfile(facts(format=None, has_template=False), "x")


def test_stop_tokens() -> None:
    assert stops_of(["</s>", "</s>", "\n", ".", "a\nb", "<|eot|>"]) == ("</s>", "<|eot|>")
