"""Export to a folder that transformers loads with `trust_remote_code=True`."""

import re
import shutil
from pathlib import Path
from typing import Literal

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError
from torch import Tensor
from transformers import GenerationConfig

from megatron_ponder.base.errors import UserError
from megatron_ponder.base.files import write_atomically
from megatron_ponder.checkpoint.finite import require_finite
from megatron_ponder.checkpoint.manifest import read_manifest
from megatron_ponder.checkpoint.reader import read_config_of, read_weights, tokenizer_path
from megatron_ponder.checkpoint.writer import require_free, staged
from megatron_ponder.config import Config
from megatron_ponder.hf.configuration_ponderlm import PonderLMConfig
from megatron_ponder.hf.exported_tokenizer import ExportedTokenizer, export_tokenizer
from megatron_ponder.hf.model_card import model_card
from megatron_ponder.hf.modeling_ponderlm import PonderLMForCausalLM
from megatron_ponder.hf.pretrained_config import AUTO_MAP
from megatron_ponder.hf.weights import to_export

# The files that define the model for transformers; they import each other and nothing else of ours.
MODEL_FILES = tuple(
    f"{part}_ponderlm.py" for part in ("configuration", "cache", "exits", "layers", "methods", "modeling")
)
DataType = Literal["float32", "bfloat16"]


def export_checkpoint(
    folder: Path,
    output: Path,
    dtype: DataType = "float32",
    measured: str | None = None,
    max_shard_size: str = "5GB",
) -> None:
    """Write the model of a checkpoint as a Hugging Face folder.

    Its weights are in memory in fp32, and in `dtype` if that is another.

    Args:
        folder: of the checkpoint.
        output, dtype, measured, max_shard_size: as `export` takes them.

    Raises:
        UserError: as `export` does, or if a file of the checkpoint is missing or damaged.
    """
    weights, config, averaged = read_weights(folder), read_config_of(folder), len(read_manifest(folder).averaged)
    export(weights, config, tokenizer_path(folder), output, dtype, measured, max_shard_size, averaged)


def export(
    weights: dict[str, Tensor],
    config: Config,
    tokenizer: Path | None,
    output: Path,
    dtype: DataType = "float32",
    measured: str | None = None,
    max_shard_size: str = "5GB",
    averaged: int = 0,
) -> None:
    """Write a model as a Hugging Face folder, which appears whole or not at all.

    Args:
        weights: whole tensors by PonderLM's parameter names.
        config: what it was trained with, resolved.
        tokenizer: file or folder; None for none.
        output: folder that does not exist or is empty.
        dtype: of the exported weights.
        measured: what was measured, as Markdown, for the model card; None for nothing.
        max_shard_size: of one file of weights, such as "5GB" or "200KB".
        averaged: checkpoints whose average the weights are; 0 for none.

    Raises:
        UserError: if the folder is taken, the tokenizer cannot be converted, weights and configuration differ, or a
            weight is not finite.
    """
    require_free(output)
    if config.data.reset_at_eod and tokenizer is None:
        raise UserError(
            "the model was trained with data.reset_at_eod, but the checkpoint has no tokenizer to say which token ends "
            "a document; put tokenizer.model or tokenizer.json into its folder tokenizer/"
        )
    if config.ponder.routes_by_token:
        raise UserError("the model was trained with ponder.router_input token, a control that cannot be exported")
    if not re.fullmatch(r"\d+(\.\d+)? *[KMGT]B", max_shard_size, re.IGNORECASE):
        raise UserError(f'the largest file is given as "{max_shard_size}"; write a number with KB, MB, GB or TB: 5GB')
    with staged(output.absolute()) as folder:
        loaded = None
        if tokenizer is not None:
            loaded = export_tokenizer(tokenizer, folder, config.model.max_position_embeddings)
        exported = export_config(config, loaded)
        exported.dtype = getattr(torch, dtype)
        renamed = {name: tensor.to(exported.dtype) for name, tensor in to_export(weights).items()}
        _check(renamed, exported)
        for name, tensor in renamed.items():
            require_finite(tensor, f"as {dtype}, {name}", "export an older checkpoint, or as float32")
        exported.architectures, exported.auto_map = [PonderLMForCausalLM.__name__], AUTO_MAP
        exported.save_pretrained(folder)
        GenerationConfig(
            bos_token_id=exported.bos_token_id,
            eos_token_id=exported.eos_token_id,
            pad_token_id=exported.eos_token_id if exported.pad_token_id is None else exported.pad_token_id,
        ).save_pretrained(folder)
        for name in MODEL_FILES:
            shutil.copyfile(Path(__file__).with_name(name), folder / name)
        try:
            save_torch_state_dict(renamed, folder, max_shard_size=max_shard_size, metadata={"format": "pt"})
        except SafetensorError as error:  # as which the library tells of the disk, too
            raise UserError(
                f"could not write the weights to {output} ({error}); free some space or choose another folder"
            ) from error
        for path in folder.glob("*.safetensors"):  # which nobody but the owner could read
            shutil.copymode(folder / "config.json", path)
        card = model_card(config, dtype, sum(tensor.numel() for tensor in renamed.values()), measured, averaged)
        write_atomically(folder / "README.md", card)


