"""Centred and whitened activations: what is measured, that every step sees the same, and that runs keep it."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import save_file
from test_processes import weights

from saeopt.activations.stream import Batch
from saeopt.config import validate_run
from saeopt.errors import UserError
from saeopt.runs.weights import load_checkpoint
from saeopt.saes.normalisation import RIDGE, measured
from saeopt.saes.registry import ARCHITECTURES
from saeopt.testing.cases import build
from saeopt.training import TrialPlan, train_pack
from saeopt.training.memory import MemberShape, ModelShape, estimate
from saeopt.training.pack import Member, Pack
from saeopt.training.runtime import Runtime
from saeopt.training.setup import normalise

D, TOKENS = 6, 240
KINDS = ["mean_scale", "whiten"]


def skewed(n: int, d: int, seed: int = 0) -> torch.Tensor:
    """Correlated, of unlike sizes, and far from 0."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(d, d, generator=torch.Generator().manual_seed(9)) @ torch.diag(0.5 ** torch.arange(d))
    return torch.randn(n, d, generator=generator).double() @ mixing.double() + torch.linspace(-3, 5, d).double()


def config(path, positions=("here",), **fields):
    data = {"context_length": 8, "n_train_samples": 128, "n_eval_samples": 10, "train_batch_size": 4}
    saes = {"sae_type": "relu", "sae_positions": list(positions), "dict_size_to_input_ratio": 4, "sparsity_coeff": 0.1}
    raw = {"data": {"activations": str(path), **data}, "threads": 1, "lr": 3e-3, "save_every_n_samples": 32}
    return validate_run({**raw, "saes": {**saes, **fields}}, "the test")


def trained(members, x_by_hook, windows=4, micro=2):
    """Members of float64 after some windows with masked tokens."""
    pack = Pack(members, Runtime("cpu", weights_dtype=torch.float64), total_samples=100)
    keep_N = torch.arange(TOKENS) % 5 > 0
    for window in range(windows):
        parts = []
        for part in range(micro):
            rows = slice((window * micro + part) * 20, (window * micro + part + 1) * 20)
            parts.append(Batch({h: x[rows] for h, x in x_by_hook.items()}, keep_N[rows], 0, 4, 5))
        for batch in parts[:-1]:
            pack._each_stack(batch, (window + 1) * 4, whole=False)
        pack._each_stack(parts[-1], (window + 1) * 4, whole=False)
        for group in pack.groups:
            group.stack.apply(group.controls.numbers((window + 1) * 4))
    return pack


def member(given, name="a", key="here", like=None, seed=0):
    sae = build(given.saes.sae_type, given.sae_at(key).model_dump(exclude={"sae_type", "sae_positions"}), seed=seed)
    if like is not None:
        sae.load_state_dict(like.state_dict(), strict=False)
    return Member(name, key, given, sae)


@pytest.mark.parametrize("kind", KINDS)
def test_every_step_sees_the_activations_that_were_normalised_by_hand(tmp_path, kind):
    """Fused and reference, against SAEs without normalisation on activations in float64 that were normalised here."""
    x_Nd = skewed(TOKENS, D)
    mean_d = x_Nd.mean(0)
    for sae_type in ARCHITECTURES:
        own = {"k": 4} if "topk" in sae_type else {}
        plain = member(config(tmp_path, sae_type=sae_type, normalize_activations="none", **own))
        by_hand, found = (x_Nd - mean_d), {}
        for stack in ("auto", "reference"):
            given = config(tmp_path, sae_type=sae_type, normalize_activations=kind, **own)
            given = given.model_copy(update={"performance": given.performance.model_copy(update={"stack": stack})})
            one = member(given, like=plain.sae)
            normalise(one.sae, one.site, x_Nd, x_Nd)
            found[stack] = one
        if kind == "whiten":
            values_d, vectors_dd = torch.linalg.eigh(by_hand.T @ by_hand / TOKENS)
            by_hand = by_hand @ vectors_dd @ torch.diag((values_d + RIDGE * values_d.mean()) ** -0.5) @ vectors_dd.T
        by_hand = by_hand * D**0.5 / by_hand.norm(dim=-1).mean()
        expected = trained([plain], {"here": by_hand}).metrics(16)[0][1]
        for one in found.values():
            metrics = trained([one], {"here": x_Nd}).metrics(16)[0][1]
            assert metrics == pytest.approx(expected, rel=1e-6), sae_type
            for name, tensor in plain.sae.named_parameters():
                ours = one.sae.get_parameter(name)
                torch.testing.assert_close(ours.data, tensor.data, rtol=1e-6, atol=1e-8, msg=f"{sae_type} {name}")


