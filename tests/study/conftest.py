"""A study on SQLite whose trials ended as the tests want, without any training."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import yaml
from study_outcomes import HOOKS, evaluation

from saeopt.config.settings import settings
from saeopt.options import run_cli
from saeopt.study import app


@pytest.fixture
def base_config(tmp_path: Path) -> dict[str, Any]:
    """A run config; no model is loaded by anything here, and the data need only be there."""
    (tmp_path / "x.jsonl").write_text("{}")
    return {
        "tlens_model_name": "roneneldan/TinyStories-1M",
        "lr": 1e-3,
        "data": {"dataset_name": "x.jsonl", "context_length": 64, "n_train_samples": 1000, "is_tokenized": False},
        "saes": {"sae_type": "relu", "sae_positions": HOOKS, "sparsity_coeff": 0.1},
    }


@pytest.fixture
def store_url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/store.db"


@pytest.fixture
def study_file(tmp_path: Path, base_config: dict[str, Any]) -> Path:
    """A grid of six cells."""
    path = tmp_path / "six.yaml"
    space = {"saes.sparsity_coeff": [0.1, 0.3, 1.0], "lr": [1e-3, "1e-2"]}
    path.write_text(yaml.safe_dump({"base": base_config, "space": space, "output_dir": str(tmp_path / "out")}))
    return path


Cli = Callable[..., CompletedProcess[str]]


@pytest.fixture
def cli(
    store_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Cli]:
    """Run `saeopt study …` in this process (a new one takes seconds); fails the test on an unexpected exit code."""

    def run(*args: object, code: int = 0, storage: str | None = store_url, text: str = "") -> CompletedProcess[str]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("COLUMNS", "200")
        monkeypatch.setattr("sys.stdin", io.StringIO(text))
        monkeypatch.delenv("SAEOPT_STORAGE", raising=False)
        if storage is not None:
            monkeypatch.setenv("SAEOPT_STORAGE", storage)
        settings.cache_clear()
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            run_cli(app, [str(a) for a in args])
        shown = capsys.readouterr()
        assert (ended.value.code or 0) == code, shown.out + shown.err
        return CompletedProcess(args, code, shown.out, shown.err)

    yield run
    settings.cache_clear()


@pytest.fixture
def finish(store_url: str) -> Callable[..., None]:
    """Claim the next trial of a study and end it: `finish("six", (l0, fvu))`, or an evaluation, or a failure's text."""
    from saeopt.search.objectives import objective_values
    from saeopt.trials import claims, endings
    from saeopt.trials.attributes import evaluation_attributes
    from saeopt.trials.storage import Store
    from saeopt.views.monitoring import on_trial_end, on_trial_start

    def end(name: str, outcome: tuple[float, float] | dict[str, Any] | str) -> None:
        store = Store.open(store_url)
        spec, study_id = store.spec(name), store.study_id(name)
        claim = claims.claim(store, study_id, 1, {"worker": "test"})[0]
        on_trial_start(store, study_id, claim.trial_id, spec, "test")
        if isinstance(outcome, str):
            endings.fail(store, claim, outcome, f"Traceback\n  {outcome}", retries=0)
            return
        folder = spec.run_dir(claim.number)
        folder.mkdir(parents=True)
        rows = [
            {"samples": s, "hook_point": h, "loss": 900 / s, "l0": 9.0, "fvu": 0.2}
            for s in (200, 600, 1000)
            for h in HOOKS
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        for i, row in enumerate(rows):
            claims.report(store, claim, row["samples"] + i, row["fvu"])
        found = outcome if isinstance(outcome, dict) else evaluation(*outcome)
        on_trial_end(store, study_id, claim.trial_id, spec, evaluation=found)
        attrs = evaluation_attributes(found)
        assert endings.finish(store, claim, "COMPLETE", objective_values(spec, found), attrs=attrs)
        store.close()

    return end
