"""The fast steps on the CPU and the observers of commands keep what `saeopt.testing` asks for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from saeopt.config.machine import PerformanceConfig
from saeopt.saes.base import SAE
from saeopt.testing import ObserverContract, StepContract
from saeopt.training.plan import Observer
from saeopt.training.progress import Bar, Interrupt, RunObserver
from saeopt.training.step.choose import FAST, make_stack
from saeopt.training.step.contract import StackOptions
from saeopt.training.step.stack import Stack


class TestFastStepOnTheCPU(StepContract):
    """Whatever has a row in `choose.py`."""

    members = tuple({"sae_type": sae_type} for sae_type in FAST)

    def make(self, saes: Sequence[SAE], seeds: Sequence[int], options: StackOptions) -> Stack:
        return make_stack(saes, seeds, options, PerformanceConfig(stack="fused"))


class TestRunObserver(ObserverContract):
    """What `saeopt train` watches with."""

    def make(self, folder: Path) -> Observer:
        return RunObserver(Interrupt(), Bar(shown=False), lambda run_dir: None)


class TestObserver(ObserverContract):
    """The one that decides nothing."""

    def make(self, folder: Path) -> Observer:
        return Observer()
