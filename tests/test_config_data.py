"""Datasets, blends and phases in a configuration: what is read, what is kept, what is refused."""

import pytest

from megatron_ponder.config import BlendPart, PhaseConfig, load_config, read_config, to_yaml
from megatron_ponder.errors import UserError


@pytest.fixture
def write(tmp_path):
    """Write a YAML file and return the arguments that name it."""

    def write_file(text: str) -> list[str]:
        (tmp_path / "config.yaml").write_text(text)
        return ["--config", str(tmp_path / "config.yaml")]

    return write_file


BLEND = """
data:
  path:
    - {path: data/web, weight: 7}
    - {path: data/code, weight: 3e-1, split: "1"}
  valid_path: data/held_out
  phases:
    - first_sample: 1000
      path: [{path: data/code}]
    - {first_sample: 2000, path: data/web}
"""


def test_blends_and_phases_are_read_and_kept(write, tmp_path):
    config = read_config(write(BLEND))
    assert config.data.path == [BlendPart("data/web", 7.0), BlendPart("data/code", 0.3, "1")]
    assert config.data.valid_path == "data/held_out"
    assert config.data.test_path is None
    assert config.data.phases == [PhaseConfig(1000, [BlendPart("data/code", 1.0)]), PhaseConfig(2000, "data/web")]
    (tmp_path / "kept.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "kept.yaml") == config
    assert read_config(["--data.path", "[{path: a}, {path: b, weight: 2}]"]).data.path == [
        BlendPart("a"),
        BlendPart("b", 2.0),
    ]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ("path: [{path: a, weight: 0}]", "data.path gives a the weight 0.0; give it a positive number, or leave"),
        ("path: [{path: a, weight: -1}]", "the weight -1.0; give it a positive number"),
        ("path: [{path: a, weight: .nan}]", "the weight nan; give it a positive number"),
        ("path: [{path: a, weight: .inf}]", "the weight inf; give it a positive number"),
        ("path: [{path: a}, {path: a}]", "data.path names a more than once; add the weights up"),
        ("path: [{path: ''}]", "data.path has a dataset without a path"),
        ("valid_path: [{path: a, weight: 0}]", "data.valid_path gives a the weight 0.0"),
        ("path: '[a, b]'", "data.path [a, b] is not a blend; write [{path: PREFIX, weight: NUMBER}, ...]"),
        ("path: [{path: a, wieght: 1}]", "wieght"),
        ("path: [{weight: 1}]", "path"),
        ("phases: [{first_sample: 0, path: a}]", "a phase from sample 0 on after one from 0 on; give phases in rising"),
        (
            "phases: [{first_sample: 9, path: a}, {first_sample: 9, path: b}]",
            "a phase from sample 9 on after one from 9 on",
        ),
        ("phases: [{first_sample: 9, path: ''}]", "the phase from sample 9 on in data.phases has no path; give it one"),
        ("phases: [{first_sample: 9, path: []}]", "the phase from sample 9 on in data.phases has no path; give it one"),
        (
            "phases: [{first_sample: 9, path: [{path: a, weight: 0}]}]",
            "the path of the phase from sample 9 on gives a the weight 0.0",
        ),
        ("cache_path: ''", "data.cache_path is empty; name a folder, or leave it out"),
    ],
)
def test_blends_that_cannot_be(write, data, said):
    with pytest.raises(UserError) as caught:
        read_config(write(f"data:\n  {data}\n"))
    assert said in str(caught.value) and "\n" not in str(caught.value)
    assert caught.value.shared
