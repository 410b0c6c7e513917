"""Runs forwards of generation through one rank's part of a model."""

import math
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ponder.generation.block_cache import BlockCache
from megatron_ponder.generation.forward import Forward, Outcome, PromptEnd
from megatron_ponder.model.modes.pondering import LatentReads
from megatron_ponder.model.ponder import PonderLM
from megatron_ponder.model.router import Rule, fusion_weights


class Runner:
    """One rank's part of a model, with the slots that its sequences have stored there.

    Attributes:
        cache: keys and values of this rank's layers and heads.
        read_TX: what latent slots read of the forward before; where the stack of layers is spread over ranks, its last
            rank hands it to the first.
    """

    def __init__(self, model: PonderLM, rule: Rule, rows: int) -> None:
        """Start without any sequence.

        Args:
            model: in evaluation mode; this rank's part.
            rule: τ and α; they are applied by the hard rule, whatever its kind.
            rows: sequences that may be live.
        """
        self.model, self._lanes = model, model.passes.lanes
        self._rule = Rule("hard", rule.threshold, rule.bias)
        weight = next(model.parameters())
        self.cache = BlockCache(model.model_config, len(model.part.layers), model.axis, rows * self._lanes, weight)
        self._steps, self._vocab_size = model.ponder_config.steps, model.model_config.vocab_size
        self._wide = torch.promote_types(weight.dtype, torch.float32)
        hidden_size = model.model_config.hidden_size
        # Of the forward before: hidden states in the last part, inputs in the first.
        self._hidden_TH = self._inputs_TH = self.read_TX = weight.new_empty(0, hidden_size)
        # Of the token that each row is at: weights of its steps in the output, the output so far, K̂.
        self._weights_rK = torch.zeros(rows, self._steps + 1, dtype=self._wide, device=weight.device)
        self._fused_rH = weight.new_zeros(rows, hidden_size)
        self._executed_r = torch.full((rows,), self._steps, device=weight.device)

    @torch.inference_mode()
    def run(self, forward: Forward, received_TH: Tensor | None = None) -> Tensor:
        """Run this part's layers.

        Args:
            forward: the slots.
            received_TH: the residual stream from the part before; None in the first part.

        Returns:
            The residual stream, (T, H); in the last part the hidden states.
        """
        model, device = self.model, self.cache.keys.device
        self.cache.prepare(forward)
        if not forward:
            return self._hidden_TH[:0]
        if model.part.first:
            received_TH = self._inputs(forward)
        positions = torch.tensor(forward.positions, device=device)
        log_w = torch.tensor(forward.log_w, dtype=self._wide, device=device)
        return model.run_slots(received_TH, positions, log_w, self.cache.layers)

    @torch.inference_mode()
    def finish(self, forward: Forward, hidden_TH: Tensor) -> Outcome:
        """Route, fuse and predict, in the last part.

        Args:
            forward: the slots.
            hidden_TH: their hidden states.

        Returns:
            What the scheduler needs to know; with tensor ranks, the same on all of them.
        """
        if not forward:
            return Outcome([], [], hidden_TH.new_empty(0, self._vocab_size), [])
        routed = self._route(hidden_TH[torch.tensor(forward.routed, dtype=torch.long, device=hidden_TH.device)])
        outputs = [self._completed(forward, hidden_TH, routed)] if forward.steps else []
        changes = []
        for prompt in forward.prompts:
            changes.append(self._change(prompt, hidden_TH))
            if prompt.last_token is not None:
                token_SH = hidden_TH[prompt.last_token : prompt.at + prompt.count]
                outputs.append(self._last_output(forward, prompt, token_SH, routed))
        self._hidden_TH = hidden_TH
        unfinished = torch.tensor([max(-token, 0) < self._steps for token in forward.tokens], device=hidden_TH.device)
        self.read_TX = self.model.passes.read_by_latents(self.model.back, hidden_TH, unfinished)
        logits = self._logits(torch.cat(outputs)) if outputs else hidden_TH.new_empty(0, self._vocab_size)
        return Outcome(routed.executed_F.tolist(), routed.log_w_FK.tolist(), logits, changes)

    def _inputs(self, forward: Forward) -> Tensor:
        """The residual stream that enters the first part: embedded tokens and the inputs of latent slots."""
        device, model = self.read_TX.device, self.model
        tokens, sources = torch.tensor([forward.tokens, forward.sources], device=device)
        latent = tokens < 0
        x_TH = model.embed(tokens.masked_fill(latent, 0))
        if min(forward.tokens) < 0:
            read = LatentReads(self.read_TX, self._inputs_TH, sources[latent], -tokens[latent])
            x_TH[latent] = model.passes.latent_inputs(model.front, read)
        self._inputs_TH = x_TH
        return x_TH

    def _route(self, hidden_FH: Tensor) -> "_Routed":
        routing = self.model.route(hidden_FH, self._rule)
        if routing is not None:
            return _Routed(routing.executed, routing.log_w, fusion_weights(routing, self._rule))
        # Every token takes all steps, all keys have weight 1, and the last step is the output.
        log_w_FK = hidden_FH.new_zeros(len(hidden_FH), self._steps + 1, dtype=self._wide)
        weights_FK = log_w_FK.clone()
        weights_FK[:, -1] = 1
        return _Routed(torch.full((len(hidden_FH),), self._steps, device=hidden_FH.device), log_w_FK, weights_FK)

    def _completed(self, forward: Forward, hidden_TH: Tensor, routed: "_Routed") -> Tensor:
        """Advance the outputs of the decoding sequences; those that are complete and wanted, (n, H)."""
        count = len(forward.steps)
        rows = [segment.row // self._lanes for segment in forward.segments[:count]]
        rows = torch.tensor(rows, device=hidden_TH.device)
        steps = torch.tensor(forward.steps, device=hidden_TH.device)
        starting = rows[steps == 0]
        self._executed_r[starting] = routed.executed_F[: len(starting)]
        self._weights_rK[starting] = routed.weights_FK[: len(starting)]
        self._fused_rH[starting] = 0
        weights_R1 = self._weights_rK[rows, steps].unsqueeze(1).to(hidden_TH.dtype)
        fused_RH = self._fused_rH[rows].addcmul_(weights_R1, hidden_TH[:count])
        self._fused_rH[rows] = fused_RH
        wanted = torch.tensor(forward.wanted, device=hidden_TH.device)
        return fused_RH[wanted & (steps == self._executed_r[rows])]

    def _last_output(self, forward: Forward, prompt: PromptEnd, token_SH: Tensor, routed: "_Routed") -> Tensor:
        """What the head reads of the last token of a prompt, (1, H), from the hidden states of its slots."""
        if self.model.router is None:
            return token_SH[-1:]
        weights_K = routed.weights_FK[forward.routed.index(prompt.last_token)].to(token_SH.dtype)
        return weights_K[: len(token_SH)].unsqueeze(0) @ token_SH

    def _change(self, prompt: PromptEnd, hidden_TH: Tensor) -> float:
        if prompt.before is None:
            return math.inf
        now = hidden_TH[prompt.at : prompt.at + prompt.count]
        before = self._hidden_TH[prompt.before : prompt.before + prompt.count]
        return float((now - before).abs().max() / now.abs().max())

    def _logits(self, output_nH: Tensor) -> Tensor:
        """(n, V), gathered from the tensor ranks."""
        axis = self.model.axis
        logits = self.model.head(output_nH)
        if axis.size > 1:
            parts = [torch.empty_like(logits) for _ in range(axis.size)]
            dist.all_gather(parts, logits.contiguous(), group=axis.group)
            logits = torch.cat(parts, -1)
        return logits[:, : self._vocab_size]


class _Routed(NamedTuple):
    """Of F token slots: K̂, log weights as keys, weights of the steps in the output."""

    executed_F: Tensor
    log_w_FK: Tensor
    weights_FK: Tensor
