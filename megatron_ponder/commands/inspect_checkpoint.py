"""Show what is inside a checkpoint, and whether it is whole and finite.

Example:
    ponder inspect-checkpoint --checkpoint runs/tiny

The exit code is 0 if every file is as it was written, nothing is missing and every value is finite, else 2.
"""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from rich.table import Table

from megatron_ponder.base.command_line import Parser
from megatron_ponder.base.counts import counted
from megatron_ponder.base.errors import command
from megatron_ponder.checkpoint.folders import resolve_checkpoint
from megatron_ponder.checkpoint.manifest import read_manifest
from megatron_ponder.checkpoint.summary import FolderEntry, Inspection, folder_entries, inspect


@command
def main(argv: Sequence[str]) -> None:
    """Parse the command line, do it, print what came of it."""
    parser = Parser("inspect-checkpoint", __doc__)
    parser.add_argument("--checkpoint", type=Path, required=True, help="run folder (its latest) or checkpoint folder")
    parser.add_argument("--tensors", action="store_true", help="list every tensor with its type and shape")
    parser.add_argument(
        "--no-verify", action="store_true", help="do not read the contents: no checksums, no search for NaN"
    )
    arguments = parser.parse_args(argv)
    console = Console()
    if not console.is_terminal:
        console.width = 160  # as wide as the tables need, whatever the reader of a pipe takes
    folders = (arguments.checkpoint / "checkpoints", arguments.checkpoint)
    entries = next((found for folder in folders if (found := folder_entries(folder))), [])
    if entries:
        console.print(f"checkpoints in {entries[0].path.parent}", table_of_folder(entries), sep="\n", soft_wrap=True)
    found = inspect_with_bar(resolve_checkpoint(arguments.checkpoint), contents=not arguments.no_verify)
    console.print(found.folder, table_of_checkpoint(found), sep="\n", soft_wrap=True)
    console.print(table_of_files(found, verified=not arguments.no_verify))
    if arguments.tensors:
        console.print(table_of_tensors(found))
    if found.missing:
        shown = ", ".join(found.missing[:4]) + (", …" if len(found.missing) > 4 else "")
        console.print(f"missing: {counted(len(found.missing), 'tensor')} ({shown})")
    for tensor in found.tensors:
        if tensor.nan or tensor.infinite:
            console.print(f"{tensor.kind}/{tensor.name}: {tensor.nan:,} NaN, {tensor.infinite:,} infinite values")
    found.require_sound()


def inspect_with_bar(folder: Path, contents: bool) -> Inspection:
    """Inspect with a bar on stderr, if that is a terminal."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        total = sum(size for size, _ in read_manifest(folder).files.values())
        task = progress.add_task("verifying", total=total)
        return inspect(folder, contents, lambda size: progress.advance(task, size))


def table_of_folder(entries: list[FolderEntry]) -> Table:
    """All checkpoints of a run."""
    table = Table("folder", "step", "samples", "size", "state")
    for entry in entries:
        counts = (
            ("", "")
            if entry.manifest is None
            else (f"{entry.manifest.state.step:,}", f"{entry.manifest.state.samples:,}")
        )
        state = "incomplete or damaged" if entry.manifest is None else "latest" if entry.latest else ""
        if entry.path.name.endswith(".partial"):
            state = "left by a save that did not end; the next save removes it"
        table.add_row(entry.path.name, *counts, decimal(entry.size), state)
    return table


def table_of_checkpoint(found: Inspection) -> Table:
    """One line for each thing that is known of a checkpoint as a whole."""
    manifest, config = found.manifest, found.config
    table = Table(show_header=False)
    table.add_row("step", f"{manifest.state.step:,}")
    table.add_row("samples", f"{manifest.state.samples:,}")
    for folder, share in manifest.averaged.items():
        table.add_row("average of", f"{share:.4f} × {folder}")
    if config is not None:
        counted = manifest.state.tokens
        tokens = manifest.state.samples * config.data.sequence_length if counted is None else counted
        table.add_row("tokens", f"{tokens:,}")
        steps = f"{config.ponder.mode}, {config.ponder.steps} latent steps"
        table.add_row("model", f"{config.model.description}, {steps}")
    table.add_row("parameters", f"{found.parameters:,}")
    types = sorted({tensor.dtype for tensor in found.tensors})
    table.add_row("stored as", ", ".join(types))
    if config is not None:
        table.add_row("trained in", config.training.precision)
    layout = ", ".join(f"{name} {value}" for name, value in manifest.layout.items())
    table.add_row("written by", layout or "unknown layout")
    table.add_row("data fingerprint", manifest.data_fingerprint or "none")
    table.add_row("tokenizer fingerprint", manifest.tokenizer_fingerprint or "none")
    return table


def table_of_files(found: Inspection, verified: bool) -> Table:
    """Every file with its size and whether it is as it was written."""
    table = Table("file", "size", "tensors", "state")
    for file in found.files:
        count = sum(tensor.file == file.name for tensor in found.tensors)
        whole = "whole" if verified else "size as written"
        table.add_row(file.name, decimal(file.size), f"{count:,}" if count else "", file.problem or whole)
    return table


def table_of_tensors(found: Inspection) -> Table:
    """Every parameter with its shape and what there is of it."""
    kinds: dict[tuple[str, str, str], list[str]] = {}
    for tensor in found.tensors:
        shape = " × ".join(map(str, tensor.shape)) or "scalar"
        kinds.setdefault((tensor.name, tensor.dtype, shape), []).append(tensor.kind)
    table = Table("parameter", "type", "shape", "tensors")
    for row, present in kinds.items():
        table.add_row(*row, ", ".join(present))
    return table
