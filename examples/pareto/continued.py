"""Continue plain models as vanilla, fixed and adaptive ones, with latents of several sizes, and measure what happens.

    python examples/pareto/continued.py --output runs/continued

The same command goes on where it was stopped; what is finished is not done again. The output then holds the plain
models of continued.yaml, what each became when it was exported and imported again, the runs, table.md, and
continued.png: how far the loss of each way lies above that of the first, means of 20 steps. Both have what is finished,
and grow with every run. All of it is done in this process, one run after another. With --untrained the imports are
measured as they are, and untrained.md says what each does to the loss before anything is trained.
"""

import argparse
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import yaml
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from pass_gradients import by_pass
from rich.console import Console
from runs import HERE, SIZES, Run, prepare_data

from megatron_ponder.base.errors import command
from megatron_ponder.base.files import replacing, write_atomically
from megatron_ponder.base.launch import discover
from megatron_ponder.checkpoint.load import load_model
from megatron_ponder.commands.export_hf import main as export_hf
from megatron_ponder.commands.import_hf import main as import_hf
from megatron_ponder.config import Config, load_config, read_config
from megatron_ponder.evaluation.sources import split_batches
from megatron_ponder.hf.starting_point import complete
from megatron_ponder.parallel.process_group import process_group
from megatron_ponder.runs.metrics import of_steps, read_metrics
from megatron_ponder.runs.style import finish, look
from megatron_ponder.training.trainer import train

SAMPLES = 16  # of the validation part, for what is measured here
DEEP = 8  # refinements, beside those of training
MEASURED = ("ponder.latent_scale", "ponder.initial_latent_scale")  # of which an import may find others
AROUND = 20  # steps before and after latents begin, whose means are compared
HEADINGS = ("variant", "scale", "loss before", "jump", "gradient of the passes before", "of R = 8", "largest norm")
HEADINGS += ("gradient of the passes after", "K̂", "loss", "− vanilla", "scale after")
UNTRAINED = ("variant", "scale", "loss", "− vanilla", "gradient of the passes", "of the first and last of R = 8")


@dataclass(frozen=True)
class Continuation:
    """A plain model that is continued in one way.

    Attributes:
        base: the plain model's name.
        start: folder of the imported checkpoint.
        run: that continues it.
    """

    base: str
    start: Path
    run: Run


def options(values: Mapping[str, object]) -> tuple[str, ...]:
    """Keys and values as words of a command line."""
    return tuple(word for key, value in values.items() for word in (f"--{key}", str(value)))


def plan(chosen: dict, output: Path, data: Path) -> tuple[list[Run], list[Continuation]]:
    """The plain models, and their continuations, each way with all of them.

    Args:
        chosen: what continued.yaml says.
        output: folder for what is made.
        data: folder of corpus and tokenizer.
    """
    place = {"data.path": data / "corpus_text_document", "tokenizer.path": data / "tokenizer.model"}
    common = (*options(place), "--checkpoint.resume", "auto")
    bases, continuations = [], []
    for name, values in chosen["bases"].items():
        folder = output / "runs" / name
        words = ("--config", str(SIZES["cpu"]), *common, *options(values), "--training.run_dir", str(folder))
        bases.append(Run(name, 0, words, folder))
    for variant, own in chosen["continued"].items():
        for name, values in chosen["bases"].items():
            start, folder = output / "starts" / f"{name}-{variant}", output / "runs" / f"{name}-{variant}"
            # What the import says of the model, and what the size says of training.
            words = ("--config", str(start / "config.yaml"), "--config", str(SIZES["cpu"]), *common)
            words += options({key: value for key, value in values.items() if key.startswith("model.")})
            words += options(chosen["all"])
            words += options({key: value for key, value in own.items() if key not in MEASURED})
            words += ("--checkpoint.initialize_from", str(start), "--training.run_dir", str(folder))
            continuations.append(Continuation(name, start, Run(variant, 1, words, folder)))
    return bases, continuations


