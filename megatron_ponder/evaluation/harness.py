"""Public benchmarks and tasks of one's own, by EleutherAI's lm-evaluation-harness on an export.

The harness runs `forward` of the export without a cache, `hard, jacobi(R)`, for log-likelihoods, and `generate` where a
task asks for text.
"""

import difflib
import importlib
import logging
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from megatron_ponder.base.errors import UserError, describe
from megatron_ponder.checkpoint.folders import resolve_checkpoint
from megatron_ponder.checkpoint.reader import read_config_of, read_weights, tokenizer_path
from megatron_ponder.hf.export import export
from megatron_ponder.hf.pretrained import read_json


@dataclass(frozen=True)
class Score:
    """One figure of a task.

    Attributes:
        task: its name, or that of a group.
        metric: what was measured, with the filter of answers if there is one.
        value: the figure.
        stderr: its standard error; None where the harness has none.
        samples: documents evaluated; 0 for a group.
        shots: solved examples before each question.
    """

    task: str
    metric: str
    value: float
    stderr: float | None
    samples: int
    shots: int


@dataclass(frozen=True)
class TaskEvaluation:
    """What the harness gave for an export.

    Attributes:
        checkpoint: its name; that of the folder for an export.
        harness: version of lm-evaluation-harness.
        setting: rule and evaluation of log-likelihoods.
        threshold: τ.
        router_bias: α.
        tasks: the scores.
    """

    checkpoint: str
    harness: str
    setting: str
    threshold: float
    router_bias: float
    tasks: list[Score]

    def as_dict(self) -> dict:
        """The values as JSON has them."""
        return asdict(self)


class TaskSet:
    """Tasks that the harness knows, found before any model is made ready for them."""

    def __init__(self, names: Sequence[str], folder: Path | None = None) -> None:
        """Find tasks.

        Args:
            names: of tasks, groups or tags; patterns such as `arc_*` are expanded.
            folder: with task files of one's own, searched first.

        Raises:
            UserError: if the harness is not installed, or does not know a name.
        """
        try:
            importlib.import_module("lm_eval.models.huggingface")
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise UserError(
                f"tasks need lm-evaluation-harness, which cannot be imported ({error}); run pip install -e '.[eval]'"
            ) from None
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        if folder is not None and not folder.is_dir():
            raise UserError(f"{folder} is not a folder; give the one that holds the .yaml files of your tasks")
        include = None if folder is None else str(folder)
        # The harness's own thousands of task files are read only where they are asked for.
        self.manager = TaskManager(include_path=include, include_defaults=False) if include else None
        if self.manager is None or not all(self.manager.match_tasks([name]) for name in names):
            self.manager = TaskManager(include_path=include)
        for name in names:
            if not self.manager.match_tasks([name]):
                near = difflib.get_close_matches(name, self.manager.all_tasks, 3)
                hint = f"did you mean {', '.join(near)}?" if near else "give the folder of its .yaml by --tasks-path"
                raise UserError(f"lm-evaluation-harness has no task {name}; {hint}")
        self.names = self.manager.match_tasks(list(names))

    def prepare(self) -> None:
        """Load the data of the tasks, or download them to where they are found later.

        Raises:
            UserError: they cannot be loaded, or the file of a task is none.
        """
        from lm_eval.tasks import get_task_dict

        with _refused_in_words(self), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of its new name, which the oldest version of the range does not have
            get_task_dict(self.names, self.manager)


