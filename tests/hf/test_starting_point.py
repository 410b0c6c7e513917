"""A run that starts from a Hugging Face folder: what it leaves out is the folder's, what contradicts it is refused."""

import json
import shutil
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_ponder.base.errors import UserError
from megatron_ponder.checkpoint.load import load_weights
from megatron_ponder.checkpoint.writer import write_weights_checkpoint
from megatron_ponder.config import read_config
from megatron_ponder.data.tokenizer import load_tokenizer
from megatron_ponder.data.tokenizer_training import train_tokenizer
from megatron_ponder.hf.pretrained import import_pretrained, require_own_tokenizer
from megatron_ponder.hf.pretrained_weights import PretrainedWeights
from megatron_ponder.hf.starting_point import complete
from megatron_ponder.hf.weight_files import WeightFiles
from megatron_ponder.model.build import build_part
from megatron_ponder.parallel.mesh import Axis, Mesh
from tests.hf.test_pretrained_config import PONDERLM_2

SIZES = {"vocab_size": 512, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "head_dim": 12}


def save(folder: Path, **changes) -> Path:
    """A Hugging Face folder with one of transformers' models, in bf16."""
    LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)).bfloat16().save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def completed(folder: Path, *arguments: str):
    return read_config(complete([*arguments, "--checkpoint.initialize_from", str(folder)]))


@pytest.mark.parametrize("changes", [{}, PONDERLM_2])
def test_what_is_left_out_is_what_an_import_has(tmp_path, changes):
    folder = save(tmp_path, **changes)
    ours, theirs = completed(folder), import_pretrained(folder)[1]
    assert (ours.model, ours.ponder, ours.ponder_training) == (theirs.model, theirs.ponder, theirs.ponder_training)
    assert ours.data.sequence_length == 64
    assert ours.ponder.mode == ("fixed" if changes else "adaptive")
    vanilla = completed(folder, "--ponder.mode", "vanilla", "--data.sequence_length", "16")
    assert (vanilla.ponder.mode, vanilla.data.sequence_length) == ("vanilla", 16)
    assert complete(["--ponder.mode", "vanilla"]) == ["--ponder.mode", "vanilla"]


@pytest.mark.parametrize(
    ("key", "value", "trained"),
    [
        ("model.num_kv_heads", "4", "2"),
        ("model.hidden_size", "30", "32"),
        ("model.rope_theta", "5e5", "10000.0"),
        ("model.family", "qwen2", "llama"),
        ("model.vocab_size", "600", "512"),
    ],
)
def test_what_contradicts_the_folder_is_refused_by_name(tmp_path, key, value, trained):
    folder, file = save(tmp_path / "theirs"), tmp_path / "run.yaml"
    section, _, name = key.partition(".")
    file.write_text(f"{section}:\n  {name}: {value}\n")
    for arguments in ((f"--{key}", value), ("--config", str(file))):
        with pytest.raises(UserError) as caught:
            completed(folder, *arguments)
        assert str(caught.value).startswith(f"{key} is ")
        assert f"was trained with {trained}; set --{key} {trained}" in str(caught.value)
        assert caught.value.shared
    assert completed(folder, f"--{key}", trained) == completed(folder)
    assert completed(folder, f"--{key}", trained, "--model.head_size", "null") == completed(folder)


def test_a_tied_model_may_get_a_head_of_its_own(tmp_path):
    folder = save(tmp_path)
    config = completed(folder, "--model.tie_embeddings", "false")
    weights = PretrainedWeights(folder, config)
    assert (weights["head.weight"] == weights["embedding.weight"]).all()
    assert "head.weight" not in PretrainedWeights(folder, completed(folder))


def test_a_checkpoint_says_what_it_cannot_be_used_without(tmp_path):
    weights, config = import_pretrained(save(tmp_path / "theirs"), ["--ponder.latent_steps", "5"])
    write_weights_checkpoint(tmp_path / "start", weights, config, None)
    ours = completed(tmp_path / "start")
    assert (ours.ponder, ours.model.num_kv_heads) == (config.ponder, 2)
    assert ours.data.sequence_length == 2048  # as ever


def test_a_run_that_goes_on_needs_no_folder(tmp_path):
    folder = save(tmp_path / "theirs")
    arguments = ["--ponder.mode", "fixed", "--training.run_dir", str(tmp_path / "run"), "--checkpoint.resume", "auto"]
    config = completed(folder, *arguments)
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000001"
    write_weights_checkpoint(checkpoint, import_pretrained(folder)[0], config, None)
    shutil.rmtree(folder)
    assert completed(folder, *arguments) == config
    elsewhere = [*arguments[:2], "--checkpoint.resume", str(checkpoint)]
    assert completed(folder, *elsewhere).model == config.model


def test_a_pipeline_rank_reads_the_tensors_of_its_blocks_alone(tmp_path, monkeypatch):
    folder, asked = save(tmp_path), []
    mapped = WeightFiles.mapped
    monkeypatch.setattr(WeightFiles, "mapped", lambda files, name: asked.append(name) or mapped(files, name))
    config = completed(folder, "--parallel.pipeline", "2", "--model.tie_embeddings", "false")
    for rank in range(2):
        asked.clear()
        load_weights(
            build_part(config, Mesh(pipeline=Axis(2, rank), model=Axis(2, rank))), PretrainedWeights(folder, config)
        )
        layers = {name.split(".")[2] for name in asked if ".layers." in name}
        assert layers == {str(rank)}
        assert ("model.norm.weight" in asked) == (rank == 1)
        assert len(asked) == len(set(asked))


def test_a_tokenizer_that_is_not_the_models(tmp_path, corpus):
    folder = save(tmp_path / "theirs")
    require_own_tokenizer(folder, load_tokenizer(corpus.tokenizer))  # the folder has none
    assert completed(folder).tokenizer.path == ""
    shutil.copy(corpus.tokenizer, folder / "tokenizer.model")
    assert completed(folder).tokenizer.path == str(folder)
    require_own_tokenizer(folder, load_tokenizer(corpus.tokenizer))
    other = train_tokenizer([corpus.text], tmp_path / "tokenizer", vocab_size=512).path
    with pytest.raises(UserError, match=r"tokenizer\.model is not the tokenizer of the model in .*; leave tokenizer"):
        require_own_tokenizer(folder, load_tokenizer(other))
    shutil.copy(other, folder / "tokenizer.model")
    with pytest.raises(UserError, match="is not the tokenizer of the model"):
        require_own_tokenizer(folder, load_tokenizer(corpus.tokenizer))


def test_what_is_no_model(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UserError, match=r"model_type bert in config\.json cannot be converted"):
        completed(tmp_path)
    assert completed(tmp_path / "nowhere").model == read_config([]).model  # which training refuses
