"""Tokenizers as Hugging Face loads them: a `tokenizer.json` that needs no SentencePiece."""

import json
from dataclasses import dataclass
from pathlib import Path

import tokenizers
from sentencepiece.sentencepiece_model_pb2 import ModelProto, TrainerSpec
from tokenizers import decoders, normalizers

from megatron_ponder.base.errors import UserError
from megatron_ponder.base.files import write_atomically
from megatron_ponder.checkpoint.writer import copy_tokenizer
from megatron_ponder.data.tokenizer import SPACE_SYMBOL, Tokenizer, load_tokenizer

Piece = ModelProto.SentencePiece
_KNOWN_TYPES = (Piece.NORMAL, Piece.UNKNOWN, Piece.CONTROL, Piece.BYTE)
# Names that padding has in tokenizers with a piece for it.
_PADDING = ("<pad>", "[PAD]", "<PAD>", "<|pad|>", "<|padding|>", "<|finetune_right_pad_id|>")


@dataclass(frozen=True)
class ExportedTokenizer:
    """What the model's own configuration has to know of an exported tokenizer.

    Attributes:
        pieces: one more than the largest id.
        eod_id: the token that ends a document, after which training begins the next.
        pad_id: padding, a token that no text of the training has; None if every piece is in use.
    """

    pieces: int
    eod_id: int
    pad_id: int | None


def export_tokenizer(source: Path, folder: Path, max_length: int) -> ExportedTokenizer:
    """Write what `AutoTokenizer.from_pretrained` needs, and the original.

    A `tokenizer_config.json` beside a `tokenizer.json` is kept, but for a padding token that is the end of documents:
    collators leave padding out of the loss, so that the model would not learn to end.

    Args:
        source: `tokenizer.json`, a SentencePiece `.model`, or a folder that holds one of them.
        folder: an existing folder.
        max_length: tokens of the longest text that the model is meant for.

    Raises:
        UserError: if there is no tokenizer, or a SentencePiece model that cannot be converted exactly.
    """
    tokenizer = load_tokenizer(source)
    copy_tokenizer(source, folder)
    target, config = folder / "tokenizer.json", folder / "tokenizer_config.json"
    copied = target.is_file() and config.is_file()
    if not target.is_file():
        convert_sentencepiece(folder / "tokenizer.model").save(str(target))
    converted = tokenizers.Tokenizer.from_file(str(target))
    written = json.loads(config.read_bytes()) if copied else _config(converted, tokenizer, max_length)
    pad = _padding(converted, tokenizer, written)
    _write(config, written, pad)
    if (folder / "special_tokens_map.json").is_file():
        _write(folder / "special_tokens_map.json", json.loads((folder / "special_tokens_map.json").read_bytes()), pad)
    pad_id = None if pad is None else converted.token_to_id(pad)
    return ExportedTokenizer(tokenizer.vocab_size, tokenizer.eod_id, pad_id)


def convert_sentencepiece(path: Path) -> tokenizers.Tokenizer:
    """A SentencePiece byte-pair model as a tokenizer that gives the same ids.

    SentencePiece always joins the neighbours whose union has the highest score; so every way to split a piece in two is
    a merge, in the order of scores.

    Raises:
        UserError: for a unigram model, or one that changes the text before it encodes it.
    """
    model = ModelProto.FromString(path.read_bytes())
    training, normalizer = model.trainer_spec, model.normalizer_spec
    # Pieces with the space itself, so that it and the symbol differ in text, as in our own use of SentencePiece.
    pieces = {
        piece.piece.replace(SPACE_SYMBOL, " ") if piece.type == Piece.NORMAL else piece.piece: piece
        for piece in model.pieces
    }
    if (
        training.model_type != TrainerSpec.BPE
        or normalizer.precompiled_charsmap
        or normalizer.remove_extra_whitespaces
        or any(piece.type not in _KNOWN_TYPES for piece in model.pieces)
    ):
        raise UserError(
            f"{path} is no plain byte-pair model that leaves the text as it is, which alone can be converted exactly; "
            "put its tokenizer.json beside it"
        )
    normal = {name: piece.score for name, piece in pieces.items() if piece.type == Piece.NORMAL}
    merges = [
        (name[:cut], name[cut:])
        for name in sorted(normal, key=normal.__getitem__, reverse=True)
        for cut in range(1, len(name))
        if name[:cut] in normal and name[cut:] in normal
    ]
    special = [name for name, piece in pieces.items() if piece.type in (Piece.UNKNOWN, Piece.CONTROL)]
    bpe = tokenizers.models.BPE(
        {name: index for index, name in enumerate(pieces)},
        merges,
        unk_token=model.pieces[training.unk_id].piece,
        fuse_unk=True,
        byte_fallback=training.byte_fallback,
    )
    tokenizer = tokenizers.Tokenizer(bpe)
    decoding = [decoders.ByteFallback(), decoders.Fuse()]
    if normalizer.add_dummy_prefix:
        tokenizer.normalizer = normalizers.Prepend(" ")
        decoding.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(decoding)
    tokenizer.add_special_tokens([tokenizers.AddedToken(name, normalized=False, special=True) for name in special])
    return tokenizer


def _config(converted: tokenizers.Tokenizer, tokenizer: Tokenizer, max_length: int) -> dict:
    end = converted.id_to_token(tokenizer.eod_id)
    special = {
        "unk_token": getattr(converted.model, "unk_token", None),
        # Documents of the training begin after the end of the one before, and with nothing else.
        "bos_token": end,
        "eos_token": end,
    }
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{role: name for role, name in special.items() if name is not None},
        "model_max_length": max_length,
        "padding_side": "left",
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
    }


def _padding(converted: tokenizers.Tokenizer, tokenizer: Tokenizer, config: dict) -> str | None:
    """The token to pad with: the one that is named, else one that no text is encoded to; None if there is none."""
    end, model = converted.id_to_token(tokenizer.eod_id), converted.model
    begin = None if tokenizer.bos_id is None else converted.id_to_token(tokenizer.bos_id)
    candidates = [_named(config, "pad_token"), *_PADDING]
    candidates += [model.unk_token] if getattr(model, "byte_fallback", False) else []
    candidates += [begin] if begin != _named(config, "bos_token") else []  # unless prompts begin with it
    fitting = (name for name in candidates if name not in (None, end) and converted.token_to_id(name) is not None)
    return next(fitting, None)


def _named(config: dict, role: str) -> str | None:
    token = config.get(role)
    return token.get("content") if isinstance(token, dict) else token


def _write(path: Path, content: dict, pad: str | None) -> None:
    """Write a file of special tokens with this padding token; one that holds it already is left as it is."""
    if path.is_file() and _named(content, "pad_token") == pad:
        return
    others = {role: name for role, name in content.items() if role != "pad_token"}
    whole = others | ({} if pad is None else {"pad_token": pad})
    write_atomically(path, json.dumps(whole, indent=2, ensure_ascii=False) + "\n")
