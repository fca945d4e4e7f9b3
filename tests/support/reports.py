"""Reports for tests of what is made from them: a dense model, one with experts, and one of which hardly anything is known.

Every figure is computed from a few plain numbers per level, in proportions that real models have; nothing is random.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import replace
from typing import Any

from imatrix_runner.engines.measures import DP_FRACTIONS, Divergence, Estimate
from imatrix_runner.evaluate.ab_verdict import Comparison, compare
from imatrix_runner.evaluate.answer_agreement import AnswerPair, DomainResult
from imatrix_runner.evaluate.measurements import ReportEvaluation
from imatrix_runner.evaluate.mix_verdict import MixVerdict, StockFigure
from imatrix_runner.evaluate.recommendations import Measure, recommend
from imatrix_runner.report.document import (
    CalibrationSource,
    KeptStock,
    Report,
    ReportCalibration,
    ReportCosts,
    ReportCurvePoint,
    ReportExperts,
    ReportFile,
    ReportImatrix,
    ReportLevel,
    ReportMix,
    ReportModel,
    ReportStep,
    ReportTensor,
    ReportTensorCost,
)

N_PARAMS, N_LAYERS = 8_030_261_312, 32
PPL_BASE = 7.3241
LEVELS = {
    # name: (bits per weight, mean KLD), largest first
    "Q8_0": (8.50, 0.00079),
    "Q6_K": (6.56, 0.00214),
    "Q5_K_M": (5.68, 0.00613),
    "Q4_K_L": (5.06, 0.0164),
    "Q4_K_M": (4.89, 0.0181),
    "Q4_0": (4.64, 0.0467),
    "IQ4_XS": (4.43, 0.0226),
    "Q3_K_M": (4.00, 0.0612),
    "IQ3_M": (3.76, 0.0683),
    "IQ2_M": (2.93, 0.262),
}
KLD_SHAPE = {
    # fraction of the tokens -> times the mean
    1.0: 58.0,
    0.999: 21.0,
    0.99: 8.1,
    0.95: 3.7,
    0.9: 2.3,
    0.5: 0.41,
    0.1: 0.031,
    0.05: 0.0096,
    0.01: 0.0011,
    0.001: 0.00002,
    0.0: -0.0004,
}
DP_SHAPE = dict(zip(DP_FRACTIONS, (6.2, 4.4, 2.6, 1.2, 0.7, 0.12, -0.01, -0.2, -0.9, -1.6, -3.1, -5.3, -7.5), strict=True))
NEEDS_IMATRIX = ("IQ2_M",)
KINDS = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
STRENGTH = dict(zip(KINDS, (220.0, 220.0, 220.0, 9.0, 160.0, 160.0, 31.0), strict=True))


def divergence(kld: float, n_tokens: int = 25_600, ppl_base: float = PPL_BASE) -> Divergence:
    """What a level with this mean KLD would plausibly measure."""
    root = math.sqrt(n_tokens)
    log_ratio = Estimate(0.62 * kld, 1.1 * math.sqrt(kld) / root)
    ratio = math.exp(log_ratio.value)
    base = Estimate(ppl_base, ppl_base * 2.4 / root)
    rms = 0.24 * math.sqrt(kld)
    same = 1 - 0.55 * math.sqrt(kld)
    return Divergence(
        n_tokens=n_tokens,
        ppl=Estimate(ppl_base * ratio, base.error * ratio),
        ppl_base=base,
        correlation=1 - 0.35 * kld,
        log_ratio=log_ratio,
        ratio=Estimate(ratio, ratio * log_ratio.error),
        difference=Estimate(ppl_base * (ratio - 1), ppl_base * ratio * log_ratio.error),
        kld=Estimate(kld, 2.2 * kld / root),
        kld_at={fraction: times * kld for fraction, times in KLD_SHAPE.items()},
        dp=Estimate(-0.11 * rms, rms / root),
        dp_at={fraction: max(-1.0, min(1.0, times * rms)) for fraction, times in DP_SHAPE.items()},
        dp_rms=Estimate(rms, 1.3 * rms / root),
        same_top=Estimate(same, math.sqrt(same * (1 - same) / (n_tokens - 1))),
    )


def comparison(level: str, kld: float, saved: float) -> Comparison:
    """``level`` whose imatrix takes away ``saved`` of its baseline's KLD."""
    return compare(level, divergence(kld), divergence(kld / (1 - saved)))


def hashed(name: str) -> str:
    """Something that looks like a SHA-256 and differs from name to name."""
    return hashlib.sha256(name.encode()).hexdigest()


