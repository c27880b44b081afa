"""Transcoders and crosscoders: a float64 oracle in plain torch, the spliced model, studies, two ranks."""

from __future__ import annotations

import pytest
import torch
from test_processes import weights
from transformers import AutoModelForCausalLM

from saeopt.activations.stream import Batch
from saeopt.config.normalise import normalised
from saeopt.config.study_file import study_spec
from saeopt.errors import UserError
from saeopt.evaluation.held_out import measure
from saeopt.runs.weights import load_checkpoint
from saeopt.saes.base import Widths
from saeopt.saes.registry import get_sae
from saeopt.search.objectives import objective_names, objective_values
from saeopt.search.sensible import check_study
from saeopt.search.space import Space
from saeopt.training import TrialPlan, train_pack
from saeopt.training.dry_run import print_dry_run
from saeopt.training.pack import Member, Pack
from saeopt.training.runtime import Runtime

READ, WRITE = "blocks.1.mlp.hook_in", "blocks.1.hook_mlp_out"
LAYERS = ["blocks.0.hook_resid_post", "blocks.1.hook_mlp_out"]
TRANSCODER = {"read": READ, "write": WRITE}
CROSSCODER = {"read": LAYERS, "write": LAYERS, "name": "two"}
DEAD_AFTER, LAMBDA, K = 15, 0.3, 3


def test_a_transcoder_and_a_crosscoder_take_the_steps_of_a_float64_oracle(make_config):
    """Masks, two micro-batches, clipping, AuxK with dead latents; gradients (through the clip's norm) and weights."""
    for entry, widths in ((TRANSCODER, Widths((5,), (3,), False)), (CROSSCODER, Widths((4, 3), (4, 3), True))):
        for sae_type in ("relu", "topk"):
            _compare(make_config, entry, widths, sae_type)


def _compare(make_config, entry, widths, sae_type):
    torch.manual_seed(0)
    own = (
        {"saes.k": K, "saes.aux_k": 2}
        if sae_type == "topk"
        else {"saes.sparsity_coeff": LAMBDA, "saes.resample_every_tokens": 0}
    )
    config = make_config(**{
        "saes.sae_type": sae_type, "saes.sae_positions": [entry], "saes.dead_after_tokens": DEAD_AFTER, **own,
        "lr_schedule": "constant", "warmup_samples": 0, "lr": 0.01, "max_grad_norm": 0.5, "adam_betas": (0.9, 0.99),
        "saes.sparsity_warmup_samples": 0, "saes.decoder_norm": "free",
    })  # fmt: skip
    (key,) = config.saes.keys
    d, h = sum(widths.reads), 8
    sae = get_sae(sae_type)(d, h, config.sae_at(key), dtype=torch.float64, widths=widths)
    for parameter in sae.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    sae.b_enc.data[:2] = -9.0 if sae_type == "relu" else -1.6
    scales = {hook: 0.5 + 0.25 * i for i, hook in enumerate(config.saes.site(key).hooks)}
    sae.scale.copy_(torch.tensor([scales[hook] for hook in config.saes.site(key).reads]))
    sae.scale_written.copy_(torch.tensor([scales[hook] for hook in config.saes.site(key).writes]))
    if sae_type == "topk":
        sae.variance.fill_(2.5)
    oracle = _Oracle(sae, widths, sae_type)
    pack = Pack([Member("a", key, config, sae)], Runtime("cpu", weights_dtype=torch.float64), total_samples=100)
    names = {hook: w for hooks, ws in zip(config.saes.site(key).__dict__.values(), widths[:2], strict=False)
             for hook, w in zip(hooks, ws, strict=True)}  # fmt: skip
    for window in range(6):
        batches = [
            Batch({hook: torch.randn(12, w).double() for hook, w in names.items()}, torch.rand(12) > 0.3, 0, 3, 4)
            for _ in range(2)
        ]
        pack.step(iter(batches), (window + 1) * 6)
        site = config.saes.site(key)
        given = [
            (torch.cat([b.x[r] * scales[r] for r in site.reads], -1)[b.keep_N],
             torch.cat([b.x[w] * scales[w] for w in site.writes], -1)[b.keep_N])
            for b in batches
        ]  # fmt: skip
        norm, fvu = oracle.window(torch.cat([x for x, _ in given]), torch.cat([y for _, y in given]))
        (row,) = [row for _, row in pack.metrics((window + 1) * 6)]
        assert row["grad_norm"] == pytest.approx(norm, rel=1e-9)
        assert row["fvu"] == pytest.approx(fvu, rel=1e-9)
    for name, tensor in oracle.weights.items():
        torch.testing.assert_close(sae.get_parameter(name).data, tensor.detach(), rtol=1e-9, atol=1e-11, msg=name)
    if sae_type == "topk":
        assert oracle.dead_windows > 0


