"""Which architecture a name stands for. Importing this module imports no torch."""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING

from saeopt.config.base import nearest
from saeopt.config.saes import SAEConfig
from saeopt.errors import UserError

if TYPE_CHECKING:
    from saeopt.saes.base import SAE

ARCHITECTURES = {
    "relu": "saeopt.saes.relu:ReluSAE",
    "gated": "saeopt.saes.gated:GatedSAE",
    "hard_concrete": "saeopt.saes.hard_concrete:HardConcreteSAE",
    "gated_hard_concrete": "saeopt.saes.gated_hard_concrete:GatedHardConcreteSAE",
    "topk": "saeopt.saes.topk:TopKSAE",
    "batch_topk": "saeopt.saes.batch_topk:BatchTopKSAE",
    "matryoshka_batch_topk": "saeopt.saes.batch_topk:MatryoshkaBatchTopKSAE",
    "jumprelu": "saeopt.saes.jumprelu:JumpReluSAE",
}


ONLY_BUILTIN = "SAEOPT_ONLY_BUILTIN"
"""A worker with --only-builtin sets this variable: nothing is imported by a name from a study."""


def get_sae(sae_type: str) -> type[SAE]:
    """The class of a registered name or of `package.module:Class`."""
    target = ARCHITECTURES.get(sae_type, sae_type)
    module, colon, name = target.partition(":")
    if not colon:
        raise UserError(
            f"'saes.sae_type': unknown architecture '{sae_type[:80]}'{nearest(sae_type, list(ARCHITECTURES))}"
            f" (known: {', '.join(ARCHITECTURES)}, or package.module:Class)"
        )
    if sae_type not in ARCHITECTURES and os.environ.get(ONLY_BUILTIN):
        raise UserError(f"'saes.sae_type': '{sae_type[:80]}' is not one of saeopt's own, and --only-builtin is set")
    try:
        found = getattr(importlib.import_module(module), name)
    except (Exception, SystemExit) as error:  # the module is anybody's: it may raise, not parse, or call sys.exit
        what = f"{type(error).__name__}: {error}"[:300]
        raise UserError(f"'saes.sae_type': cannot import '{sae_type[:80]}': {what}") from None
    from saeopt.saes.base import SAE

    if not (isinstance(found, type) and issubclass(found, SAE)):
        raise UserError(f"'saes.sae_type': '{sae_type}' is no subclass of saeopt.saes.base.SAE")
    return found


def sae_config_class(sae_type: object) -> type[SAEConfig]:
    """The config class that an architecture declares beside itself."""
    if not isinstance(sae_type, str):
        raise UserError("'saes.sae_type': must be the name of an architecture")
    return get_sae(sae_type).Config
