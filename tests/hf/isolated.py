"""Python without this package: whose imports of PyTorch and transformers scripts of tests share by forking."""

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import transformers

INSTALLED = str(Path(transformers.__file__).parents[1])
# Forks for each line on standard input, runs the script in it, and answers with the exit code.
FORKING = """
import json, os, sys, traceback
sys.path.insert(0, sys.argv[1])  # isolated from all settings, but with the version of transformers under test
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, pipeline

for line in sys.stdin:
    script, words, folder, streams = json.loads(line)
    if child := os.fork():
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        continue
    for number, path in enumerate(streams, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.chdir(folder)
    sys.argv = ["-c", *words]
    code = 0
    try:
        exec(script, {"__name__": "__main__"})
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
"""


class Isolated:
    """A process that has imported transformers and nothing of this package, and forks to run scripts."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        """Start it with these variables alone."""
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-c", FORKING, INSTALLED],
            env=dict(environment),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, script: str, words: list[str], folder: Path) -> str:
        """What a script prints that gets these words and runs in a folder, where it leaves two files.

        Raises:
            AssertionError: it fails; with its errors.
        """
        streams = [str(folder / name) for name in ("stdout", "stderr")]
        self._process.stdin.write(json.dumps([script, words, str(folder), streams]) + "\n")
        self._process.stdin.flush()
        code = self._process.stdout.readline()
        output, errors = (Path(path).read_text(encoding="utf-8") for path in streams)
        assert code == "0\n", errors
        return output

    def close(self) -> None:
        """End it."""
        self._process.stdin.close()
        self._process.wait()
