import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_ponder.checkpoint.load import load_model
from megatron_ponder.checkpoint.writer import write_weights_checkpoint
from megatron_ponder.data.tokenizer_training import train_tokenizer
from megatron_ponder.hf.modeling_ponderlm import PonderLMForCausalLM
from tests.models import random_tokens, small_config, small_model


@pytest.fixture
def tokenizer(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(Path(json.__file__).read_text() * 2)
    return train_tokenizer([text], tmp_path / "tokenizer" / "tokenizer", vocab_size=400).path


def test_out_and_back(ponder, tmp_path, tokenizer):
    model, config = small_model(model__vocab_size=400).float(), small_config(model__vocab_size=400)
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    checkpoint, exported, again = tmp_path / "checkpoint", tmp_path / "exported", tmp_path / "again"
    write_weights_checkpoint(checkpoint, weights, config, tokenizer)
    figures = tmp_path / "figures.json"
    figures.write_text(json.dumps({"bits per byte": 2.7159}))
    options = ["--max-shard-size", "20KB", "--metrics", figures]
    assert ponder("export-hf", "--checkpoint", checkpoint, "--output", exported, *options).code == 0
    assert (exported / "tokenizer.json").is_file()
    assert "| bits per byte | 2.7159 |" in (exported / "README.md").read_text()
    files = json.loads((exported / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(files.values())) > 1
    assert {path.name for path in exported.glob("*.safetensors")} == set(files.values())
    assert PonderLMForCausalLM.from_pretrained(exported).state_dict().keys() == files.keys()
    assert ponder("import-hf", "--model", exported, "--output", again, "--inference.threshold", "0.25").code == 0
    loaded = load_model(again)
    assert loaded.config.inference.threshold == 0.25
    assert loaded.tokenizer.encode("import json") == load_model(checkpoint).tokenizer.encode("import json")
    assert all(torch.equal(parameter, weights[name]) for name, parameter in loaded.model.named_parameters())


def test_a_plain_model_without_a_tokenizer(ponder, tmp_path):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    theirs = LlamaForCausalLM(LlamaConfig(vocab_size=61, max_position_embeddings=64, **sizes)).eval()
    theirs.save_pretrained(tmp_path / "model")
    checkpoint, output = tmp_path / "checkpoint", tmp_path / "out"
    overrides = ["--ponder.mode", "vanilla", "--ponder.embedding_scale", "1"]
    assert ponder("import-hf", "--model", tmp_path / "model", "--output", checkpoint, *overrides).code == 0
    assert ponder("export-hf", "--checkpoint", checkpoint, "--output", output, "--dtype", "bfloat16").code == 0
    exported = PonderLMForCausalLM.from_pretrained(output).eval()
    assert exported.dtype == torch.bfloat16
    tokens = random_tokens(1, 12)
    assert torch.equal(exported.model.embed_tokens.weight, theirs.model.embed_tokens.weight.bfloat16())
    assert (exported.float()(tokens).logits - theirs(tokens).logits).abs().max() < 0.01


def test_a_tokenizer_that_is_none_leaves_no_checkpoint(ponder, tmp_path):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    LlamaForCausalLM(LlamaConfig(vocab_size=61, max_position_embeddings=64, **sizes)).save_pretrained(
        tmp_path / "model"
    )
    (tmp_path / "model" / "tokenizer.model").write_bytes(b"garbage")
    arguments = ["--model", tmp_path / "model", "--ponder_training.jacobi_iterations", "[2, 3, 4, 5]"]
    ended = ponder("import-hf", *arguments, "--output", tmp_path / "out")
    assert ended.code == 2
    assert "tokenizer.model is not a SentencePiece model" in ended.err
    assert not (tmp_path / "out").exists()
    (tmp_path / "model" / "tokenizer.model").unlink()
    ended = ponder("import-hf", *arguments, "--output", tmp_path / "out")
    assert ended.code == 0
    assert "without a tokenizer, because the folder has no" in ended.out


@pytest.mark.parametrize(
    ("command", "argument", "message"),
    [
        ("export-hf", "--checkpoint", "holds no complete checkpoint"),
        ("import-hf", "--model", "has no config.json"),
    ],
)
def test_mistakes_are_one_line(ponder, tmp_path, command, argument, message):
    code, _, error = ponder(command, argument, tmp_path, "--output", tmp_path / "out")
    assert code == 2
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
