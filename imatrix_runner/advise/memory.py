"""Memory that running a level takes: its weights, its context, and how much of both fits on a GPU.

Computed from the model's metadata as llama.cpp does (src/llama-kv-cache.cpp, src/llama-memory-recurrent.cpp,
src/llama-hparams.cpp); tests compare the result with what llama.cpp allocates. If the metadata is not sufficient, the result is
an upper bound or unknown, and marked as such.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from imatrix_runner.files import human_bytes
from imatrix_runner.models.gguf_file import padded
from imatrix_runner.models.model import Model
from imatrix_runner.quantize.recipe import RecipeTensor

SPARE_BYTES = 1 << 30
"""Left free on every device for compute buffers and other programs.

Measured with llama.cpp 0c1e570 (no_alloc, ``-ub 512``, flash attention): compute buffers of 120 to 670 MiB for models shaped
like Mistral-7B, Llama-3-8B, Qwen3-30B-A3B, Gemma-3-27B and Llama-3-70B, at contexts of 4,096 to 131,072. Without flash
attention they grow with the context (8B: 308 MiB at 4,096, 2.1 GiB at 32,768).
"""

UBATCH = 512
"""llama.cpp's default ``-ub``: the cache of a sliding window holds this many tokens more than the window."""

_PAD = 256  # llama_context and llama_kv_cache_iswa round to it
_F16, _F32 = 2, 4
_MOST_LAYERS = 512  # LLAMA_MAX_LAYERS
_MOST_BYTES = 1 << 60
_RECURRENT = ("ssm_", "shortconv.", "time_mix_")
_UNLIKE = ("indexer.", "compress_ratios")
_BLOCK = re.compile(r"blk\.(\d+)\.(.+)")

Certainty = Literal["exact", "about", "at most", "unknown"]
Place = Literal["GPU", "GPU and RAM", "RAM", "nowhere"]


@dataclass(frozen=True)
class ContextMemory:
    """Memory of a context of ``n_ctx`` tokens for one conversation: K and V of attention in F16, state of recurrent layers in
    F32. ``layers``: bytes of each layer, empty if ``unknown``; ``note``: why the figure is not exact."""

    n_ctx: int
    layers: tuple[int, ...]
    certainty: Certainty
    note: str = ""

    @property
    def n_bytes(self) -> int | None:
        return None if self.certainty == "unknown" else sum(self.layers)

    def describe(self) -> str:
        """The size with its certainty: ``512 MiB``, ``about 512 MiB``, ``not known``."""
        if self.n_bytes is None:
            return "not known"
        return human_bytes(self.n_bytes) if self.certainty == "exact" else f"{self.certainty} {human_bytes(self.n_bytes)}"


@dataclass(frozen=True)
class Budget:
    """Memory to run in, in bytes; ``vram`` of each GPU."""

    ram: int
    vram: tuple[int, ...] = ()

    @property
    def gpu(self) -> int:
        """Bytes that all GPUs hold together, less what is left free on each."""
        return sum(max(0, n_bytes - SPARE_BYTES) for n_bytes in self.vram)


@dataclass(frozen=True)
class MemoryFit:
    """Where a level runs. ``n_bytes``: weights, context and spare memory together; ``n_gpu_layers``: the largest ``-ngl`` that
    fits, of ``n_layers`` (the output layer counts as one). ``reason`` holds the figures."""

    place: Place
    n_bytes: int
    n_gpu_layers: int
    n_layers: int
    reason: str


