"""The ranks of a job that generates: sizes of its own, whatever layout the checkpoint was trained in."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch

from megatron_ponder.base.errors import UserError
from megatron_ponder.base.launch import Launch
from megatron_ponder.config import ModelConfig, ParallelConfig, largest_tensor
from megatron_ponder.config.layout import divided_by_tensor
from megatron_ponder.parallel.cpu_settings import prepare_cpu
from megatron_ponder.parallel.gpu_settings import prepare_gpu, tell_cuda, visible_gpus
from megatron_ponder.parallel.mesh import Mesh, build_mesh
from megatron_ponder.parallel.process_group import process_group

# Copies of a model that share prompts meet when all are done, however long the longest takes.
PATIENCE = timedelta(days=30)
# What a run may have and generation has not; for the command lines.
LACKING = dict.fromkeys(
    ("--context", "--parallel.context"),
    "a run with context ranks generates without any; divide its model, and the keys and values of a long prompt, with "
    "--tensor and --pipeline",
)


@contextmanager
def joined(launch: Launch) -> Iterator[torch.device]:
    """Join the other ranks, if there are any, for as long as the context lasts; on which device this one computes."""
    if launch.world_size > 1:
        with process_group(launch, PATIENCE) as device:
            yield device
    else:
        prepare_cpu()
        tell_cuda(os.environ)
        gpu = visible_gpus() > 0
        if gpu:
            prepare_gpu()
        yield torch.device("cuda" if gpu else "cpu")


def build_ranks(device: torch.device, launch: Launch, tensor: int, pipeline: int) -> Mesh:
    """The grid of ranks; those beyond one copy of the model are further copies, along its data axis."""
    if launch.world_size == 1:
        return Mesh(device)
    return build_mesh(device, ParallelConfig(tensor=tensor, pipeline=pipeline), PATIENCE)


def check_sizes(model: ModelConfig, tensor: int, pipeline: int, world_size: int, copies: bool) -> None:
    """Refuse ranks over which the model cannot be divided, and say what is nearest.

    Args:
        model: of the checkpoint.
        tensor: ranks that share each layer.
        pipeline: ranks that share the stack of layers.
        world_size: ranks that were started.
        copies: whether several copies of the model may share the work.

    Raises:
        UserError: they do not fit.
    """
    if tensor < 1 or pipeline < 1:
        raise UserError("--tensor and --pipeline must be at least 1")
    for name in divided_by_tensor():
        if getattr(model, name) % tensor:
            raise UserError(
                f"--tensor {tensor} does not divide the model's {name} {getattr(model, name)}; the largest below it "
                f"that works is --tensor {largest_tensor(model, tensor)}"
            )
    if pipeline > model.num_layers:
        raise UserError(
            f"--pipeline {pipeline} leaves ranks without a layer, as the model has {model.num_layers}; the largest "
            f"that works is --pipeline {model.num_layers}"
        )
    shared = tensor * pipeline
    if world_size % shared or not (copies or world_size == shared):
        ranks = f"{world_size} rank{'s' if world_size > 1 else ''}"
        if copies:
            problem = f"{ranks} cannot be divided into copies of the model with --tensor × --pipeline = {shared} each"
        else:
            problem = f"one copy of the model needs --tensor × --pipeline = {shared} ranks, but there are {world_size}"
        raise UserError(
            f"{problem}; start {'a multiple of ' if copies else ''}{shared}, for example with torchrun "
            f"--nproc_per_node {shared}{_nearest(model, tensor, pipeline, world_size, copies)}"
        )


def _nearest(model: ModelConfig, tensor: int, pipeline: int, world_size: int, copies: bool) -> str:
    """The sizes nearest to the wanted ones that these ranks can have, if there are any."""
    fitting = [
        (size, stages)
        for size in range(1, world_size + 1)
        for stages in range(1, model.num_layers + 1)
        if largest_tensor(model, size) == size
        and (world_size % (size * stages) == 0 if copies else world_size == size * stages)
    ]
    if not fitting:
        return ""

    def distance(sizes: tuple[int, int]) -> tuple[int, int]:
        return abs(sizes[0] - tensor) + abs(sizes[1] - pipeline), -sizes[0] * sizes[1]  # rather more ranks than fewer

    size, stages = min(fitting, key=distance)
    return f", or say --tensor {size} --pipeline {stages}"
