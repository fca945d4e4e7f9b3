"""A library that ends llama.cpp on purpose: loaded before ggml (LD_PRELOAD), it looks at every graph that is to be computed.

So real programs and the real bindings meet what they meet on a processor whose kernels are built wrongly.
"""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Literal

from imatrix_runner.environment import FURTHER

Where = Literal["repacked", "quantised", "long"]
"""``repacked``: with a weight in an extra buffer type of the CPU; ``quantised``: with one that is neither F32, F16 nor BF16;
``long``: with such a one and at least 64 tokens, more than the proof at start computes."""

# ggml.h, struct ggml_tensor up to its first source, as layout.py reads it, too.
_SOURCE = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <link.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct tensor {
    int type; void *buffer; int64_t ne[4]; size_t nb[4]; int op; int op_params[16]; int flags; struct tensor *src[10];
};

static int remember(struct dl_phdr_info *info, size_t size, void *handle) {
    if (strstr(info->dlpi_name, "libggml-base")) *(void **) handle = dlopen(info->dlpi_name, RTLD_NOLOAD | RTLD_NOW);
    return 0;
}

// The bindings load ggml where only it sees itself.
static void *ggml(const char *name) {
    static void *handle = NULL;
    if (!handle) dl_iterate_phdr(remember, &handle);
    return dlsym(handle, name);
}

static int is_bad(struct tensor *node) {
    struct tensor *weight = node->src[0];
    const char *where = getenv("CRASH_WHERE");
    if (node->op != MUL_MAT || !weight || !weight->buffer) return 0;
    if (!strcmp(where, "repacked")) {
        const char *(*name)(void *) = ggml("ggml_backend_buffer_name");
        return strstr(name(weight->buffer), "REPACK") != NULL;
    }
    int quantised = weight->type > 1 && weight->type != 30;
    return quantised && (strcmp(where, "long") || node->ne[1] >= 64);
}

int ggml_backend_sched_graph_compute_async(void *sched, void *graph) {
    int (*count)(void *) = ggml("ggml_graph_n_nodes");
    struct tensor *(*node)(void *, int) = ggml("ggml_graph_node");
    int (*compute)(void *, void *) = ggml("ggml_backend_sched_graph_compute_async");
    for (int index = 0; index < count(graph); index++) {
        if (is_bad(node(graph, index))) {
            int number = atoi(getenv("CRASH_SIGNAL"));
            if (number == SIGABRT) fputs("kernels.cpp:42: GGML_ASSERT(tiles) failed\n", stderr);
            signal(number, SIG_DFL);
            raise(number);
        }
    }
    return compute(sched, graph);
}
"""
_MUL_MAT = 29


def crashing_library(folder: Path) -> Path:
    """Compile it into ``folder``."""
    source, library = folder / "crash.c", folder / "crash.so"
    source.write_text(_SOURCE, encoding="utf-8")
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", f"-DMUL_MAT={_MUL_MAT}", source, "-o", library, "-ldl"], check=True)
    return library


def crashes(library: Path, where: Where, signal_number: int) -> dict[str, str]:
    """The environment in which llama.cpp dies of a signal ``where`` says."""
    values = {"CRASH_WHERE": where, "CRASH_SIGNAL": str(signal_number)}
    return {"LD_PRELOAD": str(library), FURTHER: ",".join(values), **values}
