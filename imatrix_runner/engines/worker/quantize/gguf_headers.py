"""Headers of quantised files, made by ggml's own GGUF functions in llama-quantize's order, hence equal by construction; those
of shards in llama-gguf-split's.

Source: ``llama_model_quantize_impl`` in src/llama-quant.cpp, ``split_strategy`` in tools/gguf-split/gguf-split.cpp.
"""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from imatrix_runner.engines.jobs import TensorTarget
from imatrix_runner.engines.shards import cut
from imatrix_runner.engines.worker.library import GgufInitParams, InitParams, Library
from imatrix_runner.engines.worker.quantize.ggml_rows import Kernels, Type
from imatrix_runner.engines.worker.quantize.overrides import KeyValue
from imatrix_runner.engines.worker.refusal import Refusal
from imatrix_runner.models.gguf_file import GgufHeader, TensorInfo, padded, read_header

ALIGNMENT = 32
"""GGUF_DEFAULT_ALIGNMENT: llama-quantize uses it whatever the source's alignment."""

_QUANTIZATION_VERSION = 2  # ggml.h, GGML_QNT_VERSION
_SPLIT_KEYS = (b"split.no", b"split.count", b"split.tensors.count")
_BLOCK = re.compile(r"blk\.(\d+)\.")


@dataclass(frozen=True)
class SourceTensor:
    """A tensor of the model: number of its file, and byte offset there."""

    file: int
    offset: int
    shape: tuple[int, ...]
    kind: Type
    n_bytes: int

    @cached_property
    def n_per_row(self) -> int:
        return self.shape[0] if self.shape else 1

    @cached_property
    def n_elements(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count

    @cached_property
    def rows(self) -> int:
        return self.n_elements // self.n_per_row

    @property
    def rows_per_expert(self) -> int:
        return self.shape[1] if len(self.shape) > 1 else 1


@dataclass(frozen=True)
class SourceHeader:
    """The model's files and the places of its tensors in them; ``tensors`` in the files' order."""

    files: tuple[Path, ...]
    header: GgufHeader
    tensors: dict[str, SourceTensor]

    @classmethod
    def open(cls, files: Sequence[Path], kernels: Kernels) -> SourceHeader:
        headers = [read_header(path) for path in files]
        tensors = {
            info.name: _source_tensor(index, header, info, kernels)
            for index, header in enumerate(headers)
            for info in header.tensors
        }
        return cls(tuple(files), headers[0], tensors)


def _source_tensor(file: int, header: GgufHeader, info: TensorInfo, kernels: Kernels) -> SourceTensor:
    if info.n_bytes is None:
        raise Refusal.mismatch(f"{header.path.name} has a tensor of type {info.type_name}")
    return SourceTensor(file, header.data_offset + info.offset, info.shape, kernels.type(info.type_name), info.n_bytes)


@dataclass(frozen=True)
class TensorPlace:
    """Where a tensor of an output goes: number of the file, byte offset, type and size."""

    file: int
    offset: int
    kind: Type
    n_bytes: int


@dataclass(frozen=True)
class FileLayout:
    """One output file before its data: the header, and the size of the whole file."""

    header: bytes
    size: int


@dataclass(frozen=True)
class GgufHead:
    """What a level's header depends on, apart from its tensors. ``shards``: number of tensors in each shard that the finished
    level is cut into, empty where it is not."""

    file_type: int
    overrides: tuple[KeyValue, ...]
    pruned: bool
    keep_split: bool
    shards: tuple[int, ...] = ()


class HeaderMaker:
    """Makes headers from one source; its metadata is read once."""

    def __init__(self, library: Library, kernels: Kernels, source: SourceHeader) -> None:
        self._ggml, self._kernels, self._source = library.ggml, kernels, source

    @contextmanager
    def _metadata(self) -> Iterator[int]:
        path = os.fsencode(self._source.files[0])
        context = self._ggml("gguf_init_from_file")(path, GgufInitParams(True, None))
        if not context:
            raise Refusal.failed(
                "llama.cpp cannot read the model's header", f"it does not accept {self._source.files[0].name} as a GGUF"
            )
        try:
            yield context
        finally:
            self._ggml("gguf_free")(context)

    def make(self, head: GgufHead, tensors: Sequence[TensorTarget]) -> tuple[list[FileLayout], dict[str, TensorPlace]]:
        """Lay out the files of a level, and the place of each tensor by its name there; ``tensors`` in the output's order."""
        ggml = self._ggml
        files = self._files(head, tensors)
        n_files = len(files)
        contexts = [ggml("gguf_init_empty")() for _ in files]
        try:
            with self._metadata() as metadata:
                ggml("gguf_set_kv")(contexts[0], metadata)
            self._set_keys(contexts[0], head, tensors)
            if n_files > 1:
                for index, context in enumerate(contexts):
                    ggml("gguf_set_val_u16")(context, b"split.no", index)
                    ggml("gguf_set_val_u16")(context, b"split.count", n_files)
                    ggml("gguf_set_val_i32")(context, b"split.tensors.count", len(tensors))
                    if head.shards:  # llama-gguf-split sets it again once the number is known, which moves it to the end
                        ggml("gguf_set_val_u16")(context, b"split.count", n_files)
            layouts: list[FileLayout] = []
            places: dict[str, TensorPlace] = {}
            for index, (context, members) in enumerate(zip(contexts, files, strict=True)):
                layouts.append(self._lay_out(index, context, members, places))
            return layouts, places
        finally:
            for context in contexts:
                ggml("gguf_free")(context)

    def _files(self, head: GgufHead, tensors: Sequence[TensorTarget]) -> list[list[TensorTarget]]:
        """The tensors of each file of a level."""
        if head.shards:
            return cut(tensors, head.shards)
        if not head.keep_split:
            return [list(tensors)]
        shard_of = [self._source.tensors[tensor.original].file for tensor in tensors]
        numbered = list(zip(shard_of, tensors, strict=True))
        return [[tensor for file, tensor in numbered if file == index] for index in range(max(shard_of, default=0) + 1)]

    def _set_keys(self, context: int, head: GgufHead, tensors: Sequence[TensorTarget]) -> None:
        ggml = self._ggml
        ggml("gguf_set_val_u32")(context, b"general.quantization_version", _QUANTIZATION_VERSION)
        ggml("gguf_set_val_u32")(context, b"general.file_type", head.file_type)
        for key in _SPLIT_KEYS:
            ggml("gguf_remove_key")(context, key)
        for override in head.overrides:
            value = override.value
            if isinstance(value, bool):
                ggml("gguf_set_val_bool")(context, override.key, value)
            elif isinstance(value, int):
                ggml("gguf_set_val_u32")(context, override.key, abs(value) & 0xFFFFFFFF)
            elif isinstance(value, float):
                ggml("gguf_set_val_f32")(context, override.key, value)
            else:
                ggml("gguf_set_val_str")(context, override.key, value)
        if head.pruned:
            layers = {match[1] for tensor in tensors if (match := _BLOCK.search(tensor.name))}
            count = f"{self._source.header.metadata.get('general.architecture')}.block_count"
            ggml("gguf_set_val_u32")(context, count.encode(), len(layers))

    def _lay_out(self, file: int, context: int, tensors: Sequence[TensorTarget], places: dict[str, TensorPlace]) -> FileLayout:
        ggml = self._ggml
        arena = ggml("ggml_init")(InitParams((len(tensors) + 1) * ggml("ggml_tensor_overhead")(), None, True))
        try:
            for tensor in tensors:
                source, kind = self._source.tensors[tensor.original], self._kernels.type(tensor.type)
                shape = (*source.shape, 1, 1, 1, 1)[:4]
                if shape[0] % kind.block:
                    # ggml would abort the process.
                    why = f"{tensor.name} has rows of {shape[0]}, which {kind.name} (blocks of {kind.block}) cannot hold"
                    raise Refusal.failed("A level cannot be laid out", why)
                pointer = ggml("ggml_new_tensor_4d")(arena, kind.number, *shape)
                ggml("ggml_set_name")(pointer, tensor.name.encode())
                ggml("gguf_add_tensor")(context, pointer)
        finally:
            ggml("ggml_free")(arena)
        memory = ctypes.create_string_buffer(ggml("gguf_get_meta_size")(context))
        ggml("gguf_get_meta_data")(context, memory)
        header = memory.raw
        size = len(header)
        for index, tensor in enumerate(tensors):
            source, kind = self._source.tensors[tensor.original], self._kernels.type(tensor.type)
            n_bytes = source.rows * kind.row_bytes(source.n_per_row)
            # llama-quantize writes the tensors in order, at these offsets.
            assert len(header) + ggml("gguf_get_tensor_offset")(context, index) == size
            places[tensor.name] = TensorPlace(file, size, kind, n_bytes)
            size += padded(n_bytes, ALIGNMENT)
        return FileLayout(header, size)
