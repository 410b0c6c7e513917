"""The least time of a decoding forward, by hand."""

from dataclasses import replace

import pytest

from megatron_ponder.cluster.hardware import Hardware
from megatron_ponder.estimates.decoding_floor import decoding_floors, decoding_table
from tests.models import small_config, small_model

GPU = Hardware("GPU", 1, 1, 80e9, 1e15, 1e12, 4e11, 5e10, memory_bandwidth_share=0.5)


@pytest.mark.parametrize(("tied", "precision", "width"), [(False, "fp32", 4), (True, "bf16", 2)])
def test_weights_and_cache_are_read_once(tied, precision, width):
    overrides = {"model__tie_embeddings": tied, "model__num_kv_heads": 2, "training__precision": precision}
    config = small_config(**overrides)
    one, few, many = decoding_floors(config, GPU)
    model = small_model(**overrides)
    read = sum(p.numel() for p in model.parameters()) - (0 if tied else model.embedding.weight.numel())
    assert one.weights == many.weights == width * read
    channels = 2 * config.model.head_size * 2  # keys and values of two heads
    assert one.cache == 1024 * (config.model.num_layers * channels * width + 4)
    assert (one.sequences, few.sequences, many.sequences) == (1, 16, 256)
    assert many.cache == 256 * one.cache
    assert many.seconds == (many.weights + many.cache) / 5e11


def test_what_does_not_fit_has_no_time():
    config = small_config()
    floors = decoding_floors(config, GPU)
    small = replace(GPU, memory=(floors[1].weights + floors[1].cache) / GPU.memory_share)
    assert list(decoding_table(floors, small).columns[3].cells)[2] == "does not fit"
    assert "does not fit" not in list(decoding_table(floors, GPU).columns[3].cells)
