"""What a client gets: choices as OpenAI's completions have them, whole or in chunks."""

import time
import uuid
from collections.abc import Iterable, Sequence

from megatron_ponder.generation.request import Request
from megatron_ponder.generation.text_stream import TextStream
from megatron_ponder.serving.protocol import Completion, ServedModel, token_text
from megatron_ponder.serving.worker import Progress


class Answer:
    """One answer, for a stream as many chunks of it as there is progress."""

    def __init__(self, completion: Completion, requests: Sequence[Request], model: ServedModel) -> None:
        self._completion, self._requests, self._model = completion, requests, model
        self._id = f"cmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._begun: set[int] = set()
        self._streams: list[TextStream] = []
        if completion.logprobs is not None:
            # Without stop strings: where tokens begin must not depend on what is held back.
            self._streams = [TextStream(model.tokenizer, request.prompt) for request in requests]

    def whole(self, results: Sequence[Progress]) -> dict:
        """The answer, from the sequences in the order of their requests."""
        n, samples = self._completion.n, self._completion.samples
        chosen = []
        for first in range(0, len(results), samples):
            group = results[first : first + samples]
            chosen += sorted(group, key=_mean_log_probability, reverse=True)[:n] if samples > n else group
        choices = [self._choice(progress) | {"index": place} for place, progress in enumerate(chosen)]
        return self._object(choices) | {"usage": self.usage(results)}

    def chunk(self, progress: Progress) -> dict | None:
        """The next part of a stream; None if there is nothing new to say."""
        choice = self._choice(progress)
        if not (choice["text"] or choice["finish_reason"] or self._completion.logprobs is not None):
            return None
        return self._object([choice]) | ({"usage": None} if self._with_usage else {})

    def last_chunk(self, results: Iterable[Progress]) -> dict | None:
        """The usage, for streams that are to end with it."""
        return self._object([]) | {"usage": self.usage(results)} if self._with_usage else None

    def usage(self, results: Iterable[Progress]) -> dict:
        """Counts over all sequences; a prompt counts once, however many samples were drawn for it."""
        results = list(results)
        prompt_tokens = sum(len(request.prompt) for request in self._requests[:: self._completion.samples])
        completion_tokens = sum(result.count for result in results)
        fed, executed = sum(result.fed for result in results), sum(result.executed for result in results)
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
            "executed_steps": executed,
            "mean_steps": executed / max(1, fed),
        }

    @property
    def _with_usage(self) -> bool:
        options = self._completion.stream_options
        return options is not None and options.include_usage

    def _object(self, choices: list[dict]) -> dict:
        return {
            "id": self._id,
            "object": "text_completion",
            "created": self._created,
            "model": self._model.name,
            "choices": choices,
        }

    def _choice(self, progress: Progress) -> dict:
        text = progress.text
        if self._completion.echo and progress.index not in self._begun:
            prompts = self._completion.prompt or [""]
            prompt = prompts[progress.index // self._completion.samples]
            text = (prompt if isinstance(prompt, str) else self._model.tokenizer.decode(prompt)) + text
        self._begun.add(progress.index)
        return {
            "index": progress.index,
            "text": text,
            "logprobs": self._log_probabilities(progress),
            "finish_reason": progress.finish_reason,
        }

    def _log_probabilities(self, progress: Progress) -> dict | None:
        if self._completion.logprobs is None:
            return None
        stream = self._streams[progress.index]
        tokens = [token_text(self._model.tokenizer, token) for token in progress.tokens]
        offsets = []
        for token, text in zip(progress.tokens, tokens, strict=True):
            before = len(stream.text)
            if token not in self._requests[progress.index].stop_ids:
                stream.add(token)
            # Bytes before it that make no character come into the text with it.
            offsets.append(max(before, len(stream.text) - len(text)))
        return {
            "tokens": tokens,
            "token_logprobs": progress.log_probabilities,
            "top_logprobs": [self._top(place, progress, text) for place, text in enumerate(tokens)],
            "text_offset": offsets,
        }

    def _top(self, place: int, progress: Progress, chosen: str) -> dict[str, float]:
        """The likeliest tokens and the chosen one."""
        top: dict[str, float] = {}
        if self._completion.logprobs:
            for token, value in progress.top_log_probabilities[place]:
                top.setdefault(token_text(self._model.tokenizer, token), value)
        top.setdefault(chosen, progress.log_probabilities[place])
        return top


def _mean_log_probability(progress: Progress) -> float:
    return sum(progress.log_probabilities) / max(1, len(progress.log_probabilities))
