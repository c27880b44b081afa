"""Hook points, positions and special tokens; nothing stays behind; what cannot be is refused in one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint
from transformer_lens.HookedRootModule import HookedRootModule
from transformer_lens.model_bridge import TransformerBridge

import saeopt
from saeopt import UserError
from saeopt.config import validate_run
from saeopt.saes.base import SAE, Widths
from saeopt.saes.origin import Origin

HOOK, FIRST = "blocks.1.hook_resid_pre", "blocks.0.hook_resid_pre"
MakeSAE = Callable[..., SAE]


def test_users_hooks_work_at_the_names_of_sae_lens(model: Any, tokens: Tensor, make_sae: MakeSAE) -> None:
    sae = make_sae()
    with saeopt.splice(model, {HOOK: sae}) as spliced:
        cache = model.run_with_cache(tokens, names_filter=lambda name: "hook_sae" in name)[1]
        short = {name.removeprefix(HOOK + ".") for name in cache if name.startswith(HOOK)}
        assert short == {f"hook_sae_{n}" for n in ("input", "acts_pre", "acts_post", "recons", "output")}
        acts_BTh = cache[HOOK + ".hook_sae_acts_post"]
        assert torch.equal(acts_BTh, cache["blocks.1.hook_in.hook_sae_acts_post"])  # as sae-lens' bridge calls it
        torch.testing.assert_close(cache[HOOK + ".hook_sae_recons"], sae.decode(acts_BTh))
        assert torch.equal(acts_BTh, cache[HOOK + ".hook_sae_acts_pre"].relu())

        def no_third(acts: Tensor, hook: HookPoint) -> Tensor:
            assert hook.name == HOOK + ".hook_sae_acts_post"
            return acts.index_fill(-1, torch.tensor([2]), 0.0)

        by_hook = model.run_with_hooks(tokens, fwd_hooks=[(HOOK + ".hook_sae_acts_post", no_third)])
        assert not spliced.latents[HOOK][..., 2].any()
        assert torch.equal(spliced.ablate(HOOK, 2).model(tokens), by_hook)
        spliced.clear()
        opened = model.run_with_hooks(tokens, fwd_hooks=[(HOOK + ".hook_sae_acts_pre", lambda x, hook: x + 1.0)])
        raised = sae.requires_grad_(False)
        raised.b_enc += 1.0
        torch.testing.assert_close(model(tokens), opened)
    with saeopt.splice(model, {HOOK: sae}, use_error_term=True):
        name = HOOK + ".hook_sae_error"
        without = model.run_with_hooks(tokens, fwd_hooks=[(name, lambda x, hook: torch.zeros_like(x))])
        error_BTd = model.run_with_cache(tokens)[1][name]
        assert not error_BTd[tokens <= 1].any()
        assert error_BTd[tokens > 1].any(-1).all()
    with saeopt.splice(model, {HOOK: sae}):
        torch.testing.assert_close(model(tokens), without)


def test_hooks_of_users_come_before_and_after_by_when_they_were_added(
    model: Any, tokens: Tensor, make_sae: MakeSAE
) -> None:
    sae, seen = make_sae(), {}

    def look(name: str) -> Callable[..., None]:
        return lambda x, hook: seen.update({name: x.detach().clone()})

    model.hook_dict[HOOK].add_hook(look("before"))
    with saeopt.splice(model, {HOOK: sae}, exclude_special_tokens=False):
        model.run_with_hooks(tokens, fwd_hooks=[(HOOK, look("after"))])
        model.reset_hooks()  # a user's own hooks, and not the splice
        assert not model.hook_dict[HOOK].has_hooks(including_permanent=False)
        torch.testing.assert_close(seen["after"], sae(seen["before"]))
        cache = model.run_with_cache(tokens)[1]
        torch.testing.assert_close(cache[HOOK], seen["after"])


def test_nothing_stays_behind_after_an_error(model: Any, tokens: Tensor, make_sae: MakeSAE) -> None:
    plain, sae = model(tokens), make_sae()
    with pytest.raises(ZeroDivisionError), saeopt.splice(model, {HOOK: sae}):
        raise ZeroDivisionError
    with pytest.raises(KeyboardInterrupt), saeopt.splice(model, {HOOK: sae}):
        raise KeyboardInterrupt
    with saeopt.splice(model, {"blocks.0.attn.hook_result": make_sae(d=32)}):
        assert model.cfg.use_attn_result
        model(tokens)
    assert not model.cfg.use_attn_result
    with pytest.raises(ValueError, match="mine"), saeopt.splice(model, {"blocks.0.attn.hook_result": make_sae(d=32)}):
        raise ValueError("mine")
    assert not model.cfg.use_attn_result
    with pytest.raises(UserError, match=r"no hook point 'blocks\.9"):
        saeopt.splice(model, {HOOK: sae, "blocks.9.hook_resid_pre": sae}).__enter__()
    narrow = saeopt.splice(model, {HOOK: make_sae(d=12)})
    with pytest.raises(UserError, match="reads 12 numbers per token, and this model gives 16"), narrow:
        model(tokens)
    assert torch.equal(model(tokens), plain)
    assert "before_activation" not in vars(sae)


def test_splices_are_nested(model: Any, tokens: Tensor, make_sae: MakeSAE) -> None:
    one, two = make_sae(), make_sae("topk", h=31)
    with saeopt.splice(model, {HOOK: one}, exclude_special_tokens=False) as outer:
        alone = model(tokens)
        with saeopt.splice(model, {HOOK: two}, exclude_special_tokens=False) as inner:
            model(tokens)
            reconstructed = one.decode(outer.latents[HOOK])
            torch.testing.assert_close(inner.latents[HOOK], two.encode(reconstructed))
            shown = model.run_with_cache(tokens)[1][HOOK + ".hook_sae_acts_post"]
            assert shown.shape[-1] == 31
        assert torch.equal(model(tokens), alone)
        assert model.run_with_cache(tokens)[1][HOOK + ".hook_sae_acts_post"].shape[-1] == 24


@pytest.mark.parametrize(
    ("positions", "wanted"),
    [
        ("all", range(9)), ("last", [8]), (3, [3]), (-2, [7]), (slice(2, 5), [2, 3, 4]), (slice(-3, None), [6, 7, 8]),
        ([0, 5, -1], [0, 5, 8]), ((), []),
    ],
)  # fmt: skip
def test_positions_are_chosen(model: Any, tokens: Tensor, make_sae: MakeSAE, positions: Any, wanted: list[int]) -> None:
    expected = torch.zeros(3, 9, dtype=torch.bool)
    expected[:, list(wanted)] = True
    sae = make_sae()
    with saeopt.splice(model, {HOOK: sae}, positions=positions, exclude_special_tokens=False) as spliced:
        model(tokens)
        assert torch.equal(spliced._places[HOOK].replaced_BT, expected)
    with saeopt.splice(model, {HOOK: sae}, positions=expected, exclude_special_tokens=False):
        by_mask = model(tokens)
    with saeopt.splice(model, {HOOK: sae}, exclude_special_tokens=False, use_error_term=True) as spliced:
        model(tokens)
        before_BTh = spliced.latents[HOOK]
        spliced.set(HOOK, 4, 9.0, positions=positions).model(tokens)
        assert torch.equal(spliced.latents[HOOK][..., 4] == 9.0, expected)
        assert torch.equal(spliced.latents[HOOK][~expected], before_BTh[~expected])
    with saeopt.splice(model, {HOOK: sae}, positions=positions, exclude_special_tokens=False):
        assert torch.equal(model(tokens), by_mask)


def test_special_tokens_keep_their_activations_unless_told_otherwise(
    model: Any, tokens: Tensor, make_sae: MakeSAE
) -> None:
    sae = make_sae()
    for given, special in ((True, (0, 1)), (False, ()), ([5, int(tokens[2, 3])], (5, int(tokens[2, 3])))):
        with saeopt.splice(model, {HOOK: sae}, exclude_special_tokens=given) as spliced:
            model(tokens)
            expected = ~torch.isin(tokens, torch.tensor(special, dtype=torch.long))
            assert torch.equal(spliced._places[HOOK].replaced_BT, expected)
    embedded = model.run_with_cache(tokens)[1]["hook_embed"]
    with saeopt.splice(model, {HOOK: sae}, exclude_special_tokens=False):
        expected = model(tokens)
        torch.testing.assert_close(model(embedded), expected)
    with pytest.raises(UserError, match="given no tokens"), saeopt.splice(model, {HOOK: sae}):
        model(embedded)


def test_generated_text_is_steered_alike_with_and_without_a_cache(
    model: Any, tokens: Tensor, make_sae: MakeSAE, tiny_model_dir: Path
) -> None:
    sae = make_sae()
    data = {"dataset_name": "none", "context_length": 16, "skip_first_positions": 2}
    raw = {"tlens_model_path": str(tiny_model_dir), "data": data, "saes": {"sae_type": "relu", "sae_positions": HOOK}}
    sae.origin = Origin(saeopt.Site.of(HOOK), validate_run(raw, "test"))

    def generated(**options: Any) -> Tensor:
        return model.generate(
            tokens[:1], max_new_tokens=12, do_sample=False, verbose=False, stop_at_eos=False, **options
        )

    plain = generated()
    with saeopt.splice(model, sae, use_error_term=True) as spliced:
        assert torch.equal(generated(), plain)
        found = {}
        for name, positions in (("late", slice(11, None)), ("here", 3), ("all", "all")):
            spliced.clear().steer(HOOK, [2, 5], 12.0, positions=positions)
            found[name] = generated(use_past_kv_cache=True)
            assert torch.equal(found[name], generated(use_past_kv_cache=False)), name
    assert torch.equal(found["late"][:, :12], plain[:, :12])
    assert not any(torch.equal(text, plain) for text in found.values())
    with saeopt.splice(model, sae) as spliced:
        model(tokens)
        assert not spliced._places[HOOK].replaced_BT[:, :2].any()
        generated()
        assert spliced._places[HOOK].replaced_BT.shape == (1, 1)  # the newest token
        assert spliced._places[HOOK].replaced_BT.all()


class Toy(HookedRootModule):
    """What TransformerLens gives its own models: hook points, and no Hugging Face model below."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embed = nn.Embedding(64, 16)
        self.embed.weight.data = torch.randn(64, 16, generator=generator)
        self.hook_mid = HookPoint()
        self.setup()

    def forward(self, tokens: Tensor) -> Tensor:
        return self.hook_mid(self.embed(tokens)) @ self.embed.weight.T


