"""What every architecture promises. Source of the form: Optuna's inheritable tests of its storages."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from saeopt.config.machine import PerformanceConfig
from saeopt.saes.base import SAE, Widths
from saeopt.saes.registry import get_sae
from saeopt.testing.cases import (
    OPTIONS,
    D,
    activations,
    build,
    examples,
    gradients,
    joined,
    loss,
    normalise_awkwardly,
    row,
    step_inputs,
)
from saeopt.testing.oracle import train_plainly
from saeopt.training.step.choose import make_stack, reference_stack
from saeopt.training.step.contract import EXTRA
from saeopt.training.step.stack import Stack
from saeopt.training.step.tally import join


class ArchitectureContract:
    """Inherit and name the architecture; `fields` are config fields that are not to have their defaults."""

    sae_type: ClassVar[str] = ""
    fields: ClassVar[Mapping[str, Any]] = {}

    def sae(self, seed: int = 0, **settings: Any) -> SAE:
        """An SAE with awkward weights and a scale that is not 1."""
        sae = build(self.sae_type, self.fields, seed=seed, **settings)
        sae.scale.fill_(0.4)
        return sae

    def stack(self, seeds: list[int], *, fast: bool = True) -> Stack:
        """Members of different weights; the fastest step that there is, or the reference."""
        saes = [self.sae(seed) for seed in seeds]
        return make_stack(saes, seeds, OPTIONS, PerformanceConfig()) if fast else reference_stack(saes, seeds, OPTIONS)

    # ---- the module
    def test_saved_loaded_and_folded_it_encodes_and_decodes_alike(self, tmp_path: Path) -> None:
        sae, x_Nd = self.sae(), 30 * activations()
        sae.training_forward(x_Nd * sae.scale, x_Nd * sae.scale, step_inputs(sae, beta=0.2))  # leaves its traces
        sae.tokens_since_fired.copy_(torch.arange(sae.h))
        save_file({name: t.contiguous() for name, t in sae.state_dict().items()}, tmp_path / "sae.safetensors")
        loaded = type(sae)(sae.d, sae.h, sae.config, dtype=torch.float64)
        loaded.load_state_dict(load_file(tmp_path / "sae.safetensors"))
        assert torch.equal(loaded.tokens_since_fired, torch.arange(sae.h))
        code, x_hat = sae.encode(x_Nd), sae(x_Nd)
        assert torch.equal(loaded.encode(x_Nd), code)
        assert torch.equal(loaded(x_Nd), x_hat)
        before = copy.deepcopy(loaded.state_dict())
        folded = loaded.folded()
        assert folded.scale.item() == 1
        for form in (folded, folded.folded()):
            torch.testing.assert_close(form.encode(x_Nd), code)
            torch.testing.assert_close(form.decode(code), x_hat)
            torch.testing.assert_close(form(x_Nd), x_hat)
        assert all(torch.equal(tensor, before[name]) for name, tensor in loaded.state_dict().items())

    def test_encode_and_decode_take_and_give_raw_activations(self) -> None:
        sae, x_Nd = self.sae(), 30 * activations()
        assert torch.equal(sae.encode(x_Nd), sae.code(sae.normalised(x_Nd)))
        assert torch.equal(sae.decode(sae.encode(x_Nd)), sae(x_Nd))
        single = x_Nd.float()
        assert torch.equal(sae(single.view(-1, 5, sae.d)).flatten(0, 1), sae(single.double()))

    def test_every_normalisation_folds_into_the_weights(self) -> None:
        for kind in ("none", "scale", "mean_scale", "whiten"):
            for widths in (None, Widths((D,), (4,), False), Widths((2, 4), (2, 4), True)):
                fields = {**self.fields, "normalize_activations": kind}
                try:
                    sae = build(self.sae_type, fields, widths=widths)
                except TypeError:  # a class that knows no other sites than autoencoders'
                    continue
                normalise_awkwardly(sae)
                x_Nd, folded = 3 * activations() + 2, sae.folded()
                code, x_hat = sae.encode(x_Nd), sae(x_Nd)
                assert code.count_nonzero() > 0
                torch.testing.assert_close(sae.normalised_written(x_hat), sae.reconstruct(code))
                for form in (folded, folded.folded()):
                    torch.testing.assert_close(form.code(x_Nd), code, msg=f"{kind} {widths}: {{}}".format)
                    torch.testing.assert_close(form.encode(x_Nd), code)
                    torch.testing.assert_close(form.reconstruct(code), x_hat)
                    torch.testing.assert_close(form.decode(code), x_hat)

    def test_the_unit_decoder_reconstructs_alike_from_rows_of_norm_1(self) -> None:
        sae, x_Nd = self.sae(), 30 * activations()
        with torch.no_grad():
            sae.W_dec.mul_(torch.linspace(0.5, 3, sae.h).unsqueeze(-1))
        unit = sae.unit_decoder()
        torch.testing.assert_close(unit.W_dec.norm(dim=-1), torch.ones(sae.h).double())
        for form in (unit, unit.unit_decoder()):
            torch.testing.assert_close(form(x_Nd), sae(x_Nd))
            torch.testing.assert_close(form.encode(x_Nd) @ form.W_dec + form.b_dec, sae(x_Nd))
        assert torch.equal(unit.encode(x_Nd) != 0, sae.encode(x_Nd) != 0)

    def test_it_starts_about_as_long_as_its_input(self) -> None:
        sae, x_Nd = self.sae(), activations(400)
        sae.initialise(x_Nd, torch.Generator().manual_seed(0))
        assert all(torch.isfinite(p).all() for p in sae.parameters())
        x_hat_Nd = sae.reconstruct(sae.code(x_Nd))
        assert 0.1 < x_hat_Nd.norm(dim=-1).mean() / x_Nd.norm(dim=-1).mean() < 1.5

    def test_every_field_of_its_config_is_described(self) -> None:
        model = get_sae(self.sae_type).Config
        assert [name for name, field in model.model_fields.items() if not field.description] == []
        assert get_sae(self.sae_type).stack_fields <= {*model.model_fields, *get_sae("relu").stack_fields}

    # ---- the loss
    def test_parameters_are_finite_and_all_get_a_gradient(self) -> None:
        sae, x_Nd = self.sae(), activations()
        for name, gradient in gradients(sae, loss(sae, x_Nd, step_inputs(sae))).items():
            assert torch.isfinite(gradient).all(), name
            assert gradient.norm() > 0, name

    def test_masked_tokens_change_nothing(self) -> None:
        sae, x_Nd = self.sae(), activations()
        keep_N = (torch.arange(len(x_Nd)) % 3 != 0).double()
        kept = keep_N.bool()
        whole, part = step_inputs(sae, keep_N=keep_N), step_inputs(sae)
        if part.u_Nh is not None:
            part.u_Nh = part.u_Nh[kept]
        wild_Nd = torch.where(kept.unsqueeze(-1), x_Nd, 1e3 * x_Nd)
        forward = sae.training_forward(wild_Nd, wild_Nd, whole)
        short = sae.training_forward(x_Nd[kept], x_Nd[kept], part)
        assert forward.f_Nh[~kept].count_nonzero() == 0
        assert forward.terms.keys() == short.terms.keys()
        self._close(forward.terms, short.terms)
        self._close(forward.tallies, short.tallies)
        expected = gradients(sae, loss(sae, x_Nd[kept], part))
        self._close(gradients(sae, loss(sae, wild_Nd, whole)), expected)

    # ---- training
    def test_its_steps_are_those_of_autograd(self) -> None:
        data, plain = examples(12), self.sae(1)
        parts = 1 if plain.selects_over_batch else 2
        train_plainly(plain, data, parts, seed=1)
        for fast in (False, True):
            stack = self.stack([1], fast=fast)
            self._train(stack, data, parts)
            self._close(stack.saes[0].state_dict(), plain.state_dict(), rtol=1e-6, atol=1e-9)

    def test_packed_is_alone(self) -> None:
        data, packed = examples(8), self.stack([1, 2, 3])
        self._train(packed, data, 2)
        for i, seed in enumerate([1, 2, 3]):
            alone = self.stack([seed])
            self._train(alone, data, 2)
            self._close(packed.saes[i].state_dict(), alone.saes[0].state_dict(), rtol=1e-9, atol=1e-12)

    def test_resumed_is_uninterrupted_bit_for_bit(self) -> None:
        data, whole, first, second = examples(8), *(self.stack([1, 2]) for _ in range(3))
        self._train(whole, data, 2)
        self._train(first, data[:4], 2)
        for i, sae in enumerate(first.saes):
            state = {name: t.clone() for name, t in first.state(i).items()}
            weights = {name: t.clone() for name, t in sae.state_dict().items()}
            second.saes[i].load_state_dict(weights)
            second.load_state(i, state)
        self._train(second, data[4:], 2)
        for ours, theirs in zip(second.saes, whole.saes, strict=True):
            assert all(torch.equal(t, theirs.state_dict()[name]) for name, t in ours.state_dict().items())

    def test_ranks_and_micro_batches_are_one(self) -> None:
        """Where a micro-batch selects among its tokens, one of four is not four: then ranks are micro-batches."""
        data, whole, four = examples(12), self.stack([1, 2]), self.stack([1, 2])
        ranks = [self.stack([1, 2]), self.stack([1, 2])]
        for at in range(0, len(data), 4):
            window = data[at : at + 4]
            together = whole.saes[0].selects_over_batch
            self._train(whole, window if together else [joined(window)], 4 if together else 1)
            self._train(four, window, 4)
            for rank, own in zip(ranks, (window[:1], window[1:]), strict=True):
                for example in own:
                    rank.accumulate(example, [row(sae) for sae in rank.saes])
            self._reduce(ranks)
            for rank in ranks:
                rank.apply([row(sae) for sae in rank.saes])
        for i, sae in enumerate(whole.saes):
            for other in (four, *ranks):
                self._close(other.saes[i].state_dict(), sae.state_dict(), rtol=1e-7, atol=1e-10)
            one, two = (rank.saes[i].state_dict() for rank in ranks)
            assert all(torch.equal(t, two[name]) for name, t in one.items())

    def test_a_window_that_is_not_finite_changes_nothing(self) -> None:
        stack, data = self.stack([1, 2]), examples(3)
        self._train(stack, data[:2], 1)
        before = [self._all_of(stack, i) for i in range(2)]
        data[2].x_Nd[3, 1] = torch.inf
        self._train(stack, data[2:], 1)
        for i, state in enumerate(before):
            after = self._all_of(stack, i)
            assert [n for n, t in state.items() if not torch.equal(t, after[n])] == []

    # ---- pieces
    def _train(self, stack: Stack, data: list[Any], parts: int) -> None:
        rows = [row(sae) for sae in stack.saes]
        for at in range(0, len(data), parts):
            for example in data[at : at + parts]:
                stack.accumulate(example, rows)
            stack.apply(rows)

    def _reduce(self, ranks: list[Stack]) -> None:
        """What NCCL or gloo does."""
        one, other = (rank.partial() for rank in ranks)
        for how, tensors in one.items():
            for left, right in zip(tensors, other[how], strict=True):
                join(left, right, how)
                right.copy_(left)

    def _all_of(self, stack: Stack, member: int) -> dict[str, Tensor]:
        found = {**stack.state(member), **stack.saes[member].state_dict()}
        return {n: t.detach().clone() for n, t in found.items() if not n.startswith((EXTRA, "pending", "finite"))}

    def _close(
        self, found: Mapping[str, Tensor], expected: Mapping[str, Tensor], rtol: float = 1e-9, atol: float = 1e-12
    ) -> None:
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=rtol, atol=atol, msg=f"{name}: {{}}".format)