def export_config(config: Config, tokenizer: ExportedTokenizer | None) -> PonderLMConfig:
    """The Hugging Face configuration of a model.

    Without a prompt `generate` begins with `bos_token_id`: as training does, with the token that ends documents.

    Args:
        config: what it was trained with, resolved.
        tokenizer: for the ids of special tokens; None for none.
    """
    model, ponder, inference = config.model, config.ponder, config.inference
    eod_id = None if tokenizer is None else tokenizer.eod_id
    return PonderLMConfig(
        base_family=model.family,
        norm=model.norm,
        rms_norm_eps=model.norm_epsilon,
        layer_norm_eps=model.norm_epsilon,
        gated_ffn=model.gated_ffn,
        hidden_act={"gelu_tanh": "gelu_pytorch_tanh"}.get(model.activation, model.activation),
        biases=model.biases,
        qk_norm=model.qk_norm,
        head_dim=model.head_size,
        num_key_value_heads=model.num_kv_heads,
        rotary_pct=model.rotary_fraction,
        rope_theta=model.rope_theta,
        rope_scaling_type=model.rope_scaling,
        rope_factor=model.rope_factor,
        rope_original_length=model.rope_original_length,
        rope_low_turns=model.rope_low_turns,
        rope_high_turns=model.rope_high_turns,
        rope_attention_factor=model.rope_attention_factor,
        use_parallel_residual=model.residual == "parallel",
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=model.ffn_hidden_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_heads,
        max_position_embeddings=model.max_position_embeddings,
        initializer_range=model.init_std,
        tie_word_embeddings=model.tie_embeddings,
        bos_token_id=eod_id,
        eos_token_id=eod_id,
        pad_token_id=None if tokenizer is None else tokenizer.pad_id,
        ponder_mode=ponder.mode,
        ponder_latent_visibility=ponder.latent_visibility,
        ponder_max_steps=ponder.latent_steps,
        ponder_jacobi_iterations=config.ponder_training.evaluation_refinements,
        ponder_threshold=inference.threshold,
        ponder_router_bias=inference.router_bias,
        ponder_router_hidden_size=ponder.router_hidden_size,
        ponder_eod_id=eod_id if config.data.reset_at_eod else None,
        ponder_pieces=None if tokenizer is None else tokenizer.pieces,
        embedding_scale=ponder.embedding_scale,
        latent_scale=ponder.latent_scale,
    )


def _check(weights: dict[str, Tensor], config: PonderLMConfig) -> None:
    """Refuse weights that would not load into the model that the configuration describes."""
    with torch.device("meta"):
        expected = PonderLMForCausalLM(config).state_dict()
    if config.tie_word_embeddings:
        del expected["lm_head.weight"]
    different = sorted(expected.keys() ^ weights.keys())
    if different:
        raise UserError(f"weights and configuration differ in {different[0]}; export an unmodified checkpoint")
    for name, tensor in weights.items():
        if tensor.shape != expected[name].shape:
            raise UserError(
                f"{name} has shape {tuple(tensor.shape)}, but the configuration says {tuple(expected[name].shape)}; "
                "export an unmodified checkpoint"
            )
