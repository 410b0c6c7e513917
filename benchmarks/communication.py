"""Bytes that each collective moves in one training step, counted on real ranks, beside the formula that predicts them.

    python benchmarks/communication.py [--layouts tp2 tp2+sp ..] [--modes adaptive ..]

llama, hidden 64, 4 layers, 4 heads, ffn 176, vocabulary 256, sequence 32, K = 2, R = 2, fp32, two micro-batches of two
sequences on each data-parallel rank, through DeepSpeed with AdamW, on gloo. Every operation of `c10d` is seen when it
is called, in forward, backward and step, with the process group that it runs on. Groups of one rank are left out.

A message counts by its whole size, before what an algorithm makes of it: what is reduced, what is gathered from all
ranks together, what is scattered, what is sent, in an all-to-all to all ranks together. Receives are the sends of other
ranks and are not counted again. For the textbook's volume of tensor parallelism, 4 all-reduces of B · T · H for each
block and pass, an all-gather and a reduce-scatter count half an all-reduce each: a ring moves half as much for them. At
ZeRO stage 3 DeepSpeed fetches small neighbours together when it can, so that there may be fewer calls than the formula
has.
"""

import argparse
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch.distributed import ProcessGroup
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_ponder.base.launch import discover
from megatron_ponder.config import Config, read_config
from megatron_ponder.config.layout import own_length
from megatron_ponder.estimates.communication import Formula, Term
from megatron_ponder.estimates.rank import Rank
from megatron_ponder.model.build import build_part
from megatron_ponder.parallel.mesh import Mesh, build_mesh
from megatron_ponder.parallel.process_group import process_group
from megatron_ponder.parallel.sharding import initialize
from megatron_ponder.training.deepspeed_engine import Engine
from megatron_ponder.training.objective import Objective

sys.path.insert(0, str(Path(__file__).parents[1]))  # the repository

from benchmarks.measuring import on_ranks

MICRO_BATCHES, REFINEMENTS = 2, 2
MODES = ("vanilla", "fixed", "adaptive")
# What an operation is called here, and the position of its message among its arguments.
OPERATIONS = {
    "allreduce_": ("all-reduce", 0),
    "allreduce_coalesced_": ("all-reduce", 0),
    "allgather_": ("all-gather", 0),
    "_allgather_base_": ("all-gather", 0),
    "allgather_into_tensor_coalesced_": ("all-gather", 0),
    "reduce_scatter_": ("reduce-scatter", 1),
    "_reduce_scatter_base_": ("reduce-scatter", 1),
    "reduce_scatter_tensor_coalesced_": ("reduce-scatter", 1),
    "alltoall_base_": ("all-to-all", 1),
    "reduce_": ("reduce", 0),
    "broadcast_": ("broadcast", 0),
    "send": ("send", 0),
    "barrier": ("barrier", 0),
}
IGNORED = ("recv_",)
SHARE_OF_ALL_REDUCE = {"all-reduce": 1.0, "all-gather": 0.5, "reduce-scatter": 0.5}


class Volume(NamedTuple):
    """Calls of an operation and the size of their messages together."""

    calls: int
    bytes: int


class Layout(NamedTuple):
    """Sizes of the mesh, DeepSpeed's ZeRO stage, and what is computed again."""

    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    sequence_parallel: bool = False
    zero_stage: int = 0
    recompute: str = "none"
    context: int = 1

    @property
    def ranks(self) -> int:
        """All of them."""
        return self.tensor * self.context * self.pipeline * self.data


LAYOUTS = {
    "tp2": Layout(tensor=2),
    "tp2+sp": Layout(tensor=2, sequence_parallel=True),
    "tp2 block": Layout(tensor=2, recompute="block"),
    "tp2+sp block": Layout(tensor=2, sequence_parallel=True, recompute="block"),
    "tp2+sp attention": Layout(tensor=2, sequence_parallel=True, recompute="attention"),
    "pp2": Layout(pipeline=2),
    "dp2 zero0": Layout(data=2),
    "dp2 zero1": Layout(data=2, zero_stage=1),
    "dp2 zero2": Layout(data=2, zero_stage=2),
    "dp2 zero3": Layout(data=2, zero_stage=3),
    "tp2 dp2": Layout(tensor=2, data=2, zero_stage=1),
    "tp2 pp2": Layout(tensor=2, pipeline=2),
    "tp2+sp zero1": Layout(tensor=2, sequence_parallel=True, zero_stage=1),
    "tp2+sp pp2": Layout(tensor=2, pipeline=2, sequence_parallel=True),
    "cp2": Layout(context=2),
    "cp2 block": Layout(context=2, recompute="block"),
    "cp2 attention": Layout(context=2, recompute="attention"),
    "cp2 pp2": Layout(context=2, pipeline=2),
    "cp2 tp2": Layout(context=2, tensor=2),
    "cp2 zero3": Layout(context=2, zero_stage=3),
    "tp2+sp dp2 zero2": Layout(tensor=2, data=2, sequence_parallel=True, zero_stage=2),
}


