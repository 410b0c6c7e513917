"""Import of Hugging Face folders: plain llama and gpt_neox models, PonderLM-2 checkpoints, and our own exports."""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from megatron_ponder.base.errors import UserError
from megatron_ponder.config import Config, read_config
from megatron_ponder.data.tokenizer import Tokenizer, load_tokenizer
from megatron_ponder.hf.pretrained_config import settings
from megatron_ponder.hf.pretrained_weights import PretrainedWeights
from megatron_ponder.hf.weight_files import read_json


def import_pretrained(model_dir: Path, overrides: Sequence[str] = ()) -> tuple[dict[str, Tensor], Config]:
    """A Hugging Face model as PonderLM's weights and configuration.

    A plain model gets embedding scale 1, so that without latent steps it computes what it computed before; a
    PonderLM-2 checkpoint the mode, K, R and scale that it was trained with. A router or pause embeddings that the
    folder lacks, or has in other sizes, are initialised as for training. Sizes are compared with the files' headers
    before anything is allocated.

    Args:
        model_dir: folder of a `LlamaForCausalLM`, a `GPTNeoXForCausalLM` or an export, with safetensors.
        overrides: `--section.key value ...` as on the command line, for instance `--ponder.mode fixed`.

    Returns:
        Whole fp32 tensors by PonderLM's parameter names, and the resolved configuration.

    Raises:
        UserError: if the folder lacks something or the model has a feature that PonderLM does not have.
    """
    config = read_config([*implied(model_dir), *overrides])
    found = PretrainedWeights(model_dir, config)
    found.require_tied()
    weights = {name: tensor.float().contiguous() for name, tensor in found.items()}
    for name, tensor in weights.items():
        found.require_finite(name, tensor)
    return weights, config


def implied(model_dir: Path) -> list[str]:
    """`--section.key value ...` that a Hugging Face folder says of its model.

    Raises:
        UserError: if it is of no kind that can be read.
    """
    return settings(read_json(model_dir / "config.json"))


def tokenizer_of(model_dir: Path, config: Config) -> Path | None:
    """The folder, if it holds a tokenizer that fits the model; None if it holds none.

    Raises:
        UserError: if it holds one that cannot be read, or has more tokens than the model.
    """
    if not _tokenizer_files(model_dir):
        return None
    tokenizer = load_tokenizer(model_dir)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise UserError(
            f"{tokenizer.path} has {tokenizer.vocab_size} tokens, but the model {config.model.vocab_size}; put the "
            "model's own tokenizer there, or move this one away to convert without"
        )
    return model_dir


def require_own_tokenizer(model_dir: Path, tokenizer: Tokenizer) -> None:
    """Refuse a tokenizer whose ids mean something else than those that a model was trained with.

    Args:
        model_dir: folder of the model; one without a tokenizer says nothing.
        tokenizer: to train with.

    Raises:
        UserError: it is another one than the folder's.
    """
    own = [load_tokenizer(path) for path in _tokenizer_files(model_dir)]
    if not own or tokenizer.fingerprint in [one.fingerprint for one in own]:
        return
    pieces = [tokenizer.piece(token) for token in range(tokenizer.vocab_size)]
    if not any(pieces == [one.piece(token) for token in range(one.vocab_size)] for one in own):
        raise UserError(
            f"{tokenizer.path} is not the tokenizer of the model in {model_dir}, to which its ids mean something else; "
            "leave tokenizer.path out to use the model's own, and make the dataset with that"
        )


def _tokenizer_files(model_dir: Path) -> list[Path]:
    return [path for ending in ("model", "json") if (path := model_dir / f"tokenizer.{ending}").is_file()]
