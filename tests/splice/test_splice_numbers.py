"""What a spliced model computes, against plain transformers and against evaluation."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoModelForCausalLM

import saeopt
from saeopt.activations.language_model import LanguageModel
from saeopt.activations.tokens import TokenData
from saeopt.config import RunConfig, dump_yaml, validate_run
from saeopt.runs.weights import save_weights, weights_path
from saeopt.saes.base import SAE, Widths
from saeopt.saes.registry import ARCHITECTURES
from saeopt.testing.cases import build

close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)  # transformers' norms are in float32 in any case
HOOK, FIRST = "blocks.1.hook_resid_pre", "blocks.0.hook_resid_pre"
MLP = {"read": "blocks.1.mlp.hook_in", "write": "blocks.1.hook_mlp_out", "name": "mlp1"}
MakeSAE = Callable[..., SAE]


def by_transformers(folder: Path, tokens_BT: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """Logits with the input of layer 1 changed."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    layer = model.model.layers[1]
    layer.register_forward_pre_hook(lambda _m, args, kw: ((change(args[0]), *args[1:]), kw), with_kwargs=True)
    return model(tokens_BT).logits


def directions(sae: SAE) -> Tensor:
    """Decoder rows in raw units, of norm 1: reconstructions of unit codes less that of no code."""
    eye = torch.eye(sae.h, dtype=torch.float64)
    rows = sae.decode(eye) - sae.decode(torch.zeros_like(eye))
    return rows / rows.norm(dim=-1, keepdim=True)


@pytest.mark.parametrize("sae_type", ARCHITECTURES)
def test_with_the_error_term_nothing_changes_bit_for_bit(
    model: Any, tokens: Tensor, make_sae: MakeSAE, sae_type: str
) -> None:
    plain, sae = model(tokens), make_sae(sae_type)
    with saeopt.splice(model, {HOOK: sae}, use_error_term=True) as spliced:
        assert torch.equal(model(tokens), plain)
        logits, cache = model.run_with_cache(tokens)
        assert torch.equal(logits, plain)
        seen = cache[HOOK + ".hook_sae_acts_pre"]
        close(cache[HOOK + ".hook_sae_acts_post"], sae.encode(cache[HOOK]))
        assert seen.shape == spliced.latents[HOOK].shape
        spliced.steer(HOOK, [0, 5], 0.0)
        assert torch.equal(model(tokens), plain)
        spliced.steer(HOOK, 5, 1.0)
        assert not torch.allclose(model(tokens), plain)
    assert torch.equal(model(tokens), plain)


@pytest.mark.parametrize("sae_type", ARCHITECTURES)
def test_codes_are_steered_set_and_ablated_as_by_hand(
    model: Any, tokens: Tensor, make_sae: MakeSAE, sae_type: str, tiny_model_dir: Path
) -> None:
    sae = make_sae(sae_type)
    kept = (tokens > 1).unsqueeze(-1)

    def by_hand(change: Callable[[Tensor], Tensor], error: bool) -> Tensor:
        def put(x: Tensor) -> Tensor:
            f = sae.encode(x)
            new = sae.decode(change(f.clone())) + (x - sae.decode(f) if error else 0.0)
            return torch.where(kept, new, x)

        return by_transformers(tiny_model_dir, tokens, put)

    def set_two(f: Tensor) -> Tensor:
        f[:, 2:5, 3], f[:, 2:5, 7] = 1.5, -0.5
        return f

    def ablated(f: Tensor) -> Tensor:
        f[..., [1, 2]] = 0.0
        f[:, -1, 4] = 0.25
        return f

    for error in (False, True):
        with saeopt.splice(model, {HOOK: sae}, use_error_term=error) as spliced:
            close(model(tokens), by_hand(lambda f: f, error))
            spliced.set(HOOK, [3, 7], torch.tensor([1.5, -0.5]), positions=slice(2, 5))
            close(model(tokens), by_hand(set_two, error))
            spliced.clear(HOOK).ablate(HOOK, [1, 2]).ablate(HOOK, 4, to=0.25, positions="last")
            close(model(tokens), by_hand(ablated, error))
            steered = spliced.clear().steer(HOOK, 6, 3.0, positions=[1, -2]).model(tokens)
        move = torch.zeros(9, 1, dtype=torch.float64)
        move[[1, -2]] = 3.0

        def pushed(x: Tensor, error: bool = error, move: Tensor = move) -> Tensor:
            base = x if error else sae(x)
            return torch.where(kept, base + move * directions(sae)[6], x)

        close(steered, by_transformers(tiny_model_dir, tokens, pushed))


