"""Ranges and paths, declared with the keys: none lacks its own, and each of them holds."""

import dataclasses
import math
import typing

import pytest

from megatron_ponder.base.errors import UserError
from megatron_ponder.cluster.description import Cluster, read_cluster
from megatron_ponder.config import BlendPart, Config, PhaseConfig, read_config
from megatron_ponder.config.declarations import Range, check_ranges, expand_paths, is_path, range_of, written

SECTIONS = {section.name: section.default_factory for section in dataclasses.fields(Config)}
PARTS = {"part of a blend": BlendPart, "phase": PhaseConfig}
# Texts that name no file.
WORDS = {"data.split", "part of a blend.split", "training.time_limit", "logging.wandb_project", "tasks.names"}
CLUSTER_WORDS = {"gpu", "account", "partition", "time", "modules", "environment", "sbatch"}


def leaves(kind: object) -> set:
    """The types of the values that a key may have, or have in it."""
    if typing.get_origin(kind) is typing.Literal:
        return set()
    parts = typing.get_args(kind)
    return set().union(*map(leaves, parts)) if parts else {kind}


def keys() -> list[tuple[str, dataclasses.Field, set]]:
    found = []
    for name, section in (SECTIONS | PARTS).items():
        hints = typing.get_type_hints(section)
        found += [(f"{name}.{item.name}", item, leaves(hints[item.name])) for item in dataclasses.fields(section)]
    return found


NUMERIC = [(key, item, kinds) for key, item, kinds in keys() if kinds & {int, float}]
# A time limit is minutes or a text; see test_config.py.
KEYS_OF_NUMBERS = [entry for entry in NUMERIC if entry[0].partition(".")[0] in SECTIONS and entry[0] not in WORDS]


def test_every_number_has_a_range_and_nothing_else_has_one():
    assert [key for key, item, _ in NUMERIC if range_of(item) is None] == []
    assert [key for key, item, kinds in keys() if range_of(item) and not kinds & {int, float}] == []
    assert len(NUMERIC) > 50


def test_every_text_is_declared_to_be_a_path_or_known_to_be_none():
    undecided = [key for key, item, kinds in keys() if str in kinds and not is_path(item) and key not in WORDS]
    assert undecided == []
    hints = typing.get_type_hints(Cluster)
    names = [item.name for item in dataclasses.fields(Cluster) if str in leaves(hints[item.name]) and not is_path(item)]
    assert set(names) == CLUSTER_WORDS


def outside(item: dataclasses.Field, kinds: set) -> list[float]:
    """Numbers that are not in the range of a field, of the type that it has."""
    allowed = range_of(item)
    wrong = [allowed.low - 1, allowed.high + max(1, allowed.high * 1e-3), -(2**63), 2**63, 10**30]
    wrong += [allowed.low] * allowed.above + [allowed.high] * allowed.below
    if float in kinds:
        wrong = [float(number) for number in wrong] + [math.inf, -math.inf, math.nan, 1e40]
    else:
        wrong = [int(number) for number in wrong]
    return [number for number in wrong if not (allowed.or_zero and number == 0) and number not in (1e30,)]


@pytest.mark.parametrize(("key", "item", "kinds"), KEYS_OF_NUMBERS, ids=[entry[0] for entry in KEYS_OF_NUMBERS])
def test_a_number_outside_its_range_is_refused_with_the_range(key, item, kinds):
    for number in [value for value in outside(item, kinds) if value not in range_of(item)]:
        text = str(number).replace("inf", ".inf").replace("nan", ".nan")
        text = f"[{text}, {text}]" if item.name == "betas" else text
        text = f"[{text}]" if item.name in ("pipeline_layers", "profile_steps", "profile_ranks") else text
        with pytest.raises(UserError) as caught:
            read_config([f"--{key}={text}"])
        assert str(caught.value).startswith(f"{key} is ")
        assert str(caught.value).endswith(f"its range is {range_of(item)}")


