"""The pack, its stacks, the loop that trains it, checkpoints and loggers."""

from typing import TYPE_CHECKING, Any

from saeopt.runs.folder import RunFolder, resume_point
from saeopt.training.plan import Metrics, Observer, TrialPlan, TrialResult

if TYPE_CHECKING:
    from saeopt.training.loop import train_pack
    from saeopt.training.runtime import Runtime

__all__ = ["Metrics", "Observer", "RunFolder", "Runtime", "TrialPlan", "TrialResult", "resume_point", "train_pack"]


def __getattr__(name: str) -> Any:  # torch is imported only when something trains
    if name == "train_pack":
        from saeopt.training.loop import train_pack

        return train_pack
    if name == "Runtime":
        from saeopt.training.runtime import Runtime

        return Runtime
    raise AttributeError(name)
