"""What is asked of generation, and what it gives."""

from dataclasses import MISSING, dataclass, field
from typing import Literal

from megatron_ponder.base.errors import UserError
from megatron_ponder.config.declarations import check_ranges, number_field
from megatron_ponder.generation.sampling import Sampling

FinishReason = Literal["length", "stop", "cancelled", "failed"]


@dataclass(frozen=True)
class Request:
    """A prompt to continue.

    Attributes:
        prompt: token ids, at least one.
        max_new_tokens: tokens after which the sequence ends.
        sampling: how tokens are chosen.
        stop_ids: tokens that end the sequence; the one that does is its last.
        stop_strings: texts that end the sequence; its text ends before the first of them.
        top_log_probabilities: report the log-probabilities of this many likeliest tokens beside each chosen one.
    """

    prompt: tuple[int, ...] = number_field(MISSING, 0, (1 << 31) - 1)
    max_new_tokens: int = number_field(MISSING, 0, 10**9)
    sampling: Sampling = field(default_factory=Sampling)
    stop_ids: frozenset[int] = frozenset()
    stop_strings: tuple[str, ...] = ()
    top_log_probabilities: int = number_field(0, 0, 1000)

    def __post_init__(self) -> None:
        if not self.prompt:
            raise UserError("the prompt is empty; give at least one token")
        check_ranges(self)
        if "" in self.stop_strings:
            raise UserError("a stop string is empty, and would end every text; leave it out")


@dataclass
class Generation:
    """One sequence, as far as it has come.

    Attributes:
        prompt: token ids given.
        tokens: token ids generated.
        log_probabilities: of the generated tokens under the model itself, before temperature and the like.
        top_log_probabilities: likeliest tokens at each place with their log-probabilities, where they were asked for.
        executed_steps: K̂ of every token that was fed to the model: the prompt, then all generated but the last.
        cached_slots: slots of these tokens, one each plus its executed steps, where other tokens see these.
        text: of the generated tokens, up to a stop string; empty without a tokenizer.
        finish_reason: None while the sequence goes on.
        error: why it has failed, where it has.
        seconds_waited: between the request and the first forward for it.
        seconds_to_first: between the request and its first token.
        seconds: between the request and its end.
        own_latents: whether executed steps are seen by their own token alone.
    """

    prompt: list[int]
    tokens: list[int] = field(default_factory=list)
    log_probabilities: list[float] = field(default_factory=list)
    top_log_probabilities: list[list[tuple[int, float]]] = field(default_factory=list)
    executed_steps: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: FinishReason | None = None
    error: str = ""
    seconds_waited: float = 0.0
    seconds_to_first: float = 0.0
    seconds: float = 0.0
    own_latents: bool = False

    @property
    def cached_slots(self) -> int:
        return len(self.executed_steps) + (0 if self.own_latents else sum(self.executed_steps))