def context_memory(model: Model, n_ctx: int) -> ContextMemory:
    """Memory that llama.cpp allocates for a context of ``n_ctx`` tokens, in addition to the weights."""
    facts = _Facts(model)
    n_layers = model.n_layers or 0
    if not 0 < n_layers <= _MOST_LAYERS:
        return ContextMemory(n_ctx, (), "unknown", "the metadata does not give a usable number of layers")
    if any(key.startswith(f"{model.architecture}.attention.{part}") for key in model.header.metadata for part in _UNLIKE):
        return ContextMemory(n_ctx, (), "unknown", f"{model.architecture} keeps more than keys and values for its context")
    heads = facts.per_layer("attention.head_count_kv", n_layers) or facts.per_layer("attention.head_count", n_layers)
    key, value = facts.head_sizes()
    if heads is None or key is None or value is None:
        return ContextMemory(n_ctx, (), "unknown", "the metadata does not give the sizes of its attention")
    cells = padded(n_ctx, _PAD)
    window = facts.integer("attention.sliding_window")
    slides = _slides(model.header.metadata.get(f"{model.architecture}.attention.sliding_window_pattern"), n_layers)
    layers = []
    for number, kv in enumerate(heads):
        here = min(cells, padded(window + UBATCH, _PAD)) if window and slides and slides[number] else cells
        attention = _F16 * here * kv * (key + value) if facts.attends(number) else 0
        layers.append(attention + (_F32 * facts.state() if number in facts.recurrent else 0))
    if sum(layers) > _MOST_BYTES:
        return ContextMemory(n_ctx, (), "unknown", "the metadata describes a context that no machine could hold")
    return ContextMemory(n_ctx, tuple(layers), *_certainty(facts, window, slides))


def _certainty(facts: _Facts, window: int, slides: Sequence[bool] | None) -> tuple[Certainty, str]:
    if window and slides is None:
        return "at most", f"some layers may keep only the last {window:,} tokens; which ones only llama.cpp knows"
    if window:
        return "about", f"some layers keep only the last {window:,} tokens"
    if facts.integer("attention.shared_kv_layers") or facts.integer("nextn_predict_layers"):
        return "at most", "some layers share the keys and values of others, or are not used"
    if facts.recurrent and any(facts.attends(number) for number in range(facts.n_layers)):
        return "about", "recurrent layers and attention are mixed"
    return "exact", ""


def _slides(pattern: object, n_layers: int) -> list[bool] | None:
    """Which layers have a sliding window; None if unknown. ``pattern``: a flag for each layer, or ``n``: every nth layer sees
    the whole context."""
    if isinstance(pattern, tuple) and len(pattern) >= n_layers:
        return [bool(item) for item in pattern[:n_layers]]
    if isinstance(pattern, int) and not isinstance(pattern, bool) and pattern > 0:
        return [number % pattern < pattern - 1 for number in range(n_layers)]
    return None


class _Facts:
    """Metadata and tensor names of one model, with bounds: the file is untrusted."""

    def __init__(self, model: Model) -> None:
        self._header, self._architecture = model.header, model.architecture
        self.n_layers = min(model.n_layers or 0, _MOST_LAYERS)
        self._parts: dict[int, set[str]] = defaultdict(set)
        for tensor in model.tensors:
            if match := _BLOCK.match(tensor.name):
                self._parts[int(match[1])].add(match[2])
        self.recurrent = {number for number, names in self._parts.items() if any(map(_is_recurrent, names))}

    def integer(self, key: str) -> int:
        """A non-negative integer of the metadata; 0 if it is missing."""
        return max(0, self._header.integer(f"{self._architecture}.{key}") or 0)

    def per_layer(self, key: str, n_layers: int) -> list[int] | None:
        value = self._header.metadata.get(f"{self._architecture}.{key}")
        if isinstance(value, tuple) and len(value) >= n_layers and all(isinstance(item, int) for item in value):
            return [max(0, item) for item in value[:n_layers]]
        number = self._header.integer(f"{self._architecture}.{key}")
        return [max(0, number)] * n_layers if number is not None else None

    def head_sizes(self) -> tuple[int | None, int | None]:
        """Elements of a key and of a value in one head. With MLA values take none: they are computed from the keys."""
        heads = self.per_layer("attention.head_count", 1)
        if heads is None:
            return None, None
        share = self.integer("embedding_length") // heads[0] if heads[0] else 0
        key = self.integer("attention.key_length") or share
        if self.integer("attention.key_length_mla") and self.integer("attention.value_length_mla"):
            return key, 0
        return key, self.integer("attention.value_length") or share

    def attends(self, number: int) -> bool:
        """Whether a layer has keys and values, and not only a recurrent state."""
        return number not in self.recurrent or "attn_k.weight" in self._parts[number]

    def state(self) -> int:
        """Elements of a recurrent layer's state: ``n_embd_r() + n_embd_s()`` of llama-hparams.cpp."""
        width = self.integer("embedding_length")
        if wkv := self.integer("wkv.head_size"):
            return (self.integer("token_shift_count") or 2) * width + width * wkv
        if cached := self.integer("shortconv.l_cache"):
            return width * (cached - 1)
        convolved = self.integer("ssm.conv_kernel")
        if head := self.integer("kda.head_dim"):
            heads = (self.per_layer("attention.head_count", 1) or [0])[0]
            return heads * head * (3 * (convolved - 1 if convolved else 3) + head)
        inner, state = self.integer("ssm.inner_size"), self.integer("ssm.state_size")
        return max(0, convolved - 1) * (inner + 2 * self.integer("ssm.group_count") * state) + inner * state


