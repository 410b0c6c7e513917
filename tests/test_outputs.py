"""On a full disk every output is the older one or absent, and no file is written in a way that could leave half."""

import ast
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megatron_ponder.base.claims import Claim
from megatron_ponder.base.errors import UserError
from megatron_ponder.base.files import check_output, check_writable, replacing, write_atomically
from megatron_ponder.checkpoint.folders import point_latest
from megatron_ponder.checkpoint.manifest import Manifest, write_manifest
from megatron_ponder.checkpoint.writer import write_weights_checkpoint
from megatron_ponder.config import LoggingConfig
from megatron_ponder.data import dataset_manifest as data_manifest
from megatron_ponder.data.diagnostic import write_corpus, write_tokenizer
from megatron_ponder.evaluation.figures import draw, write_rows
from megatron_ponder.evaluation.report import write_page
from megatron_ponder.hf.export import export
from megatron_ponder.runs.metrics import MetricsLog
from megatron_ponder.runs.plots import plot_training
from tests import REPOSITORY
from tests.damage import full_disk
from tests.evaluation.analyses import analysis_of_small_models
from tests.finished_runs import contents
from tests.models import small_config, small_model

# Full disks -------------------------------------------------------------------------------------------------------


def write_with_library(folder: Path) -> None:
    with replacing(folder / "a.txt") as aside, aside.open("w") as out:
        out.write("content")


def write_figures(folder: Path) -> None:
    analysis = analysis_of_small_models()
    write_page(analysis, draw(analysis.tables, folder), folder, "title", "data")


