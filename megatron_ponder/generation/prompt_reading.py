"""Which sequences read their prompts in pieces, and where in the cache."""

from collections.abc import Iterable

from megatron_ponder.generation.prompt_pieces import ApartPiece, IteratedPiece, LanePiece, PromptPiece, WholePiece
from megatron_ponder.generation.sequences import Batching, Sequence
from megatron_ponder.model.modes.pondering import Passes


class PromptReading:
    """Begins pieces of prompts."""

    def __init__(
        self, passes: Passes, batching: Batching, tolerance: float, eod_id: int | None, exits: bool = False
    ) -> None:
        """Begin none.

        Args:
            passes: of the model.
            batching: limits.
            tolerance: as in `Prefill`, with its default resolved.
            eod_id: the token with which a document ends, if documents are kept apart.
            exits: as in `Scheduler`.
        """
        self._passes, self._batching, self._tolerance, self._eod_id = passes, batching, tolerance, eod_id
        self._exits = exits

    def begin(self, live: list[Sequence]) -> None:
        """Give sequences that are between two tokens a piece of their prompt, where it is worth it and fits."""
        prefill = self._batching.prefill
        if prefill is None:
            return
        room = self._batching.prompt_slots - sum(sequence.piece.width for sequence in live if sequence.piece)
        # Where nothing is iterated, reading takes one forward a pass. Elsewhere slot by slot costs the less the more
        # sequences take part in every forward.
        shortest = max(2, prefill.shortest * len(live)) if self._passes.iterated else 2
        for sequence in live:
            if sequence.piece is None and sequence.step == 0 and len(sequence.ids) - sequence.fed >= shortest:
                piece = self._piece(sequence)
                alone = room == self._batching.prompt_slots
                if (piece.width <= room or alone) and self._fits(sequence, piece, live):
                    room -= piece.width
                    sequence.piece = piece

    def window(self, row: int) -> int:
        """Row of the cache for what is not final of the sequence that has the given one."""
        return self._batching.max_sequences + row

    def windows(self, rows: Iterable[int]) -> list[int]:
        """Those of the sequences in the given rows; none where nothing is iterated."""
        return [self.window(row) for row in rows] if self._passes.iterated else []

    def _piece(self, sequence: Sequence) -> PromptPiece:
        prefill, begin = self._batching.prefill, sequence.fed
        # What comes of the last token is to be known, for which it runs slot by slot if its steps are apart in others.
        last = len(sequence.ids) - 1
        end = last if self._passes.iterated else begin + prefill.chunk
        end = min(end, last) if self._passes.own else end
        tokens = sequence.ids[begin:end]
        if self._eod_id in tokens:  # a piece lies within one document
            tokens = tokens[: tokens.index(self._eod_id) + 1]
        if self._passes.iterated:
            row = self.window(sequence.row)
            return IteratedPiece(tokens, sequence.position, self._passes, prefill, self._tolerance, row, self._exits)
        if self._passes.own:
            return ApartPiece(tokens, sequence.position, self._passes)
        kind = WholePiece if self._passes.interleaved else LanePiece
        return kind(tokens, sequence.position, self._passes, wanted=begin + len(tokens) == len(sequence.ids))

    def _fits(self, sequence: Sequence, piece: PromptPiece, live: list[Sequence]) -> bool:
        """Whether a window finds room beside all slots, now and when its sequence is alone."""
        if not (self._passes.iterated or self._passes.own):
            return True
        most = piece.width * (self._passes.steps + 1)
        every = self._passes.most_slots(len(sequence.ids)) + most
        used = sum(each.length + each.next_slots for each in live) - sequence.next_slots + piece.slots
        return max(every, used) <= self._batching.max_slots
