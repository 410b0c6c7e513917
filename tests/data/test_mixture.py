"""Blends and phases of a configuration: what is opened, what is refused, and what two fingerprints have in common."""

import hashlib
import shutil
from dataclasses import replace

import numpy as np
import pytest

from megatron_ponder.base.errors import UserError
from megatron_ponder.config import BlendPart, DataConfig, PhaseConfig
from megatron_ponder.data.blend import BlendedDataset
from megatron_ponder.data.dataset import TokenDataset
from megatron_ponder.data.dataset_manifest import fingerprint
from megatron_ponder.data.dataset_writer import IndexedDatasetWriter
from megatron_ponder.data.mixture import build_ahead, open_mixture, prefixes, same_past, validation_sets


@pytest.fixture
def paths(tmp_path) -> dict[str, str]:
    """Datasets a, b, c of 40 documents of 10 tokens; tokens of a lie below 1000, of b below 2000, of c below 3000."""
    for number, name in enumerate("abc"):
        with IndexedDatasetWriter(tmp_path / name, np.dtype("<u2")) as writer:
            for document in range(40):
                begun = 1000 * number + 10 * document
                writer.add_document(np.arange(begun, begun + 10))
    return {name: str(tmp_path / name) for name in "abc"}


def plain(path, **others) -> DataConfig:
    return DataConfig(path, **({"split": "8,2", "sequence_length": 5} | others))