def run_folder(
    folder: Path, model_dir: Path, text: Path, positions: list[Any], **changes: Any
) -> tuple[Path, RunConfig]:
    """A run that was not trained: without weights yet."""
    data = {
        "dataset_name": str(text), "is_tokenized": False, "column_name": "text", "context_length": 16,
        "n_eval_samples": 11, "eval_batch_size": 4, "streaming": False, **changes.pop("data", {}),
    }  # fmt: skip
    config = validate_run(
        {
            "tlens_model_path": str(model_dir), "lm_dtype": "float32", "data": data,
            "saes": {"sae_type": "relu", "sae_positions": positions}, **changes,
        },
        "test",
    )  # fmt: skip
    folder.mkdir()
    (folder / "final_config.yaml").write_text(dump_yaml(config))
    return folder, config


@pytest.mark.parametrize(
    ("positions", "changes"),
    [
        ([FIRST, HOOK], {}),
        ([HOOK, "blocks.0.attn.hook_z"], {"data": {"skip_first_positions": 3, "mask_norm_outliers": 1.3}}),
        ([MLP, "blocks.0.hook_mlp_out"], {"data": {"mask_special_tokens": False}}),
        ([HOOK, "blocks.1.attn.hook_result"], {"data": {"mask_norm_outliers": 1.1}}),
        ([HOOK, "blocks.1.hook_mlp_out"], {"lm_processing": "compatibility"}),
    ],
    ids=["residual", "outliers", "transcoder", "switched", "compatibility"],
)
def test_the_loss_is_the_one_that_evaluation_gives(
    tmp_path: Path, tiny_model_dir: Path, tiny_text: Path, positions: list[Any], changes: dict[str, Any]
) -> None:
    widths = [Widths((16,), (16,), False) if isinstance(p, dict) else None for p in positions]
    width = [32 if isinstance(p, str) and "result" in p else 16 for p in positions]
    saes = [
        build("relu", {}, d=d, h=32, seed=i, dtype=torch.float32, widths=w, recipe=3)
        for i, (d, w) in enumerate(zip(width, widths, strict=True))
    ]
    folder, config = run_folder(tmp_path / "run", tiny_model_dir, tiny_text, positions, **changes)
    lm = LanguageModel.load(config, "cpu")
    tokens_BT = torch.cat(list(TokenData.load(config.data, lm).eval_batches(4)))
    if outliers := config.data.mask_norm_outliers:
        for position, sae in zip(positions, saes, strict=True):
            x_BTd = lm.activations(tokens_BT, [position])[position]
            sae.norm_limit = outliers * x_BTd.norm(dim=-1).median().item()
    keys = [p if isinstance(p, str) else p["name"] for p in positions]
    save_weights(weights_path(folder, 100), config, dict(zip(keys, saes, strict=True)), 100)
    rows = saeopt.evaluate_run(folder, device="cpu")
    loaded = saeopt.load(folder)
    model: Any = TransformerBridge.boot_transformers(str(tiny_model_dir), dtype=torch.float32)
    if changes.get("lm_processing"):
        model.enable_compatibility_mode(disable_warnings=True)
    for key, sae in loaded.items():
        with torch.no_grad(), saeopt.splice(model, {key: sae}) as spliced:
            logits = model(tokens_BT)
            counted = spliced._places[key].replaced_BT[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits[:, :-1][counted].double(), tokens_BT[:, 1:][counted])
        assert int(counted.sum()) == rows[key]["n_predictions"]
        assert counted.any()
        assert counted.all() == (not config.data.mask_special_tokens)
        assert loss.item() == pytest.approx(rows[key]["ce_sae"], abs=1e-5)
        assert abs(rows[key]["ce_sae"] - rows[key]["ce_clean"]) > 1e-3  # the SAE does something


def test_several_saes_act_one_after_the_other(model: Any, tokens: Tensor, make_sae: MakeSAE) -> None:
    first, second = make_sae(), make_sae("topk", h=30)
    with saeopt.splice(model, {HOOK: second, FIRST: first}) as both:
        together, codes = model(tokens), dict(both.latents)
    with saeopt.splice(model, {FIRST: first}) as outer, saeopt.splice(model, {HOOK: second}) as inner:
        assert torch.equal(model(tokens), together)
        assert torch.equal(outer.latents[FIRST], codes[FIRST])
        assert torch.equal(inner.latents[HOOK], codes[HOOK])
    assert not torch.allclose(codes[HOOK], second.encode(model.run_with_cache(tokens)[1][HOOK]))


