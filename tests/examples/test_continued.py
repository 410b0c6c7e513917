"""Continuing pretrained models: the page's commands, every way that is compared, and gradients by pass."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from docs.refresh import link_repository, runner
from megatron_ponder.config import read_config
from megatron_ponder.training.objective import Objective
from tests import REPOSITORY
from tests.models import LEARNED, random_tokens, small_model
from tests.pages import commands

PARETO = REPOSITORY / "examples" / "pareto"
PAGE = REPOSITORY / "docs" / "continued_pretraining.md"
# What needs a network, or an hour.
LEFT_OUT = ("hf download", "python examples/pareto/continued.py")
SMALLER = {"make_llama.py": " --steps 5", "ponder train": " --training.steps 4 --ponder_training.latent_warmup 2"}


@pytest.mark.parametrize("mode", ["fixed", "adaptive"])
def test_gradients_of_passes_add_up_to_the_gradient(mode, monkeypatch):
    monkeypatch.syspath_prepend(PARETO)
    from pass_gradients import Apart, by_pass

    model = small_model(ponder__mode=mode, **LEARNED)
    batches, rule = [random_tokens(2, 8, seed=seed) for seed in (0, 1)], model.rule("soft")
    tokens = sum(batch[:, 1:].numel() for batch in batches)
    loss, norms = by_pass(model, batches, 1, rule)
    wanted = [Objective(model)(batch, 1, rule)[0] for batch in batches]
    assert loss == pytest.approx(sum(each.item() for each in wanted) / tokens)
    assert len(norms) == len(model.passes.plan(1)) and min(norms) > 0

    wanted[0].backward()
    whole, transformer = dict(model.transformer.named_parameters()), model.transformer
    model.transformer = apart = Apart(transformer)
    Objective(model)(batches[0], 1, rule)[0].backward()
    for name, parameter in whole.items():
        torch.testing.assert_close(sum(copy[name].grad for copy in apart.copies), parameter.grad)


def test_every_way_to_continue_is_a_configuration(monkeypatch):
    monkeypatch.syspath_prepend(PARETO)
    from continued import options

    chosen = yaml.safe_load((PARETO / "continued.yaml").read_text())
    for base in chosen["bases"].values():
        for own in chosen["continued"].values():
            read_config(["--config", str(PARETO / "cpu.yaml"), *options(base), *options(chosen["all"]), *options(own)])


@pytest.mark.slow
def test_the_page_leads_from_a_model_to_an_export(tmp_path):
    link_repository(tmp_path)
    for _, command, _ in commands(PAGE):
        if not command.startswith(LEFT_OUT):
            command += "".join(words for name, words in SMALLER.items() if name in command)
            runner(tmp_path)(["bash", "-c", command], None)
    assert (tmp_path / "runs" / "continued-hf" / "modeling_ponderlm.py").exists()
    loads = "import sys; from transformers import AutoModelForCausalLM as M; "
    loads += "print(M.from_pretrained(sys.argv[1], trust_remote_code=True).config.latent_scale)"
    words = [sys.executable, "-c", loads, str(Path("runs") / "continued-hf")]
    assert float(subprocess.run(words, cwd=tmp_path, capture_output=True, check=True, text=True).stdout) == 1
