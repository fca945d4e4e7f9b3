"""What a level takes to run, by formula: contexts from metadata that may say anything, and what of a level a GPU holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imatrix_runner.advise.memory import SPARE_BYTES, Budget, ContextMemory, context_memory, fit
from imatrix_runner.models.model import Model, open_gguf
from imatrix_runner.quantize.recipe import RecipeTensor
from support.tiny_models import write_llama_gguf

GIB = 1 << 30
NO_CONTEXT = ContextMemory(512, (0, 0, 0, 0), "exact")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A real one of two layers: 4 heads of 64, 2 of them for keys and values."""
    path = write_llama_gguf(tmp_path_factory.mktemp("memory") / "tiny-BF16.gguf")
    return open_gguf(path, allow_requantize=False)


def with_metadata(model: Model, **changes: Any) -> Model:
    """The model with other metadata of its architecture; None takes a key away."""
    told: Mapping[str, Any] = {f"llama.{key.replace('__', '.')}": value for key, value in changes.items()}
    metadata = {key: value for key, value in {**model.header.metadata, **told}.items() if value is not None}
    return replace(model, header=replace(model.header, metadata=MappingProxyType(metadata)))


def tensor(name: str, n_bytes: int) -> RecipeTensor:
    return RecipeTensor(name, (n_bytes,), "BF16", "Q8_0", n_bytes)


def level(*blocks: int, embeddings: int = 0, output: int | None = 0) -> tuple[list[RecipeTensor], int]:
    """Tensors of a level, in bytes of each block, and the size of its file."""
    tensors = [tensor("token_embd.weight", embeddings)]
    tensors += [tensor(f"blk.{number}.ffn_up.weight", n_bytes) for number, n_bytes in enumerate(blocks)]
    tensors += [tensor("output.weight", output)] if output is not None else []
    return tensors, sum(each.n_bytes or 0 for each in tensors)


class TestTheContext:
    def test_keys_and_values_of_every_token_in_every_layer(self, model: Model) -> None:
        kv_heads = model.header.integer("llama.attention.head_count_kv")
        assert kv_heads is not None
        head = (model.header.integer("llama.embedding_length") or 0) // (
            model.header.integer("llama.attention.head_count") or 1
        )
        found = context_memory(model, 4096)
        assert (found.n_bytes, found.certainty) == (2 * 2 * 4096 * kv_heads * head * 2, "exact")
        assert found.describe() == "4.00 MiB"

    def test_llama_cpp_rounds_to_256_tokens(self, model: Model) -> None:
        assert context_memory(model, 4097).n_bytes == context_memory(model, 4352).n_bytes
        assert context_memory(model, 1).n_bytes == context_memory(model, 256).n_bytes

    def test_a_window_of_unknown_layers_is_an_upper_bound(self, model: Model) -> None:
        whole = context_memory(model, 4096).n_bytes
        found = context_memory(with_metadata(model, attention__sliding_window=1024), 4096)
        assert (found.n_bytes, found.certainty) == (whole, "at most")
        assert found.describe().startswith("at most ")
        assert "1,024" in found.note

    @pytest.mark.parametrize("pattern", [2, (True, False)])
    def test_a_window_of_known_layers_counts_there(self, model: Model, pattern: object) -> None:
        changed = with_metadata(model, attention__sliding_window=1024, attention__sliding_window_pattern=pattern)
        found = context_memory(changed, 4096)
        assert [n_bytes / found.layers[1] for n_bytes in found.layers] == [1536 / 4096, 1]
        assert found.certainty == "about"
        assert context_memory(changed, 256).n_bytes == context_memory(model, 256).n_bytes

    def test_heads_may_differ_from_layer_to_layer(self, model: Model) -> None:
        found = context_memory(with_metadata(model, attention__head_count_kv=(0, 2)), 1024)
        assert found.layers[0] == 0
        assert found.layers[1] == context_memory(model, 1024).layers[1]

    def test_layers_that_share_or_idle_make_it_an_upper_bound(self, model: Model) -> None:
        assert context_memory(with_metadata(model, attention__shared_kv_layers=1), 512).certainty == "at most"
        assert context_memory(with_metadata(model, nextn_predict_layers=1), 512).certainty == "at most"

    def test_what_keeps_more_than_keys_and_values_is_not_known(self, model: Model) -> None:
        found = context_memory(with_metadata(model, attention__indexer__top_k=64), 512)
        assert (found.n_bytes, found.certainty, found.describe()) == (None, "unknown", "not known")

    @pytest.mark.parametrize(
        "lie",
        [
            {"block_count": 1 << 32},
            {"block_count": -1},
            {"block_count": None},
            {"attention__head_count": None, "attention__head_count_kv": None},
            {"attention__head_count": "four"},
            {"attention__key_length": (1 << 63), "attention__head_count_kv": 1 << 31},
        ],
    )
    def test_metadata_that_cannot_be_gives_no_figure(self, model: Model, lie: dict[str, Any]) -> None:
        assert context_memory(with_metadata(model, **lie), 4096).n_bytes is None

    @given(
        st.dictionaries(
            st.sampled_from(
                (
                    *("block_count", "embedding_length", "attention.head_count", "attention.head_count_kv"),
                    *("attention.key_length", "attention.value_length", "attention.key_length_mla", "ssm.inner_size"),
                    *("attention.sliding_window", "attention.sliding_window_pattern", "wkv.head_size", "shortconv.l_cache"),
                )
            ),
            st.one_of(
                st.integers(-(1 << 63), (1 << 64) - 1),
                st.floats(),
                st.text(max_size=3),
                st.booleans(),
                st.lists(st.integers(-4, 4), max_size=4).map(tuple),
                st.lists(st.text(max_size=2), max_size=3).map(tuple),
            ),
        ),
        st.integers(1, 1 << 31),
    )
    def test_whatever_a_file_says_there_is_an_answer(self, model: Model, lies: dict[str, Any], n_ctx: int) -> None:
        found = context_memory(with_metadata(model, **{key.replace(".", "__"): value for key, value in lies.items()}), n_ctx)
        assert found.n_bytes is None or 0 <= found.n_bytes <= 1 << 60
        assert found.describe()


