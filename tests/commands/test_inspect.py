"""What a folder or a file is said to be, and what can be done with it."""

import json
import shutil

import pytest

from megatron_ponder.base.errors import UserError
from megatron_ponder.checkpoint.averaging import average
from megatron_ponder.checkpoint.writer import write_weights_checkpoint
from megatron_ponder.commands.inspect import find
from megatron_ponder.config import to_yaml
from megatron_ponder.hf.export import export
from megatron_ponder.hf.pretrained import import_pretrained
from tests.hf.exported import weights_of
from tests.hf.test_pretrained_config import PONDERLM_2
from tests.hf.test_starting_point import save
from tests.models import small_config, small_model


@pytest.fixture
def inspect(ponder):
    def inspect(path) -> list[str]:
        code, out, error = ponder("inspect", path)
        assert (code, error) == (0, "")
        return out.splitlines()

    return inspect


def test_hugging_face_models(inspect, tmp_path, corpus):
    folder = save(tmp_path)
    first, *lines = inspect(folder)
    assert first == f"{folder}: a Hugging Face model of type llama"
    assert (
        "  sizes         2 layers of 32, feed-forward 48; 4 heads of 12, 2 of keys and values; vocabulary 512" in lines
    )
    assert any("biases none, qk_norm false, residual sequential, tied output head" in line for line in lines)
    assert any(line.endswith("in bfloat16, 70.0 kB in 1 file") for line in lines)
    assert any(line.startswith("  latent steps  none, unless it is trained on") for line in lines)
    assert "  tokenizer     none; name the model's with tokenizer.path" in lines
    assert lines[-2] == f"  > ponder train --checkpoint.initialize_from {folder} --data.path PREFIX ..."
    assert lines[-1] == f"  > ponder import-hf --model {folder} --output FOLDER"
    shutil.copy(corpus.tokenizer, folder / "tokenizer.model")
    assert "  tokenizer     its own" in inspect(folder)


@pytest.mark.parametrize(
    ("changes", "kind", "obstacle"),
    [
        ({"attn_logit_softcapping": 50.0}, "a Hugging Face model of type llama", "attn_logit_softcapping 50.0 in"),
        ({"model_type": "bert"}, "a Hugging Face model of type bert", "model_type bert in config.json cannot be"),
        ({"num_hidden_layers": 3}, "a Hugging Face model of type llama", "config.json says 3 layers, but the weights"),
        (PONDERLM_2 | {"interpolation": True}, "a PonderLM-2 checkpoint, as a Hugging Face", "interpolation True in"),
    ],
)
def test_what_cannot_be_taken_over(inspect, tmp_path, changes, kind, obstacle):
    first, *lines = inspect(save(tmp_path, **changes))
    assert first.startswith(f"{tmp_path}: {kind}")
    assert lines[-1].startswith("  cannot be taken over  ") and obstacle in lines[-1]
    assert not any("  > " in line for line in lines)


def test_ponderlms(inspect, tmp_path):
    first, *lines = inspect(save(tmp_path / "released", **PONDERLM_2))
    assert first.endswith(": a PonderLM-2 checkpoint, as a Hugging Face model of type llama")
    assert "  latent steps  fixed, 3 of them, embeddings × 8.94427" in lines
    export(weights_of(small_model()), small_config(), None, tmp_path / "exported")
    first, *lines = inspect(tmp_path / "exported")
    assert first.endswith(": a PonderLM, exported for Hugging Face")
    assert "  latent steps  adaptive, 2 of them, embeddings × 8.94427" in lines


def test_checkpoints_and_runs(inspect, tmp_path):
    weights, config = import_pretrained(save(tmp_path / "theirs"), ["--ponder.mode", "fixed"])
    run = tmp_path / "a run"
    checkpoint = run / "checkpoints" / "step-00000000"
    write_weights_checkpoint(checkpoint, weights, config, None)
    first, *lines = inspect(checkpoint)
    assert first == f"{checkpoint}: a checkpoint"
    assert "  holds         weights alone, to start from" in lines
    assert inspect(checkpoint.parent)[0].endswith(": a folder of checkpoints, of which step-00000000 counts")
    (run / "config.yaml").write_text(to_yaml(config))
    shutil.copytree(checkpoint, tmp_path / "damaged")
    (tmp_path / "damaged" / "config.yaml").unlink()
    with pytest.raises(UserError, match=r"config\.yaml is missing; use another checkpoint, or delete"):
        find(tmp_path / "damaged")
    first, *lines = inspect(run)
    assert first == f"{run}: a run"
    assert f"  > ponder train --config '{run}'/config.yaml --checkpoint.resume auto" in lines
    assert f"  > ponder generate --checkpoint '{run}' --prompt TEXT" in lines


def test_averages_and_configurations(inspect, tmp_path):
    weights, config = import_pretrained(save(tmp_path / "theirs"), ["--ponder.mode", "fixed"])
    write_weights_checkpoint(tmp_path / "one", weights, config, None)
    average([tmp_path / "one"], tmp_path / "averaged", None)
    assert f"  average of    1.0000 × {tmp_path / 'one'}" in inspect(tmp_path / "averaged")
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    first, *lines = inspect(tmp_path / "run.yaml")
    assert first == f"{tmp_path / 'run.yaml'}: a configuration of a run"
    assert lines[-2] == f"  > ponder train --config {tmp_path / 'run.yaml'}"


def test_datasets_and_tokenizers(inspect, corpus):
    for path in (corpus.dataset, f"{corpus.dataset}.bin", f"{corpus.dataset}.idx"):
        first, *lines = inspect(path)
        assert first == f"{path}: a dataset"
        assert f"  > ponder train --data.path {corpus.dataset} ..." in lines
    assert "with 512 tokens, 2 the end" in lines[1]
    first, *lines = inspect(corpus.tokenizer)
    assert first == f"{corpus.tokenizer}: a tokenizer"
    assert "  tokens       512, of which 2 ends documents" in lines


def test_what_is_nothing_that_is_known(ponder, tmp_path):
    assert ponder("inspect", tmp_path / "nowhere").err == f"error: {tmp_path / 'nowhere'} does not exist\n"
    code, _, error = ponder("inspect", tmp_path)
    assert code == 2
    assert error.startswith(f"error: {tmp_path} is nothing that is known here; Hugging Face models, runs, ")
    part = tmp_path / "whole" / "part.json"
    part.parent.mkdir()
    part.touch()
    (part.parent / "config.json").write_text(json.dumps({}))
    assert (
        ponder("inspect", part).err == f"error: {part} is nothing that is known here by itself, but {part.parent} is\n"
    )
    shutil.rmtree(part.parent)
    (tmp_path / "inside").mkdir()
    (tmp_path / "inside" / "config.json").write_text(json.dumps({}))
    assert ponder("inspect", tmp_path).err.endswith("known here, but inside in it is\n")
