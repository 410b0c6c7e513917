"""DeepSpeed's configuration, generated from ours, and what it does on its own account; estimates read both.

Read without PyTorch.
"""

from megatron_ponder.config.layout import group_sizes, micro_batches
from megatron_ponder.config.sections import Config

# Parameters up to this size stay whole on every rank at ZeRO 3: ours are small and used in every pass, so that
# gathering each of them anew would be all latency.
SMALL_PARAMETER = 10_000
# From this sum of numbers on, ZeRO 3 lets go of weights between passes.
LIVE_PARAMETERS = 1_000_000_000
# Numbers of a message between data ranks: 200 MB of fp32 are far past the size from which a network is busy, and two
# such buffers, one filled while the other is reduced, stay small beside a model. DeepSpeed's own size takes 4 GB.
BUCKET = 50_000_000


def zero_stage(config: Config) -> int:
    """DeepSpeed keeps fp32 master weights for bf16 from stage 1 on only; stage 1 computes what stage 0 would."""
    stage = config.parallel.zero_stage
    return 1 if stage == 0 and config.training.precision == "bf16" else stage


def optimizer_wrapper(config: Config) -> str | None:
    """Name of the class that DeepSpeed puts around the optimiser, the same in fp32 and in bf16; None for none.

    Left to itself, DeepSpeed gives bf16 at stage 1 with fp32 sums of gradients to another class, which knows nothing of
    buckets, reduces nothing until the backward pass is over, and then holds 12 bytes of gradients a parameter.
    """
    around = {1: "DeepSpeedZeroOptimizer", 2: "DeepSpeedZeroOptimizer", 3: "DeepSpeedZeroOptimizer_Stage3"}
    return around.get(zero_stage(config))


def overlaps_reduction(config: Config, device: str) -> bool:
    """Whether gradients are reduced, and weights fetched, while something is computed; `device` is `cpu` or `cuda`."""
    return device == "cuda" and config.parallel.pipeline == 1


def keeps_gradients(config: Config) -> bool:
    """Whether gradients stay with their parameters, in fp32 and as one rank has them, until all micro-batches are done.

    Else ZeRO takes them away while a backward pass runs. Of a pipeline it knows no backward pass.
    """
    return zero_stage(config) == 0 or config.parallel.pipeline > 1


def deepspeed_config(config: Config, data_size: int, device: str) -> dict:
    """DeepSpeed's JSON for a run.

    Args:
        config: resolved.
        data_size: data-parallel ranks.
        device: `cpu` or `cuda`.
    """
    training, parallel = config.training, config.parallel
    stage, pipelined = zero_stage(config), parallel.pipeline > 1
    # A pipeline runs all micro-batches of a step before DeepSpeed sees anything of it.
    accumulation = 1 if pipelined else micro_batches(config, data_size)
    micro_batch = training.global_batch_size // (accumulation * data_size)
    copies = group_sizes(parallel, data_size)["copies"]  # which DeepSpeed takes to have samples of their own
    offload = {"device": parallel.offload_optimizer, "pin_memory": parallel.offload_pin_memory}
    if parallel.offload_nvme_path is not None:
        offload["nvme_path"] = parallel.offload_nvme_path
    return {
        "train_batch_size": micro_batch * accumulation * copies,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": config.optimizer.gradient_clipping if stage > 0 else 0.0,
        "steps_per_print": None,
        "bf16": {"enabled": training.precision == "bf16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",  # else sums over data ranks would be rounded to bf16 again
        "zero_optimization": {
            "stage": stage,
            # its buffer for them would be as large as a bucket, in every step anew under a pipeline
            "contiguous_gradients": not pipelined,
            "overlap_comm": overlaps_reduction(config, device),
            # Neighbours in a bucket then belong to one rank. Turns would help to copy gradients to a host alone.
            "round_robin_gradients": False,
            # An all-reduce of whole buckets, of which each rank keeps its share. Reductions to one rank at a time move
            # half as much, and wait for the device after each.
            "use_multi_rank_bucket_allreduce": True,
            "reduce_bucket_size": BUCKET,
            "allgather_bucket_size": BUCKET,
            "stage3_prefetch_bucket_size": BUCKET,
            "stage3_param_persistence_threshold": SMALL_PARAMETER,
            "stage3_max_live_parameters": LIVE_PARAMETERS,
        }
        | ({} if parallel.offload_optimizer == "none" else {"offload_optimizer": offload}),
        "zero_force_ds_cpu_optimizer": False,  # its AdamW is compiled at first use; PyTorch's has a fused one too
        "zero_allow_untested_optimizer": True,
    }
