"""Names of weights, both ways: PonderLM's own, those of an export, and those of plain Hugging Face models.

Every function takes and returns a dict of whole tensors and copies none that it need not. None of them knows of the
embedding's scale: a plain model has none, so one that is to compute the same must have scale 1.
"""

import re
from collections.abc import Mapping

from torch import Tensor

from megatron_ponder.base.errors import UserError

Weights = dict[str, Tensor]

# Modules of PonderLM and what they are called elsewhere; # stands for the number of the block.
_EXPORT = {
    "embedding": "model.embed_tokens",
    "transformer.blocks.#.attention_norm": "model.layers.#.input_layernorm",
    "transformer.blocks.#.attention.q_proj": "model.layers.#.self_attn.q_proj",
    "transformer.blocks.#.attention.k_proj": "model.layers.#.self_attn.k_proj",
    "transformer.blocks.#.attention.v_proj": "model.layers.#.self_attn.v_proj",
    "transformer.blocks.#.attention.o_proj": "model.layers.#.self_attn.o_proj",
    "transformer.blocks.#.attention.q_norm": "model.layers.#.self_attn.q_norm",
    "transformer.blocks.#.attention.k_norm": "model.layers.#.self_attn.k_norm",
    "transformer.blocks.#.mlp_norm": "model.layers.#.post_attention_layernorm",
    "transformer.blocks.#.mlp.gate_proj": "model.layers.#.mlp.gate_proj",
    "transformer.blocks.#.mlp.up_proj": "model.layers.#.mlp.up_proj",
    "transformer.blocks.#.mlp.down_proj": "model.layers.#.mlp.down_proj",
    "transformer.norm": "model.norm",
    "latent_scale": "latent_scale",
    "pauses": "pauses",
    "router.hidden": "router.hidden",
    "router.output": "router.output",
    "head": "lm_head",
}
_LLAMA = {ours: theirs for ours, theirs in _EXPORT.items() if not ours.startswith(("latent_scale", "pauses", "router"))}
_GPT_NEOX = {
    "embedding": "gpt_neox.embed_in",
    "transformer.blocks.#.attention_norm": "gpt_neox.layers.#.input_layernorm",
    "transformer.blocks.#.attention.qkv_proj": "gpt_neox.layers.#.attention.query_key_value",
    "transformer.blocks.#.attention.o_proj": "gpt_neox.layers.#.attention.dense",
    "transformer.blocks.#.mlp_norm": "gpt_neox.layers.#.post_attention_layernorm",
    "transformer.blocks.#.mlp.up_proj": "gpt_neox.layers.#.mlp.dense_h_to_4h",
    "transformer.blocks.#.mlp.down_proj": "gpt_neox.layers.#.mlp.dense_4h_to_h",
    "transformer.norm": "gpt_neox.final_layer_norm",
    "head": "embed_out",
}
# Tables that older versions of transformers wrote beside the weights; they can be computed.
_BUFFERS = re.compile(r"\.(rotary_emb\.inv_freq|attention\.(bias|masked_bias))$")


def to_export(weights: Weights) -> Weights:
    """PonderLM's weights under the names of an export, which are those of `LlamaForCausalLM` and `router.*`."""
    return _rename(weights, _EXPORT)


def from_export(weights: Weights) -> Weights:
    """The inverse of `to_export`."""
    return _rename(weights, _inverse(_EXPORT))


def from_llama(weights: Weights) -> Weights:
    """Weights of `LlamaForCausalLM`, and of models with its names, under PonderLM's names."""
    return _rename(weights, _inverse(_LLAMA))


def from_gpt_neox(weights: Weights, num_heads: int) -> Weights:
    """Weights of `GPTNeoXForCausalLM` under PonderLM's names.

    Args:
        weights: of which q, k and v of each head are together: (heads · 3 · head size, H).
        num_heads: query heads.

    Raises:
        UserError: they are not.
    """
    split = {}
    for name, tensor in _rename(
        weights, _inverse(_GPT_NEOX) | {"lm_head": "head"}
    ).items():  # some versions say lm_head
        if ".attention.qkv_proj." in name:
            if tensor.dim() == 0 or tensor.shape[0] % (3 * num_heads):
                raise UserError(
                    f"{name} has shape {tuple(tensor.shape)}, which is not 3 parts of {num_heads} heads; convert a "
                    "plain, unmodified model"
                )
            by_head = tensor.unflatten(0, (num_heads, 3, -1))
            for index, part in enumerate(("q_proj", "k_proj", "v_proj")):
                split[name.replace("qkv_proj", part)] = by_head[:, index].flatten(0, 1)
        else:
            split[name] = tensor
    return split


def _inverse(names: Mapping[str, str]) -> dict[str, str]:
    return {theirs: ours for ours, theirs in names.items()}


def _rename(weights: Weights, names: Mapping[str, str]) -> Weights:
    renamed = {}
    for name, tensor in weights.items():
        if _BUFFERS.search(name):
            continue
        module, _, parameter = name.rpartition(".")
        block = re.search(r"\.(\d+)\.", module)
        pattern = module if block is None else module.replace(block[0], ".#.", 1)
        if pattern not in names:
            raise UserError(f"the weight {name} has no place in this kind of model; convert a plain, unmodified one")
        target = names[pattern] if block is None else names[pattern].replace("#", block[1])
        renamed[f"{target}.{parameter}"] = tensor
    return renamed
