"""Phases of a run as configurations: what each changes, what goes on, what is refused."""

import pytest

from megatron_ponder.base.errors import UserError
from megatron_ponder.config import load_config, read_config, to_yaml, training_phases

BASE = """
model: {rope_scaling: linear, rope_factor: 3}
data: {path: plain, phases: [{first_sample: 1000, path: later}]}
training:
  steps: 100
  phases:
    - {first_step: 50, sequence_length: 4096, rope_scaling: yarn, rope_factor: 2, rope_original_length: 2048}
    - {first_step: 8e1, rope_theta: 5e5, global_batch_size: 128, path: [0.7, a, 0.3, b]}
"""


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "phases.yaml"
    path.write_text(BASE)
    return read_config(["--config", str(path)])


def test_each_phase_changes_what_it_names_and_keeps_the_rest(config):
    first, longer, last = training_phases(config)
    spans = [(phase.first_step, phase.last_step) for phase in (first, longer, last)]
    assert spans == [(0, 50), (50, 80), (80, 100)]
    lengths = [phase.config.data.sequence_length for phase in (first, longer, last)]
    positions = [phase.config.model.max_position_embeddings for phase in (first, longer, last)]
    assert lengths == positions == [2048, 4096, 4096]
    assert [phase.config.model.rope_scaling for phase in (first, longer, last)] == ["linear", "yarn", "yarn"]
    assert longer.config.model.rope_high_turns == 32  # the usual one of the kind that is given
    assert longer.config.model.rope_attention_factor == pytest.approx(1.0693, abs=1e-4)
    assert longer.config.data.phases == config.data.phases and last.config.data.phases == []
    assert [part.path for part in last.config.data.path] == ["a", "b"]
    assert (last.config.model.rope_theta, last.config.training.global_batch_size) == (5e5, 128)
    assert all(phase.config.training.phases == [] for phase in (first, longer, last))


def test_a_run_without_phases_is_one():
    config = read_config(["--training.steps", "7"])
    assert training_phases(config) == [(0, 7, config)]


def test_they_are_written_and_read_again(config, tmp_path):
    path = tmp_path / "written.yaml"
    path.write_text(to_yaml(config))
    assert load_config(path) == config


@pytest.mark.parametrize(
    ("phases", "said"),
    [
        ("[{first_step: 100, sequence_length: 16}]", "first_step 0 and then 100|100 and then 100"),
        ("[{first_step: 60, sequence_length: 16}, {first_step: 60, rope_theta: 2}]", "first_step 60 and then 60, of"),
        ("[{first_step: 20}]", "from step 20 on: nothing is otherwise; give what is, or leave the phase out"),
        ("[{sequence_length: 16}]", "has no first_step; give it one"),
        ("[{first_step: 20, steps: 3}]", "has first_step, path, .* and no steps"),
        ("[{first_step: 20, rope_factor: 3}]", "from step 20 on: model.rope_factor 3.0 has no meaning with"),
        ("[{first_step: 20, rope_scaling: yarn, rope_factor: 2}]", "on: .* yarn needs model.rope_original_length"),
        (
            "[{first_step: 20, sequence_length: 64, max_position_embeddings: 32}]",
            "from step 20 on: data.sequence_length 64 is longer than model.max_position_embeddings 32",
        ),
        ("[{first_step: 20, sequence_length: 0}]", r"training.phases\[0\].sequence_length is 0; its range is 1 to"),
        ("[{first_step: 20, sequence_length: long}]", "has the sequence_length long; write a whole number"),
        ("[{first_step: 20, sequence_length: 1.5}]", "has the sequence_length 1.5; write a whole number"),
        ("[{first_step: 20, rope_theta: true}]", "has the rope_theta True; write a number"),
        (
            "[{first_step: 20, rope_scaling: more}]",
            "has the rope_scaling more; write one of none, linear",
        ),
        ("[{first_step: 20, path: [1, a, b]}]", "the path of a phase in training.phases is .* do not take turns"),
        ("20", "training.phases is 20; write a list of phases, "),
    ],
)
def test_phases_that_cannot_work_are_refused(phases, said):
    with pytest.raises(UserError, match=said):
        read_config(["--training.steps", "100", "--training.phases", phases])


def test_a_phase_of_data_has_a_number_too():
    with pytest.raises(UserError, match=r"a phase in data.phases has the first_sample some; write a whole number"):
        read_config(["--data.phases", "[{first_sample: some, path: b}]"])
