"""Trains SAEs with another library, in that library's environment: `PYTHON trainer.py sae-lens ACTIVATIONS DEVICE`.

Knows nothing of saeopt. Jobs come as lines of JSON on stdin; each answer is one line of JSON on stdout. The weights are
written in one form for all libraries: raw activations in, f = code((x − b_dec) W_enc + biases), x̂ = f W_dec + b_dec,
with the names of saeopt's parameters. Each library trains by its own trainer with the recipe that its authors
recommend, in proportion to the length of the run; learning rate, sparsity, batch and tokens are the comparison's.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


class Batches:
    """The harvested tokens in their order, as often as one likes; batches are copies (trainers write into theirs)."""

    def __init__(self, x_Nd: Tensor, batch: int, device: str) -> None:
        self.x_Nd, self.batch, self.device = x_Nd, batch, device
        self.steps = len(x_Nd) // batch

    def __iter__(self) -> Iterator[Tensor]:
        for i in range(self.steps):
            yield self.x_Nd[i * self.batch : (i + 1) * self.batch].to(self.device, torch.float32, copy=True)


def train_sae_lens(job: dict[str, Any], data: Batches) -> dict[str, Tensor]:
    """sae-lens: its documentation's recipe (normalised activations, λ warm-up 5 %, lr falling over the last 20 %)."""
    from sae_lens.config import SAETrainerConfig
    from sae_lens.saes import batchtopk_sae, gated_sae, jumprelu_sae, matryoshka_batchtopk_sae, standard_sae, topk_sae
    from sae_lens.training.sae_trainer import SAETrainer

    kind, h, warm = job["sae_type"], job["h"], data.steps // 20
    k, l1 = {"k": job["sparsity"]}, {"l1_coefficient": job["sparsity"], "l1_warm_up_steps": warm}
    module, name, own = {
        "relu": (standard_sae, "StandardTrainingSAE", l1),
        "gated": (gated_sae, "GatedTrainingSAE", l1),
        "topk": (topk_sae, "TopKTrainingSAE", {"k": int(job["sparsity"])}),
        "batch_topk": (batchtopk_sae, "BatchTopKTrainingSAE", k),
        "matryoshka_batch_topk": (
            matryoshka_batchtopk_sae,
            "MatryoshkaBatchTopKTrainingSAE",
            {**k, "matryoshka_widths": [h // 16, h // 8, h // 4, h // 2, h]},
        ),
        "jumprelu": (
            jumprelu_sae,
            "JumpReLUTrainingSAE",
            {"l0_coefficient": job["sparsity"], "l0_warm_up_steps": warm},
        ),
    }[kind]
    own |= {"apply_b_dec_to_input": kind not in ("relu", "jumprelu")}
    own |= {"normalize_activations": "expected_average_only_in"}
    sae = getattr(module, name)(getattr(module, name + "Config")(d_in=job["d"], d_sae=h, device=data.device, **own))
    config = SAETrainerConfig(
        total_training_samples=data.steps * data.batch,
        train_batch_size_samples=data.batch,
        lr=job["lr"],
        lr_end=job["lr"] / 10,
        lr_decay_steps=data.steps // 5,
        device=data.device,
        n_batches_for_norm_estimate=min(1000, data.steps),
    )
    trainer = SAETrainer(config, sae, iter(data))
    # beforehand: from the stream it trains on it would take these batches away
    trainer.activation_scaler.estimate_scaling_factor(job["d"], iter(data), config.n_batches_for_norm_estimate)
    trainer.fit()
    sae.fold_W_dec_norm()
    found = {"W_enc": sae.W_enc, "W_dec": sae.W_dec, "b_dec": sae.b_dec}
    names = ("b_gate", "b_mag", "r_mag") if kind == "gated" else ("b_enc",)
    found |= {name: getattr(sae, name) for name in (*names, *(["threshold"] if kind == "jumprelu" else []))}
    if kind in ("batch_topk", "matryoshka_batch_topk"):
        found["threshold"] = sae.topk_threshold
    if not sae.cfg.apply_b_dec_to_input:  # (x − b_dec) W_enc + b_enc is the form written
        found["b_enc"] = sae.b_enc + sae.b_dec @ sae.W_enc
    return found


def train_dictionary_learning(job: dict[str, Any], data: Batches) -> dict[str, Tensor]:
    """dictionary_learning: its demo's recipe (unit mean square, warm-ups, lr falling over the last 20 %)."""
    from dictionary_learning import trainers
    from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer
    from dictionary_learning.training import trainSAE

    kind = job["sae_type"]
    warmup = data.steps // 20  # the demo: 1,000 and 5,000 steps of some 100,000
    k, rising = {"k": int(job["sparsity"])}, {"sparsity_warmup_steps": warmup}
    l1 = {"l1_penalty": job["sparsity"] / job["d"] ** 0.5, **rising}
    # its own 1,000 steps without a threshold would be all of a short run; from earlier on it moves too slowly (0.999)
    batchwise = {**k, "threshold_start_step": min(1000, int(0.8 * data.steps))}
    trainer, own = {
        "relu": (trainers.StandardTrainer, l1),
        "gated": (trainers.GatedSAETrainer, l1),
        "topk": (trainers.TopKTrainer, k),
        "batch_topk": (trainers.BatchTopKTrainer, batchwise),
        "matryoshka_batch_topk": (
            MatryoshkaBatchTopKTrainer,
            {**batchwise, "group_fractions": [1 / 16, 1 / 16, 1 / 8, 1 / 4, 1 / 2]},
        ),
        "jumprelu": (trainers.JumpReluTrainer, {"target_l0": job["sparsity"], **rising}),
    }[kind]
    config = {
        "trainer": trainer, "steps": data.steps, "activation_dim": job["d"], "dict_size": job["h"], "layer": 0,
        "lm_name": "activations", "lr": job["lr"], "warmup_steps": min(1000, warmup), "device": data.device,
        "decay_start": int(0.8 * data.steps), "seed": job["seed"], **own,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        trainSAE(data, [config], data.steps, save_dir=folder, normalize_activations=True, device=data.device)
        state = torch.load(Path(folder) / "trainer_0" / "ae.pt", weights_only=True)
    linear = {"b_dec": "b_dec", "encoder.bias": "b_enc"}
    plain = {name: name for name in ("b_dec", "b_enc", "threshold")}
    names = {
        "relu": {"bias": "b_dec", "encoder.bias": "b_enc"},
        "gated": {"decoder_bias": "b_dec", "gate_bias": "b_gate", "mag_bias": "b_mag", "r_mag": "r_mag"},
        "topk": linear,
        "batch_topk": {**linear, "threshold": "threshold"},
        "matryoshka_batch_topk": plain,
        "jumprelu": plain,
    }
    found = {ours: state[theirs] for theirs, ours in names[kind].items()}
    if "W_enc" in state:
        found |= {"W_enc": state["W_enc"], "W_dec": state["W_dec"]}
    else:
        found |= {"W_enc": state["encoder.weight"].T, "W_dec": state["decoder.weight"].T}
    if kind == "jumprelu":  # it does not subtract b_dec; (x − b_dec) W_enc + b_enc is the form written
        found["b_enc"] = found["b_enc"] + found["b_dec"] @ found["W_enc"]
    return found


TRAINERS = {"sae-lens": train_sae_lens, "dictionary-learning": train_dictionary_learning}


def main() -> None:
    """Answer jobs until stdin ends."""
    library, activations, device = sys.argv[1:4]
    answers = os.fdopen(os.dup(1), "w")  # progress bars and notices of the libraries do not belong between the answers
    os.dup2(2, 1)
    torch.set_num_threads(1)
    x_Nd = load_file(activations)["train"]
    if device != "cpu":
        x_Nd = x_Nd.to(device)
    for line in sys.stdin:
        job = json.loads(line)
        started = time.perf_counter()
        torch.manual_seed(job["seed"])
        found = TRAINERS[library](job, Batches(x_Nd, job["batch"], device))
        save_file({name: t.detach().float().cpu().contiguous() for name, t in found.items()}, job["out"])
        answers.write(json.dumps({"seconds": time.perf_counter() - started}) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