def evaluate_tasks(
    folder: Path, tasks: TaskSet, limit: int | None = None, shots: int | None = None, batch_size: int = 8
) -> TaskEvaluation:
    """Run tasks on an export, with the source files in it.

    Args:
        folder: of the export; with a tokenizer.
        tasks: to run.
        limit: documents of each task; None for all.
        shots: solved examples before each question; the task's own number unless given.
        batch_size: sequences in a forward.

    Raises:
        UserError: if the folder is no export with a tokenizer, a number is out of range, the data of a task cannot be
            loaded, or the harness refuses what it is asked for.
    """
    for name, value, least in (("--limit", limit, 1), ("--num-fewshot", shots, 0), ("--batch-size", batch_size, 1)):
        if value is not None and value < least:
            raise UserError(f"{name} is {value}; it must be at least {least}")
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    config = read_json(folder / "config.json")
    if config.get("model_type") != "ponderlm":
        raise UserError(f"{folder} is no export of this package; write one with ponder export-hf")
    if not (folder / "tokenizer.json").is_file():
        raise UserError(f"{folder} has no tokenizer to read tasks with; put its tokenizer.json there")
    model = HFLM(
        str(folder),
        trust_remote_code=True,
        # What comes before the first token of a document in training; the harness would take another token.
        prefix_token_id=config.get("eos_token_id"),
        batch_size=batch_size,
        device="cuda" if torch.cuda.is_available() else "cpu",
    )
    with _refused_in_words(tasks):
        results = lm_eval.simple_evaluate(
            model, tasks=tasks.names, task_manager=tasks.manager, num_fewshot=shots, limit=limit, log_samples=False
        )
    exit = config.get("ponder_confidence_exit")
    iterated = config["ponder_mode"] in ("fixed", "adaptive") and config.get("ponder_latent_visibility", "all") == "all"
    hard = f"jacobi({config['ponder_jacobi_iterations']})" if iterated and not exit else "exact"
    return TaskEvaluation(
        checkpoint=folder.name,
        harness=lm_eval.__version__,
        setting=f"{exit or 'hard'}, {hard}",
        threshold=config["ponder_threshold"],
        router_bias=config["ponder_router_bias"],
        tasks=list(_scores(results)),
    )


@contextmanager
def _refused_in_words(tasks: TaskSet) -> Iterator[None]:
    from datasets.exceptions import DatasetGenerationError

    try:
        yield
    except (OSError, DatasetGenerationError) as error:
        raise UserError(
            f"the data of {', '.join(tasks.names)} cannot be loaded ({describe(error)}); make or download them first, "
            "and where there is no network set HF_HUB_OFFLINE=1"
        ) from error
    except (AssertionError, ValueError) as error:  # how the harness refuses numbers and task files
        raise UserError(
            f"lm-evaluation-harness refuses {', '.join(tasks.names)}: {describe(error) or 'it does not say why'}; "
            "compare --limit and --num-fewshot with the documents of the task, and its file with the harness's guide"
        ) from error


def _scores(results: dict) -> Iterator[Score]:
    for task, values in results["results"].items():
        for key, value in values.items():
            name, comma, answers = key.partition(",")
            if not comma or name.endswith("_stderr"):
                continue
            error = values.get(f"{name}_stderr,{answers}")
            yield Score(
                task=task,
                metric=name if answers == "none" else f"{name} ({answers})",
                value=float(value),
                stderr=float(error) if isinstance(error, (int, float)) else None,
                samples=results["n-samples"].get(task, {}).get("effective", 0),
                shots=results["n-shot"].get(task) or 0,
            )


@contextmanager
def exported(checkpoint: Path, threshold: float | None = None, bias: float | None = None) -> Iterator[Path]:
    """A temporary export of a checkpoint, of the checkpoint's name.

    Args:
        checkpoint: run folder (its latest checkpoint) or checkpoint folder.
        threshold: τ; the trained model's unless given.
        bias: α; the trained model's unless given.

    Raises:
        UserError: if there is no such checkpoint, or it has no tokenizer.
    """
    source = resolve_checkpoint(checkpoint)
    config = read_config_of(source)
    if tokenizer_path(source) is None:
        raise UserError(f"{source} has no tokenizer to read tasks with; put one into its folder tokenizer/")
    inference = config.inference
    changed = replace(
        inference,
        threshold=inference.threshold if threshold is None else threshold,
        router_bias=inference.router_bias if bias is None else bias,
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / source.name
        export(read_weights(source), replace(config, inference=changed), tokenizer_path(source), folder)
        yield folder
