"""Fine-tuning an export: gradient checkpointing, transformers' Trainer, bf16, LoRA."""

import contextlib
import json
from pathlib import Path

import peft
import pytest
import torch
from transformers import (
    DataCollatorForLanguageModeling,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from megatron_ponder.hf.export import export
from megatron_ponder.hf.modeling_ponderlm import PonderLMForCausalLM
from tests.grids import in_pairs
from tests.hf.exported import hugging_face, weights_of
from tests.models import random_tokens, small_config, small_model

FAMILIES = [{"model__family": "llama", "model__num_kv_heads": 2}, {"model__family": "gpt_neox"}]
STEPS = 12


def gradients(model) -> dict[str, torch.Tensor]:
    got = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    return got


class Saved:
    """Bytes of the different tensors that autograd keeps for the backward pass."""

    def __init__(self) -> None:
        self._sizes: dict[int, int] = {}

    def __enter__(self) -> "Saved":
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor)
        self._hooks.__enter__()
        return self

    def __exit__(self, *error) -> None:
        self._hooks.__exit__(*error)

    def _keep(self, tensor):
        self._sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    @property
    def total(self) -> int:
        return sum(self._sizes.values())


MODES = ["vanilla", "fixed", "adaptive", "pause", "sps", "loop", "ponderlm"]


@pytest.mark.parametrize(("family", "mode", "reentrant"), in_pairs(FAMILIES, MODES, [False, True]))
def test_gradient_checkpointing(family, mode, reentrant):
    """The same gradients from less memory: each layer keeps its input alone, and runs again in the backward pass."""
    twin = hugging_face(small_model(router_scale=4.0, ponder__mode=mode, inference__threshold=0.3, **family)).train()
    tokens, mask = random_tokens(2, 24), torch.ones(2, 24)
    mask[0, :3] = 0
    labels = tokens.masked_fill(mask == 0, -100)
    with Saved() as plain:
        loss = twin(tokens, attention_mask=mask, labels=labels).loss
    loss.backward()
    expected = gradients(twin)
    runs = []
    twin.model.layers[0].mlp.register_forward_pre_hook(lambda *_: runs.append(1))
    twin(tokens, attention_mask=mask, labels=labels)
    passes = len(runs)
    twin.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    assert twin.is_gradient_checkpointing
    with Saved() as less:
        again = twin(tokens, attention_mask=mask, labels=labels).loss
    again.backward()
    assert len(runs) == 3 * passes
    assert less.total < 0.6 * plain.total
    assert abs(again - loss) < 1e-12
    got = gradients(twin)
    assert all((got[name] - tensor).abs().max() < 1e-10 for name, tensor in expected.items())
    twin.gradient_checkpointing_disable()
    runs.clear()
    twin(tokens, labels=tokens).loss.backward()
    assert len(runs) == passes


@pytest.fixture(scope="module")
def material(sentencepiece_model, sources, tmp_path_factory):
    """An adaptive export, its tokenizer, and texts of different lengths."""
    options = {"model__vocab_size": 1024, "inference__threshold": 0.1, "data__sequence_length": 64}
    folder = tmp_path_factory.mktemp("training") / "exported"
    export(weights_of(small_model(**options)), small_config(**options), sentencepiece_model, folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    lines = sources[0].read_text(encoding="utf-8").splitlines()
    texts = ["\n".join(lines[at : at + 2 + at % 3]) for at in range(60, 160, 2)]
    documents = ([*tokenizer(text)["input_ids"][:47], tokenizer.eos_token_id] for text in texts if text.strip())
    return folder, tokenizer, [{"input_ids": ids} for ids in documents]


class StopAt(TrainerCallback):
    """Ends training early, as an interruption does."""

    def __init__(self, step: int) -> None:
        self._step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self._step


def trainer(material, folder: Path, **options) -> Trainer:
    """Fine-tunes the export as users do: padded batches, two of which make a step."""
    exported, tokenizer, samples = material
    set_seed(0)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=5e-3,
        lr_scheduler_type="constant",
        save_steps=STEPS // 2,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **options,
    )
    return Trainer(
        model=PonderLMForCausalLM.from_pretrained(exported),
        args=arguments,
        train_dataset=samples,
        eval_dataset=samples[:8],
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        processing_class=tokenizer,
    )


def losses(run: Trainer) -> list[float]:
    return [record["loss"] for record in run.state.log_history if "loss" in record]


