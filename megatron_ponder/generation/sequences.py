"""What the scheduler works with: sequences on their way through it, how many may be, and what it has counted."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from megatron_ponder.config.declarations import check_ranges, number_field
from megatron_ponder.generation.predictions import Prediction
from megatron_ponder.generation.prefill import Prefill
from megatron_ponder.generation.prompt_pieces import PromptPiece
from megatron_ponder.generation.request import FinishReason, Generation, Request
from megatron_ponder.generation.sampling import Chooser
from megatron_ponder.generation.text_stream import TextStream

OnToken = Callable[[Generation], None]


@dataclass(frozen=True)
class Batching:
    """How much is run at a time.

    Attributes:
        max_sequences: sequences that run at a time; others wait.
        max_slots: slots in the cache at a time; others wait, and the newest sequence goes back to waiting when it must.
        prompt_slots: of prompts that are read in one forward, beyond which further prompts begin slot by slot.
        prefix_slots: kept of prompts that were read, for others that begin alike.
        prefill: how prompts are read; None for slot by slot, as in the definition of the model.
    """

    max_sequences: int = number_field(16, 1, 1 << 16)
    max_slots: int = number_field(1 << 17, 1, 10**10)
    prompt_slots: int = number_field(1024, 1, 10**10)
    prefix_slots: int = number_field(1 << 14, 0, 10**10)
    prefill: Prefill | None = field(default_factory=Prefill)

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass(eq=False)
class Sequence:
    """A request on its way through the scheduler.

    Attributes:
        request: what is asked for.
        generation: what there is so far.
        ids: prompt and generated tokens.
        fed: how many of them are complete.
        row: of the cache, while live; where passes have keys of their own, of the group of rows that they take.
        length: slots in the cache.
        position: of the token after those complete.
        step: that runs next of the token being run; 0 for its first slot.
        source: index of its newest slot in the newest forward.
        executed, log_w: routing of the token being run.
        piece: of the prompt, being read.
        key: by which the rank that chooses knows it, from its first wish on.
    """

    request: Request
    generation: Generation
    chooser: Chooser
    stream: TextStream | None
    on_token: OnToken | None
    submitted: float
    ids: list[int]
    fed: int = 0
    row: int | None = None
    length: int = 0
    position: int = 0
    step: int = 0
    source: int = 0
    executed: int = 0
    log_w: list[float] = field(default_factory=list)
    piece: PromptPiece | None = None
    key: int | None = None

    @property
    def reading(self) -> bool:
        """Whether some token before the last is still to run."""
        return self.fed < len(self.ids) - 1

    @property
    def next_slots(self) -> int:
        """Places of the cache that the next forward may take, beside those that are taken."""
        return 1 if self.piece is None else self.piece.slots

    def extend(self, prediction: Prediction) -> FinishReason | None:
        """Append what comes next; how the sequence ends with it, if it does."""
        generation, request, stream, token = self.generation, self.request, self.stream, prediction.token
        self.ids.append(token)
        generation.tokens.append(token)
        generation.log_probabilities.append(prediction.log_probability)
        if request.top_log_probabilities:
            generation.top_log_probabilities.append(prediction.top)
        if len(generation.tokens) == 1:
            generation.seconds_to_first = time.perf_counter() - self.submitted
        if stream is not None and token not in request.stop_ids:
            stream.add(token)
            generation.text = stream.text
        if token in request.stop_ids or (stream is not None and stream.stopped):
            return "stop"
        return "length" if len(generation.tokens) == request.max_new_tokens else None

    def end(self, reason: FinishReason, error: str = "") -> None:
        """Nothing follows; `error` says why, if the sequence has failed."""
        generation = self.generation
        if self.stream is not None and reason != "failed":
            self.stream.close()
            generation.text = self.stream.text
            # What was held back may have completed a stop string.
            reason = "stop" if self.stream.stopped and reason == "length" else reason
        generation.finish_reason, generation.error = reason, error
        generation.seconds = time.perf_counter() - self.submitted

    def rewind(self) -> None:
        """Forget all slots, as before the first token."""
        self.row, self.piece = None, None
        self.fed = self.length = self.position = self.step = 0
        self.generation.executed_steps.clear()


@dataclass
class Usage:
    """Counts since the beginning.

    Attributes:
        forwards: that were run.
        rows: sequences that took part, summed over forwards.
        slots: that were run, iterates of prompts included.
        tokens: generated.
        preempted: how often a sequence went back to waiting.
        shared: tokens of prompts that were taken from others that begin alike.
    """

    forwards: int = 0
    rows: int = 0
    slots: int = 0
    tokens: int = 0
    preempted: int = 0
    shared: int = 0
