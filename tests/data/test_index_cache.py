"""Arrays are built once, whoever comes first, and rebuilt when damaged; a builder that dies holds nobody up."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest

from megatron_ponder.base.errors import UserError
from megatron_ponder.data import stamps
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
    assert {path.suffix for path in cache.folder.iterdir()} == {".index", ".lock"}


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
    assert len(list(tmp_path.glob("*.index"))) == 1


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
    assert {path.suffix for path in tmp_path.iterdir()} == {".index", ".lock"}, "what was written aside is gone"


def test_a_lock_that_a_process_has_left_is_nobodys(tmp_path):
    cache = IndexCache(tmp_path)
    Path(f"{cache.path('a')}.lock").touch()
    assert_arrays(cache.load("a", lambda: ARRAYS))


def hold(folder, seconds):
    IndexCache(folder).load("a", lambda: (time.sleep(seconds), ARRAYS)[1])


@pytest.mark.parametrize(("patience", "built"), [(30, 0), (0.5, 1)])
def test_a_slow_builder_is_waited_for_while_patience_lasts(tmp_path, patience, built):
    process = multiprocessing.get_context("fork").Process(target=hold, args=(tmp_path, 3))
    process.start()
    cache, builds = IndexCache(tmp_path, patience=patience), []
    while not Path(f"{cache.path('a')}.lock").exists():
        time.sleep(0.01)
    time.sleep(0.1)  # between the making of the file and its lock
    assert_arrays(cache.load("a", lambda: builds.append(1) or ARRAYS))
    assert len(builds) == built
    process.join()


def test_a_builder_that_fails_gives_its_lock_back(tmp_path):
    cache = IndexCache(tmp_path)
    with pytest.raises(ZeroDivisionError):
        cache.load("a", lambda: 1 / 0)
    assert {path.suffix for path in tmp_path.iterdir()} == {".lock"}
    assert_arrays(IndexCache(tmp_path).load("a", lambda: ARRAYS))


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
