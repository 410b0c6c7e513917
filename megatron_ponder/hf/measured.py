"""Measured figures for the model card, from the files that `ponder evaluate --output` writes."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_ponder.base.errors import UserError

_EVALUATION = {
    "rule, evaluation": lambda row: row["setting"],
    "loss": lambda row: f"{row['cross_entropy']:.4f}",
    "perplexity": lambda row: f"{row['perplexity']:.2f}",
    "bits/byte": lambda row: "–" if row["bits_per_byte"] is None else f"{row['bits_per_byte']:.4f}",
    "latent steps/token": lambda row: f"{row['mean_steps']:.3f}",
    "KV/token": lambda row: f"{row['kv_entries']:.3f}",
    "MFLOPs/token": lambda row: f"{row['flops'] / 1e6:.2f}",
}
_TASK = {
    "task": lambda row: row["task"],
    "metric": lambda row: row["metric"],
    "value": lambda row: f"{row['value']:.4f}",
    "±": lambda row: "–" if row["stderr"] is None else f"{row['stderr']:.4f}",
    "samples": lambda row: f"{row['samples']:,}",
    "shots": lambda row: str(row["shots"]),
}


def measured_section(files: Sequence[Path], checkpoint: str) -> str:
    """What was measured, as Markdown.

    Args:
        files: JSON files; what `ponder evaluate --output` writes, or an object of names and numbers.
        checkpoint: name of the checkpoint that is exported.

    Raises:
        UserError: if a file holds something else, or figures of another checkpoint.
    """
    return "\n\n".join(_section(path, checkpoint) for path in files)


def _section(path: Path, checkpoint: str) -> str:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); give the file that ponder evaluate --output wrote") from None
    if not isinstance(content, dict):
        raise UserError(
            f"{path} must hold a JSON object of measured figures; give the file that ponder evaluate --output wrote"
        )
    if "evaluations" not in content and "tasks" not in content:
        return table(["", ""], [[name, str(value)] for name, value in content.items()])
    if content.get("checkpoint") != checkpoint:
        raise UserError(
            f"{path} has the figures of {content.get('checkpoint')}, but the export is of {checkpoint}; evaluate that"
        )
    try:
        return _evaluation(content) if "evaluations" in content else _tasks(content)
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} lacks figures ({type(error).__name__}: {error}); write it again with ponder evaluate --output"
        ) from None


def _evaluation(content: Mapping) -> str:
    rows = content["evaluations"]
    return (
        f"{content['checkpoint']} on {content['data']}, {rows[0]['tokens']:,} tokens, with {_settings(content)}. "
        "`hard, exact` is the model that `generate` runs; `hard, jacobi(R)` is `forward` without a cache at R "
        "refinements; `soft` keeps every step, with its weight, as in training.\n\n"
    ) + table(list(_EVALUATION), [[show(row) for show in _EVALUATION.values()] for row in rows])


def _tasks(content: Mapping) -> str:
    rows = [[show(row) for show in _TASK.values()] for row in content["tasks"]]
    return (
        f"{content['checkpoint']} under lm-evaluation-harness {content['harness']}, {content['setting']}, with "
        f"{_settings(content)}.\n\n"
    ) + table(list(_TASK), rows)


def _settings(content: Mapping) -> str:
    return f"threshold τ = {content['threshold']:g} and router bias α = {content['router_bias']:g}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '&#124;') for cell in line)} |" for line in lines)
