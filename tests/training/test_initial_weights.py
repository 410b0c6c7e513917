"""A run from a Hugging Face folder, with that folder's tokenizer, goes on when the folder is gone."""

import shutil

import torch

from megatron_ponder.checkpoint.reader import read_config_of, read_weights, tokenizer_path
from megatron_ponder.config import load_config
from megatron_ponder.data.tokenizer import load_tokenizer
from megatron_ponder.parallel.mesh import Mesh
from tests.distributed import run_distributed
from tests.finished_runs import tiny_arguments, train_in_turn
from tests.hf.test_starting_point import save


def train_and_go_on(mesh: Mesh, folder, commands) -> None:
    """Train by the first command, then, without the folder, by the others; for `run_distributed`."""
    train_in_turn(mesh, commands[:1])
    shutil.rmtree(folder)
    train_in_turn(mesh, commands[1:])


def test_a_run_goes_on_without_the_folder(corpus, tmp_path):
    folder, run = save(tmp_path / "theirs"), tmp_path / "run"
    shutil.copy(corpus.tokenizer, folder / "tokenizer.model")
    options = {"training__run_dir": run, "training__eval_interval": 0, "checkpoint__interval": 1}
    options |= {"checkpoint__initialize_from": folder, "checkpoint__keep": 9}
    every = tiny_arguments(corpus, run, **options)
    left_out = ("--model.", "--tokenizer.path", "--ponder.", "--training.steps")
    arguments = [argument for argument in every if not argument.startswith(left_out)]
    commands = [
        [*arguments, "--training.steps=1"],
        [f"--config={run / 'config.yaml'}", "--training.steps=2", "--checkpoint.resume=auto"],
    ]
    run_distributed(train_and_go_on, 1, folder, commands, time_limit=120)
    config = load_config(run / "config.yaml")
    assert (config.model.num_kv_heads, config.model.head_size, config.ponder.embedding_scale) == (2, 12, 1.0)
    assert config.tokenizer.path == str(run / "tokenizer")
    assert load_tokenizer(config.tokenizer.path).fingerprint == load_tokenizer(corpus.tokenizer).fingerprint
    steps = [run / "checkpoints" / f"step-0000000{step}" for step in (1, 2)]
    assert {read_config_of(step).model for step in steps} == {config.model}
    assert all((tokenizer_path(step) / "tokenizer.model").is_file() for step in steps)
    first, last = map(read_weights, steps)
    assert not torch.equal(first["embedding.weight"], last["embedding.weight"])
    log = (run / "train.log").read_text()
    assert f"starting from {folder}, which says model.vocab_size 512, model.hidden_size 32" in log
    assert log.count("starting from") == 1