class Traffic(TorchDispatchMode):
    """Counts operations on process groups of more than one rank, in the thread that enters it.

    On a CPU the backward pass runs in that thread too.

    Attributes:
        calls, bytes: by name of the mesh's axis and operation.
    """

    def __init__(self, mesh: Mesh) -> None:
        super().__init__()
        self._names = names_of_groups(mesh)
        self.calls: Counter[tuple[str, str]] = Counter()
        self.bytes: Counter[tuple[str, str]] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        """Count, and go on.

        Raises:
            KeyError: for an operation that nobody thought of, so that none goes by uncounted.
        """
        name = function._schema.name.removeprefix("c10d::")
        if function.namespace == "c10d" and name not in IGNORED:
            operation, position = OPERATIONS[name]
            group = next(ProcessGroup.unbox(value) for value in args if _is_group(value))
            if group.size() > 1:
                key = self._name(group), operation
                self.calls[key] += 1
                self.bytes[key] += sum(part.numel() * part.itemsize for part in tree_leaves(args[position]))
        return function(*args, **(kwargs or {}))

    def _name(self, group: ProcessGroup) -> str:
        if group.group_desc.startswith("pipeline "):  # of two neighbours
            return "pipeline"
        return self._names.get(group.group_name, "all ranks")

    def volumes(self) -> dict[tuple[str, str], Volume]:
        """What has been counted."""
        return {key: Volume(calls, self.bytes[key]) for key, calls in self.calls.items()}


def names_of_groups(mesh: Mesh) -> dict[str, str]:
    """What groups are called here, by PyTorch's names: that of an axis by it, though another name may have it too."""
    axes = {name: getattr(mesh, name) for name in ("model", "copies", "pipeline", "context", "tensor")}
    return {axis.group.group_name: name for name, axis in axes.items() if axis.group is not None}


def _is_group(value: object) -> bool:
    return isinstance(value, torch.ScriptObject) and value._type().name() == "ProcessGroup"


def configuration(layout: Layout, mode: str, length: int = 32, **overrides: object) -> Config:
    """The configuration of one case; `length` is L, and `model__norm="layer"` overrides a key."""
    values = {
        "model.hidden_size": 64, "model.num_layers": 4, "model.num_heads": 4, "model.ffn_hidden_size": 176,
        "model.vocab_size": 256, "data.sequence_length": length, "ponder.mode": mode, "ponder.latent_steps": 2,
        "training.precision": "fp32", "training.micro_batch_size": 2,
        "training.global_batch_size": 2 * MICRO_BATCHES * layout.data, "parallel.tensor": layout.tensor,
        "parallel.pipeline": layout.pipeline, "parallel.context": layout.context,
        "parallel.sequence_parallel": str(layout.sequence_parallel).lower(),
        "parallel.zero_stage": layout.zero_stage, "training.recompute": layout.recompute,
    }  # fmt: skip
    values |= {key.replace("__", "."): value for key, value in overrides.items()}
    return read_config([f"--{key}={value}" for key, value in values.items()])


class Count(NamedTuple):
    """One case on one rank: what was counted, what was expected, and the textbook's bytes of tensor parallelism."""

    measured: dict[tuple[str, str], Volume]
    terms: list[Term]
    textbook: int

    def expected(self) -> dict[tuple[str, str], Volume]:
        """The terms added up by axis and operation."""
        sums: dict[tuple[str, str], Volume] = defaultdict(lambda: Volume(0, 0))
        for term in self.terms:
            before = sums[term.axis, term.operation]
            sums[term.axis, term.operation] = Volume(before.calls + term.calls, before.bytes + term.bytes)
        return dict(sums)


