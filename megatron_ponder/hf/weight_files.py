"""The safetensors files of a Hugging Face folder: their headers, from which sizes are known, and their tensors."""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_ponder.base.errors import UserError
from megatron_ponder.checkpoint.finite import require_finite

INDEX, WHOLE = "model.safetensors.index.json", "model.safetensors"
# What weights may be stored in. Anything narrower is quantised, and a number only together with its scales.
_TYPES = ("F64", "F32", "F16", "BF16")


def read_json(path: Path) -> dict:
    """The object that a JSON file of a Hugging Face folder holds.

    Raises:
        UserError: if there is none.
    """
    if not path.is_file():
        raise UserError(f"{path.parent} has no {path.name}; give the folder of a downloaded Hugging Face model")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({error}); download it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a JSON object; download it again")
    return content


def weight_files(model_dir: Path) -> list[Path]:
    """`model.safetensors`, or the files that `model.safetensors.index.json` names.

    Raises:
        UserError: if there are none, or the index names what is not there or not in the folder.
    """
    index = model_dir / INDEX
    if not index.is_file():
        if (model_dir / WHOLE).is_file():
            return [model_dir / WHOLE]
        if any(model_dir.glob("*.bin")):
            raise UserError(
                f"{model_dir} has its weights in pickled .bin files, and loads never execute pickled code; load it "
                "with transformers where you trust it and save it again, which writes safetensors"
            )
        raise UserError(f"{model_dir} has no {WHOLE}; give the folder of a downloaded Hugging Face model")
    named = read_json(index).get("weight_map")
    if not isinstance(named, dict) or not named or not all(isinstance(name, str) for name in named.values()):
        raise UserError(f"{index} has no weight_map that names the file of every tensor; download it again")
    for name in sorted(set(named.values())):
        if Path(name).name != name or "\0" in name or not (model_dir / name).is_file():
            raise UserError(f"{index} names {name}, which is not in {model_dir}; download the model again")
    return [model_dir / name for name in sorted(set(named.values()))]


class WeightFiles:
    """The tensors in safetensors files, each of which is mapped into memory when somebody asks for it.

    Attributes:
        described: the tensors by name without their contents, on the `meta` device.
    """

    def __init__(self, files: list[Path]) -> None:
        """Read the headers.

        Args:
            files: of one model, as `weight_files` gives them.

        Raises:
            UserError: if a file is damaged, a tensor is in two of them, or is of a type that weights do not have.
        """
        self.described: dict[str, Tensor] = {}
        self._paths: dict[str, Path] = {}
        self._opened = {path: _opened(path) for path in files}
        for path, file in self._opened.items():
            for name in file.keys():  # noqa: SIM118  (the file is no dict)
                part = file.get_slice(name)
                if part.get_dtype() not in _TYPES:
                    raise UserError(
                        f"{path}: {name} has type {part.get_dtype()}, which is no floating-point weight; convert a "
                        "model that is not quantised"
                    )
                if name in self.described:
                    raise UserError(f"{path}: {name} is in another file of {path.parent} too; download the model again")
                self.described[name], self._paths[name] = torch.empty(part.get_shape(), device="meta"), path

    def mapped(self, name: str) -> Tensor:
        """The tensor in the type it is stored in, of which the system reads what is taken of it."""
        return self._opened[self._paths[name]].get_tensor(name)

    def require_finite(self, name: str, part: Tensor) -> None:
        """Refuse a part of a tensor, in fp32, if a value of it is not finite.

        Raises:
            UserError: naming the tensor and its file.
        """
        what = f"{self._paths[name]}: {name}"
        require_finite(part, what, "download it again, or convert an earlier checkpoint of it")


def _opened(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise UserError(f"{path} is damaged ({error}); download it again") from None