def import_base(base: Run, continuation: Continuation, values: Mapping[str, object], text: Path) -> None:
    """Export the plain model and import it for one way to continue, as a user would who has downloaded it."""
    exported = base.folder.parent.parent / "exports" / base.variant
    if not exported.exists():
        export_hf(["--checkpoint", str(base.folder), "--output", str(exported)])
    if not continuation.start.exists():
        model = {"ponder.latent_steps": 1, "ponder.router_initial_bias": 0.0}
        model |= {key: value for key, value in values.items() if key.startswith("ponder.")}
        words = ("--model", str(exported), "--output", str(continuation.start), *options(model))
        import_hf([*words, *(("--text", str(text)) if "auto" in words else ())])


def measure(folder: Path, dataset: Path, base: Config) -> dict:
    """Loss, gradients by pass, and the factor on latents, of a checkpoint, on what its base was validated on."""
    loaded = load_model(folder)
    loaded = replace(loaded, config=replace(loaded.config, data=base.data, training=base.training))
    loaded.model.requires_grad_(True)
    batches = split_batches(loaded, str(dataset), "valid", SAMPLES).batches
    training, rule = loaded.config.ponder_training, loaded.model.rule("soft", bias=0.0)
    refinements = training.evaluation_refinements
    loss, norms = by_pass(loaded.model, batches, refinements, rule)
    deep = by_pass(loaded.model, batches, DEEP, rule)[1] if loaded.model.passes.iterated else norms
    scale = loaded.model.latent_scale
    number = scale.log.exp().item() if scale.learned else loaded.config.ponder.latent_scale
    return {"loss": loss, "norms": norms, "deep": deep, "scale": number}


def noted(continuation: Continuation, checkpoint: Path, dataset: Path, name: str) -> dict:
    """What was measured of a checkpoint, from a file beside the run if it has been measured before."""
    folder = continuation.run.folder
    path = folder / name
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        base = load_config(folder.with_name(continuation.base) / "config.yaml")
        write_atomically(path, json.dumps(measure(checkpoint, dataset, base)))
    return json.loads(path.read_text(encoding="utf-8"))


def jump(records: Sequence[Mapping], start: int, before: float, plain: float) -> float:
    """How much the loss rises when latents begin, where they begin late, or against the plain model."""
    if not start:
        return before - plain
    losses = [record["cross_entropy"] for record in records]
    return statistics.fmean(losses[start : start + AROUND]) - statistics.fmean(losses[start - AROUND : start])


def row(continuation: Continuation, plain: dict, dataset: Path) -> tuple[list[str], dict]:
    """Cells of one continuation, and what they are made of.

    Args:
        continuation: finished.
        plain: what this gave for the first of the same base; empty for the first.
        dataset: prefix.
    """
    run, records = continuation.run, of_steps(read_metrics(continuation.run.folder))
    before = noted(continuation, continuation.start, dataset, "before.json")
    after = noted(continuation, run.folder, dataset, "after.json")
    final = records[-1]
    loss = final.get("validation_pruned_loss", final["validation_loss"])
    start = load_config(run.folder / "config.yaml").ponder_training.latent_start
    values = {"before": before["loss"], "loss": loss}
    plain = plain or values
    norms = lambda numbers: " ".join(f"{number:.2f}" for number in numbers)
    largest = max(record["grad_norm"] or math.nan for record in records)
    cells = [run.variant, f"{before['scale']:.3f}", f"{before['loss']:.3f}"]
    cells.append(f"{jump(records, start, before['loss'], plain['before']):+.3f}")
    cells += [norms(before["norms"]), norms(before["deep"][-1:] + before["deep"][:1]), f"{largest:.1f}"]
    cells += [norms(after["norms"]), f"{final['validation_mean_latent_steps']:.2f}", f"{loss:.3f}"]
    cells += [f"{loss - plain['loss']:+.3f}", f"{after['scale']:.3f}"]
    return cells, values


def table(continuations: Sequence[Continuation], dataset: Path) -> str:
    """What came of those that are finished, a table for every base, in Markdown."""
    parts = []
    for base in dict.fromkeys(each.base for each in continuations):
        lines, plain = [HEADINGS, ["---"] * len(HEADINGS)], {}
        for each in continuations:
            if each.base == base and (each.start / "config.yaml").exists() and each.run.finished:
                cells, values = row(each, plain, dataset)
                plain = plain or values
                lines.append(cells)
        parts.append(f"{base}\n\n" + "".join("| " + " | ".join(line) + " |\n" for line in lines))
    return "\n".join(parts)