@pytest.mark.parametrize(
    ("allowed", "text", "inside", "outside"),
    [
        (Range(1, 2**20), "1 to 1,048,576", [1, 2**20], [0, 2**20 + 1, math.nan]),
        (Range(0, 1, above=True), "above 0 to 1", [1e-9, 1], [0, 1.1]),
        (Range(0, 1, below=True), "0 to below 1", [0, 0.9], [1, -1]),
        (Range(1e-6, 1e9, or_zero=True), "0, or 1e-6 to 1e9", [0, 1e-6], [1e-7, -1e-7, math.inf]),
    ],
)
def test_ranges_in_words(allowed, text, inside, outside):
    assert str(allowed) == text
    assert all(number in allowed for number in inside)
    assert not any(number in allowed for number in outside)


@pytest.mark.parametrize("key", ["training.run_dir", "checkpoint.initialize_from", "data.cache_path"])
def test_an_empty_path_is_refused(key):
    with pytest.raises(UserError, match=f"^{key} is empty; name a file or a folder, or leave it out$"):
        read_config([f"--{key}="])


def test_a_number_without_a_range_is_noticed():
    @dataclasses.dataclass
    class Section:
        key: int = 3

    with pytest.raises(AssertionError, match=r"section\.key is declared without a range"):
        check_ranges(Section(), "section")


PATHS = [(key, item) for key, item, _ in keys() if is_path(item) and key.partition(".")[0] in SECTIONS]


@pytest.mark.parametrize(("key", "item"), PATHS, ids=[entry[0] for entry in PATHS])
def test_the_home_folder_is_expanded_in_every_path(key, item, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    section, _, name = key.partition(".")
    extra = ["--parallel.offload_optimizer=nvme", "--parallel.zero_stage=3"] * (name == "offload_nvme_path")
    extra += ["--tasks.names=[a]"] * (section == "tasks")
    by_name = name == "validation"
    value = "{a: ~/x}" if by_name else "~/x"
    read = getattr(getattr(read_config([f"--{key}={value}", *extra]), section), name)
    assert read == ({"a": f"{tmp_path}/x"} if by_name else f"{tmp_path}/x")


def test_the_home_folder_is_expanded_inside_blends_phases_and_clusters(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    given = ["--data.path", "[0.5, ~/a, 0.5, ~/b]", "--data.phases", "[{first_sample: 5, path: [{path: ~/c}]}]"]
    data = read_config(given).data
    assert [part.path for part in data.path] == [f"{tmp_path}/a", f"{tmp_path}/b"]
    assert data.phases[0].path[0].path == f"{tmp_path}/c"
    (tmp_path / "cluster.yaml").write_text("log_folder: ~/logs\n")
    cluster = read_cluster(["--cluster=~/cluster.yaml", "--container=~/a.sif", "--container_mounts=['~/x:/y']"])
    assert (cluster.log_folder, cluster.container) == (f"{tmp_path}/logs", f"{tmp_path}/a.sif")
    assert cluster.container_mounts == [f"{tmp_path}/x:/y"]


def test_a_configuration_below_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run.yaml").write_text("tokenizer:\n  path: ~/tokenizer.model\n")
    assert read_config(["--config=~/run.yaml"]).tokenizer.path == f"{tmp_path}/tokenizer.model"


def test_what_is_no_path_and_what_nobody_has():
    assert expand_paths(Config()) == Config()
    with pytest.raises(UserError, match="~nobody_has_this_name/x: it is not known where"):
        read_config(["--training.run_dir", "~nobody_has_this_name/x"])


def test_absurd_numbers_are_written_too():
    numbers = [10**400, -(10**5000), 10**12, 1_000_001, 2.5, math.nan]
    assert list(map(written, numbers)) == [
        "a number of 401 digits", "a number of 5001 digits", "1e12", "1,000,001", "2.5", "nan",
    ]  # fmt: skip
