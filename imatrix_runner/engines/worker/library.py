"""llama.cpp's libraries as llama-cpp-python binds them, plus the ggml functions it leaves out.

Only a worker process imports this: loading native code may end the process.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

from imatrix_runner.engines.worker.refusal import Refusal


class InitParams(ctypes.Structure):
    """ggml.h, ``struct ggml_init_params``, passed by value."""

    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


class GgufInitParams(ctypes.Structure):
    """gguf.h, ``struct gguf_init_params``, passed by value."""

    _fields_ = (("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p))


# ggml.h and gguf.h, whose functions the bindings do not declare. name -> (result, arguments)
_VOID, _INT, _I64, _SIZE = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_size_t
_TEXT, _BOOL = ctypes.c_char_p, ctypes.c_bool
_GGML: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "ggml_version": (_TEXT, ()),
    "ggml_commit": (_TEXT, ()),
    "ggml_init": (_VOID, (InitParams,)),
    "ggml_free": (None, (_VOID,)),
    "ggml_new_tensor_4d": (_VOID, (_VOID, _INT, _I64, _I64, _I64, _I64)),
    "ggml_set_name": (_VOID, (_VOID, _TEXT)),
    "ggml_get_name": (_TEXT, (_VOID,)),
    "ggml_get_data": (_VOID, (_VOID,)),
    "ggml_nbytes": (_SIZE, (_VOID,)),
    "ggml_nelements": (_I64, (_VOID,)),
    "ggml_op_name": (_TEXT, (_INT,)),
    "ggml_type_name": (_TEXT, (_INT,)),
    "ggml_tensor_overhead": (_SIZE, ()),
    "ggml_mul_mat": (_VOID, (_VOID, _VOID, _VOID)),
    "ggml_backend_buffer_is_host": (_BOOL, (_VOID,)),
    "ggml_backend_tensor_get": (None, (_VOID, _VOID, _SIZE, _SIZE)),
    "ggml_backend_tensor_set": (None, (_VOID, _VOID, _SIZE, _SIZE)),
    "ggml_backend_dev_count": (_SIZE, ()),
    "ggml_backend_dev_get": (_VOID, (_SIZE,)),
    "ggml_backend_dev_name": (_TEXT, (_VOID,)),
    "ggml_backend_dev_description": (_TEXT, (_VOID,)),
    "ggml_backend_dev_type": (_INT, (_VOID,)),
    "ggml_backend_dev_memory": (None, (_VOID, ctypes.POINTER(_SIZE), ctypes.POINTER(_SIZE))),
    "ggml_backend_dev_buffer_type": (_VOID, (_VOID,)),
    "ggml_backend_buft_name": (_TEXT, (_VOID,)),
    "ggml_backend_buft_get_device": (_VOID, (_VOID,)),
    "ggml_backend_buffer_get_type": (_VOID, (_VOID,)),
    "ggml_backend_dev_init": (_VOID, (_VOID, _TEXT)),
    "ggml_backend_dev_supports_op": (_BOOL, (_VOID, _VOID)),
    "ggml_backend_free": (None, (_VOID,)),
    "ggml_backend_graph_compute": (_INT, (_VOID, _VOID)),
    "ggml_gallocr_new": (_VOID, (_VOID,)),
    "ggml_gallocr_alloc_graph": (_BOOL, (_VOID, _VOID)),
    "ggml_gallocr_free": (None, (_VOID,)),
    "ggml_new_graph_custom": (_VOID, (_VOID, _SIZE, _BOOL)),
    "ggml_build_forward_expand": (None, (_VOID, _VOID)),
    "ggml_sqr": (_VOID, (_VOID, _VOID)),
    "ggml_transpose": (_VOID, (_VOID, _VOID)),
    "ggml_cont": (_VOID, (_VOID, _VOID)),
    "ggml_sum_rows": (_VOID, (_VOID, _VOID)),
    "ggml_get_type_traits": (_VOID, (_INT,)),
    "ggml_blck_size": (_I64, (_INT,)),
    "ggml_type_size": (_SIZE, (_INT,)),
    "ggml_is_quantized": (_BOOL, (_INT,)),
    "ggml_fp16_to_fp32_row": (None, (_VOID, _VOID, _I64)),
    "ggml_bf16_to_fp32_row": (None, (_VOID, _VOID, _I64)),
    "ggml_quantize_chunk": (_SIZE, (_INT, _VOID, _VOID, _I64, _I64, _I64, _VOID)),
    "ggml_quantize_init": (None, (_INT,)),
    "ggml_quantize_requires_imatrix": (_BOOL, (_INT,)),
    "ggml_validate_row_data": (_BOOL, (_INT, _VOID, _SIZE)),
    "gguf_init_empty": (_VOID, ()),
    "gguf_init_from_file": (_VOID, (_TEXT, GgufInitParams)),
    "gguf_free": (None, (_VOID,)),
    "gguf_set_kv": (None, (_VOID, _VOID)),
    "gguf_remove_key": (_I64, (_VOID, _TEXT)),
    "gguf_set_val_u16": (None, (_VOID, _TEXT, ctypes.c_uint16)),
    "gguf_set_val_u32": (None, (_VOID, _TEXT, ctypes.c_uint32)),
    "gguf_set_val_i32": (None, (_VOID, _TEXT, ctypes.c_int32)),
    "gguf_set_val_f32": (None, (_VOID, _TEXT, ctypes.c_float)),
    "gguf_set_val_bool": (None, (_VOID, _TEXT, _BOOL)),
    "gguf_set_val_str": (None, (_VOID, _TEXT, _TEXT)),
    "gguf_add_tensor": (None, (_VOID, _VOID)),
    "gguf_get_tensor_offset": (_SIZE, (_VOID, _I64)),
    "gguf_get_meta_size": (_SIZE, (_VOID,)),
    "gguf_get_meta_data": (None, (_VOID, _VOID)),
}


class Library:
    """The loaded libraries: ``llama`` is the bindings' module, ``ggml(name)`` a declared ggml function."""

    def __init__(self) -> None:
        try:
            self.llama: Any = _declarations()
        except ModuleNotFoundError as error:
            raise Refusal.missing(f"{error.name} is not installed") from error
        except (FileNotFoundError, OSError, RuntimeError) as error:
            raise Refusal.missing(f"its libraries do not load: {error}") from error
        override = os.environ.get("LLAMA_CPP_LIB_PATH")
        self.directory = Path(override) if override else Path(self.llama.__file__).parent / "lib"
        self._handles = [self.llama._lib, *_further_libraries(self.directory)]
        self.llama.llama_backend_init()
        self._declared: dict[str, Any] = {}

    @property
    def version(self) -> str:
        """The version of llama-cpp-python, for the proof and for refusals."""
        from importlib.metadata import version

        return version("llama-cpp-python")

    def ggml(self, name: str) -> Any:
        """A ggml function by its C name. Raises :class:`Refusal` if the library does not have it."""
        function = self._declared.get(name)
        if function is None:
            result, arguments = _GGML[name]
            function = self.symbol(name)
            function.restype, function.argtypes = result, arguments
            self._declared[name] = function
        return function

    def symbol(self, name: str) -> Any:
        """An exported function without declared types."""
        for handle in self._handles:
            try:
                return handle[name]
            except AttributeError:
                continue
        raise Refusal.mismatch(f"its library has no function {name}")

    def devices(self) -> list[Device]:
        """Everything ggml can compute on, in its order."""
        count = self.ggml("ggml_backend_dev_count")()
        return [Device.of(self, self.ggml("ggml_backend_dev_get")(index)) for index in range(count)]


