"""Run by the interpreter of another library's environment: our weights through its classes.

    python peer_worker.py sae-lens|dictionary-learning GIVEN FOUND

Reads what `test_peers.py` wrote and writes {case: {code, decoded, loss, threshold, gradients}}. Needs torch and that
library only.
"""

from __future__ import annotations

import sys
from typing import Any

import torch

WEIGHTS = ("W_enc", "W_dec", "b_enc", "b_dec")


def fill(module: torch.nn.Module, given: dict[str, Any], names: dict[str, str]) -> None:
    """Write our weights into a module of theirs; a name of theirs with `.T` is transposed."""
    with torch.no_grad():
        for ours, theirs in names.items():
            target = module.get_parameter(theirs.removesuffix(".T"))
            target.copy_(given[ours].T if theirs.endswith(".T") else given[ours])


def gradients(module: torch.nn.Module, names: dict[str, str]) -> dict[str, torch.Tensor]:
    """Theirs, under our names and in our shapes."""
    found = {}
    for ours, theirs in names.items():
        grad = module.get_parameter(theirs.removesuffix(".T")).grad
        assert grad is not None
        found[ours] = grad.T if theirs.endswith(".T") else grad
    return found


def sae_lens(given: dict[str, Any]) -> dict[str, Any]:
    """BatchTopK, its nested form and JumpReLU: the training classes, and JumpReLU for evaluation."""
    from sae_lens.saes import batchtopk_sae, jumprelu_sae, matryoshka_batchtopk_sae
    from sae_lens.saes.sae import TrainStepInput

    x_Nd, (d, h) = given["x"], given["W_enc"].shape
    common = {"d_in": d, "d_sae": h, "dtype": "float64", "apply_b_dec_to_input": True}
    plain = {name: name for name in WEIGHTS}

    def trained(sae: Any, names: dict[str, str], dead_h: Any = None) -> dict[str, Any]:
        fill(sae, given, names)
        step = TrainStepInput(x_Nd, {"l0": given["sparsity_coeff"]}, dead_h, 0, False)
        out = sae.training_forward_pass(step)
        out.loss.backward()
        code, loss = out.feature_acts.detach(), out.loss.detach()
        return {"code": code, "decoded": sae.decode(code).detach(), "loss": loss, "gradients": gradients(sae, names)}

    topk = {**common, "k": given["k"], "rescale_acts_by_decoder_norm": False}
    cls, config = batchtopk_sae.BatchTopKTrainingSAE, batchtopk_sae.BatchTopKTrainingSAEConfig
    found = {"batch_topk": trained(cls(config(**topk)), plain)}
    nested, own = (getattr(matryoshka_batchtopk_sae, f"MatryoshkaBatchTopKTrainingSAE{s}") for s in ("", "Config"))
    found["matryoshka"] = trained(nested(own(**topk, matryoshka_widths=given["widths"])), plain)
    found["matryoshka"]["loss"] /= len(given["widths"])  # theirs is the sum over the prefixes
    for gradient in found["matryoshka"]["gradients"].values():
        gradient /= len(given["widths"])
    for penalty in ("step", "tanh"):
        more = {"jumprelu_sparsity_loss_mode": penalty, "jumprelu_bandwidth": given["bandwidth"]}
        more |= {"pre_act_loss_coefficient": given["pre_activation_coeff"] if penalty == "tanh" else None}
        sae = jumprelu_sae.JumpReLUTrainingSAE(jumprelu_sae.JumpReLUTrainingSAEConfig(**common, **more))
        found[f"jumprelu-{penalty}"] = trained(sae, plain | {"threshold": "threshold"}, given["dead"])
    later = jumprelu_sae.JumpReLUSAE(jumprelu_sae.JumpReLUSAEConfig(**common))
    fill(later, {**given, "threshold": torch.full((h,), given["batch_threshold"])}, plain | {"threshold": "threshold"})
    code = later.encode(x_Nd).detach()
    found["batch_topk-evaluation"] = {"code": code, "decoded": later.decode(code).detach()}
    return found


def dictionary_learning(given: dict[str, Any]) -> dict[str, Any]:
    """The trainers' losses, with dead latents where they have an auxiliary loss for them."""
    from dictionary_learning.trainers import batch_top_k, jumprelu, matryoshka_batch_top_k

    x_Nd, (d, h) = given["x"], given["W_enc"].shape
    common = {"steps": 10, "activation_dim": d, "dict_size": h, "layer": 0, "lm_name": "none", "device": "cpu"}
    common |= {"warmup_steps": 0}
    plain = {name: name for name in WEIGHTS}

    def trained(trainer: Any, names: dict[str, str], **code: Any) -> dict[str, Any]:
        trainer.ae.double()
        fill(trainer.ae, given, names)
        trainer.num_tokens_since_fired = torch.where(given["dead"], 10**9, 0)
        log = trainer.loss(x_Nd, step=5, logging=True)
        loss = trainer.loss(x_Nd, step=5)
        loss.backward()
        trained = {"code": log.f.detach(), "loss": loss.detach(), "gradients": gradients(trainer.ae, names)}
        evaluated = trainer.ae.encode(x_Nd, **code).detach()
        threshold = trainer.ae.threshold.detach()
        return {**trained, "evaluated": evaluated, "decoded": trainer.ae.decode(log.f).detach(), "threshold": threshold}

    names = {"W_enc": "encoder.weight.T", "b_enc": "encoder.bias", "W_dec": "decoder.weight.T", "b_dec": "b_dec"}
    topk = {**common, "k": given["k"], "auxk_alpha": given["aux_coeff"], "threshold_start_step": 0}
    found = {"batch_topk": trained(batch_top_k.BatchTopKTrainer(**topk), names)}
    sizes = [b - a for a, b in zip([0, *given["widths"][:-1]], given["widths"], strict=True)]
    shares = {"group_fractions": [size / h for size in sizes], "group_weights": [1.0] * len(sizes)}
    found["matryoshka"] = trained(matryoshka_batch_top_k.MatryoshkaBatchTopKTrainer(**topk, **shares), plain)
    given["b_dec"] = torch.zeros(d)  # this class's training forward does not subtract it
    jump = {"bandwidth": given["bandwidth"], "sparsity_penalty": given["sparsity_coeff"], "sparsity_warmup_steps": None}
    trainer = jumprelu.JumpReluTrainer(**common, **jump, target_l0=given["l0_penalty_target"])
    # its step function looks at f and not at π: what θ gets from the penalty is another thing
    found["jumprelu-quadratic"] = trained(
        trainer, {n: n for n in ("W_enc", "W_dec", "b_enc")} | {"threshold": "threshold"}
    )
    del found["jumprelu-quadratic"]["gradients"]["threshold"]
    return found


if __name__ == "__main__":
    _, library, source, target = sys.argv
    torch.save({"sae-lens": sae_lens, "dictionary-learning": dictionary_learning}[library](torch.load(source)), target)
