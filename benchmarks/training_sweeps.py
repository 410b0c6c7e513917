"""Training by sweeps over latent steps in place of Jacobi passes, as an experiment: how near the fixed point, how fast.

    python benchmarks/training_sweeps.py errors RUN ...         # of trained runs; without any, of random weights, K = 3
    python benchmarks/training_sweeps.py seconds [--rounds 5]   # forward and backward, one thread
    python benchmarks/training_sweeps.py train --config examples/pareto/cpu.yaml ...   # as `ponder train`

Sweep 0 runs step 0 of all tokens, then step 1 against the keys of both, up to K; each further sweep, of which there are
`ponder_training.jacobi_iterations`, runs all steps again against the newest keys and values of all slots before, which
keep their gradients. A unit is a slot of every token: (s + 1)(K + 1) of them in place of K(K + 1)/2 + (R + 1)(K + 1).
Slots that the hard rule prunes are masked. `errors` are root mean squares of what the head reads over that of the fixed
point; `seconds` are medians of this process's time, in turn. Not a part of the package: docs/lab.md says why.
"""

import argparse
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ponder.checkpoint.load import load_model
from megatron_ponder.commands.train import main as train
from megatron_ponder.config import read_config
from megatron_ponder.evaluation.sources import split_batches
from megatron_ponder.kernels.attention import DEAD, FOLDED_CHANNELS, folded_channels
from megatron_ponder.model.attention import Slots
from megatron_ponder.model.ponder import PonderLM, PonderOutput
from megatron_ponder.model.router import Rule, key_log_weights
from megatron_ponder.parallel.cpu_settings import prepare_cpu
from megatron_ponder.parallel.sharding import initialize

sys.path.insert(0, str(Path(__file__).parents[1]))  # the repository

from benchmarks.generation import build, prompts

JACOBI = PonderLM.jacobi
# K, hidden size, blocks, tokens and batch, and what is timed: R of passes, further sweeps.
SIZES = (((1, 128, 1, 128, 4), (1,), (1,)), ((3, 128, 2, 128, 4), (2, 3), (1, 2, 3)), ((3, 256, 2, 256, 2), (2,), (2,)))


@dataclass
class Visits:
    """The newest visit of every latent step.

    Attributes:
        log_w: (B, L) of each as keys; nothing without a router.
        step: that runs.
        keys_alone: nobody reads what the last block makes of it.
        segments_BL: as in `Geometry`.
    """

    segments_BL: Tensor | None
    log_w: dict[int, Tensor] = field(default_factory=dict)
    step: int = 0
    keys_alone: bool = False

    def seen(self, tokens: int, steps: list[int]) -> Tensor:
        """Whether a token sees another's steps, (B or 1, 1, L, L · steps): all of earlier ones, its own up to this."""
        whole = torch.ones(tokens, tokens, dtype=torch.bool).tril()
        seen = torch.cat([whole if step <= self.step else whole.tril(-1) for step in steps], 1)[None, None]
        if self.segments_BL is None:
            return seen
        same_BLL = self.segments_BL.unsqueeze(2) == self.segments_BL.unsqueeze(1)
        return seen & same_BLL.repeat(1, 1, len(steps)).unsqueeze(1)


