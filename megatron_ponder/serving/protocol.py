"""What a client may ask for: the body of `POST /v1/completions`, and the requests that it stands for."""

import secrets
from dataclasses import dataclass, fields
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import PydanticCustomError

from megatron_ponder.base.counts import counted
from megatron_ponder.base.errors import UserError
from megatron_ponder.config.declarations import range_of
from megatron_ponder.data.tokenizer import Tokenizer
from megatron_ponder.generation.options import Options
from megatron_ponder.generation.request import Request
from megatron_ponder.generation.sampling import SEEDS, Sampling
from megatron_ponder.serving.refusals import RefusedError


@dataclass(frozen=True)
class ServedModel:
    """What clients are told, and what their requests are made with.

    Attributes:
        name: under which it is served.
        tokenizer: of the model.
        max_tokens: of a prompt and its continuation together.
        created: seconds since 1970.
    """

    name: str
    tokenizer: Tokenizer
    max_tokens: int
    created: int

    def describe(self) -> dict:
        """The model as the list of models has it."""
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "megatron_ponder",
            "max_model_len": self.max_tokens,
        }


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """A token as text, with the space that it begins with; a printable name where it is no text of its own."""
    once = tokenizer.decode([token])
    # A second time, because a tokenizer may drop the space at the beginning of a text.
    text = tokenizer.decode([token, token])[len(once) :]
    return tokenizer.piece(token) if not text or "\ufffd" in text else text


def _within(name: str) -> Any:
    """The range of an option of generation."""
    allowed = next(range_of(item) for item in fields(Options) if item.name == name)
    return Field(ge=allowed.low, le=allowed.high)


class StreamOptions(BaseModel):
    """What a stream has beside its events.

    Attributes:
        include_usage: end the stream with the usage.
    """

    model_config = ConfigDict(strict=True, extra="forbid")

    include_usage: bool = False