def sources(samples, count) -> str:
    return "".join("abc"[int(samples[position][0]) // 1000] for position in range(count))


def test_weights_are_common_unless_a_split_has_its_own(paths):
    blend = [BlendPart(paths["a"], 3), BlendPart(paths["b"], 1)]
    samples = open_mixture(plain(blend), 0).samples
    assert samples.keys() == {"train", "valid"}
    for name in ("train", "valid"):
        drawn = sources(samples[name], 20)
        assert (drawn.count("a"), drawn.count("b")) == (15, 5)
    own = open_mixture(plain(blend, valid_path=[BlendPart(paths["b"]), BlendPart(paths["c"], split="0,1")]), 0).samples
    assert sources(own["train"], 20) == sources(samples["train"], 20)
    drawn = sources(own["valid"], 20)
    assert (drawn.count("b"), drawn.count("c")) == (10, 10)
    held_out, whole = own["valid"].datasets
    assert (held_out.documents, whole.documents) == (range(32, 40), range(40))


def test_a_dataset_without_a_part_in_a_split_is_left_out_of_its_blend(paths):
    blend = [BlendPart(paths["a"]), BlendPart(paths["b"], split="1"), BlendPart(paths["c"], split="0,1")]
    samples = open_mixture(plain(blend), 0).samples
    assert set(sources(samples["train"], 20)) == {"a", "b"}
    assert set(sources(samples["valid"], 20)) == {"a", "c"}


def test_a_validation_set_is_what_training_leaves_of_its_datasets(paths, tmp_path):
    """By the split that applies in training, also to a copy; all of a dataset that training does not read."""
    for ending in ("bin", "idx"):
        shutil.copyfile(f"{paths['a']}.{ending}", tmp_path / f"copy.{ending}")
    sets = {
        "own": paths["a"],
        "copy": str(tmp_path / "copy"),
        "phase": paths["b"],
        "other": paths["c"],
        "some": [BlendPart(paths["c"], split="3,1")],
        "both": [BlendPart(paths["a"]), BlendPart(paths["c"])],
    }
    phases = [PhaseConfig(9, [BlendPart(paths["b"], split=[1, 1])])]
    data = plain(paths["a"], validation=sets, phases=phases)
    samples = open_mixture(data, 0).samples
    documents = {name: samples[name].documents for name in list(sets)[:-1]}
    assert documents == {
        "own": range(32, 40),
        "copy": range(32, 40),
        "phase": range(20, 40),
        "other": range(40),
        "some": range(30, 40),
    }
    assert [part.documents for part in samples["both"].datasets] == [range(32, 40), range(40)]
    assert list(validation_sets(samples, data)) == ["valid", *sets]
    assert open_mixture(replace(data, validation={}), 0).fingerprint == open_mixture(data, 0).fingerprint
    assert prefixes(data) == [*(paths[name] for name in "ab"), str(tmp_path / "copy"), paths["c"]]
    alone = replace(data, split="1", validation={"other": paths["c"]})
    assert list(validation_sets(open_mixture(alone, 0).samples, alone)) == ["other"]


def test_a_blend_of_one_is_the_dataset(paths):
    alone, blend = plain(paths["a"]), plain([BlendPart(paths["a"], 0.3)])
    assert isinstance(open_mixture(blend, 0).samples["train"], TokenDataset)
    assert open_mixture(alone, 0).fingerprint == open_mixture(blend, 0).fingerprint


def test_a_dataset_may_have_a_weight_so_small_that_it_hardly_comes(paths):
    blend = [BlendPart(paths["a"], 1), BlendPart(paths["b"], 1e-12)]
    samples = open_mixture(plain(blend), 0).samples["train"]
    assert sources(samples, 2000).count("b") <= 1
    assert [drawn for _, drawn in samples.streams(2000)] in ([2000, 0], [1999, 1])


def test_a_phase_goes_on_where_its_datasets_were(paths):
    first = [BlendPart(paths["a"]), BlendPart(paths["b"])]
    data = plain(first, phases=[PhaseConfig(40, [BlendPart(paths["b"]), BlendPart(paths["c"])])])
    train = open_mixture(data, 0).samples["train"]
    assert isinstance(train, BlendedDataset)
    drawn = sources(train, 80)
    assert drawn[:40] == sources(open_mixture(plain(first), 0).samples["train"], 40)
    assert [drawn[40:].count(name) for name in "abc"] == [0, 20, 20]
    alone = open_mixture(plain(paths["b"]), 0).samples["train"]
    of_b = [train[position] for position in range(80) if drawn[position] == "b"]
    np.testing.assert_array_equal(np.stack(of_b), np.stack([alone[position] for position in range(40)]))


def test_a_phase_may_follow_a_single_dataset(paths):
    data = plain(paths["a"], phases=[PhaseConfig(7, paths["b"])])
    assert sources(open_mixture(data, 0).samples["train"], 10) == "a" * 7 + "b" * 3
    assert prefixes(data) == [paths["a"], paths["b"]]


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ({"phases": [PhaseConfig(9, [BlendPart("{b}", split="0,1")])]}, "phase from sample 9 on in data.phases leaves"),
        ({"path": [BlendPart("{a}"), BlendPart("{copy}")]}, "copy has the same data as another dataset of its blend"),
        ({"path": [BlendPart("{a}"), BlendPart("{b}", split="999,1")]}, '"999,1" leaves no document of .*b, which has'),
        ({"path": [BlendPart("{a}"), BlendPart("no/such")]}, "no/such.bin does not exist"),
        ({"sequence_length": 90}, "valid part of .*a: sequence longer than the data"),
        ({"validation": {"x": "no/such"}}, "data.validation.x: no/such.bin does not exist"),
        ({"validation": {"x": "{a}"}, "split": "1"}, "data.validation.x: nothing of it is left for validation; name a"),
        ({"validation": {"x": "{copy}"}, "split": "1"}, "data.validation.x: nothing of it is left for validation"),
        (
            {"validation": {"x": [BlendPart("{c}", split="99,1")]}},
            "data.validation.x: .* of .*c, which has 40, for valid",
        ),
        ({"validation": {"x": "{short}"}}, "data.validation.x: valid part of .*short: sequence longer than the data"),
        ({"cache_path": "{a}.bin"}, "cannot write the index cache .*a.bin .*set data.cache_path to another folder"),
    ],
)
def test_what_does_not_fit_is_refused(paths, tmp_path, others, message):
    for ending in ("bin", "idx"):
        shutil.copyfile(f"{paths['a']}.{ending}", tmp_path / f"copy.{ending}")
    known = paths | {name: str(tmp_path / name) for name in ("copy", "short")}
    with IndexedDatasetWriter(tmp_path / "short", np.dtype("<u2")) as writer:
        writer.add_document(np.arange(5))

    def filled(value):
        if isinstance(value, list):
            return [filled(item) for item in value]
        if isinstance(value, dict):
            return {name: filled(item) for name, item in value.items()}
        if isinstance(value, BlendPart | PhaseConfig):
            return replace(value, path=filled(value.path))
        return value.format(**known) if isinstance(value, str) else value

    with pytest.raises(UserError, match=message):
        open_mixture(plain(**{"path": paths["a"]} | {key: filled(value) for key, value in others.items()}), 0)


def test_the_fingerprint_of_a_single_dataset_is_that_of_runs_made_before(paths):
    order = f"{fingerprint(paths['a'])}/8,2/5/3"
    assert open_mixture(plain(paths["a"]), 3).fingerprint == hashlib.sha256(order.encode()).hexdigest()


