"""Tokenizers as Hugging Face loads them: a `tokenizer.json` that needs no SentencePiece."""

import json
from pathlib import Path

import tokenizers
from sentencepiece import sentencepiece_model_pb2
from tokenizers import decoders, normalizers

from megatron_ponder.checkpoint.store import copy_tokenizer
from megatron_ponder.data.tokenizer import SPACE_SYMBOL, Tokenizer, load_tokenizer
from megatron_ponder.errors import UserError

# Types of pieces, and of the model, in SentencePiece's own numbering.
_NORMAL, _UNKNOWN, _CONTROL, _BYTE = 1, 2, 3, 6
_KNOWN_TYPES = (_NORMAL, _UNKNOWN, _CONTROL, _BYTE)
_BPE = 2


def export_tokenizer(source: Path, folder: Path, max_length: int) -> Tokenizer:
    """Write what `AutoTokenizer.from_pretrained` needs, and the original.

    Args:
        source: `tokenizer.json`, a SentencePiece `.model`, or a folder that holds one of them.
        folder: an existing folder.
        max_length: tokens of the longest text that the model is meant for.

    Returns:
        The tokenizer.

    Raises:
        UserError: if there is no tokenizer, or a SentencePiece model that cannot be converted exactly.
    """
    tokenizer = load_tokenizer(source)
    copy_tokenizer(source, folder)
    target, config = folder / "tokenizer.json", folder / "tokenizer_config.json"
    if not target.is_file():
        convert_sentencepiece(folder / "tokenizer.model").save(str(target))
    elif config.is_file():
        return tokenizer
    config.write_text(json.dumps(_config(target, tokenizer, max_length), indent=2) + "\n", encoding="utf-8")
    return tokenizer


def convert_sentencepiece(path: Path) -> tokenizers.Tokenizer:
    """A SentencePiece byte-pair model as a tokenizer that gives the same ids.

    SentencePiece always joins the neighbours whose union has the highest score; so every way to split a piece in two is
    a merge, in the order of scores.

    Raises:
        UserError: for a unigram model, or one that changes the text before it encodes it.
    """
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(path.read_bytes())
    training, normalizer = model.trainer_spec, model.normalizer_spec
    # Pieces with the space itself, so that it and the symbol differ in text, as in our own use of SentencePiece.
    pieces = {
        piece.piece.replace(SPACE_SYMBOL, " ") if piece.type == _NORMAL else piece.piece: piece
        for piece in model.pieces
    }
    if (
        training.model_type != _BPE
        or normalizer.precompiled_charsmap
        or normalizer.remove_extra_whitespaces
        or any(piece.type not in _KNOWN_TYPES for piece in model.pieces)
    ):
        raise UserError(
            f"{path} is no plain byte-pair model that leaves the text as it is, which alone can be converted exactly; "
            "put its tokenizer.json beside it"
        )
    normal = {name: piece.score for name, piece in pieces.items() if piece.type == _NORMAL}
    merges = [
        (name[:cut], name[cut:])
        for name in sorted(normal, key=normal.__getitem__, reverse=True)
        for cut in range(1, len(name))
        if name[:cut] in normal and name[cut:] in normal
    ]
    special = [name for name, piece in pieces.items() if piece.type in (_UNKNOWN, _CONTROL)]
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


def _config(path: Path, tokenizer: Tokenizer, max_length: int) -> dict:
    converted = tokenizers.Tokenizer.from_file(str(path))
    special = {
        "unk_token": getattr(converted.model, "unk_token", None),
        "bos_token": None if tokenizer.bos_id is None else converted.id_to_token(tokenizer.bos_id),
        "eos_token": converted.id_to_token(tokenizer.eod_id),
        "pad_token": converted.id_to_token(tokenizer.eod_id),
    }
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{role: name for role, name in special.items() if name is not None},
        "model_max_length": max_length,
        "padding_side": "left",
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
        # As in training: "</s>" in a text is text, not the end of a document.
        "split_special_tokens": True,
    }