def write(continuations: Sequence[Continuation], output: Path, dataset: Path) -> str:
    """Write table.md and continued.png of those that are finished; the table."""
    found = table(continuations, dataset)
    write_atomically(output / "table.md", found)
    draw(continuations, output / "continued.png")
    return found


def untrained(continuations: Sequence[Continuation], dataset: Path) -> str:
    """What imports compute before they are trained, a table for every base, in Markdown."""
    parts = []
    for base in dict.fromkeys(each.base for each in continuations):
        lines, plain = [UNTRAINED, ["---"] * len(UNTRAINED)], None
        for each in (each for each in continuations if each.base == base):
            found = noted(each, each.start, dataset, "before.json")
            plain = found["loss"] if plain is None else plain
            cells = [each.run.variant, f"{found['scale']:.3f}", f"{found['loss']:.3f}", f"{found['loss'] - plain:+.3f}"]
            cells.append(" ".join(f"{norm:.2f}" for norm in found["norms"]))
            lines.append([*cells, f"{found['deep'][0]:.1e} {found['deep'][-1]:.2f}"])
        parts.append(f"{base}\n\n" + "".join("| " + " | ".join(line) + " |\n" for line in lines))
    return "\n".join(parts)


def draw(continuations: Sequence[Continuation], path: Path) -> None:
    """Draw how far the losses of those that are finished lie above those of the first, a panel for every base."""
    bases = list(dict.fromkeys(each.base for each in continuations))
    figure = Figure(figsize=(6 * len(bases), 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, base in zip(figure.subplots(1, len(bases), squeeze=False)[0], bases, strict=True):
        first, *others = (each.run for each in continuations if each.base == base)
        modes: list[str] = []
        for run in (run for run in others if first.finished and run.finished):
            own, plain = (of_steps(read_metrics(each.folder)) for each in (run, first))
            above = [a["cross_entropy"] - b["cross_entropy"] for a, b in zip(own, plain, strict=True)]
            means = [statistics.fmean(above[at : at + AROUND]) for at in range(len(above) - AROUND + 1)]
            modes.append(load_config(run.folder / "config.yaml").ponder.mode)
            style = look(modes[-1], modes.count(modes[-1]) - 1) | {"markevery": AROUND, "linewidth": 1}
            axes.plot(range(AROUND, len(above) + 1), means, label=run.variant, **style)
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set_title(base)
        finish(axes, "optimiser step", f"loss above {first.variant}'s [nats], {AROUND} steps' mean")
        if modes:
            axes.legend(fontsize=7)
    with replacing(path) as aside:
        figure.savefig(aside, dpi=150, format="png")


@command
def main(argv: Sequence[str]) -> None:
    """Make the data, train plain models, import them, continue, measure, write the table and the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for everything that is made")
    parser.add_argument("--data", type=Path, help="folder of corpus and tokenizer; data/ in the output unless given")
    parser.add_argument("--untrained", action="store_true", help="measure the imports, and continue none")
    arguments = parser.parse_args(argv)
    output, data = arguments.output, arguments.data or arguments.output / "data"
    chosen = yaml.safe_load((HERE / "continued.yaml").read_text(encoding="utf-8"))
    bases, continuations = plan(chosen, output, data)
    prepare_data("cpu", data)
    with process_group(discover()) as device:
        for base in (base for base in bases if not base.finished):
            train(read_config(base.arguments), device)
        text = output / "text"
        if not text.exists():
            with (data / "corpus.jsonl").open(encoding="utf-8") as lines:
                write_atomically(text, json.loads(next(lines))["text"])
        for each in continuations:
            base = next(run for run in bases if run.variant == each.base)
            import_base(base, each, chosen["continued"][each.run.variant], text)
            if not (arguments.untrained or each.run.finished):
                train(read_config(complete(each.run.arguments)), device)
                write(continuations, output, data / "corpus_text_document")
    if arguments.untrained:
        found = untrained(continuations, data / "corpus_text_document")
        write_atomically(output / "untrained.md", found)
    else:
        found = write(continuations, output, data / "corpus_text_document")
    Console(highlight=False).print(found, soft_wrap=True)


if __name__ == "__main__":
    main()
