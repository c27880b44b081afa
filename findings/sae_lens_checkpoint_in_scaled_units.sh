#!/usr/bin/env bash
# sae-lens 6.54.12 (torch 2.13.0): a checkpoint from the middle of a training loads without a word and is in other units
# than the SAE at the end.
#
# With `normalize_activations="expected_average_only_in"` the trainer scales activations so that their mean norm is √d.
# At the end it folds the scale into weights and biases and writes "none" into the config. Checkpoints on the way hold
# the weights as they are trained, and the scale in `activation_scaler.json` beside them, which `SAE.load_from_disk` does
# not read: it takes the config's `expected_average_only_in` and scales nothing. On raw activations the loaded SAE then
# explains nothing, or little less than it should where the scale is near 1, so that a comparison of checkpoints, or a
# run that was cut short, is judged by the wrong numbers. Multiply what is read by the file's scaling_factor and divide
# what is given by it.
#
# Output seen (fraction of variance unexplained; activations of mean norm about 0.05):
#   102912: activation_scaler.json 85.3, loaded 4.197, scaled by hand 0.011
#   final_204800: activation_scaler.json None, loaded 0.005, scaled by hand 0.005
# Exit code 1 when this changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python=${FINDING_PYTHON:-}
if [ -z "$python" ]; then
  python3 -m venv "$folder/env"
  python=$folder/env/bin/python
  "$python" -m pip install -q "sae-lens==6.54.12" "torch==2.13.0"
fi
cd "$folder"
"$python" - <<'PYTHON' 2>/dev/null
import json
import logging
import warnings
from pathlib import Path

import torch
from sae_lens import SAE
from sae_lens.config import SAETrainerConfig
from sae_lens.saes import standard_sae
from sae_lens.training.sae_trainer import SAETrainer

warnings.simplefilter("ignore")
logging.disable()
D, H, BATCH, STEPS = 16, 64, 512, 400
torch.manual_seed(0)
atoms = torch.nn.functional.normalize(torch.randn(H, D), dim=-1)


def batches():
    generator = torch.Generator().manual_seed(1)
    while True:
        code = torch.rand(BATCH, H, generator=generator) * (torch.rand(BATCH, H, generator=generator) < 0.05)
        yield 0.05 * code @ atoms


def unexplained(x, x_hat):
    return ((x - x_hat).square().sum() / (x - x.mean(0)).square().sum()).item()


sae = standard_sae.StandardTrainingSAE(
    standard_sae.StandardTrainingSAEConfig(
        d_in=D, d_sae=H, l1_coefficient=0.02, normalize_activations="expected_average_only_in"
    )
)
config = SAETrainerConfig(
    total_training_samples=STEPS * BATCH, train_batch_size_samples=BATCH, lr=3e-3, lr_end=3e-4, device="cpu",
    n_batches_for_norm_estimate=20, n_checkpoints=1, checkpoint_path="checkpoints", save_final_checkpoint=True,
)  # fmt: skip
trainer = SAETrainer(config, sae, batches())
trainer.fit()
x = next(batches())
found = {}
for folder in sorted(Path("checkpoints").iterdir()):
    loaded = SAE.load_from_disk(str(folder), device="cpu")
    scale = json.loads((folder / "activation_scaler.json").read_text())["scaling_factor"]
    with torch.no_grad():
        by_hand = loaded(x * (scale or 1)) / (scale or 1)
        found[folder.name.startswith("final")] = scale, unexplained(x, loaded(x)), unexplained(x, by_hand)
    told = None if scale is None else round(scale, 1)
    _, as_loaded, scaled = found[folder.name.startswith("final")]
    print(f"{folder.name}: activation_scaler.json {told}, loaded {as_loaded:.3f}, scaled by hand {scaled:.3f}")
(scale, as_loaded, scaled), (last, at_the_end, _) = found[False], found[True]
raise SystemExit(not (scale is not None and as_loaded > 1 and scaled < 0.05 and last is None and at_the_end < 0.05))
PYTHON