def test_the_fingerprint_changes_with_what_decides_the_order(paths):
    blend = [BlendPart(paths["a"], 3), BlendPart(paths["b"], 1)]
    data = plain(blend)
    variants = [
        plain([BlendPart(paths["a"], 2), BlendPart(paths["b"], 1)]),
        plain([BlendPart(paths["a"], 3), BlendPart(paths["c"], 1)]),
        plain([BlendPart(paths["a"], 3), BlendPart(paths["b"], 1, split="1")]),
        plain(blend, split="9,1"),
        plain(blend, sequence_length=6),
        plain(paths["a"]),
    ]
    prints = [open_mixture(variant, 0).fingerprint for variant in [data, *variants]] + [
        open_mixture(data, 1).fingerprint
    ]
    assert len(set(prints)) == len(prints)
    same = [
        plain([BlendPart(paths["a"], 0.75), BlendPart(paths["b"], 0.25)]),
        plain([*blend, BlendPart(paths["c"], split="0,1")]),
        plain(blend, valid_path=paths["c"]),
        plain(blend, num_workers=7),
    ]
    assert {open_mixture(variant, 0).fingerprint for variant in same} == {prints[0]}


def test_the_past_is_compared_and_the_future_is_free(paths):
    def of(*phases, path="a", **others):
        return open_mixture(
            plain(paths[path], phases=[PhaseConfig(*phase) for phase in phases], **others), 0
        ).fingerprint

    a, b, c = paths["a"], paths["b"], [BlendPart(paths["c"]), BlendPart(paths["a"])]
    stored = of((100, b), (200, c))
    for samples in (0, 1, 100):
        assert same_past(stored, of(), samples), "neither phase has begun"
        assert same_past(of(), stored, samples)
        assert same_past(stored, of((100, c)), samples)
        assert same_past(stored, of((150, c)), samples)
    for samples in (101, 150, 200):
        assert same_past(stored, of((100, b)), samples)
        assert same_past(stored, of((100, b), (200, a)), samples)
        assert same_past(stored, of((100, b), (300, c)), samples)
        assert not same_past(stored, of(), samples)
        assert not same_past(of(), stored, samples)
        assert not same_past(stored, of((100, c), (200, c)), samples)
        assert not same_past(stored, of((99, b), (200, c)), samples)
    assert not same_past(stored, of((100, b)), 201)
    assert same_past(stored, of((100, b), (200, c), (201, a)), 201)
    for samples in (0, 50, 500):
        assert not same_past(stored, of((100, b), (200, c), path="c"), samples)
        assert not same_past(stored, of((100, b), (200, c), sequence_length=4), samples)


def test_building_ahead_builds_all_that_is_read_and_no_more(paths, tmp_path):
    data = plain([BlendPart(paths["a"], 3), BlendPart(paths["b"], 1)], cache_path=str(tmp_path / "cache"))
    built = list(build_ahead(open_mixture(data, 0), {"train": 200, "valid": 4, "test": 4}))
    per_epoch = (320 - 1) // 5
    assert [(name, dataset.indexed.prefix.name, epochs) for name, dataset, epochs in built] == [
        ("train", "a", -(-150 // per_epoch)),
        ("train", "b", 1),
        ("valid", "a", 1),
        ("valid", "b", 1),
    ]
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").glob("*.index")}
    assert len(before) == 3 + 1 + 2
    samples = open_mixture(data, 0).samples
    cached = [samples["train"][position] for position in range(200)] + [
        samples["valid"][position] for position in range(4)
    ]
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").glob("*.index")} == before
    samples = open_mixture(replace(data, cache_path=None), 0).samples
    plainly = [samples["train"][position] for position in range(200)] + [
        samples["valid"][position] for position in range(4)
    ]
    np.testing.assert_array_equal(np.stack(cached), np.stack(plainly))


def test_other_data_never_find_the_wrong_file(paths, tmp_path):
    cache = tmp_path / "cache"
    variants = [
        (paths["a"], {}, 0),
        (paths["b"], {}, 0),
        (paths["a"], {}, 1),
        (paths["a"], {"split": "7,3"}, 0),
        (paths["a"], {"sequence_length": 6}, 0),
    ]
    for path, others, seed in variants:
        dataset = open_mixture(plain(path, cache_path=str(cache), **others), seed).samples["train"]
        expected = open_mixture(plain(path, **others), seed).samples["train"]
        for position in range(0, 130, 7):
            np.testing.assert_array_equal(dataset[position], expected[position])
    assert len(list(cache.glob("*.index"))) == len(variants) * 3  # epochs
