"""A real SLURM on one machine: its daemons run in namespaces that end with the process that made them.

Every node has a host name, a network address and two graphics cards (which are /dev/null) of its own, so that a job
that confuses nodes fails as it would on a cluster. The host's processes, network and files stay as they were. Needs
root, and the Debian packages that `install.sh` installs.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.cluster import daemons
from tests.cluster.daemons import NODES, wait_for, with_sbin

COMMANDS = ("slurmctld", "slurmd", "munged", "sbatch", "ip", "nsenter", "unshare")
DAEMONS = re.compile(r"(: |\S*/)?(munged|slurmctld|slurmd|slurmscriptd|sleep infinity)\b")


@dataclass(frozen=True)
class Process:
    """A process of the cluster, as the host sees it.

    Attributes:
        pid: on the host.
        command: with its arguments.
        network: identity of its network namespace, one for each node.
    """

    pid: int
    command: str
    network: str

    def environment(self) -> dict[str, str]:
        """What it was started with; empty when it has ended."""
        try:
            content = Path(f"/proc/{self.pid}/environ").read_bytes().decode(errors="replace")
        except OSError:
            return {}
        return dict(item.split("=", 1) for item in content.split("\0") if "=" in item)


class VirtualCluster:
    """Two nodes on which jobs can be submitted, as a context.

    Attributes:
        root: folder for configuration, state and logs.
    """

    def __init__(self, root: Path):
        self.root = root

    def __enter__(self) -> "VirtualCluster":
        namespaces = ["unshare", "--mount", "--uts", "--pid", "--net", "--fork", "--kill-child", "--mount-proc"]
        self._box = subprocess.Popen(
            [*namespaces, sys.executable, daemons.__file__, str(self.root)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        said = []
        for line in self._box.stdout:
            if line == "ready\n":
                break
            said.append(line)
        else:
            self._box.wait()
            raise RuntimeError(f"the virtual cluster did not start:\n{''.join(said)}{self._logs()}")
        self._init = _child(self._box.pid)
        return self

    def __exit__(self, *exception) -> None:
        self._box.stdin.close()
        try:
            self._box.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._box.kill()
            self._box.wait()

    def run(
        self,
        *command: str | Path,
        node: int | None = None,
        check: bool = True,
        timeout: float = 120.0,
        environment: dict[str, str] | None = None,
        folder: Path | None = None,
    ) -> str:
        """Run a command on the login node, or on one of the others, and return what it printed.

        Raises:
            AssertionError: it failed, unless `check` is false.
        """
        done = subprocess.run(
            [*self._enter(node), "env", f"--chdir={folder or Path.cwd()}", *map(str, command)],
            env=with_sbin() | {"SLURM_CONF": f"{self.root}/slurm.conf"} | (environment or {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
            check=False,
        )
        assert done.returncode == 0 or not check, f"{command} failed with {done.returncode}:\n{done.stdout}"
        return done.stdout

    def _enter(self, node: int | None) -> list[str]:
        command = ["nsenter", "--target", str(self._init), "--mount", "--uts", "--net", "--pid"]
        if node is not None:
            inside = (self.root / f"node{node}.pid").read_text().strip()
            command += ["nsenter", "--target", inside, "--mount", "--uts", "--net"]
        return command

    def processes(self) -> list[Process]:
        """All that run in the cluster and are no part of it: jobs and what they left."""
        inside = _namespace(self._init, "pid")
        found = []
        for pid in _pids():
            command = _command(pid)
            # those that have ended and wait for their parent have no command line
            if pid != self._init and _namespace(pid, "pid") == inside and command and not DAEMONS.match(command):
                found.append(Process(pid, command, _namespace(pid, "net")))
        return found

    def ranks(self, job: int) -> dict[int, Process]:
        """The processes of a job that train, by rank."""
        found: dict[int, Process] = {}
        for process in self.processes():
            program = process.command.split()[0]
            trains = "megatron_ponder train" in process.command and "megatron_ponder torchrun" not in process.command
            if "python" in Path(program).name and trains:
                environment = process.environment()
                rank = environment.get("RANK", environment.get("SLURM_PROCID"))
                if environment.get("SLURM_JOB_ID") == str(job) and rank is not None:
                    found.setdefault(int(rank), process)  # loader processes, which look the same, are younger
        return found

    # Jobs

    def submit(self, *arguments: str | Path, **options) -> int:
        """Submit by sbatch; returns the job's number."""
        return int(self.run("sbatch", "--parsable", *arguments, **options).split(";")[0])

    def job(self, job: int) -> dict[str, str]:
        """What SLURM knows of a job, by the names it uses; `ExitCode` is `code:signal`."""
        ask = ("scontrol", "show", "job", "-o", str(job))
        # a controller that is busy may hang up
        answer = self.run(*ask, check=False)
        if "JobState=" not in answer:
            answer = self.run(*ask)
        fields = re.findall(r"(\S+?)=(.*?)(?= \S+?=|$)", answer.strip())
        return dict(fields)

    def wait(self, job: int, *states: str, timeout: float = 150.0) -> dict[str, str]:
        """Wait until a job has ended, or is in one of the given states.

        Raises:
            AssertionError: it is in none of them after `timeout` seconds; says what the job has printed.
        """
        wanted = states or ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        known = {}

        def reached() -> bool:
            known.update(self.job(job))
            return known["JobState"] in wanted

        wait_for(reached, timeout, lambda: f"job {job} is {known['JobState']}, not {wanted}:\n{self.output(known)}")
        return known

    def output(self, job: dict[str, str]) -> str:
        """What a job, as `job` or `wait` gave it, has printed."""
        path = Path(job["StdOut"])
        return path.read_text(errors="replace") if path.exists() else ""

    # Bad luck

    def cut_off(self, node: int) -> None:
        """Pull a node's network cable."""
        self.run("ip", "link", "set", f"link{node}", "down")

    def plug_in(self, node: int) -> None:
        """Put the network cable back."""
        self.run("ip", "link", "set", f"link{node}", "up")

    def power_off(self, node: int) -> None:
        """End everything on a node at once, its daemon too."""
        network = self._network(node)
        for pid in _pids():
            if _namespace(pid, "net") == network and "sleep infinity" not in _command(pid):
                os.kill(pid, signal.SIGKILL)

    def power_on(self, node: int) -> None:
        """Start a node's daemon again."""
        self.run("slurmd", "-f", self.root / "slurm.conf", "-N", f"node{node}", "-b", node=node)

    def node_of(self, process: Process) -> int:
        """The number of the node that a process runs on."""
        return next(node for node in range(1, NODES + 1) if self._network(node) == process.network)

    def _network(self, node: int) -> str:
        return self.run("readlink", "/proc/self/ns/net", node=node).strip()

    def _logs(self) -> str:
        return "".join(f"{path}:\n{path.read_text()[-2000:]}\n" for path in self.root.glob("*.log"))


def missing_commands() -> list[str]:
    """What the virtual cluster needs and this machine does not have."""
    return [command for command in COMMANDS if not shutil.which(command, path=with_sbin()["PATH"])]


def _namespace(pid: int, kind: str) -> str:
    try:
        return os.readlink(f"/proc/{pid}/ns/{kind}")
    except OSError:
        return ""


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""


def _pids() -> list[int]:
    return sorted(int(name) for name in os.listdir("/proc") if name.isdigit())


def _child(parent: int) -> int:
    """The only process that another one has started."""
    listed = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    assert len(listed) == 1, listed
    return int(listed[0])
