"""Arrays are built once, whoever comes first, and rebuilt when damaged; a builder that dies holds nobody up."""

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
import zlib

import numpy as np
import pytest

from megatron_ponder.base.errors import UserError
from megatron_ponder.data import index_cache, stamps
from megatron_ponder.data.index_cache import IndexCache

ARRAYS = [np.arange(1000, dtype=np.int32), np.arange(60).reshape(30, 2), np.zeros(0, np.int64)]


def unneeded():
    raise AssertionError("built again")


def assert_arrays(arrays):
    for array, expected in zip(arrays, ARRAYS, strict=True):
        assert array.dtype == expected.dtype
        np.testing.assert_array_equal(array, expected)
        assert not array.flags.writeable


def test_arrays_come_back_mapped_and_are_built_once(tmp_path):
    cache = IndexCache(tmp_path / "new" / "folder")
    assert not cache.has("a")
    assert_arrays(cache.load("a", lambda: ARRAYS))
    assert cache.has("a")
    assert_arrays(IndexCache(cache.folder).load("a", unneeded))
    (other,) = cache.load("b", lambda: [np.ones(3)])
    assert other.tolist() == [1, 1, 1]
    assert {path.suffix for path in cache.folder.iterdir()} == {".index"}


def test_every_damaged_region_is_noticed_and_built_again(tmp_path):
    cache = IndexCache(tmp_path)
    cache.load("a", lambda: ARRAYS)
    whole = cache.path("a").read_bytes()
    damages = [whole[:at] + bytes([whole[at] ^ 0x40]) + whole[at + 1 :] for at in range(0, len(whole), 37)]
    damages += [whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :] for at in range(20)]
    damages += [whole[:size] for size in (0, 1, 11, 12, 16, 200, len(whole) - 1)] + [whole + b"\0"]
    for damaged in damages:
        cache.path("a").write_bytes(damaged)
        assert not cache.has("a")
        assert_arrays(cache.load("a", lambda: ARRAYS))
        assert cache.path("a").read_bytes() == whole


def test_a_file_under_anothers_name_is_not_taken_for_it(tmp_path):
    cache = IndexCache(tmp_path)
    cache.load("b", lambda: [np.ones(3)])
    os.replace(cache.path("b"), cache.path("a"))
    assert_arrays(cache.load("a", lambda: ARRAYS))


def load_and_count(folder, barrier, counts):
    def build():
        with counts.get_lock():
            counts.value += 1
        time.sleep(0.3)
        return ARRAYS

    cache = IndexCache(folder)
    barrier.wait()
    assert_arrays(cache.load("a", build))


def test_many_processes_at_once_build_once(tmp_path):
    context = multiprocessing.get_context("fork")
    barrier, counts = context.Barrier(8), context.Value("i", 0)
    processes = [context.Process(target=load_and_count, args=(tmp_path, barrier, counts)) for _ in range(8)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 8
    assert counts.value == 1
    assert len(list(tmp_path.iterdir())) == 1


BUILD_FOREVER = """
import sys, time
from megatron_ponder.data import index_cache, stamps
index_cache.os.replace = lambda *paths: (print("written aside", flush=True), time.sleep(600))
import numpy as np
index_cache.IndexCache(sys.argv[1]).load("a", lambda: [np.zeros(5)])
"""


def test_kill_9_during_a_build_is_made_good_by_those_who_wait(tmp_path):
    """Killed when all is written but under its name, while another process waits."""
    builder = subprocess.Popen([sys.executable, "-c", BUILD_FOREVER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert builder.stdout.readline() == "written aside\n"
    context = multiprocessing.get_context("fork")
    barrier, counts = context.Barrier(1), context.Value("i", 0)
    waiting = context.Process(target=load_and_count, args=(tmp_path, barrier, counts))
    waiting.start()
    time.sleep(0.5)
    assert waiting.is_alive() and counts.value == 0
    builder.send_signal(signal.SIGKILL)
    builder.wait()
    waiting.join(30)
    assert waiting.exitcode == 0 and counts.value == 1
    assert_arrays(IndexCache(tmp_path).load("a", unneeded))
    assert len(list(tmp_path.iterdir())) == 1, "neither the claim nor what was written aside is left"


def test_the_claim_of_a_builder_killed_when_all_was_done_goes_too(tmp_path):
    cache = IndexCache(tmp_path)
    cache.load("a", lambda: ARRAYS)
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    claim = tmp_path / f"{cache.path('a').name}.claim"
    claim.write_text(f"{socket.gethostname()} {gone.stdout.strip()}")
    assert_arrays(cache.load("a", unneeded))
    assert not claim.exists()


@pytest.mark.parametrize("holder", ["another-node 1", f"{socket.gethostname()} 1", ""])
def test_a_claim_without_signs_of_life_counts_for_a_while_only(tmp_path, holder):
    """The process cannot be seen from here, or is another one by now, or died before it wrote who it was."""
    cache = IndexCache(tmp_path, patience=0.5)
    claim = tmp_path / f"{cache.path('a').name}.claim"
    claim.write_text(holder)
    started = time.monotonic()
    assert_arrays(cache.load("a", lambda: ARRAYS))
    assert 0.5 < time.monotonic() - started < 10
    assert not claim.exists()


def build_slowly(folder):
    IndexCache(folder).load("a", lambda: (time.sleep(1.5), ARRAYS)[1])


def test_a_slow_builder_that_lives_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(index_cache, "SECONDS_BETWEEN_SIGNS", 0.1)
    process = multiprocessing.get_context("fork").Process(target=build_slowly, args=(tmp_path,))
    process.start()
    cache = IndexCache(tmp_path, patience=0.7)
    claim = tmp_path / f"{cache.path('a').name}.claim"
    while not claim.exists():
        time.sleep(0.01)
    assert_arrays(cache.load("a", unneeded))
    process.join()


def test_a_builder_that_fails_gives_its_claim_back(tmp_path):
    cache = IndexCache(tmp_path)
    with pytest.raises(ZeroDivisionError):
        cache.load("a", lambda: 1 / 0)
    assert list(tmp_path.iterdir()) == []
    assert_arrays(cache.load("a", lambda: ARRAYS))


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write the index cache .*file.* set data.cache_path to another folder"):
        IndexCache(tmp_path / "file" / "below")


def test_a_sound_file_is_read_whole_once_until_somebody_writes_to_it(tmp_path, monkeypatch):
    monkeypatch.setattr(stamps, "SECONDS_UNTIL_SETTLED", 0)
    cache = IndexCache(tmp_path)
    cache.load("a", lambda: ARRAYS)
    time.sleep(0.05)
    cache.load("a", unneeded)
    with monkeypatch.context() as patched:
        patched.setattr(zlib, "crc32", unneeded)
        assert_arrays(IndexCache(tmp_path).load("a", unneeded))
    whole = cache.path("a").read_bytes()
    before = cache.path("a").stat()
    for at in range(0, len(whole), 311):
        with open(cache.path("a"), "r+b") as file:
            file.seek(at)
            file.write(bytes([whole[at] ^ 0x10]))
        os.utime(cache.path("a"), ns=(before.st_atime_ns, before.st_mtime_ns))
        assert not cache.has("a")
        assert_arrays(cache.load("a", lambda: ARRAYS))
        assert cache.path("a").read_bytes() == whole
