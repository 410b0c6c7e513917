import json
import os
import re
from collections.abc import Iterator

import pytest
import torch
from safetensors.torch import load_file

from megatron_ponder.base.errors import UserError
from megatron_ponder.config import Config
from megatron_ponder.data.tokenizer import load_tokenizer
from megatron_ponder.generation.generate import generate
from megatron_ponder.hf.export import export
from megatron_ponder.hf.modeling_ponderlm import PonderLMForCausalLM
from tests import REPOSITORY
from tests.hf.exported import weights_of
from tests.hf.isolated import Isolated
from tests.models import random_tokens, small_config, small_model

LOAD = """
import json, sys
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

folder = sys.argv[1]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
ids = tokenizer("def main():", return_tensors="pt")
generated = model.generate(**ids, max_new_tokens=6, do_sample=False, return_dict_in_generate=True)
print(json.dumps({
    "model_type": AutoConfig.from_pretrained(folder, trust_remote_code=True).model_type,
    "ids": ids["input_ids"][0].tolist(),
    "logits": model(**ids).logits[0].tolist(),
    "generated": generated.sequences[0].tolist(),
    "executed": generated.past_key_values.executed_steps[0].tolist(),
    "text": tokenizer.decode(generated.sequences[0]),
    "ours": sorted(name for name in sys.modules if name.startswith("megatron_ponder")),
    "pad": model.generation_config.pad_token_id,
    "without_prompt": model.generate(max_new_tokens=3, do_sample=False).tolist(),
    "after_an_end": model.generate(torch.tensor([[2]]), max_new_tokens=3, do_sample=False).tolist(),
}))
"""

# What pipelines of one version or another say of themselves, whatever the model.
PIPELINES = (
    "model-agnostic default",
    "Passing `generation_config` together with generation-related arguments",
    "Both `max_new_tokens`",
    "generation flags are not valid and may be ignored: ['temperature']",
)

USE = """
import json, logging, sys, warnings
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
from transformers.utils import logging as transformers_logging

messages = []
handler = logging.Handler(logging.WARNING)
handler.emit = lambda record: messages.append(record.getMessage())
transformers_logging.get_logger("transformers").addHandler(handler)
folder = sys.argv[1]
load = {"trust_remote_code": True}
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    generator = pipeline("text-generation", model=folder, device="cpu", **load)
    texts = ["def main():", "import"]
    options = {"max_new_tokens": 6, "do_sample": False, "return_full_text": False}
    single = [generator(text, **options)[0]["generated_text"] for text in texts]
    batch = [row[0]["generated_text"] for row in generator(texts, batch_size=2, **options)]
    sampled = generator(texts[0], max_new_tokens=4, do_sample=True, num_return_sequences=3)

    tokenizer = AutoTokenizer.from_pretrained(folder, **load)
    ids = tokenizer(texts[0], return_tensors="pt")
    models = {
        "plain": AutoModelForCausalLM.from_pretrained(folder, **load),
        "placed": AutoModelForCausalLM.from_pretrained(folder, device_map={"": "cpu"}, **load),
        "auto": AutoModelForCausalLM.from_pretrained(folder, device_map="auto", dtype="auto", **load),
        "eager": AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", **load),
        "half": AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **load),
    }
    models["plain"].save_pretrained(sys.argv[2], max_shard_size="200KB")
    tokenizer.save_pretrained(sys.argv[2])
    models["again"] = AutoModelForCausalLM.from_pretrained(sys.argv[2], **load)
    text = AutoTokenizer.from_pretrained(sys.argv[2], **load).decode(models["again"].generate(**ids)[0])
    logits = {name: model(**ids).logits.float() for name, model in models.items()}
print(json.dumps({
    "single": single, "batch": batch, "sampled": len(sampled), "text": text,
    "dtypes": {name: str(model.dtype) for name, model in models.items()},
    "errors": {name: float((got - logits["plain"]).norm() / logits["plain"].norm()) for name, got in logits.items()},
    "messages": [*messages, *(str(item.message) for item in caught)],
}))
"""


