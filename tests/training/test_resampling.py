"""Dead latents of relu SAEs get new directions between two windows, the same on every rank and after a resume."""

from __future__ import annotations

import re

import pytest
import torch
from safetensors.torch import save_file
from test_processes import weights

from saeopt.activations.stream import Batch
from saeopt.config import validate_run
from saeopt.saes.registry import ARCHITECTURES
from saeopt.saes.relu import ReluSAE
from saeopt.testing.cases import build
from saeopt.training import TrialPlan, train_pack
from saeopt.training.pack import Member, Pack
from saeopt.training.ranks import Axis
from saeopt.training.resampling import MOST_OPEN, OPENS_AT, is_due, resample
from saeopt.training.runtime import Runtime
from saeopt.training.step.contract import Example, Place

D, H, DEAD = 6, 15, [2, 7, 11]


def config(path, n=128, **fields):
    data = {"context_length": 8, "n_train_samples": n, "n_eval_samples": 10, "train_batch_size": 4}
    saes = {
        "sae_type": "relu", "sae_positions": ["here"], "dict_size_to_input_ratio": 4, "sparsity_coeff": 0.3,
        "resample_every_tokens": 256, "dead_after_tokens": 64,
    }  # fmt: skip
    raw = {"data": {"activations": str(path), **data}, "threads": 1, "lr": 3e-2, "save_every_n_samples": 32}
    return validate_run({**raw, "saes": {**saes, **fields}}, "the test")


def batches():
    generator = torch.Generator().manual_seed(0)
    while True:
        x_Nd = torch.randn(32, D, generator=generator, dtype=torch.float64) * torch.linspace(0.2, 3, D) + 1
        yield Batch({"here": x_Nd}, torch.arange(32) % 7 > 0, 0, 4, 8)


@pytest.mark.parametrize("stack", ["auto", "reference"])
def test_dead_latents_look_at_inputs_and_nothing_else_changes(tmp_path, stack):
    given = config(tmp_path)
    given = given.model_copy(update={"performance": given.performance.model_copy(update={"stack": stack})})
    members = {}
    for name, every in (("plain", 0), ("resampled", 256)):
        own = given.model_copy(update={"saes": given.saes.model_copy(update={"resample_every_tokens": every})})
        sae = build("relu", own.saes.model_dump(exclude={"sae_type", "sae_positions"}))
        sae.b_enc.data[DEAD] = -50.0
        members[name] = Member(name, "here", own, sae)
    pack, stream = (
        Pack(list(members.values()), Runtime("cpu", weights_dtype=torch.float64), total_samples=128),
        batches(),
    )
    for window in range(1, 9):  # 32 tokens each: the eighth passes 256
        pack.step(stream, 4 * window)
    plain, fresh = members["plain"].sae, members["resampled"].sae
    alive = [j for j in range(H) if j not in DEAD]
    for name, tensor in plain.named_parameters():
        ours = fresh.get_parameter(name)
        if name == "b_dec":
            assert torch.equal(ours, tensor)
        else:
            pick = (lambda t: t[:, alive]) if name == "W_enc" else (lambda t: t[alive])
            assert torch.equal(pick(ours), pick(tensor)), name
    assert (plain.b_enc[DEAD] < -40).all()
    assert (fresh.b_enc[DEAD] < 0).all()
    length = plain.W_enc[:, alive].norm(dim=0).mean()
    torch.testing.assert_close(fresh.W_enc[:, DEAD].norm(dim=0), (ReluSAE.restart_share * length).expand(3))
    torch.testing.assert_close(fresh.W_dec[DEAD].norm(dim=-1), torch.ones(3).double())
    torch.testing.assert_close(fresh.W_enc[:, DEAD].T / (ReluSAE.restart_share * length), fresh.W_dec[DEAD])
    assert not fresh.tokens_since_fired[DEAD].any()
    state = pack.state(members["resampled"])
    assert not state["v.W_enc"][:, DEAD].any()
    assert state["v.W_enc"][:, alive].any()
    pack.step(stream, 36)  # the passes have seen the new weights
    assert pack.metrics(36)[1][1]["l0"] != pack.metrics(36)[0][1]["l0"]
    assert (fresh.tokens_since_fired[DEAD] < 32).all()


