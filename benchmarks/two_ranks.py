"""Optimiser steps of any layout of two ranks, or of one of them alone while the other sleeps, timed."""

import time

import torch
import torch.distributed as dist

from megatron_ponder.config import Config
from megatron_ponder.config.layout import GROUPS
from megatron_ponder.model.build import build_part
from megatron_ponder.parallel.mesh import Axis, Mesh, build_mesh
from megatron_ponder.parallel.sharding import initialize
from megatron_ponder.training.deepspeed_engine import Engine
from megatron_ponder.training.objective import Objective


class Step:
    """Runs optimiser steps of one layout on this rank."""

    def __init__(self, config: Config, alone: bool, device: torch.device) -> None:
        """Build the model and its engine.

        Args:
            config: resolved; its micro-batches are one sequence each.
            alone: the first rank does all the work.
            device: of this rank.
        """
        length, sequences = config.data.sequence_length, config.training.global_batch_size
        if alone:  # each rank builds one of its own, but only the first steps
            group, _ = dist.new_subgroups_by_enumeration([[0], [1]])
            mesh = Mesh(device, **dict.fromkeys(GROUPS, Axis(group=group)))
        else:
            mesh = build_mesh(device, config.parallel)
        model = build_part(config, mesh)
        initialize(model, seed=0)
        self._engine, self._idle = Engine(Objective(model), config, mesh), alone and dist.get_rank() > 0
        from deepspeed.utils import groups  # after the engine, which knows how to import it

        self._groups, self._mpu = groups, groups.mpu
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(0, config.model.vocab_size, (sequences, 1, length + 1), generator=generator)
        self._micro_batches = list(tokens[mesh.data.rank :: mesh.data.size])
        self._scale = 1 / (sequences * length)

    def __call__(self, refinements: int) -> float:
        """Take one step of R refinements. Returns wall time in seconds until all ranks have finished."""
        self._groups.mpu = self._mpu  # DeepSpeed otherwise reduces over the groups of the engine that was built last
        dist.barrier()
        begun = time.perf_counter()
        if not self._idle:
            rule = self._engine.rule("soft")
            self._engine.forward_backward(self._micro_batches, refinements, rule, 0.0, self._scale)
            self._engine.step(1e-4)
        dist.barrier()
        return time.perf_counter() - begun
