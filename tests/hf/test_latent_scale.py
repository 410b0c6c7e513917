"""Latents of the size of embeddings: what `auto` measures, against transformers' own numbers."""

import shutil

import pytest
import torch

from megatron_ponder.base.errors import UserError
from megatron_ponder.checkpoint.writer import write_weights_checkpoint
from megatron_ponder.config import read_config
from megatron_ponder.data.tokenizer import load_tokenizer
from megatron_ponder.hf.export import export
from megatron_ponder.hf.pretrained import import_pretrained
from megatron_ponder.hf.starting_point import complete
from megatron_ponder.training.setup import _with_latent_scale
from tests.hf.exported import weights_of
from tests.hf.test_pretrained import gpt_neox, llama
from tests.models import LEARNED, random_tokens, small_config, small_model

FIXED = ["--ponder.mode", "fixed"]
AUTO = ["--ponder.latent_scale", "auto"]


def rms(x):
    return float(x.double().square().mean().sqrt())


@pytest.mark.parametrize("theirs", [lambda: llama(vocab_size=512), lambda: gpt_neox(vocab_size=512)])
@torch.no_grad()
def test_auto_is_embeddings_over_hidden_states(theirs, corpus, tmp_path):
    model = theirs().eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.normal_(2.0)
    model.save_pretrained(tmp_path)
    shutil.copyfile(corpus.tokenizer, tmp_path / corpus.tokenizer.name)
    text = tmp_path / "text"
    text.write_text("import os\n\n\ndef main(argv):\n    return os.path\n" * 20)
    ids = load_tokenizer(corpus.tokenizer).encode(text.read_text())
    tokens = torch.tensor(ids[: len(ids) // 64 * 64]).view(-1, 64)[:8]
    hidden = model(tokens, output_hidden_states=True).hidden_states
    measured = import_pretrained(tmp_path, [*FIXED, *AUTO], text)[1].ponder.latent_scale
    assert measured == pytest.approx(rms(hidden[0]) / rms(hidden[-1]), rel=1e-3)

    unmeasured = import_pretrained(tmp_path, [*FIXED, *AUTO])[1].ponder.latent_scale
    assert unmeasured == pytest.approx(measured, rel=0.3)  # weights alone know no text
    learned = [*FIXED, "--ponder.latent_scale", "learned", "--ponder.initial_latent_scale", "auto"]
    weights, config = import_pretrained(tmp_path, learned, text)
    assert config.ponder.initial_latent_scale == measured
    assert weights["latent_scale.log"].exp().item() == pytest.approx(measured, rel=1e-6)


def test_what_is_given_stands(tmp_path):
    llama().save_pretrained(tmp_path)
    imported = lambda *options: import_pretrained(tmp_path, options)[1].ponder
    assert imported(*FIXED).latent_scale == 1
    assert imported(*FIXED, "--ponder.latent_scale", "0.2").latent_scale == 0.2
    learned = imported("--ponder.latent_scale", "learned", "--ponder.initial_latent_scale", "0.5")
    assert (learned.latent_scale, learned.initial_latent_scale) == ("learned", 0.5)
    for mode in ("vanilla", "pause", "ponderlm"):
        ponder = imported("--ponder.mode", mode, *AUTO, "--ponder.initial_latent_scale", "auto")
        assert (ponder.latent_scale, ponder.initial_latent_scale) == (1, 1)


@pytest.mark.parametrize("scale", [{"ponder__latent_scale": 0.3}, LEARNED])
def test_an_export_keeps_its_own(scale, tmp_path):
    model, config = small_model(**scale), small_config(**scale)
    export(weights_of(model), config, None, tmp_path / "export")
    weights, again = import_pretrained(tmp_path / "export")
    assert again.ponder.latent_scale == config.ponder.latent_scale
    assert weights.keys() == dict(model.named_parameters()).keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in weights_of(model).items())
    assert import_pretrained(tmp_path / "export", ["--ponder.latent_scale", "0.5"])[1].ponder.latent_scale == 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--ponder.mode=pause", "--ponder.latent_scale=0.5"],
            "0.5 has no meaning with ponder.mode pause",
        ),
        (["--ponder.mode=vanilla", "--ponder.latent_scale=learned"], "learned has no meaning with ponder.mode vanilla"),
        (["--ponder.initial_latent_scale=0.5"], "initial_latent_scale 0.5 has no meaning with ponder.latent_scale 1"),
        (["--ponder.latent_scale=0"], r"ponder.latent_scale is 0\.?0?; its range is"),
        (["--ponder.latent_scale=automatic"], "latent_scale"),
    ],
)
def test_scales_that_mean_nothing(options, message):
    with pytest.raises(UserError, match=message):
        read_config(options)


@pytest.mark.parametrize(
    ("options", "message"),
    [(AUTO, "has no tokenizer that reads"), ([], "measure ponder.latent_scale auto on, but that is 1.0")],
)
def test_texts_that_measure_nothing(options, message, tmp_path):
    llama().save_pretrained(tmp_path)
    (tmp_path / "text").write_text("words")
    with pytest.raises(UserError, match=message):
        import_pretrained(tmp_path, options, tmp_path / "text")


@torch.no_grad()
def test_a_scale_of_1_changes_no_bit():
    plain, one = small_model(), small_model(**LEARNED)
    one.load_state_dict(plain.state_dict() | {"latent_scale.log": torch.zeros(1)})
    tokens, rule = random_tokens(2, 9), plain.rule("hard")
    assert torch.equal(plain.jacobi(tokens, 2, rule).output_BLH, one.jacobi(tokens, 2, rule).output_BLH)


def test_auto_is_what_the_start_has(tmp_path):
    """In a run from the model's folder the number that an import measures; later, and from an import, that number."""
    llama().save_pretrained(tmp_path / "model")
    weights, imported = import_pretrained(tmp_path / "model", [*FIXED, *AUTO])
    write_weights_checkpoint(tmp_path / "start", weights, imported, None)
    auto = [*FIXED, *AUTO, "--checkpoint.initialize_from"]
    for start in ("model", "start"):
        config = read_config(complete([*auto, str(tmp_path / start)]))
        assert _with_latent_scale(config).ponder == imported.ponder
    with pytest.raises(UserError, match="auto is measured on a pretrained model; set "):
        _with_latent_scale(read_config(auto[:-1]))
