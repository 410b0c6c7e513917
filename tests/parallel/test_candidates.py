"""The likeliest tokens of a split vocabulary, and their mixture, equal those of one process in values and gradients."""

from unittest.mock import patch

import pytest
import torch

from megatron_ponder.kernels import cross_entropy
from megatron_ponder.kernels.chunked_candidates import chunked_likeliest
from megatron_ponder.parallel.candidates import likeliest
from megatron_ponder.parallel.layers import ColumnParallelLinear, VocabParallelEmbedding
from megatron_ponder.parallel.mesh import Axis, Mesh
from megatron_ponder.parallel.regions import enter
from megatron_ponder.parallel.sharding import initialize, normal
from tests.distributed import run_distributed
from tests.parallel.gathered import Part, assert_equal_to_one_process, gradients

HIDDEN, VOCABULARY = 6, 23


def mix(axis: Axis, count: int, multiple: int, chunk: int | None = None) -> dict[str, Part]:
    """Read a prediction through its likeliest tokens, under a loss that weighs every number differently.

    Args:
        axis: the tensor ranks.
        count: likeliest tokens.
        multiple: that pads the vocabulary.
        chunk: tokens whose logits are there at a time; None for those of all.
    """
    head = ColumnParallelLinear(HIDDEN, VOCABULARY, axis, normal(1.0), multiple=multiple).double()
    embedding = VocabParallelEmbedding(VOCABULARY, HIDDEN, axis, normal(1.0), multiple).double()
    for seed, module in enumerate((head, embedding)):
        initialize(module, seed)
    generator = torch.Generator().manual_seed(0)
    x, weights = torch.randn(2, 2, 5, HIDDEN, generator=generator, dtype=torch.float64).unbind(0)
    x.requires_grad_()
    if chunk is None:
        logits, ids = likeliest(head(enter(x, axis, 5)), count, axis, VOCABULARY)
    else:
        with patch.object(cross_entropy, "CHUNK_BYTES", chunk * 8 * head.weight.shape[0]):
            logits, ids = chunked_likeliest(enter(x, axis, 5), head.weight, count, axis, VOCABULARY)
    mixture = embedding(ids, logits.softmax(-1))
    (mixture * weights).sum().backward()
    result = {"logits": logits.detach(), "ids": ids, "mixture": mixture.detach(), "grad x": x.grad}
    parts = {name: Part(tensor.double(), None) for name, tensor in result.items()}
    return parts | {
        f"{part} {name}": item
        for part, module in (("head", head), ("embedding", embedding))
        for name, item in gradients(module).items()
    }


CASES = [(count, multiple) for count in (1, 5, 15, 23, 100) for multiple in (1, 8)]
CASES += [(count, multiple, chunk) for count, multiple in ((5, 8), (100, 1)) for chunk in (1, 3)]


def mix_all(mesh: Mesh) -> list[dict[str, Part]]:
    return [mix(mesh.tensor, *case) for case in CASES]


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_split_vocabulary_has_the_same_likeliest_tokens(ranks):
    results = run_distributed(mix_all, ranks, tensor=ranks)
    for index, case in enumerate(CASES):
        alone = mix(Axis(), case[0], 1)
        if case[0] == 1:  # certain of one token, whatever the logits
            alone = {name: part for name, part in alone.items() if name in ("logits", "ids", "mixture")}
        got = [{name: parts[index][name] for name in alone} for parts in results]
        assert_equal_to_one_process(got, alone, 1e-12)