def level(name: str, bits: float, kld: float | None, *, model: str = "Ministral-8B", n_params: int = N_PARAMS) -> ReportLevel:
    n_bytes = int(n_params * bits / 8)
    file, measured = f"{model}-{name}.gguf", divergence(kld) if kld is not None else None
    return ReportLevel(
        name=name,
        ftype=name.replace("_L", "_M") if name.endswith("_L") else name,
        files=(ReportFile(file, n_bytes, hashed(file)),),
        n_bytes=n_bytes,
        bits_per_weight=bits,
        needs_imatrix=name in NEEDS_IMATRIX,
        used_imatrix=name != "Q8_0",
        fallbacks=0,
        fallback_share=0.0,
        seconds=412.5,
        finished="2026-07-14T09:41:07+00:00",
        command=f"llama-quantize --imatrix imatrix.gguf {model}-BF16.gguf {file} {name}",
        measured=measured,
        ppl_ratio=measured.ratio if measured is not None else None,
    )


def levels() -> tuple[ReportLevel, ...]:
    made = [level(name, bits, kld) for name, (bits, kld) in LEVELS.items()]
    return tuple(replace(each, fallbacks=3, fallback_share=0.021) if each.name == "IQ3_M" else each for each in made)


def tensors(n_layers: int = N_LAYERS, kinds: tuple[str, ...] = KINDS) -> tuple[ReportTensor, ...]:
    """Signals that grow with depth, the first and last layers standing out as in real models."""
    found = []
    for layer in range(n_layers):
        depth = layer / max(1, n_layers - 1)
        edge = 6.0 if layer == 1 else 2.5 if layer == n_layers - 1 else 1.0
        for place, kind in enumerate(kinds):
            total = STRENGTH.get(kind, 40.0) * (0.3 + 1.9 * depth) * edge
            entropy = 0.93 - 0.12 * depth - 0.015 * place - (0.3 if layer == 1 and kind == "ffn_down" else 0.0)
            active = 1.0 if kind != "attn_output" else 0.985 + 0.015 * depth
            found.append(ReportTensor(layer, kind, total, active, entropy))
    return (*found, ReportTensor(None, "output", 5217.4, 1.0, 0.871))


def curve() -> tuple[ReportCurvePoint, ...]:
    return tuple(
        ReportCurvePoint(
            chunks, 0.9 / math.sqrt(chunks), f"blk.{(chunks * 7) % N_LAYERS}.ffn_down.weight", 0.16 / math.sqrt(chunks)
        )
        for chunks in range(10, 141, 10)
    )


def imatrix(**changes: Any) -> ReportImatrix:
    plain = ReportImatrix(
        file=ReportFile("imatrix.gguf", 4_988_224, hashed("imatrix")),
        format="gguf",
        entries=len(tensors()),
        chunks=140,
        chunk_size=512,
        datasets=("imatrix_data.txt",),
        made_here=True,
        tokens=140 * 512,
        ppl=8.1129,
        ppl_error=0.0914,
        stopped="converged",  # or chunks, covered, text
        seconds=1834.0,
        engine="llama-cpp-python 0.3.16 (cuda)",
        calibration=ReportCalibration(
            "imatrix_data.txt",
            573_440,
            hashed("calibration"),
            manifest=hashed("manifest"),
            parse_special=True,
            template="chatml",
            sources=(
                CalibrationSource("wikipedia-en", hashed("wikipedia"), "CC-BY-SA-4.0", 0.5),
                CalibrationSource("code-samples", hashed("code"), "MIT", 0.3),
                CalibrationSource("dialogues.jsonl", hashed("dialogues"), "", 0.2),
            ),
        ),
        tensors=tensors(),
        curve=curve(),
    )
    return replace(plain, **changes)


def evaluation(**changes: Any) -> ReportEvaluation:
    plain = ReportEvaluation(
        text="held_out.txt",
        sha256=hashed("held_out.txt"),
        n_chunks=100,
        n_ctx=512,
        n_tokens=25_600,
        engine="llama-cpp-python 0.3.16 (cuda)",
        reference=hashed("logits"),
        ppl=divergence(0.01).ppl_base,
        overlap=0.0004,
        seconds=961.0,
    )
    return replace(plain, **changes)


def pair(prompt: str, source: str, other: str) -> AnswerPair:
    """Words stand for tokens here."""
    mine, theirs = source.split(), other.split()
    agreement = next((at for at, (a, b) in enumerate(zip(mine, theirs, strict=False)) if a != b), min(len(mine), len(theirs)))
    common = sum(min(mine.count(word), theirs.count(word)) for word in set(mine))
    return AnswerPair(
        prompt=prompt,
        source=source,
        level=other,
        n_source=len(mine),
        n_level=len(theirs),
        agreement=agreement,
        shared=2 * common / (len(mine) + len(theirs)),
        parted=None if mine == theirs else agreement,
    )


