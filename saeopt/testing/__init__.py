"""Conformance kits: what an architecture, a step or an observer promises, as tests that yours can inherit.

    from saeopt.testing import ArchitectureContract

    class TestMySAE(ArchitectureContract):
        sae_type = "my.module:MySAE"

pytest collects the inherited tests. Everything runs on the CPU in float64 within seconds, and needs no language model.
"""

from saeopt.testing.architecture import ArchitectureContract
from saeopt.testing.observer import ObserverContract
from saeopt.testing.step import StepContract

__all__ = ["ArchitectureContract", "ObserverContract", "StepContract"]
