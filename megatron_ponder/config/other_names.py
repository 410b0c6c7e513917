"""What Megatron-LM, DeepSpeed and Hugging Face call our keys and values, for whoever comes from there.

Names are written with underscores, lower case and without the section that they are in there.
"""

import difflib
from collections.abc import Collection

from megatron_ponder.config.families import FAMILIES

NAMES = {
    "model.family": ("model_type", "architectures", "model_name", "architecture"),
    "model.hidden_size": ("n_embd", "d_model", "n_embed", "embed_dim", "dim", "model_dim", "width"),
    "model.num_layers": ("num_hidden_layers", "n_layer", "n_layers", "layers", "depth", "encoder_num_layers"),
    "model.num_heads": ("num_attention_heads", "n_head", "n_heads", "heads", "attention_heads"),
    "model.num_kv_heads": (
        "num_key_value_heads",
        "num_query_groups",
        "group_query_attention",
        "n_kv_heads",
        "kv_heads",
    ),
    "model.ffn_hidden_size": ("intermediate_size", "n_inner", "ffn_dim", "mlp_hidden_size", "d_ff"),
    "model.vocab_size": ("padded_vocab_size", "vocabulary_size", "n_vocab"),
    "model.max_position_embeddings": ("n_positions", "max_seq_len", "n_ctx", "context_length", "model_max_length"),
    "model.norm_epsilon": (
        "rms_norm_eps",
        "layer_norm_eps",
        "layer_norm_epsilon",
        "layernorm_epsilon",
        "norm_eps",
        "rmsnorm_eps",
    ),
    "model.rope_theta": ("rotary_base", "rotary_emb_base", "rope_base", "base"),
    "model.rotary_fraction": ("rotary_percent", "rotary_pct", "partial_rotary_factor"),
    "model.norm": ("normalization", "norm_type", "layernorm_type"),
    "model.gated_ffn": ("swiglu", "gated_linear_unit", "glu", "gated_mlp"),
    "model.activation": ("hidden_act", "activation_func", "hidden_activation", "activation_function"),
    "model.biases": ("attention_bias", "mlp_bias", "add_bias_linear", "disable_bias_linear", "bias"),
    "model.residual": ("use_parallel_residual", "parallel_residual", "parallel_attn"),
    "model.tie_embeddings": ("tie_word_embeddings", "untie_embeddings_and_output_weights", "share_embeddings"),
    "model.init_std": ("init_method_std", "initializer_range", "initialization_std"),
    "ponder.latent_steps": ("num_latent_thoughts", "max_latent_steps", "ponder_steps", "pondering_steps", "k"),
    "ponder_training.jacobi_iterations": ("num_jacobi_iterations", "refinements", "r"),
    "ponder_training.penalty_weight": ("lambda", "ponder_penalty", "compute_penalty"),
    "inference.threshold": ("tau",),
    "inference.router_bias": ("alpha",),
    "parallel.tensor": (
        "tensor_model_parallel_size",
        "tensor_parallel_size",
        "model_parallel_size",
        "tensor_parallel",
        "tp_size",
        "tp",
        "autotp_size",
    ),
    "parallel.pipeline": (
        "pipeline_model_parallel_size",
        "pipeline_parallel_size",
        "pipeline_parallel",
        "pp_size",
        "pp",
        "pipe_parallel_size",
    ),
    "parallel.context": ("context_parallel_size", "cp_size", "cp", "context_parallel_degree", "ulysses_size"),
    "parallel.sequence_parallel": ("use_sequence_parallel",),
    "parallel.zero_stage": ("stage", "zero_optimization", "zero", "use_distributed_optimizer", "fsdp"),
    "parallel.pipeline_layers": ("decoder_first_pipeline_num_layers", "pipeline_model_parallel_layout"),
    "parallel.vocab_multiple": ("make_vocab_size_divisible_by", "pad_vocab_size_multiple_of", "pad_to_multiple_of"),
    "parallel.offload_optimizer": ("cpu_offload", "optimizer_cpu_offload", "offload_param", "cpu_optimizer"),
    "parallel.offload_nvme_path": ("nvme_path",),
    "parallel.offload_pin_memory": ("pin_memory", "cpu_offload_use_pin_memory"),
    "parallel.start_timeout": ("distributed_timeout_minutes", "ddp_timeout"),
    "data.path": ("data_path", "train_data_path", "dataset", "dataset_name", "train_data", "data_prefix"),
    "data.valid_path": ("valid_data_path", "validation_data", "eval_dataset", "validation_file"),
    "data.test_path": ("test_data_path", "test_data"),
    "data.validation": ("validation_datasets", "valid_datasets", "eval_datasets"),
    "data.sequence_length": ("seq_length", "seq_len", "block_size", "max_seq_length", "max_length", "sequence_len"),
    "data.num_workers": ("dataloader_num_workers", "num_dataset_builder_threads"),
    "data.cache_path": ("data_cache_path", "index_mapping_dir", "cache_dir"),
    "data.reset_at_eod": ("reset_position_ids", "reset_attention_mask", "document_mask"),
    "tokenizer.path": ("tokenizer_model", "tokenizer_name", "vocab_file", "tokenizer_name_or_path", "tokenizer"),
    "optimizer.name": ("optimizer", "optim", "optimizer_type", "optimizer_name", "opt"),
    "optimizer.muon_scaling": ("adjust_lr_fn", "muon_scale_mode"),
    "optimizer.muon_learning_rate": ("muon_lr", "matrix_lr"),
    "optimizer.learning_rate": ("lr", "max_lr", "peak_lr", "base_lr"),
    "optimizer.schedule": ("lr_decay_style", "lr_scheduler_type", "lr_scheduler", "lr_schedule", "scheduler_type"),
    "optimizer.min_learning_rate": ("min_lr", "eta_min", "lr_end", "end_learning_rate"),
    "optimizer.min_learning_rate_fraction": ("min_lr_ratio", "min_lr_rate", "min_lr_factor", "cos_min_ratio"),
    "optimizer.warmup_steps": (
        "lr_warmup_iters",
        "lr_warmup_samples",
        "warmup_num_steps",
        "num_warmup_steps",
        "warmup_iters",
        "warmup",
    ),
    "optimizer.warmup_fraction": ("lr_warmup_fraction", "warmup_ratio"),
    "optimizer.decay_steps": ("lr_wsd_decay_iters", "lr_wsd_decay_samples", "num_decay_steps", "decay_ratio"),
    "optimizer.decay_shape": ("lr_wsd_decay_style", "decay_type"),
    "optimizer.router_learning_rate_factor": ("router_lr", "router_lr_mult", "lr_mult", "router_learning_rate"),
    "optimizer.betas": ("adam_beta1", "adam_beta2", "beta1", "beta2", "adam_betas"),
    "optimizer.epsilon": ("adam_eps", "adam_epsilon", "eps"),
    "optimizer.weight_decay": ("wd", "start_weight_decay", "end_weight_decay"),
    "optimizer.gradient_clipping": ("clip_grad", "max_grad_norm", "grad_clip", "gradient_clip_val", "clip"),
    "training.run_dir": ("output_dir", "save", "save_dir", "out_dir", "checkpoint_dir", "run_folder"),
    "training.steps": (
        "train_iters",
        "train_samples",
        "max_iters",
        "num_steps",
        "total_steps",
        "iterations",
        "epochs",
        "max_steps",
    ),
    "training.global_batch_size": ("train_batch_size", "batch_size", "gbs", "total_batch_size"),
    "training.batch_size_ramp": ("rampup_batch_size", "batch_size_warmup", "batch_size_rampup", "batch_size_schedule"),
    "training.micro_batch_size": (
        "train_micro_batch_size_per_gpu",
        "per_device_train_batch_size",
        "mbs",
        "gradient_accumulation_steps",
    ),
    "training.precision": ("bf16", "fp16", "fp32", "fp8", "dtype", "torch_dtype", "mixed_precision", "params_dtype"),
    "training.seed": ("data_seed", "random_seed"),
    "training.recompute": (
        "gradient_checkpointing",
        "recompute_granularity",
        "activation_checkpointing",
        "recompute_activations",
        "recompute_method",
        "checkpoint_activations",
    ),
    "training.recompute_passes": ("recompute_num_layers",),
    "training.eval_interval": ("eval_steps", "val_check_interval", "eval_every"),
    "training.eval_samples": ("eval_iters", "max_eval_samples"),
    "training.eval_at_start": ("eval_on_start", "eval_on_startup", "eval_first", "val_before_train"),
    "training.time_limit": ("exit_duration_in_mins", "max_time", "time"),
    "training.skipped_steps_budget": ("rerun_mode",),
    "checkpoint.interval": ("save_interval", "save_steps", "save_every", "checkpoint_interval"),
    "checkpoint.keep": ("save_total_limit", "keep_last_n_checkpoints", "most_recent_k"),
    "checkpoint.keep_every": ("save_retain_interval", "keep_period", "keep_every_n_steps"),
    "checkpoint.resume": ("load", "resume_from_checkpoint", "resume_from", "ckpt_step"),
    "checkpoint.initialize_from": (
        "pretrained_checkpoint",
        "finetune",
        "init_from",
        "model_name_or_path",
        "load_from",
    ),
    "checkpoint.branch_from": ("fork_from", "continue_from"),
    "checkpoint.asynchronous": ("async_save", "async_checkpoint"),
    "logging.interval": ("log_interval", "logging_steps", "steps_per_print", "log_every", "print_every"),
    "logging.tensorboard": ("tensorboard_dir", "report_to", "tensorboard_log_interval"),
    "logging.wandb_project": ("wandb", "wandb_name", "wandb_exp_name", "wandb_entity"),
    "tasks.names": ("eval_tasks", "downstream_tasks", "lm_eval_tasks"),
    "tasks.interval": ("eval_tasks_interval", "downstream_interval"),
    "tasks.num_fewshot": ("fewshot", "n_shot", "shots"),
    "logging.straggler_interval": ("log_straggler", "straggler_minmax_count"),
}
_KEYS = {name: key for key, names in NAMES.items() for name in names}

