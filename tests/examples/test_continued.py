"""Continuing pretrained models: the page's commands, every way that is compared, and gradients by pass."""

import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from docs.refresh import link_repository, runner
from megatron_ponder.config import read_config
from megatron_ponder.runs.metrics import of_steps, read_metrics
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
def test_it_trains_imports_continues_and_writes_what_came_of_it(monkeypatch, tmp_path, corpus):
    monkeypatch.syspath_prepend(PARETO)
    import continued

    few = {"training.global_batch_size": 2, "training.micro_batch_size": 2, "training.eval_samples": 4}
    bases = {"small": few | {"ponder.mode": "vanilla", "training.steps": 2, "training.eval_interval": 2}}
    after = few | {"training.steps": 24, "training.eval_interval": 24, "checkpoint.interval": 24}
    late = {"ponder.mode": "fixed", "ponder.latent_scale": "auto", "ponder_training.latent_start": 21}
    ways = {"vanilla": {"ponder.mode": "vanilla"}, "late": late}
    chosen = {"bases": bases, "all": after, "continued": ways}
    (tmp_path / "continued.yaml").write_text(yaml.safe_dump(chosen, sort_keys=False))
    monkeypatch.setattr(continued, "HERE", tmp_path)
    data = tmp_path / "data"
    data.mkdir()
    for ending in ("bin", "idx", "json"):
        shutil.copyfile(f"{corpus.dataset}.{ending}", data / f"corpus_text_document.{ending}")
    shutil.copyfile(corpus.tokenizer, data / "tokenizer.model")
    (data / "corpus.jsonl").write_text(json.dumps({"text": "a text whose latents are measured"}) + "\n")

    continued.main(["--output", str(tmp_path / "out"), "--data", str(data)])
    plain, fixed = (line.split(" | ") for line in (tmp_path / "out" / "table.md").read_text().splitlines()[4:])
    assert (plain[0], plain[3], plain[10]) == ("| vanilla", "+0.000", "+0.000") and fixed[0] == "| late"
    assert 0 < float(fixed[1]) < 1  # the factor that the text asks for
    records = of_steps(read_metrics(tmp_path / "out" / "runs" / "small-late"))
    losses = [record["cross_entropy"] for record in records]
    assert float(fixed[3]) == pytest.approx(statistics.fmean(losses[21:]) - statistics.fmean(losses[1:21]), abs=6e-4)
    assert float(fixed[6]) == pytest.approx(max(record["grad_norm"] for record in records), abs=0.06)
    assert (tmp_path / "out" / "continued.png").stat().st_size > 5000


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
