"""Generation: what adaptive steps, batches and parallel prompts gain, beside transformers' own loops and the machine.

    python benchmarks/generation.py [--rounds 5] [--threads 2] [--parts adaptive batch transformers prompts]

llama, hidden 256, 6 layers, 4 heads, ffn 688, vocabulary 8192, K = 3, fp32, on the GPU if there is one. Weights are
random, larger than at the start of training, so that latents contract about as those of a trained model do. Everything
that is compared takes turns in one process; ratios are medians over rounds.

    adaptive       tokens/s of 16 sequences over those of fixed mode. The router is a random function of the hidden
                   state; α is set so that the mean K̂ is about what the row says. Slots alone would give (K + 1) / (1 +
                   mean K̂). Between two looks at the clock every case runs the same number of forwards.
    batch          tokens/s of 16 sequences over those of one, and the time of a forward over its floor: the longer of
                   its FLOPs at the rate of a 2048³ product, and its weights and cached keys and values at the speed of
                   reading memory. Then, of requests of all lengths, the share of rows in use while some wait.
    transformers   our time for the same prompts and tokens in theirs: `generate` of the export in fixed mode, and of
                   LlamaForCausalLM in vanilla mode.
    prompts        reading 1,000 tokens slot by slot over sweeps of windows, to the fixed point and with three sweeps
                   after the first.
"""

import argparse
import random
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_ponder.config import Config, read_config
from megatron_ponder.generation.generate import generate
from megatron_ponder.generation.generator import Generator
from megatron_ponder.generation.prefill import Prefill
from megatron_ponder.generation.request import Generation, Request
from megatron_ponder.generation.sequences import Batching
from megatron_ponder.hf.export import export_config
from megatron_ponder.hf.modeling_ponderlm import PonderLMForCausalLM
from megatron_ponder.hf.weights import to_export
from megatron_ponder.model.ponder import PonderLM
from megatron_ponder.model.router import Rule
from megatron_ponder.parallel.cpu_settings import prepare_cpu

sys.path.insert(0, str(Path(__file__).parents[1]))  # the repository

from benchmarks.measuring import SMALL_LLAMA, in_turn, ratio, seconds
from tests.hf.plain_names import to_llama

VOCABULARY, STEPS, BATCH = SMALL_LLAMA["model.vocab_size"], 3, 16
PROMPT, NEW = 32, 64
MEAN_STEPS = (0.5, 1.5, 2.5)
THRESHOLD = 0.5
FORWARDS = 24 * (STEPS + 1)
CONSOLE = Console(width=110)


def build(mode: str, device: torch.device, length: int = 4096) -> tuple[PonderLM, Config]:
    """A model with random weights."""
    values = SMALL_LLAMA | {"model.max_position_embeddings": length, "ponder.mode": mode}
    if mode != "vanilla":
        values["ponder.latent_steps"] = STEPS
    config = read_config([f"--{key}={value}" for key, value in values.items()])
    model, generator = PonderLM(config.model, config.ponder), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.startswith("router.output.weight"):
                parameter.copy_(6 * noise / parameter.shape[1] ** 0.5)
            elif parameter.dim() == 2 and not name.startswith("embedding"):
                parameter.copy_(noise / parameter.shape[1] ** 0.5)
            elif name.startswith("embedding"):
                parameter.copy_(noise / model.ponder_config.embedding_scale)
            elif "norm" in name:
                parameter.fill_(1.0)
    return model.to(device).eval(), config


def prompts(count: int, length: int, seed: int = 0) -> list[list[int]]:
    """Random tokens."""
    return torch.randint(0, VOCABULARY, (count, length), generator=torch.Generator().manual_seed(seed)).tolist()


