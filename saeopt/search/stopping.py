"""Whether a trial falls behind everyone who has come as far: the rules of `early_stopping`, as functions of curves.

Compared are all trials of the study that have reached the same number of samples, whoever trains them: those of the
same pack, of other packs and workers, and those that have ended. Trials of a pack arrive together, so that each of
them is judged among all others, in whatever order they are reported. A trial that collapsed or diverged is nobody's
measure.
"""

from __future__ import annotations

import binascii
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from saeopt.config.stopping import EarlyStopping
from saeopt.config.study import FORMAT, StudySpec
from saeopt.metrics import METRICS
from saeopt.search.objectives import expanded, objective_names
from saeopt.search.pruning import Curve, at, dominated


@dataclass(frozen=True)
class Runner:
    """A trial and its curve."""

    number: int
    curve: Curve

    def reached(self, samples: int) -> bool:
        """Whether it came as far itself."""
        return bool(self.curve) and max(self.curve) >= samples


@dataclass(frozen=True)
class Asked:
    """Who is judged, at how many of how many samples, and before which nothing is stopped."""

    runner: Runner
    samples: int
    total: int
    warmup: int

    @property
    def before(self) -> int:
        """Samples of its report before this one; 0: there was none."""
        return max((s for s in self.runner.curve if s < self.samples), default=0)


