"""What mattered, in the dashboard: a picture among the artifacts and a figure, per objective and hook point."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from optuna.artifacts import get_all_artifact_meta
from optuna_dashboard._custom_plot_data import list_graph_object_ids
from study_outcomes import HOOKS

from saeopt.search.importance import Importances
from saeopt.trials.storage import Store
from saeopt.views import importance, monitoring
from saeopt.views.figures import importance_figure
from saeopt.views.importance import HookImportances, explained, importance_plot

FOUND = [
    HookImportances("a", {"l0": Importances({"saes.k": 0.9, "lr": 0.05}, 20), "fvu": Importances({"lr": 0.6}, 20)}),
    HookImportances("b", {"l0": Importances({"saes.k": 0.8, "lr": 0.1}, 20), "fvu": "too few trials"}),
    HookImportances("c", {"l0": "too few trials", "fvu": "no parameter varies"}),
]


def test_each_objective_of_each_hook_point_has_its_bars() -> None:
    bars = {bar.name: dict(zip(bar.x, bar.y, strict=True)) for bar in importance_figure(FOUND).data}
    assert bars == {
        "l0 · a": {"saes.k": 0.9, "lr": 0.05, "only together": 0.05},
        "fvu · a": {"lr": 0.6, "only together": 0.4},
        "l0 · b": {"saes.k": 0.8, "lr": 0.1, "only together": 0.1},
    }
    assert len(importance_figure(FOUND).to_json()) < 2_045  # one piece of the dashboard's store


def test_a_panel_per_hook_point_that_has_any(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from saeopt.views import plots

    drawn: list[Any] = []
    kept = plots.save
    monkeypatch.setattr(plots, "save", lambda figure, path: drawn.append(figure) or kept(figure, path))
    assert importance_plot(FOUND, tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG"
    (figure,) = drawn
    assert [axis.get_title() for axis in figure.axes] == ["a", "b"]
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == ["saes.k", "lr", "only together"]
    widths = [bar.get_width() for bar in figure.axes[0].containers[0]]
    assert widths == pytest.approx([0.9, 0.05, 0.05])


def test_a_study_shows_them_when_there_are_enough_trials_and_no_oftener_than_they_are_worth(
    cli: Callable[..., Any], tmp_path: Path, base_config: dict[str, Any], store_url: str, finish: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    path = tmp_path / "many.yaml"
    space = {"lr": [1e-3, 1e-2], "saes.sparsity_coeff": [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]}
    path.write_text(yaml.safe_dump({"base": base_config, "space": space, "output_dir": str(tmp_path / "out")}))
    cli("create", path, "--elsewhere")
    store = Store.open(store_url)
    where = (store, store.study_id("many"), store.spec("many"))
    calls: list[int] = []
    find = importance.find_importances
    monkeypatch.setattr(importance, "find_importances", lambda *args: calls.append(1) or find(*args))

    def shown() -> list[str]:
        return [meta.filename for meta in get_all_artifact_meta(store.study("many"), storage=store.optuna)]

    for i in range(9):
        finish("many", (60.0 / (1 + i % 6), 0.05 * (1 + i % 6)))
    monitoring.on_study_progress(*where, force=True)
    assert shown() == ["pareto_front.png"]  # too few trials
    finish("many", (15.0, 0.2))
    monitoring.on_study_progress(*where, force=True)
    assert sorted(shown()) == ["importances.png", "pareto_front.png"]
    assert "importances" in list_graph_object_ids(store.optuna.get_study_system_attrs(where[1]))
    monitoring.on_study_progress(*where, force=True)
    assert len(calls) == 2  # nothing has ended since
    finish("many", (12.0, 0.25))
    monkeypatch.setattr(monitoring, "PROGRESS_EVERY_S", 0.0)
    monkeypatch.setattr(monitoring, "SHARE_OF_TIME", 1e-9)
    monitoring.on_study_progress(*where)
    assert len(calls) == 2  # it is not worth its time yet
    monitoring.on_study_progress(*where, force=True)
    assert len(calls) == 3
    found = importance.find_importances(store, "many", *importance_input(store))
    assert {hook for hook, _, _ in explained(found)} == set(HOOKS)
    store.close()


def importance_input(store: Store) -> Any:
    from saeopt.views.best import load_points

    return load_points(store, "many")
