"""What one GPU does with the parts that count, in stages that each end within minutes.

    python benchmarks/gpu.py --stage attention training faults decoding prefill [--minutes 8.5] [--folder gpu_results]

Every stage writes `FOLDER/STAGE.json` after each of its cases, and goes on from there when it is started again: a case
that has been measured is not measured anew, one that failed is tried again, and what the minutes do not suffice for is
left to the next start. A case that fails is recorded with its error, and the next one runs. Last comes the table of all
that is in the folder. Another card, or another PyTorch, needs another folder.

    attention   forward and backward of every kernel of `megatron_ponder/kernels`, and of PyTorch's alone without
                weights of keys, at head sizes 64 and 128 over 2,048 and 8,192 slots; and by how much each is off
    training    an optimiser step of examples/configs/llama_410m.yaml, vanilla and adaptive, eager and compiled: model
                FLOP utilisation of the slots that are run, and seconds of products, attention and the rest beside the
                least that they can take
    faults      weights that are no numbers are a skipped step; bf16 beside fp32; a rank that raises ends all
    decoding    a forward of the 410M shape with 1, 16 and 256 sequences of 1,024 slots
    prefill     prompts of 1,024 and 4,096 tokens

Times are medians over rounds in which all that is compared takes turns. It needs PyTorch, DeepSpeed, PyYAML,
jsonargparse, sentencepiece and tokenizers. Without a GPU, `--tiny` runs all of it at sizes that measure nothing.
"""

import argparse
import json
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import suppress
from datetime import date
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # the repository

from benchmarks.gpu_attention import attention_cases
from benchmarks.gpu_bench import Bench, CannotRunError, Case
from benchmarks.gpu_faults import fault_cases
from benchmarks.gpu_generation import decoding_cases, prefill_cases
from benchmarks.gpu_training import training_cases
from megatron_ponder.base.files import write_atomically
from megatron_ponder.parallel.cpu_settings import prepare_cpu

STAGES = {
    "attention": attention_cases,
    "training": training_cases,
    "faults": fault_cases,
    "decoding": decoding_cases,
    "prefill": prefill_cases,
}


def machine(device: torch.device) -> dict[str, str]:
    """What a result depends on besides the code."""
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    driver = ""
    with suppress(OSError, subprocess.SubprocessError):
        words = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
        driver = subprocess.run(words, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    return {"card": card, "driver": driver, "torch": torch.__version__}


class Results:
    """The file of a stage."""

    def __init__(self, path: Path, here: Mapping[str, str], command: str) -> None:
        """Go on with what is there.

        Raises:
            SystemExit: it is of another machine.
        """
        self._path, self._content = path, {"machine": dict(here), "command": command, "cases": {}}
        if path.exists():
            found = json.loads(path.read_text(encoding="utf-8"))
            if found["machine"] != self._content["machine"]:
                sys.exit(f"{path} is of {found['machine']}, and this is {dict(here)}; name another --folder")
            self._content["cases"] = found["cases"]

    def has(self, case: str) -> bool:
        """Whether a case has been measured, or cannot be on this machine."""
        return "error" not in self._content["cases"].get(case, {"error": "is missing"})

    def put(self, case: str, result: Mapping) -> None:
        """Write the result of a case down."""
        self._content["cases"][case] = {"date": date.today().isoformat(), **result}
        write_atomically(self._path, json.dumps(self._content, indent=1))


def run_stage(cases: Mapping[str, Case], results: Results, bench: Bench) -> bool:
    """Run the cases that are left, while there is time.

    Returns:
        Whether there is a result of every case.
    """
    for name, case in cases.items():
        if results.has(name):
            continue
        if time.monotonic() > bench.deadline:
            print(f"no time is left for {name}: start the stage again")
            return False
        print(f"{name} ...", flush=True)
        results.put(name, outcome(case, bench))
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()
    return True


def outcome(case: Case, bench: Bench) -> Mapping:
    """What becomes of a case: `values`, an `error`, or why it is `skipped`."""
    begun = time.monotonic()
    try:
        values = case(bench)
    except CannotRunError as reason:
        return {"skipped": str(reason)}
    except Exception as error:  # of whatever kind: the next case runs
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"[:2000]}
    return {"values": values, "seconds": round(time.monotonic() - begun, 1)}


def table(folder: Path) -> Iterator[str]:
    """Lines of Markdown for all results of a folder."""
    for path in sorted(folder.glob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        here = content["machine"]
        yield f"### {path.stem}: {here['card']}, driver {here['driver'] or 'unknown'}, PyTorch {here['torch']}"
        yield ""
        yield "| case | of | measured |"
        yield "|---|---|---|"
        for name, result in content["cases"].items():
            if "values" not in result:
                yield f"| {name} | | {result.get('skipped') or result['error'].splitlines()[0]} |"
                continue
            for variant, numbers in result["values"].items():
                yield f"| {name} | {variant} | {', '.join(f'{key} {shown(value)}' for key, value in numbers.items())} |"
        yield ""


def shown(value: float | str) -> str:
    """A number with four digits that count."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main(words: list[str] | None = None) -> int:
    """Measure and print; 1 if something is left to measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", nargs="+", choices=STAGES, default=[], help="measure these; none prints the table")
    parser.add_argument("--minutes", type=float, default=8.5, help="of each stage, after which no case begins")
    parser.add_argument("--folder", type=Path, default=Path("gpu_results"))
    parser.add_argument("--tiny", action="store_true", help="sizes that measure nothing")
    arguments = parser.parse_args(words)
    prepare_cpu()
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cpu" and not arguments.tiny:
        parser.error("there is no GPU; --tiny shows that everything runs")
    arguments.folder.mkdir(parents=True, exist_ok=True)
    command, whole = " ".join(["python benchmarks/gpu.py", *(sys.argv[1:] if words is None else words)]), True
    for stage in arguments.stage:
        bench = Bench(device, arguments.tiny, time.monotonic() + 60 * arguments.minutes)
        results = Results(arguments.folder / f"{stage}.json", machine(device), command)
        whole &= run_stage(STAGES[stage](bench.tiny), results, bench)
    print("\n".join(table(arguments.folder)))
    return 0 if whole else 1


if __name__ == "__main__":
    sys.exit(main())