def test_members_normalised_in_four_ways_train_in_one_pack_as_they_do_alone(tmp_path):
    x_Nd = skewed(TOKENS, D)

    def make():
        made = []
        for number, kind in enumerate(["scale", "none", "mean_scale", "whiten", "mean_scale"]):
            one = member(config(tmp_path, normalize_activations=kind), str(number), seed=number)
            normalise(one.sae, one.site, x_Nd, x_Nd)
            made.append(one)
        return made

    together = make()
    pack = trained(together, {"here": x_Nd})
    assert sorted(len(group.members) for group in pack.groups) == [1, 1, 1, 2]
    for one, alone in zip(together, make(), strict=True):
        trained([alone], {"here": x_Nd})
        for name, tensor in alone.sae.state_dict().items():
            torch.testing.assert_close(one.sae.state_dict()[name], tensor, rtol=1e-9, atol=1e-12)


def test_an_activation_is_centred_once_for_all_that_share_its_mean(tmp_path, monkeypatch):
    x_Nd, seen = skewed(TOKENS, D), []
    members = []
    for number, sae_type in enumerate(["relu", "gated", "topk"]):
        own = {"k": 4} if sae_type == "topk" else {}
        one = member(config(tmp_path, sae_type=sae_type, normalize_activations="mean_scale", **own), str(number))
        normalise(one.sae, one.site, x_Nd, x_Nd)
        centre = one.sae.centre
        monkeypatch.setattr(one.sae, "centre", lambda x, centre=centre: (seen.append(1), centre(x))[1])
        members.append(one)
    trained(members, {"here": x_Nd}, windows=1, micro=1)
    assert len(seen) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_measured_makes_normalised_activations_so_long_and_has_an_inverse(kind):
    x_Nd = torch.cat([skewed(500, 4), 100 * skewed(500, 3, seed=1)], dim=-1)
    found = measured(x_Nd, ["one", "two"], [4, 3], kind)
    torch.testing.assert_close(found.mean_d, x_Nd.mean(0))
    z_Nd = x_Nd - x_Nd.mean(0)
    if kind == "whiten":
        z_Nd = z_Nd @ found.whitening_dd
        torch.testing.assert_close(found.whitening_dd @ found.unwhitening_dd, torch.eye(7).double())
        assert found.scales == [1.0, 1.0]
        assert not found.whitening_dd[:4, 4:].any()
        for part, block in zip((x_Nd - x_Nd.mean(0)).split([4, 3], -1), (slice(0, 4), slice(4, 7)), strict=True):
            spread, T = part.T @ part / len(part), found.whitening_dd[block, block]
            unit = torch.eye(len(spread)).double()
            whitened = T @ (spread + RIDGE * spread.trace() / len(spread) * unit) @ T
            torch.testing.assert_close(whitened / whitened.diagonal().mean(), unit)
    else:
        z_Nd = z_Nd * torch.tensor(found.scales).repeat_interleave(torch.tensor([4, 3]))
    for part, width in zip(z_Nd.split([4, 3], -1), (4, 3), strict=True):
        assert part.norm(dim=-1).mean().item() == pytest.approx(width**0.5)


