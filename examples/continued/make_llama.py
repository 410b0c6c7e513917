"""Make a small LLaMA as transformers saves one, with a tokenizer of its own, to stand for a model that is downloaded.

    python examples/continued/make_llama.py --text data/stdlib.jsonl --output downloaded/small

A byte-pair tokenizer is trained on a text, and a model of 0.3 million weights for some hundred steps, by transformers
and tokenizers alone.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from megatron_ponder.base.errors import command

END, PADDING = "</s>", "<pad>"
VOCABULARY, LENGTH, BATCH, RATE = 1024, 128, 8, 3e-3


def train_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """A byte-pair tokenizer of bytes, which gives back any text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=[END, PADDING], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, bos_token=END, pad_token=PADDING)


def train_model(ids: torch.Tensor, eos_id: int, steps: int) -> LlamaForCausalLM:
    """A LLaMA with two key-value heads, trained on random pieces of a text, int64 (tokens,)."""
    sizes = {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 3, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "vocab_size": VOCABULARY, "max_position_embeddings": 2 * LENGTH}
    model = LlamaForCausalLM(LlamaConfig(**sizes, bos_token_id=eos_id, eos_token_id=eos_id))
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=0.1)
    for _ in range(steps):
        starts = torch.randint(len(ids) - LENGTH, (BATCH,)).tolist()
        batch = torch.stack([ids[start : start + LENGTH] for start in starts])
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    print(f"{sum(p.numel() for p in model.parameters()):,} weights, loss {loss:.2f} after {steps} steps")
    return model


@command
def main(argv: Sequence[str]) -> None:
    """Train both and save them as a folder of the Hub has them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="JSON lines with a field text")
    parser.add_argument("--output", type=Path, required=True, help="folder for the model")
    parser.add_argument("--steps", type=int, default=300, help="of training (default: 300)")
    arguments = parser.parse_args(argv)
    torch.manual_seed(0)
    with arguments.text.open(encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line, _ in zip(lines, range(100), strict=False)]
    tokenizer = train_tokenizer(texts)
    ids = [token for text in texts for token in tokenizer(text + END)["input_ids"]]
    model = train_model(torch.tensor(ids), tokenizer.eos_token_id, arguments.steps)
    for saved in (model, tokenizer):
        saved.save_pretrained(arguments.output)


if __name__ == "__main__":
    main()
