"""Text to token ids and back, through SentencePiece or Hugging Face `tokenizers`."""

import hashlib
import json
import re
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Protocol

import sentencepiece
import tokenizers

from megatron_ponder.base.errors import UserError
from megatron_ponder.base.texts import require_file
from megatron_ponder.data.separable_parts import separable_parts

# SentencePiece writes a space as this character, and so cannot tell the two apart in text.
SPACE_SYMBOL = "\u2581"


class Tokenizer(Protocol):
    """What the rest of the package asks of a tokenizer.

    Attributes:
        path: the file it was loaded from.
        fingerprint: SHA-256 of that file, in hex.
        vocab_size: one more than the largest id.
        eod_id: the token that ends a document.
        bos_id: the token that begins one, where the tokenizer has such a token.
        separable: its matches, one after another, make up any text, and encoded by themselves give the ids of the
            whole; None if no such pattern is known.
    """

    path: Path
    fingerprint: str
    vocab_size: int
    eod_id: int
    bos_id: int | None

    @property
    def separable(self) -> re.Pattern[str] | None: ...

    def encode(self, text: str) -> list[int]:
        """Token ids of the text alone: none are added, and text that looks like a special token stays text."""

    def decode(self, ids: list[int]) -> str:
        """The text of the ids; bytes that are not UTF-8 become U+FFFD, and ids without a piece "<id 50300>"."""

    def piece(self, token: int) -> str:
        """One token in printable form: spaces as "▁", line ends, backslashes and the like as escapes such as "\\n"."""


class SentencePieceTokenizer:
    """A SentencePiece `.model` file. `decode(encode(text)) == text` for those that `train_tokenizer` makes."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        model = self.path.read_bytes()
        try:
            self._processor = sentencepiece.SentencePieceProcessor()
            self._processor.LoadFromSerializedProto(model)
        except RuntimeError:
            raise UserError(f"{path} is not a SentencePiece model; check the path of the tokenizer") from None
        self.fingerprint = hashlib.sha256(model).hexdigest()
        self.vocab_size = self._processor.get_piece_size()
        self.eod_id = self._processor.eos_id()
        if self.eod_id < 0:
            raise UserError(f"{path} has no </s> token to end documents with; use another tokenizer")
        self.bos_id = self._processor.bos_id() if self._processor.bos_id() >= 0 else None
        self._space_symbol_ids = [
            self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_SYMBOL.encode("utf-8")
        ]

    def encode(self, text: str) -> list[int]:
        first, *others = text.split(SPACE_SYMBOL)
        ids = self._processor.encode(first)
        for part in others:
            ids += self._space_symbol_ids
            ids += self._processor.encode(part)
        return ids

    @cached_property
    def separable(self) -> re.Pattern[str] | None:
        return separable_parts(self._processor.serialized_model_proto())

    def decode(self, ids: list[int]) -> str:
        if all(0 <= token < self.vocab_size for token in ids):
            return self._processor.decode(ids)
        return self._processor.decode_pieces([self._name(token) for token in ids])

    def piece(self, token: int) -> str:
        if not 0 <= token < self.vocab_size:
            return nameless(token)
        if self._processor.is_byte(token):
            return _printable_byte(int(self._processor.id_to_piece(token)[3:5], 16))
        return _printable(self._processor.id_to_piece(token))

    def _name(self, token: int) -> str:
        return self._processor.id_to_piece(token) if 0 <= token < self.vocab_size else nameless(token)


class HuggingFaceTokenizer:
    """A `tokenizer.json` file, with the names of its special tokens in `tokenizer_config.json` beside it."""

    separable = None

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        content = self.path.read_bytes()
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(content.decode("utf-8"))
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"{path} is not a Hugging Face tokenizer.json ({error}); check the path") from None
        # Otherwise "</s>" in a web page would end the document.
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.fingerprint = hashlib.sha256(content).hexdigest()
        self.vocab_size = max(self._tokenizer.get_vocab().values()) + 1
        eod_id = self._special_id("eos_token", ("</s>", "<|endoftext|>"))
        if eod_id is None:
            raise UserError(f"{path} has no end token: name it as eos_token in tokenizer_config.json")
        self.eod_id = eod_id
        self.bos_id = self._special_id("bos_token", ("<s>",))

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        parts = []
        for known, run in groupby(ids, self._has_piece):
            run = list(run)
            parts += [self._tokenizer.decode(run, skip_special_tokens=False)] if known else map(nameless, run)
        return "".join(parts)

    def piece(self, token: int) -> str:
        if not self._has_piece(token):
            return nameless(token)
        text = self.decode([token])
        # Part of a character has no text of its own; the vocabulary's name for it at least tells tokens apart.
        return _printable(self._tokenizer.id_to_token(token) if "\ufffd" in text or not text else text)

    def _has_piece(self, token: int) -> bool:
        """A vocabulary may have gaps too."""
        return 0 <= token < self.vocab_size and self._tokenizer.id_to_token(token) is not None

    def _special_id(self, role: str, usual: tuple[str, ...]) -> int | None:
        config_path = self.path.with_name("tokenizer_config.json")
        try:
            named = (json.loads(config_path.read_bytes()).get(role) or None) if config_path.is_file() else None
        except (ValueError, AttributeError, RecursionError):
            raise UserError(f"{config_path} is not a JSON object: restore or remove it") from None
        names = usual if named is None else _token_names(named, role, config_path)
        found = next((token for name in names if (token := self._tokenizer.token_to_id(name)) is not None), None)
        if found is None and named is not None and role == "eos_token":
            raise UserError(
                f"{config_path} names {', '.join(names)} as {role}, which {self.path.name} does not have; "
                "name a token that it has"
            )
        return found


def _token_names(named: object, role: str, path: Path) -> list[str]:
    """The tokens that a tokenizer_config.json names for a role: a text, a mapping with its content, or a list of them.

    Raises:
        UserError: it is none of these.
    """
    several = named if isinstance(named, list) else [named]
    given = [one.get("content") if isinstance(one, dict) else one for one in several]
    if not given or not all(isinstance(name, str) and name for name in given):
        raise UserError(f'{path} has {json.dumps(named)[:80]} as {role}; name a token there, such as "</s>"')
    return given


def nameless(token: int) -> str:
    """What stands for an id that the tokenizer has no piece for, as vocabularies of models may be larger."""
    return f"<id {token}>"


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load a `.model` or `.json` file, or a folder that holds `tokenizer.model` or `tokenizer.json`.

    Raises:
        UserError: there is no such file, or it is not a tokenizer.
    """
    path = Path(path)
    candidates = [path / "tokenizer.model", path / "tokenizer.json"] if path.is_dir() else [path]
    for candidate in candidates:
        if candidate.is_file():
            return HuggingFaceTokenizer(candidate) if candidate.suffix == ".json" else SentencePieceTokenizer(candidate)
    if path.is_dir():
        raise UserError(f"{path} holds neither tokenizer.model nor tokenizer.json; give another folder or a file")
    if path.exists():
        require_file(path)
    raise UserError(f"{path} does not exist; give a tokenizer, or make one with ponder train-tokenizer")


def _printable(text: str) -> str:
    text = text.replace(" ", SPACE_SYMBOL)
    # A backslash of the text is escaped as well, so that it looks like the beginning of nothing else.
    shown = (char if char.isprintable() and char != "\\" else char.encode("unicode_escape").decode() for char in text)
    return "".join(shown)


def _printable_byte(byte: int) -> str:
    return _printable(chr(byte)) if byte < 0x80 else f"<0x{byte:02X}>"
