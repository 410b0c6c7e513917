"""The daemons of the virtual cluster: what runs in its namespaces, as their first process.

Started by `virtual_cluster` as a script; imports nothing of the tests.
"""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

NODES = 2
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


def main(arguments: Sequence[str]) -> None:
    """Become the cluster, until standard input ends."""
    os.environ.update(with_sbin())
    _inside(Path(arguments[0]))


def wait_for(condition: Callable[[], bool], timeout: float, explain: Callable[[], str]) -> None:
    """Look five times a second whether something has happened.

    Raises:
        AssertionError: not within `timeout` seconds, with what `explain` says then.
    """
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, f"not within {timeout:.0f} s: {explain()}"
        time.sleep(0.2)


def with_sbin() -> dict[str, str]:
    """This process's environment, with the folders that daemons are in."""
    return os.environ | {"PATH": os.environ.get("PATH", "") + ":/usr/sbin:/sbin"}


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
    subprocess.run([str(word) for word in command], check=True, stdout=sys.stderr, env=with_sbin())


if __name__ == "__main__":
    main(sys.argv[1:])