@pytest.mark.parametrize("sae_type", [*(t for t in ARCHITECTURES if "topk" not in t), "frozen gates"])
def test_a_new_latent_of_every_architecture_fires_on_its_own_input_and_not_on_one_that_is_half_as_like(sae_type):
    fields = {"input_dependent_gates": False} if sae_type == "frozen gates" else {}
    sae = build("hard_concrete" if sae_type == "frozen gates" else sae_type, fields)
    dead_n, alive_h = torch.tensor(DEAD), torch.ones(H).bool()
    alive_h[dead_n] = False
    generator = torch.Generator().manual_seed(1)
    along_nd = torch.linalg.qr(torch.randn(D, len(DEAD), generator=generator, dtype=torch.float64)).Q.T
    with torch.no_grad():
        for name in sae.latent_vectors:
            sae.get_parameter(name)[DEAD] = 0.0
            sae.get_parameter(name)[alive_h] = 0.3
        before = {name: tensor.clone() for name, tensor in sae.named_parameters()}
        sae.restart(dead_n, alive_h, along_nd, torch.full((len(DEAD),), 20.0).double())
        f_nn = sae.code(40 * along_nd + sae.b_dec)[:, DEAD]
        off_nn = sae.code(10 * along_nd + sae.b_dec)[:, DEAD]
    assert (f_nn.diagonal() > 0).all()
    if sae_type != "frozen gates":  # they do not see their input
        assert not off_nn.any()
        assert not (f_nn - f_nn.diag().diag()).any()
    for name, tensor in sae.named_parameters():
        if name != "b_dec":
            pick = (lambda t: t[..., alive_h]) if name in ("W_enc", "W_gate") else (lambda t: t[alive_h])
            assert torch.equal(pick(tensor), pick(before[name])), name


def test_it_is_due_where_a_multiple_is_passed_and_not_at_the_end():
    due = [n for n in range(1, 101) if is_due(30, n - 1, n, total=100, tokens_per_sample=2)]
    assert due == [15, 30, 45, 60, 75]
    assert not any(is_due(0, n - 1, n, 100, 2) for n in range(1, 101))


def test_few_new_latents_open_on_one_input_and_who_was_silent_for_longest_comes_first(tmp_path):
    generator = torch.Generator().manual_seed(2)
    sae = build("relu")
    x_Nd = torch.randn(64, D, generator=generator, dtype=torch.float64) * torch.tensor([40.0, 1, 1, 1, 1, 1])
    keep_N = torch.arange(64) > 3
    example = Example(x_Nd, x_Nd, keep_N, Place(0, 8, 8))
    pack = Pack([Member("a", "here", config(tmp_path), sae)], Runtime("cpu"), total_samples=128)
    sae.tokens_since_fired.copy_(torch.arange(H) + 1000)  # all are dead
    n = resample(sae, pack.groups[0].stack.state(0), example, 64, (0, "here", 4), Axis(0, 1))
    assert MOST_OPEN <= n < H
    assert (sae.tokens_since_fired[-n:] == 0).all()
    assert (sae.tokens_since_fired[:-n] >= 1000).all()
    centred_Nd = sae.centred(x_Nd * sae.read_scale)[keep_N]
    new_nd = sae.W_dec[-n:].detach()
    along_Nn = centred_Nd @ new_nd.T
    own_n = torch.where((along_Nn / centred_Nd.norm(dim=-1, keepdim=True)) > 1 - 1e-9, along_Nn, -torch.inf).amax(0)
    open_N = (along_Nn > OPENS_AT * own_n).sum(-1)
    assert open_N.max() == MOST_OPEN


def test_all_ranks_take_the_first_ones_inputs(tmp_path):
    kept = []

    class Sent(Axis):
        def broadcast(self, tensors):
            if self.rank == 0:
                kept[:] = [t.clone() for t in tensors]
            for tensor, first in zip(tensors, kept, strict=True):
                tensor.copy_(first)

    found, stream = [], batches()
    for rank in range(2):
        sae = build("relu")
        sae.tokens_since_fired[DEAD] = 100
        pack = Pack([Member("a", "here", config(tmp_path), sae)], Runtime("cpu"), total_samples=128)
        group = pack.groups[0]
        example = group.example(next(stream), {})
        assert resample(sae, group.stack.state(0), example, 64, (0, "here", 4), Sent(rank, 2)) == 3
        found.append(sae.state_dict())
    assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())


def test_a_run_that_is_cut_goes_on_to_the_same_bits(tmp_path, caplog):
    x_Nd = torch.randn(2000, D, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.2, 3, D) + 1
    save_file({"x": x_Nd}, tmp_path / "x.safetensors")
    given = config(tmp_path / "x.safetensors", sparsity_coeff=30.0, dead_after_tokens=8)
    with caplog.at_level("INFO", logger="saeopt"):
        train_pack([TrialPlan("a", given, tmp_path / "whole")], Runtime("cpu"))
    counts = [int(found[1]) for m in caplog.messages if (found := re.search(r"(\d+) dead latents .* resampled", m))]
    assert counts
    assert all(counts)  # nothing is said where nothing was dead
    train_pack([TrialPlan("a", given, tmp_path / "cut")], Runtime("cpu"))
    for path in (*(tmp_path / "cut").rglob("*128*"), *(tmp_path / "cut").rglob("*96*")):
        path.unlink()
    (tmp_path / "cut" / "evaluation.json").unlink()
    train_pack([TrialPlan("a", given, tmp_path / "cut", resume=True)], Runtime("cpu"))
    whole, cut = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
