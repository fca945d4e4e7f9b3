#!/usr/bin/env python3
"""Train the demo model ``resources/demo-model.gguf`` on this machine's CPU.

The model is a small (2.9 M parameters) llama-architecture language model that
really has learned something, so that its perplexities, importance matrices
and quantisation losses mean something.  Its only data is the standard library
of the Python that runs this script: the sources, and once more the prose of
their docstrings as separate documents.  Two per cent of the files, chosen by a
hash of their path, are held out and never trained on.

Packages, in a virtual environment of their own::

    pip install torch==2.13.0 numpy gguf tokenizers

Train for half an hour on two cores; run again after a kill, it continues from
its last checkpoint (pass the same arguments)::

    nice -n 10 python scripts/train_demo_model.py --minutes 28

With ``--experts 8`` it becomes a mixture of experts, two of which each token
uses; ``scripts/bench rounding --models moe`` makes itself one in this way.

Verify a finished model (the file read back, its held-out text evaluated)::

    python scripts/train_demo_model.py --check

The held-out text is left in the work directory as ``heldout.txt``; the last
figure that ``--check`` prints is what llama.cpp should find for it::

    llama-perplexity -m resources/demo-model.gguf -c 512 -f build/demo-model/heldout.txt

(llama-tokenize needs ``--no-escape`` on such a text: it alone would turn every
backslash-n of the sources into a line break first.)
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
import time
from pathlib import Path
from typing import Any, cast

import gguf
import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from demo_corpus import read_corpus
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn

HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 256, 4, 4, 2, 64
FFN, CONTEXT, VOCAB = 512, 512, 1024
EXPERT_FFN, EXPERTS_USED, BALANCE = 256, 2, 0.01
ROPE_BASE, NORM_EPS = 10000.0, 1e-5
BATCH, PEAK_LR, FINAL_LR, WARMUP_STEPS = 8, 3e-3, 1e-4, 200
END = "<|endoftext|>"  # both BOS and EOS, as in GPT-2

Tokens = npt.NDArray[np.int64]


def byte_level(bpe: models.BPE) -> Tokenizer:
    """A tokeniser that splits text and spells bytes as GPT-2 does."""
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def train_tokenizer(documents: list[str]) -> Tokenizer:
    tokenizer = byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


class Block(nn.Module):
    balance: Tensor

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.experts = experts
        self.attn_norm = nn.Parameter(torch.ones(HIDDEN))
        self.attn_q = nn.Linear(HIDDEN, HEADS * HEAD_DIM, bias=False)
        self.attn_k = nn.Linear(HIDDEN, KV_HEADS * HEAD_DIM, bias=False)
        self.attn_v = nn.Linear(HIDDEN, KV_HEADS * HEAD_DIM, bias=False)
        self.attn_output = nn.Linear(HEADS * HEAD_DIM, HIDDEN, bias=False)
        self.ffn_norm = nn.Parameter(torch.ones(HIDDEN))
        if experts:
            self.ffn_gate_inp = nn.Linear(HIDDEN, experts, bias=False)
            self.ffn_gate_exps = nn.Parameter(torch.empty(experts, EXPERT_FFN, HIDDEN))
            self.ffn_up_exps = nn.Parameter(torch.empty(experts, EXPERT_FFN, HIDDEN))
            self.ffn_down_exps = nn.Parameter(torch.empty(experts, HIDDEN, EXPERT_FFN))
        else:
            self.ffn_gate = nn.Linear(HIDDEN, FFN, bias=False)
            self.ffn_up = nn.Linear(HIDDEN, FFN, bias=False)
            self.ffn_down = nn.Linear(FFN, HIDDEN, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, _ = x.shape
        h = F.rms_norm(x, (HIDDEN,), self.attn_norm, NORM_EPS)
        shape = (batch, length, -1, HEAD_DIM)
        q = rotate(self.attn_q(h).view(shape).transpose(1, 2), cos, sin)
        k = rotate(self.attn_k(h).view(shape).transpose(1, 2), cos, sin)
        v = self.attn_v(h).view(shape).transpose(1, 2)
        k = k.repeat_interleave(HEADS // KV_HEADS, dim=1)
        v = v.repeat_interleave(HEADS // KV_HEADS, dim=1)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attn_output(mixed.transpose(1, 2).flatten(2))
        h = F.rms_norm(x, (HIDDEN,), self.ffn_norm, NORM_EPS)
        if self.experts:
            return x + mixed_experts(self, h)
        gated = F.silu(self.ffn_gate(h)) * self.ffn_up(h)
        return x + cast(Tensor, self.ffn_down(gated))


def mixed_experts(block: Block, h: Tensor) -> Tensor:
    """What the experts of a block add, as llama.cpp computes it: softmax over
    all experts, the best ones, their shares scaled to a sum of 1. Leaves in
    ``block.balance`` how unevenly they were used (Fedus et al., Switch
    Transformers, equation 4: 1 is even)."""
    rows = h.flatten(0, 1)
    shares = block.ffn_gate_inp(rows).float().softmax(-1)
    best, chosen = shares.topk(EXPERTS_USED)
    best = best / best.sum(-1, keepdim=True)
    out, experts = torch.zeros_like(rows), shares.shape[1]
    for expert in range(experts):
        token, slot = torch.where(chosen == expert)
        x = rows[token]
        gated = F.silu(F.linear(x, block.ffn_gate_exps[expert])) * F.linear(x, block.ffn_up_exps[expert])
        y = F.linear(gated, block.ffn_down_exps[expert]) * best[token, slot, None]
        out = out.index_add(0, token, y.to(out.dtype))
    used = F.one_hot(chosen, experts).float().mean((0, 1))
    block.balance = experts * (used * shares.mean(0)).sum()
    return out.view(h.shape)


class Llama(nn.Module):
    """Parameter names are those of the GGUF, with ``blk`` for the layers."""

    def __init__(self, experts: int = 0) -> None:
        super().__init__()
        self.experts = experts
        self.token_embd = nn.Embedding(VOCAB, HIDDEN)
        self.blk = nn.ModuleList(Block(experts) for _ in range(LAYERS))
        self.output_norm = nn.Parameter(torch.ones(HIDDEN))
        self.output = nn.Linear(HIDDEN, VOCAB, bias=False)
        for name, weight in self.named_parameters():
            if weight.dim() >= 2:
                # What is added to the residual stream starts smaller.
                added = "attn_output" in name or "ffn_down" in name
                std = 0.02 / math.sqrt(2 * LAYERS) if added else 0.02
                nn.init.normal_(weight, std=std)
        pairs = torch.arange(0, HEAD_DIM, 2, dtype=torch.float64) / HEAD_DIM
        angle = torch.outer(torch.arange(CONTEXT).double(), ROPE_BASE**-pairs)
        self.cos, self.sin = angle.cos().float(), angle.sin().float()

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token_embd(tokens)
        cos, sin = self.cos[: tokens.shape[1]], self.sin[: tokens.shape[1]]
        for block in self.blk:
            x = block(x, cos, sin)
        h = F.rms_norm(x, (HIDDEN,), self.output_norm, NORM_EPS)
        return cast(Tensor, self.output(h))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE on neighbouring pairs: what llama.cpp does for ``llama``, so the
    weights of q and k go into the GGUF without a permutation."""
    a, b = x[..., 0::2], x[..., 1::2]
    turned = torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1)
    return turned.flatten(-2).to(x.dtype)


