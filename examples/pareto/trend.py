"""Whether latent steps pay off later: a plain model at a constant rate, and pairs of runs that branch off from it.

    python examples/pareto/trend.py --output runs/trend --layers 1 2 --at 2000 4000 8000 16000

Where a pair branches off, one of the two gets latent steps for an eighth of the steps so far, or for the share that
--share gives, and the other stays plain for as many operations; the rate of both falls to zero. In the way `fixed`
every token takes all steps, in the way `adaptive` a router decides from a third of the branch on. The models are
those of size cpu with so many layers. The output then holds the runs, and trend.md and trend.png with the losses of
the pairs. The same command goes on where it was stopped, with other layers, steps, shares or seeds too; what is
finished is not done again.
"""

import argparse
import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from costs import training_cost
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from runs import SIZES, Run, prepare_data, train
from tables import spread

from megatron_ponder.base.errors import UserError, command
from megatron_ponder.base.files import replacing, write_atomically
from megatron_ponder.checkpoint.folders import checkpoint_name, checkpoints_in
from megatron_ponder.runs.metrics import of_steps, read_metrics
from megatron_ponder.runs.style import finish, look

WAYS = ("fixed", "adaptive")
HEADINGS = (
    "layers", "way", "trunk", "with latents", "plain", "vanilla", "with them", "− vanilla", "K̂", "time of vanilla's",
)  # fmt: skip


class Pair(NamedTuple):
    """What became of two runs that branched off at one place: last losses, optimiser steps and seconds of both."""

    vanilla: float
    pondering: float
    plain: int
    latent: int
    steps: float
    time: float


class Place(NamedTuple):
    """Where pairs branch off: layers, way of the one with latents, steps of the trunk, share of these with latents."""

    layers: int
    way: str
    at: int
    share: float


