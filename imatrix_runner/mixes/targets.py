"""What a mix is asked for: a size (``MIX@4GiB``, ``MIX@4.25bpw``, ``MIX@like:Q4_K_M``), a quality (``MIX@kld:0.02``), memory
to run in (``MIX@ram:64GiB,vram:24GiB``) or a speed on this machine (``MIX@speed:20``). Pure."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeAlias

from imatrix_runner.engines.levels import split_rounding
from imatrix_runner.engines.roundings import STOCK, Rounding
from imatrix_runner.errors import UsageError
from imatrix_runner.files import exact_bytes, parse_bytes

PREFIX = "MIX@"

_MOST_BITS = 32.0  # F32
_LEVEL = re.compile(r"[A-Z0-9_]+")
_NUMBER = re.compile(r"\d{1,15}(?:\.\d{1,25})?(?:e-\d{1,2})?")
_EXAMPLES = "For example: MIX@4GiB, MIX@4.25bpw, MIX@like:Q4_K_M, MIX@kld:0.02, MIX@ram:64GiB,vram:24GiB or MIX@speed:20"


@dataclass(frozen=True)
class SizeTarget:
    """The best file of at most ``n_bytes``."""

    n_bytes: int

    @property
    def spelling(self) -> str:
        return PREFIX + exact_bytes(self.n_bytes)


@dataclass(frozen=True)
class BitsTarget:
    """The best file with at most this many bits of tensor data per weight of the model."""

    bits_per_weight: float

    @property
    def spelling(self) -> str:
        return f"{PREFIX}{_shortest(self.bits_per_weight)}bpw"


@dataclass(frozen=True)
class LikeTarget:
    """The best file that is not larger than a stock ``level``, whose name may be unknown to llama.cpp."""

    level: str

    @property
    def spelling(self) -> str:
        return f"{PREFIX}like:{self.level}"


@dataclass(frozen=True)
class KldTarget:
    """The smallest file with at most this mean KLD, in nats."""

    kld: float

    @property
    def spelling(self) -> str:
        return f"{PREFIX}kld:{_shortest(self.kld)}"


@dataclass(frozen=True)
class MemoryTarget:
    """The best file that runs in this much memory, in bytes; 0 for what was not given."""

    ram: int
    vram: int

    @property
    def spelling(self) -> str:
        sizes = (("ram", self.ram), ("vram", self.vram))
        return PREFIX + ",".join(f"{name}:{exact_bytes(n_bytes)}" for name, n_bytes in sizes if n_bytes)


@dataclass(frozen=True)
class SpeedTarget:
    """The best file that generates this many tokens/s on this machine, by the measured times of types."""

    tokens_per_second: float

    @property
    def spelling(self) -> str:
        return f"{PREFIX}speed:{_shortest(self.tokens_per_second)}"


Target: TypeAlias = SizeTarget | BitsTarget | LikeTarget | KldTarget | MemoryTarget | SpeedTarget


def is_mix(name: str) -> bool:
    """Whether the name of a level asks for a mix. Its target may be wrong or missing."""
    return name.strip().upper().partition("@")[0] == PREFIX.rstrip("@")


def need_text(names: Iterable[str], rounding: Rounding = STOCK) -> bool:
    """Whether something of the levels with these names is chosen by measuring on the calibration text: the types of mixes, or a
    rounding that names or ``rounding``, of all levels, ask for."""
    return rounding != STOCK or any(is_mix(name) or split_rounding(name)[0] != STOCK for name in names)


def split_names(text: str) -> tuple[str, ...]:
    """The names of a comma-separated list of levels. The two sizes of ``MIX@ram:64GiB,vram:24GiB`` stay together."""
    names: list[str] = []
    for part in filter(None, map(str.strip, text.split(","))):
        if names and is_mix(names[-1]) and part.lower().startswith(("ram:", "vram:")):
            names[-1] += f",{part}"
        else:
            names.append(part)
    return tuple(names)


def mix_targets(names: Iterable[str]) -> tuple[Target, ...]:
    """The targets among the names of levels, each once. Raises :class:`UsageError` for one that is not understood."""
    return tuple(dict.fromkeys(parse_target(name) for name in names if is_mix(name)))


def require_stock(names: Iterable[str], cannot: str, why: str, todo: str) -> None:
    """Raise :class:`UsageError` if one of the names asks for a mix; ``cannot`` ends the sentence that begins with its name."""
    mixes = [name for name in names if is_mix(name)]
    if mixes:
        raise UsageError(f"{', '.join(mixes)} {cannot}", why, todo)


def parse_target(name: str) -> Target:
    """The target of a mix by its name, in any case. Raises :class:`UsageError` for one that is not understood."""
    wanted = name.strip().partition("@")[2].strip().lower()
    kind, colon, value = wanted.partition(":")
    try:
        if not wanted:
            raise ValueError("it does not say for which size or quality")
        if not colon:
            return _bits(wanted) if wanted.endswith("bpw") else SizeTarget(parse_bytes(wanted))
        if kind in ("ram", "vram"):
            return _memory(wanted)
        if kind == "like":
            return _like(value.strip().upper())
        if kind == "kld":
            return KldTarget(_positive(value, "a KLD such as 0.02"))
        if kind == "speed":
            return SpeedTarget(_positive(value, "a number of tokens per second such as 20"))
        raise ValueError(f"{kind!r} is not one of like, kld, ram, vram and speed")
    except ValueError as error:
        raise UsageError(f"Invalid mix {name!r}", str(error), _EXAMPLES) from None


def _bits(wanted: str) -> BitsTarget:
    bits = _positive(wanted.removesuffix("bpw"), "a number of bits such as 4.25bpw")
    if bits > _MOST_BITS:
        raise ValueError(f"no model has more than {_MOST_BITS:g} bits per weight")
    return BitsTarget(bits)


def _like(level: str) -> LikeTarget:
    if not _LEVEL.fullmatch(level):
        raise ValueError(f"{level!r} is not the name of a level such as Q4_K_M")
    return LikeTarget(level)


def _memory(wanted: str) -> MemoryTarget:
    sizes: dict[str, int] = {}
    for part in wanted.split(","):
        kind, _, size = part.strip().partition(":")
        if kind not in ("ram", "vram"):
            raise ValueError(f"{part.strip()!r} is not ram:SIZE or vram:SIZE")
        if kind in sizes:
            raise ValueError(f"{kind} is given twice")
        sizes[kind] = parse_bytes(size)
    return MemoryTarget(sizes.get("ram", 0), sizes.get("vram", 0))


def _positive(text: str, meant: str) -> float:
    number = float(text) if _NUMBER.fullmatch(text := text.strip()) else 0.0
    if not 0 < number < math.inf:
        raise ValueError(f"{text!r} is not {meant}")
    return number


def _shortest(number: float) -> str:
    """``4.0`` -> ``4``; else the fewest digits that give the same number again."""
    return repr(number).removesuffix(".0")