# What the blocks of the page leave behind.
TUNED = """
import json
batch = trainer.data_collator([trainer.train_dataset[0], trainer.train_dataset[1]])
print(json.dumps({
    "ends": batch["labels"][:, -1].tolist(),
    "masked": int((batch["labels"] == -100).sum()),
    "special": [[made.bos_token_id, made.eos_token_id, made.pad_token_id] for made in (model.config, tokenizer)],
    "vocabulary": model.lm_head.out_features,
    "pieces": model.config.ponder_pieces,
}))
"""


@pytest.fixture(scope="module")
def isolated(tmp_path_factory) -> Iterator[Isolated]:
    """Python in which transformers loads nothing from the network and keeps its copies to itself."""
    folder = tmp_path_factory.mktemp("isolated")
    keep = {name: os.environ[name] for name in ("PATH", "SYSTEMROOT") if name in os.environ}
    home = {"HF_HOME": str(folder / "home"), "HF_MODULES_CACHE": str(folder / "modules"), "HOME": str(folder)}
    python = Isolated(keep | home | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"})
    yield python
    python.close()


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_an_export_needs_nothing_of_ours(tmp_path, isolated, sentencepiece_model, family):
    options = {"model__vocab_size": 1024, "model__family": family, "inference__threshold": 0.3}
    model = small_model(router_scale=4.0, **options).float()
    config = small_config(**options)
    folder = tmp_path / "exported"
    export(weights_of(model), config, sentencepiece_model, folder)
    got = json.loads(isolated.run(LOAD, [str(folder)], tmp_path).splitlines()[-1])
    assert got["ours"] == []
    assert got["model_type"] == "ponderlm"
    assert got["pad"] == 0
    assert got["without_prompt"] == got["after_an_end"]  # as documents of the training begin

    tokens = torch.tensor([got["ids"]])
    rule = model.rule("hard")
    with torch.no_grad():
        expected = model.head(model.jacobi(tokens, config.ponder_training.evaluation_refinements, rule).output_BLH)[0]
        assert (torch.tensor(got["logits"]) - expected).abs().max() < 1e-5 * expected.abs().max()
        for _ in range(6):
            exact = model.exact(tokens, rule)
            tokens = torch.cat([tokens, model.head(exact.output_BLH[:, -1:]).argmax(-1)], 1)
    assert got["generated"] == tokens[0].tolist()
    assert got["executed"] == exact.routing.executed[0].tolist()
    assert len(set(got["executed"])) > 1
    assert got["text"].startswith("def main():")


def test_what_users_do_with_it(tmp_path, isolated, sentencepiece_model):
    """Pipelines, placement, types, saving again: with the export's own code and no network, and without warnings."""
    options = {"model__vocab_size": 1024, "inference__threshold": 0.3}
    folder = tmp_path / "exported"
    export(
        weights_of(small_model(router_scale=4.0, **options)),
        small_config(**options),
        sentencepiece_model,
        folder,
        max_shard_size="200KB",
    )
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    got = json.loads(isolated.run(USE, [str(folder), str(tmp_path / "again")], tmp_path).splitlines()[-1])
    assert got["single"] == got["batch"]
    assert all(got["single"])
    assert got["sampled"] == 3
    assert got["text"].startswith("def main():" + got["single"][0])
    assert got["dtypes"].pop("half") == "torch.bfloat16"
    assert set(got["dtypes"].values()) == {"torch.float32"}
    assert 1e-4 < got["errors"].pop("half") < 0.3
    assert max(got["errors"].values()) < 1e-5
    expected = (tmp_path / "exported" / "modeling_ponderlm.py").read_bytes()
    assert (tmp_path / "again" / "modeling_ponderlm.py").read_bytes() == expected
    unwanted = [text for text in got["messages"] if not any(known in text for known in PIPELINES)]
    assert unwanted == []


def test_the_page_says_how_to_use_and_tune_it(tmp_path, isolated, sentencepiece_model):
    """All of its Python, one block after another, on an export of another model."""
    page = (REPOSITORY / "docs" / "huggingface.md").read_text(encoding="utf-8")
    blocks = re.findall(r"(?ms)^```python\n(.*?)^```", page)
    options = {"model__vocab_size": 1024, "inference__threshold": 0.1}
    export(
        weights_of(small_model(**options)), small_config(**options), sentencepiece_model, tmp_path / "runs" / "export"
    )
    written, last = isolated.run("".join([*blocks, TUNED]), [], tmp_path).splitlines()[-2:]
    assert (written.startswith("['<|user|>', "), written.endswith("'<|answer|>', '</s>']")) == (True, True)
    got = json.loads(last)
    assert got["ends"] == [2, 2]
    assert got["masked"] > 0
    assert got["special"] == [[2, 2, 0]] * 2
    assert (got["vocabulary"], got["pieces"]) == (1026, 1026)


def test_bfloat16_in_several_files(tmp_path):
    model = small_model()
    export(weights_of(model), small_config(), None, tmp_path, dtype="bfloat16", max_shard_size="20KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 1
    tensors = {name: tensor for path in shards for name, tensor in load_file(path).items()}
    loaded = PonderLMForCausalLM.from_pretrained(tmp_path)
    assert loaded.dtype == torch.bfloat16
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in loaded.state_dict().items())
    assert torch.equal(tensors["lm_head.weight"], model.head.weight.bfloat16())
    assert not list(tmp_path.glob("tokenizer*"))


def test_the_configuration_says_every_feature(tmp_path):
    llama, gpt_neox = tmp_path / "llama", tmp_path / "gpt_neox"
    export(weights_of(small_model(model__num_kv_heads=2)), small_config(model__num_kv_heads=2), None, llama)
    neox = {"model__family": "gpt_neox", "model__rotary_fraction": 0.5, "ponder__mode": "fixed"}
    export(weights_of(small_model(**neox)), small_config(**neox), None, gpt_neox)
    first, second = (json.loads((folder / "config.json").read_text()) for folder in (llama, gpt_neox))
    assert first["auto_map"]["AutoModelForCausalLM"] == "modeling_ponderlm.PonderLMForCausalLM"
    expected = {"model_type": "ponderlm", "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "rope_theta": 10000.0}
    expected |= {"ponder_mode": "adaptive", "ponder_max_steps": 2, "ponder_jacobi_iterations": 3}
    expected |= {"ponder_threshold": 1e-4, "ponder_router_bias": 0.0, "hidden_act": "silu", "intermediate_size": 48}
    assert {name: first[name] for name in expected} == expected
    assert first["embedding_scale"] == small_config().ponder.embedding_scale
    expected = {"rotary_pct": 0.5, "layer_norm_eps": 1e-5, "use_parallel_residual": True, "hidden_act": "gelu"}
    assert {name: second[name] for name in expected} == expected
    assert "rms_norm_eps" not in second
    assert (first["rotary_pct"], first["use_parallel_residual"], second["num_key_value_heads"]) == (1.0, False, 4)
    kinds = [(config["norm"], config["gated_ffn"], config["biases"]) for config in (first, second)]
    assert kinds == [("rms", True, "none"), ("layer", False, "all")]


def test_the_end_of_documents_is_carried(tmp_path, sentencepiece_model):
    options = {"model__vocab_size": 1024, "data__reset_at_eod": "true"}
    model, config = small_model(model__vocab_size=1024, eod_id=2).float(), small_config(**options)
    with pytest.raises(UserError, match=r"trained with data\.reset_at_eod, but the checkpoint has no tokenizer"):
        export(weights_of(model), config, None, tmp_path / "without")
    export(weights_of(model), config, sentencepiece_model, tmp_path / "with")
    loaded = PonderLMForCausalLM.from_pretrained(tmp_path / "with").eval()
    assert loaded.config.ponder_eod_id == 2
    tokens = random_tokens(1, 9)
    tokens[0, 4] = 2
    expected = model.head(model.jacobi(tokens, 3, model.rule("hard")).output_BLH)
    assert (loaded(tokens).logits - expected).abs().max() < 1e-5 * expected.abs().max()


def test_a_vocabulary_larger_than_the_tokenizers(tmp_path, sentencepiece_model):
    """Ids without a piece are likely in this model; neither generation nor the export's gives one, and they agree."""
    options = {"model__vocab_size": 3000, "inference__threshold": 0.3}
    model, tokenizer = small_model(router_scale=4.0, **options).float().eval(), load_tokenizer(sentencepiece_model)
    export(weights_of(model), small_config(**options), sentencepiece_model, tmp_path / "exported")
    exported = PonderLMForCausalLM.from_pretrained(tmp_path / "exported").eval()
    assert (exported.config.ponder_pieces, exported.config.vocab_size) == (1024, 3000)
    prompts = ["import os", "", "def main():"]
    for prompt, ours in zip(prompts, generate(model, prompts, max_new_tokens=12, tokenizer=tokenizer), strict=True):
        ids = torch.tensor([tokenizer.encode(prompt) or [tokenizer.eod_id]])
        options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
        theirs = exported.generate(**({"input_ids": ids} if prompt else {}), **options)[0, ids.shape[1] :].tolist()
        assert theirs == ours.tokens
        assert max(theirs) < 1024
        whole = torch.cat([ids, torch.tensor([theirs])], 1)
        assert int(exported(whole).logits.argmax(-1).max()) >= 1024  # forward leaves logits as they are


def test_the_model_card(tmp_path):
    weights = weights_of(small_model())
    export(weights, small_config(), None, tmp_path / "exported", measured="A table of what was measured.")
    card = (tmp_path / "exported" / "README.md").read_text()
    assert card.endswith("## Evaluation\n\nA table of what was measured.\n")
    assert "from 0 to 2" in card
    assert f"| Parameters | {sum(tensor.numel() for tensor in weights.values()):,} |" in card
    export(weights, small_config(), None, tmp_path / "other")
    assert "No results were given" in (tmp_path / "other" / "README.md").read_text()


@pytest.mark.parametrize("size", ["5", "0.5 XB", "much", "-1GB"])
def test_a_size_of_files_that_is_none_is_refused(tmp_path, size):
    with pytest.raises(UserError, match="write a number with KB, MB, GB or TB: 5GB"):
        export(weights_of(small_model()), small_config(), None, tmp_path / "exported", max_shard_size=size)
    assert not (tmp_path / "exported").exists()


def test_a_taken_folder_is_refused(tmp_path):
    (tmp_path / "kept").write_text("")
    with pytest.raises(UserError, match="exists already; choose another output folder"):
        export(weights_of(small_model()), small_config(), None, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_a_failed_export_leaves_nothing(tmp_path):
    weights = weights_of(small_model())
    output = tmp_path / "exported"
    del weights["router.output.bias"]
    with pytest.raises(UserError, match=r"weights and configuration differ in router\.output\.bias"):
        export(weights, small_config(), None, output)
    weights["router.output.bias"] = torch.ones(9)
    with pytest.raises(UserError, match=r"router\.output\.bias has shape \(9,\), but the configuration says \(3,\)"):
        export(weights, small_config(), None, output)
    weights = weights_of(small_model())
    weights["head.weight"][3, 4] = 3.4e38  # a number in fp32, and none in bf16
    with pytest.raises(UserError, match=r"as bfloat16, lm_head\.weight holds 0 NaN and 1 infinite values"):
        export(weights, small_config(), None, output, dtype="bfloat16")
    weights["head.weight"][3, 4] = torch.nan
    with pytest.raises(UserError, match=r"as float32, lm_head\.weight holds 1 NaN and 0 infinite values"):
        export(weights, small_config(), None, output)
    (tmp_path / "tokenizer.model").write_text("none")
    with pytest.raises(UserError, match="is not a SentencePiece model"):
        export(weights_of(small_model()), Config(), tmp_path / "tokenizer.model", output)
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.model"]