def test_a_hooked_root_module_is_spliced_too(tokens: Tensor, make_sae: MakeSAE) -> None:
    toy, sae = Toy(), make_sae().float()
    x_BTd = toy.embed(tokens)
    with pytest.raises(UserError, match=r"exclude_special_tokens=\[…\], or exclude_special_tokens=False"):
        saeopt.splice(toy, {"hook_mid": sae}).__enter__()
    expected = torch.where((tokens == 0).unsqueeze(-1), x_BTd, sae(x_BTd)) @ toy.embed.weight.T
    with saeopt.splice(toy, {"hook_mid": sae}, exclude_special_tokens=[0]) as spliced:
        torch.testing.assert_close(toy(tokens), expected)
        logits, cache = toy.run_with_cache(tokens)
        torch.testing.assert_close(logits, expected)
        assert torch.equal(cache["hook_mid.hook_sae_acts_post"], spliced.latents["hook_mid"])
        name = "hook_mid.hook_sae_acts_post"
        zeroed = toy.run_with_hooks(tokens, fwd_hooks=[(name, lambda acts, hook: torch.zeros_like(acts))])
        torch.testing.assert_close(spliced.ablate("hook_mid", range(24)).model(tokens), zeroed)
    assert set(toy.hook_dict) == {"hook_mid"}
    assert not toy.hook_mid.fwd_hooks
    assert torch.equal(toy(tokens), x_BTd @ toy.embed.weight.T)


