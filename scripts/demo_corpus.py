"""The texts of the demo model: what it was trained on and what it never saw, from this Python's standard library."""

from __future__ import annotations

import ast
import hashlib
import sysconfig
from collections.abc import Container
from pathlib import Path

# Not library code that people read: installed packages, test data, IDLE, demos,
# the lib2to3 fixer machinery, and the tables of character sets.
SKIP_DIRS = {"site-packages", "dist-packages", "test", "tests", "idlelib"}
SKIP_DIRS |= {"turtledemo", "lib2to3", "encodings"}
MAX_FILE_CHARS = 160_000  # no single file may dominate
MIN_PROSE_CHARS = 200


def prose_of(tree: ast.Module) -> str:
    """All docstrings of a module, in source order, as plain text."""
    kinds = ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef
    found: list[tuple[int, str]] = []
    for node in ast.walk(tree):
        text = ast.get_docstring(node) if isinstance(node, kinds) else None
        if text and len(text) > 40:
            found.append((getattr(node, "lineno", 0), text))
    return "\n\n".join(text for _, text in sorted(found))[:MAX_FILE_CHARS]


def read_corpus(shares: Container[int] = range(1, 50)) -> tuple[list[str], str]:
    """The training documents, and the held-out text, in a fixed order.

    A hash of their path deals files into fifty shares; share 0 is held out, and
    the documents are those of ``shares``.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    sources, prose, held_out = list[str](), list[str](), list[str]()
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        share = int(hashlib.sha256(name.encode()).hexdigest(), 16) % 50
        if SKIP_DIRS & set(name.split("/")) or (share and share not in shares):
            continue
        try:
            text = path.read_text(encoding="utf-8")
            tree = ast.parse(text)
        except (UnicodeDecodeError, SyntaxError, ValueError):
            continue
        if name == "pydoc_data/topics.py":
            # The language reference, as one dictionary: take its values (real
            # English) rather than their quoted and escaped source form.
            prose += [str(n.value) for n in ast.walk(tree) if isinstance(n, ast.Constant)]
            continue
        text = text[:MAX_FILE_CHARS].strip() + "\n"
        if share == 0:
            held_out.append(text)
        elif len(text) >= 100:
            sources.append(text)
            prose.append(prose_of(tree) + "\n")
    prose = [document for document in prose if len(document) >= MIN_PROSE_CHARS]
    # No final newline: the llama.cpp tools drop one when they read a file.
    return sources + prose, "\n".join(held_out).rstrip("\n")
