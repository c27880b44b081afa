"""Times another library's training, in that library's environment: `PYTHON speed.py sae-lens ACTIVATIONS DEVICE`.

Knows nothing of saeopt. Jobs come as lines of JSON on stdin; each answer is one line of JSON on stdout: milliseconds of
a step by setting, medians. The library's own loop runs as it is shipped, with bfloat16 products (autocast) on a GPU,
and, where the library offers it, compiled; a step (of all the SAEs, where a case has several) is what lies between two
batches that the loop asks for.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

WARM = 12
"""Steps that are not timed: they compile, and choose the kernels."""


class Clock:
    """Batches of the activations again and again (copies: trainers write into theirs), and when each was asked for."""

    def __init__(self, x_Nd: Tensor, batch: int, steps: int) -> None:
        self.batches = list(x_Nd.split(batch))
        self.steps = WARM + steps
        self.marks: list[Any] = []

    def __iter__(self) -> Iterator[Tensor]:
        for step in range(self.steps + 1):  # one more than is trained on: the last step ends with it
            if self.batches[0].is_cuda:
                self.marks.append(torch.cuda.Event(enable_timing=True))
                self.marks[-1].record()
            else:
                self.marks.append(time.perf_counter())
            yield self.batches[step % len(self.batches)].to(torch.float32, copy=True)

    def ms(self) -> float:
        """The median of the timed steps."""
        marks = self.marks[WARM : self.steps + 1]
        if self.batches[0].is_cuda:
            torch.cuda.synchronize()
            return statistics.median(a.elapsed_time(b) for a, b in pairwise(marks))
        return statistics.median(1e3 * (b - a) for a, b in pairwise(marks))


def _sae_lens_classes(job: dict[str, Any]) -> tuple[Any, Any, dict[str, Any]]:
    """The config class, the SAE's class, and the fields that are the architecture's own."""
    from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
    from sae_lens.saes.gated_sae import GatedTrainingSAE, GatedTrainingSAEConfig
    from sae_lens.saes.jumprelu_sae import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig
    from sae_lens.saes.matryoshka_batchtopk_sae import (
        MatryoshkaBatchTopKTrainingSAE,
        MatryoshkaBatchTopKTrainingSAEConfig,
    )
    from sae_lens.saes.standard_sae import StandardTrainingSAE, StandardTrainingSAEConfig
    from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig

    kind, h, k = job["sae_type"], job["h"], job["k"]
    return {
        "relu": (StandardTrainingSAEConfig, StandardTrainingSAE, {"l1_coefficient": 1.0}),
        "gated": (GatedTrainingSAEConfig, GatedTrainingSAE, {"l1_coefficient": 1.0}),
        "topk": (TopKTrainingSAEConfig, TopKTrainingSAE, {"k": k}),
        "batch_topk": (BatchTopKTrainingSAEConfig, BatchTopKTrainingSAE, {"k": k}),
        "matryoshka_batch_topk": (
            MatryoshkaBatchTopKTrainingSAEConfig,
            MatryoshkaBatchTopKTrainingSAE,
            {"k": k, "matryoshka_widths": [h // 16, h // 8, h // 4, h // 2, h]},
        ),
        "jumprelu": (JumpReLUTrainingSAEConfig, JumpReLUTrainingSAE, {"l0_coefficient": 0.1}),
    }[kind]


def sae_lens(job: dict[str, Any], x_Nd: Tensor, device: str) -> dict[str, float]:
    """sae-lens' `SAETrainer.fit`, plainly and with the compiled forward that its runner offers (`compile_sae`).

    Several SAEs: its `MultiSAETrainer`, which trains them in lockstep on one stream; its runner compiles none of them.
    """
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.multi_sae_trainer import MultiSAETrainer
    from sae_lens.training.sae_trainer import SAETrainer

    config_class, sae_class, own = _sae_lens_classes(job)
    names = [f"sae{member}" for member in range(job["members"])]
    found = {}
    ways = ["autocast", "autocast, compiled"][: 2 if job["members"] == 1 else 1]
    for setting in ways if device != "cpu" else ["float32"]:
        clock = Clock(x_Nd, job["batch"], job["steps"])
        saes = {name: sae_class(config_class(d_in=job["d"], d_sae=job["h"], device=device, **own)) for name in names}
        if "compiled" in setting:
            for sae in saes.values():
                sae.training_forward_pass = torch.compile(sae.training_forward_pass)
        config = SAETrainerConfig(
            total_training_samples=clock.steps * job["batch"],
            train_batch_size_samples=job["batch"],
            lr=1e-3,
            lr_end=1e-4,
            device=device,
            autocast=device != "cpu",
        )
        batches = iter(clock)
        if len(saes) == 1:
            SAETrainer(config, saes[names[0]], batches).fit()
        else:
            MultiSAETrainer(config, saes, dict.fromkeys(names, "x"), ({"x": batch} for batch in batches)).fit()
        next(batches)
        found[setting] = clock.ms()
    return found


def dictionary_learning(job: dict[str, Any], x_Nd: Tensor, device: str) -> dict[str, float]:
    """dictionary_learning's `trainSAE`, which takes several SAEs for one stream."""
    from dictionary_learning.trainers import (
        BatchTopKTrainer,
        GatedSAETrainer,
        JumpReluTrainer,
        StandardTrainer,
        TopKTrainer,
    )
    from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer
    from dictionary_learning.training import trainSAE

    k, warm = {"k": job["k"]}, {"sparsity_warmup_steps": 1}
    trainer, own = {
        "relu": (StandardTrainer, warm),
        "gated": (GatedSAETrainer, warm),
        "topk": (TopKTrainer, k),
        "batch_topk": (BatchTopKTrainer, k),
        "matryoshka_batch_topk": (
            MatryoshkaBatchTopKTrainer,
            {**k, "group_fractions": [1 / 16, 1 / 16, 1 / 8, 1 / 4, 1 / 2]},
        ),
        "jumprelu": (JumpReluTrainer, warm),
    }[job["sae_type"]]
    clock = Clock(x_Nd, job["batch"], job["steps"])
    config = {
        "trainer": trainer, "steps": clock.steps, "activation_dim": job["d"], "dict_size": job["h"], "layer": 0,
        "lm_name": "activations", "lr": 1e-3, "warmup_steps": 1, "device": device, **own,
    }  # fmt: skip
    low = {} if device == "cpu" else {"autocast_dtype": torch.bfloat16}
    configs = [config | {"seed": member} for member in range(job["members"])]
    trainSAE(clock, configs, clock.steps, device=device, **low)
    return {"autocast" if low else "float32": clock.ms()}


LIBRARIES: dict[str, Callable[[dict[str, Any], Tensor, str], dict[str, float]]] = {
    "sae-lens": sae_lens,
    "dictionary-learning": dictionary_learning,
}


def main() -> None:
    """Answer jobs until stdin ends."""
    library, activations, device = sys.argv[1:4]
    answers = os.fdopen(os.dup(1), "w")  # progress bars and notices of the libraries do not belong between the answers
    os.dup2(2, 1)
    x_Nd = load_file(activations)["x"].to(device)
    for line in sys.stdin:
        try:
            answer: dict[str, Any] = LIBRARIES[library](json.loads(line), x_Nd, device)
        except Exception as error:  # one case that a library cannot do must not end the others
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
