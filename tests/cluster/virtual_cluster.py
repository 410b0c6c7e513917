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
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

COMMANDS = ("slurmctld", "slurmd", "munged", "sbatch", "ip", "nsenter", "unshare")
NODES = 2
DAEMONS = re.compile(r"(: |\S*/)?(munged|slurmctld|slurmd|slurmscriptd|sleep infinity)\b")
SLURM_CONF = """\
ClusterName=virtual
SlurmctldHost=control(10.99.77.254)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# credentials that end early make a requeued job start early
AuthInfo=socket={root}/munge.sock,cred_expire=5
CredType=cred/munge
MpiDefault=none
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1,batch_sched_delay=0
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait=5
ReturnToService=2
SlurmctldTimeout=30
SlurmdTimeout=10
SlurmctldDebug=info
SlurmdDebug=info
TmpFS={root}/tmp/%n
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd.%n.log
NodeName=node[1-{nodes}] CPUs=4 RealMemory=4000 Gres=gpu:2 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=5
PartitionName=urgent Nodes=ALL MaxTime=INFINITE PriorityTier=9 PreemptMode=OFF
"""
START_NODE = """
mount --make-rprivate /
mount --bind {root}/nsswitch.conf /etc/nsswitch.conf
hostname node{node}
echo $$ > {root}/node{node}.pid.new && mv {root}/node{node}.pid.new {root}/node{node}.pid
until ip link show eth0 >/dev/null 2>&1; do sleep 0.02; done
ip link set lo up && ip addr add 10.99.77.{node}/24 dev eth0 && ip link set eth0 up
slurmd -f {root}/slurm.conf -N node{node}
exec sleep infinity
"""


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
            [*namespaces, sys.executable, __file__, str(self.root)],
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
            [*self._enter(node), *map(str, command)],
            env=os.environ | {"SLURM_CONF": f"{self.root}/slurm.conf"} | (environment or {}),
            cwd=folder,
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
            program, *words = process.command.split()
            if "python" in Path(program).name and "pretrain_ponder.py" in words and "tools/torchrun.py" not in words:
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
        fields = re.findall(r"(\S+?)=(.*?)(?= \S+?=|$)", self.run("scontrol", "show", "job", "-o", str(job)).strip())
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
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    return [command for command in COMMANDS if not shutil.which(command, path=path)]


def wait_for(condition: Callable[[], bool], timeout: float, explain: Callable[[], str]) -> None:
    """Look five times a second whether something has happened.

    Raises:
        AssertionError: not within `timeout` seconds, with what `explain` says then.
    """
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, f"not within {timeout:.0f} s: {explain()}"
        time.sleep(0.2)


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


# What runs inside, as the first process of the namespaces


def _inside(root: Path) -> None:
    for name in ("state", "spool", "tmp", "munge"):
        (root / name).mkdir(parents=True, exist_ok=True)
    os.chmod(root, 0o755)
    _network_of_names(root)
    _munge(root)
    _slurm(root)
    print("ready", flush=True)
    # Adopt what loses its parent, as every first process has to, until the host closes the line.
    signal.signal(signal.SIGCHLD, _reap)
    sys.stdin.read()


def _reap(*_) -> None:
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass


def _network_of_names(root: Path) -> None:
    """A bridge for the nodes, and their names in a private copy of the hosts file."""
    hosts = ["127.0.0.1 localhost", "10.99.77.254 control", *(f"10.99.77.{i} node{i}" for i in range(1, NODES + 1))]
    (root / "hosts").write_text("\n".join(hosts) + "\n")
    names = Path("/etc/nsswitch.conf").read_text() if Path("/etc/nsswitch.conf").exists() else "hosts: files\n"
    (root / "nsswitch.conf").write_text(re.sub(r"(?m)^hosts:.*", "hosts: files", names))
    _do("mount", "--make-rprivate", "/")
    _do("mount", "--bind", root / "hosts", "/etc/hosts")
    _do("hostname", "control")
    _do("ip", "link", "set", "lo", "up")
    _do("ip", "link", "add", "bridge", "type", "bridge")
    _do("ip", "addr", "add", "10.99.77.254/24", "dev", "bridge")
    _do("ip", "link", "set", "bridge", "up")


def _munge(root: Path) -> None:
    key, folder = root / "munge" / "key", root / "munge"
    key.write_bytes(os.urandom(1024))
    os.chmod(key, 0o400)
    os.chmod(folder, 0o700)
    files = [f"--key-file={key}", f"--pid-file={folder}/pid", f"--log-file={folder}/log", f"--seed-file={folder}/seed"]
    _do("munged", "--force", f"--socket={root}/munge.sock", *files)


def _slurm(root: Path) -> None:
    configuration = root / "slurm.conf"
    configuration.write_text(SLURM_CONF.format(root=root, nodes=NODES))
    for card in range(2):
        if not (root / f"gpu{card}").exists():
            os.mknod(root / f"gpu{card}", 0o20666, os.makedev(1, 3))
    (root / "gres.conf").write_text(f"Name=gpu File={root}/gpu[0-1]\n")
    os.environ["SLURM_CONF"] = str(configuration)
    _do("slurmctld", "-f", configuration)
    for node in range(1, NODES + 1):
        (root / "spool" / f"node{node}").mkdir(exist_ok=True)
        (root / "tmp" / f"node{node}").mkdir(exist_ok=True)
        script = START_NODE.format(root=root, node=node)
        subprocess.Popen(["unshare", "--mount", "--uts", "--net", "bash", "-euc", script], stdin=subprocess.DEVNULL)
        pid = root / f"node{node}.pid"
        wait_for(pid.exists, 10, lambda: "a node's namespaces")
        peer = ["peer", "name", "eth0", "netns", pid.read_text().strip()]
        _do("ip", "link", "add", f"link{node}", "type", "veth", *peer)
        _do("ip", "link", "set", f"link{node}", "master", "bridge", "up")
    wait_for(lambda: _idle_nodes() == NODES, 20, lambda: f"{_idle_nodes()} idle nodes of {NODES}")


def _idle_nodes() -> int:
    done = subprocess.run(
        ["sinfo", "-h", "-N", "-p", "main", "-t", "idle", "-o", "%N"], capture_output=True, text=True, check=False
    )
    return len(set(done.stdout.split()))


def _do(*command: str | Path) -> None:
    subprocess.run([str(word) for word in command], check=True, stdout=sys.stderr, env=_with_sbin())


def _with_sbin() -> dict[str, str]:
    return os.environ | {"PATH": os.environ.get("PATH", "") + ":/usr/sbin:/sbin"}


def main(arguments: Sequence[str]) -> None:
    """Become the cluster, until standard input ends."""
    os.environ.update(_with_sbin())
    _inside(Path(arguments[0]))


if __name__ == "__main__":
    main(sys.argv[1:])
