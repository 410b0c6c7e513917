"""Keeping the recipe of a cheap tensor for the backward pass in place of the tensor.

Outputs of norms and activation functions are as large as their inputs, which are kept anyway; computing them again
costs one pass over memory and no matrix product. This is not activation recompute, which repeats whole blocks.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def keep_recipe(wanted: bool, tensor: Tensor, recipe: Callable[[], Tensor]) -> AbstractContextManager:
    """`KeptAsRecipe` if it is wanted and there will be a backward pass."""
    return KeptAsRecipe(tensor, recipe) if wanted and torch.is_grad_enabled() else nullcontext()


class KeptAsRecipe(torch.autograd.graph.saved_tensors_hooks):
    """Inside this context, autograd keeps `recipe` wherever it would keep `tensor`.

    Autograd asks the innermost such context alone: inside one, no operation may read the tensor of an outer one.
    """

    def __init__(self, tensor: Tensor, recipe: Callable[[], Tensor]) -> None:
        """Prepare to replace one tensor.

        Args:
            tensor: what operations inside the context read.
            recipe: computes its value again, from tensors that are kept in any case.
        """
        pointer, size, result = tensor.data_ptr(), tensor.numel(), _Result(recipe)

        def pack(saved: Tensor) -> Tensor | torch.Size:
            if saved.data_ptr() != pointer or saved.numel() != size:
                return saved
            result.wanted += 1
            return saved.shape

        def unpack(kept: Tensor | torch.Size) -> Tensor:
            return kept if isinstance(kept, Tensor) else result.take().view(kept)

        super().__init__(pack, unpack)


class _Result:
    """The value of a recipe, from the first operation that wants it to the last.

    Apart from the context, which would otherwise be part of a cycle that keeps activations until garbage is collected.
    """

    def __init__(self, recipe: Callable[[], Tensor]) -> None:
        self._recipe, self._value, self.wanted = recipe, None, 0

    def take(self) -> Tensor:
        if self._value is None:
            with torch.no_grad():
                self._value = self._recipe()
        value = self._value
        self.wanted -= 1
        if self.wanted <= 0:
            self._value = None
        return value
