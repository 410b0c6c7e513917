"""Cross-entropy, executed steps and compute of a model, by every way of evaluating it."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from megatron_ponder.base.errors import UserError
from megatron_ponder.evaluation.inference_flops import inference_flops
from megatron_ponder.model.exits import Exit
from megatron_ponder.model.ponder import PonderLM
from megatron_ponder.model.router import Rule


@dataclass(frozen=True)
class Setting:
    """One way of evaluating a model.

    Attributes:
        rule: `soft` or `hard`, with τ and α.
        refinements: R of `jacobi`; None for `exact`, which equals sequential decoding.
    """

    rule: Rule
    refinements: int | None

    @property
    def name(self) -> str:
        """Its name in tables: `hard, exact` or `soft, jacobi(3)`, or `entropy:0.5, exact` with such an exit."""
        evaluation = "exact" if self.refinements is None else f"jacobi({self.refinements})"
        return f"{self.rule.exit or self.rule.kind}, {evaluation}"


@dataclass
class Evaluation:
    """What a setting gave.

    Attributes:
        setting: its name.
        tokens: predicted.
        cross_entropy: nats per token.
        perplexity: its exponential.
        bits_per_byte: of the predicted text; None without a tokenizer.
        mean_steps: average executed latent steps per token.
        step_shares: share of tokens at each K̂ = 0..K.
        kv_entries: cached slots per token.
        flops: floating-point operations per token at inference.
        passes: parallel passes run, or sweeps to the fixed point; the most of any batch.
    """

    setting: str
    tokens: int
    cross_entropy: float
    perplexity: float
    bits_per_byte: float | None
    mean_steps: float
    step_shares: list[float]
    kv_entries: float
    flops: float
    passes: int

    def as_dict(self) -> dict:
        """The values as JSON has them."""
        return asdict(self)


@torch.no_grad()
def evaluate(
    model: PonderLM,
    batches: Iterable[Tensor],
    setting: Setting,
    count_bytes: Callable[[Sequence[int]], int] | None = None,
) -> Evaluation:
    """Evaluate a model on batches of token ids.

    Args:
        model: in evaluation mode.
        batches: int64 (B, L + 1) each; L may differ from batch to batch.
        setting: how.
        count_bytes: bytes of text that a list of token ids stands for; None leaves bits per byte out.

    Raises:
        UserError: if there is nothing to evaluate, or a loss is not finite.
    """
    steps = model.ponder_config.steps
    device = model.embedding.weight.device
    loss, flops, tokens, size, passes = 0.0, 0.0, 0, 0, 0
    histogram = torch.zeros(steps + 1, dtype=torch.long)
    for batch in batches:
        inputs, labels = batch[:, :-1].to(device), batch[:, 1:].to(device)
        if setting.refinements is None:
            result = model.exact(inputs, setting.rule)
        else:
            result = model.jacobi(inputs, setting.refinements, setting.rule)
        losses = model.head(result.output_BLH, labels)[1]
        if result.routing is None or setting.rule.kind != "hard":
            executed = torch.full_like(labels, steps)  # the soft mask runs every step
        else:
            executed = result.routing.executed
        check_finite(losses, setting)
        loss += float(losses.double().sum())
        tokens += labels.numel()
        flops += float(inference_flops(executed, model, setting.rule.exit is not None).sum())
        histogram += torch.bincount(executed.flatten(), minlength=steps + 1).cpu()
        passes = max(passes, result.passes)
        if count_bytes is not None:
            size += sum(count_bytes(row) for row in labels.tolist())
    if tokens == 0:
        raise UserError("there is nothing to evaluate; give a longer text or another split")
    shares = (histogram.double() / tokens).tolist()
    mean_steps = sum(k * share for k, share in enumerate(shares))
    return Evaluation(
        setting=setting.name,
        tokens=tokens,
        cross_entropy=loss / tokens,
        perplexity=math.exp(min(loss / tokens, 700)),
        bits_per_byte=loss / math.log(2) / size if size else None,
        mean_steps=mean_steps,
        step_shares=shares,
        kv_entries=model.passes.kv_entries(mean_steps),
        flops=flops / tokens,
        passes=passes,
    )


def check_finite(numbers: Tensor, setting: Setting) -> None:
    """Look at losses, or hidden states, before anything is made of them.

    Raises:
        UserError: if one is not finite.
    """
    if not numbers.isfinite().all():
        raise UserError(
            f"what the model computes ({setting.name}) is not finite: a weight is not a number, or activations "
            "overflow; take an earlier checkpoint, and train on from it with a lower optimizer.learning_rate"
        )


def settings(
    model: PonderLM,
    threshold: float | None,
    bias: float | None,
    refinements: Sequence[int],
    exit: Exit | None = None,
) -> list[Setting]:
    """Soft and hard × jacobi(R) for every R given, and exact; with an exit, hard and exact, without it and with it.

    Without a router soft and hard are the same thing; without an iteration so are jacobi(R) and exact.

    Raises:
        UserError: tokens of this model cannot stop by the exit.
    """
    if exit is not None:
        exit.check(model.ponder_config)
        return [Setting(model.rule("hard", threshold, bias, each), None) for each in (None, exit)]
    kinds = ["hard"] if model.router is None else ["soft", "hard"]
    ways = [*refinements, None] if model.passes.iterated else [None]
    return [Setting(model.rule(kind, threshold, bias), way) for kind in kinds for way in ways]


def windows(tokens: Sequence[int], length: int) -> Iterator[Tensor]:
    """Cut text into samples (1, up to length + 1) that overlap in one token; all but the first are predicted."""
    for start in range(0, len(tokens) - 1, length):
        yield torch.tensor([tokens[start : start + length + 1]])
