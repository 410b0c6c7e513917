"""How unevenly data and context ranks are loaded by packed passes, and what dealing samples out otherwise would bring.

    python benchmarks/balance.py RUN [--tokens 65536] [--lengths 128 512 2048] [--draws 300]

Reads how many latent steps a trained model takes at every token of its own dataset, whose documents lie one behind the
other. Samples of several lengths are stretches of that. Of a global batch of samples drawn at random, every rank gets
as many; a step waits for the rank that has most slots to run (with ZeRO 3, every micro-batch does). The ratio of most
to mean is that

- as samples come;
- predicted: dealt out by what the tokens' own averages, from the first half of the text, say of the second half, which
  is all that can be known before a step of training that sees every sample once;
- known: dealt out by what they will cost, which nobody knows; no order is much better.

Context ranks have equal shares, tokens in a row, of every sample of a micro-batch, and wait for each other around every
attention. The ratio of most to mean is that of their slots in micro-batches drawn at random.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from megatron_ponder.checkpoint.load import LoadedModel, load_model
from megatron_ponder.data.indexed_dataset import IndexedDataset
from megatron_ponder.parallel.cpu_settings import prepare_cpu

RANKS, SAMPLES = (2, 8, 64), (1, 4, 16)
CONTEXT_RANKS = (2, 4, 8)
BATCH = 16


def steps_of_tokens(loaded: LoadedModel, count: int) -> tuple[np.ndarray, np.ndarray]:
    """So many tokens of documents in random order, and K̂ of each."""
    documents = IndexedDataset(Path(loaded.config.data.path))
    length, order = loaded.config.data.sequence_length, np.random.default_rng(0).permutation(documents.num_documents)
    text = np.concatenate([documents.read_document(int(index)) for index in order])[: count // length * length].astype(
        np.int64
    )
    model, training = loaded.model, loaded.config.ponder_training
    rule, executed = model.rule("hard"), []
    for rows in torch.from_numpy(text).view(-1, length).split(BATCH):
        with torch.no_grad():
            result = model.jacobi(rows, training.evaluation_refinements, rule)
        executed.append(result.routing.executed.flatten())
    return text, torch.cat(executed).numpy()


def slots_of_tokens(loaded: LoadedModel, executed: np.ndarray) -> np.ndarray:
    """Slots that each token runs in all passes of a step, where K̂ is the same in all of them."""
    plan = loaded.model.passes.plan(loaded.config.ponder_training.evaluation_refinements)
    return sum(1 + np.minimum(executed, slots - 1) for slots in plan)


def predicted_slots(text: np.ndarray, slots: np.ndarray) -> np.ndarray:
    """Of every token, the mean of its kind in the first half; of kinds that are not in it, the mean of all."""
    half, kinds = len(text) // 2, int(text.max()) + 1
    counts = np.bincount(text[:half], minlength=kinds)
    sums = np.bincount(text[:half], slots[:half], minlength=kinds)
    return np.where(counts > 0, sums / np.maximum(counts, 1), slots[:half].mean())[text]


def dealt(work: np.ndarray, known: np.ndarray, ranks: int) -> np.ndarray:
    """Work of every rank when samples are dealt out by what is known of them: the largest first, to the least loaded.

    Args:
        work: of the samples of a batch.
        known: of each, what is thought to be its work.
        ranks: that get as many samples each.
    """
    room, load, real = np.full(ranks, len(work) // ranks), np.zeros(ranks), np.zeros(ranks)
    for sample in np.argsort(-known, kind="stable"):
        rank = int(np.argmin(np.where(room > 0, load, np.inf)))
        room[rank], load[rank], real[rank] = room[rank] - 1, load[rank] + known[sample], real[rank] + work[sample]
    return real


def most_to_mean(work: np.ndarray, guess: np.ndarray, ranks: int, samples: int, draws: int) -> tuple[float, ...]:
    """Means over draws of most to mean: as samples come, by what is guessed, by what is known."""
    generator, found = np.random.default_rng(1), []
    for _ in range(draws):
        batch = generator.integers(len(work), size=ranks * samples)
        own, guessed = work[batch], guess[batch]
        loads = (own.reshape(ranks, samples).sum(1), dealt(own, guessed, ranks), dealt(own, own, ranks))
        found.append([load.max() / load.mean() for load in loads])
    return tuple(np.mean(found, 0))


def share_to_mean(slots: np.ndarray, ranks: int, samples: int, draws: int) -> float:
    """Mean over draws of most to mean, of context ranks in a micro-batch of so many samples; slots (samples, L)."""
    shares = slots[:, : slots.shape[1] // ranks * ranks].reshape(len(slots), ranks, -1).sum(2)
    generator = np.random.default_rng(1)
    loads = [shares[generator.integers(len(shares), size=samples)].sum(0) for _ in range(draws)]
    return float(np.mean([load.max() / load.mean() for load in loads]))


def data_table(slots: np.ndarray, guess: np.ndarray, lengths: list[int], draws: int) -> Table:
    """Of data ranks, from slots of every token and what is guessed of them."""
    table, half = Table(title="data ranks: slots of the fullest over the mean"), len(slots) // 2
    for heading in ("tokens", "spread", "guessed", "data ranks", "samples", "as they come", "predicted", "known"):
        table.add_column(heading, justify="right")
    for length in lengths:
        own, guessed = (of[half:][: half // length * length].reshape(-1, length).sum(1) for of in (slots, guess))
        spread, explained = own.std() / own.mean(), np.corrcoef(own, guessed)[0, 1] ** 2
        for ranks in RANKS:
            for samples in SAMPLES:
                shown = (f"{ratio:.3f}" for ratio in most_to_mean(own, guessed, ranks, samples, draws))
                table.add_row(f"{length}", f"{spread:.3f}", f"{explained:.2f}", f"{ranks}", f"{samples}", *shown)
    return table


def context_table(slots: np.ndarray, lengths: list[int], draws: int) -> Table:
    """Of context ranks, from slots of every token."""
    table = Table(title="context ranks: slots of the fullest over the mean")
    for heading in ("tokens", "samples of a micro-batch", *(f"{ranks} ranks" for ranks in CONTEXT_RANKS)):
        table.add_column(heading, justify="right")
    for length in lengths:
        of_samples = slots[: len(slots) // length * length].reshape(-1, length)
        for samples in SAMPLES[:2]:
            ratios = (share_to_mean(of_samples, ranks, samples, draws) for ranks in CONTEXT_RANKS)
            table.add_row(f"{length}", f"{samples}", *(f"{ratio:.3f}" for ratio in ratios))
    return table


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 512, 2048])
    parser.add_argument("--draws", type=int, default=300)
    arguments = parser.parse_args()
    prepare_cpu()
    loaded = load_model(arguments.run)
    text, executed = steps_of_tokens(loaded, arguments.tokens)
    slots = slots_of_tokens(loaded, executed)
    console = Console(width=None if sys.stdout.isatty() else 118)
    console.print(f"{len(text):,} tokens, mean K̂ {executed.mean():.2f}")
    console.print(data_table(slots, predicted_slots(text, slots), arguments.lengths, arguments.draws))
    console.print(context_table(slots, arguments.lengths, arguments.draws))


if __name__ == "__main__":
    main()