class _Oracle:
    """Own formulas, π = x W_enc + b_enc, and torch's Adam."""

    def __init__(self, sae, widths, sae_type):
        self.weights = {n: p.detach().clone().requires_grad_() for n, p in sae.named_parameters()}
        self.adam = torch.optim.Adam(self.weights.values(), lr=0.01, betas=(0.9, 0.99), eps=1e-8)
        self.widths, self.sae_type, self.since, self.dead_windows = widths, sae_type, torch.zeros(sae.h), 0

    def window(self, x, y):
        w, n = self.weights, len(x)
        acts = torch.clamp(x @ w["W_enc"] + w["b_enc"], min=0)
        if self.sae_type == "topk":
            threshold = acts.sort(-1, descending=True).values[:, K - 1 : K]
            f = acts * (acts >= threshold)
        else:
            f = acts
        y_hat = f @ w["W_dec"] + w["b_dec"]
        mse = ((y - y_hat) ** 2).sum() / n
        if self.sae_type == "relu":
            first = 0
            norms = 0
            for width in self.widths.writes:
                norms = norms + w["W_dec"][:, first : first + width].pow(2).sum(-1).sqrt()
                first += width
            loss = mse + LAMBDA * (f * norms).sum() / n
        else:
            dead = self.since >= DEAD_AFTER
            loss = mse
            if dead.any():
                self.dead_windows += 1
                error = (y - y_hat).detach()
                masked = acts * dead
                chosen = masked * (masked >= masked.sort(-1, descending=True).values[:, 1:2])
                left = ((error - chosen @ w["W_dec"]) ** 2).sum()
                loss = loss + 2.5 / 32 * left / ((error - error.mean(0)) ** 2).sum()
        self.adam.zero_grad()
        loss.backward()
        for tensor in w.values():
            tensor.grad = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
        norm = torch.nn.utils.clip_grad_norm_(w.values(), 0.5)
        self.adam.step()
        fired = (f != 0).any(0)
        self.since = torch.where(fired, 0, self.since + n)
        return norm.item(), (((y - y_hat) ** 2).sum() / ((y - y.mean(0)) ** 2).sum()).item()


@pytest.fixture
def runtime():
    return Runtime("cpu")


def test_both_are_trained_beside_an_autoencoder_and_start_as_the_papers_say(make_config, runtime, tmp_path):
    positions = [LAYERS[0], TRANSCODER, CROSSCODER]
    config = make_config(**{"saes.sae_positions": positions, "saes.per_hook": {"two": {"sparsity_coeff": 0.5}}})
    result = train_pack([TrialPlan("a", config, tmp_path / "a")], runtime)["a"]
    keys = [LAYERS[0], f"{READ}->{WRITE}", "two"]
    assert list(result.evaluation) == keys
    assert all(0 < row["fvu"] < 1 and "ce_recovered" in row for row in result.evaluation.values())
    loaded = load_checkpoint(tmp_path / "a")
    assert list(loaded.saes) == keys
    two = loaded.saes["two"]
    assert (two.d, two.e, two.config.sparsity_coeff, tuple(two.scale.shape)) == (32, 32, 0.5, (2,))
    assert torch.equal(two.scale, two.scale_written)
    again, _ = measure(loaded, config, torch.device("cpu"), None, True)
    for key in keys:
        assert again[key]["fvu"] == pytest.approx(result.evaluation[key]["fvu"], rel=1e-5)
    x_Nd = torch.randn(6, 32)
    torch.testing.assert_close(two.folded()(x_Nd), two(x_Nd), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(two.unit_decoder()(x_Nd), two(x_Nd), rtol=1e-4, atol=1e-5)


def test_an_interrupted_transcoder_goes_on_bit_for_bit(make_config, runtime, tmp_path):
    positions = [TRANSCODER, CROSSCODER, {**TRANSCODER, "name": "two/1"}]  # a key that begins like another
    config = make_config(**{"saes.sae_type": "topk", "saes.k": 4, "saes.sae_positions": positions})
    train_pack([TrialPlan("a", config, tmp_path / "whole")], runtime)
    train_pack([TrialPlan("a", config, tmp_path / "cut")], runtime)
    for path in (tmp_path / "cut").rglob("*256*"):
        path.unlink()
    (tmp_path / "cut" / "evaluation.json").unlink()
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "cut").glob("samples_*.safetensors")}
    train_pack([TrialPlan("a", config, tmp_path / "cut", resume=True)], runtime)
    assert before == {file: file.stat().st_mtime_ns for file in before}  # it did not start over
    whole, cut = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def test_the_cross_entropy_of_a_transcoder_is_that_of_the_model_whose_mlp_it_replaces(
    make_config, runtime, tmp_path, tiny_model_dir
):
    config = make_config(**{"saes.sae_positions": [TRANSCODER]})
    (row,) = train_pack([TrialPlan("a", config, tmp_path / "a")], runtime)["a"].evaluation.values()
    (sae,) = load_checkpoint(tmp_path / "a").saes.values()
    lm = runtime.language_model(config)
    tokens = torch.cat(list(runtime.token_data(config, lm).eval_batches(10)))
    keep = ~torch.isin(tokens, torch.tensor(sorted(lm.special_ids)))
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir).float()
    seen = {}

    def replaced(_module, args, out):
        seen["x"], seen["y"] = args[0], out
        return torch.where(keep[..., None], sae(args[0]), out)

    handle = model.model.layers[1].mlp.register_forward_hook(replaced)
    with torch.no_grad():
        logits = model(tokens).logits
    handle.remove()
    losses = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    assert row["ce_sae"] == pytest.approx(losses[keep[:, :-1].flatten()].mean().item(), rel=1e-5)
    x, y = seen["x"][keep].double(), seen["y"][keep].double()
    y_hat = sae.double()(x).detach()
    fvu = ((y - y_hat) ** 2).sum() / ((y - y.mean(0)) ** 2).sum()
    assert row["fvu"] == pytest.approx(fvu.item(), rel=1e-4)


