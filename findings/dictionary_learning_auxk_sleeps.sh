#!/usr/bin/env bash
# dictionary_learning 0.1.0 (torch 2.13.0): the auxiliary loss against dead latents does nothing in the first 10 million
# tokens, whatever `auxk_alpha` says.
#
# `TopKTrainer` and `BatchTopKTrainer` call a latent dead after 10,000,000 tokens without firing. That is a constant of
# the constructor and no argument. In a run of fewer tokens (tests, small models, comparisons at equal tokens) no latent
# is ever dead, so a run with `auxk_alpha=1/32`, the default, and one with 0 give the same bits, although most latents
# have not fired in the last 8,192 tokens (printed below: those that have). Whoever compares dead shares or short runs
# must set `trainer.dead_feature_threshold` by hand.
#
# Output seen:
#   TopKTrainer: 82 of 256 latents fire; alpha 1/32 and 0: the same weights; threshold lowered by hand: other weights
#   BatchTopKTrainer: 58 of 256 latents fire; alpha 1/32 and 0: the same weights; threshold lowered by hand: other weights
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
from dictionary_learning.trainers.top_k import TopKTrainer

torch.set_num_threads(1)
generator = torch.Generator().manual_seed(0)
data = torch.randn(64, 512, 4, generator=generator) @ torch.randn(4, 32, generator=generator)  # 4 of 32 dimensions


def trained(kind, alpha, threshold=None):
    trainer = kind(
        steps=64, activation_dim=32, dict_size=256, k=4, layer=0, lm_name="none", lr=3e-3, warmup_steps=1, seed=0,
        device="cpu", auxk_alpha=alpha,
    )
    trainer.dead_feature_threshold = threshold or trainer.dead_feature_threshold
    for step, x in enumerate(data):
        trainer.update(step, x.clone())
    return trainer


ok = True
for kind in (TopKTrainer, BatchTopKTrainer):
    default, without, awake = trained(kind, 1 / 32), trained(kind, 0.0), trained(kind, 1 / 32, threshold=2048)
    fired = (default.num_tokens_since_fired < 8192).sum().item()
    same = all(torch.equal(a, b) for a, b in zip(default.ae.parameters(), without.ae.parameters()))
    other = not all(torch.equal(a, b) for a, b in zip(default.ae.parameters(), awake.ae.parameters()))
    print(f"{kind.__name__}: {fired} of 256 latents fire; alpha 1/32 and 0: {'the same' if same else 'other'} weights;"
          f" threshold lowered by hand: {'other' if other else 'the same'} weights")
    ok = ok and same and other and fired < 200
raise SystemExit(not ok)
PYTHON
