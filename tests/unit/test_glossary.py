"""One word, one meaning (docs/glossary.md): names of modules and classes are unique, and words that were replaced stay away."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import imatrix_runner

PACKAGE = Path(imatrix_runner.__file__).parent
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.name not in ("__init__.py", "__main__.py"))

SHARED_NAMES = {"engine": {"engines/binaries", "engines/embedded"}}
"""Modules that may have a name in common, by folder; so may a command and what it does."""

REPLACED = re.compile(r"yardstick|twin|judg|seat|stranger|scoring|whoever|somebody")
"""How a part of a name may not begin."""
KEPT = {
    "without_twin": "a field of report.json",
}


def room(path: Path) -> str:
    return path.parent.relative_to(PACKAGE).as_posix()


def names(tree: ast.Module) -> Iterator[str]:
    """What a module names itself: classes, functions, parameters, variables, fields."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node.name
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id


def parts(name: str) -> list[str]:
    """``read_TokenScores2`` -> read, token, scores."""
    return [part.lower() for part in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)]


def is_replaced(name: str) -> bool:
    return name not in KEPT and any(REPLACED.match(part) for part in parts(name))


def test_no_module_name_is_taken_twice() -> None:
    rooms: dict[str, set[str]] = defaultdict(set)
    for path in MODULES:
        rooms[path.stem].add(room(path))
    twice = {name: where for name, where in rooms.items() if len(where) > 1 and where != SHARED_NAMES.get(name)}
    assert {name: where for name, where in twice.items() if where != {"app", "cli/commands"}} == {}


def test_no_class_name_is_taken_twice() -> None:
    rooms: dict[str, list[str]] = defaultdict(list)
    for path in MODULES:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                rooms[node.name].append(f"{room(path)}/{path.name}")
    assert {name: where for name, where in rooms.items() if len(where) > 1} == {}


def test_no_name_holds_a_word_that_was_replaced() -> None:
    found = {
        f"{room(path)}/{path.name}: {name}"
        for path in MODULES
        for name in (path.stem, *names(ast.parse(path.read_text(encoding="utf-8"))))
        if is_replaced(name)
    }
    assert found == set()


def test_the_check_sees_a_word_wherever_it_stands_in_a_name() -> None:
    assert all(map(is_replaced, ("twins", "judge_level", "TheYardstick", "_seats")))
    assert not any(map(is_replaced, ("without_twin", "adjudge", "between", "Baselines")))