def test_a_transcoder_starts_with_a_decoder_of_zeros_and_the_mean(make_config):
    x, y = torch.randn(300, 5).double(), torch.randn(300, 3).double() + 2
    for sae_type in ("relu", "topk"):
        config = make_config(**{"saes.sae_type": sae_type, "saes.sae_positions": [TRANSCODER]})
        sae = get_sae(sae_type)(5, 40, config.saes, dtype=torch.float64, widths=Widths((5,), (3,), False))
        sae.initialise(x, torch.Generator().manual_seed(0), y)
        assert not sae.W_dec.any()
        assert not sae.unit_rows
        torch.testing.assert_close(sae.b_dec.data, y.mean(0))
        torch.testing.assert_close(sae.W_enc.norm(dim=0), torch.ones(40).double())


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        ([{"read": "a*", "write": "b"}], "no patterns"),
        ([{"read": "a", "write": "b", "name": "x@y"}], "none of '@="),
        ([{"read": "a", "write": "b", "name": "mean"}], "none of mean, all"),
        ([{"read": "a", "write": "a", "name": "x"}], "called like it"),
        ([{"read": "a", "write": "b"}, {"read": "a", "write": "b"}], "two sites are called"),
        ([{"read": "a", "write": "b", "name": "c"}, "c"], "two sites are called"),
        ([{"read": ["a", "a"], "write": "b"}], "stands twice"),
    ],
)
def test_positions_that_mean_nothing_are_refused_in_one_line(make_config, positions, message):
    with pytest.raises(UserError, match=message):
        make_config(**{"saes.sae_positions": positions})


def test_a_hook_point_that_the_model_lacks_is_named(make_config, runtime, tmp_path):
    config = make_config(**{"saes.sae_positions": [{"read": READ, "write": "blocks.1.hook_mlp_outt"}]})
    with pytest.raises(UserError, match=r"no hook point 'blocks\.1\.hook_mlp_outt'"):
        train_pack([TrialPlan("a", config, tmp_path / "a")], runtime)
    assert not (tmp_path / "a").exists()


def test_a_plan_shows_both_widths(make_config, capsys):
    print_dry_run(make_config(**{"saes.sae_positions": [LAYERS[0], {"read": LAYERS, "write": WRITE}]}), "cpu")
    shown = capsys.readouterr().out
    assert "e written" in shown
    assert " 32 " in shown


def test_a_site_is_not_called_like_a_hook_point_that_a_pattern_finds(make_config, runtime, tmp_path):
    config = make_config(**{"saes.sae_positions": ["blocks.*.hook_mlp_out", {**TRANSCODER, "name": WRITE}]})
    with pytest.raises(UserError, match="is a hook point that is trained too"):
        train_pack([TrialPlan("a", config, tmp_path / "a")], runtime)


def test_a_study_aims_at_sites_and_varies_fields_there_by_their_keys(make_config):
    base = make_config(**{"saes.sae_positions": [LAYERS[0], TRANSCODER, CROSSCODER]}).model_dump(mode="json")
    key = f"{READ}->{WRITE}"
    raw = {"name": "s", "base": base, "space": {"saes.sparsity_coeff@two": [1, 2]}}
    spec = normalised(study_spec({**raw, "objectives": [{"metric": "fvu", "hook_points": "all"}]}, "s"), "s")
    assert objective_names(spec) == [f"fvu@{LAYERS[0]}", f"fvu@{key}", "fvu@two"]
    assert objective_values(spec, {k: {"fvu": 0.5} for k in (LAYERS[0], key, "two")}) == [0.5] * 3
    cells = Space(spec).grid()
    assert [cell.config.sae_at("two").sparsity_coeff for cell in cells] == [1, 2]
    check_study(spec, cells)
    lost = {"objectives": [{"metric": "fvu", "hook_points": "three"}]}
    with pytest.raises(UserError, match="no SAE trains at three"):
        check_study(normalised(study_spec({**raw, **lost}, "s"), "s"), cells)
