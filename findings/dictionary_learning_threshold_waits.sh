#!/usr/bin/env bash
# dictionary_learning 0.1.0 (torch 2.13.0): a BatchTopK SAE that was trained for 1,000 steps or fewer is a dense ReLU
# autoencoder as soon as it is used.
#
# In training exactly k latents per token (in the mean of a batch) fire. Outside of training `encode`, whose default is
# `use_threshold=True`, compares with the buffer `threshold` instead. That buffer is -1 until step 1,000
# (`threshold_start_step`) and only then follows the smallest chosen value, so after a shorter run every positive
# activation passes. The loss that was logged and the SAE that was saved belong to different codes; nothing warns, and
# the reconstruction is often even good, so that only the number of active latents shows it. `MatryoshkaBatchTopKTrainer`
# has the same constant. Pass `threshold_start_step` in short runs, or call `encode(x, use_threshold=False)`.
#
# Output seen:
#   BatchTopKTrainer: 1,000 steps: threshold -1.00, active latents per token: chosen over the batch 4.0, encode(x) 45.0
#   BatchTopKTrainer: 1,002 steps: threshold 1.80, active latents per token: chosen over the batch 4.0, encode(x) 4.1
#   MatryoshkaBatchTopKTrainer: 1,000 steps: threshold -1.00, active latents per token: chosen over the batch 4.0, encode(x) 45.2
#   MatryoshkaBatchTopKTrainer: 1,002 steps: threshold 1.84, active latents per token: chosen over the batch 4.0, encode(x) 3.8
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
from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer

torch.set_num_threads(1)
generator = torch.Generator().manual_seed(0)
data = (torch.rand(1100, 128, 64, generator=generator) < 0.06).float() @ torch.randn(64, 16, generator=generator)


def l0s(kind, steps, **own):
    """The threshold, and how many latents fire per token by choice over the batch and by plain `encode`."""
    trainer = kind(
        steps=steps, activation_dim=16, dict_size=128, k=4, layer=0, lm_name="none", lr=1e-3, warmup_steps=1, seed=0,
        device="cpu", **own,
    )
    for step in range(steps):
        trainer.update(step, data[step].clone())
    with torch.no_grad():
        chosen, plain = (trainer.ae.encode(data[-1], use_threshold=way) for way in (False, True))
    return float(trainer.ae.threshold), *((code > 0).sum(1).float().mean().item() for code in (chosen, plain))


ok = True
for kind, own in ((BatchTopKTrainer, {}), (MatryoshkaBatchTopKTrainer, {"group_fractions": [0.25, 0.75]})):
    found = [(steps, *l0s(kind, steps, **own)) for steps in (1000, 1002)]
    for steps, threshold, chosen, plain in found:
        print(f"{kind.__name__}: {steps:,} steps: threshold {threshold:.2f}, active latents per token:"
              f" chosen over the batch {chosen:.1f}, encode(x) {plain:.1f}")
    (_, before, _, dense), (_, after, _, sparse) = found
    ok = ok and before == -1 and dense > 12 and after > 0 and sparse < 8
raise SystemExit(not ok)
PYTHON