class Stream:
    """Sequences that go on generating, `FORWARDS` forwards a call.

    Attributes:
        rates: tokens/s of each call.
    """

    def __init__(self, model: PonderLM, sequences: int, rule: Rule | None = None) -> None:
        self.generator = Generator(model, rule=rule, batching=Batching(max_sequences=sequences))
        tokens = model.model_config.max_position_embeddings - PROMPT
        self._sequences = [
            self.generator.submit(Request(tuple(prompt), tokens)) for prompt in prompts(sequences, PROMPT)
        ]
        while self.generator.usage.tokens < sequences:
            self.generator.step()
        self._model, self.rates = model, []

    @property
    def mean_steps(self) -> float:
        """Mean K̂ so far."""
        executed = [step for sequence in self._sequences for step in sequence.generation.executed_steps]
        return statistics.fmean(executed)

    def __call__(self) -> None:
        before = self.generator.usage.tokens
        elapsed = seconds(lambda: [self.generator.step() for _ in range(FORWARDS)])
        self.rates.append((self.generator.usage.tokens - before) / elapsed)

    def work(self) -> tuple[float, float]:
        """FLOPs and bytes of a forward: its slots' matrix products, its weights, its keys and values."""
        model, rows = self._model, len(self._sequences)
        blocks = sum(parameter.numel() for parameter in model.transformer.parameters())
        head, completed = model.head.weight.numel(), 1 / (1 + self.mean_steps)
        config = model.model_config
        cached = self.generator.cached_slots * config.num_layers * 2 * config.num_kv_heads * config.head_size
        flops = 2 * rows * (blocks + completed * head) + 4 * cached / 2
        read_head = 1 - (1 - completed) ** rows if model.ponder_config.mode == "adaptive" else completed
        return flops, 4 * (blocks + read_head * head + cached)


def calibrated(target: float, mean_of: Callable[[Rule], float]) -> Rule:
    """The rule whose α comes nearest to a mean K̂, which rises with it, in jumps where tokens follow each other."""
    low, high, found = -30.0, 30.0, {}
    for _ in range(12):
        rule = Rule("hard", THRESHOLD, (low + high) / 2)
        mean = mean_of(rule)
        found[abs(mean - target)] = rule
        low, high = (rule.bias, high) if mean < target else (low, rule.bias)
    return found[min(found)]


def of_generated(model: PonderLM, rule: Rule) -> float:
    """Mean K̂ of sequences that the model generates."""
    results = generate(model, prompts(BATCH, PROMPT), 16, rule)
    return statistics.fmean(step for result in results for step in result.executed_steps[PROMPT:])


def of_prompt(model: PonderLM, prompt: tuple[int, ...], rule: Rule) -> float:
    """Mean K̂ of the tokens of a prompt."""
    reader = Reader(model, prompt, rule, Prefill())
    reader()
    return statistics.fmean(reader.generation.executed_steps)


def measure_adaptive(device: torch.device, rounds: int) -> None:
    """Part `adaptive`."""
    model = build("adaptive", device)[0]
    streams = {"fixed": Stream(build("fixed", device)[0], BATCH)}
    streams |= {
        f"about {target}": Stream(model, BATCH, calibrated(target, partial(of_generated, model)))
        for target in MEAN_STEPS
    }
    in_turn(streams, rounds)
    table = Table(title=f"adaptive over fixed, {BATCH} sequences")
    for heading in ("steps", "mean K̂", "tokens/s", "over fixed", "of what slots alone would give"):
        table.add_column(heading, justify="left" if heading == "steps" else "right")
    for name, stream in streams.items():
        over = ratio(stream.rates, streams["fixed"].rates)
        mean = stream.mean_steps
        share = over * (1 + mean) / (STEPS + 1)
        table.add_row(name, f"{mean:.2f}", f"{statistics.median(stream.rates):.0f}", f"{over:.2f}", f"{share:.2f}")
    CONSOLE.print(table)


