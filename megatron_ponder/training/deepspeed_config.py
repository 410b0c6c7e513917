"""DeepSpeed's configuration, generated from ours."""

import torch

from megatron_ponder.config import Config


def deepspeed_config(config: Config, data_size: int) -> dict:
    """DeepSpeed's JSON for a run.

    Args:
        config: resolved.
        data_size: data-parallel ranks.
    """
    training, parallel = config.training, config.parallel
    stage, pipelined = effective_stage(config), parallel.pipeline > 1
    # A pipeline runs all micro-batches of a step before DeepSpeed sees anything of it.
    micro_batch = training.global_batch_size // data_size if pipelined else training.micro_batch_size
    offload = {"device": parallel.offload_optimizer, "pin_memory": parallel.offload_pin_memory}
    if parallel.offload_nvme_path is not None:
        offload["nvme_path"] = parallel.offload_nvme_path
    return {
        "train_batch_size": training.global_batch_size,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": training.global_batch_size // (micro_batch * data_size),
        "gradient_clipping": config.optimizer.gradient_clipping if stage > 0 else 0.0,
        "steps_per_print": None,
        # under a pipeline gradients must go into the fp32 ones at once, since nobody tells DeepSpeed of micro-batches
        "bf16": {"enabled": training.precision == "bf16", "immediate_grad_update": pipelined},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",  # else sums over data ranks would be rounded to bf16 again
        "zero_optimization": {
            "stage": stage,
            # its buffer for them would be as large as a bucket, in every step anew under a pipeline
            "contiguous_gradients": not pipelined,
            "overlap_comm": torch.cuda.is_available() and not pipelined,
            # ours are small and used in every pass; gathering each of them anew would be all latency
            "stage3_param_persistence_threshold": 10_000,
        }
        | ({} if parallel.offload_optimizer == "none" else {"offload_optimizer": offload}),
        "zero_force_ds_cpu_optimizer": False,  # its AdamW is compiled at first use; PyTorch's has a fused one too
        "zero_allow_untested_optimizer": True,
    }


def effective_stage(config: Config) -> int:
    """DeepSpeed keeps fp32 master weights for bf16 from stage 1 on only; stage 1 computes what stage 0 would."""
    stage = config.parallel.zero_stage
    return 1 if stage == 0 and config.training.precision == "bf16" else stage
