"""PonderLM's weights under the names of plain Hugging Face models, which the package only reads."""

import torch
from torch import Tensor


def to_llama(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a llama without a router, as `LlamaForCausalLM` has them."""
    names = {
        "embedding.": "model.embed_tokens.",
        "transformer.blocks.": "model.layers.",
        "transformer.norm.": "model.norm.",
        "attention_norm.": "input_layernorm.",
        "attention.": "self_attn.",
        "mlp_norm.": "post_attention_layernorm.",
        "head.": "lm_head.",
    }
    return {_replaced(name, names): tensor for name, tensor in weights.items()}


def to_gpt_neox(weights: dict[str, Tensor], num_heads: int) -> dict[str, Tensor]:
    """The weights of a gpt_neox without a router, as `GPTNeoXForCausalLM` has them, q, k and v of a head together."""
    names = {
        "embedding.": "gpt_neox.embed_in.",
        "transformer.blocks.": "gpt_neox.layers.",
        "transformer.norm.": "gpt_neox.final_layer_norm.",
        "attention_norm.": "input_layernorm.",
        "o_proj.": "dense.",
        "mlp_norm.": "post_attention_layernorm.",
        "up_proj.": "dense_h_to_4h.",
        "down_proj.": "dense_4h_to_h.",
        "head.": "embed_out.",
    }
    joined = {}
    for name, tensor in weights.items():
        if ".attention.q_proj." in name:
            parts = [weights[name.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj")]
            by_head = [part.unflatten(0, (num_heads, -1)) for part in parts]
            joined[name.replace("q_proj", "query_key_value")] = torch.stack(by_head, 1).flatten(0, 2)
        elif ".attention.k_proj." not in name and ".attention.v_proj." not in name:
            joined[name] = tensor
    return {_replaced(name, names): tensor for name, tensor in joined.items()}


def _replaced(name: str, names: dict[str, str]) -> str:
    for ours, theirs in names.items():
        name = name.replace(ours, theirs)
    return name
