"""Typed damage for documents that another program may have written: every value becomes what no writer would put there.

Bytes that are flipped at random rarely leave a document that a parser accepts; these all parse (or nearly), so what reads the
values behind the parser is tried too. Everything follows from the seed.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from typing import Any

DEEP = "\0deep\0"
"""Stands for a list nested thousands deep; :func:`as_json` writes it out."""

VALUES: tuple[Any, ...] = (
    None,
    True,
    0,
    -1,
    2**63,
    10**40,
    1.5,
    -1e308,
    float("nan"),
    float("inf"),
    "",
    "x",
    "\ud800",
    "a\0b",
    "\x1b[2J\u202e\n",
    "../../x",
    "/etc/passwd",
    "999999999999999999999999",
    "nan",
    [],
    [[]],
    {},
    {"": None},
    DEEP,
)


def as_json(value: Any) -> bytes:
    """JSON as Python writes it: with NaN, Infinity and lone surrogates."""
    text = json.dumps(value, ensure_ascii=True)
    return text.replace(json.dumps(DEEP), "[" * 5000 + "]" * 5000).encode("ascii")


def typed_mutations(document: Any, seed: int, count: int) -> Iterator[tuple[str, bytes]]:
    """``count`` damaged copies of a JSON document, each with a description of the damage."""
    draw = random.Random(seed)
    places = list(_places(document))
    for number in range(count):
        if number % 10 == 9:
            whole = as_json(document)
            at = draw.randrange(len(whole))
            yield f"cut at {at}", whole[:at]
            continue
        place = draw.choice(places)
        damaged = copy.deepcopy(document)
        kind = draw.choice(("value", "value", "value", "value", "missing", "renamed", "twice"))
        yield f"{kind} at {place}: {_damage(damaged, place, kind, draw)!r}", as_json(damaged)


def _places(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if place:
        yield place
    for key, child in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from _places(child, (*place, key))


def _damage(document: Any, place: tuple[Any, ...], kind: str, draw: random.Random) -> Any:
    *above, key = place
    holder = document
    for step in above:
        holder = holder[step]
    put = draw.choice(VALUES)
    if kind == "missing":
        del holder[key]
        return None
    if kind == "renamed" and isinstance(holder, dict):
        name = draw.choice([value for value in VALUES if isinstance(value, str) and value != DEEP])
        holder[name] = holder.pop(key)
        return name
    if kind == "twice" and isinstance(holder, list):
        holder.insert(key, holder[key])
        return holder[key]
    holder[key] = put
    return put
