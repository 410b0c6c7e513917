"""Sequential decoding, slot by slot: the definition of the model that everything else is proved equal to."""

import torch
from torch import Tensor

from megatron_ponder.inference.cache import SlotCache
from megatron_ponder.model.ponder import PonderLM
from megatron_ponder.model.router import Pruning, fusion_weights


class SlotDecoder:
    """A batch of sequences, each of which every forward advances by the one slot that it needs next.

    The router decides a token's steps at its first slot, so that sequences do not wait for each other: one may run step
    2 of its fifth token while another runs step 0 of its ninth.

    Attributes:
        cache: executed slots.
        output_BH: the head's input for the token of each sequence; final once `run` has reported it complete.
        executed_B: int64, K̂ of that token.
    """

    def __init__(self, model: PonderLM, pruning: Pruning, batch_size: int, capacity: int = 64) -> None:
        """Start with empty sequences; the hard rule of `pruning` holds whatever its `hard` says."""
        self._model = model
        self._pruning = Pruning(True, pruning.threshold, pruning.bias)
        weight = model.embedding.weight
        steps = model.ponder_config.steps
        self.cache = SlotCache(model.model_config, batch_size, capacity, weight)
        self.output_BH = weight.new_zeros(batch_size, weight.shape[1])
        self.executed_B = torch.zeros(batch_size, dtype=torch.long, device=weight.device)
        self._hidden_BH = self.output_BH
        self._position_B = torch.full_like(self.executed_B, -1)
        self._step_B = torch.zeros_like(self.executed_B)
        wide = torch.promote_types(weight.dtype, torch.float32)
        self._log_w_BK = torch.zeros(batch_size, steps + 1, dtype=wide, device=weight.device)
        self._weights_BK = torch.zeros_like(self._log_w_BK)

    @torch.inference_mode()
    def run(self, next_token_B: Tensor) -> Tensor:
        """Run one slot of every sequence.

        Args:
            next_token_B: int64, the token that follows in each sequence; read only where the one before is complete.

        Returns:
            bool (B,), where this slot was the last of its token, so that `output_BH` and `executed_B` hold its result.
        """
        starts = self._step_B == self.executed_B
        starts |= self._position_B < 0
        self._position_B += starts
        self._step_B = torch.where(starts, 0, self._step_B + 1)
        embedded = self._model.embed(next_token_B)
        inputs = torch.where(starts.unsqueeze(1), embedded, self._hidden_BH)
        log_w = self._log_w_BK.gather(1, self._step_B.unsqueeze(1)).squeeze(1).masked_fill(starts, 0)
        self._hidden_BH = self._model.run_slot(inputs, self._position_B, log_w, self.cache.layers)
        self.cache.advance()
        self._decide(starts)
        weight = self._weights_BK.gather(1, self._step_B.unsqueeze(1)).to(self._hidden_BH.dtype)
        kept = self.output_BH.masked_fill(starts.unsqueeze(1), 0)
        self.output_BH = kept + weight * self._hidden_BH
        return self._step_B == self.executed_B

    def select(self, rows: Tensor) -> None:
        """Keep the sequences of these rows, int64 (b,), in this order."""
        self.cache.select(rows)
        for name in ("output_BH", "executed_B", "_hidden_BH", "_position_B", "_step_B", "_log_w_BK", "_weights_BK"):
            setattr(self, name, getattr(self, name)[rows])

    def restart(self, row: int) -> None:
        """Begin one sequence anew: nothing before is visible, and its next token has position 0."""
        self.cache.clear(row)
        self._position_B[row] = -1

    def _decide(self, starts: Tensor) -> None:
        """Take the routing of the tokens whose first slot has just run."""
        routing = self._model.route(self._hidden_BH, self._pruning)
        if routing is None:  # a fixed number of steps, the last of which is the output
            self.executed_B = torch.full_like(self.executed_B, self._log_w_BK.shape[1] - 1)
            self._weights_BK[:, -1] = 1
            return
        rows = starts.unsqueeze(1)
        self.executed_B = torch.where(starts, routing.executed, self.executed_B)
        self._log_w_BK = torch.where(rows, routing.log_w, self._log_w_BK)
        self._weights_BK = torch.where(rows, fusion_weights(routing, self._pruning), self._weights_BK)
