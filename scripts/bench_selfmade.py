"""An imatrix from a model's own answers against one from the shipped text, on chats of other prompts.

Runs inside the checkout's ``.venv``. The source answers a third of the shipped prompts, greedily and drawn, and others, a
sixth of them, for the held-out chats. Both matrices see as many chunks. Levels of both are measured on the held-out chats and
on the shipped prose. (A text to measure on is read as plain text: marks of the chat template are not control tokens there.)
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench_sources import source

from imatrix_runner.resources import HELD_OUT_TEXT, SELF_PROMPTS, resource


def ours(*words: str | Path, folder: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "imatrix_runner", *map(str, words), "--json", "-q"]
    done = subprocess.run(command, cwd=folder, check=True, stdout=subprocess.PIPE)
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2", help="demo has no chat template; smollm2 comes from the package index")
    parser.add_argument("--levels", default="IQ3_XXS,Q3_K_M")
    parser.add_argument("--chunks", type=int, default=32, help="chunks of 512 tokens for each imatrix")
    parser.add_argument("--measured", type=int, default=12, help="chunks that levels are measured on")
    parser.add_argument(
        "--every", type=int, default=3, help="calibrate with every Nth prompt, measure on every 2Nth of the others"
    )
    parser.add_argument("--texts", default="chats,prose", help="what levels are measured on")
    parser.add_argument("--predict", type=int, default=96)
    options = parser.parse_args()
    model, began = source(options.model), time.monotonic()
    lines = resource(SELF_PROMPTS).read_text(encoding="utf-8").splitlines(keepends=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file, kept in (("train.jsonl", lines[:: options.every]), ("test.jsonl", lines[1 :: 2 * options.every])):
            (folder / file).write_text("".join(kept), encoding="utf-8")
        build = ("calibration", "build", "--model", model, "--predict", str(options.predict))
        ours(*build, "--self", "train.jsonl", "--evaluation", "test.jsonl", "-o", "own.txt", folder=folder)
        ours(*build, "--self", "test.jsonl", "--seed", "2", "--sampled", "0", "-o", "chats.txt", folder=folder)
        print(f"{model.name}: answers after {time.monotonic() - began:.0f} s", flush=True)
        found: dict[str, dict[str, Any]] = {}
        for kind, text in (("own answers", ("-f", "own.txt")), ("shipped text", ())):
            place = folder / kind.replace(" ", "-")
            words = ("run", model, *text, "--chunks", str(options.chunks), "--levels", options.levels, "--work-dir", place)
            made = ours(*words, folder=folder)
            chunks = made["imatrix"]["chunks"]
            texts = {"chats": folder / "chats.txt", "prose": resource(HELD_OUT_TEXT)}
            for on in options.texts.split(","):
                held_out = texts[on]
                measure = ("evaluate", model, "--text", held_out, "--chunks", str(options.measured), "--work-dir", place)
                for level, figures in ours(*measure, folder=folder)["measured"]["levels"].items():
                    found.setdefault(f"{level:8} on {on}", {})[kind] = figures["kld"]
            print(f"{kind}: imatrix of {chunks} chunks; measured after {time.monotonic() - began:.0f} s", flush=True)
        for row, kinds in sorted(found.items()):
            cells = "  ".join(f"{kind} {kld['value']:.4f} ± {kld['error']:.4f}" for kind, kld in kinds.items())
            print(f"{row}  {cells}  ratio {kinds['own answers']['value'] / kinds['shipped text']['value']:.3f}")


if __name__ == "__main__":
    main()
