"""The one entry point finds every command, answers before what takes seconds to import, and knows typing errors."""

import ast
import os
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

import megatron_ponder
from megatron_ponder.base.errors import UserError
from megatron_ponder.commands import ponder
from tests import REPOSITORY

FOLDER = Path(ponder.__file__).parent
FILES = [*sorted((REPOSITORY / "tools").glob("*.py")), REPOSITORY / "pretrain_ponder.py"]


def refusal(*words: str) -> str:
    """The line with which a command line is refused."""
    with pytest.raises(UserError) as caught:
        ponder._answer.__wrapped__(words)
    return str(caught.value)


def test_every_module_is_a_command_and_every_command_a_module():
    modules = {path.stem for path in FOLDER.glob("*.py")} - {"__init__", "ponder"}
    assert sorted(map(ponder.module_of, ponder.COMMANDS)) == sorted(modules)


def test_the_help_has_a_line_for_every_command(capsys):
    ponder.main([])
    short = capsys.readouterr().out
    ponder.main(["--help"])
    assert capsys.readouterr().out == short
    for group, names in ponder.GROUPS.items():
        assert f"\n{group}:\n" in short
        for name in names:
            assert re.search(rf"(?m)^  {name} +[A-Z].*\w$", short)
    assert max(map(len, short.splitlines())) <= 120


def test_the_help_imports_neither_pytorch_nor_a_parser():
    code = "import sys; from megatron_ponder.commands.ponder import main; main(['--help'])\n"
    code += "sys.exit(str(sys.modules.keys() & {'torch', 'numpy', 'jsonargparse', 'rich'} or ''))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=REPOSITORY)
    assert done.stderr.strip() == ""
    assert "preprocess" in done.stdout


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("tarin", "there is no command tarin; did you mean train?"),
        ("train_tokenizer", "there is no command train_tokenizer; did you mean train-tokenizer?"),
        ("import", "did you mean import-hf?"),
        ("quux", "there is no command quux; commands are train-tokenizer, preprocess, "),
        ("--config", "there is no command --config; commands are"),
    ],
)
def test_an_unknown_command_is_one_line_with_the_nearest(word, said):
    assert said in refusal(word, "--x")


@pytest.mark.parametrize("name", ["", *ponder.COMMANDS])
def test_every_command_says_its_version(name, capsys):
    with suppress(SystemExit):
        ponder.main([*name.split(), "--version"])
    words = capsys.readouterr().out.split()
    assert (words[0], words[-1]) == ("ponder", megatron_ponder.__version__)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_that_launchers_start_is_a_command_and_nothing_else(path):
    """A docstring, imports, and a call; what it calls is a command."""
    document, *imported, guard = ast.parse(path.read_text(encoding="utf-8")).body
    assert re.match(r"`ponder ([\w-]+)` as a file", document.value.value)[1] in ponder.COMMANDS
    names = {f"{statement.module}.{name.name}" for statement in imported for name in statement.names}
    module = ponder.module_of(re.match(r"`ponder ([\w-]+)`", document.value.value)[1])
    assert names - {"megatron_ponder.base.ending.run_to_the_end"} == {f"megatron_ponder.commands.{module}.main"}
    assert len(guard.body) == 1


@pytest.mark.parametrize(
    "name", ["evaluate", "analyze", "merge", "average", "import-hf", "export-hf", "train-tokenizer"]
)
def test_what_knows_no_ranks_is_not_done_by_each_of_them(name, monkeypatch, capsys):
    for rank in ("1", "0"):
        for variable, value in {"RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "h", "MASTER_PORT": "29500"}.items():
            monkeypatch.setenv(variable, value)
        with pytest.raises(SystemExit) as ended:
            ponder.main([name])
        assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"ponder {name} works in one process, and 2 were started; start it without a launcher" in said


@pytest.mark.parametrize("start", [["-m", "megatron_ponder", "merge"], ["tools/merge_datasets.py"]])
def test_a_process_ends_with_the_code_of_its_command(start):
    command = [sys.executable, *start, "--inptu"]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=REPOSITORY, env=environment)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: there is no option --inptu; did you mean --input?")


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["tr"], {"train", "train-tokenizer"}),
        (["merge", "--inp"], {"--input"}),
        (["merge", "--"], {"--help", "--version", "--input", "--output-prefix"}),
        (["merge", "file"], set()),
    ],
)
def test_the_shell_completes_commands_and_options(words, offered):
    start = f'ponder() {{ {sys.executable} -m megatron_ponder "$@"; }}; eval "$(ponder --completion)"'
    ask = f'COMP_WORDS=(ponder {" ".join(words)}); COMP_CWORD={len(words)}; _ponder; printf "%s\\n" "${{COMPREPLY[@]}}"'
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        ["bash", "-c", f"{start}; {ask}"], capture_output=True, text=True, check=True, env=environment
    )
    assert (set(done.stdout.split()), done.stderr) == (offered, "")