def test_a_transcoder_reads_one_hook_point_and_writes_another(
    model: Any, tokens: Tensor, make_sae: MakeSAE, tiny_model_dir: Path
) -> None:
    sae, site = make_sae(widths=Widths((16,), (16,), False)), saeopt.Site((MLP["read"],), (MLP["write"],), "mlp1")
    kept = (tokens > 1).unsqueeze(-1)
    plain = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float64)
    clean = model(tokens)
    handle = plain.model.layers[1].mlp.register_forward_hook(
        lambda _m, args, out: torch.where(kept, sae.decode(sae.encode(args[0])), out)
    )
    expected = plain(tokens).logits
    handle.remove()
    with saeopt.splice(model, {"mine": (site, sae)}) as spliced:
        close(model(tokens), expected)
        assert spliced.latents["mine"].shape == (3, 9, 24)
        cache = model.run_with_cache(tokens)[1]
        assert torch.equal(cache["blocks.1.hook_mlp_out.hook_sae_acts_post"], spliced.latents["mine"])
    with saeopt.splice(model, {"mine": (site, sae)}, use_error_term=True) as spliced:
        assert torch.equal(model(tokens), clean)
        moved = spliced.steer("mine", 2, 4.0).model(tokens)
    plain.model.layers[1].mlp.register_forward_hook(
        lambda _m, args, out: torch.where(kept, out + 4.0 * directions(sae)[2], out)
    )
    close(moved, plain(tokens).logits)


def test_gradients_reach_codes_strengths_and_the_sae(model: Any, tokens: Tensor, make_sae: MakeSAE) -> None:
    sae, step = make_sae(), 0.005  # not smaller: transformers' norms are in float32
    for error in (False, True):
        with saeopt.splice(model, {HOOK: sae}, use_error_term=error) as spliced:
            loss = model(tokens, return_type="loss")
            gradient_BTh = torch.autograd.grad(loss, spliced.latents[HOOK])[0]
            *at, latent = torch.unravel_index(gradient_BTh.abs().argmax(), gradient_BTh.shape)
            value = spliced.latents[HOOK][*at, latent].item()
            where = torch.zeros(3, 9, dtype=torch.bool)
            where[*at] = True
            sides = [
                spliced.clear()
                .set(HOOK, int(latent), value + s, positions=where)
                .model(tokens, return_type="loss")
                .item()
                for s in (step, -step)
            ]
            gradient = gradient_BTh[*at, latent].item()
            assert gradient == pytest.approx((sides[0] - sides[1]) / (2 * step), rel=1e-2)
            strength = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
            spliced.clear().steer(HOOK, [int(latent)], strength)
            found = torch.autograd.grad(model(tokens, return_type="loss"), strength)[0].item()
            sides = [
                spliced.clear().steer(HOOK, [int(latent)], 0.5 + s).model(tokens, return_type="loss").item()
                for s in (step, -step)
            ]
            assert found == pytest.approx((sides[0] - sides[1]) / (2 * step), rel=1e-2)
            spliced.clear()
            sae.requires_grad_(True)
            model(tokens, return_type="loss").backward()
            assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in sae.parameters())
            sae.zero_grad()
            sae.requires_grad_(False)
            model.zero_grad()


def test_means_are_over_what_is_replaced_and_without_interventions(
    model: Any, tokens: Tensor, make_sae: MakeSAE
) -> None:
    sae = make_sae()
    f = sae.encode(model.run_with_cache(tokens)[1][HOOK])
    expected = f[tokens > 1].mean(0)
    with saeopt.splice(model, {HOOK: sae}, use_error_term=True) as spliced:
        spliced.ablate(HOOK, [0, 1])
        close(spliced.means(tokens)[HOOK], expected)
        close(spliced.means([tokens[:1], tokens[1:]])[HOOK], expected)
        by_means = spliced.clear().ablate(HOOK, [3, 8], to=spliced.means(tokens)[HOOK]).model(tokens)
        close(by_means, spliced.clear().set(HOOK, [3, 8], expected[[3, 8]]).model(tokens))
        with pytest.raises(saeopt.UserError, match="no position of these tokens counts"):
            spliced.means(torch.zeros(1, 3, dtype=torch.long))


def test_an_sae_that_left_and_came_back_knows_where_it_belongs(
    tmp_path: Path, tiny_model_dir: Path, tokens: Tensor
) -> None:
    model: Any = TransformerBridge.boot_transformers(str(tiny_model_dir), dtype=torch.float32)
    site = saeopt.Site((MLP["read"],), (MLP["write"],), "mlp1")
    coder = build("relu", {}, d=16, h=24, dtype=torch.float32, widths=Widths((16,), (16,), False)).requires_grad_(False)
    sae = build("jumprelu", {}, d=16, h=24, dtype=torch.float32).requires_grad_(False)
    for own, place, to in ((sae, HOOK, "sae-lens"), (coder, site, "sae-lens"), (sae, HOOK, "safetensors")):
        key = place if isinstance(place, str) else place.key
        folder = saeopt.export(own, to=to, folder=tmp_path / f"{to}-{key}", site=place)
        with saeopt.splice(model, {key: own if isinstance(place, str) else (place, own)}):
            expected = model(tokens)
        loaded = saeopt.load(folder)
        with saeopt.splice(model, loaded) as spliced:
            close(model(tokens), expected)
            assert list(spliced.latents) == list(loaded)
        with saeopt.splice(model, saeopt.load_sae(folder)):
            close(model(tokens), expected)
