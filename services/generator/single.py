"""Numbers of single precision, for the tables of diffusers' schedulers.

A scheduler computes with tensors of one element; each operation on one costs as much time as one on latents, and there
are dozens in a step. `Single` is a Python number that rounds as such a tensor does, so that the same code gives the
same bits and asks torch only where latents are in it. Main function: `tabulate`.
"""

import operator
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from diffusers import UniPCMultistepScheduler

# What a scheduler holds of its schedule, by name.
_TABLES = ("timesteps", "sigmas", "alphas_cumprod")
# Powers and logarithms that are remembered.
_REMEMBERED = 4096


def _rounded(operation: Callable[[Any, Any], Any]) -> Callable[["Single", Any], Any]:
    def compute(self: "Single", other: Any) -> Any:
        if not isinstance(other, int | float):
            return NotImplemented
        with np.errstate(all="ignore"):
            return Single(operation(np.float32(self), np.float32(other)))

    return compute


class Single(float):
    """A number of single precision: what it is computed with is rounded first, what comes out is rounded again."""

    __slots__ = ()

    __add__ = __radd__ = _rounded(operator.add)
    __sub__ = _rounded(operator.sub)
    __rsub__ = _rounded(lambda one, other: other - one)
    __mul__ = __rmul__ = _rounded(operator.mul)
    __truediv__ = _rounded(operator.truediv)
    # As torch divides a number by a tensor: rounded twice.
    __rtruediv__ = _rounded(lambda one, other: np.float32(1) / one * other)

    def __pow__(self, exponent: float) -> "Single":  # type: ignore[override]
        return Single(_computed(torch.pow, float(self), exponent))

    def __neg__(self) -> "Single":
        return Single(-float(self))

    def sqrt(self) -> "Single":
        """Its square root."""
        return Single(_computed(torch.sqrt, float(self)))

    def __index__(self) -> int:
        """The place in a table that a timestep is; it is whole."""
        assert self.is_integer(), f"{self} is no place in a table"
        return int(self)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """With tensors a plain number; alone, as in torch.log(sigma), a number again."""
        if len(args) == 1 and isinstance(args[0], cls) and not kwargs:
            return cls(_computed(func, float(args[0])))
        plain = (float(each) if isinstance(each, cls) else each for each in args)
        return func(*plain, **(kwargs or {}))


@lru_cache(_REMEMBERED)
def _computed(func: Callable[..., torch.Tensor], value: float, *others: float) -> float:
    """By torch itself: nobody else's powers and logarithms have the same last bits."""
    return float(func(torch.tensor(value, dtype=torch.float32), *others))


def tabulate(scheduler: Any) -> None:
    """Has a scheduler whose timesteps are set, on the CPU, compute with `Single` numbers.

    UniPC stays as it is: it builds systems of equations of its numbers, and solves them where the latents are.
    """
    if isinstance(scheduler, UniPCMultistepScheduler):
        return
    for name in _TABLES:
        if (table := getattr(scheduler, name, None)) is not None:
            setattr(scheduler, name, tuple(map(Single, table.tolist())))
    if hasattr(scheduler, "final_alpha_cumprod"):
        scheduler.final_alpha_cumprod = Single(scheduler.final_alpha_cumprod)
