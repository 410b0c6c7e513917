"""Schedules to the fixed point, counted: Jacobi beside cyclic Gauss-Seidel, with and without a window.

    python benchmarks/pass_schedules.py [--tokens 256] [--schedules "pieces of 128" "sweeps, window 64" …]

The model of `generation.py` in fixed mode, K = 3, fp32, one prompt of random tokens. A schedule runs slots against the
newest keys and values of all others, whatever their order, until none changes by more than 16 units of rounding. What
is counted: forwards, slots and pairs of a query and a key, over those of reading slot by slot; and how far the hidden
states are from those of another schedule that ended at half of that tolerance. Nothing is timed.

    pieces      all slots of a piece of the prompt in every forward; the next piece begins when this one stands still
    window      tokens that stand still, as all before them do, leave, and others enter
    sweeps      a forward for each latent step: slot 0 of all tokens, slot 1, ...
    strided     a forward for each of four groups of tokens, t mod 4
    blocks      a forward for each of four groups of neighbours
"""

import argparse
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))  # the repository

from benchmarks.generation import CONSOLE, STEPS, build, prompts
from megatron_ponder.model.ponder import PonderLM
from megatron_ponder.parallel.cpu_settings import prepare_cpu

SLOTS, GROUPS = STEPS + 1, 4
TOLERANCE = 16 * torch.finfo(torch.float32).eps
Grouping = Callable[[list[int]], list[list[int]]]


class Store:
    """All slots of a prompt, each with the newest of what was computed of it.

    Attributes:
        hidden_SH: hidden states.
        change_S: by how much the newest run has changed each.
        forwards, slots, pairs: that were run.
    """

    def __init__(self, model: PonderLM, tokens: list[int]) -> None:
        config, self.tokens, every = model.model_config, len(tokens), len(tokens) * SLOTS
        self._model, self._embedded_TH = model, model.embed(torch.tensor(tokens))
        shape = config.num_layers, config.num_kv_heads, every, config.head_size
        self.keys, self.values = torch.zeros(shape), torch.zeros(shape)
        self.layers = [_StoreLayer(self, layer) for layer in range(config.num_layers)]
        self.hidden_SH, self.change_S = torch.zeros(every, config.hidden_size), torch.full((every,), math.inf)
        self._known_S, self.running_n = torch.zeros(every, dtype=torch.bool), torch.empty(0, dtype=torch.long)
        self.seen_nS = torch.empty(0, every)
        self.forwards = self.slots = self.pairs = 0

    def run(self, slots: list[int]) -> None:
        """One forward."""
        self.running_n = running_n = torch.tensor(slots)
        tokens_n, known_n = running_n // SLOTS, self._known_S[running_n]
        first_n1 = (running_n % SLOTS == 0).unsqueeze(1)
        x_nH = torch.where(first_n1, self._embedded_TH[tokens_n], self.hidden_SH[(running_n - 1).clamp(min=0)])
        self._known_S[running_n] = True
        self.seen_nS = self._known_S & (torch.arange(len(self._known_S)) <= running_n.unsqueeze(1))
        h_nH = self._model.run_slots(x_nH, tokens_n, self.layers)
        change_n = (h_nH - self.hidden_SH[running_n]).abs().amax(1)
        self.change_S[running_n] = torch.where(known_n, change_n, math.inf)
        self.hidden_SH[running_n] = h_nH
        self.forwards, self.slots = self.forwards + 1, self.slots + len(slots)
        self.pairs += int(self.seen_nS.sum())

    def still(self, token: int, tolerance: float) -> bool:
        """Whether the newest run of every slot of a token has changed it by no more than a share of the largest."""
        change_K = self.change_S[token * SLOTS : (token + 1) * SLOTS]
        return bool((change_K <= tolerance * self.hidden_SH.abs().max()).all())


