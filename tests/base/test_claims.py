"""A right is one process's at a time, and no dead owner keeps it from the next."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress

import psutil
import pytest

from megatron_ponder.base import claims
from megatron_ponder.base.claims import Claim
from megatron_ponder.base.errors import UserError

OWNER = """
import sys, time
from megatron_ponder.base.claims import Claim

Claim(sys.argv[1], "the folder", "choose another").take()
print("taken", flush=True)
time.sleep(60)
"""
REMEDY = ("the folder", "choose another")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "claim"


@pytest.fixture
def owner(path):
    """Another process that has the claim."""
    with subprocess.Popen([sys.executable, "-c", OWNER, path], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "taken\n"
        yield process
        process.kill()


def written_elsewhere(path, **others):
    """A claim of a process that cannot be seen from here."""
    about = {"host": "node-7", "place": "another boot", "pid": 12, "started": 1.7e9, "nonce": "abc"} | others
    path.write_text(json.dumps(about))


@contextmanager
def kept_alive(path):
    """Its owner gives signs of life."""
    ended = threading.Event()

    def show_life():
        while not ended.wait(0.1):
            os.utime(path)

    signs = threading.Thread(target=show_life)
    signs.start()
    try:
        yield
    finally:
        ended.set()
        signs.join()


def test_a_claim_is_taken_and_given_back(path):
    with Claim(path, *REMEDY) as claim:
        claim.verify()
        about = json.loads(path.read_text())
        assert (about["host"], about["pid"]) == (socket.gethostname(), os.getpid())
    assert list(path.parent.iterdir()) == []
    with Claim(path, *REMEDY):
        pass


def test_a_second_process_is_told_of_the_first(path, owner):
    expected = (
        f"the folder is in use by process {owner.pid} on {socket.gethostname()}, which started "
        f".*: wait until it has ended, or choose another; if it runs no more, remove {path}"
    )
    with pytest.raises(UserError, match=expected):
        Claim(path, *REMEDY).take()
    assert json.loads(path.read_text())["pid"] == owner.pid
    assert list(path.parent.iterdir()) == [path]


def test_whoever_did_not_get_it_takes_nothing_away(path, owner):
    refused = Claim(path, *REMEDY)
    with pytest.raises(UserError):
        refused.take()
    refused.release()
    assert path.exists()


@pytest.mark.parametrize("reaped", [True, False])
def test_a_killed_owner_does_not_block(path, owner, reaped):
    owner.send_signal(signal.SIGKILL)
    if reaped:
        owner.wait()
    while psutil.pid_exists(owner.pid) and psutil.Process(owner.pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    with Claim(path, *REMEDY) as claim:
        claim.verify()
    assert list(path.parent.iterdir()) == []


def test_another_process_of_the_same_number_is_another(path, owner):
    about = json.loads(path.read_text())
    path.write_text(json.dumps(about | {"started": about["started"] - 3600}))
    with Claim(path, *REMEDY) as claim:
        claim.verify()


def test_an_owner_elsewhere_that_shows_life_is_respected(path):
    written_elsewhere(path)
    with kept_alive(path), pytest.raises(UserError, match="in use by process 12 on node-7, which started"):
        Claim(path, *REMEDY).take()


def test_an_owner_elsewhere_without_a_sign_of_life_is_waited_for_and_then_dead(path):
    written_elsewhere(path)
    begun = time.monotonic()
    with Claim(path, *REMEDY, patience=1.5) as claim:
        assert time.monotonic() - begun > 1.5
        claim.verify()


def test_an_owner_of_a_slurm_job_that_has_been_started_again_is_gone_wherever_it_was(path, monkeypatch):
    written_elsewhere(path, job="cluster/7", restart=1)
    for name, value in {"CLUSTER_NAME": "cluster", "JOB_ID": "7", "RESTART_COUNT": "1"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    begun = time.monotonic()
    with kept_alive(path), pytest.raises(UserError, match="process 12 on node-7"):
        Claim(path, *REMEDY).take()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    with Claim(path, *REMEDY) as claim:
        assert json.loads(path.read_text())["restart"] == 2
        claim.verify()
    assert time.monotonic() - begun < 10


@pytest.mark.parametrize("content", ["node", "", "\0\0", "[]"], ids=["of another host", "empty", "zeros", "no object"])
def test_an_old_claim_is_passed_over_at_once(path, content):
    """Whatever it holds: a machine that fails can leave an empty file."""
    written_elsewhere(path)
    if content != "node":
        path.write_text(content)
    long_ago = time.time() - 2 * claims.SECONDS_UNTIL_DEAD
    os.utime(path, (long_ago, long_ago))
    begun = time.monotonic()
    with Claim(path, *REMEDY) as claim:
        claim.verify()
    assert time.monotonic() - begun < 10


def test_an_owner_shows_life(path, monkeypatch):
    monkeypatch.setattr(claims, "SECONDS_BETWEEN_SIGNS", 0.05)
    with Claim(path, *REMEDY):
        os.utime(path, (1, 1))
        end = time.monotonic() + 30
        while path.stat().st_mtime < 2:
            assert time.monotonic() < end
            time.sleep(0.02)


def test_an_owner_that_was_taken_for_dead_finds_out_and_harms_nothing(path):
    claim = Claim(path, *REMEDY)
    claim.take()
    written_elsewhere(path)
    with pytest.raises(UserError, match=re.escape(f"the folder is not held by this process any more: {path} names")):
        claim.verify()
    claim.release()
    assert json.loads(path.read_text())["host"] == "node-7"


def test_a_claim_that_was_removed_is_noticed(path):
    with Claim(path, *REMEDY) as claim:
        path.unlink()
        with pytest.raises(UserError, match="is gone"):
            claim.verify()


def test_of_many_that_take_over_at_once_one_has_it(path):
    """Threads, which draw their own numbers as processes do."""
    written_elsewhere(path)
    os.utime(path, (1, 1))
    takers = [Claim(path, *REMEDY) for _ in range(8)]
    taken, start = [], threading.Barrier(len(takers))

    def take(claim):
        start.wait()
        with suppress(UserError):
            claim.take()
            taken.append(claim)

    def holds(claim):
        try:
            claim.verify()
        except UserError:
            return False
        return True

    threads = [threading.Thread(target=take, args=(claim,)) for claim in takers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(map(holds, taken)) == 1
    for claim in taken:
        claim.release()
    assert list(path.parent.iterdir()) == []
