"""saeopt trains and evaluates sparse autoencoders on language-model activations, at the scale of sweeps.

From Python: `saeopt.load`, `load_sae`, `splice`, `train_run`, `evaluate_run`, `export` and the classes `SAE` and
`Site` (docs/python.md, docs/steering.md). They are looked up when they are first used: importing saeopt is quick and
imports no torch.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from saeopt.config.sites import Site
    from saeopt.door import Run, evaluate_run, export, load, load_sae, train_run
    from saeopt.errors import UserError
    from saeopt.saes.base import SAE
    from saeopt.use.splice import Spliced, splice

_FROM = {
    "Run": "saeopt.door",
    "evaluate_run": "saeopt.door",
    "export": "saeopt.door",
    "load": "saeopt.door",
    "load_sae": "saeopt.door",
    "train_run": "saeopt.door",
    "SAE": "saeopt.saes.base",
    "Site": "saeopt.config.sites",
    "Spliced": "saeopt.use.splice",
    "splice": "saeopt.use.splice",
    "UserError": "saeopt.errors",
}
__all__ = [
    "SAE", "Run", "Site", "Spliced", "UserError", "evaluate_run", "export", "load", "load_sae", "splice", "train_run",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _FROM:
        raise AttributeError(f"module 'saeopt' has no attribute '{name}'")
    from importlib import import_module

    return getattr(import_module(_FROM[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_FROM])
