"""What every observer of a pack promises: it bears all that a pack can tell it, and answers in the right form."""

from __future__ import annotations

import math
from pathlib import Path

from saeopt.training.plan import Observer, TrialResult


class ObserverContract:
    """Inherit and give :meth:`make`: an observer of a pack with the trials `a` and `b`."""

    def make(self, folder: Path) -> Observer:
        """The observer; the run folders are `folder/a` and `folder/b`."""
        raise NotImplementedError

    def test_it_bears_the_life_of_a_pack(self, tmp_path: Path) -> None:
        observer, row = self.make(tmp_path), {"loss": 2.0, "l0": 3.0, "fvu": 0.5, "tokens_per_s": 10.0, "finite": 1.0}
        for name in ("a", "b"):
            (tmp_path / name).mkdir(exist_ok=True)
            observer.on_start(name, 0, 64)
        observer.evaluation_takes(12.5)
        for samples in (16, 32):
            for name in ("a", "b"):
                assert isinstance(observer.lost(name), bool)
                assert isinstance(observer.on_log(name, samples, {"hook": row}), str | None)
                assert isinstance(observer.on_eval(name, samples, {"hook": row}), str | None)
            assert isinstance(observer.on_evaluated(samples), dict)
            for name in ("a", "b"):
                observer.on_checkpoint(name, samples, tmp_path / name / f"samples_{samples}.safetensors")
            observer.progress(samples, 64, 1000.0)
            assert isinstance(observer.should_interrupt(), bool)
        for name in ("a", "b"):
            observer.draw(name, tmp_path / name)
        observer.on_end("a", TrialResult("finished", 64, None, {"hook": row}))
        observer.on_end("b", TrialResult("lost", 32, "another worker has it"))

    def test_it_bears_numbers_that_are_none(self, tmp_path: Path) -> None:
        observer = self.make(tmp_path)
        observer.on_start("a", 16, 64)
        observer.on_log("a", 32, {"hook": {"loss": math.nan, "l0": 0.0, "fvu": math.inf, "finite": 0.0}})
        observer.on_end("a", TrialResult("diverged", 32, "NaN or Inf in loss or gradient"))