@dataclass
class Layer:
    """Keys and values of the newest visits, (B, L, heads, channels) each."""

    visits: Visits
    last: bool
    keys: dict[int, Tensor] = field(default_factory=dict)
    values: dict[int, Tensor] = field(default_factory=dict)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Attend as a `LayerCache`."""
        visits, head_size = self.visits, q.shape[-1]
        self.keys[visits.step], self.values[visits.step] = k, v
        if self.last and visits.keys_alone:
            return torch.zeros_like(q)
        steps = sorted(self.keys)
        keys, values = (torch.cat([of[step] for step in steps], 1) for of in (self.keys, self.values))
        if visits.log_w:
            log_w = torch.cat([visits.log_w[step] for step in steps], 1)
            of_q, of_k = folded_channels(log_w, head_size, keys)
            q, keys = (
                torch.cat([x, y.unsqueeze(2).expand(*x.shape[:3], -1)], -1) for x, y in ((q, of_q), (keys, of_k))
            )
            values = F.pad(values, (0, FOLDED_CHANNELS))
        seen = visits.seen(q.shape[1], steps)
        inputs = (x.transpose(1, 2) for x in (q, keys, values))
        out = F.scaled_dot_product_attention(*inputs, attn_mask=seen, scale=scale, enable_gqa=q.shape[2] != k.shape[2])
        return out.transpose(1, 2)[..., :head_size]


def swept(
    model: PonderLM, tokens_BL: Tensor, more: int, rule: Rule, gradient_passes: int | None = None
) -> PonderOutput:
    """In place of `PonderLM.jacobi`, of a whole model: sweep 0, and so many more."""
    if not (model.passes.iterated and rule.latents):
        return JACOBI(model, tokens_BL, more, rule, gradient_passes)
    batch, steps, blocks = model.read(tokens_BL), model.ponder_config.steps, len(model.transformer.blocks)
    visits = Visits(batch.geometry.segments_BL)
    layers = [Layer(visits, index == blocks - 1) for index in range(blocks)]
    angles = batch.geometry.angles(1, model.model_config, batch.embedded_BLH.dtype)
    hidden, routing, log_w_BLK = {}, None, None
    for sweep in range(more + 1):
        for step in range(steps + 1):
            visits.step, visits.keys_alone = step, step == steps and sweep < more
            if log_w_BLK is not None and step:
                visits.log_w[step] = log_w_BLK[..., step]
            elif model.router is not None:
                visits.log_w[0] = batch.embedded_BLH.new_zeros(tokens_BL.shape)
            x_BLH = hidden[step - 1] if step else batch.embedded_BLH
            kept = slice(0) if visits.keys_alone else slice(None)
            hidden[step] = model.transformer(x_BLH, Slots(tokens_BL.shape[1], angles, kept=kept), caches=layers)
            if step == 0 and model.router is not None:
                routing = model.route(hidden[0], rule)
                log_w_BLK = key_log_weights(routing, rule)
                reweigh(visits, log_w_BLK, rule)
    hidden_BLSH = torch.stack([hidden[step] for step in range(steps + 1)], 2)
    slots_PB = torch.full(((steps + 1) * (more + 1), len(tokens_BL)), tokens_BL.shape[1])
    return PonderOutput(model.fuse(hidden_BLSH, routing, rule), hidden_BLSH, routing, slots_PB, steps)


def reweigh(visits: Visits, log_w_BLK: Tensor, rule: Rule) -> None:
    """Give the steps of the sweep before the weights of a new routing; a pruned one stays dead until it is run."""
    for step in visits.log_w.keys() - {0}:
        weights, before = log_w_BLK[..., step], visits.log_w[step]
        visits.log_w[step] = weights.masked_fill(before == DEAD, DEAD) if rule.kind == "hard" else weights


def units(steps: int, sweeps: int | None = None, refinements: int | None = None) -> int:
    """Slots of every token that sweeps or passes run."""
    if refinements is None:
        return (sweeps + 1) * (steps + 1)
    return steps * (steps + 1) // 2 + (refinements + 1) * (steps + 1)


@torch.no_grad()
def errors(name: str, model: PonderLM, inputs_BL: Tensor) -> None:
    """Print how far passes and sweeps are from the fixed point, by the soft mask and the hard rule."""
    for kind in ("hard",) if model.router is None else ("soft", "hard"):
        rule, steps = model.rule(kind), model.ponder_config.steps
        exact = model.exact(inputs_BL, rule).output_BLH
        for way, run in (("R", JACOBI), ("sweeps", swept)):
            for count in range(6):
                output = run(model, inputs_BL, count, rule).output_BLH
                error = float((output - exact).square().mean().sqrt() / exact.square().mean().sqrt())
                cost = units(steps, refinements=count) if way == "R" else units(steps, count)
                print(f"| {name} | {kind} | {way} {count} | {cost} | {error:.5f} |", flush=True)


def seconds(rounds: int) -> None:
    """Print what forward and backward of models of several sizes take."""
    for (steps, hidden, blocks, tokens, batch), refinements, sweeps in SIZES:
        values = {
            "model.hidden_size": hidden, "model.num_layers": blocks, "model.num_heads": 4, "model.vocab_size": 512,
            "model.ffn_hidden_size": 11 * hidden // 4, "data.sequence_length": tokens, "ponder.latent_steps": steps,
        }  # fmt: skip
        config = read_config([f"--{key}={value}" for key, value in values.items()])
        model = PonderLM(config.model, config.ponder)
        initialize(model, seed=0)
        tokens_BL = torch.randint(0, 512, (batch, tokens), generator=torch.Generator().manual_seed(0))
        ways = {("R", r): (JACOBI, r, units(steps, refinements=r)) for r in refinements}
        ways |= {("sweeps", s): (swept, s, units(steps, s)) for s in sweeps}
        times = {way: [] for way in ways}
        for _ in range(rounds + 1):
            for way, (run, count, _) in ways.items():
                begun = time.process_time()
                run(model, tokens_BL, count, model.rule("soft")).output_BLH.square().mean().backward()
                times[way].append(time.process_time() - begun)
        for way, (_, _, cost) in ways.items():
            taken = statistics.median(times[way][1:])
            size = f"K {steps}, H {hidden}, {blocks} blocks, {batch} × {tokens}"
            print(f"| {size} | {way[0]} {way[1]} | {cost} | {taken:.3f} | {1e3 * taken / cost:.1f} |", flush=True)


def main() -> None:
    """Do what is asked."""
    if sys.argv[1:2] == ["train"]:
        PonderLM.jacobi = swept
        train(["--ponder_training.packed", "false", *sys.argv[2:]])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["errors", "seconds", "train"])
    parser.add_argument("runs", nargs="*", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    prepare_cpu()
    torch.set_num_threads(1)
    if arguments.what == "seconds":
        seconds(arguments.rounds)
        return
    for folder in arguments.runs:
        loaded = load_model(folder)
        batches = split_batches(loaded, None, "valid", 4).batches
        errors(folder.name, loaded.model, torch.cat([batch[:, :-1] for batch in batches])[:4])
    if not arguments.runs:
        errors("random, fixed", build("fixed", torch.device("cpu"))[0], torch.tensor(prompts(1, 96)))


if __name__ == "__main__":
    main()
