"""What is said about a cluster, and what is refused."""

import pytest
import yaml

from megatron_ponder.base.errors import UserError
from megatron_ponder.cluster.description import Cluster, check_cluster, read_cluster
from tests import REPOSITORY


def test_the_example_names_every_key_and_changes_none():
    file = REPOSITORY / "examples" / "slurm" / "cluster.yaml"
    assert yaml.safe_load(file.read_text()).keys() == Cluster.__dataclass_fields__.keys()
    assert read_cluster(["--cluster", str(file)]) == Cluster()


def test_options_win_over_the_file(tmp_path):
    file = tmp_path / "cluster.yaml"
    file.write_text("partition: gpu\nnodes: 2\nenvironment: {NCCL_DEBUG: INFO}\n")
    cluster = read_cluster([f"--cluster={file}", "--nodes", "16", "--time=2-12:00:00", "--modules", "[cuda, gcc]"])
    assert cluster == Cluster(
        partition="gpu", nodes=16, time="2-12:00:00", modules=["cuda", "gcc"], environment={"NCCL_DEBUG": "INFO"}
    )
    assert cluster.ranks == 8


def test_texts_are_what_is_written(tmp_path):
    file = tmp_path / "cluster.yaml"
    file.write_text(
        "time: 24:00:00\naccount: 007\npartition: on\nnodes: 2\nvenv: ~\nlog_folder: 1e3\nmodules: [1.10]\n"
        "environment: {OMP_NUM_THREADS: 1, MODE: 010, TRACE: yes, RATE: 1e-3, 1_0: x, WHEN: 2026-01-01}\n"
    )
    with pytest.raises(UserError, match="1_0"):  # what YAML takes for a number is the name of no variable
        check_cluster(read_cluster(["--cluster", str(file)]))
    file.write_text(file.read_text().replace("1_0: x, ", ""))
    variables = {"OMP_NUM_THREADS": "1", "MODE": "010", "TRACE": "yes", "RATE": "1e-3", "WHEN": "2026-01-01"}
    texts = {"account": "007", "partition": "on", "modules": ["1.10"], "log_folder": "1e3"}
    expected = Cluster(nodes=2, time="24:00:00", environment=variables, **texts)
    assert read_cluster(["--cluster", str(file)]) == expected
    options = ["--environment", "{A: '010'}", "--environment.B=1", "--modules", "['1.10']", "--modules+=2.0"]
    assert read_cluster(options) == Cluster(environment={"A": "010", "B": "1"}, modules=["1.10", "2.0"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cluster", "no/such.yaml"], "no description of a cluster in no/such.yaml"),
        (["--nods", "4"], "a cluster has no nods"),
        (["--nodes", "many"], "nodes"),
        (["--nodes"], "--nodes has no value; write --nodes VALUE"),
        (["nodes=2"], '"nodes=2" is no option; write --key value'),
        (["--environment", "{A: null}"], "environment is null; write keys with text each"),
        (["--environment", "{A: [1"], "environment is {A: .1; write keys with text each"),
        (["--nodes", "0"], "nodes is 0; its range is 1 to"),
        (["--gpus_per_node", "0"], "set ranks_per_node"),
        (["--ranks_per_node", "9"], "each rank needs a GPU"),
        (["--cpus_per_node", "7"], "fewer than the 8 ranks"),
        (["--time", "tomorrow"], "time tomorrow is no time limit"),
        (["--signal_seconds", "0"], "signal_seconds is 0; its range is 1 to"),
        (["--venv", "/nowhere"], "no virtual environment"),
        (["--venv", "/nowhere", "--container", "a.sif"], "give one of them"),
        (["--container=-i"], '"-i" would be taken for an option'),
        (["--container_mounts", "[--writable]"], "would be taken for an option"),
        (["--modules", "[--force]"], "would be taken for an option"),
        (["--partition", "gpu\n#SBATCH --uid=root"], "'gpu.n#SBATCH --uid=root' has a line break or another control"),
        (["--account", "a\tb"], "has a line break or another control character"),
        (["--log_folder", "a\rb"], "has a line break or another control character"),
        (["--account", "a\\b"], "has a backslash, which sbatch reads in its own way"),
        (["--environment", '{"A;touch x;B": "1"}'], 'environment has "A;touch x;B", which is no name of a variable'),
        (["--environment", '{"1A": "1"}'], 'environment has "1A", which is no name of a variable'),
        (["--sbatch", "['--exclusive --uid=root']"], "no long option of sbatch"),
        (["--sbatch", "[-x node1]"], "no long option of sbatch"),
        (["--container_runtime", "docker"], "container_runtime"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(arguments, message):
    with pytest.raises(UserError, match=message) as caught:
        check_cluster(read_cluster(arguments))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["- a\n", "nodes: [\n", "node: 4\n", "3"])
def test_a_file_that_describes_no_cluster(tmp_path, content):
    file = tmp_path / "cluster.yaml"
    file.write_text(content)
    with pytest.raises(UserError, match=r"cluster\.yaml"):
        read_cluster(["--cluster", str(file)])


@pytest.mark.parametrize("time", ["30", "10:00", "24:00:00", "3-0", "3-12:30", "1-00:00:00"])
def test_times_that_sbatch_knows(time):
    assert read_cluster(["--time", time]).time == time
