"""Results on their way into a file: whole or absent, and never lost."""

import json

import pytest

from megatron_ponder.base.errors import UserError
from megatron_ponder.generation.prompts import Task
from megatron_ponder.generation.request import Generation, Request
from megatron_ponder.generation.results import LinePrinter, ResultFile, fingerprint, record

JOB = {"prompts": "abc", "threshold": 0.5}


@pytest.fixture
def file(tmp_path) -> ResultFile:
    return ResultFile(tmp_path / "folder" / "out.jsonl")


def test_results_of_copies_come_out_in_the_order_of_the_tasks(file):
    assert file.begin(JOB) == set()
    with file.appending(0) as even, file.appending(1) as odd:
        for index in (4, 0, 2):
            even.add(index, f'{{"n": {index}, "text": "☕\\t"}}')
        for index in (3, 1):
            odd.add(index, f'{{"n": {index}}}')
        assert not file.output.exists()
    file.publish(5)
    assert [json.loads(line)["n"] for line in file.output.read_text(encoding="utf-8").splitlines()] == [0, 1, 2, 3, 4]
    assert [path.name for path in file.output.parent.iterdir()] == ["out.jsonl"]
    with pytest.raises(UserError, match=r"out.jsonl exists already; choose another --output"):
        file.begin(JOB)


def test_a_job_goes_on_after_a_kill_on_other_ranks(file):
    """Every result is on disk when it is added; a line that was being written is not there."""
    file.begin(JOB)
    with file.appending(0) as one, file.appending(1) as other:
        one.add(2, "two")
        other.add(0, "zero")
        other.add(5, "five")
        part = file.folder / "copy-1.jsonl"
        assert part.read_text() == "0\tzero\n5\tfive\n"
    for torn in ("1", "1\t", '1\t{"text": "' + 200_000 * "x"):
        part.write_text(part.read_text() + torn)
        assert ResultFile(file.output).begin(JOB) == {0, 2, 5}
        assert part.read_text() == "0\tzero\n5\tfive\n"
    (file.folder / "copy-0.jsonl").write_text("2\ttw")
    assert file.begin(JOB) == {0, 5}
    with file.appending(0) as one:
        for index in (1, 2, 3, 4):
            one.add(index, f"again {index}")
    file.publish(6)
    assert file.output.read_text().splitlines() == ["zero", "again 1", "again 2", "again 3", "again 4", "five"]


def test_unfinished_results_of_another_job_are_kept(file):
    file.begin(JOB)
    with file.appending(0) as one:
        one.add(0, "zero")
    with pytest.raises(UserError, match=r"out.jsonl.unfinished has unfinished results with another threshold; repeat"):
        file.begin(JOB | {"threshold": 0.4})
    assert file.begin(JOB) == {0}


def test_fingerprints_tell_jobs_apart():
    def task(**changes):
        return Task(**{"request": Request((1, 2), 5), "prompt": 0, "sample": 0} | changes)

    same = fingerprint([task(), task(prompt=1)])
    assert same == fingerprint([task(), task(prompt=1)])
    different = [
        [task()],
        [task(), task(prompt=2)],
        [task(id="a"), task(prompt=1)],
        [task(request=Request((1, 3), 5)), task(prompt=1)],
        [task(request=Request((1, 2), 5, stop_ids=frozenset([3]))), task(prompt=1)],
        [task(request=Request((1, 2), 5, top_log_probabilities=1)), task(prompt=1)],
    ]
    assert len({same, *map(fingerprint, different)}) == 7


def test_records():
    generation = Generation([1, 2], [3, 4], [-0.5, -1.0], [[(3, -0.5)], [(9, -0.25)]], [1, 0, 2], "ab", "length")
    plain = record(Task(Request((1, 2), 2), 7, 1), generation)
    assert plain == {
        "index": 7,
        "sample": 1,
        "text": "ab",
        "finish_reason": "length",
        "prompt_tokens": [1, 2],
        "tokens": [3, 4],
        "executed_steps": [1, 0, 2],
        "cached_slots": 6,
        "log_probabilities": [-0.5, -1.0],
        "seconds_waited": 0.0,
        "seconds_to_first": 0.0,
        "seconds": 0.0,
    }
    full = record(Task(Request((1, 2), 2, top_log_probabilities=1), 7, 1, id=[5]), generation)
    assert full == plain | {"id": [5], "top_log_probabilities": [[(3, -0.5)], [(9, -0.25)]]}


def test_lines_are_printed_in_order(capsys):
    tasks = [Task(Request((1,), 1), index, 0) for index in range(3)]
    printer = LinePrinter(tasks)
    printed = []
    for index, reason in [(0, None), (2, "length"), (1, "stop"), (0, "length")]:
        printer(index, Generation([1], finish_reason=reason))
        printed.append([json.loads(line)["index"] for line in capsys.readouterr().out.splitlines()])
    assert printed == [[], [], [], [0, 1, 2]]
