"""From the datasets, blends and phases of a configuration to the samples of each split, and what tells them apart."""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

from megatron_ponder.base.errors import UserError
from megatron_ponder.config import BlendPart, DataConfig
from megatron_ponder.config.data import SPLITS
from megatron_ponder.data.blend import BlendedDataset, Phase
from megatron_ponder.data.dataset import TokenDataset, open_part
from megatron_ponder.data.dataset_manifest import fingerprint
from megatron_ponder.data.index_cache import IndexCache
from megatron_ponder.data.indexed_dataset import IndexedDataset
from megatron_ponder.data.interleave import Interleave
from megatron_ponder.data.splits import parse_split, split_text

Samples = TokenDataset | BlendedDataset
Blend = list[BlendPart] | str
WHOLE = "0,1"  # the split of a dataset that is all for validation


@dataclass(frozen=True)
class Mixture:
    """What a configuration reads.

    Attributes:
        samples: by split: train, valid, test; a split without weight is absent. And by name of a validation set.
        fingerprint: of all that decides which training sample comes when, see `same_past`.
    """

    samples: dict[str, Samples]
    fingerprint: str


def parts_of(blend: Blend) -> list[BlendPart]:
    """A prefix alone is a blend of one."""
    return [BlendPart(blend)] if isinstance(blend, str) else list(blend)


def prefixes(data: DataConfig) -> list[str]:
    """Every dataset that a configuration names, once, in the order of the configuration."""
    blends = [blend for name in (*SPLITS, *data.validation) for _, blend in _phases(data, name)]
    return list(dict.fromkeys(part.path for blend in blends for part in parts_of(blend)))


def open_mixture(data: DataConfig, seed: int) -> Mixture:
    """Open every dataset of a configuration.

    Args:
        data: with a path.
        seed: of the order.

    Raises:
        UserError: a dataset cannot be read or holds too little, a blend has the same data twice, or the folder of the
            cache cannot be written.
    """
    shared = None if data.cache_path is None else IndexCache(data.cache_path)
    content = cache(lambda prefix: fingerprint(prefix, None if shared is None else shared.stamps))
    indexed = cache(IndexedDataset)

    def held_out(prefix: str) -> str:
        """The split of a dataset in a validation set: that of training, or all of it where training reads none."""
        indexed(prefix)  # says what is wrong with the path
        trained = {content(path): split for path, split in _trained(data)}
        return trained.get(content(prefix), WHOLE)

    def samples_of(name: str, part_name: str, usual: Callable[[str], str]) -> Samples | None:
        streams: dict[tuple[str, str], int] = {}
        datasets: list[TokenDataset] = []
        phases = []
        for first, blend in _phases(data, name):
            drawn: dict[int, float] = {}
            for part in _with_share(part_name, blend, usual):
                source = indexed(part.path)  # says what is wrong with the path
                stream = (content(part.path), part.split)
                if stream not in streams:
                    options = (part_name, part.split, data.sequence_length, seed, shared, content(part.path))
                    datasets.append(open_part(source, *options))
                    streams[stream] = len(datasets) - 1
                if streams[stream] in drawn:
                    raise UserError(f"{part.path} has the same data as another dataset of its blend; leave one out")
                drawn[streams[stream]] = part.weight
            if not drawn and first:
                raise UserError(
                    f"the phase from sample {first} on in data.phases leaves nothing to train on; give the first part "
                    "of data.split, or of the split of one of its datasets, a weight"
                )
            phases.append(Phase(first, list(drawn), list(drawn.values())))
        if not phases[0].datasets:
            return None
        return datasets[0] if len(datasets) == 1 else BlendedDataset(datasets, phases)

    opened = {name: samples_of(name, name, lambda _: split_text(data.split)) for name in SPLITS}
    for name in data.validation:
        with _told_of(f"data.validation.{name}"):
            opened[name] = samples_of(name, "valid", held_out)
            if opened[name] is None:
                raise UserError(
                    "nothing of it is left for validation; name a dataset that training does not read, or give a "
                    "split with a second weight, such as [969, 30]"
                )
    samples = {name: found for name, found in opened.items() if found is not None}
    return Mixture(samples, ",".join(_digests(data, seed, content)))


def validation_sets(samples: dict[str, Samples], data: DataConfig) -> dict[str, Samples]:
    """Those of the samples of a mixture that training is validated on: the valid part, and sets with a name."""
    return {name: samples[name] for name in ("valid", *data.validation) if name in samples}


def build_ahead(mixture: Mixture, samples: dict[str, int]) -> Iterator[tuple[str, TokenDataset, int]]:
    """Build in the cache what reading the first samples of each split will need.

    Args:
        samples: how many, by split; those that are absent are not built.

    Yields:
        A split, one of its datasets, and how many epochs of that are now built.
    """
    for name, count in samples.items():
        if name not in mixture.samples:
            continue
        for dataset, drawn in mixture.samples[name].streams(count):
            epochs = -(-drawn // dataset.samples_per_epoch)
            for epoch in range(epochs):
                dataset.index.prepare(epoch)
            yield name, dataset, epochs


def same_past(stored: str, current: str, samples: int) -> bool:
    """Whether two fingerprints say that the same first `samples` samples come in the same order.

    A phase that begins there or later lies in the future, and may be added, changed or left out.
    """

    def past(value: str) -> list[str]:
        first, *later = value.split(",")
        return [first, *(entry for entry in later if int(entry.partition(":")[0]) < samples)]

    return past(stored) == past(current)


def _phases(data: DataConfig, name: str) -> list[tuple[int, Blend]]:
    if name == "train":
        return [(0, data.path), *((phase.first_sample, phase.path) for phase in data.phases)]
    if name in data.validation:
        return [(0, data.validation[name])]
    return [(0, (data.valid_path if name == "valid" else data.test_path) or data.path)]


def _with_share(name: str, blend: Blend, usual: Callable[[str], str]) -> Iterator[BlendPart]:
    """The parts of a blend that a split has documents of, each with the split that applies to it.

    Args:
        name: of the split.
        blend: of datasets.
        usual: weights of the split of a dataset, by its prefix, that has none of its own.
    """
    for part in parts_of(blend):
        split = split_text(part.split) if part.split else usual(part.path)
        if name in parse_split(split):
            yield BlendPart(part.path, part.weight, split)


def _trained(data: DataConfig) -> Iterator[tuple[str, str]]:
    """Every dataset of training, with the split that applies to it there."""
    for _, blend in _phases(data, "train"):
        yield from ((part.path, split_text(part.split or data.split)) for part in parts_of(blend))


@contextmanager
def _told_of(key: str) -> Iterator[None]:
    """Begin a refusal with the key that it is about."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{key}: {error}") from None


def _digests(data: DataConfig, seed: int, content) -> Iterator[str]:
    """For each training phase a digest of its blend, after `first_sample:` unless that is 0."""
    for first, blend in _phases(data, "train"):
        parts = list(_with_share("train", blend, lambda _: split_text(data.split)))
        orders = [f"{content(part.path)}/{part.split}" for part in parts]
        if len(parts) > 1:
            shares = Interleave([part.weight for part in parts]).shares
            orders = [f"{order}/{share}" for order, share in zip(orders, shares, strict=True)]
        order = "\n".join(orders) + f"/{data.sequence_length}/{seed}"
        digest = hashlib.sha256(order.encode()).hexdigest()
        yield f"{first}:{digest}" if first else digest
