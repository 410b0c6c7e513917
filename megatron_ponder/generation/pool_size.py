"""How large the pool of keys and values is on GPUs: decided once, from what is free there."""

from dataclasses import replace

import torch
import torch.distributed as dist

from megatron_ponder.base.errors import UserError, warn
from megatron_ponder.generation.block_pool import BLOCK, blocks_of
from megatron_ponder.generation.sequences import Batching
from megatron_ponder.model.ponder import PonderLM
from megatron_ponder.parallel.mesh import Mesh

# Share of the free memory that is left to activations, logits, captured graphs and libraries.
LEFT = 0.15


def blocks_for(slots: int, rows: int) -> int:
    """Blocks in which so many slots always fit, however they are divided among rows of the cache."""
    return blocks_of(slots) + rows


def block_bytes(model: PonderLM) -> int:
    """Bytes of a block, with keys and values of this rank's layers and heads."""
    config, size = model.model_config, next(model.parameters()).element_size()
    heads = config.num_kv_heads // model.axis.size
    return BLOCK * (2 * len(model.part.layers) * heads * config.head_size * size + max(4, size))


def free_blocks(model: PonderLM, mesh: Mesh, groups: int) -> int:
    """Blocks for which there is memory on the fullest GPU of this copy of the model; on all its ranks together.

    Args:
        model: this rank's part.
        mesh: of the ranks.
        groups: of sequences, which have a pool each.
    """
    device = next(model.parameters()).device
    free = torch.cuda.mem_get_info(device)[0]
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    blocks = torch.tensor([int((1 - LEFT) * free) // groups // block_bytes(model)], device=device)
    if mesh.model.size > 1:
        dist.all_reduce(blocks, dist.ReduceOp.MIN, group=mesh.model.group)
    return int(blocks)


def fitted(model: PonderLM, batching: Batching, free: int) -> tuple[Batching, int]:
    """Limits that memory allows, and the blocks of a pool that never runs out under them; says so if they are lower.

    Args:
        model: this rank's part.
        batching: as wanted.
        free: blocks for which there is memory, those of stored prompts included.

    Raises:
        UserError: not one sequence would fit.
    """
    rows = batching.max_sequences * (model.passes.lanes + model.passes.iterated)  # with those of windows
    longest = model.passes.most_slots(model.model_config.max_position_embeddings)
    wanted = min(batching.max_slots, batching.max_sequences * longest)
    stored = min(batching.prefix_slots, wanted)
    room = (free - rows - blocks_of(stored)) * BLOCK
    if room < BLOCK:
        raise UserError(
            f"beside the model, the GPU has room for {free} blocks of {BLOCK} keys and values, too few for "
            f"{batching.max_sequences} sequences; lower max_sequences, or share the model over more GPUs with --tensor"
        )
    if room < wanted:
        warn(
            f"beside the model, the GPU has room for keys and values of {room:,} slots, fewer than max_slots "
            f"{wanted:,}; requests wait while they are full"
        )
    slots = min(wanted, room)
    return replace(batching, max_slots=slots), blocks_for(slots, rows)