def latents(start: int, end: int, decides: bool = False) -> dict[str, int]:
    """When latent steps begin in a run that ends with `end`, never if it starts there, and when a router decides."""
    span = end - start
    router, pruned = (start + span // 3, start + span // 2) if decides else (end, end)
    starts = {"latent": start, "router": router, "penalty": router, "prune": pruned}
    values = {f"ponder_training.{name}_start": step for name, step in starts.items()}
    return values | {"ponder_training.penalty_end": pruned, "ponder_training.latent_warmup": span // 10}


class Trunk:
    """A plain model, and what branches off from it.

    Attributes:
        run: the plain model's.
    """

    def __init__(self, layers: int, seed: int, at: Sequence[int], output: Path, data: Path) -> None:
        """Plan the plain model, whose checkpoints are kept where something branches off."""
        self._name, self._seed, self._output = f"layers{layers}-seed{seed}", seed, output
        self._common = {"model.num_layers": layers, "ponder.mode": "adaptive", "training.seed": seed}
        self._common |= {"data.path": data / "corpus_text_document", "tokenizer.path": data / "tokenizer.model"}
        warmup = min(100, min(at) // 2)
        self._common |= {"optimizer.warmup_fraction": "null", "optimizer.warmup_steps": warmup}
        self._common["optimizer.schedule"] = "wsd"
        self._common |= {"ponder_training.jacobi_iterations": 0, "checkpoint.resume": "auto"}
        self._at, last = at, max(at)
        own = {"checkpoint.interval": math.gcd(*at), "checkpoint.keep": last // math.gcd(*at)}
        self.run = self._planned("trunk", last, latents(last, last) | own | {"optimizer.decay_steps": 0})

    @property
    def finished(self) -> bool:
        """Whether all is there that something branches off from, of a longer run too."""
        saved = {path.name for path in checkpoints_in(self.run.folder / "checkpoints")}
        return saved.issuperset(map(checkpoint_name, self._at))

    def branch(self, place: Place) -> Pair:
        """Train the two runs that branch off there, unless that has been done."""
        at, latent = place.at, round(place.at * place.share)
        pondering = self._branched(place.way, at, latent, latents(at, at + latent, place.way == "adaptive"))
        train([pondering], 1)
        flops, seconds = training_cost(pondering)
        each = of_steps(read_metrics(self.run.folder))[0]["model_flops"]  # of a plain step, all of which are alike
        plain = max(2, round(flops / each))
        vanilla = self._branched("vanilla", at, plain, latents(at + plain, at + plain))
        train([vanilla], 1)
        losses = [read_metrics(run.folder)[-1] for run in (vanilla, pondering)]
        found = [record.get("validation_pruned_loss", record["validation_loss"]) for record in losses]
        steps = losses[1]["validation_mean_latent_steps"]
        return Pair(*found, plain, latent, steps, seconds / training_cost(vanilla)[1])

    def _branched(self, name: str, at: int, steps: int, own: Mapping[str, object]) -> Run:
        """A run of so many further steps, in the second half of which the rate falls."""
        begin = self.run.folder / "checkpoints" / checkpoint_name(at)
        own = own | {"checkpoint.branch_from": begin, "optimizer.decay_steps": steps // 2}
        return self._planned(f"{name}-{at}-{steps}", at + steps, own | {"checkpoint.interval": at + steps})

    def _planned(self, name: str, steps: int, own: Mapping[str, object]) -> Run:
        folder = self._output / "runs" / f"{self._name}-{name}"
        values = self._common | own | {"training.steps": steps, "training.eval_interval": steps}
        words = [f"--{key}={value}" for key, value in (values | {"training.run_dir": folder}).items()]
        return Run(name, self._seed, ("--config", str(SIZES["cpu"]), *words), folder)


def write(pairs: Mapping[Place, Sequence[Pair]], output: Path) -> str:
    """Write trend.md and trend.png.

    Args:
        pairs: of all seeds.
        output: folder for both.

    Returns:
        The table in Markdown.
    """
    lines = [HEADINGS, ["---"] * len(HEADINGS)]
    for place, found in pairs.items():
        vanilla, pondering, plain, latent, steps, time = zip(*found, strict=True)
        above = [pair.pondering - pair.vanilla for pair in found]
        cells = [str(place.layers), place.way, f"{place.at:,}", f"{latent[0]:,}", f"{statistics.fmean(plain):,.0f}"]
        cells += [spread(vanilla), spread(pondering), spread(above)]
        lines.append([*cells, f"{statistics.fmean(steps):.2f}", f"{statistics.fmean(time):.2f}"])
    table = "".join("| " + " | ".join(line) + " |\n" for line in lines)
    write_atomically(output / "trend.md", table)
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.axhline(0, color="black", linewidth=0.8)
    curves: dict[tuple[int, str, float], list[tuple[int, float]]] = {}
    for place, found in pairs.items():
        above = statistics.fmean(pair.pondering - pair.vanilla for pair in found)
        curves.setdefault((place.layers, place.way, place.share), []).append((place.at, above))
    numbers = list(dict.fromkeys((layers, share) for layers, _, share in curves))
    shares, begins = {share for *_, share in curves}, sorted({place.at for place in pairs})
    for (layers, way, share), points in curves.items():
        axes.plot(*zip(*points, strict=True), **look(way, numbers.index((layers, share))))
        name = f"{layers} layer{'s' if layers > 1 else ''}, {way}" + f", share {share:.3g}" * (len(shares) > 1)
        axes.annotate(name, points[-1], (6, 6), textcoords="offset points", va="center", fontsize=8)
    axes.margins(x=0.3)
    axes.set_xscale("log", base=2)
    axes.set_xticks(begins, [f"{at:,}" for at in begins])
    finish(axes, "optimiser steps of the plain model before", "loss above vanilla's at equal operations [nats]")
    with replacing(output / "trend.png") as aside:
        figure.savefig(aside, dpi=150, format="png")
    return table


@command
def main(argv: Sequence[str]) -> None:
    """Make the data, train trunks and what branches off, write the table and the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for everything that is made")
    parser.add_argument("--data", type=Path, help="folder of corpus and tokenizer; data/ in the output unless given")
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 2], help="of the models (default: 1 2)")
    parser.add_argument("--at", type=int, nargs="+", default=[2000, 4000, 8000], help="(default: 2000 4000 8000)")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="(default: fixed adaptive)")
    shares = "with latents, of the plain model's steps before (default: 0.125)"
    parser.add_argument("--share", type=float, nargs="+", default=[0.125], help=shares)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="(default: 0)")
    parser.add_argument("--jobs", type=int, default=1, help="trunks at a time (default: 1)")
    arguments = parser.parse_args(argv)
    at, share = min(arguments.at), min(arguments.share)
    if round(at * share) < 1:
        raise UserError(f"--at {at} with --share {share:g} has no steps; give more of one")
    output, data = arguments.output, arguments.data or arguments.output / "data"
    prepare_data("cpu", data)
    trunks = {
        (layers, seed): Trunk(layers, seed, sorted(arguments.at), output, data)
        for layers in arguments.layers
        for seed in arguments.seeds
    }
    train([trunk.run for trunk in trunks.values() if not trunk.finished], arguments.jobs)
    pairs: dict[Place, list[Pair]] = {}
    for (layers, _), trunk in trunks.items():
        for way, share, at in itertools.product(arguments.ways, arguments.share, sorted(arguments.at)):
            place = Place(layers, way, at, share)
            pairs.setdefault(place, []).append(trunk.branch(place))
            table = write(pairs, output)
    Console(highlight=False).print(table, soft_wrap=True)


if __name__ == "__main__":
    main()
