"""The sections about what a model reads: datasets and tokenizer."""

from dataclasses import MISSING, dataclass, field

from megatron_ponder.config.declarations import STEPS, number_field, path_field

SPLITS = ("train", "valid", "test")


@dataclass(frozen=True)
class BlendPart:
    """One dataset of a blend."""

    path: str = path_field(MISSING)
    """Prefix of the dataset."""
    weight: float = number_field(1.0, 1e-9, 1e12)
    """Its share of the samples is this, divided by the sum of the weights."""
    split: list[int | float] | str | None = number_field(None, 0, 1e12)
    """Weights of its train, valid and test parts, in place of `data.split`."""


@dataclass(frozen=True)
class PhaseConfig:
    """What to train on from some sample on."""

    first_sample: int = number_field(MISSING, 1, STEPS)
    """Samples of the run before this phase."""
    path: list[BlendPart] | str = path_field(MISSING)
    """Prefix of the dataset, or a blend."""


@dataclass(frozen=True)
class DataConfig:
    """The indexed datasets."""

    path: list[BlendPart] | str = path_field("")
    """Prefix of the dataset, the path of its `.bin` file without the ending; or a blend, as a list of `{path, weight,
    split}`, of prefixes, or of weights and prefixes by turns, as Megatron-LM has it; see [Blends](data.md#blends)."""
    valid_path: list[BlendPart] | str | None = path_field(None)
    """Prefix or blend for validation; `path` unless given."""
    test_path: list[BlendPart] | str | None = path_field(None)
    """Prefix or blend for testing; `path` unless given."""
    validation: dict[str, list[BlendPart] | str] = path_field({})
    """Further [validation sets](data.md#validation-sets), a prefix or blend for each name, such as `{code: data/code,
    prose: data/prose}`."""
    phases: list[PhaseConfig] = field(default_factory=list)
    """List of `{first_sample, path}` that replace `path` for training from a sample of the run on."""
    split: list[int | float] | str = number_field([969, 30, 1], 0, 1e12)
    """Weights of the train, valid and test parts of each dataset, by documents."""
    sequence_length: int = number_field(2048, 1, 2**24)
    """L, tokens of one training sequence."""
    num_workers: int = number_field(1, 0, 256)
    """Loader processes on each rank; 0 reads in the training process."""
    cache_path: str | None = path_field(None)
    """Folder where processes share the order of the samples through memory-mapped files, see [The index
    cache](data.md#the-index-cache); in the memory of each process unless given."""
    reset_at_eod: bool = False
    """Confine attention to the document and restart positions after each end-of-document token."""


@dataclass(frozen=True)
class TokenizerConfig:
    """The tokenizer."""

    path: str = path_field("")
    """A SentencePiece `.model` file, a `tokenizer.json`, or a folder that holds one of them."""
