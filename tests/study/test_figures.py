"""The figures beside the dashboard's own: architectures in colour, the front as a line, curves under their name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from saeopt.search.pareto import Point
from saeopt.trials.storage import Store
from saeopt.views.figures import curves_figure, front_figure


def point(number: int, group: str, hook: str, l0: float, fvu: float) -> Point:
    return Point(f"#{number}", {"l0": l0, "fvu": fvu}, hook, group, collapsed=l0 < 0.5)


POINTS = [point(0, "relu", "a", 10, 0.2), point(1, "relu", "a", 20, 0.1), point(2, "relu", "a", 21, 0.3),
          point(3, "topk", "a", 12, 0.15), point(4, "topk", "b", 12, 0.5),
          point(5, "topk", "a", 0.1, 0.99)]  # fmt: skip


def test_architectures_have_colours_and_each_hook_point_its_front_as_a_line() -> None:
    traces = {t.name: t for t in front_figure(POINTS).data}
    assert set(traces) == {"relu · a", "topk · a", "topk · b", "front · a", "front · b"}
    assert traces["topk · a"].marker.color == traces["topk · b"].marker.color != traces["relu · a"].marker.color
    assert traces["topk · a"].marker.symbol != traces["topk · b"].marker.symbol
    assert traces["front · a"].mode == "lines"
    assert list(traces["front · a"].x) == [10, 12, 20]
    assert list(traces["topk · a"].text) == ["#3"]  # the collapsed one is left out


def test_several_seeds_have_bars_of_their_spread() -> None:
    several = Point("#1", {"l0": 9.0, "fvu": 0.2, "fvu_std": 0.0123, "n_seeds": 3}, "a", "relu")
    assert list(front_figure([several]).data[0].error_y.array) == [0.012]
    assert front_figure([*POINTS[:2]]).data[0].error_y.array is None


def test_one_hook_point_is_not_named_in_every_entry() -> None:
    assert {t.name for t in front_figure([p for p in POINTS if p.hook_point == "a"]).data} == {"relu", "topk", "front"}


def test_curves_are_those_of_the_newest_trials_thinned_and_named(
    cli: Callable[..., Any], study_file: Path, store_url: str
) -> None:
    from saeopt.trials import claims

    cli("create", study_file)
    store = Store.open(store_url)
    for claim in claims.claim(store, store.study_id("six"), 2, {}):
        for step in range(1, 61):
            claims.report(store, claim, step, 1 / step + claim.number)
        claims.report(store, claim, 61, float("nan"))
    figure = curves_figure(store.engine, store.study_id("six"), "fvu")
    assert [t.name for t in figure.data] == ["#0", "#1"]
    assert list(figure.data[1].x)[-1] == 60
    assert len(figure.data[1].x) <= 26
    assert figure.data[1].y[0] == 2.0
    assert figure.layout.title.text == "fvu while training"
    assert figure.layout.yaxis.title.text == "fvu"
    store.close()