@torch.no_grad()
def end_loss(run: Trainer) -> float:
    """Mean loss of predicting the end of documents, in nats."""
    losses = [run.model(torch.tensor([ids["input_ids"]])).logits[0, -2].log_softmax(-1)[2] for ids in run.eval_dataset]
    return -float(torch.stack(losses).mean())


def test_fine_tuning(material, tmp_path):
    """Loss falls, that of ends too, evaluation works, and a run that was interrupted ends as one that was not."""
    whole = trainer(material, tmp_path / "whole", gradient_checkpointing=True)
    before, end_before = whole.evaluate()["eval_loss"], end_loss(whole)
    whole.train()
    fallen = losses(whole)
    assert len(fallen) == STEPS
    assert sum(fallen[-3:]) / 3 < fallen[0] - 1
    assert whole.evaluate()["eval_loss"] < before - 1
    assert end_loss(whole) < end_before - 1
    predictions = whole.predict(whole.eval_dataset).predictions
    assert predictions.shape[0] == 8  # logits alone, no steps or caches
    assert predictions.shape[2] == 1024

    interrupted = trainer(material, tmp_path / "parts", gradient_checkpointing=True)
    interrupted.add_callback(StopAt(STEPS // 2))
    interrupted.train()
    resumed = trainer(material, tmp_path / "parts", gradient_checkpointing=True)
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed) == pytest.approx(fallen, rel=1e-5)
    expected = whole.model.state_dict()
    assert all(torch.allclose(tensor, expected[name]) for name, tensor in resumed.model.state_dict().items())

    whole.save_model(str(tmp_path / "tuned"))
    loaded = PonderLMForCausalLM.from_pretrained(tmp_path / "tuned")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())
    start = PonderLMForCausalLM.from_pretrained(material[0]).state_dict()
    assert all(not torch.equal(tensor, start[name]) for name, tensor in expected.items())
    assert json.loads((tmp_path / "tuned" / "config.json").read_text())["ponder_threshold"] == 0.1


def test_fine_tuning_in_bfloat16(material, tmp_path):
    """Autocast leaves the router, which decides, in fp32."""
    run = trainer(material, tmp_path, bf16=True)
    types = set()
    run.model.router.register_forward_hook(lambda module, inputs, output: types.add(output.dtype))
    run.model.model.layers[0].mlp.register_forward_hook(lambda module, inputs, output: types.add(output.dtype))
    run.train()
    assert types == {torch.float32, torch.bfloat16}
    assert sum(losses(run)[-3:]) / 3 < losses(run)[0] - 1
    assert {parameter.dtype for parameter in run.model.parameters()} == {torch.float32}


@pytest.mark.parametrize("autocast", [False, True])
def test_the_router_computes_in_fp32(autocast):
    twin = hugging_face(small_model(ponder__router_hidden_size=8).float())
    hidden = torch.randn(3, 32)
    expected = twin.router(hidden)
    context = torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext()
    with context:
        assert torch.equal(twin.router(hidden), expected)
    half = twin.bfloat16().router(hidden.bfloat16())
    assert half.dtype == torch.float32
    assert (half - expected).abs().max() < 0.05 * expected.abs().max()


def test_low_rank_adapters(material):
    """Names are those of LlamaForCausalLM, so that what is written for it works; the router can be trained too."""
    model = PonderLMForCausalLM.from_pretrained(material[0])
    names = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "output", "lm_head"}
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")
    adapted = peft.get_peft_model(model, config)
    tokens = torch.randint(0, 1024, (2, 12), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.Adam([p for p in adapted.parameters() if p.requires_grad], lr=2e-2)
    history = []
    for _ in range(8):
        loss = adapted(tokens, labels=tokens).loss
        loss.backward()
        trained = {name for name, parameter in adapted.named_parameters() if parameter.grad is not None}
        optimizer.step()
        optimizer.zero_grad()
        history.append(loss.item())
    assert history[-1] < history[0] - 0.2
    assert all(".lora_" in name for name in trained)
    assert {name for name in trained if "router.output" in name}
    adapted.eval()
    prompt = tokens[:1, :6]
    expected = adapted.generate(input_ids=prompt, max_new_tokens=4)
    merged = adapted.merge_and_unload()
    assert torch.equal(merged.generate(prompt, max_new_tokens=4), expected)