def measure_batch(device: torch.device, rounds: int) -> None:
    """Part `batch`."""
    models = {mode: build(mode, device)[0] for mode in ("vanilla", "fixed", "adaptive")}
    rules = {"adaptive": calibrated(1.5, partial(of_generated, models["adaptive"]))}
    streams = {
        (mode, count): Stream(model, count, rules.get(mode)) for mode, model in models.items() for count in (1, BATCH)
    }
    a, b = (torch.randn(2048, 2048, device=device) for _ in range(2))
    memory = torch.ones(1 << 26, device=device)
    times = in_turn(streams | {"product": lambda: float((a @ b)[0, 0]), "read": lambda: float(memory.sum())}, rounds)
    rate, speed = 2 * 2048**3 / statistics.median(times["product"]), 4 * 2**26 / statistics.median(times["read"])
    title = f"one sequence and {BATCH}; 2048³ product: {rate / 1e9:.0f} GFLOP/s, reading memory: {speed / 1e9:.0f} GB/s"
    table = Table(title=title)
    for heading in ("mode", "sequences", "tokens/s", "over one", "ms a forward", "floor", "over the floor"):
        table.add_column(heading, justify="left" if heading == "mode" else "right")
    for (mode, count), stream in streams.items():
        over = ratio(stream.rates, streams[mode, 1].rates)
        flops, size = stream.work()
        forward = statistics.median(times[mode, count]) / FORWARDS
        floor = max(flops / rate, size / speed)
        tokens = statistics.median(stream.rates)
        milliseconds = (f"{1e3 * forward:.2f}", f"{1e3 * floor:.2f}", f"{forward / floor:.1f}")
        table.add_row(mode, str(count), f"{tokens:.0f}", f"{over:.1f}", *milliseconds)
    CONSOLE.print(table)
    rows = rows_in_use(models["adaptive"], rules["adaptive"])
    CONSOLE.print(f"rows in use while requests wait: {rows:.1%}")


def rows_in_use(model: PonderLM, rule: Rule) -> float:
    """Share of rows, of forwards that began while requests waited."""
    draw = random.Random(0)
    generator = Generator(model, rule=rule, batching=Batching(max_sequences=BATCH))
    for prompt in prompts(4 * BATCH, 64):
        generator.submit(Request(tuple(prompt[: draw.randint(1, 64)]), draw.randint(1, 48)))
    used, forwards = 0, 0
    while not generator.idle:
        waiting, before = generator.waiting, generator.usage
        generator.step()
        if waiting and generator.waiting:
            used += generator.usage.rows - before.rows
            forwards += generator.usage.forwards - before.forwards
    return used / forwards / BATCH


def twins(device: torch.device) -> dict[str, tuple[PonderLM, torch.nn.Module]]:
    """Our model and theirs with the same weights, by mode."""
    fixed, config = build("fixed", device)
    export = PonderLMForCausalLM(export_config(config, None))
    export.load_state_dict(to_export(fixed.state_dict()))
    vanilla, config = build("vanilla", device)
    sizes = config.model
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=sizes.vocab_size, hidden_size=sizes.hidden_size, intermediate_size=sizes.ffn_hidden_size,
            num_hidden_layers=sizes.num_layers, num_attention_heads=sizes.num_heads, rms_norm_eps=sizes.norm_epsilon,
            max_position_embeddings=sizes.max_position_embeddings, rope_theta=sizes.rope_theta,
            bos_token_id=None, eos_token_id=None,
        )
    )  # fmt: skip
    llama.load_state_dict(to_llama(vanilla.state_dict()))
    return {"fixed": (fixed, export.to(device).eval()), "vanilla": (vanilla, llama.to(device).eval())}


