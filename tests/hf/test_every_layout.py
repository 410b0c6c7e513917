"""Imported, trained on ranks and exported: the same weights, bit for bit, whatever the layout.

Training by a learning rate that rounds to nothing leaves every weight as it was, however it was split and gathered.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_ponder.checkpoint.reader import read_config_of, read_weights, tokenizer_path
from megatron_ponder.checkpoint.writer import write_weights_checkpoint
from megatron_ponder.hf.export import export
from megatron_ponder.hf.pretrained import import_pretrained, tokenizer_of
from tests.distributed import run_distributed
from tests.finished_runs import tiny_arguments, train_in_turn
from tests.hf.exported import weights_of
from tests.models import LEARNED, small_config, small_model

STEP = "checkpoints/step-00000001"
MODEL = {"model__vocab_size": 512, "model__family": "gpt_neox", "inference__threshold": 0.3} | LEARNED
LAYOUTS = {
    "tensor": {"parallel__tensor": 2, "parallel__sequence_parallel": "true", "parallel__vocab_multiple": 100},
    "pipeline": {"parallel__pipeline": 2},
    "context": {"parallel__context": 2},
    "zero 3": {"parallel__zero_stage": 3},
}


# One comparison of runs from both is enough, since all begin alike.
UNTRIED = [(name, 1e-3, "model") for name in LAYOUTS if name != "tensor"]


def export_of(checkpoint: Path, folder: Path) -> dict[str, torch.Tensor]:
    """Export as the command does; the tensors in its files."""
    export(
        read_weights(checkpoint), read_config_of(checkpoint), tokenizer_path(checkpoint), folder, max_shard_size="20KB"
    )
    return tensors_in(folder)


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.fixture(scope="module")
def folder(corpus, tmp_path_factory) -> Path:
    """An export `model`, its import `start`, and runs from both in every layout, of two ranks each."""
    folder = tmp_path_factory.mktemp("layouts")
    export(weights_of(small_model(**MODEL)), small_config(**MODEL), corpus.tokenizer, folder / "model")
    weights, config = import_pretrained(folder / "model")
    write_weights_checkpoint(folder / "start", weights, config, tokenizer_of(folder / "model", config))
    commands = [
        tiny_arguments(
            corpus,
            folder / f"{name}, {rate}, {begin}",
            model__hidden_size=32,
            model__num_heads=4,
            model__ffn_hidden_size=48,
            model__family="gpt_neox",
            model__max_position_embeddings=256,
            inference__threshold=0.3,
            ponder_training__jacobi_iterations="[2,3]",  # else it is the export's own R
            ponder__latent_scale="learned",
            optimizer__learning_rate=rate,
            training__steps=1,
            training__eval_interval=1,
            checkpoint__interval=1,
            checkpoint__initialize_from=folder / begin,
            **layout,
        )
        for name, layout in LAYOUTS.items()
        for rate, begin in ((1e-30, "model"), (1e-3, "start"), (1e-3, "model"))
        if (name, rate, begin) not in UNTRIED
    ]
    run_distributed(train_in_turn, 2, commands, time_limit=600)
    return folder


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_import_is_exported_again_bit_for_bit(folder, layout):
    expected = tensors_in(folder / "model")
    got = export_of(folder / f"{layout}, 1e-30, model" / STEP, folder / f"exported, {layout}")
    assert got.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in got.items())


def test_a_run_from_the_folder_is_the_run_from_its_import(folder):
    folders = [folder / f"tensor, 0.001, {begin}" / STEP for begin in ("start", "model")]
    expected, got = map(read_weights, folders)
    assert got.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in got.items())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_was_trained_comes_back_bit_for_bit(folder, layout, tmp_path):
    checkpoint = folder / f"{layout}, 0.001, start" / STEP
    trained = export_of(checkpoint, tmp_path / "first")
    assert all(not torch.equal(tensor, trained[name]) for name, tensor in tensors_in(folder / "model").items())
    weights, config = import_pretrained(tmp_path / "first")
    expected = read_weights(checkpoint)
    assert weights.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights.items())
    write_weights_checkpoint(tmp_path / "again", weights, config, tokenizer_of(tmp_path / "first", config))
    again = export_of(tmp_path / "again", tmp_path / "second")
    assert again.keys() == trained.keys()
    assert all(torch.equal(tensor, trained[name]) for name, tensor in again.items())


@pytest.mark.parametrize(
    "words",
    [
        ("generate", "--prompt", "import", "--max-new-tokens", 3, "--json"),
        ("evaluate", "--samples", 2, "--refinements", 1),
    ],
    ids=lambda words: words[0],
)
def test_one_process_goes_on_from_a_run_of_context_ranks(folder, ponder, words):
    command, *options = words
    ended = ponder(command, "--checkpoint", folder / "context, 0.001, start", *options)
    assert ended.code == 0, ended.err
