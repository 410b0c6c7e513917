"""Datasets, blends and phases in a configuration: what is read, what is kept, what is refused."""

import pytest
import yaml

from megatron_ponder.base.errors import UserError
from megatron_ponder.config import BlendPart, PhaseConfig, load_config, read_config, to_yaml


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
    - {path: data/code, weight: 3e-1, split: [1]}
  valid_path: data/held_out
  phases:
    - first_sample: 1000
      path: [{path: data/code}]
    - {first_sample: 2000, path: data/web}
"""


def test_blends_and_phases_are_read_and_kept(write, tmp_path):
    config = read_config(write(BLEND))
    assert config.data.path == [BlendPart("data/web", 7.0), BlendPart("data/code", 0.3, [1])]
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
        ("path: [{path: a, weight: 0}]", "data.path[0].weight is 0; its range is 1e-9 to 1e12"),
        ("path: [{path: a, weight: -1}]", "data.path[0].weight is -1; its range is"),
        ("path: [{path: a, weight: .nan}]", "data.path[0].weight is nan; its range is"),
        ("path: [{path: a, weight: .inf}]", "data.path[0].weight is inf; its range is"),
        ("path: [{path: a}, {path: a}]", "data.path names a more than once; add the weights up"),
        ("path: [{path: ''}]", "data.path has a dataset without a path"),
        ("valid_path: [{path: a, weight: 0}]", "data.valid_path[0].weight is 0;"),
        ("path: '[a, b'", "data.path is [a, b, which cannot be read (line 1: "),
        (
            "path: [{path: a}, b]",
            "data.path mixes two forms; write a prefix, a list of prefixes, [WEIGHT, PREFIX, ...]",
        ),
        ("path: [0.3, a, b]", "data.path is ['0.3', 'a', 'b'], where weights and prefixes do not take turns; write a"),
        ("path: [0.3, a, b, 0.7]", "where weights and prefixes do not take turns"),
        ("path: [[a]]", "data.path mixes two forms"),
        ("path: 5", "data.path is 5; write a prefix"),
        (
            "path: [{path: a, weight: 30%}]",
            "data.path gives a the weight 30%; weights are shares of their sum;",
        ),
        ("path: [{path: a, weight: heavy}]", "data.path gives a the weight heavy; write a number"),
        ("phases: 5", "data.phases is 5; write a list of phases, [{first_sample: NUMBER, path: PREFIX}, ...]"),
        ("phases: [{path: a}]", "a phase in data.phases has no first_sample; give it one"),
        ("path: [{path: a, wieght: 1}]", "a dataset in data.path has path, weight, split, and no wieght"),
        ("path: [{weight: 1}]", "a dataset in data.path has no path; give it one"),
        ("phases: [{first_sample: 0, path: a}]", "data.phases[0].first_sample is 0; its range is 1 to"),
        (
            "phases: [{first_sample: 9, path: a}, {first_sample: 9, path: b}]",
            "a phase from sample 9 on after one from 9 on",
        ),
        ("phases: [{first_sample: 9, path: ''}]", "the phase from sample 9 on in data.phases has no path; give it one"),
        ("phases: [{first_sample: 9, path: []}]", "the phase from sample 9 on in data.phases has no path; give it one"),
        (
            "phases: [{first_sample: 9, path: [{path: a, weight: 0}]}]",
            "data.phases[0].path[0].weight is 0;",
        ),
        ("cache_path: ''", "data.cache_path is empty; name a file or a folder, or leave it out"),
    ],
)
def test_blends_that_cannot_be(write, data, said):
    with pytest.raises(UserError) as caught:
        read_config(write(f"data:\n  {data}\n"))
    assert said in str(caught.value) and "\n" not in str(caught.value)
    assert caught.value.shared


@pytest.mark.parametrize(
    ("written", "weights"),
    [
        ('["0.3", a, "0.7", b]', (0.3, 0.7)),
        ("[0.3, a, 0.7, b]", (0.3, 0.7)),
        ("[30, a, 70, b]", (30, 70)),
        ("[{path: a, weight: '0.3'}, {path: b, weight: 0.7}]", (0.3, 0.7)),
        ("[a, b]", (1, 1)),
    ],
)
def test_blends_may_be_written_as_megatron_does(write, written, weights):
    expected = [BlendPart(path, weight) for path, weight in zip("ab", weights, strict=True)]
    assert read_config(write(f"data:\n  path: {written}\n")).data.path == expected
    assert read_config(["--data.valid_path", written]).data.valid_path == expected
    phases = f"[{{first_sample: 5, path: {written}}}]"
    assert read_config(["--data.phases", phases]).data.phases == [PhaseConfig(5, expected)]


@pytest.mark.parametrize("text", ["[95, 5, 0]", "95,5,0", "[0.9,0.1]", "1"])
def test_a_split_is_numbers_or_the_text_of_before(text, write):
    split = yaml.safe_load(text) if text.startswith("[") else text
    given = read_config(["--data.split", text, "--data.path", f"[{{path: a, split: {text!r}}}]"]).data
    assert given.split == split
    assert given.path[0].split == split
    kept = read_config(write(to_yaml(read_config(["--data.split", text])))).data
    assert kept.split == split


def test_one_weight_needs_no_list(write):
    assert read_config(write("data: {split: 1, path: [{path: a, split: 1}]}")).data.split == [1]


def test_weights_of_a_split_that_are_none():
    for value, said in {
        "[95, -5]": r"^data\.split is -5; its range is 0 to 1e12$",
        "[95, a]": r"^data\.split is \[95, 'a'\]; write weights of train",
        "[95, ": r"write weights of train, valid and test such as \[969, 30, 1\]$",
    }.items():
        with pytest.raises(UserError, match=said):
            read_config(["--data.split", value])


def test_validation_sets_are_read_and_kept(write, tmp_path):
    text = "{code: data/code, prose: [0.3, data/web, 0.7, data/books], 1: [{path: data/one, split: [0, 1]}]}"
    expected = {
        "code": "data/code",
        "prose": [BlendPart("data/web", 0.3), BlendPart("data/books", 0.7)],
        "1": [BlendPart("data/one", split=[0, 1])],
    }
    config = read_config(["--data.validation", text])
    assert config.data.validation == expected
    assert read_config(write(f"data: {{validation: {text}}}")) == config
    (tmp_path / "kept.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "kept.yaml") == config


@pytest.mark.parametrize(
    ("sets", "said"),
    [
        ("[a]", "data.validation is ['a']; write a name and a dataset for each set, {NAME: PREFIX or blend, ...}"),
        ("{'': a}", 'data.validation has a set of the name ""; names are made of 1 to 64 letters, digits, _ and -'),
        ("{a/b: c}", 'data.validation has a set of the name "a/b"; names are made of'),
        ("{valid: a}", "data.validation has a set of the name valid, which cannot be told from valid; give it another"),
        ("{code: a, Code: b}", "data.validation has a set of the name code, which cannot be told from Code; give it"),
        ("{code: a, code: b}", "`code` is there already"),
        ("{code: }", "data.validation.code has no path; give it one"),
        ("{code: ''}", "data.validation.code has no path; give it one"),
        ("{code: {path: a, wieght: 1}}", "a dataset in data.validation.code has path, weight, split, and no wieght"),
        ("{code: [{path: a, weight: 0}]}", "data.validation.code[0].weight is 0; its range is 1e-9 to 1e12"),
        ("{code: [a, a]}", "data.validation.code names a more than once; add the weights up"),
    ],
)
def test_validation_sets_that_cannot_be(write, sets, said):
    for arguments in (["--data.validation", sets], write(f"data: {{validation: {sets}}}")):
        with pytest.raises(UserError) as caught:
            read_config(arguments)
        assert said in str(caught.value) and "\n" not in str(caught.value)
