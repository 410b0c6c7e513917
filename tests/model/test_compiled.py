"""Compiled blocks beside the same blocks as they are written: every pass, every gradient, and how many graphs."""

import subprocess
import sys
from functools import partial
from itertools import cycle
from typing import NamedTuple

import pytest
import torch
from functorch.compile import nop
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd

from megatron_ponder.base.errors import UserError
from megatron_ponder.base.signals import StopSignals
from megatron_ponder.model.compiled import CompiledBlock
from megatron_ponder.model.packed import packed_jacobi
from megatron_ponder.model.ponder import PonderLM
from megatron_ponder.model.transformer import Recompute
from megatron_ponder.parallel.mesh import Mesh
from tests.models import random_tokens, small_model
from tests.training.layouts import Layout, model_for

LENGTH = 9


class Seen(NamedTuple):
    """Of a forward and a backward pass: of every pass what left the blocks and its gradient, gradients of weights."""

    streams: list[Tensor]
    stream_gradients: list[Tensor]
    gradients: dict[str, Tensor]

    @property
    def norm(self) -> Tensor:
        return torch.stack([gradient.double().norm() for gradient in self.gradients.values()]).norm()

    def numbers(self) -> dict[str, Tensor]:
        """All tensors by name."""
        passes = {f"pass {index}": tensor for index, tensor in enumerate(self.streams)}
        passes |= {f"gradient after pass {index}": tensor for index, tensor in enumerate(self.stream_gradients)}
        return passes | self.gradients


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def see(model: PonderLM, refinements: int, seed: int = 0, threshold: float | None = None) -> Seen:
    """One forward and backward pass; by a threshold, of packed passes under the hard rule."""
    streams, rule = [], model.rule("soft" if threshold is None else "hard", threshold)
    evaluate = model.jacobi if threshold is None else partial(packed_jacobi, model)

    def keep(_module, _inputs, output: Tensor | tuple) -> None:
        stream = output[0] if isinstance(output, tuple) else output  # beside keys for later passes
        stream.retain_grad()
        streams.append(stream)

    handle = model.transformer.register_forward_hook(keep)
    model.zero_grad()
    output = evaluate(random_tokens(2, LENGTH, seed=seed), refinements, rule)
    weight = 0.0 if output.routing is None else output.routing.log_w[..., 1:].exp().sum()
    (model.head(output.output_BLH).logsumexp(-1).sum() + weight).backward()
    handle.remove()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    return Seen([s.detach() for s in streams], [s.grad for s in streams], gradients)


def distances(found: Seen, true: Seen) -> dict[str, float]:
    """Of every tensor, relative to its size."""
    other = found.numbers()
    return {
        name: ((other[name].double() - tensor.double()).norm() / (tensor.double().norm() + 1e-12)).item()
        for name, tensor in true.numbers().items()
    }


def check_equal(
    model: PonderLM,
    backend: str,
    graphs: int,
    tolerance: float,
    rounds: tuple[int, ...],
    thresholds: tuple[float | None, ...] = (None,),
) -> None:
    """The same as without a compiler, and no graph is compiled after the first round.

    But packed slots that ranks share, equally or not, meet both of these only in the course of the rounds.
    """
    model.transformer.compiled = compiled = CompiledBlock(8, backend)
    for seed, (refinements, threshold) in enumerate(zip(rounds, cycle(thresholds))):
        found = see(model, refinements, seed, threshold)
        varies = threshold is not None and model.axis.sequence_parallel
        assert compiled.graphs <= graphs if varies else compiled.graphs == graphs
        model.transformer.compiled = None
        true = see(model, refinements, seed, threshold)
        model.transformer.compiled = compiled
        far = {name: distance for name, distance in distances(found, true).items() if not distance < tolerance}
        assert not far
        assert abs(found.norm / true.norm - 1) < tolerance
    assert compiled.news().startswith(f"{graphs} graphs of blocks compiled in ")
    assert compiled.news() is None