def test_activations_that_cannot_be_normalised_are_named():
    with pytest.raises(ValueError, match="at here are all 0, or all the same"):
        measured(torch.ones(9, 3), ["here"], [3], "mean_scale")
    with pytest.raises(ValueError, match="at here are not finite"):
        measured(torch.full((9, 3), torch.inf), ["here"], [3], "scale")


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_measures_them_on_kept_tokens_evaluates_in_raw_units_and_goes_on_bit_for_bit(tmp_path, kind):
    """An autoencoder and a transcoder with a mean at each end; outliers are left out of the mean."""
    x_Nd, y_Ne = skewed(1000, 6).float(), (skewed(1000, 4, seed=2) * 7 + 3).float()
    x_Nd[::50] *= 400
    (tmp_path / "files").mkdir()
    save_file({"x": x_Nd, "y": y_Ne}, tmp_path / "files" / "in-%3Eout.safetensors")
    save_file({"x": x_Nd.clone()}, tmp_path / "files" / "in.safetensors")
    positions = ["in", {"read": "in", "write": "out"}]
    given = config(tmp_path / "files", positions, normalize_activations=kind)
    given = given.model_copy(update={"data": given.data.model_copy(update={"mask_norm_outliers": 8.0})})
    result = train_pack([TrialPlan("a", given, tmp_path / "whole")], Runtime("cpu"))["a"]
    saes = load_checkpoint(tmp_path / "whole").saes
    held_x, held_y = x_Nd[-80:].double(), y_Ne[-80:].double()
    for key, y in (("in", held_x), ("in->out", held_y)):
        sae, row = saes[key], result.evaluation[key]
        both = held_x if key == "in" else torch.cat([held_x, held_y], -1)
        kept_N = both.norm(dim=-1) <= sae.norm_limit
        assert 0 < (~kept_N).sum() < 10
        assert sae.mean.abs().max() < 9  # with the outliers it would be larger
        exact, y = copy.deepcopy(sae).double(), y[kept_N]
        f, y_hat = exact.encode(held_x[kept_N]), exact(held_x[kept_N])
        error = (y - y_hat).square().sum()
        assert row["n_tokens"] == len(y)
        assert row["mse"] == pytest.approx((error / len(y)).item(), rel=1e-4)
        assert row["fvu"] == pytest.approx((error / (y - y.mean(0)).square().sum()).item(), rel=1e-4)
        rows_he = exact.folded().W_dec
        assert row["l1"] == pytest.approx(((f.abs() @ rows_he.norm(dim=-1)).sum() / len(y)).item(), rel=1e-4)
        assert row["norm_ratio"] == pytest.approx((y_hat.norm(dim=-1).sum() / y.norm(dim=-1).sum()).item(), rel=1e-4)
    train_pack([TrialPlan("a", given, tmp_path / "cut")], Runtime("cpu"))
    for path in (tmp_path / "cut").rglob("*128*"):
        path.unlink()
    (tmp_path / "cut" / "evaluation.json").unlink()
    train_pack([TrialPlan("a", given, tmp_path / "cut", resume=True)], Runtime("cpu"))
    whole, cut = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert any(name.endswith("/mean_written") for name in whole)
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def test_a_pretrained_sae_brings_what_normalises_it_or_is_refused(tmp_path):
    save_file({"x": skewed(1000, 6).float()}, tmp_path / "x.safetensors")

    def train(name, kind, start=None):
        path = None if start is None else str(tmp_path / start)
        given = config(tmp_path / "x.safetensors", normalize_activations=kind, pretrained_sae_paths=path)
        train_pack([TrialPlan(name, given, tmp_path / name)], Runtime("cpu"))

    train("mean_scale", "mean_scale")
    train("scale", "scale")
    train("more", "whiten", start="scale")
    new, old = (load_checkpoint(tmp_path / name).saes["here"] for name in ("more", "scale"))
    assert torch.equal(new.scale, old.scale)
    assert not new.mean.any()
    with pytest.raises(UserError, match=r"normalised with 'mean': set saes\.normalize_activations: mean_scale"):
        train("less", "scale", start="mean_scale")


def test_the_words_are_those_of_older_configs(tmp_path):
    words = {"scale": True, True: True, "none": False, False: False, "mean_scale": "mean_scale", "whiten": "whiten"}
    for word, kept in words.items():
        assert config(tmp_path, normalize_activations=word).saes.normalize_activations == kept
    with pytest.raises(UserError, match=r"'saes\.normalize_activations': must be mean_scale, scale \(= true\)"):
        config(tmp_path, normalize_activations="center")
    raw = config(tmp_path, normalize_activations="whiten").model_dump(mode="json")
    with pytest.raises(UserError, match="legacy_scaling: true"):
        validate_run({**raw, "legacy_scaling": True}, "x")


def test_memory_for_centred_activations_is_counted(tmp_path):
    given, sizes = config(tmp_path), []
    for centring in (0, 65):
        shapes = [MemberShape("here", "relu", 64, 512, 70_000, centring=centring)] * 2
        sizes.append(estimate(given, shapes, ModelShape(0, 0), 2))
    assert sizes[1]["activations"] - sizes[0]["activations"] == 4 * 32 * 64
    name = "weights, gradients, optimiser"
    assert sizes[1][name] - sizes[0][name] == 2 * 4 * 65


def test_gamma_is_told_warned_of_where_nothing_is_centred_and_evaluated(tmp_path, caplog):
    x_Nd = torch.randn(1000, D, generator=torch.Generator().manual_seed(0)) + 4
    save_file({"x": x_Nd}, tmp_path / "x.safetensors")
    gamma = 4 * D**0.5 / D**0.5
    for kind, warned in (("scale", 1), ("mean_scale", 0), ("whiten", 0)):
        caplog.clear()
        given = config(tmp_path / "x.safetensors", normalize_activations=kind)
        with caplog.at_level("INFO", logger="saeopt"):
            result = train_pack([TrialPlan(kind, given, tmp_path / kind)], Runtime("cpu"))[kind]
        (told,) = [r for r in caplog.records if r.getMessage().startswith("γ = ")]
        assert float(told.getMessage().split()[-1]) == pytest.approx(gamma, rel=0.1)
        notices = [r.getMessage() for r in caplog.records if "γ is above 1 at here" in r.getMessage()]
        assert len(notices) == warned
        held = x_Nd[-80:].double()
        exact = held.mean(0).norm() / held.var(0, correction=0).sum().sqrt()
        assert result.evaluation["here"]["gamma"] == pytest.approx(exact.item(), rel=1e-5)
