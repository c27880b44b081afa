"""Evaluation on a real (random) transformer, against a computation that shares no code with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from plain_model import PlainModel
from torch import Tensor

from saeopt.activations.masks import keep_mask, norm_limit
from saeopt.config import DataConfig
from saeopt.evaluation import cross_entropy
from saeopt.evaluation.evaluate import evaluate, reconstruct
from saeopt.evaluation.metrics import Metrics, scalars
from saeopt.saes.base import SAE

MakeSAE = Callable[..., SAE]
HOOK = "blocks.1.hook_resid_pre"


@pytest.fixture(scope="module")
def model(tiny_model_dir: Path) -> PlainModel:
    return PlainModel(tiny_model_dir)


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    """Seven samples of 12 tokens with special tokens 0 and 1 at the start, within and at the end."""
    tokens = torch.randint(3, 64, (7, 12), generator=torch.Generator().manual_seed(1))
    tokens[:, 0] = 0
    tokens[2, 5] = tokens[3, 11] = 1
    return tokens


def keep(tokens_BT: Tensor, x_BTd: Tensor) -> Tensor:
    return tokens_BT > 1


def identity_sae(make_sae: MakeSAE, scale: float = 1.0) -> SAE:
    """x̂ = x: the code holds the positive and the negative part of every coordinate."""
    sae = make_sae(16, 32, scale=scale)
    for tensor in (sae.b_enc, sae.b_dec):
        tensor.zero_()
    sae.W_enc.copy_(torch.cat([torch.eye(16), -torch.eye(16)], dim=1))
    sae.W_dec.copy_(sae.W_enc.T)
    return sae


def zero_sae(make_sae: MakeSAE) -> SAE:
    sae = make_sae(16, 32)
    sae.W_dec.zero_()
    sae.b_dec.zero_()
    return sae


def run(saes: dict[str, SAE], model: PlainModel, tokens: Tensor, batch: int = 3, **options: object) -> Metrics:
    return evaluate(saes, model, tokens.split(batch), keep=keep, **options)[HOOK]  # type: ignore[arg-type]


@pytest.mark.parametrize("scale", [1.0, 0.125])
def test_the_identity_recovers_everything(make_sae: MakeSAE, model: PlainModel, tokens: Tensor, scale: float) -> None:
    got = run({HOOK: identity_sae(make_sae, scale)}, model, tokens)
    assert got["ce_recovered"] == pytest.approx(1, abs=1e-6)
    assert got["kl"] == pytest.approx(0, abs=1e-6)
    assert got["ce_degradation"] == pytest.approx(0, abs=1e-6)
    assert got["fvu"] == pytest.approx(0, abs=1e-10)
    assert got["cosine"] == got["norm_ratio"] == pytest.approx(1)
    assert got["l0"] == 16


def test_zeros_recover_nothing(make_sae: MakeSAE, model: PlainModel, tokens: Tensor) -> None:
    got = run({HOOK: zero_sae(make_sae)}, model, tokens)
    assert got["ce_recovered"] == 0
    assert got["ce_sae"] == got["ce_zero"] != got["ce_clean"]
    assert isinstance(got["kl"], float)
    assert got["kl"] > 0.01


def test_it_agrees_with_a_computation_by_plain_transformers(
    make_sae: MakeSAE, model: PlainModel, tokens: Tensor
) -> None:
    sae = make_sae(16, 32, scale=0.5)
    got = run({HOOK: sae}, model, tokens)
    inner, layer = model.model, model.model.model.layers[1]
    sums = {"clean": 0.0, "sae": 0.0, "zero": 0.0, "kl": 0.0}
    n = error = nonzero = 0.0
    kept_x = []
    for sample in tokens:  # one sample, one position at a time
        with torch.no_grad():
            x = inner(sample[None], output_hidden_states=True).hidden_states[1][0]
            f = torch.relu((x * 0.5 - sae.b_dec) @ sae.W_enc + sae.b_enc)
            x_hat = (f @ sae.W_dec + sae.b_dec) / 0.5
            log_p = {}
            for name, new in (("clean", x), ("sae", x_hat), ("zero", torch.zeros_like(x))):
                spliced = torch.stack([new[t] if sample[t] > 1 else x[t] for t in range(12)])
                handle = layer.register_forward_pre_hook(lambda m, args, s=spliced: (s[None], *args[1:]))
                log_p[name] = inner(sample[None]).logits[0].double().log_softmax(-1)
                handle.remove()
        for t in range(12):
            if sample[t] <= 1:
                continue
            error += float((x[t] - x_hat[t]).double().square().sum())
            nonzero += int((f[t] != 0).sum())
            kept_x.append(x[t].double())
            if t == 11:
                continue
            n += 1
            for name in ("clean", "sae", "zero"):
                sums[name] -= float(log_p[name][t, sample[t + 1]])
            sums["kl"] += float((log_p["clean"][t].exp() * (log_p["clean"][t] - log_p["sae"][t])).sum())
    x_all = torch.stack(kept_x)
    assert got["n_predictions"] == n
    assert got["n_tokens"] == len(x_all) == int((tokens > 1).sum())
    assert got["ce_clean"] == pytest.approx(sums["clean"] / n, rel=1e-5)
    assert got["ce_sae"] == pytest.approx(sums["sae"] / n, rel=1e-5)
    assert got["ce_zero"] == pytest.approx(sums["zero"] / n, rel=1e-5)
    assert got["kl"] == pytest.approx(sums["kl"] / n, rel=1e-4)
    recovered = (sums["zero"] - sums["sae"]) / (sums["zero"] - sums["clean"])
    assert got["ce_recovered"] == pytest.approx(recovered, rel=1e-4)
    assert got["mse"] == pytest.approx(error / len(x_all), rel=1e-5)
    assert got["fvu"] == pytest.approx(error / float((x_all - x_all.mean(0)).square().sum()), rel=1e-5)
    assert got["l0"] == pytest.approx(nonzero / len(x_all), rel=1e-9)


def test_the_splice_leaves_masked_positions_as_they_are(make_sae: MakeSAE, model: PlainModel, tokens: Tensor) -> None:
    x_BTd = model.activations(tokens, [HOOK])[HOOK]
    mask = keep(tokens, x_BTd)
    for new in (None, torch.full_like(x_BTd, 7.0)):
        spliced = cross_entropy.splicer(new, mask)(x_BTd)
        assert torch.equal(spliced[~mask], x_BTd[~mask])
        assert (spliced[mask] == (0.0 if new is None else 7.0)).all()


def test_special_tokens_are_left_out_unless_the_config_keeps_them(
    make_sae: MakeSAE, model: PlainModel, tokens: Tensor
) -> None:
    special = int((tokens <= 1).sum())
    saes = {HOOK: make_sae(16, 32)}
    for masked in (True, False):
        data = DataConfig(dataset_name="tiny", mask_special_tokens=masked)
        got = evaluate(saes, model, [tokens], data=data, cross_entropy=False)[HOOK]
        assert got["n_tokens"] == tokens.numel() - masked * special
    assert evaluate(saes, model, [tokens])[HOOK]["n_tokens"] == tokens.numel() - special


def test_norm_outliers_are_those_of_the_sae_whatever_the_batch_and_the_memory_for_logits(
    make_sae: MakeSAE, model: PlainModel, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = DataConfig(dataset_name="tiny", mask_norm_outliers=1.05)
    x_Nd = model.activations(tokens, [HOOK])[HOOK].flatten(0, 1)
    sae = make_sae(16, 32)
    sae.norm_limit = norm_limit(x_Nd, (tokens > 1).flatten(), 1.05)
    expected = int(keep_mask(tokens, {0, 1}, data, x_Nd, sae.norm_limit).sum())
    assert 0 < expected < int((tokens > 1).sum())
    monkeypatch.setattr(cross_entropy, "LOGITS_BYTES", {"cpu": 1})
    for size in (1, 3, len(tokens)):
        found = evaluate({HOOK: sae, "other": (HOOK, make_sae(16, 32))}, model, tokens.split(size), data=data)
        assert found[HOOK]["n_tokens"] == expected
        assert found["other"]["n_tokens"] == int((tokens > 1).sum())


def test_with_everything_masked_but_one_position_only_that_position_counts(
    make_sae: MakeSAE, model: PlainModel, tokens: Tensor
) -> None:
    def only_position_4(tokens_BT: Tensor, x_BTd: Tensor) -> Tensor:
        mask = torch.zeros_like(tokens_BT, dtype=torch.bool)
        mask[:, 4] = True
        return mask

    got = evaluate({HOOK: make_sae(16, 32)}, model, [tokens], keep=only_position_4)[HOOK]
    assert got["n_tokens"] == got["n_predictions"] == 7
    clean = model.logits(tokens)[:, 4].log_softmax(-1)
    assert got["ce_clean"] == pytest.approx(-float(clean.gather(1, tokens[:, 5:6]).mean()), rel=1e-5)


def test_batches_and_the_memory_for_logits_do_not_change_the_result(
    make_sae: MakeSAE, model: PlainModel, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    sae = make_sae(16, 32)
    whole = run({HOOK: sae}, model, tokens, batch=7)
    monkeypatch.setattr(cross_entropy, "LOGITS_BYTES", {"cpu": 2 * 4 * 12 * 64})
    monkeypatch.setattr("saeopt.evaluation.evaluate.CODE_BYTES", {"cpu": 4 * 32 * 5})
    model.passes["logits"] = 0
    assert scalars(run({HOOK: sae}, model, tokens, batch=5)) == pytest.approx(scalars(whole), rel=1e-5)
    assert model.passes["logits"] == 4  # 1, 2, 2 of the first batch; 2 of the second


def test_two_ranks_reduced_give_the_same_as_one(make_sae: MakeSAE, model: PlainModel, tokens: Tensor) -> None:
    sae = make_sae(16, 32)
    recorded: list[Tensor] = []

    def record(tensors: Sequence[Tensor]) -> None:
        recorded.extend(t.clone() for t in tensors)

    def add(tensors: Sequence[Tensor]) -> None:
        for tensor, other in zip(tensors, recorded, strict=True):
            tensor += other

    run({HOOK: sae}, model, tokens[:2], reduce=record)
    both = run({HOOK: sae}, model, tokens[2:], reduce=add)
    assert scalars(both) == pytest.approx(scalars(run({HOOK: sae}, model, tokens)), rel=1e-5)


def test_the_language_model_is_shared_by_all_saes(make_sae: MakeSAE, model: PlainModel, tokens: Tensor) -> None:
    saes = {
        "a": ("blocks.0.hook_resid_pre", make_sae(16, 32, seed=1)),
        "b": (HOOK, make_sae(16, 32, seed=2)),
        "c": (HOOK, make_sae(16, 24, seed=3)),
    }
    evaluate({"x": (HOOK, make_sae(16, 8))}, model, [tokens], keep=keep)
    model.passes.update(activations=0, logits=0, spliced=0)
    together = evaluate(saes, model, [tokens[:1], tokens[1:]], keep=keep)
    assert model.passes == {"activations": 2, "logits": 2, "spliced": 2 * (2 + 3)}  # zero per hook point, x̂ per SAE
    for key, (hook, sae) in saes.items():
        alone = evaluate({hook: sae}, model, [tokens[:1], tokens[1:]], keep=keep)[hook]
        assert together[key] == alone, key


def test_without_cross_entropy_no_logits_are_computed(make_sae: MakeSAE, model: PlainModel, tokens: Tensor) -> None:
    model.passes.update(activations=0, logits=0, spliced=0)
    done: list[int] = []
    got = run({HOOK: make_sae(16, 32)}, model, tokens, cross_entropy=False, progress=done.append)
    assert model.passes == {"activations": 3, "logits": 0, "spliced": 0}
    assert "ce_sae" not in got
    assert done == [3, 3, 1]


def test_no_metric_depends_on_how_a_latent_and_its_decoder_row_share_their_scale(
    make_sae: MakeSAE, model: PlainModel, tokens: Tensor
) -> None:
    sae, rescaled = make_sae(16, 32, scale=0.25), make_sae(16, 32, scale=0.25)
    c_h = torch.linspace(0.1, 10, 32)
    rescaled.W_enc *= c_h
    rescaled.b_enc *= c_h
    rescaled.W_dec /= c_h.unsqueeze(-1)
    first, second = (scalars(run({HOOK: s}, model, tokens)) for s in (sae, rescaled))
    assert second == pytest.approx(first, rel=1e-4, abs=1e-6)


def test_zero_ablation_of_all_positions_is_offered(make_sae: MakeSAE, model: PlainModel, tokens: Tensor) -> None:
    sae = make_sae(16, 32)
    usual, every = (run({HOOK: sae}, model, tokens, ce_ablation=name) for name in ("unmasked", "all"))
    counted = keep(tokens, tokens)[:, :-1]
    logits = model.spliced_logits(tokens, {HOOK: torch.zeros_like})[:, :-1].log_softmax(-1)
    nats = -logits.gather(-1, tokens[:, 1:].unsqueeze(-1)).squeeze(-1)[counted].mean().item()
    assert every["ce_zero"] == pytest.approx(nats, rel=1e-5)
    assert usual["ce_zero"] != pytest.approx(nats, rel=1e-5)
    for same in ("ce_clean", "ce_sae", "kl", "n_predictions", "fvu"):
        assert usual[same] == every[same]


def test_folding_changes_no_metric(make_sae: MakeSAE, model: PlainModel, tokens: Tensor) -> None:
    sae = make_sae(16, 32, scale=0.25)
    plain, folded = (scalars(run({HOOK: s}, model, tokens)) for s in (sae, sae.folded()))
    assert folded == pytest.approx(plain, rel=1e-4, abs=1e-6)


def test_reconstruction_is_in_raw_units(make_sae: MakeSAE) -> None:
    sae = make_sae(4, 8, scale=0.2)
    x = torch.randn(9, 4) * 5
    assert torch.allclose(reconstruct(sae, x), sae(x))
    assert torch.allclose(reconstruct(identity_sae(make_sae, 0.2), torch.ones(3, 16)), torch.ones(3, 16))


def test_kl_takes_tokens_that_the_clean_model_excludes() -> None:
    clean = torch.tensor([[0.0, 0.0, -torch.inf]])
    assert float(cross_entropy.kl_P(clean, torch.tensor([[0.0, 0.0, -torch.inf]]))) == 0.0
    assert float(cross_entropy.kl_P(clean, torch.zeros(1, 3))) == pytest.approx(float(torch.tensor(1.5).log()))
