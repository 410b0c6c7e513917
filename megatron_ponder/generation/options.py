"""How a prompt is to be continued: what a command line says for all of them, and a line of a file for its own."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from megatron_ponder.base.errors import UserError
from megatron_ponder.config.declarations import check_ranges, number_field
from megatron_ponder.generation.request import Request
from megatron_ponder.generation.sampling import SEEDS, Sampling

KINDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    tuple[str, ...]: "a text or a list of texts",
    tuple[int, ...]: "a list of token ids",
}


def _as_in(kind: type, name: str, **default: Any) -> Any:
    """A field that another dataclass declares, with its range, and with its default unless one is given."""
    declared = next(item for item in fields(kind) if item.name == name)
    return field(**{"default": declared.default} | default, metadata=declared.metadata | {"declared_in": kind})


@dataclass(frozen=True)
class Options:
    """Options of a continuation, as lines of files and command lines give them.

    What is not described here is declared by `Request` and `Sampling`.

    Attributes:
        samples: continuations of each prompt; the random numbers of number i are those of `seed` + i.
        stop: texts before which a continuation ends.
        stop_tokens: token ids that end a continuation, beside the end-of-document token.
        ignore_eod: go on after the end-of-document token.
    """

    max_new_tokens: int = _as_in(Request, "max_new_tokens", default=64)
    samples: int = number_field(1, 1, 10**4)
    temperature: float = _as_in(Sampling, "temperature")
    top_k: int = _as_in(Sampling, "top_k")
    top_p: float = _as_in(Sampling, "top_p")
    min_p: float = _as_in(Sampling, "min_p")
    repetition_penalty: float = _as_in(Sampling, "repetition_penalty")
    seed: int = _as_in(Sampling, "seed")
    stop: tuple[str, ...] = ()
    stop_tokens: tuple[int, ...] = number_field((), 0, (1 << 31) - 1)
    ignore_eod: bool = False
    top_log_probabilities: int = _as_in(Request, "top_log_probabilities")

    def __post_init__(self) -> None:
        check_ranges(self)
        self.requests([0], None)  # which refuses all other values that cannot be

    def requests(self, prompt: Sequence[int], eod_id: int | None) -> list[Request]:
        """One request for each sample.

        Args:
            prompt: token ids, at least one.
            eod_id: the end-of-document token; None if there is none.

        Raises:
            UserError: a value cannot be.
        """
        stop_ids = frozenset(self.stop_tokens)
        if eod_id is not None and not self.ignore_eod:
            stop_ids |= {eod_id}
        sampling = Sampling(
            repetition_penalty=self.repetition_penalty,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            seed=self.seed,
        )
        return [
            Request(
                prompt=tuple(prompt),
                max_new_tokens=self.max_new_tokens,
                sampling=replace(sampling, seed=(self.seed + sample) % SEEDS),
                stop_ids=stop_ids,
                stop_strings=self.stop,
                top_log_probabilities=self.top_log_probabilities,
            )
            for sample in range(self.samples)
        ]

    def updated(self, values: Mapping[str, Any]) -> "Options":
        """These options with others from JSON in their place; null leaves one as it is.

        Raises:
            UserError: there is no such option, or its value is of another kind or cannot be.
        """
        kinds = {item.name: item.type for item in fields(self)}
        unknown = next((name for name in values if name not in kinds), None)
        if unknown is not None:
            raise UserError(f"there is no option {unknown!r}; choose among {', '.join(kinds)}, or leave it out")
        given = {name: value for name, value in values.items() if value is not None}
        return replace(self, **{name: _of_kind(kinds[name], name, value) for name, value in given.items()})


def _of_kind(kind: Any, name: str, value: Any) -> Any:
    """A value of JSON as the type that an option has."""
    if kind is int and type(value) is int:
        return value
    if kind is float and type(value) in (int, float):
        try:
            return float(value)
        except OverflowError:
            return math.inf  # which is outside of every range
    if kind is bool and type(value) is bool:
        return value
    if kind == tuple[str, ...] and isinstance(value, str):
        return (value,)
    item = {tuple[str, ...]: str, tuple[int, ...]: int}.get(kind)
    if item is not None and isinstance(value, list) and all(type(each) is item for each in value):
        return tuple(value)
    raise UserError(f"{name} must be {KINDS[kind]}, not {json.dumps(value)}")
