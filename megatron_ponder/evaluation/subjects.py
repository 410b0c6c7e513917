"""Checkpoints as the subjects of an analysis: which can be compared, and what figures call them."""

from collections.abc import Sequence

from megatron_ponder.base.errors import UserError
from megatron_ponder.checkpoint.load import LoadedModel
from megatron_ponder.evaluation.analysis_plan import Subject


def subjects_of(models: Sequence[LoadedModel]) -> list[Subject]:
    """Models that can be compared, as subjects of an analysis.

    Raises:
        UserError: two have different tokenizers.
    """
    _check_same_tokens(models)
    return [
        Subject(label, loaded.model, loaded.folder, loaded.config.ponder_training.evaluation_refinements)
        for label, loaded in zip(_labels(models), models, strict=True)
    ]


def _check_same_tokens(models: Sequence[LoadedModel]) -> None:
    def identity(loaded: LoadedModel) -> tuple:
        tokenizer = loaded.tokenizer
        return (loaded.config.model.vocab_size, None if tokenizer is None else tokenizer.fingerprint)

    for loaded in models[1:]:
        if identity(loaded) != identity(models[0]):
            raise UserError(
                f"{models[0].folder} and {loaded.folder} have different tokenizers, so that their losses cannot be "
                "compared; analyse them one by one"
            )


def _labels(models: Sequence[LoadedModel]) -> list[str]:
    """The run's name, with the checkpoint's where two are of one run, and numbers where that is not enough."""
    folders = [loaded.folder.resolve() for loaded in models]
    runs = [folder.parent.parent.name if folder.parent.name == "checkpoints" else folder.name for folder in folders]
    labels = [
        run if runs.count(run) == 1 else f"{run}/{folder.name}" for run, folder in zip(runs, folders, strict=True)
    ]
    return [
        label if labels.count(label) == 1 else f"{label} ({labels[: index + 1].count(label)})"
        for index, label in enumerate(labels)
    ]
