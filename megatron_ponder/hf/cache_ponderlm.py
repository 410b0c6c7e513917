"""PonderLM's key-value cache, which holds the slots that ran."""

import torch
from torch import Tensor
from transformers.cache_utils import Cache


class PonderLMCache(Cache):
    """Keys and values of executed slots; steps that did not run are not there.

    Rows of a batch may have executed different numbers of slots, so each has its own length. Where steps see
    only the same step of earlier tokens, each step has a lane of its own. Where slots of steps are seen by their own
    token alone, they are overwritten by the next one.

    Attributes:
        executed_steps: int64 (B, L), latent steps K̂ of every token so far; 0 at padding.
        lengths: int64 (B,), slots in the cache, in all lanes.
        positions: int64 (B,), RoPE position of the next token.
        ended: bool (B,), whether the last token ended its document.
        outputs: (B, H), fused hidden state of the last token, 0 before the first; None in an empty cache.
    """

    def __init__(self, batch_size: int, device: torch.device, lanes: int = 1, own: bool = False) -> None:
        super().__init__(layers=[])
        self._lanes, self._lane, self._own = lanes, 0, own
        self.executed_steps = torch.zeros(batch_size, 0, dtype=torch.long, device=device)
        self.lengths = torch.zeros(batch_size, dtype=torch.long, device=device)
        self.positions = torch.zeros_like(self.lengths)
        self.ended = torch.zeros(batch_size, dtype=torch.bool, device=device)
        self.outputs: Tensor | None = None
        # By lane and layer.
        self._keys: dict[tuple[int, int], Tensor] = {}
        self._values: dict[tuple[int, int], Tensor] = {}
        self._rows = self._places = self.lengths
        self._width = 0

    def open_slot(self, rows_R: Tensor, step: int = 0) -> Tensor | None:
        """Append one slot to these rows; its keys and values follow by `update`, layer by layer.

        Args:
            rows_R: int64.
            step: of the token that the slot is of.

        Returns:
            bool (R, 1, 1, T), the cached slots that each row may look at; None for all T.
        """
        self._lane = step % self._lanes
        self._rows, self._places = rows_R, self.lengths[rows_R] // self._lanes
        self.lengths[rows_R] += 1
        lengths = self._places + 1
        self._width = int(lengths.max())
        if bool((lengths == self._width).all()):
            return None
        slots = torch.arange(self._width, device=lengths.device)
        return (slots < lengths.unsqueeze(1))[:, None, None]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs
    ) -> tuple[Tensor, Tensor]:
        """Store the open slot's keys and values (R, N, 1, D) and return all that these rows have (R, N, T, D)."""
        place = (self._lane, layer_idx)
        return self._write(self._keys, place, key_states), self._write(self._values, place, value_states)

    def _write(self, store: dict[tuple[int, int], Tensor], place: tuple[int, int], new: Tensor) -> Tensor:
        if place not in store:
            store[place] = new.new_zeros(len(self.lengths), new.shape[1], 64, new.shape[3])
        if self._width > store[place].shape[2]:  # doubling keeps the copying linear in the length
            store[place] = torch.cat([store[place], torch.zeros_like(store[place])], 2)
        rows, places = self._rows.to(new.device), self._places.to(new.device)  # layers may be on several devices
        store[place][rows, :, places] = new[:, :, 0]
        stored = store[place][:, :, : self._width]
        return stored if len(rows) == len(stored) else stored[rows]

    def begin_token(self, rows_R: Tensor) -> None:
        """Forget the document that the last token of a row ended: it is not visible any more, and positions restart."""
        fresh = rows_R[self.ended[rows_R]]
        self.lengths[fresh] = 0
        self.positions[fresh] = 0
        self.ended[fresh] = False

    def end_token(self, rows_R: Tensor, executed_R: Tensor, fused_RH: Tensor, ended_R: Tensor | None) -> None:
        """Count a token that these rows have run; the others had padding."""
        if self.outputs is None:
            self.outputs = fused_RH.new_zeros(len(self.lengths), fused_RH.shape[1])
        self.outputs[rows_R] = fused_RH
        column = torch.zeros_like(self.lengths)
        column[rows_R] = executed_R
        self.executed_steps = torch.cat([self.executed_steps, column.unsqueeze(1)], 1)
        self.positions[rows_R] += 1
        if self._own:
            self.lengths[rows_R] -= executed_R
        if ended_R is not None:
            self.ended[rows_R] = ended_R

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen, padding included; slots are counted in `lengths`."""
        return self.executed_steps.shape[1]

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows, in this order."""
        self.executed_steps = self.executed_steps[indices]
        self.lengths, self.positions, self.ended = self.lengths[indices], self.positions[indices], self.ended[indices]
        self.outputs = None if self.outputs is None else self.outputs[indices]
        self._keys = {place: keys[indices] for place, keys in self._keys.items()}
        self._values = {place: values[indices] for place, values in self._values.items()}

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        self.batch_select_indices(
            torch.arange(len(self.lengths), device=self.lengths.device).repeat_interleave(repeats)
        )

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rearrange the rows, as beam search does."""
        self.batch_select_indices(beam_idx.to(self.lengths.device))

    def crop(self, *args, **kwargs) -> None:
        """Refuse, as tokens cannot be taken back."""
        raise ValueError("PonderLM's cache cannot be cropped; generate without an assistant model or prompt lookup")

    @property
    def is_croppable(self) -> bool:
        """False."""
        return False