def count_step(mesh: Mesh, config: Config) -> Count:
    """Count one training step on this rank; at ZeRO stage 3 one after DeepSpeed has learnt the order of modules."""
    model = build_part(config, mesh, eod_id=0)
    initialize(model, seed=0)
    formula = Formula(Rank(config, mesh.data.size, mesh.pipeline.rank, mesh.device.type), REFINEMENTS)
    engine = Engine(Objective(model), config, mesh)
    shape = (MICRO_BATCHES, config.training.micro_batch_size, own_length(config) + 1)
    tokens = torch.randint(0, config.model.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    for _ in range(4 if config.parallel.zero_stage == 3 else 1):
        with Traffic(mesh) as traffic:
            engine.forward_backward(list(tokens), REFINEMENTS, engine.rule("soft"), 0.0, 1 / tokens.numel())
            engine.step(1e-4)
    names = names_of_groups(mesh)
    terms = [replace(term, axis=names[getattr(mesh, term.axis).group.group_name]) for term in formula.terms()]
    return Count(traffic.volumes(), terms, formula.textbook())


def count_cases(cases: Sequence[tuple[Layout, str]]) -> list[Count]:
    """Count layouts and modes, one after another, on this rank."""
    with process_group(discover()) as device:
        torch.set_num_threads(1)
        counts = []
        for layout, mode in cases:
            config = configuration(layout, mode)
            counts.append(count_step(build_mesh(device, config.parallel), config))
        return counts


def main() -> None:
    """Count and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    arguments = parser.parse_args()
    counted, textbook = Table(title="One training step, mean over ranks"), Table(title="Tensor ranks, of the textbook")
    headings = ("layout", "mode", "axis", "operation", "calls", "formula", "kB", "formula", "unexplained bytes")
    for index, heading in enumerate(headings):
        counted.add_column(heading, justify="right" if index > 3 else "left")
    reasons = ("blocks", "embedding", "head", "loss", "log w", "gradient", "routing")
    for heading in ("layout", "mode", "textbook, kB", "measured", *reasons):
        textbook.add_column(heading, justify="left" if heading in ("layout", "mode") else "right")
    for ranks in sorted({LAYOUTS[name].ranks for name in arguments.layouts}):
        names = [name for name in arguments.layouts if LAYOUTS[name].ranks == ranks]
        cases = [(name, mode) for name in names for mode in arguments.modes]
        by_rank = on_ranks(ranks, count_cases, [(LAYOUTS[name], mode) for name, mode in cases])
        for (name, mode), counts in zip(cases, zip(*by_rank.values(), strict=True), strict=True):
            for row in _rows(counts):
                counted.add_row(name, mode, *row)
            if LAYOUTS[name].tensor > 1:
                textbook.add_row(name, mode, *_shares(counts, reasons))
    console = Console(width=130)
    console.print(counted)
    console.print(textbook)


def _rows(counts: Sequence[Count]) -> Iterator[tuple[str, ...]]:
    measured, expected = [count.measured for count in counts], [count.expected() for count in counts]
    nothing = Volume(0, 0)
    for key in sorted({key for volumes in (*measured, *expected) for key in volumes}):
        pairs = [(m.get(key, nothing), e.get(key, nothing)) for m, e in zip(measured, expected, strict=True)]
        calls, calls_expected = (sum(pair[side].calls for pair in pairs) / len(pairs) for side in (0, 1))
        size, size_expected = (sum(pair[side].bytes for pair in pairs) / len(pairs) / 1e3 for side in (0, 1))
        difference = sum(abs(m.bytes - e.bytes) for m, e in pairs)
        yield *key, f"{calls:g}", f"{calls_expected:g}", f"{size:.3f}", f"{size_expected:.3f}", str(difference)


def _shares(counts: Sequence[Count], reasons: Sequence[str]) -> Iterator[str]:
    """The textbook's bytes, the measured share of them, and that of every reason, over all ranks."""
    whole = sum(count.textbook for count in counts)
    yield f"{whole / len(counts) / 1e3:.0f}"
    sizes = [(key, volume.bytes) for count in counts for key, volume in count.measured.items() if key[0] == "tensor"]
    yield f"{sum(SHARE_OF_ALL_REDUCE[operation] * size for (_, operation), size in sizes) / whole:.4f}"
    for reason in reasons:
        terms = [t for count in counts for t in count.terms if t.axis == "tensor" and t.reason.startswith(reason)]
        yield f"{sum(SHARE_OF_ALL_REDUCE[term.operation] * term.bytes for term in terms) / whole:.4f}"


if __name__ == "__main__":
    main()
