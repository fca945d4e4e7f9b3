"""Secrets, and paths and names of this machine, are found before an upload, and the findings do not repeat them."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imatrix_runner.errors import InvalidDataError
from imatrix_runner.publish import secrets as scanning
from imatrix_runner.publish.secrets import (
    MOST_FINDINGS,
    LocalNames,
    local_names,
    refuse_findings,
    scan_file,
    scan_metadata,
    scan_text,
)
from support.tiny_models import write_llama_gguf

NOTHING = LocalNames((), ())
TAIL = "aB3dE5gH7jK9mN1pQ2rS4tU6vW8xY0zAbCdEfGh"
SECRETS = {
    "hf": f"hf_{TAIL}",
    "github": f"ghp_{TAIL}",
    "github fine-grained": f"github_pat_{TAIL}_{TAIL}",
    "gitlab": f"glpat-{TAIL[:20]}",
    "aws": "AKIA" + "IOSFODNN7EXAMPLE",
    "aws secret": f'aws_secret_access_key = "{TAIL}a"',
    "openai": f"sk-{TAIL}",
    "openai project": f"sk-proj-{TAIL}",
    "anthropic": f"sk-ant-{TAIL}",
    "google": f"AIza{TAIL[:35]}",
    "slack": f"xoxb-{TAIL[:12]}",
    "discord": f"https://discord.com/api/webhooks/1234567890/{TAIL}",
    "npm": f"npm_{TAIL}",
    "pypi": f"pypi-AgEI{TAIL}{TAIL}",
    "key": "-----BEGIN OPENSSH " + "PRIVATE KEY-----",
    "jwt": f"eyJ{TAIL}.eyJ{TAIL}.{TAIL}",
    "bearer": f"Authorization: Bearer {TAIL}",
    "address": f"https://me:{TAIL}@example.org/x",
}
HARMLESS = """
The task-force asked for hf_hub_download, sk-learn and a sk-ip; ghp_short and hf_transfer are no secrets.
sha256:fb513d1e998614ed98706fd8e3a
https://huggingface.co/ORG/NAME:Q4_K_M  https://example.org:8443/a  user@example.org  ~/.lmstudio/models/  ./home/x  https://x.org/home/a/b
llama-server -m Model-Q4_K_M.gguf  work/model/  C:/temp  Users/someone  Bearer of bad news  -----BEGIN CERTIFICATE-----
"""


@pytest.mark.parametrize("secret", SECRETS.values(), ids=SECRETS)
def test_secrets_are_found_and_never_repeated(secret: str) -> None:
    found = scan_text("card.md", f"line one\nsee '{secret}' here\n", NOTHING)
    assert {(each.place, each.kind) for each in found} == {("line 2", "secret")}
    with pytest.raises(InvalidDataError) as refused:
        refuse_findings(found)
    assert secret not in f"{refused.value.what}{refused.value.why}{refused.value.todo}{found}"


def test_harmless_texts_are_left_alone() -> None:
    assert scan_text("card.md", HARMLESS, local_names()) == ()


@pytest.mark.parametrize(
    "text",
    [
        "/home/me/models/x.gguf",
        "/Users/me/x",
        "C:\\Users\\me\\x",
        "C:\\\\Users\\\\me",
        "file:///home/me/x",
        "/root/x",
    ],
)
def test_paths_in_home_folders_are_found(text: str) -> None:
    found = scan_text("card.md", f"-m {text} -f", NOTHING)
    assert [each.kind for each in found] == ["path"]


def test_folders_of_this_machine_and_secrets_it_holds(tmp_path: Path) -> None:
    local = local_names(
        tmp_path, secrets=["the-secret-of-the-login"], env={"MY_API_KEY": "k" * 20, "GIT_AUTHOR_NAME": "A. Person"}
    )
    text = f"{tmp_path}/x\n{'k' * 20}\nthe-secret-of-the-login\nA. Person\n{tmp_path}-other"
    assert [(each.place, each.kind) for each in scan_text("a", text, local)] == [
        ("line 3", "secret"),
        ("line 2", "secret"),
        ("line 1", "path"),
    ]


def test_names_are_remarks() -> None:
    found = scan_text("a", "made on Wendelstein by wendel", LocalNames((), ("wendelstein",)))
    assert [each.kind for each in found] == ["name"]
    refuse_findings(found)


def test_metadata_of_a_model(tmp_path: Path) -> None:
    template = "{{ messages }} in /home/assistant/work, never " + SECRETS["hf"]
    values = {"general.description": f"from {tmp_path}/x", "general.url": "/home/me/x", "tokenizer.chat_template": template}
    path = write_llama_gguf(tmp_path / "m.gguf", metadata=values)
    found = scan_file(path, "m.gguf", local_names(tmp_path))
    assert {(each.place, each.kind) for each in found} == {
        ("metadata general.description", "path"),
        ("metadata general.url", "path"),
        ("metadata tokenizer.chat_template", "secret"),
    }
    assert [each.place for each in scan_metadata("m", {"a": ("x", SECRETS["hf"], 3)}, NOTHING)] == ["metadata a"]


def test_files_are_read_in_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies across two windows is found, once, with its line."""
    monkeypatch.setattr(scanning, "_WINDOW", 10_000)
    for before in (9_985, 9_999, 10_000, 15_000):
        path = tmp_path / "log.txt"
        path.write_text("\n" * before + SECRETS["hf"] + "\nüö\n" * 9_000)
        assert [(each.place, each.kind) for each in scan_file(path, "log", NOTHING)] == [(f"line {before + 1}", "secret")]


def test_findings_are_bounded(tmp_path: Path) -> None:
    path = tmp_path / "log.txt"
    path.write_text(f"{SECRETS['hf']}\n" * 1000)
    found = scan_file(path, "log", NOTHING)
    assert len(found) == MOST_FINDINGS
    with pytest.raises(InvalidDataError, match="and 45 more"):
        refuse_findings(found)


@given(st.text(max_size=400), st.text(max_size=400))
def test_a_token_in_any_text(before: str, after: str) -> None:
    found = scan_text("a", f"{before} {SECRETS['hf']} {after}", NOTHING)
    assert any(each.what == "a Hugging Face token" for each in found)