def domain(level: str = "Q4_K_M") -> DomainResult:
    pairs = (
        pair(
            "Why does bread rise?",
            "Yeast eats the sugars in the dough and gives off carbon dioxide, which the gluten holds in bubbles.",
            "Yeast eats the sugars in the dough and releases carbon dioxide, which gluten traps as small bubbles.",
        ),
        pair("Name the capital of Portugal.", "The capital of Portugal is Lisbon.", "The capital of Portugal is Lisbon."),
        pair(
            "Write a Python line that reverses a list in place.",
            "Call `items.reverse()`; it changes the list and returns None.",
            "Call `items.reverse()`; this changes the list itself, and returns None.\nNothing else is needed.",
        ),
    )
    lengths = sorted(each.agreement for each in pairs)
    return DomainResult(
        level=level,
        n_prompts=len(pairs),
        n_predict=128,
        same=sum(each.parted is None for each in pairs) / len(pairs),
        shared=sum(each.shared for each in pairs) / len(pairs),
        agreement_mean=sum(lengths) / len(lengths),
        agreement_median=float(lengths[len(lengths) // 2]),
        pairs=pairs,
    )


def measures(of: tuple[ReportLevel, ...]) -> list[Measure]:
    return [
        Measure(each.name, each.n_bytes, each.measured.kld.value, each.measured.same_top.value)
        for each in of
        if each.measured is not None
    ]


def sample_report(**changes: Any) -> Report:
    """A dense model of 32 layers: ten measured levels, an imatrix made here, comparisons, answers; with ``changes``."""
    made = levels()
    plain = Report(
        model=ReportModel(
            name="Ministral-8B",
            architecture="llama",
            n_params=N_PARAMS,
            n_bytes=2 * N_PARAMS + 7_831_552,
            type="BF16",
            origin="example-org/Ministral-8B",
            files=(ReportFile("Ministral-8B-BF16.gguf", 2 * N_PARAMS + 7_831_552, hashed("source")),),
            fingerprint=f"sha256:{hashed('source')}",
            repo="example-org/Ministral-8B",
            commit="0f5c1d2e3b4a59687786a5b4c3d2e1f001234567",
            base_models=("example-org/Ministral-8B", "example-org/Ministral-8B-Base"),
            license="apache-2.0",
            languages=("en", "de"),
            tags=("text-generation", "conversational"),
            context_length=131_072,
            n_layers=N_LAYERS,
            prompt_format=(
                "<|im_start|>system\n{system_prompt}<|im_end|>\n<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
            ),
        ),
        levels=made,
        made="2026-07-14T11:02:45+00:00",
        program="imatrix-runner 0.1.0",
        command="imatrix-runner run example-org/Ministral-8B --preset bartowski --evaluate",
        toolchain="llama-cpp-python 0.3.16 (cuda)",
        imatrix=imatrix(),
        evaluation=evaluation(),
        comparisons=(
            comparison("Q6_K", 0.00214, 0.011),
            comparison("Q4_K_M", 0.0181, 0.068),
            comparison("IQ4_XS", 0.0226, 0.142),
            comparison("Q3_K_M", 0.0612, 0.237),
        ),
        domain=(domain(),),
        picks=recommend(measures(made)),
        steps=(
            ReportStep("conversion", 95.0, "2026-07-14T08:12:10+00:00", "convert_hf_to_gguf.py Ministral-8B --outtype bf16"),
            ReportStep(
                "imatrix",
                1834.0,
                "2026-07-14T08:42:44+00:00",
                "llama-imatrix -m Ministral-8B-BF16.gguf -f imatrix_data.txt -o imatrix.gguf -c 512 --parse-special",
            ),
            *(ReportStep(each.name, each.seconds, each.finished, each.command) for each in made),
            ReportStep("evaluation", 961.0, "2026-07-14T11:02:40+00:00", ""),
        ),
    )
    return replace(plain, **changes)


def moe_report(**changes: Any) -> Report:
    """A model with 64 experts in 16 layers, some of which no token reached; three levels measured."""
    kinds = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")
    n_params, name = 6_919_000_000, "Sparrow-MoE-7B"
    figures = {"Q6_K": (6.57, 0.0031), "Q4_K_M": (4.93, 0.0254), "IQ3_M": (3.81, 0.0912)}
    made = tuple(level(each, bits, kld, model=name, n_params=n_params) for each, (bits, kld) in figures.items())
    experts = tuple(
        ReportExperts(
            layer, kind, 64, 2 if layer == 0 else 0, 0 if layer == 0 else 41 + 3 * layer, 980.0 + layer, 5120 - 40 * layer
        )
        for layer in range(16)
        for kind in kinds[4:]
    )
    without = ("blk.15.ffn_gate_exps.weight",)
    plain = sample_report()
    moe = replace(
        plain,
        model=replace(
            plain.model, name=name, architecture="olmoe", n_params=n_params, n_bytes=2 * n_params, n_layers=16, n_experts=64
        ),
        levels=made,
        imatrix=imatrix(
            tensors=tensors(16, kinds), experts=experts, without_data=without, entries=len(tensors(16, kinds)) + len(without)
        ),
        comparisons=(),
        domain=(),
        picks=recommend(measures(made)),
        steps=tuple(ReportStep(each.name, each.seconds, each.finished, each.command) for each in made),
    )
    return replace(moe, **changes)


WON, LOST = "MIX-4.89bpw-Q4_K_M", "MIX-4.21bpw-IQ4_XS"
"""A mix that is better than the stock level of its size on the held-out text, and one that is not."""


def costs(n_layers: int = N_LAYERS) -> ReportCosts:
    """Costs that fall with depth; of the last layer nothing was measured."""
    tensors = [
        ReportTensorCost(layer, kind, 3e-4 / (1 + layer) * (at + 1), measured=layer < n_layers - 1)
        for layer in range(n_layers)
        for at, kind in enumerate(KINDS)
    ]
    embeddings = ReportTensorCost(None, "token_embd", 0.0021)
    return ReportCosts("imatrix_data.txt", hashed("calibration"), 512, 1 / 256, (*tensors, embeddings))


def mix(name: str, stock: str, ratio: Estimate, verdict: MixVerdict | None) -> ReportMix:
    stem = f"Ministral-8B-{name}"
    return ReportMix(
        targets=(f"MIX@like:{stock}", "MIX@4.5GiB"),
        stock=stock,
        digest=hashed(f"{name} types"),
        types={"Q4_K": 120, "IQ4_XS": 81, "Q6_K": 25},
        unweighted=("blk.0.ffn_gate.weight",),
        ratio=ratio,
        typical=ratio.value + 0.04,
        same_top=0.011,
        recipe=ReportFile(f"{stem}.recipe.json", 24_117, hashed(f"{name} recipe")),
        tensor_types=ReportFile(f"{stem}.tensor-types.txt", 8_204, hashed(f"{name} pins")),
        held_out=verdict,
    )


def mixed_report(**changes: Any) -> Report:
    """The dense model with two mixes, one of which lost on the held-out text, a target that kept stock, and the costs."""
    plain = sample_report()
    stock = {each.name: StockFigure(each.name, each.n_bytes, each.measured.kld) for each in plain.levels if each.measured}
    won, lost = level(WON, 4.89, 0.0113), level(LOST, 4.21, 0.0391)
    assert won.measured is not None
    assert lost.measured is not None
    verdicts = (
        MixVerdict(WON, won.measured.kld, (stock["Q4_K_M"],), Estimate(0.624, 0.021), "Q4_K_M", Estimate(0.66, 0.01)),
        MixVerdict(LOST, lost.measured.kld, (stock["Q3_K_M"], stock["IQ4_XS"]), Estimate(0.982, 0.033), "IQ4_XS"),
    )
    mixes = (
        replace(won, ftype="Q4_K_M", mix=mix(WON, "Q4_K_M", Estimate(0.61, 0.03), verdicts[0])),
        replace(lost, ftype="IQ4_XS", mix=mix(LOST, "Q3_K_M", Estimate(0.93, 0.02), verdicts[1])),
    )
    made = tuple(sorted((*plain.levels, *mixes), key=lambda each: -each.n_bytes))
    return replace(
        plain,
        levels=made,
        picks=recommend(measures(made)),
        kept_stock=(KeptStock("MIX@like:Q8_0", "Q8_0"),),
        costs=costs(),
        **changes,
    )


def bare_report(**changes: Any) -> Report:
    """Two levels of a local file; nothing measured, no imatrix, no licence, no template."""
    n_bytes = 2 * 1_100_048_384
    made = tuple(
        replace(level(name, bits, None, model="tiny", n_params=1_100_048_384), used_imatrix=False, command="", seconds=31.0)
        for name, (bits, _) in LEVELS.items()
        if name in ("Q8_0", "Q4_K_M")
    )
    plain = Report(
        model=ReportModel(
            name="tiny",
            architecture="llama",
            n_params=1_100_048_384,
            n_bytes=n_bytes,
            type="F16",
            origin="tiny-F16.gguf",
            files=(ReportFile("tiny-F16.gguf", n_bytes),),
            fingerprint=f"sha256:{hashed('tiny')}",
        ),
        levels=made,
        made="2026-07-14T11:02:45+00:00",
        program="imatrix-runner 0.1.0",
    )
    return replace(plain, **changes)
