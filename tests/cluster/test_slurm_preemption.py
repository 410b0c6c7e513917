"""Jobs that are told to leave: they save, go back into the queue, and end as if nothing had happened."""

import pytest

from tests.cluster.runs import assert_same_run, latest_files, long_arguments, starts, succeed, wait_for_steps
from tests.cluster.virtual_cluster import wait_for

pytestmark = pytest.mark.cluster


@pytest.mark.parametrize("job", ["train", pytest.param("train-torchrun", marks=pytest.mark.slow)])
def test_a_job_that_is_told_to_leave_loses_nothing(submit, cluster, corpus, uninterrupted, tmp_path, job):
    run = tmp_path / "run"
    # loader processes get the signal too, where SLURM tracks processes by their parents
    number = submit(job, *long_arguments(corpus, run, data__num_workers=1))
    wait_for_steps(cluster, number, run, 8)
    cluster.run("scancel", "--batch", "--signal=USR1", str(number))
    cluster.wait(number, "PENDING", timeout=60)
    assert not cluster.ranks(number)
    output = succeed(cluster, number)
    assert "goes back into the queue" in output
    assert cluster.job(number)["Restarts"] == "1"
    first, second = starts(run)
    assert (first["step"], first["previous"]) == (0, None)
    assert (second["step"] >= 8, second["previous"]) == (True, "SIGUSR1")
    assert_same_run(run, uninterrupted)


@pytest.mark.slow
def test_an_urgent_job_takes_the_nodes_and_gives_them_back(submit, cluster, corpus, uninterrupted, tmp_path):
    run = tmp_path / "run"
    number = submit("train", *long_arguments(corpus, run))
    wait_for_steps(cluster, number, run, 6)
    urgent = cluster.submit("-p", "urgent", "-N2", "--exclusive", "-o", tmp_path / "urgent.log", "--wrap", "sleep 2")
    succeed(cluster, urgent)
    succeed(cluster, number)
    assert cluster.job(number)["Restarts"] == "1"
    assert_same_run(run, uninterrupted)


@pytest.mark.slow
def test_a_job_is_told_before_its_time_is_over(submit, cluster, corpus, tmp_path):
    run = tmp_path / "run"
    endless = long_arguments(corpus, run, training__steps=100_000, checkpoint__interval=100_000)
    number = submit("train", *endless, time="00:02:00", signal_seconds=60)
    wait_for_steps(cluster, number, run, 1)  # it has been pending before, too
    cluster.wait(number, "PENDING", timeout=180)
    cluster.run("scancel", str(number))
    job = cluster.job(number)
    assert (job["JobState"], job["Restarts"]) == ("CANCELLED", "1")
    assert "exit code 75, it has saved" in cluster.output(job)
    assert len(latest_files(run)) > 0


@pytest.mark.slow
def test_a_job_that_is_cancelled_while_it_saves_can_go_on(submit, cluster, corpus, uninterrupted, tmp_path):
    run = tmp_path / "run"
    arguments = long_arguments(corpus, run, checkpoint__interval=1)
    number = submit("train", *arguments)
    wait_for_steps(cluster, number, run, 6)
    saves = run / "checkpoints"
    wait_for(lambda: list(saves.glob("*.partial*")), 60, lambda: f"a save: {list(saves.iterdir())}")
    cluster.run("scancel", "--signal=KILL", "--full", str(number))  # with no time to finish anything
    cluster.wait(number)
    assert cluster.job(number)["Restarts"] == "0"
    succeed(cluster, submit("train", *arguments))
    assert starts(run)[-1]["step"] >= 5
    assert_same_run(run, uninterrupted)


@pytest.mark.slow
def test_a_job_that_is_cancelled_stays_cancelled(submit, cluster, corpus, tmp_path):
    run = tmp_path / "run"
    number = submit("train", *long_arguments(corpus, run))
    wait_for_steps(cluster, number, run, 6)
    cluster.run("scancel", str(number))
    job = cluster.wait(number)
    assert (job["JobState"], job["Restarts"]) == ("CANCELLED", "0")
    assert "goes back into the queue" not in cluster.output(job)
    assert "stopped at step" in cluster.output(job)  # it has saved all the same
