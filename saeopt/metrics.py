"""What a metric is, said once: title, definition, number form, direction, who measures it, and where people see it.

Objectives, tables, plots, notes, attributes, sweeps, model cards and docs/metrics.md are derived from here. It is
computed in `evaluation.metrics`, `evaluation.cross_entropy`, `training.step`. Imports nothing heavy.
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
    what: str = ""
    """The definition, of what an evaluation measures: f is the code, x̂ the reconstruction, over n counted tokens."""
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
           panel=True, logarithmic=True,
           what="mean number of non-zero entries of f"),
    Metric("explained_variance", "explained variance", ".4f", up=True, shown=Shown.COLUMN,
           follows_from=("fvu",), rule=_rest,
           what="1 − fvu"),
    Metric("fvu", "FVU", ".4f", "FVU (share of variance unexplained)", training=True, shown=Shown.HEADLINE,
           panel=True, logarithmic=True,
           what="Σ ‖x − x̂‖² / Σ ‖x − mean(x)‖² over the whole set"),
    Metric("ce_recovered", "CE recovered", ".3f", "cross-entropy recovered", up=True, shown=Shown.HEADLINE, panel=True,
           what="(ce_zero − ce_sae) / (ce_zero − ce_clean)"),
    Metric("kl", "KL", ".3f", "KL divergence of the predictions", shown=Shown.TABLE,
           what="mean KL divergence of the next-token distributions, clean against x̂"),
    Metric("fraction_dead", "dead", ".1%", "share of dead latents", training=True, shown=Shown.HEADLINE, panel=True,
           what="latents that fired on none of the n tokens, as a share of all"),
    Metric("lr", "learning rate", training=True, evaluation=False, objective=False, shared=True),
    Metric("grad_norm", "gradient norm", long="gradient norm before clipping", training=True, evaluation=False,
           objective=False, panel=True, logarithmic=True),
    Metric("tokens_per_s", "tokens/s", ",.0f", training=True, evaluation=False, objective=False, shared=True),
    Metric("mse", "MSE", training=True, shown=Shown.COLUMN,
           what="mean of ‖x − x̂‖², summed over d"),
    Metric("cosine", "cosine", ".4f", up=True, shown=Shown.COLUMN,
           what="mean cosine of x and x̂"),
    Metric("n_tokens", "tokens", ",.0f", objective=False, shared=True,
           what="n, the counted tokens"),
    Metric("ce_clean", "CE", long="cross-entropy without an SAE", shared=True,
           what="cross-entropy of the language model as it is (nats per token)"),
    Metric("ce_degradation", "CE increase", long="increase of the cross-entropy",
           follows_from=("ce_sae", "ce_clean"), rule=lambda sae, clean: sae - clean,
           what="ce_sae − ce_clean"),
    Metric("ce_sae", "CE with SAE", long="cross-entropy with the SAE",
           what="cross-entropy with x̂ in the place of x (nats per token)"),
    Metric("ce_zero", "CE zeroed", long="cross-entropy with zeros in its place", shared=True,
           what="cross-entropy with 0 in the place of x (nats per token)"),
    Metric("fraction_alive", "alive", ".1%", "share of living latents", up=True,
           follows_from=("fraction_dead",), rule=_rest,
           what="1 − fraction_dead"),
    Metric("sparsity_coeff", "λ", long="λ (moved until L0 is its target)", training=True, evaluation=False,
           objective=False, panel=True, logarithmic=True),
    Metric("target_l0", "target L0", evaluation=False, objective=False, shared=True,
           what="the L0 that λ was moved towards (`saes.target_l0`)"),
    Metric("found_again", "found again", ".1%", "share of latents found again in another seed", up=True, seeds=True,
           shown=Shown.TABLE,
           what="share of latents whose best decoder cosine with another seed's latents is above 0.9"),
    Metric("pw_mcc", "PW-MCC", ".3f", "matched decoder cosine between seeds", up=True, seeds=True, shown=Shown.COLUMN,
           what="mean cosine of the decoder rows of two seeds under the best one-to-one matching (arXiv 2505.20254)"),
    Metric("n_seeds", "seeds", ".0f", objective=False, shared=True, seeds=True,
           what="seeds over which the other numbers are means"),
    Metric("c_dec", "c_dec", ".4f", "mean |cosine| between decoder rows",
           what="mean |cos| over all pairs of decoder rows (arXiv 2508.16560): smallest near the L0 that the "
                "data have"),
    Metric("s_dec", "s_dec", ".4f", "n-th largest projection on the decoder",
           what="s_n^dec of arXiv 2508.16560: the (n · tokens)-th largest projection of x − b_dec on decoder rows of "
                "norm 1, n = h / 4"),
    Metric("l1", "L1",
           what="mean of Σ f ‖W_dec‖ in raw units: it does not depend on how a latent and its row share their scale"),
    Metric("n_predictions", "predictions", ",.0f", objective=False, shared=True,
           what="predictions that the cross-entropies are means over"),
    Metric("norm_ratio", "norm ratio", ".4f",
           what="Σ ‖x̂‖ / Σ ‖x‖: a ratio of sums, not a mean of ratios per token"),
    Metric("gamma", "γ", ".3g", "‖mean‖ / ‖std‖ of the activations", objective=False, shared=True,
           what="γ = ‖mean(x)‖ / ‖std(x)‖, of the activations alone: above 1, latents of an SAE that does not "
                "centre them die at the start (arXiv 2605.31518)"),
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
