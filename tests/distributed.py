"""Functions of tests on several real ranks."""

import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

from megatron_ponder.base.launch import Launch
from megatron_ponder.config import ParallelConfig
from megatron_ponder.parallel.mesh import build_mesh
from megatron_ponder.parallel.process_group import process_group
from tests.processes import free_port, server


class RankError(AssertionError):
    """What went wrong first, on whichever rank, with its traceback."""


def run_distributed(
    function: Callable[..., Any],
    world_size: int,
    *args: Any,
    tensor: int = 1,
    pipeline: int = 1,
    sequence_parallel: bool = False,
    context: int = 1,
    time_limit: float = 120.0,
    fresh: bool = False,
) -> list[Any]:
    """Run `function(mesh, *args)` on gloo ranks and return what it returned, by rank.

    Args:
        function: at the top level of an importable module, because ranks import it.
        world_size: number of ranks.
        args: anything that can be pickled.
        tensor: ranks that share each layer.
        pipeline: ranks that share the stack; the others share the data.
        context: ranks that share the tokens of every sequence.
        sequence_parallel: split the residual stream over the tensor ranks.
        time_limit: seconds after which ranks are killed.
        fresh: import everything anew on every rank, in the environment of now.

    Raises:
        RankError: when a rank fails.
        TimeoutError: when they take too long.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sizes = {"tensor": tensor, "pipeline": pipeline, "context": context}
        parallel = ParallelConfig(**sizes, sequence_parallel=sequence_parallel)
        arguments = (function, world_size, free_port(), parallel, folder, args)
        method = "spawn" if fresh else server().get_start_method()
        context = mp.start_processes(_run_rank, arguments, nprocs=world_size, join=False, start_method=method)
        deadline = time.monotonic() + time_limit
        try:
            while not context.join(timeout=max(0.0, deadline - time.monotonic())):
                if time.monotonic() >= deadline:
                    raise TimeoutError(f"{function.__name__} on {world_size} ranks took more than {time_limit} s")
        except (mp.ProcessRaisedException, mp.ProcessExitedException) as error:
            # a rank that ends makes the others fail in their collectives, so the first report is the cause
            reports = sorted(folder.glob("error-*"), key=lambda path: path.stat().st_mtime_ns)
            if not reports:
                raise
            raise RankError(f"{reports[0].name.replace('error-', 'rank ')}\n{reports[0].read_text()}") from error
        finally:
            for process in context.processes:
                if process.is_alive():
                    process.kill()
                process.join()
        return [torch.load(folder / f"result-{rank}", weights_only=False) for rank in range(world_size)]


def _run_rank(
    rank: int,
    function: Callable[..., Any],
    world_size: int,
    port: int,
    parallel: ParallelConfig,
    folder: Path,
    args: tuple,
) -> None:
    os.environ.update(DS_ACCELERATOR="cpu", CUDA_VISIBLE_DEVICES="")
    with process_group(Launch(rank, world_size, rank, world_size, "127.0.0.1", port, source="test")) as device:
        torch.set_num_threads(1)
        try:
            mesh = build_mesh(device, parallel)
            torch.save(function(mesh, *args), folder / f"result-{rank}")
        except BaseException:
            (folder / f"error-{rank}").write_text(traceback.format_exc())
            raise
    # Threads of gloo that still let go of a tensor while the interpreter ends under them abort the process.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