def write_training_plot(folder: Path) -> None:
    fields = ("cross_entropy", "mean_latent_steps", "grad_norm", "learning_rate")
    record = {"step": 1, **dict.fromkeys(fields, 1.0)}
    if not (folder / "metrics.jsonl").exists():
        (folder / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    plot_training(folder)


def write_data_manifest(folder: Path) -> None:
    content = data_manifest.DatasetManifest("ab" * 32, vocab_size=7, eod_id=2, documents=4, tokens=6, text_bytes=9)
    data_manifest.write_dataset_manifest(folder / "data", content)


def open_metrics(folder: Path) -> None:
    (folder / "metrics.jsonl").exists() or (folder / "metrics.jsonl").write_text('{"step": 1}\n')
    MetricsLog(folder, LoggingConfig(tensorboard=False), 1).close()


WRITERS: list[Callable[[Path], object]] = [
    lambda folder: write_atomically(folder / "a", "content"),
    write_with_library,
    lambda folder: Claim(folder / "claim", "the folder", "choose another").take(),
    lambda folder: write_rows([{"a": 1, "b": 2}], folder / "a.csv"),
    write_figures,
    write_training_plot,
    write_tokenizer,
    lambda folder: write_corpus(folder, documents=2, questions=2),
    lambda folder: write_manifest(folder, Manifest()),
    lambda folder: point_latest(folder, "step-00000001"),
    write_data_manifest,
    open_metrics,
]


@pytest.mark.parametrize("write", WRITERS)
def test_a_full_disk_leaves_what_was_there(tmp_path, write):
    before, new = tmp_path / "before", tmp_path / "new"
    for folder in (before, new):
        folder.mkdir()
    write(before)
    whole = contents(before)
    assert whole
    with full_disk(), pytest.raises((OSError, UserError)):
        write(before)
    assert contents(before) == whole
    (new / "metrics.jsonl").write_bytes(whole["metrics.jsonl"]) if "metrics.jsonl" in whole else None
    with full_disk(), pytest.raises((OSError, UserError)):
        write(new)
    assert contents(new).keys() <= {"metrics.jsonl"}, "nothing empty is left either"


def test_a_full_disk_leaves_no_part_of_a_folder(tmp_path):
    model = small_model()
    weights = {name: parameter.detach().float() for name, parameter in model.named_parameters()}
    with full_disk():
        with pytest.raises((OSError, UserError)):
            write_weights_checkpoint(tmp_path / "a", weights, small_config(), None)
        with pytest.raises((OSError, UserError)):
            export(weights, small_config(), None, tmp_path / "b")
    with full_disk(room=50_000), pytest.raises(UserError, match=r"could not write the weights to .*; free some space"):
        export(weights, small_config(), None, tmp_path / "c")  # for whose other files there is room
    assert list(tmp_path.iterdir()) == []


# What cannot be replaced --------------------------------------------------------------------------------------------


def test_links_go_on_pointing_where_they_do(tmp_path):
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to("real")
    write_atomically(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "new"
    with replacing(tmp_path / "link") as aside:
        aside.write_text("newer")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "newer"


def test_devices_and_pipes_are_written_to(tmp_path):
    read, write = os.pipe()
    link = tmp_path / "stdout"
    link.symlink_to(f"/proc/self/fd/{write}")
    check_output(link)
    write_atomically(link, "one ")
    with replacing(link) as aside:
        aside.write_text("two")
    os.close(write)
    with open(read) as pipe:
        assert pipe.read() == "one two"
    write_atomically(Path(os.devnull), "nothing")
    assert Path(os.devnull).is_char_device()
    assert list(tmp_path.iterdir()) == [link]


def test_what_cannot_be_written_is_found_before_the_work(tmp_path):
    check_output(tmp_path / "a" / "b" / "file")
    check_writable(tmp_path / "c")
    assert [path.name for path in sorted(tmp_path.rglob("*"))] == ["a", "b", "c"]
    with pytest.raises(UserError, match="a is a folder; give the name of a file to write"):
        check_output(tmp_path / "a")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot make the folder"):
        check_output(tmp_path / "file" / "below")
    with pytest.raises(OSError, match=r"Read-only|No such|Permission"):
        check_writable(Path("/proc/self"))


@pytest.mark.parametrize("tool", ["evaluate", "analyze"])
def test_commands_look_at_their_output_first(tool, tmp_path, ponder):
    """Before the checkpoint, which is not there."""
    (tmp_path / "file").touch()
    output = tmp_path / "file" / "below"
    ended = ponder(tool, "--checkpoint", tmp_path / "none", "--output", output)
    assert ended.code == 2
    assert "cannot make the folder" in ended.err


# How files are written ----------------------------------------------------------------------------------------------

# By file and function: why it may write a file by itself.
EXCEPTIONS = {
    ("megatron_ponder/checkpoint/tensor_files.py", "write_tensors"): "in a folder that gets its name when it is whole",
    ("megatron_ponder/data/token_streams.py", "__init__"): "in the folder of work that is not finished",
    ("megatron_ponder/data/shards.py", "finish"): "in a folder that gets its name when it is whole",
    ("megatron_ponder/base/streams.py", "prepare"): "it is standard output",
    ("megatron_ponder/data/tokenizer_training.py", "_check_round_trip"): "in a temporary folder",
    ("megatron_ponder/data/stamps.py", "_write"): "by several processes at once, aside under names of their own",
    ("megatron_ponder/data/index_cache.py", "_write"): "by several processes at once, aside under names of their own",
    ("megatron_ponder/base/claims.py", "_create"): "a claim is there or not, and half of it counts as one",
    ("megatron_ponder/base/claims.py", "_replace"): "by several processes at once, aside under names of their own",
    ("megatron_ponder/generation/results.py", "_drop_torn_line"): "to cut off half a line",
    ("megatron_ponder/runs/lasting_file.py", "_open"): "to append",
}
ATOMIC = ("replacing", "partial_path")


def writes_of(path: Path) -> Iterator[tuple[str, int]]:
    """Function and line of every call that may leave half a file, in a file of source."""
    yield from _writes(ast.parse(path.read_text(encoding="utf-8")), "", False)


def _writes(node: ast.AST, function: str, atomic: bool) -> Iterator[tuple[str, int]]:
    if isinstance(node, ast.FunctionDef):
        function = node.name
    if isinstance(node, ast.With):
        atomic = atomic or any(_called(item.context_expr) in ATOMIC for item in node.items)
    if isinstance(node, ast.Call) and not atomic and _may_write(node):
        yield function, node.lineno
    for child in ast.iter_child_nodes(node):
        yield from _writes(child, function, atomic)


def _called(node: ast.AST) -> str:
    """Name of the function or method that is called."""
    target = node.func if isinstance(node, ast.Call) else None
    return target.attr if isinstance(target, ast.Attribute) else getattr(target, "id", "")


def _may_write(call: ast.Call) -> bool:
    name = _called(call)
    if name == "open":
        given = [*call.args, *(keyword.value for keyword in call.keywords if keyword.arg == "mode")]
        words = [value.value for value in given if isinstance(value, ast.Constant) and isinstance(value.value, str)]
        modes = [word for word in words if set(word) <= set("rwxab+t") and word]
        opens_partial = any(_called(value) == "partial_path" for value in call.args)
        return not opens_partial and any(set(mode) & set("wx+") for mode in modes)
    return name in ("write_text", "write_bytes", "savefig", "tofile", "savetxt", "to_csv")


SOURCES = [
    path for part in ("megatron_ponder", "tools", "examples") for path in sorted((REPOSITORY / part).rglob("*.py"))
]


def test_every_file_is_written_by_the_one_helper():
    found = {
        (path.relative_to(REPOSITORY).as_posix(), function): line
        for path in SOURCES
        for function, line in writes_of(path)
        if path != REPOSITORY / "megatron_ponder" / "base" / "files.py"
    }
    assert sorted(found.keys() - EXCEPTIONS.keys()) == [], (
        "use write_atomically or replacing of megatron_ponder/base/files.py"
    )
    assert sorted(EXCEPTIONS.keys() - found.keys()) == [], "these need no exception any more"


@pytest.mark.parametrize(
    "line",
    [
        'open(path, "w")', 'open(path, mode="xb")', 'path.open("w", encoding="utf-8")', 'path.open("rb+")',
        'path.write_text("a")', "path.write_bytes(b)", "figure.savefig(path, dpi=3)", "array.tofile(path)",
    ],
)  # fmt: skip
def test_the_kinds_of_writing_that_are_found(line, tmp_path):
    source = tmp_path / "a.py"
    source.write_text(f"def write():\n    {line}\n")
    assert list(writes_of(source)) == [("write", 2)]
    for harmless in (
        f"with replacing(a) as path:\n        {line}",
        'open(path, "rb")',
        'open(path, "a")',
        "open(path)",
    ):
        source.write_text(f"def write():\n    {harmless}\n")
        assert list(writes_of(source)) == []
