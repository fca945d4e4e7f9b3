"""Tiny models that are real: llama.cpp loads, measures and quantises them; its converter converts them.

Weights are random (of a sensible scale), tokenizers are trained on the spot from :data:`TEXT`. Everything follows from the
arguments and ``seed`` alone, so two calls give the same bytes.
"""

from __future__ import annotations

import json
import re
import struct
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[np.float32]

DType = Literal["f32", "f16", "bf16"]

TEXT = """
A lighthouse keeper writes down the weather every morning: the wind, the height of the waves, and the ships that pass.
On quiet days the list is short. When a storm comes, the list grows long, because every lamp on the water is somebody who
hopes to be home before night. The keeper has never met them, yet knows their names, their cargo and the hour they are due.
Numbers help: 12 ships in May, 31 in June, 104 in July. So do habits; at six the lamp is cleaned, at seven the log is read
aloud, at eight the coffee is hot. "Nothing happened today" is the best entry of all, the keeper says, and turns the page.
"""

_BOS, _EOS, _UNK = "<s>", "</s>", "<unk>"
_WORD = re.compile(r" ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+")


def sample_text(size: int, seed: int = 0) -> str:
    """About ``size`` characters of sentences, to calibrate or to measure with."""
    import random

    words = TEXT.split()
    chooser = random.Random(seed)
    pieces: list[str] = []
    length = 0
    while length < size:
        sentence = " ".join(chooser.choice(words) for _ in range(chooser.randint(6, 18))).capitalize() + ".\n"
        pieces.append(sentence)
        length += len(sentence)
    return "".join(pieces)


def paragraphs(size: int) -> str:
    """About ``size`` characters of numbered sentences, none twice, with a blank line after every sixth."""
    lines = sample_text(size, seed=9).splitlines()
    return "".join(f"{number}. {line}\n" + ("\n" if number % 6 == 5 else "") for number, line in enumerate(lines))


def write_llama_gguf(
    path: Path,
    *,
    hidden: int = 256,
    layers: int = 2,
    ff: int = 512,
    vocab: int = 512,
    experts: int = 0,
    tied: bool = False,
    dtype: DType = "bf16",
    seed: int = 0,
    odd: bool = False,
    rows: int | None = None,
    context: int = 2048,
    metadata: Mapping[str, str | float | bool | Sequence[str]] | None = None,
    extra: Mapping[str, tuple[int, ...]] | None = None,
    arrays: Mapping[str, NDArray[Any]] | None = None,
    alignment: int | None = None,
    fluent: bool = False,
) -> Path:
    """A llama GGUF with random weights and a byte-level BPE tokenizer (model gpt2, pre gpt-2, BOS added).

    With random weights alone its perplexity is above the size of its vocabulary; ``fluent`` (not with ``tied``) makes it know
    how often each token comes in :data:`TEXT`, so that it predicts better than a uniform guess and can be measured.

    ``experts`` > 0 makes every layer a mixture with two experts used; ``tied`` leaves out ``output.weight``; ``odd`` makes the
    feed-forward width no multiple of 256, so that K- and IQ-types fall back there. ``rows`` of the embeddings are as many as
    the vocabulary has tokens unless given. ``metadata`` adds keys, ``extra`` tensors (name -> shape with ne0 last),
    ``arrays`` others as they are (such a model is quantised, but does not run). Returns ``path``.
    """
    from gguf import GGUFWriter

    ff += 32 if odd else 0
    tokens, merges = byte_level_bpe(min(vocab, 1024))
    tokens += [f"<unused{number}>" for number in range(vocab - 1024)]  # as large as models' vocabularies are, for speed
    writer = GGUFWriter(path, "llama")
    if alignment is not None:
        writer.add_custom_alignment(alignment)
    writer.add_name("tiny llama")
    writer.add_type("model")
    writer.add_context_length(context)
    writer.add_embedding_length(hidden)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(ff)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(hidden // 4)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_file_type({"f32": 0, "f16": 1, "bf16": 32}[dtype])
    if experts:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(2)
    add_tokenizer(writer, tokens, merges)
    for key, value in (metadata or {}).items():
        add_value(writer, key, value)
    for name, array in _gguf_weights(hidden, layers, ff, rows or len(tokens), experts, tied, seed):
        add_tensor(writer, name, _taught(name, array, tokens, merges) if fluent else array, dtype)
    draw = Draw(seed + 1)
    for name, shape in (extra or {}).items():
        add_tensor(writer, name, draw(*shape), dtype)
    for name, values in (arrays or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_hf_directory(
    path: Path,
    *,
    hidden: int = 256,
    layers: int = 2,
    ff: int = 512,
    vocab: int = 512,
    tied: bool = False,
    dtype: DType = "bf16",
    seed: int = 0,
    shards: int = 1,
) -> Path:
    """A Hugging Face llama checkpoint: config, safetensors (perhaps sharded, with an index) and a BPE tokenizer with byte
    fallback in ``tokenizer.json``, the kind that ``convert_hf_to_gguf.py`` reads without knowing its hash. Returns ``path``.
    """
    path.mkdir(parents=True, exist_ok=True)
    tokens = _write_hf_tokenizer(path, vocab)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}[dtype],
        "hidden_size": hidden,
        "intermediate_size": ff,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "vocab_size": tokens,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "tie_word_embeddings": tied,
    }
    _write_json(path / "config.json", config)
    weights = dict(_hf_weights(hidden, layers, ff, tokens, tied, seed))
    if shards == 1:
        write_safetensors(path / "model.safetensors", weights, dtype)
        return path
    index: dict[str, str] = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: weights[name] for name in list(weights)[number::shards]}
        write_safetensors(path / file, part, dtype)
        index.update(dict.fromkeys(part, file))
    _write_json(path / "model.safetensors.index.json", {"metadata": {}, "weight_map": index})
    return path


