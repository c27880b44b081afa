"""A user's own SAE is one file: `sae_type: module:Class` finds class and config."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from sae_cases import activations, build, loss, step_inputs

from saeopt.config import dump_yaml, load_run_config, validate_run
from saeopt.errors import UserError
from saeopt.saes.base import Forward, StepInputs
from saeopt.saes.registry import get_sae, sae_config_class
from saeopt.saes.relu import ReluSAE

RUN = {"tlens_model_name": "x", "data": {"dataset_name": "x", "n_train_samples": 10}}


def run(**fields: object) -> dict[str, object]:
    return {**RUN, "saes": {"sae_positions": "hook", **fields}}


def test_config_of_a_custom_sae_is_read_checked_and_written(tmp_path: Path) -> None:
    config = validate_run(run(sae_type="example_sae:LeakySAE", slope=0.2), "here")
    assert config.saes.slope == 0.2
    (tmp_path / "run.yaml").write_text(dump_yaml(config))
    assert load_run_config(tmp_path / "run.yaml") == config
    with pytest.raises(UserError, match=r"unknown key 'saes\.slop'.*'slope'"):
        validate_run(run(sae_type="example_sae:LeakySAE", slop=0.2), "here")


def test_a_custom_sae_initialises_trains_and_folds() -> None:
    sae, x_Nd = build("example_sae:LeakySAE", {"slope": 0.1}), 5 * activations()
    sae.scale.fill_(0.2)
    sae.initialise(x_Nd * sae.scale, torch.Generator().manual_seed(0))
    optimiser = torch.optim.Adam(sae.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        value = loss(sae, x_Nd * sae.scale, step_inputs(sae, sparsity_coeff=0.01))
        optimiser.zero_grad()
        value.backward()
        optimiser.step()
        losses.append(value.item())
    assert losses[-1] < 0.5 * losses[0]
    torch.testing.assert_close(sae.folded()(x_Nd), sae(x_Nd))


def test_names_that_lead_nowhere_are_one_clear_line() -> None:
    with pytest.raises(UserError, match=r"unknown architecture 'gatedd'; did you mean 'gated'"):
        get_sae("gatedd")
    with pytest.raises(UserError, match="cannot import 'example_sae:Missing'"):
        get_sae("example_sae:Missing")
    with pytest.raises(UserError, match="is no subclass"):
        get_sae("example_sae:LeakyConfig")
    with pytest.raises(UserError, match="must be the name"):
        sae_config_class(3)


class OldSAE(ReluSAE):
    """Written before there was a y."""

    def training_forward(self, x_Nd: torch.Tensor, inputs: StepInputs) -> Forward:
        forward = super().training_forward(x_Nd, inputs)
        forward.terms["more"] = 0.5 * forward.f_Nh.sum()
        return forward


def test_a_forward_without_a_target_goes_on_working() -> None:
    config = ReluSAE.Config(sae_type="relu", sae_positions=["hook"])
    sae, x_Nd = OldSAE(6, 15, config, dtype=torch.float64), activations()
    sae.initialise(x_Nd, torch.Generator().manual_seed(0))
    given = step_inputs(sae)
    terms = [sae.training_forward(x_Nd, given).terms, sae.training_forward(x_Nd, x_Nd, given).terms]
    assert terms[0].keys() == terms[1].keys() == {"mse", "sparsity", "more"}
    assert all(torch.equal(terms[0][name], terms[1][name]) for name in terms[0])


def test_an_architecture_of_the_first_contract_is_told_what_to_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It encoded normalised activations; taken as it is, its numbers would silently be others."""
    text = (Path(__file__).parent / "example_sae.py").read_text(encoding="utf-8")
    (tmp_path / "older_sae.py").write_text(text.replace("def code", "def encode"))
    (tmp_path / "half_renamed_sae.py").write_text(text.replace("self.reconstruct", "self.decode"))
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError, match=r"rename LeakySAE\.encode to 'code'"):
        get_sae("older_sae:LeakySAE")
    with pytest.raises(UserError, match=r"in LeakySAE\.training_forward call 'reconstruct' instead of 'decode'"):
        get_sae("half_renamed_sae:LeakySAE")
