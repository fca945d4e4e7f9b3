"""The file of a mix is one as any other for llama.cpp: its rows are valid, its programs measure it, and it writes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from imatrix_runner.engines.embedded.bindings import LIBRARY_VARIABLE
from imatrix_runner.mixes.mix_recipe import read_recipe
from imatrix_runner.models.gguf_file import read_header
from support.command_line import clean_environment, run_command
from support.llama_tools import BareTools
from support.perplexity_tools import perplexity_of

WRITE = """
import json, sys
from llama_cpp import Llama
model = Llama(model_path=sys.argv[1], n_ctx=128, n_threads=1, n_threads_batch=1, verbose=False)
written = []
for token in model.generate(model.tokenize(b"The keeper writes"), temp=0.0):
    written.append(token)
    if len(written) == 12:
        break
print(json.dumps({"tokens": written, "vocabulary": model.n_vocab(), "file_type": model.metadata["general.file_type"]}))
"""
"""What llama-cli does, by the library itself: load a file, and continue a text."""


@pytest.fixture(scope="module")
def mix(tiny_model: Path, tiny_imatrix: Path, tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mix")
    types = ("--types", "k,iq3_s,iq4_xs,q5_0", "-c", "128", "--verify", "full", "--engine", "embedded")
    done = run_command("run", tiny_model, "--imatrix", tiny_imatrix, "-f", tiny_text, "--size", "760KiB", *types, cwd=folder)
    assert done.code == 0, done.err
    (file,) = (folder / "work" / "tiny").glob("tiny-MIX-*.gguf")
    return file


def test_every_row_was_checked(mix: Path) -> None:
    """By ggml's own validation, on the disk; and there is something to mix."""
    name = mix.stem.removeprefix("tiny-")
    assert '"type":"checked"' in (mix.parent / "logs" / f"level-{name}.log").read_text(encoding="utf-8")
    types = read_recipe(mix.with_suffix(".recipe.json")).types
    found = {tensor.name: tensor.type_name for tensor in read_header(mix).tensors}
    assert {name: found[name] for name in types} == types
    assert len(set(types.values())) > 2


def test_llama_perplexity_measures_it(mix: Path, tools: BareTools, tiny_model: Path, tiny_text: Path) -> None:
    source, mixed = (
        perplexity_of(tools.toolchain, model, tiny_text, "-c", "128", "--chunks", "6") for model in (tiny_model, mix)
    )
    assert mixed == pytest.approx(source, rel=0.1)


def test_the_library_writes_with_it(mix: Path, tools: BareTools) -> None:
    env = clean_environment({LIBRARY_VARIABLE: str(tools.toolchain.directory)})
    done = subprocess.run([sys.executable, "-c", WRITE, mix], capture_output=True, env=env, check=False, timeout=120)
    assert done.returncode == 0, done.stderr.decode()
    written = json.loads(done.stdout)
    assert len(written["tokens"]) == 12
    assert all(0 <= token < written["vocabulary"] for token in written["tokens"])
    assert int(written["file_type"]) == read_header(mix).integer("general.file_type")