def write_safetensors(path: Path, arrays: Mapping[str, Array], dtype: DType) -> Path:
    """Write arrays as safetensors: u64 length, JSON directory, data (https://huggingface.co/docs/safetensors, "Format")."""
    directory: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    blobs: list[bytes] = []
    offset = 0
    for name, array in arrays.items():
        blob = _bytes_of(array, dtype)
        span = [offset, offset + len(blob)]
        directory[name] = {"dtype": dtype.upper(), "shape": list(array.shape), "data_offsets": span}
        offset += len(blob)
        blobs.append(blob)
    header = json.dumps(directory).encode()
    header += b" " * (-len(header) % 8)
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"".join(blobs))
    return path


def write_packed(path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> Path:
    """Write safetensors of zeros: name -> (dtype as safetensors spells it, shape)."""
    directory: dict[str, Any] = {}
    offset = 0
    for name, (dtype, shape) in tensors.items():
        n_bytes = prod(shape) * int(re.search(r"\d+", dtype.replace("BOOL", "U8"))[0]) // 8  # type: ignore[index]
        directory[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + n_bytes]}
        offset += n_bytes
    header = json.dumps(directory).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(offset))
    return path


def _gguf_weights(
    hidden: int, layers: int, ff: int, vocab: int, experts: int, tied: bool, seed: int
) -> Iterator[tuple[str, Array]]:
    """Names and arrays in numpy order (rows first: the transpose of ggml's shape)."""
    draw = Draw(seed)
    yield "token_embd.weight", draw(vocab, hidden)
    for layer in range(layers):
        blk = f"blk.{layer}"
        yield f"{blk}.attn_norm.weight", draw.ones(hidden)
        yield f"{blk}.attn_q.weight", draw(hidden, hidden)
        yield f"{blk}.attn_k.weight", draw(hidden // 2, hidden)
        yield f"{blk}.attn_v.weight", draw(hidden // 2, hidden)
        yield f"{blk}.attn_output.weight", draw(hidden, hidden)
        yield f"{blk}.ffn_norm.weight", draw.ones(hidden)
        if experts:
            yield f"{blk}.ffn_gate_inp.weight", draw(experts, hidden)
            yield f"{blk}.ffn_gate_exps.weight", draw(experts, ff, hidden)
            yield f"{blk}.ffn_up_exps.weight", draw(experts, ff, hidden)
            yield f"{blk}.ffn_down_exps.weight", draw(experts, hidden, ff)
        else:
            yield f"{blk}.ffn_gate.weight", draw(ff, hidden)
            yield f"{blk}.ffn_up.weight", draw(ff, hidden)
            yield f"{blk}.ffn_down.weight", draw(hidden, ff)
    yield "output_norm.weight", draw.ones(hidden)
    if not tied:
        yield "output.weight", draw(vocab, hidden)


def _taught(name: str, array: Array, tokens: Sequence[str], merges: Sequence[str]) -> Array:
    """A tensor of :func:`_gguf_weights`, changed so that the logits gain the tokens' log-frequencies: the first channel of the
    residual stream is constant and large, layers see it as one channel among others, and the output reads it."""
    import numpy as np

    hidden = array.shape[-1]
    channel = np.float32(
        np.sqrt(hidden)
    )  # what a norm makes of it: next to it the other channels change the mean square little
    if name == "token_embd.weight":
        array = array * channel
        array[:, 0] = 4 * channel
    elif name.endswith("norm.weight"):
        last = name.startswith("output")
        array = array * np.float32(2 if last else 4)
        array[0] = 1 if last else 1 / channel
    elif name == "output.weight":
        array[:, 0] = np.array(_log_frequencies(tokens, merges), np.float32) / channel
    return array


def _log_frequencies(tokens: Sequence[str], merges: Sequence[str]) -> list[float]:
    """ln of each token's share of :data:`TEXT`, its letters counted too, for other texts are of letters, and as if each token
    had been seen a tenth of a time more."""
    import math

    alphabet = _byte_alphabet()
    counts: dict[str, float] = dict.fromkeys(tokens, 0.1)
    for word, times in Counter(_WORD.findall(TEXT)).items():
        symbols = tuple(alphabet[byte] for byte in word.encode())
        for symbol in symbols:
            counts[symbol] += times / 4
        for merge in merges:
            one, _, other = merge.partition(" ")
            symbols = _join(symbols, (one, other))
        for symbol in symbols:
            counts[symbol] += times
    whole = sum(counts.values())
    return [math.log(counts[token] / whole) for token in tokens]


def _hf_weights(hidden: int, layers: int, ff: int, vocab: int, tied: bool, seed: int) -> Iterator[tuple[str, Array]]:
    draw = Draw(seed)
    yield "model.embed_tokens.weight", draw(vocab, hidden)
    for layer in range(layers):
        block = f"model.layers.{layer}"
        yield f"{block}.input_layernorm.weight", draw.ones(hidden)
        yield f"{block}.self_attn.q_proj.weight", draw(hidden, hidden)
        yield f"{block}.self_attn.k_proj.weight", draw(hidden // 2, hidden)
        yield f"{block}.self_attn.v_proj.weight", draw(hidden // 2, hidden)
        yield f"{block}.self_attn.o_proj.weight", draw(hidden, hidden)
        yield f"{block}.post_attention_layernorm.weight", draw.ones(hidden)
        yield f"{block}.mlp.gate_proj.weight", draw(ff, hidden)
        yield f"{block}.mlp.up_proj.weight", draw(ff, hidden)
        yield f"{block}.mlp.down_proj.weight", draw(hidden, ff)
    yield "model.norm.weight", draw.ones(hidden)
    if not tied:
        yield "lm_head.weight", draw(vocab, hidden)


class Draw:
    """Random weights of standard deviation ``1/sqrt(row length)``, as a fresh network has them."""

    def __init__(self, seed: int) -> None:
        import numpy as np

        self._random = np.random.default_rng(seed)

    def __call__(self, *shape: int) -> Array:
        import numpy as np

        drawn: Array = self._random.standard_normal(shape, dtype=np.float32)
        drawn /= np.float32(np.sqrt(shape[-1]))
        return drawn

    def ones(self, size: int) -> Array:
        import numpy as np

        return np.ones(size, dtype=np.float32)


def add_tokenizer(writer: Any, tokens: Sequence[str], merges: Sequence[str]) -> None:
    """What :func:`byte_level_bpe` made, as metadata; a BOS token is put before each text."""
    from gguf import TokenType

    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.CONTROL if token in (_BOS, _EOS) else TokenType.NORMAL for token in tokens])
    writer.add_token_merges(merges)
    writer.add_bos_token_id(tokens.index(_BOS))
    writer.add_eos_token_id(tokens.index(_EOS))
    writer.add_add_bos_token(True)


def add_tensor(writer: Any, name: str, array: Array, dtype: DType) -> None:
    import numpy as np
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    if dtype == "f32" or array.ndim == 1 or name.endswith("ffn_gate_inp.weight"):
        writer.add_tensor(name, array)  # as the converter does: norms and routers stay F32
    elif dtype == "f16":
        writer.add_tensor(name, array.astype(np.float16))
    else:
        writer.add_tensor(name, quantize(array, GGMLQuantizationType.BF16), raw_dtype=GGMLQuantizationType.BF16)


def add_value(writer: Any, key: str, value: str | float | bool | Sequence[str]) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def _bytes_of(array: Array, dtype: DType) -> bytes:
    import numpy as np

    if dtype == "f32":
        return array.tobytes()
    if dtype == "f16":
        return array.astype(np.float16).tobytes()
    bits = array.view(np.uint32)
    rounded = bits + 0x7FFF + ((bits >> 16) & 1)  # round to nearest, ties to even
    return (rounded >> 16).astype(np.uint16).tobytes()


def byte_level_bpe(size: int) -> tuple[list[str], list[str]]:
    """Tokens and merges of a GPT-2 style tokenizer of up to ``size`` entries: BOS, EOS, 256 bytes, then merges."""
    alphabet = _byte_alphabet()
    words = Counter(tuple(alphabet[byte] for byte in word.encode()) for word in _WORD.findall(TEXT))
    merges = _train_merges(words, max(0, size - 2 - len(alphabet)))
    tokens = [_BOS, _EOS, *alphabet, *("".join(pair) for pair in merges)]
    return tokens, [" ".join(pair) for pair in merges]


def _byte_alphabet() -> list[str]:
    """GPT-2's printable stand-ins for the 256 bytes (openai/gpt-2, src/encoder.py, ``bytes_to_unicode``)."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    extra = iter(range(256, 512))
    return [chr(byte if byte in printable else next(extra)) for byte in range(256)]


def _train_merges(words: Counter[tuple[str, ...]], count: int) -> list[tuple[str, str]]:
    """The ``count`` (or fewer) byte-pair merges that join the most frequent pairs first; ties by spelling."""
    merges: list[tuple[str, str]] = []
    made: set[str] = set()
    while len(merges) < count:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, times in words.items():
            for pair in pairwise(word):
                pairs[pair] += times
        candidates = [pair for pair in pairs if "".join(pair) not in made]
        if not candidates:
            break
        best = max(candidates, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        made.add("".join(best))
        joined: Counter[tuple[str, ...]] = Counter()
        for word, times in words.items():
            joined[_join(word, best)] += times
        words = joined
    return merges


def _join(word: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    result: list[str] = []
    for symbol in word:
        if result and (result[-1], symbol) == pair:
            result[-1] += symbol
        else:
            result.append(symbol)
    return tuple(result)


def _write_hf_tokenizer(path: Path, size: int) -> int:
    """A llama tokenizer (BPE over characters, a word starts with U+2581, unknown bytes fall back); returns its entries."""
    space = "\u2581"
    words = Counter(tuple(word.replace(" ", space)) for word in _WORD.findall(TEXT.replace("\n", " ")))
    characters = sorted({symbol for word in words for symbol in word})
    base = [_UNK, _BOS, _EOS, *(f"<0x{byte:02X}>" for byte in range(256)), *characters]
    merges = _train_merges(words, max(0, size - len(base)))
    tokens = [*base, *("".join(pair) for pair in merges)]
    special = [
        {"id": number, "content": token, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        | {"special": True}
        for number, token in enumerate((_UNK, _BOS, _EOS))
    ]
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": special,
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": space},
                {"type": "Replace", "pattern": {"String": " "}, "content": space},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": space}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": _UNK,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {token: number for number, token in enumerate(tokens)},
            "merges": [" ".join(pair) for pair in merges],
        },
    }
    _write_json(path / "tokenizer.json", tokenizer)
    config = {"bos_token": _BOS, "eos_token": _EOS, "unk_token": _UNK, "add_bos_token": True, "add_eos_token": False}
    _write_json(path / "tokenizer_config.json", config | {"tokenizer_class": "LlamaTokenizerFast"})
    return len(tokens)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")
