"""Reads the short forms in which SLURM writes the nodes of a job and the tasks on each of them."""

import re
import shutil
import subprocess

from megatron_ponder.base.errors import UserError


def first_host(node_list: str) -> str:
    """First host of a SLURM node list such as `gpu[007-010,12]-ib,login1`."""
    if shutil.which("scontrol"):
        found = subprocess.run(
            ["scontrol", "show", "hostnames", node_list], capture_output=True, text=True, check=False
        ).stdout.split()
        if found:
            return found[0]
    first = re.match(r"(?:\[[^\]]+\]|[^,\[\]])+", node_list)
    if first is None:
        raise UserError(f'SLURM_STEP_NODELIST is "{node_list}", which names no host; leave it to srun')
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first.group())


def tasks_on_node(compressed: str, node: int) -> int:
    """Tasks on a node, counted from 0, by SLURM_STEP_TASKS_PER_NODE: `4(x2),3` means 4, 4 and 3.

    Raises:
        UserError: it says nothing of this node.
    """
    first = 0  # node of a part
    for part in compressed.strip().split(","):
        found = re.fullmatch(r"([0-9]{1,9})(?:\(x([0-9]{1,9})\))?", part)
        if found is None:
            break
        first += int(found.group(2) or 1)
        if node < first:
            return int(found.group(1))
    raise UserError(
        f'SLURM_STEP_TASKS_PER_NODE is "{compressed}", which says nothing of node {node} (SLURM_NODEID); leave '
        "both to srun, or start with torchrun"
    )
