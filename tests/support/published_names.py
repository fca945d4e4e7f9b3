"""Names of files and the labels that the hub gives them."""

from __future__ import annotations

from imatrix_runner.engines.ftypes import quant_types
from imatrix_runner.models.hub.label_rules import FILE_TYPES

NUMBERS = {label: number for number, label in FILE_TYPES.items()}
TYPES = quant_types({("ALL_F32" if label == "F32" else f"MOSTLY_{label}"): number for label, number in NUMBERS.items()})

MADE = sorted(label for label in NUMBERS if label in {kind.name for kind in TYPES})
"""Labels of types that llama.cpp still makes."""

LABELS = {
    "Model-Q4_K_M.gguf": "Q4_K_M",
    "Model-q4_k_m.gguf": "Q4_K_M",
    "Model.i1-IQ3_XXS.gguf": "IQ3_XXS",
    "Model-UD-Q4_K_XL.gguf": "UD-Q4_K_XL",
    "Model-Q3_K_XL.gguf": "Q3_K_XL",
    "Model-Q2_K_L.gguf": "Q2_K_L",
    "Model-Q6_K_L.gguf": "Q6_K_L",
    "Model-Q4_K_M_L.gguf": "Q4_K_M_L",
    "Model-Q4_K_L.gguf": "",
    "Model-Q5_K_L.gguf": "",
    "Model-Q4_K.gguf": "",
    "Model-MXFP4_MOE.gguf": "MXFP4_MOE",
    "Model-MXFP4.gguf": "MXFP4",
    "Model-NVFP4.gguf": "NVFP4",
    "Model-Q2_K_S.gguf": "Q2_K_S",
    "Model-Q2_K_S_FEEDBACK.gguf": "Q2_K_S",
    "Model-Q2_K_SFEEDBACK.gguf": "Q2_K_SFEEDBACK",
    "Model-Q4_0_4_4.gguf": "Q4_0",
    "Model-TQ1_0.gguf": "TQ1_0",
    "Model-Q1_0.gguf": "Q1_0",
    "Model-Q2_0.gguf": "Q2_0",
    "Model-BF16.gguf": "BF16",
    "Model-MIX-4.25bpw-IQ4_XS.gguf": "IQ4_XS",
    "Model-4.25bpw-IQ4_XS_MIX.gguf": "IQ4_XS_MIX",
    "Model-MIX@4GiB.gguf": "",
    "Model-45%.gguf": "",
    "Q8_0/Model-Q4_0-00001-of-00002.gguf": "Q4_0",
    "imatrix.gguf": "",
    "mmproj-F16.gguf": "F16",
}
"""A file's path -> the label that the hub's parser gives it (``tests/integration/test_hub_parsers.py`` asks it)."""
