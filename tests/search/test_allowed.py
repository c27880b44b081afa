"""A worker may refuse to import what a study names, and to write where a study says."""

from __future__ import annotations

from pathlib import Path

import pytest
from _stores import grid_spec

from saeopt.config.study import Dimension, StudySpec
from saeopt.errors import UserError
from saeopt.saes.registry import get_sae
from saeopt.trials.allowed import check_allowed


def named(sae_type: str) -> StudySpec:
    spec = grid_spec(1)
    return spec.model_copy(update={"base": {**spec.base, "saes": {**spec.base["saes"], "sae_type": sae_type}}})


def test_only_builtin_refuses_what_would_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    foreign = named("os:path")
    check_allowed(foreign)
    monkeypatch.setenv("SAEOPT_ONLY_BUILTIN", "1")
    check_allowed(named("relu"))
    with pytest.raises(UserError, match="--only-builtin: study s names 'os:path'"):
        check_allowed(foreign)
    with pytest.raises(UserError, match="not one of saeopt's own"):
        get_sae("this.would.be.imported:X")
    assert get_sae("relu").__name__ == "ReluSAE"


def test_an_output_root_holds_runs_and_caches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SAEOPT_OUTPUT_ROOT", str(tmp_path / "root"))
    check_allowed(grid_spec(1, output_dir=str(tmp_path / "root/a")))
    for outside in (tmp_path, tmp_path / "root/../other", tmp_path / "rootless"):
        with pytest.raises(UserError, match="--output-root: study s writes to"):
            check_allowed(grid_spec(1, output_dir=str(outside)))
    inside = grid_spec(1, output_dir=str(tmp_path / "root"))
    monkeypatch.setenv("ELSEWHERE", str(tmp_path / "cache"))
    for named in (str(tmp_path / "cache"), "$ELSEWHERE"):
        monkeypatch.chdir(tmp_path)
        cache = {"cache": named}
        with pytest.raises(UserError, match="which does not lie in"):
            check_allowed(inside.model_copy(update={"base": {**inside.base, "activations": cache}}))
        with pytest.raises(UserError, match="which does not lie in"):
            check_allowed(inside.model_copy(update={"space": {"activations": [Dimension(values=[cache])]}}))