def _is_recurrent(name: str) -> bool:
    return name.startswith(_RECURRENT)


def fit(tensors: Sequence[RecipeTensor], file_bytes: int, context: ContextMemory, budget: Budget) -> MemoryFit:
    """Where a level of ``tensors`` (all of known size) runs: wholly on the GPUs, else partly, else in memory."""
    whole = file_bytes + (context.n_bytes or 0) + SPARE_BYTES
    parts = list(_gpu_parts(tensors, context))
    n_gpu_layers, on_gpu = _as_many(parts, budget.gpu)
    left = whole - on_gpu
    ram, vram = human_bytes(budget.ram), human_bytes(sum(budget.vram))
    place: Place
    if n_gpu_layers == len(parts):
        place, reason = "GPU", f"{human_bytes(on_gpu + SPARE_BYTES * len(budget.vram))} of {vram} on the GPU"
    elif n_gpu_layers and left <= budget.ram:
        layers = f"{n_gpu_layers} of {len(parts)} layers"
        place, reason = "GPU and RAM", f"{layers} in {vram} on the GPU (-ngl {n_gpu_layers}), {human_bytes(left)} of {ram} RAM"
    elif whole <= budget.ram:
        place, n_gpu_layers, reason = "RAM", 0, f"{human_bytes(whole)} of {ram} RAM"
    else:
        place, n_gpu_layers, reason = "nowhere", 0, f"it needs {human_bytes(whole)}, and there are {ram} RAM"
    unknown = "; its context is not counted, because its size is not known" if context.n_bytes is None else ""
    return MemoryFit(place, whole, n_gpu_layers, len(parts), reason + unknown)


def _gpu_parts(tensors: Sequence[RecipeTensor], context: ContextMemory) -> Iterator[int]:
    """Bytes of what ``-ngl 1``, ``2``, … put on the GPU: the output layer, then blocks from the last to the first. The token
    embeddings stay in memory (src/llama-model.cpp, ``dev_input``), unless they serve as output layer too."""
    blocks: dict[int, int] = defaultdict(int)
    output = embeddings = 0
    for tensor in tensors:
        n_bytes = tensor.n_bytes or 0
        if match := _BLOCK.match(tensor.name):
            blocks[int(match[1])] += n_bytes
        elif tensor.name.startswith(("token_embd", "per_layer_token_embd")):
            embeddings += n_bytes if tensor.name == "token_embd.weight" else 0
        else:
            output += n_bytes
    tied = not any(tensor.name == "output.weight" for tensor in tensors)
    yield output + (embeddings if tied else 0)
    for number in sorted(blocks, reverse=True):
        yield blocks[number] + (context.layers[number] if number < len(context.layers) else 0)


def _as_many(parts: Sequence[int], room: int) -> tuple[int, int]:
    """How many parts fit into ``room`` in order, and their total bytes."""
    taken = 0
    for count, n_bytes in enumerate(parts):
        if taken + n_bytes > room:
            return count, taken
        taken += n_bytes
    return len(parts), taken