class Completion(BaseModel):
    """The body; names and defaults are OpenAI's, those after `user` are our own. None stands for the default."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    model: str | None = None
    prompt: list[Any] | None = None
    max_tokens: Annotated[int, _within("max_new_tokens")] = 16
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    n: Annotated[int, Field(ge=1, le=128)] = 1
    best_of: Annotated[int, Field(ge=1, le=128)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    echo: bool = False
    stop: Annotated[list[str], Field(max_length=4)] = []
    seed: Annotated[int, Field(ge=-SEEDS, lt=SEEDS)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    logit_bias: dict[str, float] = {}
    suffix: str | None = None
    user: str | None = None
    top_k: Annotated[int, _within("top_k")] = 0
    min_p: Annotated[float, _within("min_p")] = 0.0
    repetition_penalty: Annotated[float, _within("repetition_penalty")] = 1.0
    stop_token_ids: list[Annotated[int, _within("stop_tokens")]] = []
    ignore_eos: bool = False

    @model_validator(mode="before")
    @classmethod
    def _drop_null(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            raise PydanticCustomError("body", "the body must be a JSON object")
        return {name: value for name, value in body.items() if value is not None}

    @field_validator("prompt", mode="before")
    @classmethod
    def _list_prompts(cls, prompt: Any) -> Any:
        """Several prompts, each a text or a list of token ids."""
        if isinstance(prompt, str) or _are_ids(prompt):
            return [prompt]
        if prompt == []:
            raise PydanticCustomError("prompt", "is an empty list; give at least one prompt")
        if isinstance(prompt, list) and (all(isinstance(x, str) for x in prompt) or all(map(_are_ids, prompt))):
            return prompt
        if isinstance(prompt, list) and [] in prompt:
            raise PydanticCustomError("prompt", "one of the prompts has no tokens; give at least one")
        raise PydanticCustomError("prompt", "must be a text, a list of texts, token ids, or a list of lists of them")

    @field_validator("stop", mode="before")
    @classmethod
    def _list_stops(cls, stop: Any) -> Any:
        return [stop] if isinstance(stop, str) else stop

    @property
    def samples(self) -> int:
        """How many are to be generated for each prompt."""
        return self.best_of or self.n


def _are_ids(prompt: Any) -> bool:
    return isinstance(prompt, list) and len(prompt) > 0 and all(type(token) is int for token in prompt)


def parse(body: bytes) -> Completion:
    """Read and check a body.

    Raises:
        RefusedError: what is wrong with it.
    """
    try:
        completion = Completion.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        param = ".".join(map(str, first["loc"])) or None
        if first["type"] == "extra_forbidden":
            raise RefusedError(
                400, f"there is no parameter {param!r}; leave it out", param, "unknown_parameter"
            ) from None
        message = first["msg"][:1].lower() + first["msg"][1:]
        raise RefusedError(400, f"{param}: {message}" if param else message, param, "invalid_value") from None
    _refuse_combinations(completion)
    return completion


def _refuse_combinations(completion: Completion) -> None:
    def refuse(param: str, message: str) -> None:
        raise RefusedError(400, f"{param} {message}", param, "unsupported_value")

    if completion.suffix:
        refuse("suffix", "is not supported: the model continues texts, and does not fill gaps; leave it out")
    for name in ("presence_penalty", "frequency_penalty"):
        if getattr(completion, name):
            refuse(name, "is not supported; leave it at 0, or use repetition_penalty")
    if completion.logit_bias:
        refuse("logit_bias", "is not supported; leave it out")
    if completion.echo and completion.logprobs is not None:
        refuse("logprobs", "cannot be had together with echo: those of the prompt are not computed; ask for one")
    if completion.stream_options is not None and not completion.stream:
        refuse("stream_options", "is for streams; set stream to true, or leave it out")
    if completion.best_of is not None and completion.best_of < completion.n:
        refuse("best_of", f"must be at least n, which is {completion.n}")
    if completion.best_of is not None and completion.best_of > completion.n and completion.stream:
        refuse("best_of", "chooses among whole texts, which cannot be streamed; leave out one of the two")


def requests_for(completion: Completion, model: ServedModel, most: int) -> list[Request]:
    """The requests that a body stands for: `samples` for each prompt, one prompt after another.

    Sample i draws its random numbers from `seed` + i, whatever the other prompts are; without a seed, from any.

    Args:
        completion: what is asked for.
        model: that is served.
        most: sequences that may be asked for at once.

    Raises:
        RefusedError: they cannot be fulfilled by this model.
    """
    if completion.model not in (None, model.name):
        message = f"the model {completion.model!r} is not served here; ask for {model.name!r}"
        raise RefusedError(404, message, "model", "model_not_found")
    prompts = completion.prompt or [""]
    if len(prompts) * completion.samples > most:
        message = f"{len(prompts)} prompts with {completion.samples} samples each are too many; ask for {most} at most"
        raise RefusedError(400, message, "prompt" if len(prompts) > 1 else "n", "invalid_value")
    stop_ids = frozenset(completion.stop_token_ids)
    if not completion.ignore_eos:
        stop_ids |= {model.tokenizer.eod_id}
    requests = []
    for prompt in prompts:
        ids = prompt if isinstance(prompt, list) else model.tokenizer.encode(prompt) or [model.tokenizer.eod_id]
        if len(ids) + completion.max_tokens > model.max_tokens:
            has = counted(len(ids), "token")
            message = (
                f"the prompt has {has} and max_tokens is {completion.max_tokens}, but the model is meant for "
                f"{model.max_tokens}; shorten the prompt or ask for fewer"
            )
            raise RefusedError(400, message, "prompt", "context_length_exceeded")
        for sample in range(completion.samples):
            seed = secrets.randbelow(SEEDS) if completion.seed is None else (completion.seed + sample) % SEEDS
            try:
                sampling = Sampling(
                    repetition_penalty=completion.repetition_penalty,
                    temperature=completion.temperature,
                    top_k=completion.top_k,
                    top_p=completion.top_p,
                    min_p=completion.min_p,
                    seed=seed,
                )
                request = Request(
                    tuple(ids),
                    completion.max_tokens,
                    sampling,
                    stop_ids,
                    tuple(completion.stop),
                    completion.logprobs or 0,
                )
            except UserError as error:
                raise RefusedError(400, str(error), code="invalid_value") from None
            requests.append(request)
    return requests
