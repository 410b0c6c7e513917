"""The script for the first GPU runs on a CPU, at sizes that measure nothing, and goes on where it was stopped."""

import json

import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu_bench import Bench, CannotRunError
from benchmarks.gpu_training import kind_of, least
from megatron_ponder.cluster.gpus import GPUS
from megatron_ponder.config import read_config
from tests import REPOSITORY

BENCH = Bench(torch.device("cpu"), True, float("inf"))


@pytest.mark.parametrize("stage", gpu.STAGES)
def test_every_stage_runs(stage, tmp_path, capsys):
    assert gpu.main(["--stage", stage, "--tiny", "--folder", str(tmp_path)]) == 0
    content = json.loads((tmp_path / f"{stage}.json").read_text())
    assert content["machine"] == {"card": "CPU", "driver": content["machine"]["driver"], "torch": torch.__version__}
    assert content["command"].startswith(f"python benchmarks/gpu.py --stage {stage}")
    results = content["cases"]
    wanted = {"skipped"} if stage == "faults" else set()
    for name, result in results.items():
        assert "values" in result or wanted & result.keys(), (name, result)
        assert "error" not in json.dumps(result), (name, result)
    printed = capsys.readouterr().out
    assert all(f"| {name} | " in printed for name in results)


def broken(bench: Bench) -> dict:
    raise RuntimeError("the card\nis on fire")


def unable(bench: Bench) -> dict:
    raise CannotRunError("needs two GPUs")


def run(cases: dict, folder, bench: Bench = BENCH) -> tuple[bool, dict]:
    path = folder / "stage.json"
    whole = gpu.run_stage(cases, gpu.Results(path, {"card": "one"}, "a command"), bench)
    return whole, json.loads(path.read_text())["cases"] if path.exists() else {}


def test_a_case_that_fails_is_recorded_and_the_next_one_runs(tmp_path):
    whole, found = run({"a": broken, "b": unable, "c": lambda bench: {"x": {"ms": 1.0}}}, tmp_path)
    assert whole
    assert found["a"]["error"] == "RuntimeError: the card\nis on fire"
    assert found["b"]["skipped"] == "needs two GPUs"
    assert found["c"]["values"] == {"x": {"ms": 1.0}}


def test_what_is_measured_is_not_measured_again(tmp_path):
    calls = []

    def case(bench: Bench) -> dict:
        calls.append("case")
        return {"x": {"ms": 1.0}}

    run({"a": case, "b": broken}, tmp_path)
    whole, found = run({"a": case, "b": case}, tmp_path)
    assert calls == ["case", "case"]
    assert whole and "values" in found["b"]


def test_no_case_begins_when_the_time_is_over(tmp_path):
    whole, found = run({"a": broken}, tmp_path, Bench(torch.device("cpu"), True, 0.0))
    assert not whole
    assert found == {}


def test_results_of_another_card_are_not_mixed_in(tmp_path):
    run({"a": lambda bench: {"x": {"ms": 1.0}}}, tmp_path)
    with pytest.raises(SystemExit, match="another --folder"):
        gpu.Results(tmp_path / "stage.json", {"card": "two"}, "a command")


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<...>", "attention"),
        ("nvjet_tst_192x192_64x3_2x1_v_bz_coopB_TNN", "matrices"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "matrices"),
        ("void at::native::multi_tensor_apply_kernel<..., FusedAdamMathFunctor<float, 4>>", "optimiser"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::AddFunctor<float>>", "element-wise"),
    ],
)
def test_kernels_are_told_apart(kernel, kind):
    assert kind_of(kernel) == kind


def test_the_least_time_of_a_step_is_that_of_its_operations():
    words = ["--ponder.mode=vanilla", "--training.global_batch_size=4", "--training.micro_batch_size=2"]
    config = read_config(["--config", str(REPOSITORY / "examples/configs/llama_410m.yaml"), *words])
    floors = least(config, GPUS["H100-SXM"])
    parameters = 24 * (4 * 1024**2 + 3 * 1024 * 2752) + 32000 * 1024
    assert floors["matrices"] == pytest.approx(1e3 * 6 * parameters * 4 * 2048 / 989e12, rel=0.02)
    assert least(config, None) == {}
