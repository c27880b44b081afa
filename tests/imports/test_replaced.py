"""Checkpoints of SAE-Interpretability: its modules, written out here, saved as it saves them, and read."""

import pickle
import shutil

import pytest
import torch
import yaml
from torch import nn
from torch.nn.functional import linear, normalize

import saeopt
from saeopt.errors import UserError

D, H, HOOK = 8, 20, "blocks.2.hook_resid_pre"


def activations():
    generator = torch.Generator().manual_seed(1)
    return 5 * torch.randn(D, generator=generator) + torch.randn(50, D, generator=generator)


def randomised(module):
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(0.4 * torch.randn(p.shape, generator=generator))
    return module


class Relu(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Sequential(nn.Linear(D, H), nn.ReLU()), nn.Linear(H, D)

    def forward(self, x):
        code = self.encoder(x)
        return code, linear(code, normalize(self.decoder.weight, dim=0), self.decoder.bias)


class HardConcrete(nn.Module):
    def __init__(self, dependent):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(D, 2 * H if dependent else H), nn.Linear(H, D)
        if not dependent:
            self.gate_logits = nn.Parameter(torch.zeros(H))
        self.register_buffer("beta", torch.tensor(0.3))

    def forward(self, x):
        out = self.encoder(x)
        logits, magnitude = out.chunk(2, dim=-1) if len(out.mT) == 2 * H else (self.gate_logits, out)
        code = (torch.sigmoid(logits) * 1.2 - 0.1).clamp(0, 1) * magnitude
        return code, linear(code, normalize(self.decoder.weight, dim=0), self.decoder.bias)


class Gated(nn.Module):
    def __init__(self, noisy):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(D, H, bias=False), nn.Linear(H, D, bias=False)
        self.decoder_bias = nn.Parameter(torch.zeros(D))
        self.r_mag, self.mag_bias, self.gate_bias = (nn.Parameter(torch.zeros(H)) for _ in range(3))
        if noisy:
            self.register_buffer("beta", torch.tensor(0.3))

    def forward(self, x):
        shared = self.encoder(x - self.decoder_bias)
        logits, magnitude = shared + self.gate_bias, torch.relu(self.r_mag.exp() * shared + self.mag_bias)
        gate = (torch.sigmoid(logits) * 1.2 - 0.1).clamp(0, 1) if hasattr(self, "beta") else (logits > 0).float()
        return gate * magnitude, self.decoder(gate * magnitude) + self.decoder_bias


class TopK(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(D, H, bias=False), nn.Linear(H, D, bias=False)
        self.decoder_bias = nn.Parameter(torch.zeros(D))

    def forward(self, x):
        acts = torch.relu(self.encoder(x - self.decoder_bias))
        code = acts * (acts >= acts.topk(4).values[:, -1:])
        return code, linear(code, normalize(self.decoder.weight, dim=0), self.decoder_bias)


CASES = {
    "relu": (Relu, {}),
    "gated": (lambda: Gated(False), {"magnitude_activation": "relu"}),
    "hard_concrete": (lambda: HardConcrete(True), {"input_dependent_gates": True}),
    "hard_concrete-fixed": (lambda: HardConcrete(False), {"input_dependent_gates": False}),
    "gated_hard_concrete": (lambda: Gated(True), {"initial_beta": 0.5}),
    "topk": (TopK, {"k": 4, "aux_k": None}),
}


def saved(folder, name, samples=400):
    """A run folder of that system with two hook points, and its module at the first."""
    make, fields = CASES[name]
    module, other = randomised(make()), make()
    saes = nn.ModuleDict({HOOK.replace(".", "-"): module, "blocks-4-hook_resid_pre": other})
    folder.mkdir(exist_ok=True)
    torch.save(saes.state_dict(), folder / f"samples_{samples}.pt")
    positions = [HOOK, "blocks.4.hook_resid_pre"]
    section = {"sae_type": name.split("-")[0], "sae_positions": positions, "dict_size_to_input_ratio": 2.5, **fields}
    (folder / "final_config.yaml").write_text(yaml.safe_dump({"seed": 42, "lr": 1e-3, "saes": section}))
    return module


@pytest.mark.parametrize("name", CASES)
def test_code_and_reconstruction_are_that_systems(tmp_path, name):
    module, x_Nd = saved(tmp_path, name), activations()
    saes = saeopt.load(tmp_path)
    assert list(saes) == [HOOK, "blocks.4.hook_resid_pre"]
    assert saes[HOOK].config.sae_type == name.split("-")[0]
    code, given = module(x_Nd)
    assert (code != 0).any()
    torch.testing.assert_close(saes[HOOK].encode(x_Nd), code, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(saes[HOOK](x_Nd), given, rtol=1e-5, atol=1e-5)


def test_the_newest_checkpoint_or_the_file_that_is_named(tmp_path):
    old, new = saved(tmp_path, "relu", 100), saved(tmp_path, "topk", 900)
    x_Nd = activations()
    torch.testing.assert_close(saeopt.load(tmp_path)[HOOK].encode(x_Nd), new(x_Nd)[0])
    saved(tmp_path, "relu", 50)  # the config is relu's again
    torch.testing.assert_close(saeopt.load(tmp_path / "samples_100.pt")[HOOK].encode(x_Nd), old(x_Nd)[0])


class Harmful:
    """What its pickle runs when it is loaded leaves a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (shutil.copyfile, (__file__, str(self.path)))


def test_code_in_a_pickle_is_not_run(tmp_path):
    saved(tmp_path, "relu")
    path = tmp_path / "samples_400.pt"
    torch.save({"blocks-2-hook_resid_pre.x": Harmful(tmp_path / "ran")}, path)
    with pytest.raises(UserError, match=r"samples_400\.pt: holds pickled objects besides tensors"):
        saeopt.load(tmp_path)
    path.write_bytes(pickle.dumps(Harmful(tmp_path / "ran")))
    with pytest.raises(UserError, match=r"samples_400\.pt: "):
        saeopt.load(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_what_cannot_be_read_says_why(tmp_path):
    saved(tmp_path, "gated")
    config = tmp_path / "final_config.yaml"
    config.write_text(config.read_text().replace("sae_type: gated", "sae_type: lagrangian"))
    with pytest.raises(UserError, match=r"final_config\.yaml: 'saes\.sae_type': 'lagrangian' is not known"):
        saeopt.load(tmp_path)
    config.unlink()
    with pytest.raises(UserError, match=r"samples_400\.pt: no final_config\.yaml with a saes section"):
        saeopt.load(tmp_path)
    saved(tmp_path, "topk")
    config.write_text(config.read_text().replace("  k: 4\n", ""))
    with pytest.raises(UserError, match=r"needs 'saes\.k'"):
        saeopt.load(tmp_path)
    path = tmp_path / "samples_400.pt"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"samples_400\.pt: truncated or damaged"):
        saeopt.load(tmp_path)