def test_what_cannot_be_is_one_line(model: Any, tokens: Tensor, make_sae: MakeSAE) -> None:
    sae = make_sae()
    two, crossed = Widths((16,), (16,), False), Widths((16, 16), (16, 16), True)
    cross_site = saeopt.Site((FIRST, HOOK), (FIRST, HOOK), "cross")
    late = saeopt.Site((HOOK,), (FIRST,), "late")
    coder = make_sae(widths=two)
    for saes, message in (
        ({}, "no SAE was given"),
        ("out/run", r"'out/run' is no SAE: saeopt.load\(FOLDER\)"),
        (Path("out/run"), "'out/run' is no SAE"),
        ({HOOK: "out/run"}, "'out/run' is no SAE"),
        (sae, "does not know its hook point"),
        ({"model.layers.1": sae}, "no hook point 'model.layers.1'; that is 'blocks.1.hook_resid_post' here"),
        ({"mlp": coder}, "what 'mlp' reads and writes is not known"),
        ({"cross": (cross_site, make_sae(d=32, widths=crossed))}, "'cross' writes 2 hook points, and a splice writes"),
        ({HOOK: sae, "blocks.1.hook_in": sae}, "'blocks.1.hook_resid_pre' and 'blocks.1.hook_in' write the same hook"),
    ):
        with pytest.raises(UserError, match=message), saeopt.splice(model, saes):
            pass
    message = f"'late' reads '{HOOK}', and the model comes to '{FIRST}'"
    with pytest.raises(UserError, match=message), saeopt.splice(model, {"late": (late, coder)}):
        model(tokens)
    with pytest.raises(UserError, match="a Linear has no hook points"), saeopt.splice(nn.Linear(2, 2), {HOOK: sae}):
        pass
    with pytest.raises(UserError, match="positions: 'first' must be all, last"):
        saeopt.splice(model, {HOOK: sae}, positions="first").__enter__()
    with saeopt.splice(model, {HOOK: sae}) as spliced:
        for call, message in (
            (lambda: spliced.latents[HOOK], "no forward pass has come there"),
            (lambda: spliced.steer("x", 1, 1.0), "no SAE is spliced in at 'x': 'site' must be one of"),
            (lambda: spliced.steer(HOOK, 24, 1.0), "latents: there is no 24; this SAE has 0 to 23"),
            (lambda: spliced.ablate(HOOK, [1, 1]), "one stands twice"),
            (lambda: spliced.ablate(HOOK, [0.5]), "give whole numbers"),
            (lambda: spliced.set(HOOK, [1, 2], torch.ones(3)), "do not fit 2 latents"),
            (lambda: spliced.steer(HOOK, 1, "much"), "strength: 'much' is no number"),
            (lambda: spliced.set(HOOK, 1, float("nan")), "value: must be finite"),
            (lambda: spliced.steer(HOOK, 1, 1.0, positions="frist"), "positions: 'frist' must be"),
            (lambda: spliced.steer(HOOK, 1, 1.0, positions=torch.ones(9)), "must be bool"),
            (lambda: spliced.steer(HOOK, 1, 1.0, positions=99).model(tokens), "99 is beyond the 9 positions"),
            (
                lambda: spliced.steer(HOOK, 1, 1.0, positions=torch.ones(2, 4, dtype=torch.bool)).model(tokens),
                "not fit",
            ),
        ):
            with pytest.raises(UserError, match=message):
                call()
            spliced.clear()
        sae.W_dec[3] = 0.0
        with pytest.raises(UserError, match="3 has no direction"):
            spliced.steer(HOOK, 3, 1.0)


def test_an_sae_of_a_model_that_was_processed_otherwise_is_refused(tiny_model_dir: Path, make_sae: MakeSAE) -> None:
    sae, other = make_sae(), make_sae()
    raw = {
        "tlens_model_path": str(tiny_model_dir), "data": {"dataset_name": "none"},
        "saes": {"sae_type": "relu", "sae_positions": HOOK},
    }  # fmt: skip
    for one, processing in ((sae, "raw"), (other, "compatibility")):
        one.origin = Origin(saeopt.Site.of(HOOK), validate_run({**raw, "lm_processing": processing}, "test"))
    model: Any = TransformerBridge.boot_transformers(str(tiny_model_dir), dtype=torch.float64)
    with saeopt.splice(model, [sae]):
        pass
    with pytest.raises(UserError, match="'lm_processing: compatibility', and this model is not: call enable_comp"):
        saeopt.splice(model, [other]).__enter__()
    model.enable_compatibility_mode(disable_warnings=True)
    with saeopt.splice(model, [other]):
        pass
    with pytest.raises(UserError, match="'lm_processing: raw', and this model is processed"):
        saeopt.splice(model, [sae]).__enter__()
