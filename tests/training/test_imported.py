"""SAEs of other tools in runs: evaluated as they are, trained on in the run's units, beside trials that train."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

import saeopt
from saeopt.config.sites import Site
from saeopt.errors import UserError
from saeopt.evaluation.held_out import config_of, measure
from saeopt.evaluator import app
from saeopt.imports.find import find
from saeopt.runs.weights import load_checkpoint
from saeopt.saes.base import Widths
from saeopt.testing.cases import build, normalise_awkwardly
from saeopt.training import TrialPlan, train_pack
from saeopt.training.runtime import Runtime

HOOK, D, H = "blocks.1.hook_resid_pre", 16, 64


@pytest.fixture(scope="module")
def runtime():
    return Runtime("cpu")


def sae_lens(folder, architecture="standard", hook=HOOK, **fields):
    """An SAE in sae-lens' layout, with rows of unequal length and biases."""
    generator = torch.Generator().manual_seed(3)
    shapes = {"W_enc": (D, H), "b_enc": (H,), "W_dec": (H, D), "b_dec": (D,)}
    if architecture == "jumprelu":
        shapes["threshold"] = (H,)
    tensors = {name: 0.4 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    tensors |= {"threshold": tensors["threshold"].abs()} if "threshold" in tensors else {}
    folder.mkdir()
    save_file(tensors, folder / "sae_weights.safetensors")
    metadata = {"sae_lens_version": "6.54.12", "hook_name": hook}
    (folder / "cfg.json").write_text(
        json.dumps({"architecture": architecture, "d_in": D, "d_sae": H, "metadata": metadata, **fields})
    )
    return saeopt.load(folder)[hook]


def plan(config, tmp_path, name):
    return TrialPlan(name, config, tmp_path / name, False)


def of(folder, **more):
    return {"saes.pretrained_sae_paths": str(folder), **more}


@pytest.mark.parametrize(
    ("architecture", "sae_type"), [("standard", "relu"), ("jumprelu", "jumprelu"), ("topk", "topk")]
)
def test_it_is_evaluated_as_it_is_beside_one_that_trains(make_config, runtime, tmp_path, architecture, sae_type):
    k = {"k": 6} if sae_type == "topk" else {}
    given = sae_lens(tmp_path / "theirs", architecture, **k)
    changes = {f"saes.{name}": value for name, value in k.items()}
    frozen = make_config(
        **of(tmp_path / "theirs", **{"saes.sae_type": sae_type, "saes.retrain_saes": False}, **changes)
    )
    results = train_pack([plan(frozen, tmp_path, "theirs-run"), plan(make_config(), tmp_path, "ours")], runtime)
    assert [r.status for r in results.values()] == ["finished", "finished"]
    kept = load_checkpoint(tmp_path / "theirs-run")
    x_Nd = 3 + torch.randn(40, D, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(kept.saes[HOOK].encode(x_Nd), given.encode(x_Nd))
    torch.testing.assert_close(kept.saes[HOOK](x_Nd), given(x_Nd))
    found, _ = measure(kept, config_of(tmp_path / "theirs-run", kept, []), torch.device("cpu"), None, True)
    evaluated = results["theirs-run"].evaluation[HOOK]
    for metric in ("l0", "fvu", "ce_recovered"):
        assert evaluated[metric] == pytest.approx(found[HOOK][metric], rel=1e-5)
    begun = json.loads((tmp_path / "theirs-run" / "begun_from.json").read_text())
    assert begun[HOOK]["from"].endswith("theirs/sae_weights.safetensors")


@pytest.mark.parametrize("kind", ["none", "scale", "mean_scale", "whiten"])
@pytest.mark.parametrize("sae_type", ["relu", "jumprelu", "batch_topk"])
def test_training_starts_from_the_same_map_in_its_own_units(make_config, runtime, tmp_path, kind, sae_type):
    given = sae_lens(tmp_path / "theirs", "standard" if sae_type == "relu" else "jumprelu")
    if sae_type == "batch_topk":  # one threshold for all latents, of which one learns
        given = sae_lens(tmp_path / "same", "standard")
    folder = tmp_path / ("same" if sae_type == "batch_topk" else "theirs")
    norm = {"saes.normalize_activations": kind}
    config = make_config(**of(folder, **{"saes.sae_type": sae_type, "lr": 1e-12}, **norm))
    assert train_pack([plan(config, tmp_path, "run")], runtime)["run"].status == "finished"
    found = load_checkpoint(tmp_path / "run").saes[HOOK]
    x_Nd = 3 + torch.randn(40, D, generator=torch.Generator().manual_seed(5))
    if kind == "mean_scale":
        assert found.mean.abs().max() > 0.01
    if sae_type == "batch_topk":  # its threshold follows the windows: without it the map is relu's
        found.threshold.zero_()
    longer_h = found.encode(x_Nd).amax(0) / given.encode(x_Nd).amax(0).clamp_min(1e-9)
    fired_h = given.encode(x_Nd).amax(0) > 1e-3
    torch.testing.assert_close(
        (given.encode(x_Nd) * longer_h)[:, fired_h], found.encode(x_Nd)[:, fired_h], rtol=1e-3, atol=1e-3
    )
    torch.testing.assert_close(found(x_Nd), given(x_Nd), rtol=1e-4, atol=2e-4)


def test_fine_tuning_lowers_the_loss(make_config, runtime, tmp_path):
    sae_lens(tmp_path / "theirs")
    kept, trained = (
        train_pack([plan(make_config(**of(tmp_path / "theirs", **more)), tmp_path, name)], runtime)[name].evaluation[
            HOOK
        ]
        for name, more in {"kept": {"saes.retrain_saes": False}, "trained": {}}.items()
    )
    assert trained["fvu"] < 0.8 * kept["fvu"]


def test_what_does_not_fit_is_refused_with_what_to_set(make_config, runtime, tmp_path):
    sae_lens(tmp_path / "topk", "topk", k=6)
    wrong = {
        "saes.sae_type: topk and saes.dict_size_to_input_ratio: 4 (the config asks for relu": {},
        "was saved with saes.k: 6: set it": {"saes.sae_type": "topk", "saes.k": 5, "saes.retrain_saes": False},
        "saes.dict_size_to_input_ratio: 4": {"saes.sae_type": "topk", "saes.k": 6, "saes.dict_size_to_input_ratio": 8},
    }
    for message, changes in wrong.items():
        with pytest.raises(UserError) as told:
            train_pack([plan(make_config(**of(tmp_path / "topk", **changes)), tmp_path, "run")], runtime)
        assert message in str(told.value)
        assert "'saes.pretrained_sae_paths'" in str(told.value)


def test_several_hook_points_take_their_own_and_a_path_may_name_its_hook_point(make_config, runtime, tmp_path):
    other = "blocks.0.hook_resid_post"
    sae_lens(tmp_path / "a", hook="elsewhere")
    sae_lens(tmp_path / "b", "jumprelu", hook=other)
    both = {"saes.sae_positions": [HOOK, other], "saes.retrain_saes": False, "saes.sae_type": "jumprelu"}
    told = make_config(**both, **{"saes.pretrained_sae_paths": [f"{HOOK}={tmp_path / 'a'}", str(tmp_path / "b")]})
    train_pack([plan(told, tmp_path, "run")], runtime)
    found = load_checkpoint(tmp_path / "run").saes
    assert torch.equal(found[HOOK].W_enc, saeopt.load(tmp_path / "a")["elsewhere"].W_enc)
    assert not found[HOOK].threshold.any()  # relu is jumprelu with thresholds of 0
    assert found[other].threshold.any()
    unclear = make_config(**both, **{"saes.pretrained_sae_paths": [str(tmp_path / "a"), str(tmp_path / "b")]})
    with pytest.raises(UserError, match=rf"no SAE for {HOOK} \(found: elsewhere, {other}; '{HOOK}=PATH' says which"):
        train_pack([plan(unclear, tmp_path, "other")], runtime)


@pytest.mark.parametrize("kind", ["none", "scale", "mean_scale", "whiten"])
@pytest.mark.parametrize("widths", [None, Widths((6,), (4,), False)])
@pytest.mark.parametrize("sae_type", ["relu", "gated", "jumprelu", "topk", "gated_hard_concrete", "hard_concrete"])
def test_unfolding_undoes_folding(sae_type, widths, kind):
    sae = normalise_awkwardly(build(sae_type, {"normalize_activations": kind}, recipe=3, widths=widths))
    x_Nd = torch.randn(30, 6, dtype=torch.float64)
    code, given, folded = sae.encode(x_Nd), sae(x_Nd), sae.folded()
    again = build(sae_type, {"normalize_activations": kind}, recipe=3, widths=widths)
    again.load_state_dict({name: t for name, t in folded.state_dict().items() if name != "row_norm"}, strict=False)
    if "row_norm" in folded.state_dict():
        if folded.row_norm.numel() > 1 and kind == "whiten":
            pytest.skip("rows of unequal norms are refused")
        again.row_norm.copy_(folded.row_norm.flatten()[0])
    for (_, own), (_, wanted) in zip(again.normalising(), sae.normalising(), strict=True):
        own.copy_(wanted)
    again.unfold()
    torch.testing.assert_close(again.encode(x_Nd), code)
    torch.testing.assert_close(again(x_Nd), given)


def test_a_transcoder_is_found_by_what_it_reads_and_writes(tmp_path):
    tensors = {"W_enc": torch.randn(5, D), "b_enc": torch.randn(5), "W_dec": torch.randn(5, D), "b_dec": torch.randn(D)}
    save_file(tensors, tmp_path / "layer_0.safetensors")
    (tmp_path / "config.yaml").write_text(
        "model_kind: transcoder_set\nfeature_input_hook: hook_resid_mid\nfeature_output_hook: hook_mlp_out\n"
    )
    (held,) = find(str(tmp_path))
    reads, writes = "blocks.0.hook_resid_mid", "blocks.0.hook_mlp_out"
    assert held.site == Site((reads,), (writes,), f"{reads}->{writes}")
    sae, x_Nd = saeopt.load(tmp_path)[held.key], torch.randn(20, D)
    code = torch.relu(x_Nd @ tensors["W_enc"].T + tensors["b_enc"])
    torch.testing.assert_close(sae.encode(x_Nd), code)
    torch.testing.assert_close(sae(x_Nd), code @ tensors["W_dec"] + tensors["b_dec"])


def test_a_command_that_wants_a_run_says_what_evaluates_another_tools_sae(tmp_path):
    sae_lens(tmp_path / "theirs")
    done = CliRunner().invoke(app, [str(tmp_path / "theirs")])
    assert isinstance(done.exception, UserError)
    assert "sae_weights.safetensors is another tool's: a config with saes.pretrained_sae_paths" in str(done.exception)


def test_a_run_without_a_checkpoint_is_no_other_tools(tmp_path):
    (tmp_path / "final_config.yaml").write_text("saes: {}")
    with pytest.raises(UserError, match="no checkpoint"):
        saeopt.load(tmp_path)
