"""What architectures of users were written against until `encode` and `decode` took raw activations."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from saeopt.saes.base import SAE, Forward

_NORMALISED = ("training_forward", "code", "reconstruct", "initialise", "measure", "start_encoder")
_NOW_CALLED = {"encode": "code", "decode": "reconstruct"}


def refuse_first_contract(cls: type) -> None:
    """Until `encode` and `decode` took raw activations, architectures defined and called them on normalised ones.

    Raises:
        TypeError: the class does; its numbers would silently be others.
    """
    for name, now in _NOW_CALLED.items():
        if name in vars(cls):
            raise TypeError(f"rename {cls.__name__}.{name} to '{now}': 'encode' and 'decode' take raw activations now")
        for method in _NORMALISED:
            if name in getattr(getattr(vars(cls).get(method), "__code__", None), "co_names", ()):
                where = f"{cls.__name__}.{method}"
                raise TypeError(f"in {where} call '{now}' instead of '{name}', which takes raw activations now")


def with_target(forward: Callable[..., Forward]) -> Callable[..., Forward]:
    """A `training_forward` that takes `(x, y, inputs)` or `(x, inputs)`, whichever of both it was written for.

    Classes of users, from before there was a y, are written and call their base in the second way.
    """
    parameters = inspect.signature(forward).parameters.values()
    places = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    whole = len(places) > 3 or any(p.kind == p.VAR_POSITIONAL for p in parameters)

    @wraps(forward)
    def either(self: SAE, x_Nd: Tensor, *rest: Any, **named: Any) -> Forward:
        if named or len(rest) not in (1, 2):
            return forward(self, x_Nd, *rest, **named)
        y_Ne, inputs = rest if len(rest) == 2 else (x_Nd, rest[0])
        return forward(self, x_Nd, y_Ne, inputs) if whole else forward(self, x_Nd, inputs)

    return either
