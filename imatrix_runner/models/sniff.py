"""What a file that is not a GGUF seems to be, told from its first bytes, and what to do about it."""

from __future__ import annotations

import struct
from dataclasses import dataclass

HEAD_BYTES = 4096
"""How many first bytes :func:`foreign_format` wants."""

_CONVERT = "Give imatrix-runner the directory that holds it together with its config.json; it converts the model by itself."
_AGAIN = "Delete it and download it again, or give the hub id (org/name) and let imatrix-runner fetch it."


@dataclass(frozen=True)
class Foreign:
    """``seems``: what the file is, as the end of "is not a GGUF file: it is …"; ``todo``: a whole sentence."""

    seems: str
    todo: str


_MAGICS: tuple[tuple[bytes, Foreign], ...] = (
    (b"PK\x03\x04", Foreign("a zip archive, most likely PyTorch weights (.bin, .pt, .pth)", _CONVERT)),
    (b"\x80\x02", Foreign("a Python pickle, most likely old PyTorch weights", _CONVERT)),
    (
        b"lmgg",
        Foreign("a legacy GGML model of 2023", "Use a GGUF made by a current converter; nothing reads this format any more."),
    ),
    (
        b"fmgg",
        Foreign("a legacy GGMF model of 2023", "Use a GGUF made by a current converter; nothing reads this format any more."),
    ),
    (
        b"tjgg",
        Foreign("a legacy GGJT model of 2023", "Use a GGUF made by a current converter; nothing reads this format any more."),
    ),
    (b"algg", Foreign("a legacy GGLA adapter (LoRA)", "Merge the adapter into its base model first, then convert the result.")),
    (b"version https://git-lfs", Foreign("a Git LFS pointer, not the file itself", "Fetch the content with: git lfs pull")),
    (b"\x1f\x8b", Foreign("a gzip archive", "Unpack it first.")),
    (b"\x89HDF", Foreign("an HDF5 file, most likely TensorFlow weights", _CONVERT)),
)


def foreign_format(head: bytes, size: int) -> Foreign:
    """Recognise a file of ``size`` bytes that starts with ``head`` (:data:`HEAD_BYTES`) and not with ``GGUF``."""
    if size == 0:
        return Foreign("an empty file", _AGAIN)
    if not head.strip(b"\0"):
        return Foreign(
            "a file whose header is all zeros, as an interrupted llama-quantize leaves it", "Delete it and make it again."
        )
    for magic, foreign in _MAGICS:
        if head.startswith(magic):
            return foreign
    text = head.lstrip().lower()
    if text.startswith((b"<!doctype", b"<html", b"<head")):
        return Foreign("a web page, most likely an error page or a login form saved under this name", _AGAIN)
    if _is_safetensors(head, size):
        return Foreign("safetensors weights", _CONVERT)
    if _is_legacy_imatrix(head):
        return Foreign(
            "an importance matrix in the legacy format, not a model",
            "Give it with --imatrix PATH, and the model's own GGUF as MODEL.",
        )
    if text.startswith((b"{", b"[")):
        return Foreign("JSON text", "Give the model's GGUF file, its directory, or its hub id (org/name).")
    return Foreign("data of a kind unknown to us", "Give the model's GGUF file, its directory, or its hub id (org/name).")


def _is_safetensors(head: bytes, size: int) -> bool:
    # u64 length of the JSON header, then that JSON (https://huggingface.co/docs/safetensors, "Format").
    return len(head) > 8 and head[8:9] == b"{" and struct.unpack_from("<Q", head)[0] + 8 <= size


def _is_legacy_imatrix(head: bytes) -> bool:
    # i32 entries, i32 name length, name (llama.cpp: common/imatrix-loader.cpp); there is no magic number.
    if len(head) < 16:
        return False
    entries, length = struct.unpack_from("<ii", head)
    name = head[8 : 8 + length] if 0 < length < 256 else b""
    return 0 < entries < 1 << 20 and name.endswith(b".weight") and name.isascii()