def test_all_layers_and_passes_share_a_graph_for_each_number_of_slots():
    # one slot; two; and of two in the last block those that are kept by all passes but the last
    model = small_model(ponder__mode="adaptive", ponder__latent_steps=1)
    check_equal(model, "aot_eager", 3, 1e-11, rounds=(1, 2, 3, 1))


def test_documents_of_any_number_share_a_graph():
    model = small_model(ponder__mode="vanilla", model__num_layers=1, eod_id=5)
    assert len({(random_tokens(2, LENGTH, seed=seed) == 5).sum().item() for seed in range(4)}) > 2
    check_equal(model, "aot_eager", 1, 1e-11, rounds=(0, 0, 0, 0))


# Of which every one keeps other slots of random tokens, and so every pass has another number of them.
PRUNED = (0.1, 0.3, 1e-4, 0.6)


def test_packed_passes_of_any_number_of_slots_share_a_graph():
    # keys without weights; with them; and with them in the last block, where slots that no pass reads end
    model = small_model(ponder__mode="adaptive", ponder__latent_steps=1, model__num_layers=1, eod_id=5)
    check_equal(model, "aot_eager", 3, 1e-11, rounds=(1, 2, 3, 1), thresholds=PRUNED)


@pytest.mark.parametrize("thresholds", [(None,), PRUNED], ids=["masked", "packed"])
def test_slots_that_are_run_once_have_a_graph_for_each_step(thresholds):
    model = small_model(ponder__latent_visibility="own", model__num_layers=1, eod_id=5)
    check_equal(model, "aot_eager", 3, 1e-11, rounds=(0, 0, 0, 0), thresholds=thresholds)


def test_what_has_no_gradients_is_not_compiled():
    model = small_model(ponder__mode="vanilla")
    model.transformer.compiled = compiled = CompiledBlock(8, "aot_eager")
    with torch.no_grad():
        model.jacobi(random_tokens(1, LENGTH), 0, model.rule("soft"))
    assert compiled.graphs == 0
    assert compiled.news() is None


def test_inductor():
    check_equal(small_model(ponder__mode="vanilla").float(), "inductor", 1, 1e-5, rounds=(0, 0))


@pytest.mark.slow  # a relative of the first test
@pytest.mark.parametrize("recompute", ["block", "attention"])
def test_recompute(recompute):
    model = small_model(ponder__mode="adaptive", model__family="gpt_neox")
    model.recompute = Recompute(recompute)
    check_equal(model, "aot_eager", 4, 1e-11, rounds=(1, 2))


@pytest.mark.slow  # C++ that takes long to compile
@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_inductor_with_latent_steps(family):
    model = small_model(ponder__mode="adaptive", model__family=family).float()
    check_equal(model, "inductor", 4, 2e-5, rounds=(1, 2, 3))


@pytest.mark.slow
@pytest.mark.parametrize(("family", "dtype"), [("llama", torch.float32), ("gpt_neox", torch.float64)])
def test_inductor_with_packed_passes(family, dtype):
    model = small_model(ponder__mode="adaptive", ponder__latent_steps=3, model__family=family, eod_id=5).to(dtype)
    tolerance = 2e-5 if dtype == torch.float32 else 1e-11
    check_equal(model, "inductor", 3, tolerance, rounds=(2, 1, 2, 3), thresholds=PRUNED)


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["block", "attention"])
def test_recompute_with_packed_passes(recompute):
    model = small_model(ponder__mode="adaptive", model__family="gpt_neox")
    model.recompute = Recompute(recompute)
    check_equal(model, "aot_eager", 3, 1e-11, rounds=(1, 2, 1), thresholds=PRUNED)


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["none", "block", "attention"])
@pytest.mark.parametrize("thresholds", [(None,), PRUNED], ids=["masked", "packed"])
def test_inductor_with_slots_that_are_run_once(thresholds, recompute):
    model = small_model(ponder__latent_visibility="own", model__num_kv_heads=2)
    model.recompute = Recompute(recompute)
    check_equal(model, "inductor", 3, 1e-11, rounds=(0, 0, 0), thresholds=thresholds)