class Device:
    """One ggml device. ``kind``: 0 CPU, 1 GPU, 2 integrated GPU, 3 accelerator (ggml-backend.h)."""

    def __init__(self, name: str, description: str, kind: int, total: int, free: int, buffer: int) -> None:
        self.name, self.description, self.kind, self.total, self.free, self.buffer = (
            name,
            description,
            kind,
            total,
            free,
            buffer,
        )

    @classmethod
    def of(cls, library: Library, pointer: int) -> Device:
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        library.ggml("ggml_backend_dev_memory")(pointer, ctypes.byref(free), ctypes.byref(total))
        return cls(
            library.ggml("ggml_backend_dev_name")(pointer).decode(),
            library.ggml("ggml_backend_dev_description")(pointer).decode(),
            library.ggml("ggml_backend_dev_type")(pointer),
            total.value,
            free.value,
            library.ggml("ggml_backend_dev_buffer_type")(pointer),
        )

    @property
    def is_gpu(self) -> bool:
        return self.kind in (1, 2)

    def __str__(self) -> str:
        """As ``--list-devices`` prints it: ``CUDA0: NVIDIA H200 (143771 MiB, 143041 MiB free)``."""
        return f"{self.name}: {self.description} ({self.total >> 20} MiB, {self.free >> 20} MiB free)"


def _declarations() -> Any:
    """llama-cpp-python's module that loads llama.cpp and declares its functions.

    The package's own ``__init__`` does not run: it imports classes and chat formats that a worker does not use (a sixth of the
    time in which one starts), and has llama.cpp's messages go through a callback that loses errors.
    """
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None:
        raise ModuleNotFoundError("No module named 'llama_cpp'", name="llama_cpp")
    sys.modules.setdefault("llama_cpp", importlib.util.module_from_spec(spec))
    import llama_cpp.llama_cpp

    return llama_cpp.llama_cpp


def _further_libraries(directory: Path) -> list[ctypes.CDLL]:
    """ggml's libraries on Windows, where a symbol is found only in its own library; none elsewhere."""
    if sys.platform != "win32":
        return []
    return [ctypes.CDLL(str(path)) for path in sorted(directory.glob("*ggml*.dll"))]


@lru_cache(maxsize=1)
def load() -> Library:
    """The libraries, loaded once per process."""
    return Library()
