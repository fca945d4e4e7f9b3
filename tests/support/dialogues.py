"""Made-up dialogues as people's files hold them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from support.tiny_models import sample_text

WORDS = sample_text(4000, seed=7).split()

TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role not in ('system', 'user', 'assistant') %}"
    "{{ raise_exception('no such role: ' + message.role) }}"
    "{% endif %}"
    "{{ bos_token }}{{ message.role }}\n{{ message.content }}{{ eos_token }}\n"
    "{% endfor %}"
)
"""A template in the manner of ChatML, for models whose only control tokens are BOS and EOS."""


def dialogue(draw: random.Random, turns: int) -> dict[str, Any]:
    messages = [{"role": "system", "content": "You help in a pharmacy."}] if draw.random() < 0.3 else []
    for _ in range(turns):
        messages.append({"role": "user", "content": _words(draw, 5, 40)})
        messages.append({"role": "assistant", "content": _words(draw, 10, 90)})
    return {"messages": messages}


def dialogues(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """``count`` different dialogues of one to four turns."""
    draw = random.Random(seed)
    return [dialogue(draw, draw.randint(1, 4)) for _ in range(count)]


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def _words(draw: random.Random, least: int, most: int) -> str:
    return " ".join(draw.choices(WORDS, k=draw.randint(least, most))) + draw.choice((".", "?", "! 5 µg/kg", " – „Ωχ“ 你好"))
