"""Package metadata. Every range is one that the tests ran on; `constraints.txt` pins the versions CI installs."""

import re
from pathlib import Path

from setuptools import find_packages, setup

# Inputs other than text and JSON Lines: Parquet, saved datasets, .zst.
DATA = ["pyarrow>=23,<27", "datasets>=5.0,<6", "zstandard>=0.23,<0.26"]

# The server of ponder serve.
SERVE = ["starlette>=1.0,<2", "uvicorn>=0.40,<1", "prometheus-client>=0.22,<1", "pydantic>=2.10,<3"]

# What compiles the kernels for GPUs; builds of PyTorch with CUDA bring their own. Tests interpret it on CPUs.
TRITON = ["triton>=3.9,<3.10; platform_system == 'Linux'"]

# Fine-tuning of exports, by transformers' Trainer and with low-rank adapters.
TUNING = ["accelerate>=1.15,<2", "peft>=0.21,<0.22"]

PACKAGE = Path(__file__).parent / "megatron_ponder"
VERSION = re.search(r'__version__ = "(.+)"', (PACKAGE / "__init__.py").read_text(encoding="utf-8"))[1]

setup(
    name="megatron_ponder",
    version=VERSION,
    description="Distributed pretraining of PonderLM-3: language models that think before they speak",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    python_requires=">=3.10",
    entry_points={"console_scripts": ["ponder = megatron_ponder.commands.ponder:start"]},
    packages=find_packages(include=["megatron_ponder", "megatron_ponder.*"]),
    package_data={"megatron_ponder.cluster": ["scripts/*.sh"], "megatron_ponder.commands": ["completion.bash"]},
    install_requires=[
        "torch>=2.11,<2.14",
        "deepspeed>=0.19.8,<0.20",
        "jsonargparse[signatures]>=4.50,<5",
        "docstring-parser>=0.16,<0.19",
        "numpy>=2.0,<3",
        "PyYAML>=6.0.1,<7",
        "rich>=13.7,<16",
        "tensorboard>=2.18,<3",
        "safetensors>=0.5,<1",
        "sentencepiece>=0.2,<0.3",
        "tokenizers>=0.21,<0.24",
        "transformers>=5.0,<6",
        "matplotlib>=3.10,<4",
        "protobuf>=5.26,<8",
        "psutil>=5.9,<8",
        "packaging>=23,<27",
        "filelock>=3.20,<5",
    ],
    extras_require={
        "dev": [
            "pytest>=8,<10",
            "pytest-xdist>=3.6,<4",
            "hypothesis>=6.100,<7",
            "ruff>=0.9,<0.18",
            "openai>=3.50,<4",
            "wandb>=0.19,<1",
            *DATA,
            *SERVE,
            *TUNING,
            *TRITON,
        ],
        "data": DATA,
        "serve": SERVE,
        "mpi": ["mpi4py>=4,<5"],
        "wandb": ["wandb>=0.19,<1"],
        "eval": ["lm-eval[hf]>=0.4.10,<0.5"],
    },
)
