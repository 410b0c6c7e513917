"""Turn a Hugging Face model into a checkpoint: plain, a PonderLM-2, or an export of this package.

Any configuration key may follow as --section.key value; --ponder.embedding_scale is 1 for a plain model unless given,
so that without latent steps it computes what it computed before. --ponder.latent_scale auto gives latents the size of
its embeddings.

Example:
    ponder import-hf --model downloaded/pythia-70m --output start --ponder.mode adaptive
"""

from collections.abc import Sequence
from pathlib import Path

from megatron_ponder.base.command_line import Parser
from megatron_ponder.base.errors import command
from megatron_ponder.base.launch import one_process
from megatron_ponder.checkpoint.writer import write_weights_checkpoint
from megatron_ponder.config import PonderConfig
from megatron_ponder.hf.pretrained import import_pretrained, tokenizer_of


@command
@one_process
def main(argv: Sequence[str]) -> None:
    """Parse the command line, do it, print what came of it."""
    parser = Parser("import-hf", __doc__)
    parser.add_argument("--model", type=Path, required=True, help="folder with config.json and safetensors")
    parser.add_argument("--output", type=Path, required=True, help="checkpoint folder; must not exist or be empty")
    parser.add_argument("--text", type=Path, help="measure --ponder.latent_scale auto on this text")
    arguments, overrides = parser.parse_with_overrides(argv)
    weights, config = import_pretrained(arguments.model, overrides, arguments.text)
    tokenizer = tokenizer_of(arguments.model, config)
    write_weights_checkpoint(arguments.output, weights, config, tokenizer)
    count = sum(tensor.numel() for tensor in weights.values())
    without = "" if tokenizer else ", without a tokenizer, because the folder has no tokenizer.model or tokenizer.json"
    print(f"{arguments.output}: {count:,} weights, {config.ponder.mode}{_latents(config.ponder)}{without}")


def _latents(ponder: PonderConfig) -> str:
    """What latents are multiplied by, in words; nothing where that is 1."""
    if ponder.latent_scale == "learned":
        return f", latents times a learned factor from {ponder.initial_latent_scale:g}"
    return "" if ponder.latent_scale == 1 else f", latents times {ponder.latent_scale:g}"