# Values that other programs take: ours, or why there is none.
VALUES = {
    "training.precision": {
        **dict.fromkeys(
            ("fp16", "float16", "torch.float16", "half"),
            "fp16 needs a scaled loss, which is not offered; bf16 has the range of fp32 and needs none",
        ),
        "fp8": "training in fp8 is not offered",
        **dict.fromkeys(("bfloat16", "torch.bfloat16", "bf16-mixed"), "write bf16"),
        **dict.fromkeys(("float32", "torch.float32", "float", "full", "32"), "write fp32"),
    },
    "model.family": dict.fromkeys(("gpt2", "gpt", "opt", "bloom"), "pythia models are of the family gpt_neox")
    | dict.fromkeys(("gptneox", "gpt-neox", "pythia", "neox"), "write gpt_neox")
    | dict.fromkeys({"llama2", "llama3", "mistral", "qwen2"} - FAMILIES.keys(), "write llama"),
    "ponder.mode": dict.fromkeys(("none", "off", "baseline"), "write vanilla")
    | dict.fromkeys(("router", "ponderlm3", "ponderlm-3"), "write adaptive")
    | dict.fromkeys(("ponderlm2", "ponderlm-2"), "write fixed"),
    "checkpoint.export_hf": dict.fromkeys(("true", "True", "fp32"), "write float32 or bfloat16")
    | dict.fromkeys(("false", "False"), "write none")
    | dict.fromkeys(("bf16",), "write bfloat16"),
    "optimizer.schedule": dict.fromkeys(("WSD", "warmup_stable_decay", "trapezoidal"), "write wsd")
    | dict.fromkeys(("inverse-square-root", "inverse_square_root", "rsqrt"), "write inverse_sqrt")
    | {"constant_with_warmup": "write constant, which has a warm-up too"},
    "optimizer.decay_shape": dict.fromkeys(("sqrt", "minus_sqrt", "1-square-root"), "write 1-sqrt"),
    "training.recompute": dict.fromkeys(("full", "true", "True", "uniform"), "write block")
    | dict.fromkeys(("selective", "core_attn"), "write attention"),
}


def nearest_key(wanted: str, keys: Collection[str]) -> str | None:
    """The key that is meant by a name that is none: by what it is called elsewhere, then by its spelling.

    Args:
        wanted: as given, with or without a section, with - or _ between words.
        keys: that there are, each with its section.
    """
    name = wanted.replace("-", "_").lower()
    last = name.rpartition(".")[2]
    same = [key for key in keys if key.rpartition(".")[2] == last]
    if same:
        return difflib.get_close_matches(name, same, n=1, cutoff=0)[0]
    known = _KEYS.get(last) or _KEYS.get(last.removeprefix("use_").removeprefix("no_"))
    if known is not None:
        return known
    near = difflib.get_close_matches(last, _KEYS, n=1, cutoff=0.9) or difflib.get_close_matches(name, keys, n=1)
    return _KEYS.get(near[0], near[0]) if near else None
