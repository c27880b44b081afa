#!/usr/bin/env bash
# dictionary_learning 0.1.0 (torch 2.13.0): JumpReLU's penalty moves a threshold by other entries than the paper's
# formula says, and with a bandwidth above twice the threshold by every entry that is silent.
#
# arXiv 2407.14435 gives the step function's slope for theta from pre-activations within half a bandwidth of it, on both
# sides. `JumpReluTrainer.loss` applies its step function to the code instead, in which an entry below theta is 0. So of
# the band only the upper half counts; and where theta < bandwidth / 2, the 0 of every silent entry lies in the band.
# Thresholds start at 0.001 and the default bandwidth is 0.001: there it is half the band. With a bandwidth of 0.01 all
# silent entries count, dead latents' too, and the penalty moves all thresholds alike, whatever is close to them. The
# counts below are how many entries the penalty's gradient comes from.
#
# Output seen (8,192 tokens x 512 latents):
#   bandwidth 0.001: 4194304 entries, in the band 1729, of these above theta 843; the gradient comes from 843
#   bandwidth 0.01: 4194304 entries, in the band 16741, of these above theta 8349; the gradient comes from 2107171
# Exit code 1 when this changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q "dictionary-learning==0.1.0" "torch==2.13.0"
"$folder/env/bin/pip" uninstall -q -y torchvision # not used here, and it fits one build of torch only
cd "$folder"
"$folder/env/bin/python" - <<'PYTHON'
import torch
from dictionary_learning.trainers.jumprelu import JumpReluTrainer

torch.set_num_threads(1)
x = torch.randn(8192, 64, generator=torch.Generator().manual_seed(0))


def slopes(bandwidth: float, penalty: float) -> tuple[torch.Tensor, JumpReluTrainer]:
    """Gradients of the thresholds."""
    torch.manual_seed(0)
    trainer = JumpReluTrainer(
        steps=10, activation_dim=64, dict_size=512, layer=0, lm_name="none", bandwidth=bandwidth,
        sparsity_penalty=penalty, warmup_steps=0, sparsity_warmup_steps=None,
    )
    trainer.loss(x, step=5).backward()
    return trainer.ae.threshold.grad.double(), trainer


as_described = True
for bandwidth in (0.001, 0.01):
    with_penalty, trainer = slopes(bandwidth, 1.0)
    penalty_only = (with_penalty - slopes(bandwidth, 0.0)[0]).sum().item()
    ae = trainer.ae
    pre, theta = (x @ ae.W_enc + ae.b_enc).detach(), ae.threshold.detach()
    l0 = (pre > theta).sum(-1).double().mean().item()
    each = 2 * (l0 / trainer.target_l0 - 1) / trainer.target_l0 / bandwidth / len(x)  # one entry's share
    counted = round(-penalty_only / each)
    band = (pre - theta).abs() < bandwidth / 2
    above = int((band & (pre > theta)).sum())
    print(
        f"bandwidth {bandwidth:g}: {pre.numel()} entries, in the band {int(band.sum())}, of these above theta {above};"
        f" the gradient comes from {counted}"
    )
    silent = int((pre <= theta).sum()) if theta[0] < bandwidth / 2 else 0
    as_described &= abs(counted - above - silent) <= 0.001 * (above + silent) + 2
    as_described &= abs(counted - int(band.sum())) > 0.2 * int(band.sum())
raise SystemExit(0 if as_described else 1)
PYTHON
