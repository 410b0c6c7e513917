"""Keys under the names that they had before: read, with one line that says the new ones."""

import pytest

from megatron_ponder.base.errors import UserError
from megatron_ponder.config import load_config, read_config, to_yaml
from megatron_ponder.config.parsing import KEYS
from megatron_ponder.config.renamed import RENAMED

OLD = """
ponder:
  mode: adaptive
  max_steps: 2
  jacobi_iterations: [1, 2]
  threshold: 0.02
  penalty_weight: 0.1
  penalty_end: 50
  target_steps: 0.5
"""
NEW = """
ponder: {mode: adaptive, latent_steps: 2}
ponder_training: {jacobi_iterations: [1, 2], penalty_weight: 0.1, penalty_end: 50, target_latent_steps: 0.5}
inference: {threshold: 0.02}
"""


@pytest.fixture
def write(tmp_path):
    def write(text: str) -> str:
        (tmp_path / "config.yaml").write_text(text)
        return str(tmp_path / "config.yaml")

    return write


def test_old_names_lead_to_keys_that_exist():
    assert set(RENAMED.values()) <= set(KEYS)
    assert not set(RENAMED) & set(KEYS)


def test_a_file_of_before_says_what_one_of_now_says_with_one_warning(write, capsys):
    old = read_config(["--config", write(OLD)])
    said = capsys.readouterr().err
    assert said.startswith("warning: keys have new names, and are still read under the old ones: ponder.max_steps is ")
    assert said.endswith("ponder.target_steps is ponder_training.target_latent_steps\n")
    assert said.count("\n") == 1
    assert read_config(["--config", write(NEW)]) == old
    assert capsys.readouterr().err == ""
    assert read_config(["--config", write(to_yaml(old))]) == old
    assert capsys.readouterr().err == ""


def test_only_the_first_rank_warns(write, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    read_config(["--config", write(OLD)])
    assert capsys.readouterr().err == ""


def test_what_a_run_folder_keeps_is_read_without_a_word(write, tmp_path, capsys):
    assert load_config(tmp_path / write(OLD)).ponder_training.target_latent_steps == 0.5
    assert capsys.readouterr().err == ""


def test_on_the_command_line_the_later_name_wins(capsys):
    arguments = ["--ponder.threshold=0.1", "--inference.threshold", "0.2"]
    assert read_config(arguments).inference.threshold == 0.2
    assert read_config(["--inference.threshold=0.2", "--ponder.threshold=0.1"]).inference.threshold == 0.1
    assert "ponder.threshold is inference.threshold" in capsys.readouterr().err


def test_a_value_under_an_old_name_is_refused_under_the_new_one():
    with pytest.raises(UserError, match=r"^inference\.threshold is 2; its range is 0 to 1$"):
        read_config(["--ponder.threshold=2"])


def test_one_key_under_both_names_is_refused(write):
    path = write(f"{OLD}\ninference:\n  threshold: 0.02\n")
    with pytest.raises(UserError, match=r"ponder\.threshold and inference\.threshold in .* leave ponder\.thr"):
        read_config(["--config", path])


def test_a_section_without_keys_must_exist_too(write):
    assert read_config(["--config", write("ponder: {}")]) == read_config([])
    with pytest.raises(UserError, match="unknown configuration section pondr"):
        read_config(["--config", write("pondr: {}")])
