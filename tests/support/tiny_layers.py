"""Random weights and parts of layers, of which :mod:`support.tiny_architectures` makes models.

Shapes are those of llama.cpp's ``src/models/*.cpp``, in numpy order (rows first: the transpose of ggml's).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from support.tiny_models import Draw

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[np.float32]

Value = str | float | bool | list[int]
Tensors = dict[str, "Array"]
"""Name within a layer -> array."""

HIDDEN = 256
"""Also the row length of most weights, so that K- and IQ-types apply."""

HEADS, KV_HEADS, HEAD = 4, 2, 64
FF = 256
EXPERTS = 8
MLA_NOPE, MLA_ROPE, MLA_VALUE, MLA_Q_RANK, MLA_KV_RANK = 64, 32, 64, 256, 256
SSM_INNER, SSM_STATE, SSM_DT_RANK, SSM_CONV = 2 * HIDDEN, 16, HIDDEN // 16, 4
RWKV_HEAD, RWKV_RANK, RWKV_GATE_RANK = 64, 32, 64
SHORTCONV = 3

# What the parts below need to be told of, as metadata without the architecture's prefix.

RMS: dict[str, Value] = {"attention.layer_norm_rms_epsilon": 1e-5}
HEADLESS: dict[str, Value] = {"attention.head_count": 0}
DENSE: dict[str, Value] = {
    **RMS,
    "feed_forward_length": FF,
    "attention.head_count": HEADS,
    "attention.head_count_kv": KV_HEADS,
}
ROPE: dict[str, Value] = {"rope.dimension_count": HEAD, "rope.freq_base": 10000.0}
HEAD_SIZE: dict[str, Value] = {"attention.key_length": HEAD, "attention.value_length": HEAD}
MOE: dict[str, Value] = {"expert_count": EXPERTS, "expert_used_count": 2}
SSM: dict[str, Value] = {
    "ssm.conv_kernel": SSM_CONV,
    "ssm.inner_size": SSM_INNER,
    "ssm.state_size": SSM_STATE,
    "ssm.time_step_rank": SSM_DT_RANK,
}
MLA: dict[str, Value] = {
    "attention.q_lora_rank": MLA_Q_RANK,
    "attention.kv_lora_rank": MLA_KV_RANK,
    # MLA runs as attention with one K/V head, the compressed one; its real head sizes have keys of their own.
    "attention.head_count_kv": 1,
    "attention.key_length": MLA_KV_RANK + MLA_ROPE,
    "attention.value_length": MLA_KV_RANK,
    "attention.key_length_mla": MLA_NOPE + MLA_ROPE,
    "attention.value_length_mla": MLA_VALUE,
    "rope.dimension_count": MLA_ROPE,
}
RWKV: dict[str, Value] = {
    "attention.layer_norm_epsilon": 1e-5,
    "feed_forward_length": 2 * FF,
    "wkv.head_size": RWKV_HEAD,
    "attention.decay_lora_rank": RWKV_RANK,
    "attention.iclr_lora_rank": RWKV_RANK,
    "attention.value_residual_mix_lora_rank": RWKV_RANK,
    "attention.gate_lora_rank": RWKV_GATE_RANK,
}


class Weights(Draw):
    """Random weights by the part they play."""

    def back(self, *shape: int) -> Array:
        """Weights that write into the residual stream: small, so that no layer drowns what the token was."""
        drawn = self(*shape)
        drawn *= 0.125
        return drawn

    def gains(self, size: int) -> Array:
        """A norm's weights, log-normal around 1."""
        import numpy as np

        gains: Array = np.exp(self._normal(size) * np.float32(0.3))
        return gains

    def around(self, middle: float, size: int, spread: float = 0.1) -> Array:
        import numpy as np

        values: Array = np.float32(middle) + np.float32(spread) * self._normal(size)
        return values

    def embeddings(self, vocab: int) -> Array:
        """Every token's first channel is the same outlier, which :meth:`router` reads."""
        drawn = self(vocab, HIDDEN)
        drawn[:, 0] = 4 / HIDDEN**0.5
        return drawn

    def router(self, experts: int, slope: float) -> Array:
        """The later an expert, the less the outlier channel likes it: with ``slope`` 1.5 the last one sees few tokens."""
        import numpy as np

        drawn = self(experts, HIDDEN)
        drawn[:, 0] = -slope * np.linspace(0, 1, experts, dtype=np.float32)
        return drawn

    def _normal(self, size: int) -> Array:
        import numpy as np

        values: Array = self(1, size)[0] * np.float32(size**0.5)
        return values


def attention(w: Weights, *, qk_norm: bool = False) -> Tensors:
    """Grouped-query attention behind its norm."""
    tensors = {
        "attn_norm.weight": w.gains(HIDDEN),
        "attn_q.weight": w(HEADS * HEAD, HIDDEN),
        "attn_k.weight": w(KV_HEADS * HEAD, HIDDEN),
        "attn_v.weight": w(KV_HEADS * HEAD, HIDDEN),
        "attn_output.weight": w.back(HIDDEN, HEADS * HEAD),
    }
    return tensors | ({"attn_q_norm.weight": w.gains(HEAD), "attn_k_norm.weight": w.gains(HEAD)} if qk_norm else {})


