"""Values that people write in several forms: blends of datasets, phases, ramps, as mappings or Megatron-LM's lists."""

from dataclasses import fields
from typing import Literal, get_args, get_origin

import yaml

from megatron_ponder.base.errors import UserError
from megatron_ponder.base.typed_arguments import type_of
from megatron_ponder.base.yaml_files import in_words, load_yaml
from megatron_ponder.config.data import BlendPart, PhaseConfig
from megatron_ponder.config.run import TrainingPhaseConfig

FORMS = "a prefix, a list of prefixes, [WEIGHT, PREFIX, ...], or [{path: PREFIX, weight: NUMBER, split: NUMBERS}, ...]"
SPLIT = "weights of train, valid and test such as [969, 30, 1]"
SETS = "a name and a dataset for each set, {NAME: PREFIX or blend, ...}"
PHASES = "a list of phases, [{first_sample: NUMBER, path: PREFIX}, ...]"
TRAINING_PHASES = "a list of phases, [{first_step: NUMBER, KEY: VALUE, ...}, ...]"
RAMP = "{start: NUMBER, increment: NUMBER, samples: NUMBER}"
_PART = ("path", "weight", "split")
_PHASE = ("first_sample", "path")
_TRAINING_PHASE = tuple(item.name for item in fields(TrainingPhaseConfig))
_RAMP = ("start", "increment", "samples")


def read_blend(name: str, value: object) -> object:
    """A blend in the one form that `DataConfig` has: a prefix, or a list of mappings.

    Args:
        name: of what is read, for messages.
        value: as in a file or on a command line, in any of `FORMS`.

    Raises:
        UserError: it is none of them.
    """
    value = _structure(name, value)
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        raise UserError(f"{name} is {value}; write {FORMS}")
    if all(isinstance(part, dict) for part in value):
        return [_read_part(name, part) for part in value]
    if any(isinstance(part, (dict, list)) or part is None for part in value):
        raise UserError(f"{name} mixes two forms; write {FORMS}")
    words = [str(word) for word in value]
    weights = [_number(word) for word in words]
    if not any(weight is not None for weight in weights):
        return [{"path": word} for word in words]
    if len(words) % 2 or None in weights[::2]:
        raise UserError(f"{name} is {words}, where weights and prefixes do not take turns; write {FORMS}")
    return [{"path": word, "weight": weight} for weight, word in zip(weights[::2], words[1::2], strict=True)]


def read_sets(name: str, value: object) -> object:
    """Blends by name, each as `read_blend` gives it."""
    value = _structure(name, value, SETS)
    if not isinstance(value, dict):
        raise UserError(f"{name} is {value}; write {SETS}")
    for key in (key for key, blend in value.items() if blend is None):
        raise UserError(f"{name}.{key} has no path; give it one")
    return {f"{key}": read_blend(f"{name}.{key}", blend) for key, blend in value.items()}


def read_phases(name: str, value: object) -> object:
    """Phases, each with its blend as `read_blend` gives it."""
    value = _structure(name, value)
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(phase, dict) for phase in value):
        raise UserError(f"{name} is {value}; write {PHASES}")
    for phase in value:
        _check_keys(f"a phase in {name}", phase, _PHASE, needed=_PHASE)
        _check_values(f"a phase in {name}", phase, PhaseConfig)
    return [
        phase | {"path": read_blend(f"the path of the phase from sample {phase['first_sample']} on", phase["path"])}
        for phase in value
    ]


def read_training_phases(name: str, value: object) -> object:
    """Phases of a run, each with its blend as `read_blend` gives it."""
    value = _structure(name, value, TRAINING_PHASES)
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(phase, dict) for phase in value):
        raise UserError(f"{name} is {value}; write {TRAINING_PHASES}")
    for phase in value:
        _check_keys(f"a phase in {name}", phase, _TRAINING_PHASE, needed=("first_step",))
        _check_values(f"a phase in {name}", phase, TrainingPhaseConfig)
    paths = ({"path": read_blend(f"the path of a phase in {name}", phase.get("path"))} for phase in value)
    return [phase | path for phase, path in zip(value, paths, strict=True)]


def read_ramp(name: str, value: object) -> object:
    """A ramp of the global batch as a mapping, or as the three numbers of Megatron-LM."""
    value = _structure(name, value, RAMP)
    if value in (None, "null"):
        return value
    words = _structure(name, f"[{', '.join(value.split())}]", RAMP) if isinstance(value, str) else value
    if isinstance(words, list) and len(words) == len(_RAMP):
        return dict(zip(_RAMP, words, strict=True))
    if not isinstance(value, dict):
        raise UserError(f"{name} is {value}; write {RAMP}")
    _check_keys(name, value, _RAMP, needed=_RAMP)
    return value


def read_split(name: str, value: object) -> object:
    """Weights of a split as a list of numbers, or as the text "969,30,1" that they were once written as."""
    value = _structure(name, value, SPLIT)
    if value is None or isinstance(value, str):
        return value
    weights = value if isinstance(value, list) else [value]
    if not all(isinstance(weight, (int, float)) and not isinstance(weight, bool) for weight in weights):
        raise UserError(f"{name} is {value}; write {SPLIT}")
    return weights


def _structure(name: str, value: object, forms: str = FORMS) -> object:
    """What is meant by a text that looks like a list or a mapping, as one on a command line does."""
    if not isinstance(value, str) or value.lstrip()[:1] not in ("[", "{"):
        return value
    try:
        return load_yaml(value)
    except yaml.YAMLError as error:
        raise UserError(f"{name} is {value}, which cannot be read ({in_words(error, value)}); write {forms}") from None


def _read_part(name: str, part: dict) -> dict:
    _check_keys(f"a dataset in {name}", part, _PART, needed=("path",))
    weight = part.get("weight", BlendPart.weight)
    number = _number(str(weight))
    if number is None or isinstance(weight, bool):
        hint = "weights are shares of their sum; leave % out" if str(weight).endswith("%") else "write a number"
        raise UserError(f"{name} gives {part['path']} the weight {weight}; {hint}")
    split = {"split": read_split(f"the split of {part['path']}", part["split"])} if "split" in part else {}
    return part | {"weight": number} | split


def _check_keys(what: str, given: dict, known: tuple[str, ...], needed: tuple[str, ...]) -> None:
    for key in given:
        if key not in known:
            raise UserError(f"{what} has {', '.join(known)}, and no {key}")
    for key in needed:
        if given.get(key) is None:
            raise UserError(f"{what} has no {key}; give it one")


def _check_values(what: str, given: dict, kind: type) -> None:
    """Refuse a number or a word that a key of a dataclass cannot be; of a list, jsonargparse would not say which."""
    for key, value in given.items():
        hint = type_of(kind, key)
        types = set(get_args(hint) or (hint,)) - {type(None)}
        if types <= {int, float} and not _is_number(value, whole=float not in types):
            raise UserError(f"{what} has the {key} {value}; write a {'number' if float in types else 'whole number'}")
        words = [word for each in types for word in get_args(each) if get_origin(each) is Literal]
        if words and value is not None and value not in words:
            raise UserError(f"{what} has the {key} {value}; write one of {', '.join(words)}")


def _is_number(value: object, whole: bool) -> bool:
    """Whether a value is nothing, or a number, also as YAML leaves some as text."""
    number = _number(f"{value}") if not isinstance(value, bool) else None
    return value is None or (number is not None and (not whole or number.is_integer()))


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
