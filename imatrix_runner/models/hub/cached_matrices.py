"""Matrices that were downloaded before, in the hub's cache on this machine. Nothing is fetched."""

from __future__ import annotations

import glob
from pathlib import Path


def cached_matrices(name: str, model: str) -> tuple[Path, ...]:
    """Files of the cache called ``name`` (empty: unknown), and those that are called imatrix in repositories of a model."""
    from huggingface_hub import constants

    root = Path(constants.HF_HUB_CACHE)
    if not root.is_dir():
        return ()
    patterns = [f"*--*/snapshots/*/{glob.escape(name)}"] if name else []
    patterns.append(f"*--{glob.escape(model)}*/snapshots/*/*imatrix*")
    found = [path for pattern in patterns for path in sorted(root.glob(pattern)) if path.is_file()]
    return tuple(dict.fromkeys(found))
