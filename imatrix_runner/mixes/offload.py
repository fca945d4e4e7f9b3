"""Which tensors of a file go to the GPU and which stay in memory, as llama.cpp's options. Pure.

As users do it with ``-ot`` or ``--n-cpu-moe``: everything but the experts goes to the GPU, because every token needs it; then
the experts, layer by layer from the last, as far as they fit. A file without experts, or one of which even the rest does not
fit, is divided by ``-ngl``, from the last layer too (src/llama-model.cpp, ``load_tensors``; common/common.h,
``LLM_FFN_EXPS_REGEX``).
"""

from __future__ import annotations

import re
import shlex
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from imatrix_runner.imatrix.matrix import TOKEN_EMBEDDINGS
from imatrix_runner.models.tensor_patterns import OUTPUT

_EXPERTS = r"\.ffn_(up|down|gate|gate_up)_(ch|)exps"
_EXPERTS_OF_LAYER = re.compile(rf"blk\.(\d+){_EXPERTS}")
_BLOCK = re.compile(r"blk\.(\d+)\.")
_ALL_LAYERS = 99  # as users write it


@dataclass(frozen=True)
class Offload:
    """``flags``: options for llama.cpp's programs. ``vram_bytes`` and ``ram_bytes``: weights in each; token embeddings that
    serve as output layer too are in both. ``n_gpu_layers`` of ``n_layers`` are on the GPU (the output layer counts as one),
    except the experts of ``experts_in_ram``, which are numbers of blocks."""

    flags: tuple[str, ...]
    vram_bytes: int
    ram_bytes: int
    n_gpu_layers: int
    n_layers: int
    experts_in_ram: tuple[int, ...]

    @property
    def command_line(self) -> str:
        """The flags as they are typed in a shell: ``-ngl 99 -ot 'blk\\.(0|1)…=CPU'``."""
        return shlex.join(self.flags)


def offload(sizes: Mapping[str, int], vram: int, reserve: int = 0) -> Offload:
    """Divide a file's tensors, given as name -> bytes, so that those on the GPU take at most ``vram - reserve`` bytes.

    ``reserve``: for the context and compute buffers. The token embeddings always stay in memory.
    """
    blocks: dict[int, int] = defaultdict(int)
    experts: dict[int, int] = defaultdict(int)
    output = embeddings = 0
    for name, n_bytes in sizes.items():
        if match := _EXPERTS_OF_LAYER.match(name):
            experts[int(match[1])] += n_bytes
            blocks[int(match[1])] += 0
        elif match := _BLOCK.match(name):
            blocks[int(match[1])] += n_bytes
        elif name in TOKEN_EMBEDDINGS:
            embeddings += n_bytes
        else:
            output += n_bytes
    if OUTPUT not in sizes:
        output += sizes.get(TOKEN_EMBEDDINGS[0], 0)  # loaded twice
    room = vram - reserve
    layers = [output, *(blocks[number] for number in sorted(blocks, reverse=True))]
    n_gpu_layers, vram_bytes = _as_many(layers, room)
    ordered = sorted(experts, reverse=True)
    n_experts, expert_bytes = 0, 0
    if n_gpu_layers == len(layers):
        n_experts, expert_bytes = _as_many([experts[number] for number in ordered], room - vram_bytes)
    in_ram = tuple(sorted(ordered[n_experts:]))
    ram_bytes = embeddings + sum(layers[n_gpu_layers:]) + sum(experts.values()) - expert_bytes
    if not n_gpu_layers and OUTPUT not in sizes:
        ram_bytes -= sizes.get(TOKEN_EMBEDDINGS[0], 0)  # in memory there is one for both
    flags = _flags(n_gpu_layers, len(layers), in_ram)
    return Offload(flags, vram_bytes + expert_bytes, ram_bytes, n_gpu_layers, len(layers), in_ram)


def _as_many(parts: Sequence[int], room: int) -> tuple[int, int]:
    """How many parts fit into ``room``, in order, and their bytes together."""
    sums = [total for total in accumulate(parts) if total <= room]
    return len(sums), sums[-1] if sums else 0


def _flags(n_gpu_layers: int, n_layers: int, experts_in_ram: Sequence[int]) -> tuple[str, ...]:
    if not n_gpu_layers:
        return ("-ngl", "0")
    layers = max(n_layers, _ALL_LAYERS) if n_gpu_layers == n_layers else n_gpu_layers
    if not experts_in_ram:
        return ("-ngl", str(layers))
    numbers = "|".join(map(str, experts_in_ram))
    return ("-ngl", str(layers), "-ot", rf"blk\.({numbers}){_EXPERTS}=CPU")
