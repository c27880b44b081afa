"""What architectures of users were written against until `encode` and `decode` took raw activations."""

from __future__ import annotations

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