def measure_transformers(device: torch.device, rounds: int) -> None:
    """Part `transformers`."""
    actions, tokens = {}, {}

    def ours(key: tuple, model: PonderLM, given: list[list[int]], new: int) -> None:
        tokens[key] = [result.tokens for result in generate(model, given, new)]

    def theirs(key: tuple, model: torch.nn.Module, given: list[list[int]], new: int) -> None:
        ids = torch.tensor(given, device=device)
        options = {"max_new_tokens": new, "do_sample": False, "pad_token_id": 0}
        tokens[key] = model.generate(ids, attention_mask=torch.ones_like(ids), **options)[:, PROMPT:].tolist()

    for mode, pair in twins(device).items():
        for count in (1, BATCH):
            new = NEW if mode == "vanilla" else NEW // (STEPS + 1)
            for run, model in zip((ours, theirs), pair, strict=True):
                key = (mode, count, run.__name__)
                actions[key] = partial(run, key, model, prompts(count, PROMPT), new)
    times = in_turn(actions, rounds)
    table = Table(title=f"prompts of {PROMPT} tokens continued, beside transformers' generate")
    for heading in ("mode", "sequences", "ours [s]", "theirs [s]", "theirs / ours", "same tokens"):
        table.add_column(heading, justify="left" if heading == "mode" else "right")
    for mode, count in dict.fromkeys(key[:2] for key in actions):
        own, other = (mode, count, "ours"), (mode, count, "theirs")
        same = statistics.fmean(a == b for a, b in zip(tokens[own], tokens[other], strict=True))
        medians = [f"{statistics.median(times[key]):.3f}" for key in (own, other)]
        table.add_row(mode, str(count), *medians, f"{ratio(times[other], times[own]):.2f}", f"{same:.0%}")
    CONSOLE.print(table)


class Reader:
    """Reads one prompt and gives one token.

    Attributes:
        generation: the newest result.
        forwards: that it took.
    """

    def __init__(self, model: PonderLM, prompt: tuple[int, ...], rule: Rule | None, prefill: Prefill | None) -> None:
        self._model, self._prompt, self._rule, self._prefill = model, prompt, rule, prefill
        self.generation, self.forwards = Generation([]), 0

    def __call__(self) -> None:
        generator = Generator(self._model, rule=self._rule, batching=Batching(prefill=self._prefill))
        self.generation = generator.submit(Request(self._prompt, 1)).generation
        generator.run()
        self.forwards = generator.usage.forwards


def measure_prompts(device: torch.device, rounds: int, length: int) -> None:
    """Part `prompts`."""
    table = Table(title=f"one prompt of {length} tokens")
    headings = (
        "mode",
        "iterated",
        "mean K̂",
        "slot by slot [s]",
        "sweeps [s]",
        "gain",
        "its forwards",
        "largest difference",
    )
    for heading in headings:
        table.add_column(heading, justify="left" if heading in headings[:2] else "right")
    prompt = tuple(prompts(1, length)[0])
    for mode in ("vanilla", "fixed", "adaptive"):
        model = build(mode, device)[0]
        rule = calibrated(1.5, partial(of_prompt, model, prompt)) if mode == "adaptive" else None
        ways = {"slots": None, "to the fixed point": Prefill(), "three more": Prefill(refinements=3)}
        if mode == "vanilla":  # nothing is iterated
            ways = {"slots": None, "once": Prefill()}
        readers = {name: Reader(model, prompt, rule, prefill) for name, prefill in ways.items()}
        times = in_turn(readers, rounds)
        slots = readers["slots"].generation
        for name, reader in list(readers.items())[1:]:
            difference = abs(slots.log_probabilities[0] - reader.generation.log_probabilities[0])
            if slots.executed_steps != reader.generation.executed_steps:
                difference = float("inf")
            table.add_row(
                mode,
                name,
                f"{statistics.fmean(slots.executed_steps):.2f}",
                *(f"{statistics.median(times[way]):.2f}" for way in ("slots", name)),
                f"{ratio(times['slots'], times[name]):.1f}",
                str(reader.forwards),
                f"{difference:.0e}",
            )
    CONSOLE.print(table)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt-tokens", type=int, default=1000, help="of the part `prompts`")
    parts = {
        "adaptive": measure_adaptive,
        "batch": measure_batch,
        "transformers": measure_transformers,
        "prompts": measure_prompts,
    }
    parser.add_argument("--parts", nargs="+", choices=parts, default=list(parts))
    arguments = parser.parse_args()
    prepare_cpu()
    torch.set_num_threads(arguments.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parts["prompts"] = partial(measure_prompts, length=arguments.prompt_tokens)
    for name in arguments.parts:
        parts[name](device, arguments.rounds if name != "prompts" else min(arguments.rounds, 2))


if __name__ == "__main__":
    main()
