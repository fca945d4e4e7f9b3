"""Scripts that put no spaces between words, as ranges of code points: where a text has no words to count, its characters count.

Korean is not among them: it separates words by spaces. Source: the blocks of the Unicode Standard.
"""

from __future__ import annotations

UNSPACED: tuple[tuple[int, int], ...] = (
    (0x0E00, 0x0E80),  # Thai
    (0x0E80, 0x0F00),  # Lao
    (0x0F00, 0x1000),  # Tibetan: a mark ends each syllable
    (0x1000, 0x10A0),  # Burmese
    (0x1780, 0x1800),  # Khmer
    (0x3005, 0x3008),  # iteration mark and numeral zero of Chinese and Japanese
    (0x3040, 0x3100),  # hiragana, katakana
    (0x31F0, 0x3200),  # small katakana
    (0x3400, 0x4DC0),  # Chinese characters, extension A
    (0x4E00, 0xA000),  # Chinese characters
    (0xF900, 0xFB00),  # Chinese characters, compatibility
    (0xFF66, 0xFFA0),  # half-width katakana
    (0x20000, 0x40000),  # Chinese characters, further extensions
)
"""Ranges: the first code point, and the one after the last."""


def is_unspaced(character: str) -> bool:
    """Whether a character belongs to a script without spaces between words."""
    return any(first <= ord(character) < end for first, end in UNSPACED)


def character_class() -> str:
    """Return the ranges for use between the brackets of a regular expression."""
    return "".join(f"{chr(first)}-{chr(end - 1)}" for first, end in UNSPACED)
