"""The same weights through the classes of sae-lens and dictionary_learning: codes, reconstructions, losses, gradients.

Their environments come from `scripts/interop_envs.sh`; without them these tests are skipped.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from saeopt.saes.base import SAE, StepInputs
from saeopt.testing.cases import activations, build, gradients, loss

D, H, N, K, WIDTHS, BANDWIDTH = 6, 24, 40, 3, [4, 12, 24], 0.75
ROOT = Path(__file__).parents[2]
CASES: dict[str, dict[str, Any]] = {
    "batch_topk": {"sae_type": "batch_topk", "k": K, "aux_k": D // 2},
    "matryoshka": {"sae_type": "matryoshka_batch_topk", "k": K, "prefixes": WIDTHS, "aux_k": D // 2},
    "jumprelu-step": {"sae_type": "jumprelu", "decoder_norm": "free"},
    "jumprelu-tanh": {"sae_type": "jumprelu", "penalty": "tanh", "pre_activation_coeff": 0.2, "decoder_norm": "free"},
    "jumprelu-quadratic": {"sae_type": "jumprelu", "penalty": "quadratic", "l0_penalty_target": 5.0},
}


def ours(case: str) -> SAE:
    """The SAE of a case: always the same weights, θ = 0.5."""
    fields = dict(CASES[case])
    sae, weights = (build(f.pop("sae_type"), f, d=D, h=H) for f in (fields, dict(CASES["batch_topk"])))
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            parameter.copy_(torch.tensor(0.5) if name == "threshold" else weights.get_parameter(name))
        if "quadratic" in case:  # theirs neither subtracts b_dec nor waits a window for its L0
            sae.b_dec.zero_()
            sae.get_buffer("last_l0").copy_((sae.code(activations(N, D)) != 0).sum() / N)
    return sae


def never_selected() -> Tensor:
    """Latents that no token selects though one has π > 0: they can be dead and have something to learn."""
    sae, x_Nd = ours("batch_topk"), activations(N, D)
    code = sae.training_forward(x_Nd, StepInputs(0.0)).f_Nh
    dead_h = (code == 0).all(0) & (sae.pre_activation(x_Nd) > 0).any(0)
    assert dead_h.any()
    return dead_h


@pytest.fixture(scope="module", params=["sae-lens", "dictionary-learning"])
def peer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    """What a library makes of our weights."""
    python = Path(os.environ.get("INTEROP_DIR", ROOT / ".interop")) / request.param / "bin" / "python"
    if not python.exists():
        pytest.skip(f"{python} is missing: scripts/interop_envs.sh makes it")
    folder = tmp_path_factory.mktemp("peer")
    sae = ours("batch_topk")
    given = {
        **{name: p.detach().clone() for name, p in sae.named_parameters()},
        "x": activations(N, D), "dead": never_selected(), "threshold": torch.full((H,), 0.5), "batch_threshold": 0.9,
        "k": K, "widths": WIDTHS, "bandwidth": BANDWIDTH, "sparsity_coeff": 0.3, "aux_coeff": 1 / 32,
        "pre_activation_coeff": 0.2, "l0_penalty_target": 5.0,
    }  # fmt: skip
    torch.save(given, folder / "given.pt")
    worker = [str(python), str(Path(__file__).with_name("peer_worker.py")), request.param]
    quiet = {**os.environ, "WANDB_MODE": "disabled", "HF_HUB_OFFLINE": "1"}
    quiet.pop("PYTHONPATH", None)
    done = subprocess.run(
        [*worker, folder / "given.pt", folder / "found.pt"], env=quiet, text=True, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    return request.param, torch.load(folder / "found.pt")


def close(found: Tensor, expected: Tensor, what: str = "") -> None:
    torch.testing.assert_close(found.double(), expected.double(), rtol=1e-5, atol=1e-5, msg=f"{what} {{}}".format)


@pytest.mark.parametrize("case", CASES)
def test_training_is_theirs(peer: tuple[str, dict[str, Any]], case: str) -> None:
    library, found = peer
    if case not in found:
        pytest.skip(f"{library} defines another loss")
    sae, theirs, x_Nd = ours(case), found[case], activations(N, D)
    # sae-lens' auxiliary loss for dead latents has no denominator: only the other library's is the paper's
    dead_h = never_selected() if library == "dictionary-learning" or "jumprelu" in case else None
    inputs = StepInputs(0.3, dead_h=dead_h, numbers={"bandwidth": BANDWIDTH})
    forward = sae.training_forward(x_Nd, inputs)
    close(forward.f_Nh, theirs["code"], "code")
    close(sae.decode(theirs["code"]), theirs["decoded"], "decoded")
    value = loss(sae, x_Nd, inputs)
    close(value, theirs["loss"], "loss")
    own = gradients(sae, value)
    assert theirs["gradients"].keys() >= {"W_enc", "W_dec", "b_enc"}
    for name, gradient in theirs["gradients"].items():
        assert gradient.norm() > 0, name
        close(own[name], gradient, name)
    if "evaluated" in theirs:
        sae.after_window(forward.tallies, torch.tensor(float(N)))
        close(sae.threshold, theirs["threshold"].expand_as(sae.threshold), "threshold")
        close(sae.encode(x_Nd), theirs["evaluated"], "evaluation code")


def test_the_evaluation_code_of_batch_topk_is_their_jumprelu(peer: tuple[str, dict[str, Any]]) -> None:
    library, found = peer
    if "batch_topk-evaluation" not in found:
        pytest.skip(f"{library} has its own code for evaluation")
    sae, theirs = ours("batch_topk"), found["batch_topk-evaluation"]
    sae.get_buffer("threshold").fill_(0.9)
    close(sae.encode(activations(N, D)), theirs["code"], "code")
    close(sae(activations(N, D)), theirs["decoded"], "decoded")
