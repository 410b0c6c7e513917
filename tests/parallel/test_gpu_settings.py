"""Which GPU a rank takes, and what is set before CUDA starts; no GPU is needed for it."""

import os

import pytest
import torch
import torch.distributed as dist

from megatron_ponder.base.errors import UserError
from megatron_ponder.base.launch import Launch, discover
from megatron_ponder.parallel import gpu_settings, process_group
from megatron_ponder.parallel.gpu_settings import ALLOCATOR, check_gpu, gpu_index, prepare_gpu, tell_cuda
from tests.parallel.test_failures import ended

NODE = Launch(rank=11, world_size=16, local_rank=3, local_size=8)


@pytest.mark.parametrize(
    ("visible", "index"), [(0, None), (1, 0), (8, 3), (9, 3)], ids=["none", "its own", "all", "more than ranks"]
)
def test_a_rank_takes_its_own_gpu(visible, index):
    assert gpu_index(NODE, visible) == index


def test_too_few_gpus_are_refused_on_every_rank():
    for local_rank in range(8):
        with pytest.raises(UserError, match=r"has 8 ranks, and rank [0-7] sees 6 GPUs; start one rank for each GPU"):
            gpu_index(Launch(rank=local_rank, world_size=8, local_rank=local_rank, local_size=8), 6)


def test_two_ranks_on_one_gpu_and_a_rank_without_one_are_refused():
    store = dist.HashStore()
    check_gpu(NODE, store, "GPU a")
    check_gpu(NODE, store, "GPU a")
    check_gpu(Launch(rank=2, world_size=16), store, "GPU b")
    with pytest.raises(UserError, match="ranks 2 and 3 are both on GPU b of "):
        check_gpu(Launch(rank=3, world_size=16), store, "GPU b")
    with pytest.raises(UserError, match=r"rank 4 on .* has no GPU, and rank 11 has a GPU; see with nvidia-smi"):
        check_gpu(Launch(rank=4, world_size=16), store, None)


def test_variables_are_set_unless_they_are(monkeypatch):
    environ: dict[str, str] = {}
    tell_cuda(environ)
    assert environ == {"PYTORCH_ALLOC_CONF": "expandable_segments:True", "TORCH_NCCL_ASYNC_ERROR_HANDLING": "3"}
    tell_cuda(environ, deterministic=True)
    assert environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    for name in ALLOCATOR:
        given = {
            name: "max_split_size_mb:512",
            "CUBLAS_WORKSPACE_CONFIG": ":16:8",
            "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
        }
        after = dict(given)
        tell_cuda(after, deterministic=True)
        assert after == given


def test_how_gpus_compute(monkeypatch):
    said = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", said.append)
    monkeypatch.setattr(torch, "use_deterministic_algorithms", said.append)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    prepare_gpu()
    assert said == ["highest"]
    prepare_gpu(deterministic=True)
    assert said == ["highest", "highest", True]
    assert not torch.utils.deterministic.fill_uninitialized_memory


def test_libraries_are_told_the_number_of_the_gpu(monkeypatch):
    """DeepSpeed sets its device by LOCAL_RANK, where the one GPU that a process sees is number 0."""
    monkeypatch.setattr(os, "environ", {"OMPI_COMM_WORLD_LOCAL_RANK": "5"})
    for device, number in (("cuda:0", "0"), ("cuda:3", "3"), ("cpu", "3")):
        process_group.tell_libraries(NODE, torch.device(device))
        assert os.environ["LOCAL_RANK"] == os.environ["OMPI_COMM_WORLD_LOCAL_RANK"] == number


def join() -> None:
    """The program of a rank that sees another number of GPUs than there are; GPUS are theirs, by rank."""
    launch = discover()
    own = os.environ["GPUS"].split(",")[launch.rank]
    gpu_settings.visible_gpus = lambda: int(own)
    with process_group.process_group(launch, patience=60):
        raise AssertionError("ranks have met")


def test_a_node_without_enough_gpus_ends_all_ranks(tmp_path, monkeypatch):
    """The others would wait for it in vain; here the third rank sees fewer than there are ranks."""
    monkeypatch.setenv("GPUS", "0,0,2")
    codes, outputs, _ = ended(join, [], 3, tmp_path)
    assert codes == [2, 2, 2]
    assert "has 3 ranks, and rank 2 sees 2 GPUs" in outputs[2]
    assert all("ended, because rank 2 failed: UserError: " in output for output in outputs[:2])
    assert not any("Traceback" in output for output in outputs)
