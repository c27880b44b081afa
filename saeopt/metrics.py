"""What a metric is, said once: title, number form, direction, who measures it, and where people see it.

Objectives, tables, plots, notes, attributes and sweeps are derived from here. The formulas stand where a metric is
measured: `evaluation.metrics`, `evaluation.cross_entropy`, `training.step`. Imports nothing heavy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import IntEnum


class Shown(IntEnum):
    """Where people see a metric of a trial; each place shows those of the later ones too."""

    DETAIL = 0
    """Among all numbers of a hook point."""
    COLUMN = 1
    """Also as a column of the dashboard: its mean over hook points."""
    TABLE = 2
    """Also in the tables of `study best` and in a trial's note."""
    HEADLINE = 3
    """Also in a run's table, and as a column per hook point."""


@dataclass(frozen=True)
class Metric:
    """A number that is measured of an SAE."""

    name: str
    title: str
    """In a table."""
    form: str = ".4g"
    """How it is written (Python's format)."""
    long: str = ""
    """On an axis; default: the title."""
    up: bool = False
    """More is better."""
    training: bool = False
    """Training measures it at its log steps."""
    evaluation: bool = True
    """An evaluation on held-out text measures it."""
    objective: bool = True
    """A study can aim at it; needs an evaluation."""
    shown: Shown = Shown.DETAIL
    panel: bool = False
    """`training_curves.png` has a panel for it."""
    logarithmic: bool = False
    """Drawn on a logarithmic scale."""
    shared: bool = False
    """The same for all seeds of a trial: there is no spread to tell."""
    seeds: bool = False
    """Only where several seeds were trained."""
    follows_from: tuple[str, ...] = ()
    """Metrics from which it follows where it was not measured itself …"""
    rule: Callable[..., float] | None = None
    """… and how."""

    def text(self, value: object) -> str:
        """A value for people; a dash where there is none."""
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        return format(value, self.form) if number else "–"

    @property
    def axis(self) -> str:
        """The label of an axis."""
        return self.long or self.title

    def of(self, row: Mapping[str, float]) -> float | None:
        """Its value among the metrics of a hook point, or what follows from them; None where nothing does."""
        if self.name in row:
            return float(row[self.name])
        if self.rule is None or not all(name in row for name in self.follows_from):
            return None
        return float(self.rule(*(float(row[name]) for name in self.follows_from)))


def _rest(share: float) -> float:
    return 1.0 - share


_ALL = (
    Metric("loss", "loss", training=True, evaluation=False, objective=False, panel=True, logarithmic=True),
    Metric("l0", "L0", ".1f", "L0 (non-zeros per token)", training=True, shown=Shown.HEADLINE,
           panel=True, logarithmic=True),
    Metric("explained_variance", "explained variance", ".4f", up=True, shown=Shown.COLUMN,
           follows_from=("fvu",), rule=_rest),
    Metric("fvu", "FVU", ".4f", "FVU (share of variance unexplained)", training=True, shown=Shown.HEADLINE,
           panel=True, logarithmic=True),
    Metric("ce_recovered", "CE recovered", ".3f", "cross-entropy recovered", up=True, shown=Shown.HEADLINE, panel=True),
    Metric("kl", "KL", ".3f", "KL divergence of the predictions", shown=Shown.TABLE),
    Metric("fraction_dead", "dead", ".1%", "share of dead latents", training=True, shown=Shown.HEADLINE, panel=True),
    Metric("lr", "learning rate", training=True, evaluation=False, objective=False, shared=True),
    Metric("grad_norm", "gradient norm", long="gradient norm before clipping", training=True, evaluation=False,
           objective=False, panel=True, logarithmic=True),
    Metric("tokens_per_s", "tokens/s", ",.0f", training=True, evaluation=False, objective=False, shared=True),
    Metric("mse", "MSE", training=True, shown=Shown.COLUMN),
    Metric("cosine", "cosine", ".4f", up=True, shown=Shown.COLUMN),
    Metric("n_tokens", "tokens", ",.0f", objective=False, shared=True),
    Metric("ce_clean", "CE", long="cross-entropy without an SAE", shared=True),
    Metric("ce_degradation", "CE increase", long="increase of the cross-entropy",
           follows_from=("ce_sae", "ce_clean"), rule=lambda sae, clean: sae - clean),
    Metric("ce_sae", "CE with SAE", long="cross-entropy with the SAE"),
    Metric("ce_zero", "CE zeroed", long="cross-entropy with zeros in its place", shared=True),
    Metric("fraction_alive", "alive", ".1%", "share of living latents", up=True,
           follows_from=("fraction_dead",), rule=_rest),
    Metric("sparsity_coeff", "λ", long="λ (moved until L0 is its target)", training=True, evaluation=False,
           objective=False, panel=True, logarithmic=True),
    Metric("target_l0", "target L0", evaluation=False, objective=False, shared=True),
    Metric("found_again", "found again", ".1%", "share of latents found again in another seed", up=True, seeds=True,
           shown=Shown.TABLE),
    Metric("pw_mcc", "PW-MCC", ".3f", "matched decoder cosine between seeds", up=True, seeds=True, shown=Shown.COLUMN),
    Metric("n_seeds", "seeds", ".0f", objective=False, shared=True, seeds=True),
    Metric("c_dec", "c_dec", ".4f", "mean |cosine| between decoder rows"),
    Metric("s_dec", "s_dec", ".4f", "n-th largest projection on the decoder"),
    Metric("l1", "L1"),
    Metric("n_predictions", "predictions", ",.0f", objective=False, shared=True),
    Metric("norm_ratio", "norm ratio", ".4f"),
    Metric("gamma", "γ", ".3g", "‖mean‖ / ‖std‖ of the activations", objective=False, shared=True),
)  # fmt: skip

METRICS: dict[str, Metric] = {metric.name: metric for metric in _ALL}
"""By name, in the order in which people see them; what a study stores in little room drops the last ones first."""


def objective_metrics() -> list[str]:
    """Names that a study's objective may have."""
    return [metric.name for metric in METRICS.values() if metric.objective]


def shown_in(place: Shown, seeds: bool = False) -> list[Metric]:
    """The metrics that people see there; with `seeds` also those that only several seeds have."""
    return [metric for metric in METRICS.values() if metric.shown >= place and (seeds or not metric.seeds)]


def more_is_better(name: str) -> bool:
    """The direction of a metric; of one that is not registered less is better."""
    return name in METRICS and METRICS[name].up


def measured_in_training(name: str) -> bool:
    """Whether training knows it at its log steps, without an evaluation."""
    metric = METRICS[name]
    return metric.training or (bool(metric.follows_from) and all(map(measured_in_training, metric.follows_from)))


def value_of(row: Mapping[str, float], name: str) -> float | None:
    """A metric of one hook point; those that follow from others are derived."""
    if name in METRICS:
        return METRICS[name].of(row)
    return float(row[name]) if name in row else None


def axis_title(name: str) -> str:
    """What an axis is called."""
    return METRICS[name].axis if name in METRICS else name


def in_order(names: Iterable[str]) -> list[str]:
    """Registered metrics in their order, then the others in theirs."""
    given = list(names)
    return [name for name in METRICS if name in given] + [name for name in given if name not in METRICS]
