"""The model that a configuration means, on one rank."""

from megatron_ponder.config import Config, stage_layers
from megatron_ponder.model.ponder import PonderLM
from megatron_ponder.model.transformer import ModelPart, Recompute
from megatron_ponder.parallel.mesh import Mesh


def model_part(config: Config, place: int) -> ModelPart:
    """The part that the ranks of one place in the pipeline hold."""
    layers = stage_layers(config)
    return ModelPart(layers[place], first=place == 0, last=place == len(layers) - 1)


def build_part(config: Config, mesh: Mesh, eod_id: int | None = None) -> PonderLM:
    """This rank's part of a model, whose parameters nobody has filled.

    Args:
        config: resolved, with a vocabulary size.
        mesh: the ranks.
        eod_id: end-of-document token, which counts with `data.reset_at_eod` alone.
    """
    return PonderLM(
        config.model,
        config.ponder,
        mesh,
        eod_id if config.data.reset_at_eod else None,
        model_part(config, mesh.pipeline.rank),
        config.parallel.vocab_multiple,
        config.inference,
        Recompute(config.training.recompute, config.training.recompute_passes),
        config.training.attention_kernel,
    )