def mlp(w: Weights) -> Tensors:
    return {
        "ffn_norm.weight": w.gains(HIDDEN),
        "ffn_gate.weight": w(FF, HIDDEN),
        "ffn_up.weight": w(FF, HIDDEN),
        "ffn_down.weight": w.back(HIDDEN, FF),
    }


def experts(w: Weights, *, slope: float, count: int = EXPERTS) -> Tensors:
    return {
        "ffn_norm.weight": w.gains(HIDDEN),
        "ffn_gate_inp.weight": w.router(count, slope),
        "ffn_gate_exps.weight": w(count, FF, HIDDEN),
        "ffn_up_exps.weight": w(count, FF, HIDDEN),
        "ffn_down_exps.weight": w.back(count, HIDDEN, FF),
    }


def latent_attention(w: Weights) -> Tensors:
    """DeepSeek's MLA as it is converted today: ``attn_kv_b`` split into one K and one V matrix per head."""
    return {
        "attn_norm.weight": w.gains(HIDDEN),
        "attn_q_a.weight": w(MLA_Q_RANK, HIDDEN),
        "attn_q_a_norm.weight": w.gains(MLA_Q_RANK),
        "attn_q_b.weight": w(HEADS * (MLA_NOPE + MLA_ROPE), MLA_Q_RANK),
        "attn_kv_a_mqa.weight": w(MLA_KV_RANK + MLA_ROPE, HIDDEN),
        "attn_kv_a_norm.weight": w.gains(MLA_KV_RANK),
        "attn_k_b.weight": w(HEADS, MLA_KV_RANK, MLA_NOPE),
        "attn_v_b.weight": w(HEADS, MLA_VALUE, MLA_KV_RANK),
        "attn_output.weight": w.back(HIDDEN, HEADS * MLA_VALUE),
    }


def shared_expert(w: Weights) -> Tensors:
    return {
        "ffn_gate_shexp.weight": w(FF, HIDDEN),
        "ffn_up_shexp.weight": w(FF, HIDDEN),
        "ffn_down_shexp.weight": w.back(HIDDEN, FF),
    }


def mamba_mixer(w: Weights) -> Tensors:
    """Mamba 1, initialised as its paper does: A = -1..-d_state, time steps between 0.001 and 0.1 (inverse softplus)."""
    import numpy as np

    steps = np.geomspace(0.001, 0.1, SSM_INNER)
    return {
        "attn_norm.weight": w.gains(HIDDEN),
        "ssm_in.weight": w(2 * SSM_INNER, HIDDEN),
        "ssm_conv1d.weight": w(SSM_INNER, SSM_CONV),
        "ssm_conv1d.bias": w.around(0, SSM_INNER),
        "ssm_x.weight": w(SSM_DT_RANK + 2 * SSM_STATE, SSM_INNER),
        "ssm_dt.weight": w(SSM_INNER, SSM_DT_RANK),
        "ssm_dt.bias": np.log(np.expm1(steps)).astype(np.float32),
        "ssm_a": -np.tile(np.arange(1, SSM_STATE + 1, dtype=np.float32), (SSM_INNER, 1)),
        "ssm_d": w.ones(SSM_INNER),
        "ssm_out.weight": w.back(HIDDEN, SSM_INNER),
    }


def short_convolution(w: Weights) -> Tensors:
    return {
        "attn_norm.weight": w.gains(HIDDEN),
        "shortconv.in_proj.weight": w(3 * HIDDEN, HIDDEN),
        "shortconv.conv.weight": w(HIDDEN, SHORTCONV),
        "shortconv.out_proj.weight": w.back(HIDDEN, HIDDEN),
    }


def rwkv7_block(w: Weights) -> Tensors:
    import numpy as np

    mixes = np.stack([w.around(0.5, HIDDEN) for _ in range(6)]).reshape(6, 1, 1, HIDDEN)
    ranks = {"w": RWKV_RANK, "a": RWKV_RANK, "v": RWKV_RANK, "g": RWKV_GATE_RANK}
    downs = {f"time_mix_{name}1.weight": w(rank, HIDDEN) for name, rank in ranks.items()}
    ups = {f"time_mix_{name}2.weight": w(HIDDEN, rank) for name, rank in ranks.items()}
    return {
        **layer_norm(w, "attn_norm"),
        **layer_norm(w, "attn_norm_2"),
        **layer_norm(w, "time_mix_ln"),
        "time_mix_lerp_fused.weight": mixes,
        **{f"time_mix_{name}0.weight": w.around(0, HIDDEN, 0.5) for name in "wav"},
        **downs,
        **ups,
        **{f"time_mix_{name}.weight": w.around(0.8, HIDDEN) for name in ("k_k", "k_a", "r_k")},
        **{f"time_mix_{name}.weight": w(HIDDEN, HIDDEN) for name in ("key", "value", "receptance")},
        "time_mix_output.weight": w.back(HIDDEN, HIDDEN),
        "channel_mix_lerp_k.weight": w.around(0.5, HIDDEN),
        "channel_mix_key.weight": w(2 * FF, HIDDEN),
        "channel_mix_value.weight": w.back(HIDDEN, 2 * FF),
    }


def layer_norm(w: Weights, name: str) -> Tensors:
    return {f"{name}.weight": w.gains(HIDDEN), f"{name}.bias": w.around(0, HIDDEN)}
