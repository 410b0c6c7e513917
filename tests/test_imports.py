"""What the package needs before it is used, and which way its imports point."""

import ast
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "megatron_ponder"
# From the ground up; a part knows of those below it alone.
FLOORS = [
    "base",
    "config",
    "cluster",
    "parallel",
    "kernels",
    "model",
    "data",
    "checkpoint",
    "hf",
    "runs",
    "estimates",
    "generation",
    "training",
    "evaluation",
    "serving",
    "commands",
]
# Copied into every export, where the package is not installed.
SHIPPED = [f"{part}_ponderlm.py" for part in ("configuration", "modeling", "layers", "exits", "methods", "cache")]
LIGHT = [part for part in FLOORS if part not in ("hf", "training", "evaluation", "serving", "commands")]
WITHOUT_PYTORCH = ["base", "config", "cluster", "runs"]
OPTIONAL = [
    "deepspeed",
    "transformers",
    "apex",
    "triton",
    "flash_attn",
    "mpi4py",
    "matplotlib",
    "tensorboard",
    "megatron",
]
OPTIONAL += ["pyarrow", "datasets", "zstandard"]  # the extra "data"
OPTIONAL += ["starlette", "uvicorn", "prometheus_client", "pydantic"]  # the extra "serve"

IMPORT_WITHOUT_OPTIONAL_PACKAGES = """
import importlib, pkgutil, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in OPTIONAL:
            raise ImportError(f"{name} is refused")

OPTIONAL = sys.argv[1].split(",")
sys.meta_path.insert(0, Refuse())
for refused in OPTIONAL:
    try:
        importlib.import_module(refused)
    except ImportError:
        continue
    sys.exit(f"{refused} is not refused")
for part in sys.argv[2].split(","):
    module = importlib.import_module(f"megatron_ponder.{part}")
    print(module.__name__)
    for found in pkgutil.iter_modules(getattr(module, "__path__", [])):
        print(importlib.import_module(f"{module.__name__}.{found.name}").__name__)
import torch
if torch.cuda.is_initialized() or torch.distributed.is_initialized():
    sys.exit("importing has side effects")
"""


def test_imports_without_optional_packages():
    command = [sys.executable, "-c", IMPORT_WITHOUT_OPTIONAL_PACKAGES, ",".join(OPTIONAL), ",".join(LIGHT)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    files = [PACKAGE / f"{part}.py" for part in LIGHT if (PACKAGE / f"{part}.py").exists()]
    files += [path for part in LIGHT for path in (PACKAGE / part).glob("*.py")]
    files += [path for part in LIGHT for path in (PACKAGE / part).glob("*/__init__.py")]
    assert set(done.stdout.split()) == {module_name(path) for path in files}


IMPORT_WITHOUT_PYTORCH = """
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
    if "torch" in sys.modules:
        sys.exit(f"{name} imports PyTorch")
"""


def test_parts_that_need_no_pytorch_import_none():
    """What looks at runs and submits jobs on a login node must not wait for it."""
    names = [module_name(path) for part in WITHOUT_PYTORCH for path in sorted((PACKAGE / part).glob("**/*.py"))]
    command = [sys.executable, "-c", IMPORT_WITHOUT_PYTORCH, *names]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and full dotted name of everything that a file imports, inside functions too."""
    package = list(path.relative_to(ROOT).parent.parts)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) + 1 - node.level]) + "." if node.level else ""
            yield from ((node.lineno, f"{base}{node.module or ''}.{alias.name}") for alias in node.names)


def part_of(dotted: str) -> str | None:
    """The part of the package that a dotted name lies in; None outside the package."""
    first, *rest = dotted.split(".")
    return rest[0] if first == "megatron_ponder" and rest else None


PARTS = sorted(PACKAGE.glob("*/**/*.py"))


def test_every_part_has_a_floor():
    assert {part_of(module_name(path)) for path in PARTS} == set(FLOORS)


@pytest.mark.parametrize("path", PARTS, ids=module_name)
def test_imports_point_down(path):
    own = part_of(module_name(path))
    for line, dotted in imports(path):
        other = part_of(dotted)
        if other is not None and other != own:
            assert FLOORS.index(other) < FLOORS.index(own), f"{path}:{line} imports {dotted} from a higher floor"
        assert dotted.partition(".")[0] not in ("tests", "tools", "benchmarks"), f"{path}:{line}"


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_files_import_nothing_of_the_package_but_each_other(name):
    others = {f"megatron_ponder.hf.{Path(other).stem}" for other in SHIPPED}
    for line, dotted in imports(PACKAGE / "hf" / name):
        if part_of(dotted) is not None:
            assert dotted.rpartition(".")[0] in others, f"{name}:{line} imports {dotted}"


def test_the_package_itself_imports_nothing_but_its_entry_point():
    assert not list(imports(PACKAGE / "__init__.py"))
    assert [dotted for _, dotted in imports(PACKAGE / "__main__.py")] == ["megatron_ponder.commands.ponder.start"]


def test_modules_do_not_import_each_other_in_circles():
    names = {module_name(path) for path in PARTS}
    targets = {
        module_name(path): {name for _, dotted in imports(path) for name in (dotted, dotted.rpartition(".")[0])} & names
        for path in PARTS
    }
    remaining = set(names)
    while leaves := {name for name in remaining if not targets[name] & remaining}:
        remaining -= leaves
    assert not remaining, f"import each other: {sorted(remaining)}"


def test_a_name_of_a_class_means_one_thing():
    named = defaultdict(set)
    for path in PARTS:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and path.name not in SHIPPED:
                named[node.name].add(module_name(path))
    assert {name: modules for name, modules in named.items() if len(modules) > 1} == {}


def test_a_name_of_a_file_means_one_thing():
    """But a command has the name of what it calls, a kernel of its layer, a mode and a section of what they are of."""
    named = Counter(
        path.name
        for path in PARTS
        if path.parent.name not in ("commands", "kernels", "modes", "config") and path.name != "__init__.py"
    )
    assert [name for name, count in named.items() if count > 1] == []
