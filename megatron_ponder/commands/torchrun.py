"""Start ranks as torchrun does, for jobs that may be told to save and start again.

Takes the arguments of torchrun.

    ponder torchrun --nproc_per_node 8 -m megatron_ponder train --config FILE.yaml

SIGUSR1, SIGTERM and SIGINT are passed on to the ranks, which save and end; the exit code is theirs.
"""

import sys
from collections.abc import Sequence

from megatron_ponder.base.command_line import version_line
from megatron_ponder.base.errors import command
from megatron_ponder.cluster.torchrun import torchrun


@command
def main(argv: Sequence[str]) -> None:
    """Start the ranks, and end with their exit code."""
    if argv[:1] == ["--version"]:
        print(version_line())
        return
    sys.exit(torchrun(argv))
