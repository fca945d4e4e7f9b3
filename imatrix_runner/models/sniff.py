"""Recognises files that are not GGUF by their first bytes and names, with advice for each."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from imatrix_runner.bounded import quoted
from imatrix_runner.safe_text import printable

HEAD_BYTES = 4096
"""Number of first bytes that :func:`foreign_format` takes."""

LFS_POINTER = b"version https://git-lfs"
UNFINISHED = (".part", ".aria2", ".incomplete", ".crdownload", ".download", ".tmp")
"""Endings that download programs give a file until it is complete."""

_AGAIN = "Delete it and download it again, or give the hub id (org/name) and let imatrix-runner fetch it."
_OTHERWISE = "Give the model's GGUF file, its directory, or its hub id (org/name)."
_NEWER = "Use a GGUF made by a current converter; this format is obsolete."
_ORIGINAL = "Give the model it was made from: its GGUF, its directory with safetensors, or its hub id (org/name)."
_PICKLE = (
    "Give the model's directory with safetensors, or its GGUF; pickles are not read, because they can execute hidden code."
)
_UNPACK = "Unpack it, then give the GGUF file or the folder with config.json."
_CONVERT = "<convert>"
"""Placeholder for the advice to give the folder, which :func:`foreign_format` fills in."""
_TEXT_SHOWN = 60


@dataclass(frozen=True)
class Foreign:
    """``seems``: what the file seems to be, as a noun phrase for "it is …"; ``todo``: a sentence."""

    seems: str
    todo: str


UNKNOWN = Foreign("data of an unknown format", _OTHERWISE)


@dataclass(frozen=True)
class _File:
    """The properties of a file that the rows test."""

    head: bytes
    size: int
    name: str

    @property
    def text(self) -> bytes:
        return self.head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()


def _magic(*starts: bytes) -> Callable[[_File], bool]:
    return lambda file: file.head.startswith(starts)


def _named(*endings: str) -> Callable[[_File], bool]:
    return lambda file: file.name.endswith(endings)


def _both(*tests: Callable[[_File], bool]) -> Callable[[_File], bool]:
    return lambda file: all(test(file) for test in tests)


def _zeros(file: _File) -> bool:
    return not file.head.strip(b"\0")


def _is_safetensors(file: _File) -> bool:
    # u64 length of the JSON header, then that JSON (https://huggingface.co/docs/safetensors, "Format").
    head = file.head
    return len(head) > 8 and head[8:9] == b"{" and struct.unpack_from("<Q", head)[0] + 8 <= file.size


def is_legacy_imatrix(head: bytes) -> bool:
    """Whether a file with these first bytes is an imatrix in the legacy format, complete or not."""
    # i32 entries, i32 name length, name (llama.cpp: common/imatrix-loader.cpp); there is no magic number.
    if len(head) < 16:
        return False
    entries, length = struct.unpack_from("<ii", head)
    name = head[8 : 8 + length] if 0 < length < 256 else b""
    return 0 < entries < 1 << 20 and name.endswith(b".weight") and name.isascii()


def _is_text(file: _File) -> bool:
    try:
        # The last character may be incomplete.
        text = file.head[:-4].decode("utf-8") if file.size > len(file.head) else file.head.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return all(character.isprintable() or character in "\t\r\n\f" for character in text)


_TABLE: tuple[tuple[Callable[[_File], bool], str, str], ...] = (
    (lambda file: file.size == 0, "an empty file", _AGAIN),
    (
        _both(_zeros, _named(*UNFINISHED)),
        "an unfinished download",
        "Let the download finish, or delete it and download the file again.",
    ),
    (
        _zeros,
        "a file whose header is all zeros, as an interrupted llama-quantize or download leaves it",
        "Delete it and create or download it again.",
    ),
    (_both(_magic(b"PK\x03\x04"), _named(".npz")), "NumPy arrays (.npz), perhaps an early MLX or JAX export", _ORIGINAL),
    (_both(_magic(b"PK\x03\x04"), _named(".docx", ".xlsx", ".pptx", ".odt", ".epub")), "an office document", _OTHERWISE),
    (_both(_magic(b"PK\x03\x04"), _named(".zip")), "a zip archive", _UNPACK),
    (_magic(b"PK\x03\x04"), "a zip archive, most likely PyTorch weights (.bin, .pt, .pth)", _PICKLE),
    (_magic(b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"), "a Python pickle, most likely old PyTorch weights", _PICKLE),
    (_magic(b"lmgg"), "a legacy GGML model of 2023", _NEWER),
    (_magic(b"fmgg"), "a legacy GGMF model of 2023", _NEWER),
    (_magic(b"tjgg"), "a legacy GGJT model of 2023", _NEWER),
    (_magic(b"algg"), "a legacy GGLA adapter (LoRA)", "Merge the adapter into its base model first, then convert the result."),
    (_magic(LFS_POINTER), "a Git LFS pointer, not the file itself", "Fetch the content with: git lfs pull"),
    (_magic(b"\x1f\x8b"), "a gzip archive", _UNPACK),
    (_magic(b"7z\xbc\xaf\x27\x1c"), "a 7z archive", _UNPACK),
    (_magic(b"\xfd7zXZ\0"), "an xz archive", _UNPACK),
    (_magic(b"\x28\xb5\x2f\xfd"), "a zstd archive", _UNPACK),
    (_magic(b"BZh"), "a bzip2 archive", _UNPACK),
    (_magic(b"Rar!"), "a rar archive", _UNPACK),
    (lambda file: file.head[257:262] == b"ustar" and file.name.endswith(".nemo"), "a NeMo model", _ORIGINAL),
    (lambda file: file.head[257:262] == b"ustar", "a tar archive", _UNPACK),
    (_magic(b"\x89HDF"), "an HDF5 file, most likely TensorFlow weights", _CONVERT),
    (_magic(b"\x93NUMPY"), "a NumPy array", _ORIGINAL),
    (_magic(b"%PDF-"), "a PDF", _OTHERWISE),
    (_magic(b"PAR1"), "a Parquet table, most likely a data set", _OTHERWISE),
    (_magic(b"\x7fELF", b"MZ"), "a program or a library", "If it is a llamafile: unzip it, and give the GGUF inside."),
    (
        _both(_is_safetensors, lambda file: b"lora_A" in file.head or "adapter_model" in file.name),
        "an adapter (LoRA) in safetensors",
        "Merge it into its base model (PEFT: merge_and_unload, then save_pretrained with the tokenizer) and give the result.",
    ),
    (_is_safetensors, "safetensors weights", _CONVERT),
    (
        lambda file: is_legacy_imatrix(file.head),
        "an importance matrix in the legacy format, not a model",
        "Give it with --imatrix PATH, and the model's own GGUF as MODEL.",
    ),
    (
        lambda file: file.text.startswith((b"<!doctype", b"<html", b"<head", b"<?xml")),
        "a web page, most likely an error page or a login form saved under this name",
        _AGAIN,
    ),
    (_both(lambda file: file.text.startswith((b"{", b"[")), _named(".json")), "JSON text", _CONVERT),
    (lambda file: file.text.startswith((b"{", b"[")), "JSON text, perhaps an error message saved under this name", _OTHERWISE),
    (_named(".onnx", ".onnx_data"), "an ONNX export", _ORIGINAL),
    (_named(".engine", ".plan"), "a TensorRT engine", _ORIGINAL),
    (_named(".tflite", ".task", ".litertlm"), "an export for LiteRT", _ORIGINAL),
    (_named(".model", ".tiktoken"), "a tokenizer, not a model", _CONVERT),
)


def foreign_format(head: bytes, size: int, path: Path) -> Foreign:
    """Recognise a file that is not GGUF by its first bytes ``head`` (:data:`HEAD_BYTES`), its ``size`` and its name."""
    file = _File(head, size, path.name.lower())
    for matches, seems, todo in _TABLE:
        if matches(file):
            return Foreign(seems, _folder_advice(path) if todo == _CONVERT else todo)
    if file.text and _is_text(file):
        first = printable(head.decode("utf-8", "replace").lstrip("\ufeff").strip().split("\n")[0].strip()[:_TEXT_SHOWN])
        gguf = path.suffix.lower() in (".gguf", ".safetensors", ".bin")
        what = "text, most likely an error message saved under this name" if gguf else "text"
        return Foreign(f"{what}; it begins with {first!r}", _AGAIN if gguf else _OTHERWISE)
    return UNKNOWN


def _folder_advice(path: Path) -> str:
    if (path.parent / "config.json").is_file():
        return f"Give its directory, which imatrix-runner converts: imatrix-runner run {quoted(path.absolute().parent)}"
    return "Give the directory with this file and its config.json; imatrix-runner converts the model."
