"""``scripts/bench calibration``: what the shipped text is worth. Levels of the demo model with matrices from all of it, from
half of it and from random words; their KL divergence from the BF16 model on two texts that it never saw: files of the standard
library that its training left out (what it is good at), and the shipped held-out text (of the kinds that the matrix saw).

``every second passage`` and the others are two halves, alike in what they are about; ``first half`` and ``second half`` are
not. ``random words`` are the text's own words in a random order, as many bytes. Each text stands for the mean of its matrix and
of four that are shaken by 1 % in every column, so that the luck of rounding averages out. ``more`` is the difference to the
whole text, ``s.e.`` that in standard errors: of the held-out text (all are measured on the same chunks, so from chunk to chunk)
and of the luck.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import sys
import tempfile
import zlib
from collections.abc import Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from bench_convergence import Bench, Made, Text, average
from demo_corpus import read_corpus

from imatrix_runner.calibration.parts import parse_parts
from imatrix_runner.resources import CALIBRATION_TEXT, HELD_OUT_TEXT, resource
from imatrix_runner.toolchain.locate import locate, require
from imatrix_runner.toolchain.store import cache_dir
from support.divergence import Divergence
from support.llama_tools import BareTools

LEVELS = ("Q2_K", "IQ2_XXS", "IQ2_XS", "IQ3_XXS")
WHOLE = "shipped text"


def texts(whole: str) -> Mapping[str, str]:
    """The text, and texts to compare it with, by name."""
    passages = [passage for part in parse_parts(whole) for passage in part.text.split("\n\n") if passage.strip()]
    words = whole.split()
    random.Random(1).shuffle(words)  # noqa: S311 - no secret
    middle = half(passages)
    return {
        WHOLE: whole,
        "every second passage": "\n\n".join(passages[::2]),
        "the other passages": "\n\n".join(passages[1::2]),
        "every 8th passage": "\n\n".join(passages[::8]),
        "every 32nd passage": "\n\n".join(passages[::32]),
        "first half": "\n\n".join(passages[:middle]),
        "second half": "\n\n".join(passages[middle:]),
        "random words": " ".join(words),
    }


def half(passages: list[str]) -> int:
    """How many passages hold half the bytes."""
    sizes = [len(passage.encode()) for passage in passages]
    return next(count for count in range(len(sizes)) if 2 * sum(sizes[:count]) >= sum(sizes))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--levels", default=",".join(LEVELS))
    parser.add_argument("--chunks", type=int, default=80, help="of held-out source code, at most")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    tools = BareTools(require(locate(None, env=os.environ, cache=cache_dir())))
    whole = resource(CALIBRATION_TEXT).read_text(encoding="utf-8")
    for name, text in (("all of it", whole), *((part.name, part.text) for part in parse_parts(whole))):
        data = text.encode()
        print(f"{name:20} {len(data):7} bytes, zlib {len(data) / len(zlib.compress(data, 9)):.2f}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        library = folder / "library.txt"
        library.write_text(read_corpus(())[1][: 1150 * options.chunks], encoding="utf-8")
        made: dict[str, list[Made]] = {}
        for held_out in (library, resource(HELD_OUT_TEXT)):
            place = folder / held_out.stem
            place.mkdir()
            bench = Bench(tools, place, options.workers, options.levels.split(","))
            bench.keep_base(held_out)
            items = texts(whole).items()
            made = made or dict(zip(texts(whole), bench.at_once(*((group, bench, *item) for item in items)), strict=True))
            bench.measure(item for group_ in made.values() for item in group_)
            print(f"\nmeasured on {held_out.name}", end="")
            show(bench, made)


def group(bench: Bench, name: str, content: str) -> list[Made]:
    """The matrix of a text, and shaken ones."""
    path = bench.folder / f"{name.replace(' ', '-')}.txt"
    path.write_text(content + "\n", encoding="utf-8")
    out, facts = bench.generate(Text(path, 512), "all")
    first = Made(name, out, facts["chunks"])
    return [first, *bench.shaken(first)]


def show(bench: Bench, made: Mapping[str, list[Made]]) -> None:
    levels = bench.levels
    print(
        f"\n{'matrix from':22} {'chunks':>6}  " + " ".join(f"{level + ' KLD':>13} {'more':>7} {'s.e.':>5}" for level in levels)
    )
    found = {name: {level: [bench.of(item, level) for item in items] for level in levels} for name, items in made.items()}
    for name, items in made.items():
        told = f"{name:22} {items[0].chunks:6}  "
        for level in levels:
            here, base = average(found[name][level]), average(found[WHOLE][level])
            more, error = here.minus(base)
            errors = more / math.hypot(error, spread(found[name][level]), spread(found[WHOLE][level])) if name != WHOLE else 0.0
            told += f" {here.mean:13.6f} {100 * more / base.mean:+6.2f}% {errors:+5.1f}"
        print(told, flush=True)


def spread(group: list[Divergence]) -> float:
    """The standard error of the mean of matrices that are as good as each other."""
    means = [one.mean for one in group]
    middle = sum(means) / len(means)
    return math.sqrt(sum((mean - middle) ** 2 for mean in means) / (len(means) - 1) / len(means))


if __name__ == "__main__":
    main()
