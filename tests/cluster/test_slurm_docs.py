"""The commands of docs/clusters.md, as they stand there, on the virtual cluster."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import yaml

from tests import REPOSITORY
from tests.cluster.virtual_cluster import wait_for

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

# A run of the page's configuration that takes seconds; its batch and layout are those of the page.
SHORT = {
    "data": {"sequence_length": 16, "num_workers": 0},
    "training": {"steps": 4, "eval_interval": 0, "eval_samples": 8},
}


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A copy of the repository, as a user has it, with shorter runs and the description of the virtual cluster."""
    for part in ("megatron_ponder", "tools", "examples", "docs"):
        shutil.copytree(REPOSITORY / part, tmp_path / "checkout" / part, ignore=shutil.ignore_patterns("__pycache__"))
    folder = tmp_path / "checkout"
    shutil.copy(REPOSITORY / "pretrain_ponder.py", folder)
    configuration = folder / "examples" / "quickstart" / "adaptive.yaml"
    content = yaml.safe_load(configuration.read_text())
    for section, values in SHORT.items():
        content[section] |= values
    configuration.write_text(yaml.safe_dump(content))
    description = folder / "examples" / "slurm" / "cluster.yaml"
    environment = {"PYTHON": sys.executable, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    own = {"nodes": 2, "gpus_per_node": 2, "cpus_per_node": 4, "time": "00:10:00", "environment": environment}
    description.write_text(yaml.safe_dump(yaml.safe_load(description.read_text()) | own))
    return folder


def test_from_the_login_node_to_a_trained_model(cluster, checkout):
    page = (checkout / "docs" / "clusters.md").read_text()
    blocks = re.findall(r"(?ms)^```bash\n(.*?)^```", page)
    kept = 'for number in "$data" "$job"; do echo "submitted job $number"; done'
    command = 'ponder() { python -m megatron_ponder "$@"; }'
    script = "\n".join(["set -euo pipefail", command, *blocks, kept]).replace("python ", f"{sys.executable} ")
    said = cluster.run("bash", "-c", script, folder=checkout, timeout=300, environment={"PYTHONPATH": str(checkout)})
    submitted = re.findall(r"submitted job (\d+)", said)
    assert len(submitted) == 5, said
    wait_for(lambda: not cluster.run("squeue", "-h"), 400, lambda: cluster.run("squeue"))
    first = min(map(int, submitted))  # elements of an array have numbers of their own
    for job in cluster.run("scontrol", "show", "job", "-o").splitlines():
        number, state = (re.search(rf"{name}=(\w+)", job).group(1) for name in ("JobId", "JobState"))
        assert int(number) < first or state == "COMPLETED", cluster.output(cluster.job(int(number)))
    run = checkout / "runs" / "quickstart"
    assert json.loads((run / "evaluation.json").read_text())["checkpoint"] == "step-00000004"
    texts = [json.loads(line) for part in sorted((checkout / "runs" / "texts").iterdir()) for line in part.open()]
    prompts = (checkout / "data" / "prompts.txt").read_text().splitlines()
    assert len(texts) == len(prompts) == 4
    assert {path.name for path in (checkout / "runs" / "seeds").iterdir()} == {"seed-0", "seed-1"}
    assert (run / "metrics.jsonl").read_text().count("\n") == 4
