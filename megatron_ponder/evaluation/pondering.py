"""What a model does with its steps: losses token by token, with and without them, and under other choices of K̂."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from megatron_ponder.base.errors import UserError
from megatron_ponder.evaluation.inference_flops import inference_flops
from megatron_ponder.evaluation.perplexity import Setting, check_finite
from megatron_ponder.model.ponder import PonderLM, PonderOutput
from megatron_ponder.model.router import Rule

# Below this many units of rounding, the distance to the fixed point is noise and says nothing about contraction.
ROUNDING_UNITS = 256


@dataclass(frozen=True)
class TokenMeasurements:
    """Every predicted token under one setting, in reading order.

    Attributes:
        setting: how the model was evaluated.
        tokens: int64 (N,), what was read.
        labels: int64 (N,), what came next.
        executed: int64 (N,), latent steps that ran: K̂ under the hard rule or by an exit, else all.
        loss: fp64 (N,), nats of predicting the label.
        first_loss: fp64 (N,), the same from the hidden state before any latent step; None where the model does not
            show it.
        distribution: fp64 (N, K + 1), s; None without a router.
        flops: fp64 (N,), of inference.
    """

    setting: Setting
    tokens: np.ndarray
    labels: np.ndarray
    executed: np.ndarray
    loss: np.ndarray
    first_loss: np.ndarray | None
    distribution: np.ndarray | None
    flops: np.ndarray

    @property
    def gain(self) -> np.ndarray | None:
        """ΔCE, nats that the latent steps save: loss before them less loss after them."""
        return None if self.first_loss is None else self.first_loss - self.loss


def run(model: PonderLM, inputs_BL: Tensor, setting: Setting) -> PonderOutput:
    """Evaluate by a setting."""
    if setting.refinements is None:
        return model.exact(inputs_BL, setting.rule)
    return model.jacobi(inputs_BL, setting.refinements, setting.rule)


@torch.no_grad()
def measure(model: PonderLM, batches: Iterable[Tensor], setting: Setting) -> TokenMeasurements:
    """Measure every predicted token.

    Args:
        model: in evaluation mode.
        batches: int64 (B, L + 1) each; L may differ from batch to batch.
        setting: how. If it chooses K̂ itself, its `executed` is flat, (N,), over the tokens of all batches.

    Raises:
        UserError: if there is nothing to measure, or a loss is not finite.
    """
    steps = model.ponder_config.steps
    device = model.embedding.weight.device
    chosen = setting.rule.executed
    columns: dict[str, list[Tensor]] = {}
    at = 0
    for batch in batches:
        inputs, labels = batch[:, :-1].to(device), batch[:, 1:].to(device)
        way = setting
        if chosen is not None:
            part = chosen[at : at + labels.numel()].view(labels.shape).to(device)
            way = replace(setting, rule=replace(setting.rule, executed=part))
        result = run(model, inputs, way)
        ran_all = result.routing is None or setting.rule.kind != "hard"
        executed = torch.full_like(labels, steps) if ran_all else result.routing.executed
        found = {
            "tokens": inputs,
            "labels": labels,
            "executed": executed,
            "loss": model.head(result.output_BLH, labels)[1],
            "flops": inference_flops(executed, model, setting.rule.exit is not None),
        }
        check_finite(found["loss"], way)
        if result.hidden_BLSH.shape[2] == steps + 1:
            found["first_loss"] = model.head(result.hidden_BLSH[:, :, 0], labels)[1]
        if model.router is not None:
            found["distribution"] = result.routing.log_s.exp()
        for name, values in found.items():
            columns.setdefault(name, []).append(values.flatten(0, 1).cpu())
        at += labels.numel()
    if not columns:
        raise UserError("there is nothing to measure; give a longer text or another split")
    arrays = {name: torch.cat(parts).numpy() for name, parts in columns.items()}
    wide = {name: array.astype(np.float64) for name, array in arrays.items() if array.dtype.kind == "f"}
    return TokenMeasurements(setting, **({"first_loss": None, "distribution": None} | arrays | wide))


def shuffled(measured: TokenMeasurements, seed: int) -> Rule:
    """The rule that gives the same K̂ to as many tokens as were measured to have it, but to any of them.

    Everything else is as it was: keys keep the router's weights, and the last executed step takes what is left of s.
    """
    drawn = np.random.default_rng(seed).permutation(measured.executed)
    return replace(measured.setting.rule, executed=torch.from_numpy(drawn))


@dataclass(frozen=True)
class Contraction:
    """How fast the Jacobi iterates approach their fixed point under the soft mask.

    Attributes:
        rmse: for R = 0, 1, ..: root of the mean squared distance of the hidden states that the output is made of.
        rms: of those hidden states themselves, at the fixed point.
        factor: by which an iteration shrinks the distance, fitted; None if fewer than two distances stand out from
            rounding.
        fitted: how many of the distances, from R = 0 on, the fit used.
    """

    rmse: list[float]
    rms: float
    factor: float | None
    fitted: int


@torch.no_grad()
def contraction(model: PonderLM, batches: Sequence[Tensor], iterations: int) -> Contraction | None:
    """Measure the distance to the fixed point after R = 0 .. `iterations` - 1 refinements.

    The factor is the slope of a straight line through the logarithms of the distances.

    Args:
        model: in evaluation mode.
        batches: int64 (B, L + 1) each.
        iterations: how many values of R.

    Returns:
        None for a model that does not iterate: its output does not depend on R.

    Raises:
        UserError: if there is nothing to measure, or it is not finite.
    """
    device = model.embedding.weight.device
    soft = model.rule("soft")
    squares, size, count = torch.zeros(iterations, dtype=torch.float64), 0.0, 0
    for batch in batches:
        inputs = batch[:, :-1].to(device)
        target = model.exact(inputs, soft).hidden_BLSH
        check_finite(target, Setting(soft, None))
        for refinements in range(iterations):
            hidden = model.jacobi(inputs, refinements, soft).hidden_BLSH
            kept = target[:, :, -hidden.shape[2] :]
            squares[refinements] += float((hidden - kept).double().square().sum())
        size += float(kept.double().square().sum())
        count += kept.numel()
    if not count:
        raise UserError("there is nothing to measure; give a longer text or another split")
    rmse, rms = (squares / count).sqrt(), (size / count) ** 0.5
    noise = ROUNDING_UNITS * torch.finfo(model.embedding.weight.dtype).eps * rms
    if bool((rmse <= noise).all()):
        return None
    fitted = int((rmse > noise).long().cumprod(0).sum())
    factor = None if fitted < 2 else float(np.exp(np.polyfit(np.arange(fitted), rmse[:fitted].log().numpy(), 1)[0]))
    return Contraction(rmse.tolist(), rms, factor, fitted)


@torch.no_grad()
def refined_losses(
    model: PonderLM, batches: Iterable[Tensor], refinements: Sequence[int], rule: Rule
) -> list[tuple[int, float]]:
    """Measure the loss of jacobi(R) for several R, by one run of the passes of the largest.

    Args:
        model: in evaluation mode, whose passes are iterated.
        batches: int64 (B, L + 1) each.
        refinements: the numbers R.
        rule: how a routing is applied; there are latent steps.

    Returns:
        Every R, rising, with nats per token.

    Raises:
        UserError: if a loss is not finite.
    """
    device, chosen = model.embedding.weight.device, sorted(set(refinements))
    sums, tokens = dict.fromkeys(chosen, 0.0), 0
    for batch in batches:
        inputs, labels = batch[:, :-1].to(device), batch[:, 1:].to(device)
        tokens += labels.numel()
        for refined, output in enumerate(_refined(model, inputs, chosen[-1], rule)):
            if refined in sums:
                losses = model.head(output.output_BLH, labels)[1]
                check_finite(losses, Setting(rule, refined))
                sums[refined] += float(losses.double().sum())
    return [(refined, total / tokens) for refined, total in sums.items()]


def _refined(model: PonderLM, inputs_BL: Tensor, most: int, rule: Rule) -> Iterator[PonderOutput]:
    """What jacobi(0), jacobi(1) and so on would give, one after another: each goes on from the passes of the last."""
    plan, batch, state = model.passes.plan(most), model.read(inputs_BL), None
    unrefined = len(model.passes.plan(0)) - 1
    for index in range(len(plan)):
        result = model.run_pass(batch, state, rule)  # which keeps every slot, as no plan says which are read
        if index >= unrefined:
            yield model.output(result, rule, plan[: index + 1])
        if index + 1 < len(plan):
            state = model.next_state(result, rule, plan[index + 1])