class Judge:
    """The rule of one study."""

    def __init__(self, spec: StudySpec) -> None:
        self.rule, self.name = spec.early_stopping, spec.name
        self.labels = objective_names(spec)
        self.maximised = [o.maximised for _, o in expanded(spec)]
        self.of_one = [METRICS[o.metric].up for _, o in expanded(spec)]
        """Of which objectives what counts is how much is missing to 1: a cosine of 0.96 is far better than 0.88."""

    def reason(self, asked: Asked, others: Sequence[Runner]) -> str | None:
        """By whom and by how much a trial is beaten, one line; None: it goes on."""
        values = at(asked.runner.curve, asked.samples)
        if self.rule.type == "none" or values is None or not asked.warmup <= asked.samples < asked.total:
            return None
        match self.rule.type:
            case "pareto":
                found = self._dominated(asked, values, others)
            case "median":
                found = self._below_median(asked, others)
            case _:
                found = self._not_promoted(asked, others)
        return found and f"stopped early by {self.rule.type} at {asked.samples} of {asked.total} samples: {found}"

    def _dominated(self, asked: Asked, values: Sequence[float], others: Sequence[Runner]) -> str | None:
        there = [r for r in others if r.reached(asked.samples)]
        if len(there) < self.rule.n_startup_trials:
            return None
        mine = self._missing(values)
        maximised = [up != of_one for up, of_one in zip(self.maximised, self.of_one, strict=True)]
        for other in sorted(there, key=lambda r: r.number):
            then = at(other.curve, asked.samples)
            if then and dominated(mine, self._missing(then), maximised, self.rule.margin):
                named = zip(self.labels, then, values, strict=True)
                much = ", ".join(f"{name} {theirs:.4g} against {ours:.4g}" for name, theirs, ours in named)
                return f"trial {other.number} was better in every objective ({much})"
        return None

    def _missing(self, values: Sequence[float]) -> list[float]:
        return [1.0 - value if of_one else value for value, of_one in zip(values, self.of_one, strict=True)]

    def _below_median(self, asked: Asked, others: Sequence[Runner]) -> str | None:
        """Worse at its best than the median of the others, of whom `n_startup_trials` must be there."""
        found = [(at(r.curve, asked.samples), r) for r in others if r.reached(asked.samples)]
        there = [(self._cost(values[0]), r.number) for values, r in found if values]
        if not there or len(there) < self.rule.n_startup_trials:
            return None
        mine = min(self._cost(values[0]) for s, values in asked.runner.curve.items() if s <= asked.samples)
        middle, (best, number) = median(cost for cost, _ in there), min(there)
        if mine <= middle:
            return None
        label, (mine, middle, best) = self.labels[0], (self._cost(v) for v in (mine, middle, best))
        others_are = f"the median of {len(there)} others is {middle:.4g} (trial {number} has {best:.4g})"
        return f"{label} {mine:.4g} at its best, {others_are}"

    def _not_promoted(self, asked: Asked, others: Sequence[Runner]) -> str | None:
        """Not among the first 1 / reduction_factor of all who came to a rung; asked once, on the way past the rung."""
        for rung in self._rungs(asked):
            if not asked.before < rung <= asked.samples:
                continue
            mine = self._cost(asked.runner.curve[asked.samples][0])
            found = [(first_from(r.curve, rung), r.number) for r in others]
            there = sorted((self._cost(values[0]), number) for values, number in found if values)
            n = len(there) + 1
            keep = max(1, n // self.rule.reduction_factor)
            if len(there) < keep or mine <= there[keep - 1][0]:
                continue
            last, number = there[keep - 1]
            label, place = self.labels[0], 1 + sum(cost < mine for cost, _ in there)
            return (
                f"{label} {self._cost(mine):.4g}, place {place} of {n} at the rung of {rung} samples, of which {keep}"
                f" go{'es' if keep == 1 else ''} on (the last is trial {number} with {self._cost(last):.4g})"
            )
        return None

    def _rungs(self, asked: Asked) -> list[int]:
        first, factor = max(1, asked.warmup), self.rule.reduction_factor
        skipped = 0
        if self.rule.type == "hyperband":
            skipped = bracket(f"{self.name}_{asked.runner.number}", first, max(asked.total, first + 1), factor)
        rungs, samples = [], first * factor**skipped
        while samples < asked.total:
            rungs.append(samples)
            samples *= factor
        return rungs

    def _cost(self, value: float) -> float:
        """Less is better; its own inverse."""
        return -value if self.maximised[0] else value


def first_from(curve: Curve, samples: int) -> list[float] | None:
    """The first values of a curve from `samples` on."""
    after = [s for s in curve if s >= samples]
    return curve[min(after)] if after else None


def bracket(name: str, first: int, total: int, factor: int) -> int:
    """Hyperband's bracket of a trial `<study>_<number>` (how many of the first rungs it skips), as Optuna draws it."""
    n = math.floor(math.log(total / first, factor)) + 1
    budgets = [math.ceil(n * factor ** (n - 1 - i) / (n - i)) for i in range(n)]
    drawn = binascii.crc32(name.encode()) % sum(budgets)
    for i, budget in enumerate(budgets):
        drawn -= budget
        if drawn < 0:
            return i
    raise AssertionError("unreachable")


def with_default_rule(spec: StudySpec) -> StudySpec:
    """A new study: `halving` where several objectives are sampled and nobody chose a rule, if it could stop a trial.

    The same study without it is one of its `older`: whoever made it before is told that it is there.
    """
    given = spec.early_stopping
    sampled = spec.sampler.type != "grid" and (len(spec.objectives) > 1 or spec.objectives[0].hook_points == "all")
    if not sampled or "type" in given.model_fields_set:
        return spec
    rule = EarlyStopping.model_validate({**given.model_dump(exclude_unset=True), "type": "halving"})
    found = [one.model_copy(update={"early_stopping": rule, "format": FORMAT}) for one in (spec, *spec.older)]
    if why_never(found[0], spec.max_trials or 0):
        return spec
    found[0].set_older(*found[1:], spec, *spec.older)
    return found[0]


def unmeasured(spec: StudySpec) -> list[str]:
    """Metrics of the objectives that the log steps of a training do not measure."""
    metrics = dict.fromkeys(objective.metric for objective in spec.objectives)
    return [m for m in metrics if not all(METRICS[source].training for source in METRICS[m].follows_from or (m,))]


def stand_in(spec: StudySpec) -> str:
    """What is compared instead where training does not measure the first objective."""
    return "explained_variance" if expanded(spec)[0][1].maximised else "fvu"


def stopping_text(spec: StudySpec) -> str | None:
    """What `create` says about what early stopping compares; None where nothing is compared."""
    rule = spec.early_stopping
    if rule.type == "none":
        return None
    if rule.type == "halving":
        return _rungs_text(spec)
    asked = ", ".join(dict.fromkeys(o.metric for o in spec.objectives))
    if every := spec.base.get("eval_every_n_samples"):
        return f"{rule.type} compares {asked} of held-out evaluations, every {every:,} samples"
    if missing := unmeasured(spec):
        said = ", ".join(missing)
        return (
            f"{rule.type} compares {stand_in(spec)} of log steps: {said} is measured at the end alone"
            " (set 'eval_every_n_samples' to compare it)"
        )
    return f"{rule.type} compares {asked} of log steps, as training measures it"


def _rungs_text(spec: StudySpec) -> str:
    rule, missing = spec.early_stopping, unmeasured(spec)
    data, asked = spec.base["data"], ", ".join(dict.fromkeys(o.metric for o in spec.objectives))
    total, there = data.get("n_train_samples"), min(rule.rung_samples, data.get("n_eval_samples") or rule.rung_samples)
    samples = [f" ({math.ceil(share * total):,} samples)" if total else "" for share in rule.shares]
    where = [f"{100 * share:.3g}%{said}" for share, said in zip(rule.shares, samples, strict=True)]
    how = f"on {there} held-out samples there" if missing else "as training measures it"
    warmup = spec.base.get("warmup_samples") or 0
    early = f" (the learning rate still rises at the first: 'warmup_samples' is {warmup:,})" if total else ""
    return (
        f"halving compares {asked} at {' and '.join(where)}, {how}{early * (rule.shares[0] * (total or 0) < warmup)};"
        f" whom nobody dominates and the best {rule.keep:.0%} go on, the others are paused"
    )


def why_never(spec: StudySpec, n_trials: int) -> str | None:
    """Why the rule could stop no trial of the study, and what would help, one line; None: it could."""
    found = _why_never(spec, n_trials)
    return found and f"study {spec.name}: 'early_stopping: {spec.early_stopping.type}' could stop no trial: {found}"


def _why_never(spec: StudySpec, n_trials: int) -> str | None:
    rule = spec.early_stopping
    every, missing = spec.base.get("eval_every_n_samples"), unmeasured(spec)
    if rule.type == "none":
        return None
    if rule.type == "pareto" and missing and not every:
        return (
            f"training does not measure {', '.join(missing)}: set 'eval_every_n_samples' in the base config, to"
            " measure it on the way"
        )
    total = spec.base["data"].get("n_train_samples")
    if rule.type == "halving":
        if rule.keep == 1:
            return "'keep' is 1: everybody goes on"
        if n_trials < 2:
            return "there is one trial, and nobody to compare it with"
        if unmeasured(spec) and spec.base["data"].get("n_eval_samples") == 0:
            return f"training does not measure {', '.join(unmeasured(spec))}: 'data.n_eval_samples' must be above 0"
        batch = spec.base["data"].get("train_batch_size") or 1
        if total and not any(-(-math.ceil(share * total) // batch) * batch < total for share in rule.shares):
            return f"no rung lies before the end of {total:,} samples"
        return None
    if every and total and every >= total:
        return f"the first evaluation is at the end: 'eval_every_n_samples' ({every:,}) must be below {total:,} samples"
    if rule.type in ("median", "pareto") and n_trials <= rule.n_startup_trials:
        return f"'n_startup_trials' ({rule.n_startup_trials}) leaves none of {n_trials} trials to be compared"
    return None
