"""The README.md of an export."""

from megatron_ponder.base.counts import counted
from megatron_ponder.config import Config
from megatron_ponder.hf.measured import table
from megatron_ponder.model.modes import passes_of

_STEPS = {
    "vanilla": "It takes no latent steps: it is a plain transformer.",
    "fixed": "Every token takes {steps} additional latent steps before the next one is predicted.",
    "adaptive": (
        "A router decides for each token how many additional latent steps, from 0 to {steps}, it takes before the next "
        "one is predicted."
    ),
    "pause": "Every token is followed by {steps} learned pause embeddings before the next one is predicted.",
    "sps": (
        "Every token is followed by {steps} learned pause embeddings before the next one is predicted, which no other "
        "token sees, and which the key-value cache keeps no longer."
    ),
    "loop": "Every token runs through all layers {steps} more times before the next one is predicted.",
    "ponderlm": (
        "Every token runs through all layers {steps} more times, each time with the mean embedding of the prediction "
        "before (arXiv 2505.20674), before the next one is predicted."
    ),
}
_ITERATED = """\
`model(input_ids)` without a cache evaluates all tokens in parallel with
`config.ponder_jacobi_iterations` refinements, which approximates it: more refinements come closer."""
_PARALLEL = "`model(input_ids)` without a cache evaluates all tokens in parallel, which gives the same."
_ADJUSTED = "Raise\n`config.ponder_threshold` or lower `config.ponder_router_bias` for fewer steps."
_TEMPLATE = """\
---
library_name: transformers
pipeline_tag: text-generation
tags:
- ponderlm
---

# PonderLM

A causal language model, trained with megatron_ponder. {pondering}

{table}

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder", trust_remote_code=True)
inputs = tokenizer("Once upon a time", return_tensors="pt")
output = model.generate(**inputs, max_new_tokens=50, return_dict_in_generate=True)
print(tokenizer.decode(output.sequences[0]))
print(output.past_key_values.executed_steps)  # latent steps of each token
```

`generate` runs the model token by token with a cache, which is its definition; steps that are not executed are not
computed and not cached. {parallel}

## Evaluation

{evaluation}
"""


def model_card(config: Config, dtype: str, parameters: int, measured: str | None, averaged: int = 0) -> str:
    """What the model is, how to use it and how it was evaluated, as Markdown.

    Args:
        config: what it was trained with, resolved.
        dtype: of the exported weights.
        parameters: number of weights.
        measured: what was measured, as Markdown; None if nothing was.
        averaged: checkpoints whose average the weights are; 0 for none.
    """
    model, ponder, inference = config.model, config.ponder, config.inference
    rows = {
        "Parameters": f"{parameters:,}",
        "Weights": dtype,
        "Layers × hidden size": f"{model.num_layers} × {model.hidden_size}",
        "Transformer": model.description,
        "Heads (key-value heads)": f"{model.num_heads} ({model.num_kv_heads})",
        "Vocabulary": f"{model.vocab_size:,}",
        "Longest sequence": f"{model.max_position_embeddings:,} tokens",
        "Mode": ponder.mode,
    }
    if averaged:
        rows["Weights averaged over"] = counted(averaged, "checkpoint")
    passes = passes_of(ponder)
    if ponder.steps:
        rows["Most latent steps K"] = ponder.latent_steps
    if ponder.latent_visibility != "all":
        rows["Latent slots are seen by"] = "their own token alone"
    if ponder.latent_scale != 1:
        rows["Factor on latents"] = ponder.latent_scale
    if passes.iterated:
        rows["Refinements R of `forward`"] = config.ponder_training.evaluation_refinements
    if passes.routed:
        rows["Threshold τ"] = inference.threshold
        rows["Router bias α"] = inference.router_bias
    return _TEMPLATE.format(
        pondering=_STEPS[ponder.mode].format(steps=ponder.latent_steps),
        parallel=" ".join([_ITERATED if passes.iterated else _PARALLEL, *[_ADJUSTED] * passes.routed]),
        table=table(["", ""], [[name, str(value)] for name, value in rows.items()]),
        evaluation="No results were given when this folder was written." if measured is None else measured,
    )