@dataclass
class _StoreLayer:
    store: Store
    layer: int

    def attend(self, q_BTND: Tensor, k_BTMD: Tensor, v_BTMD: Tensor, scale: float) -> Tensor:
        store, layer = self.store, self.layer
        store.keys[layer][:, store.running_n] = k_BTMD[0].transpose(0, 1)
        store.values[layer][:, store.running_n] = v_BTMD[0].transpose(0, 1)
        inputs = q_BTND.transpose(1, 2), store.keys[layer : layer + 1], store.values[layer : layer + 1]
        return F.scaled_dot_product_attention(*inputs, attn_mask=store.seen_nS, scale=scale).transpose(1, 2)


def jacobi(slots: list[int]) -> list[list[int]]:
    """All at once."""
    return [slots]


def sweeps(slots: list[int]) -> list[list[int]]:
    """One latent step after another."""
    return [[slot for slot in slots if slot % SLOTS == step] for step in range(SLOTS)]


def strided(slots: list[int]) -> list[list[int]]:
    """Every fourth token."""
    return [[slot for slot in slots if slot // SLOTS % GROUPS == group] for group in range(GROUPS)]


def blocks(slots: list[int]) -> list[list[int]]:
    """Neighbours."""
    tokens = sorted({slot // SLOTS for slot in slots})
    size = -(-len(tokens) // GROUPS)
    return [[slot for slot in slots if slot // SLOTS in tokens[at : at + size]] for at in range(0, len(tokens), size)]


def read(store: Store, groups: Grouping, width: int, rolling: bool, tolerance: float = TOLERANCE) -> Store:
    """Read the prompt to its fixed point.

    Args:
        store: without any slot.
        groups: forwards that run some slots.
        width: tokens of a window or piece.
        rolling: whether tokens leave as soon as they and all before them stand still.
        tolerance: as in `Store.still`.
    """
    first, end, ran = 0, min(width, store.tokens), [0] * store.tokens
    while first < store.tokens:
        window = range(first, end)
        for token in window:  # a latent needs the slot before it, which sweeps have run by then
            ran[token] = SLOTS if groups is sweeps else min(SLOTS, ran[token] + 1)
        for slots in groups([token * SLOTS + step for token in window for step in range(ran[token])]):
            if slots:
                store.run(slots)
        moving = next((token for token in window if not store.still(token, tolerance)), end)
        first = moving if rolling or moving == end else first
        if rolling or first == end:
            end = min(first + width, store.tokens)
    return store


SCHEDULES: dict[str, Callable[[Store], Store]] = {
    "pieces of 128": partial(read, groups=jacobi, width=128, rolling=False),
    **{f"window {width}": partial(read, groups=jacobi, width=width, rolling=True) for width in (128, 64, 32)},
    **{
        f"sweeps, window {width}": partial(read, groups=sweeps, width=width, rolling=True)
        for width in (128, 64, 32, 16)
    },
    **{
        f"{groups.__name__}, window {width}": partial(read, groups=groups, width=width, rolling=True)
        for groups in (strided, blocks)
        for width in (128, 32)
    },
}


@torch.inference_mode()
def main() -> None:
    """Count and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--schedules", nargs="+", choices=SCHEDULES, default=list(SCHEDULES))
    arguments = parser.parse_args()
    prepare_cpu()
    model, tokens = build("fixed", torch.device("cpu"))[0], prompts(1, arguments.tokens)[0]
    final_SH = read(Store(model, tokens), sweeps, 64, True, TOLERANCE / 2).hidden_SH
    table, every = Table(title=f"{arguments.tokens} tokens, K = {STEPS}, fp32"), arguments.tokens * SLOTS
    for heading in ("schedule", "forwards", "slots / least", "pairs / least", "difference"):
        table.add_column(heading, justify="left" if heading == "schedule" else "right")
    for name in arguments.schedules:
        store = SCHEDULES[name](Store(model, tokens))
        shares = f"{store.slots / every:.2f}", f"{2 * store.pairs / every / (every + 1):.2f}"
        difference = float((store.hidden_SH - final_SH).abs().max() / final_SH.abs().max())
        table.add_row(name, str(store.forwards), *shares, f"{difference:.0e}")
    CONSOLE.print(table)


if __name__ == "__main__":
    main()
