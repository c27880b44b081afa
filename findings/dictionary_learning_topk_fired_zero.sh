#!/usr/bin/env bash
# dictionary_learning 0.1.0 (torch 2.13.0): its TopK trainer counts a latent as fired when it is among the top k,
# also with activation 0.
#
# ReLU comes before the selection there. Where fewer than k latents are above 0, zeros fill the k places: `torch.topk`
# takes some latents of activation 0, and `TopKTrainer.loss` sets `num_tokens_since_fired` of all k to 0. So latents
# that never fire can look alive for ever: `dead_features` is too small and the auxiliary loss leaves them out. The
# logged `effective_l0` is the number of places, k, and not the number of non-zero activations.
# It matters with large k, narrow or damaged dictionaries, and when dead latents are compared between libraries.
#
# Output seen:
#   non-zero activations per token 4.0, effective_l0 32
#   latents that fired 4, counted as fired 32
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
from dictionary_learning.trainers.top_k import TopKTrainer

torch.manual_seed(0)
trainer = TopKTrainer(
    steps=100, activation_dim=16, dict_size=64, k=32, layer=0, lm_name="none", lr=1e-3, warmup_steps=1, seed=0, device="cpu"
)
trainer.ae.encoder.bias.data[:] = -50.0  # no latent can fire,
trainer.ae.encoder.bias.data[:4] = 5.0  # but for four
x = torch.randn(256, 16)
for step in range(3):
    trainer.update(step, x)
f = trainer.ae.encode(x)
l0, fired = (f != 0).sum(-1).float().mean().item(), (f != 0).any(0).sum().item()
counted = (trainer.num_tokens_since_fired == 0).sum().item()
print(f"non-zero activations per token {l0}, effective_l0 {trainer.effective_l0}")
print(f"latents that fired {fired}, counted as fired {counted}")
raise SystemExit(not (fired == 4 and counted == 32 and l0 == 4 and trainer.effective_l0 == 32))
PYTHON