@pytest.mark.slow
def test_graphs_of_packed_passes_are_as_few_for_many_packings():
    model = small_model(ponder__mode="adaptive", ponder__latent_steps=3)
    model.transformer.compiled = compiled = CompiledBlock(8, "aot_eager")
    slots = set()
    for seed in range(40):
        tokens = random_tokens(1 + seed % 4, 5 + seed % 7, seed=seed)
        slots.add(packed_jacobi(model, tokens, seed % 3, model.rule("hard", 0.6 * seed / 40)).slots_PB.sum().item())
    assert len(slots) > 30
    assert compiled.graphs == 3


@pytest.mark.slow
def test_inductor_in_bf16_is_as_near_to_fp32_as_eager_is():
    """Of llama: with PyTorch 2.13, C++ compilers refuse what inductor makes of layer norms in bf16."""
    values = {"ponder__mode": "adaptive"}
    true = see(small_model(**values).float(), 1)
    model = small_model(**values).bfloat16()
    eager = distances(see(model, 1), true)
    model.transformer.compiled = CompiledBlock(8)
    compiled = distances(see(model, 1), true)
    assert model.transformer.compiled.graphs == 4
    assert {name for name in true.numbers() if not compiled[name] < 1.5 * eager[name] + 2**-8} == set()


def on_ranks(mesh: Mesh, layout: Layout, cases: list[tuple]) -> None:
    """Every case: values of the configuration, and what `check_equal` takes."""
    for values, backend, graphs, tolerance, *others in cases:
        torch.compiler.reset()
        model = model_for(layout.config(values), mesh)
        model.eod_id = None
        if tolerance < 1e-9:
            model.double()
        check_equal(model, backend, graphs, tolerance, *others)


def test_tensor_ranks():
    case = ({"ponder__mode": "vanilla"}, "aot_eager", 1, 1e-11, (0, 0))
    Layout(tensor=2, sequence_parallel=True).run(on_ranks, [case])


@pytest.mark.slow
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_tensor_ranks_with_latent_steps(sequence_parallel):
    cases = [
        ({"ponder__mode": "adaptive"}, "inductor", 4, 2e-5, (1, 2)),
        ({"ponder__mode": "adaptive", "model__family": "gpt_neox"}, "aot_eager", 4, 1e-11, (1, 2)),
        ({"ponder__mode": "adaptive"}, "aot_eager", 3, 1e-11, (1, 2, 1, 2), PRUNED),
        ({"ponder__latent_visibility": "own"}, "aot_eager", 3, 1e-11, (1, 2)),
    ]
    Layout(tensor=2, sequence_parallel=sequence_parallel).run(on_ranks, cases)


def refuse(_graph, _inputs):
    raise RuntimeError("no such instruction")


@pytest.mark.parametrize("backend", [refuse, aot_autograd(fw_compiler=nop, bw_compiler=refuse)])
def test_what_pytorch_cannot_compile_ends_in_one_line(backend):
    """The backward pass too, in the forward pass before it, and not in whatever runs the backward pass."""
    model = small_model(ponder__mode="vanilla", model__num_layers=1).float()
    model.transformer.compiled = CompiledBlock(1, backend)
    with pytest.raises(
        UserError, match=r"cannot compile the blocks .*no such instruction.*set training\.compile to false"
    ):
        model.jacobi(random_tokens(1, 5), 0, model.rule("soft"))


def test_a_ctrl_c_reaches_the_run_and_not_the_compiler():
    """A terminal sends it to both; the run is to stop after its step, which needs what is being compiled."""
    interrupt = "import os, signal; os.kill(os.{}(), signal.SIGINT)"

    def interrupted(graph, _inputs):
        subprocess.run([sys.executable, "-c", interrupt.format("getpid")], check=True)
        subprocess.run([sys.executable, "-c", interrupt.format("getppid")], check=True)
        return graph.forward

    model = small_model(ponder__mode="vanilla", model__num_layers=1).float()
    with StopSignals() as signals:
        model.transformer.compiled = CompiledBlock(1, interrupted)
        model.jacobi(random_tokens(1, 5), 0, model.rule("soft"))
        assert signals.received == "SIGINT"
