"""Prompts as users give them, on the command line, through a pipe or in a file, and the sequences they ask for."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ponder.base.errors import UserError
from megatron_ponder.base.texts import STANDARD_INPUT, check_text, decode, name_of, read_content, read_text
from megatron_ponder.data.tokenizer import Tokenizer
from megatron_ponder.generation.options import Options
from megatron_ponder.generation.request import Request


@dataclass(frozen=True)
class Prompt:
    """What is to be continued.

    Attributes:
        content: a text, or token ids.
        options: how.
        where: what to call it in messages; empty if there is but one.
        id: what its results are to carry, if anything.
    """

    content: str | tuple[int, ...]
    options: Options
    where: str
    id: Any = None


@dataclass(frozen=True)
class Task:
    """One sequence to generate.

    Attributes:
        request: what is asked for.
        prompt: index of the prompt, from 0.
        sample: of the prompt, from 0.
        id: that the prompt carries.
    """

    request: Request
    prompt: int
    sample: int
    id: Any = None


def text_prompts(texts: Sequence[str], options: Options) -> list[Prompt]:
    """Prompts of a command line; `-` stands for all of standard input, without the line end at its end.

    Raises:
        UserError: there is nothing in standard input, or it is no text.
    """
    prompts = []
    for index, text in enumerate(texts):
        where = "" if len(texts) == 1 else f"prompt {index}"
        if text == STANDARD_INPUT:
            text, where = read_text(STANDARD_INPUT).removesuffix("\n"), name_of(STANDARD_INPUT)
            if not text:
                raise UserError("standard input is empty; give --prompt or --prompts-file, or pipe a text in")
        prompts.append(Prompt(text, options, where))
    return prompts


def read_prompts(path: Path, defaults: Options) -> list[Prompt]:
    """Prompts of a file of JSON lines; the path `-` is standard input.

    A line is a text, a list of token ids, or an object with `prompt` (either of these), `id` (anything, which the
    results carry) and any of `Options`. Blank lines are passed over.

    Args:
        path: of the file.
        defaults: of lines that do not say otherwise.

    Raises:
        UserError: the file cannot be read or has no prompt; a line is wrong, with its number. All are read first.
    """
    name = name_of(path)
    prompts, mistakes = [], []
    for number, line in enumerate(read_content(path).split(b"\n"), 1):
        if line.strip():
            where = f"{name} line {number}"
            try:
                prompts.append(_read_line(decode(line, where), defaults, where))
            except UserError as error:
                mistakes.append(str(error))
    _refuse(mistakes)
    if not prompts:
        raise UserError(f'{name} has no prompts; write one JSON object a line, such as {{"prompt": "import"}}')
    return prompts


def tasks_of(prompts: Sequence[Prompt], tokenizer: Tokenizer | None, check: Callable[[Request], None]) -> list[Task]:
    """The sequences that prompts ask for, one prompt after another.

    An empty text is continued from the end-of-document token, as a document begins.

    Args:
        prompts: given.
        tokenizer: of the model; None if it has none, so that only token ids can be continued.
        check: refuses requests that can never run; that of the scheduler or of the generator.

    Raises:
        UserError: a prompt cannot be continued; what is wrong with the first one, and how many more there are.
    """
    tasks, mistakes = [], []
    for index, prompt in enumerate(prompts):
        try:
            requests = _requests(prompt, tokenizer)
            check(requests[0])
        except UserError as error:
            mistakes.append(f"{prompt.where}: {error}" if prompt.where else str(error))
            continue
        tasks += [Task(request, index, sample, prompt.id) for sample, request in enumerate(requests)]
    _refuse(mistakes)
    return tasks


def _requests(prompt: Prompt, tokenizer: Tokenizer | None) -> list[Request]:
    ids, eod_id = prompt.content, None if tokenizer is None else tokenizer.eod_id
    if isinstance(ids, str):
        if tokenizer is None:
            raise UserError(
                "the checkpoint has no tokenizer; train with tokenizer.path set to generate text, or give token ids in "
                "--prompts-file"
            )
        check_text(ids, "the prompt")
        ids = tokenizer.encode(ids) or [eod_id]
    return prompt.options.requests(ids, eod_id)


def _read_line(line: str, defaults: Options, where: str) -> Prompt:
    try:
        value = json.loads(line)
        check_text(value, where)  # what it carries is written beside the results
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        raise UserError(f'{where} is not JSON ({error}); write an object such as {{"prompt": "import"}}') from None
    fields = dict(value) if isinstance(value, dict) else {"prompt": value}
    content, own_id = fields.pop("prompt", None), fields.pop("id", None)
    if isinstance(content, list) and all(type(token) is int for token in content):
        content = tuple(content)
    if not isinstance(content, str | tuple):
        raise UserError(f"{where} has no prompt; give a text or a list of token ids")
    if content == ():
        raise UserError(f"{where}: the prompt is empty; give at least one token")
    try:
        return Prompt(content, defaults.updated(fields), where, own_id)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _refuse(mistakes: Sequence[str]) -> None:
    if mistakes:
        more = len(mistakes) - 1
        others = f" ({more} more prompt{'s are' if more > 1 else ' is'} refused too)" if more else ""
        raise UserError(mistakes[0] + others)
