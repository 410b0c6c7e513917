"""What the scheduler works with: sequences on their way through it, how many may be, and what it has counted."""

from collections.abc import Callable
from dataclasses import dataclass, field

from megatron_ponder.errors import UserError
from megatron_ponder.inference.prefill import Prefill, PromptPiece
from megatron_ponder.inference.request import Generation, Request
from megatron_ponder.inference.sampling import Chooser
from megatron_ponder.inference.text_stream import TextStream

OnToken = Callable[[Generation], None]


@dataclass(frozen=True)
class Batching:
    """How much is run at a time.

    Attributes:
        max_sequences: live at once; others wait.
        max_slots: in the cache at once; others wait, and the newest sequence goes back to waiting when it must.
        prompt_slots: of prompts that are iterated in one forward, beyond which further prompts begin slot by slot.
        prefix_slots: kept of prompts that were read, for others that begin alike.
        prefill: how prompts are read; None for slot by slot, as in the definition of the model.
    """

    max_sequences: int = 16
    max_slots: int = 1 << 17
    prompt_slots: int = 1024
    prefix_slots: int = 1 << 14
    prefill: Prefill | None = field(default_factory=Prefill)

    def __post_init__(self) -> None:
        if self.max_sequences < 1 or self.max_slots < 1:
            raise UserError("max_sequences and max_slots must be at least 1")


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
        piece: of the prompt, being iterated.
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

    @property
    def reading(self) -> bool:
        """Whether some token before the last is still to run."""
        return self.fed < len(self.ids) - 1

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