def batch_at(stream: Tokens, step: int, seed: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets of one step, from the step number alone (so that a
    continued training sees what an unbroken one would have seen).  Each epoch
    cuts the stream at another offset and shuffles the windows."""
    windows = len(stream) // CONTEXT - 2
    rows: list[Tokens] = []
    for i in range(step * BATCH, (step + 1) * BATCH):
        rng = np.random.default_rng([seed, i // windows])
        offset = int(rng.integers(CONTEXT))
        start = offset + int(rng.permutation(windows)[i % windows]) * CONTEXT
        rows.append(stream[start : start + CONTEXT + 1])
    block = torch.from_numpy(np.stack(rows))
    inputs = block[:, :-1].clone()
    inputs[:, 0] = 0  # the first token of every window is BOS, as in llama.cpp
    return inputs, block[:, 1:].contiguous()


def train(stream: Tokens, args: argparse.Namespace) -> tuple[Llama, int, float]:
    """The trained model, its number of steps, and the seconds they took."""
    torch.manual_seed(args.seed)
    model = Llama(args.experts)
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    norms = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(decayed, PEAK_LR, (0.9, 0.95), weight_decay=0.1)
    optimizer.add_param_group({"params": norms, "weight_decay": 0.0})
    step, spent = 0, 0.0
    plan = [args.seed, args.steps, args.minutes, len(stream), int(stream.sum()), args.experts]
    checkpoint = args.work / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        if state["plan"] != plan:
            sys.exit(f"{checkpoint} is of another training: remove it first")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, spent = state["step"], state["spent"]
        print(f"continuing at step {step}", flush=True)
    began = time.monotonic() - spent
    first, first_spent = step, spent
    recent: list[float] = []
    while True:
        # With --minutes the clock drives the schedule, so that it ends on time
        # however busy the machine is; with --steps the step number does.
        spent = time.monotonic() - began
        done = step / args.steps if args.steps else spent / (60 * args.minutes)
        if done >= 1:
            return model, step, spent
        cosine = 0.5 * (1 + math.cos(math.pi * done))
        rate = FINAL_LR + (PEAK_LR - FINAL_LR) * cosine
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / WARMUP_STEPS)
        inputs, targets = batch_at(stream, step, args.seed)
        # bf16 is twice as fast as fp32 on a CPU that has AVX512_BF16.
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(inputs)
        loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
        balance = BALANCE * sum(block.balance for block in model.blk) / LAYERS if args.experts else 0.0
        (loss + balance).backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        recent.append(loss.item())
        step += 1
        spent = time.monotonic() - began
        if step % 50 == 0:
            speed = (step - first) * BATCH * CONTEXT / (spent - first_spent)
            done = step / args.steps if args.steps else spent / (60 * args.minutes)
            mean, left = sum(recent) / len(recent), max(0.0, spent / done - spent)
            print(f"step {step}  loss {mean:.4f}  lr {rate:.2e}  {speed:.0f} tokens/s  ETA {left:.0f} s", flush=True)
            recent.clear()
        if step % 250 == 0:
            state = {"plan": plan, "step": step, "spent": spent}
            state |= {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(state, checkpoint.with_suffix(".tmp"))
            checkpoint.with_suffix(".tmp").replace(checkpoint)


@torch.no_grad()
def token_losses(model: Llama, inputs: Tensor, targets: Tensor) -> Tensor:
    parts: list[Tensor] = []
    for i in range(0, len(inputs), BATCH):
        logits = model(inputs[i : i + BATCH]).transpose(1, 2)
        parts.append(F.cross_entropy(logits, targets[i : i + BATCH], reduction="none"))
    return torch.cat(parts)


def evaluate(model: Llama, tokens: Tokens) -> tuple[float, float]:
    """Mean nats per token over whole windows that begin with BOS; and the
    perplexity as llama-perplexity computes it: the text in chunks with BOS in
    place of each one's first token, only the second halves scored."""
    text = torch.from_numpy(tokens)
    targets = text[: len(text) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    inputs = torch.cat((torch.zeros_like(targets[:, :1]), targets[:, :-1]), dim=1)
    loss = float(token_losses(model, inputs, targets).mean())

    text = torch.cat((torch.zeros_like(text[:1]), text))
    chunks = text[: len(text) // CONTEXT * CONTEXT].view(-1, CONTEXT).clone()
    chunks[:, 0] = 0
    halves = token_losses(model, chunks[:, :-1], chunks[:, 1:])[:, CONTEXT // 2 :]
    return loss, math.exp(float(halves.mean()))


def write_gguf(out: Path, model: Llama, tokenizer: Tokenizer, about: str) -> None:
    writer = gguf.GGUFWriter(None, "llama")
    writer.add_name("imatrix-runner demo")
    writer.add_description(about)
    writer.add_license("mit")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(VOCAB)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(EXPERT_FFN if model.experts else FFN)
    if model.experts:
        writer.add_expert_count(model.experts)
        writer.add_expert_used_count(EXPERTS_USED)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_key_length(HEAD_DIM)
    writer.add_value_length(HEAD_DIM)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_rope_freq_base(ROPE_BASE)
    writer.add_layer_norm_rms_eps(NORM_EPS)

    vocabulary = tokenizer.get_vocab()
    pieces = sorted(vocabulary, key=lambda piece: vocabulary[piece])
    kinds = [gguf.TokenType.CONTROL] + [gguf.TokenType.NORMAL] * (VOCAB - 1)
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(pieces)
    writer.add_token_types(kinds)
    writer.add_token_merges([f"{left} {right}" for left, right in merges])
    writer.add_bos_token_id(vocabulary[END])
    writer.add_eos_token_id(vocabulary[END])
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)  # llama-imatrix refuses a model with it

    bf16 = gguf.GGMLQuantizationType.BF16
    for name, weight in model.state_dict().items():
        stored = name if name.endswith(".weight") else f"{name}.weight"
        if weight.dim() >= 2 and "ffn_gate_inp" not in name:
            writer.add_tensor(stored, gguf.quantize(weight.numpy(), bf16), raw_dtype=bf16)
        else:
            writer.add_tensor(stored, weight.numpy())

    temporary = out.with_name(out.name + ".tmp")
    writer.write_header_to_file(temporary)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    temporary.replace(out)


def read_gguf(path: Path) -> tuple[Llama, Tokenizer, str]:
    """The model, tokeniser and description that a written GGUF contains."""
    reader = gguf.GGUFReader(path)

    def value(key: str) -> Any:
        return reader.fields[key].contents()

    experts = "llama.expert_count"
    model = Llama(value(experts) if experts in reader.fields else 0)
    state = {t.name: torch.tensor(gguf.dequantize(t.data, t.tensor_type)) for t in reader.tensors}
    model.load_state_dict({k: state[k.removesuffix(".weight") + ".weight"] for k in model.state_dict()})
    vocabulary = {p: i for i, p in enumerate(value("tokenizer.ggml.tokens"))}
    merges = [tuple(m.split(" ")) for m in value("tokenizer.ggml.merges")]
    tokenizer = byte_level(models.BPE(vocab=vocabulary, merges=merges))
    return model, tokenizer, str(value("general.description"))


def check(args: argparse.Namespace, held_out: str) -> int:
    """Read the written file back and evaluate what it contains."""
    model, tokenizer, about = read_gguf(args.out)
    print(about)
    tokens = np.array(tokenizer.encode(held_out).ids, dtype=np.int64)
    loss, mine = evaluate(model, tokens)
    bits = loss * len(tokens) / math.log(2) / len(held_out.encode())
    print(f"{args.out}: {args.out.stat().st_size} bytes")
    print(
        f"held out: {loss:.4f} nats/token, perplexity {math.exp(loss):.3f}, "
        f"{bits:.3f} bits/byte; second halves only: {mine:.4f}"
    )
    if tokenizer.decode(tokens.tolist()) != held_out:
        print("FAILED: the tokeniser does not round-trip the held-out text")
        return 1
    return 0


def main() -> int:
    root = Path(__file__).resolve().parent.parent
    parser = argparse.ArgumentParser(description="train resources/demo-model.gguf")
    parser.add_argument("--out", type=Path, default=root / "resources/demo-model.gguf")
    parser.add_argument("--work", type=Path, default=root / "build/demo-model", help="checkpoint and held-out text")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, default=28.0)
    length.add_argument("--steps", type=int, default=0)
    parser.add_argument("--experts", type=int, default=0, help="make a mixture of as many experts (0: a dense model)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--check", action="store_true", help="only verify --out")
    args = parser.parse_args()
    torch.set_num_threads(2)
    args.work.mkdir(parents=True, exist_ok=True)

    documents, held_out = read_corpus()
    (args.work / "heldout.txt").write_text(held_out, encoding="utf-8")
    if args.check:
        return check(args, held_out)

    tokenizer = train_tokenizer(documents)
    pieces = [[0, *e.ids] for e in tokenizer.encode_batch(documents)]
    stream: Tokens = np.concatenate([np.array(p, dtype=np.int64) for p in pieces])
    size = sum(len(d.encode()) for d in documents)
    print(
        f"{len(documents)} documents, {size} bytes, {len(stream)} tokens; held out: {len(held_out.encode())} bytes", flush=True
    )

    model, steps, seconds = train(stream, args)
    for name, weight in model.named_parameters():  # what the file will hold
        if weight.dim() >= 2 and "ffn_gate_inp" not in name:
            weight.data = weight.data.bfloat16().float()
    tokens = np.array(tokenizer.encode(held_out).ids, dtype=np.int64)
    loss, _ = evaluate(model, tokens)
    kind = f"mixture of {args.experts} experts" if args.experts else "demo model"
    about = (
        f"Small llama-architecture {kind} trained on the Python "
        f"{platform.python_version()} standard library (sources, and docstrings as "
        f"prose): {steps} steps, {steps * BATCH * CONTEXT} tokens; held-out loss "
        f"{loss:.4f} nats per token (perplexity {math.exp(loss):.2f})."
    )
    write_gguf(args.out, model, tokenizer, about)
    print(f"{steps} steps in {seconds:.0f} s")
    (args.work / "checkpoint.pt").unlink(missing_ok=True)
    return check(args, held_out)


if __name__ == "__main__":
    sys.exit(main())
