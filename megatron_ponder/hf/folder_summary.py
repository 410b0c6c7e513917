"""What a Hugging Face folder is: whose model, of what sizes and features, and whether it can be taken over."""

from dataclasses import dataclass, field
from pathlib import Path

from rich.filesize import decimal

from megatron_ponder.base.counts import counted
from megatron_ponder.base.errors import UserError
from megatron_ponder.config import Config, ModelConfig, read_config
from megatron_ponder.config.families import FAMILIES
from megatron_ponder.hf.pretrained import tokenizer_of
from megatron_ponder.hf.pretrained_config import settings
from megatron_ponder.hf.pretrained_weights import PretrainedWeights
from megatron_ponder.hf.weight_files import WeightFiles, read_json, weight_files


@dataclass
class FolderSummary:
    """What is known of a folder.

    Attributes:
        kind: what it is, in words.
        facts: what there is to say of it, by headings.
        obstacle: why it cannot be taken over, in one line that names the field or file; None if it can.
    """

    kind: str
    facts: dict[str, str] = field(default_factory=dict)
    obstacle: str | None = None


def summarize_folder(folder: Path) -> FolderSummary:
    """Read a folder's configuration and the headers of its weights; no weight is read.

    Args:
        folder: with a config.json.

    Raises:
        UserError: config.json is no JSON object.
    """
    theirs = read_json(folder / "config.json")
    summary = FolderSummary(_kind(theirs))
    try:
        options = settings(theirs)
        config = read_config(options)
        summary.facts |= facts_of(config)
        if "--ponder.mode" not in options:
            summary.facts["latent steps"] = "none, unless it is trained on in a ponder.mode that has some"
        summary.facts["weights"] = _weights(folder)
        PretrainedWeights(folder, config).require_tied()
        own = tokenizer_of(folder, config)
        summary.facts["tokenizer"] = "its own" if own else "none; name the model's with tokenizer.path"
    except UserError as error:
        summary.obstacle = str(error)
    return summary


def facts_of(config: Config) -> dict[str, str]:
    """Sizes and features of a model, and its latent steps, by headings.

    Args:
        config: resolved.
    """
    model, ponder = config.model, config.ponder
    layers = counted(model.num_layers, "layer")
    sizes = f"{layers} of {model.hidden_size:,}, feed-forward {model.ffn_hidden_size:,}"
    heads = f"{counted(model.num_heads, 'head')} of {model.head_size:,}, {model.num_kv_heads:,} of keys and values"
    facts = {"sizes": f"{sizes}; {heads}; vocabulary {model.vocab_size or 0:,}", "features": _features(model)}
    facts["positions"] = f"up to {model.max_position_embeddings:,}, {_rope(model)}"
    scale = f"{ponder.steps} of them, embeddings × {ponder.embedding_scale:.6g}"
    return facts | {"latent steps": f"{ponder.mode}, {scale}" if ponder.steps else "none (vanilla)"}


def _kind(theirs: dict) -> str:
    if theirs.get("model_type") == "ponderlm":
        return "a PonderLM, exported for Hugging Face"
    name = f"Hugging Face model of type {theirs.get('model_type')}"
    return f"a PonderLM-2 checkpoint, as a {name}" if theirs.get("recurrent_model") is True else f"a {name}"


def _features(model: ModelConfig) -> str:
    values = {name: getattr(model, name) for name in FAMILIES[model.family] if name != "rotary_fraction"}
    told = ", ".join(f"{name} {str(value).lower()}" for name, value in values.items())
    return f"{model.family}: {told}, {'tied' if model.tie_embeddings else 'separate'} output head"


def _rope(model: ModelConfig) -> str:
    scaling = (
        "not scaled" if model.rope_scaling == "none" else f"scaled by {model.rope_scaling} × {model.rope_factor:g}"
    )
    part = "" if model.rotary_fraction == 1 else f", {model.rotary_fraction:.0%} of a head"
    return f"rotary with base {model.rope_theta:,.6g}, {scaling}{part}"


def _weights(folder: Path) -> str:
    """Numbers, types and bytes of the weights, by their headers."""
    paths = weight_files(folder)
    files = WeightFiles(paths)
    tensors = [files.mapped(name) for name in files.described]
    types = ", ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors}))
    count, size = sum(tensor.numel() for tensor in tensors), sum(tensor.nbytes for tensor in tensors)
    return f"{count:,} in {types}, {decimal(size)} in {len(paths)} file{'s' * (len(paths) > 1)}"
