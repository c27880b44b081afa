#!/usr/bin/env bash
# sae-lens 6.54.12 (torch 2.13.0): the auxiliary loss of its TopK trainer takes dead latents' pre-activations as they
# are, without ReLU.
#
# In the paper (arXiv 2406.04093, A.2) the auxiliary code is a topk code, which is never negative; OpenAI's and
# EleutherAI's code rectify it. Here `calculate_topk_aux_acts` copies `hidden_pre`, and dead latents are those with
# negative pre-activations: the auxiliary reconstruction is made of negative codes. Its loss can then be many times
# the residual that it should explain (34 times below), and it learns signed codes, of which the encoder, which
# rectifies, can use one side only. It is also multiplied by min(1, dead / (d / 2)), so one dead latent of a wide
# model counts next to nothing.
#
# Output seen:
#   largest pre-activation of a dead latent -4.96
#   residual 15.46, auxiliary loss 532.79
# Exit code 1 when a negative pre-activation no longer enters.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q "sae-lens==6.54.12" "torch==2.13.0"
cd "$folder"
"$folder/env/bin/python" - <<'PYTHON'
import torch
from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig

torch.manual_seed(0)
sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=16, d_sae=64, k=4, normalize_activations="none"))
dead = torch.arange(64) >= 8
with torch.no_grad():
    sae.b_enc[dead] = -50.0
x = torch.randn(256, 16)
with torch.no_grad():
    f, pre = sae.encode_with_hidden_pre(x)
    x_hat = sae.decode(f.to_dense() if f.is_sparse else f)
    loss = sae.calculate_topk_aux_loss(x, x_hat, pre, dead).item()
residual = (x - x_hat).pow(2).sum(-1).mean().item()
largest = pre[:, dead].max().item()
print(f"largest pre-activation of a dead latent {largest:.2f}")
print(f"residual {residual:.2f}, auxiliary loss {loss:.2f}")
# with rectified codes the reconstruction would be 0 and the loss the residual
raise SystemExit(not (largest < 0 and loss > 10 * residual))
PYTHON
