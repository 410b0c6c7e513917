"""The report on a checkpoint says what is in it, and its exit code whether it is sound."""

from pathlib import Path

import pytest

from megatron_ponder.checkpoint.folders import MANIFEST, checkpoint_name, point_latest
from megatron_ponder.checkpoint.writer import write_weights_checkpoint
from megatron_ponder.parallel.sharding import declarations
from tests.checkpoint.saved import FILES, fields_of, put, save, tensors_of_a_run
from tests.models import small_config, small_model


@pytest.fixture
def inspect(ponder):
    """Runs the command in this process: exit code, output and error output."""

    def inspect(*arguments) -> tuple[int, str, str]:
        ended = ponder("inspect-checkpoint", "--checkpoint", *arguments)
        assert ended.err.count("\n") == (ended.code != 0)
        return ended

    return inspect


def row(output: str, first: str) -> list[str]:
    """The cells of the one row of a table that begins with `first`."""
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in output.splitlines() if "│" in line]
    (found,) = [cells for cells in rows if cells[0] == first]
    return found[1:]


def test_a_sound_checkpoint(inspect, tmp_path):
    tensors = tensors_of_a_run()
    folder = save(tmp_path / "c", tensors)
    code, output, _ = inspect(folder, "--tensors")
    assert code == 0
    count = sum(tensor.numel() for key, tensor in tensors.items() if key.startswith("weight/"))
    told = {
        "step": "7",
        "samples": "56",
        "tokens": "3,584",  # sequences of 64
        "model": "llama, adaptive, 2 latent steps",
        "parameters": f"{count:,}",
        "stored as": "F32",
        "trained in": "bf16",
        "written by": "tensor 2, pipeline 1, data 3, zero_stage 1, precision bf16",
        "data fingerprint": "datafingerprint",
        "tokenizer fingerprint": "none",
        "config.yaml": None,
        "router.output.bias": None,
        "head.weight": None,
    }
    for name, value in told.items():
        assert value is None or row(output, name) == [value]
    for file in FILES:
        size, number, state = row(output, file)
        assert size.endswith(" kB")
        assert (int(number), state) == (len(tensors) // 2 + (len(tensors) % 2 and file == FILES[0]), "whole")
    assert row(output, "head.weight") == ["F32", "61 × 32", "weight, exp_avg, exp_avg_sq"]
    shapes = output[output.index("shape") :]
    assert shapes.index("embedding.weight") < shapes.index("blocks.0.mlp_norm") < shapes.index("blocks.1.mlp_norm")
    assert "missing" not in output
    assert "NaN" not in output


def test_weights_alone_are_whole(inspect, tmp_path):
    weights = {name: parameter.detach() for name, parameter, *_ in declarations(small_model())}
    write_weights_checkpoint(tmp_path / "c", weights, small_config(), None)
    code, output, _ = inspect(tmp_path / "c")
    assert code == 0
    assert row(output, "written by") == ["unknown layout"]
    assert "head.weight" not in output  # only with --tensors


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (Path.unlink, "is missing"),
        (truncate, "bytes where"),
        (flip_a_bit, "is damaged (its checksum differs)"),
    ],
)
@pytest.mark.parametrize("name", [FILES[1], "config.yaml"])
def test_damage_is_shown_and_is_one_line(inspect, tmp_path, name, damage, said):
    folder = save(tmp_path / "c", tensors_of_a_run())
    damage(folder / name)
    code, output, error = inspect(folder)
    assert code == 2
    assert error.startswith(f"error: {folder / name} ")
    assert said in error
    assert said in row(output, name)[-1]
    assert row(output, FILES[0])[-1] == "whole"
    assert row(output, "step") == ["7"]
    if name != "config.yaml":  # without reading the contents only a size can be wrong
        assert inspect(folder, "--no-verify")[0] == (0 if damage is flip_a_bit else 2)


def test_values_that_are_not_finite_are_counted(inspect, tmp_path):
    tensors = tensors_of_a_run()
    tensors["exp_avg_sq/head.weight"][3, :5] = float("nan")
    tensors["exp_avg_sq/head.weight"][4, :2] = -float("inf")
    tensors["weight/transformer.norm.weight"][0] = float("inf")
    folder = save(tmp_path / "c", tensors)
    code, output, error = inspect(folder)
    assert code == 2
    assert "exp_avg_sq/head.weight: 5 NaN, 2 infinite values\n" in output
    assert "weight/transformer.norm.weight: 0 NaN, 1 infinite values\n" in output
    assert output.count(" NaN, ") == 2
    assert "holds" in error
    assert "go on from an older checkpoint" in error
    assert all(row(output, file)[-1] == "whole" for file in FILES)
    assert inspect(folder, "--no-verify")[0] == 0


@pytest.mark.parametrize("gone", ["exp_avg/router.output.bias", "weight/router.output.bias"])
def test_missing_tensors(inspect, tmp_path, gone):
    tensors = tensors_of_a_run()
    del tensors[gone]
    code, output, error = inspect(save(tmp_path / "c", tensors))
    assert code == 2
    assert f"missing: 1 tensor ({gone})\n" in output
    assert f"lacks {gone}; use another checkpoint" in error


def test_a_manifest_that_names_what_is_not_there(inspect, tmp_path):
    folder = save(tmp_path / "c", tensors_of_a_run())
    fields = fields_of(folder)
    key = next(key for key, file in fields["tensors"].items() if file == FILES[0])
    put(folder, fields | {"tensors": fields["tensors"] | {key: FILES[1]}})
    code, output, error = inspect(folder)
    for file in FILES:
        assert (code, row(output, file)[-1]) == (2, f"and the manifest differ in {key}")
    assert f"{folder / FILES[0]} and the manifest differ" in error
    put(folder, fields | {"tensors": fields["tensors"] | {key: "other.safetensors"}})
    assert "other.safetensors is not among its files" in inspect(folder)[2]
    (folder / MANIFEST).write_text("{")
    assert f"{folder / MANIFEST} is damaged (it is no JSON)" in inspect(folder)[2]


def test_a_run_folder_shows_all_its_checkpoints(inspect, tmp_path):
    folder, tensors = tmp_path / "checkpoints", tensors_of_a_run()
    for step in (4, 8, 12):
        save(folder / checkpoint_name(step), tensors, step)
    point_latest(folder, checkpoint_name(8))
    (folder / checkpoint_name(12) / MANIFEST).write_text("{")
    (folder / checkpoint_name(16)).mkdir()
    leftover = folder / f".{checkpoint_name(20)}.partial"
    leftover.mkdir()
    (leftover / FILES[0]).write_bytes(b"0" * 1500)
    for path in (tmp_path, folder):
        code, output, _ = inspect(path)
        assert code == 0
        assert row(output, checkpoint_name(4))[:2] == ["4", "32"]
        assert row(output, checkpoint_name(4))[3] == ""
        assert row(output, checkpoint_name(8))[3] == "latest"
        assert row(output, checkpoint_name(12))[3] == row(output, checkpoint_name(16))[3] == "incomplete or damaged"
        assert row(output, leftover.name) == [
            "",
            "",
            "1.5 kB",
            "left by a save that did not end; the next save removes it",
        ]
        assert row(output, "step") == ["8"]
    assert leftover.name not in inspect(folder / checkpoint_name(4))[1]


def test_a_folder_without_a_checkpoint(inspect, tmp_path):
    (tmp_path / "checkpoints" / f".{checkpoint_name(2)}.partial").mkdir(parents=True)
    code, output, error = inspect(tmp_path)
    assert code == 2
    assert "left by a save that did not end" in output
    assert "holds no complete checkpoint" in error