class TestWhereALevelRuns:
    def test_on_the_gpu_with_its_context_and_what_is_left_free(self) -> None:
        tensors, n_bytes = level(GIB, GIB, output=GIB)
        context = ContextMemory(512, (GIB // 2, GIB // 2), "exact")
        assert fit(tensors, n_bytes, context, Budget(0, (5 * GIB,))).place == "GPU"
        assert fit(tensors, n_bytes, context, Budget(0, (5 * GIB - 1,))).place == "nowhere"

    def test_token_embeddings_stay_in_memory_unless_they_are_the_output_too(self) -> None:
        apart, n_bytes = level(GIB, embeddings=8 * GIB, output=GIB)
        assert fit(apart, n_bytes, NO_CONTEXT, Budget(16 * GIB, (3 * GIB,))).place == "GPU"
        tied, n_bytes = level(GIB, embeddings=8 * GIB, output=None)
        assert fit(tied, n_bytes, NO_CONTEXT, Budget(16 * GIB, (3 * GIB,))).place == "RAM"
        assert fit(tied, n_bytes, NO_CONTEXT, Budget(16 * GIB, (10 * GIB,))).place == "GPU"

    def test_partly_with_as_many_layers_as_fit_from_the_last(self) -> None:
        tensors, n_bytes = level(4 * GIB, 3 * GIB, 2 * GIB, GIB, output=GIB)
        found = fit(tensors, n_bytes, NO_CONTEXT, Budget(16 * GIB, (5 * GIB,)))
        assert (found.place, found.n_gpu_layers, found.n_layers) == ("GPU and RAM", 3, 5)
        assert "3 of 5 layers" in found.reason
        assert "-ngl 3" in found.reason
        assert "8.00 GiB of 16.00 GiB RAM" in found.reason

    def test_the_rest_must_have_room_in_memory(self) -> None:
        tensors, n_bytes = level(4 * GIB, 3 * GIB, 2 * GIB, GIB, output=GIB)
        assert fit(tensors, n_bytes, NO_CONTEXT, Budget(8 * GIB, (5 * GIB,))).place == "GPU and RAM"
        assert fit(tensors, n_bytes, NO_CONTEXT, Budget(8 * GIB - 1, (5 * GIB,))).place == "nowhere"

    def test_several_gpus_add_up_and_each_is_left_some(self) -> None:
        tensors, n_bytes = level(GIB, GIB, output=GIB)
        assert fit(tensors, n_bytes, NO_CONTEXT, Budget(0, (5 * GIB // 2, 5 * GIB // 2))).place == "GPU"
        assert Budget(0, (SPARE_BYTES // 2, 3 * GIB)).gpu == 2 * GIB

    def test_in_memory_without_a_gpu(self) -> None:
        tensors, n_bytes = level(GIB, output=GIB)
        found = fit(tensors, n_bytes, NO_CONTEXT, Budget(3 * GIB))
        assert (found.place, found.n_gpu_layers, found.reason) == ("RAM", 0, "3.00 GiB of 3.00 GiB RAM")
        assert fit(tensors, n_bytes, NO_CONTEXT, Budget(3 * GIB - 1)).place == "nowhere"

    def test_a_context_of_unknown_size_is_said(self) -> None:
        tensors, n_bytes = level(GIB, output=GIB)
        found = fit(tensors, n_bytes, ContextMemory(4096, (), "unknown", "why"), Budget(4 * GIB))
        assert found.place == "RAM"
        assert "its context is not counted" in found.reason
