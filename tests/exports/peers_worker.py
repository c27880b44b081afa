"""Run by the interpreter of another library's environment; needs torch and that library only.

    python peers_worker.py LIBRARY save FOLDER     SAEs of its own, written by itself, and found.pt: what they give
    python peers_worker.py LIBRARY load FOLDER     what its loaders read there, and found.pt: what that gives of x.pt

found.pt: folder → {code, decoded} of x, dense.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

D, H, N = 12, 40, 64


def activations() -> torch.Tensor:
    """Raw units, with a mean that is many times the spread."""
    generator = torch.Generator().manual_seed(1)
    mean_d = 40 * torch.randn(D, generator=generator)
    return mean_d + 3 * torch.randn(N, D, generator=generator)


@torch.no_grad()
def awkward(module: torch.nn.Module) -> None:
    """Weights as of training on these activations: rows of unequal length, biases not 0, some thresholds high."""
    generator = torch.Generator().manual_seed(2)
    for name, p in module.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        if name.endswith("threshold"):
            p.copy_(noise.abs())
        elif name in ("bias", "b_dec", "decoder_bias", "decoder.bias") and p.shape == (D,):
            p.copy_(activations().mean(0) + noise)
        elif p.dim() == 2:
            p.copy_(noise * (0.5 + torch.rand(p.shape[0], 1, generator=generator)) / 3)
        else:
            p.copy_(0.3 * noise)


def sae_lens_saves(folder: Path) -> dict[str, Any]:
    from sae_lens.saes import (
        batchtopk_sae,
        gated_sae,
        jumprelu_sae,
        matryoshka_batchtopk_sae,
        standard_sae,
        topk_sae,
        transcoder,
    )
    from sae_lens.training.activation_scaler import ActivationScaler

    x_Nd, found = activations(), {}

    def config(cls: Any, hook: str, **more: Any) -> Any:
        made = cls(d_in=D, d_sae=H, **more)
        made.metadata.hook_name = hook
        return made

    def note(name: str, sae: Any, read: torch.Tensor = x_Nd, back: Any = lambda y: y) -> None:
        code = sae.encode(read)
        found[name] = {"code": code.to_dense() if code.is_sparse else code, "decoded": back(sae.decode(code))}

    plain = {
        "standard": (standard_sae.StandardSAE, standard_sae.StandardSAEConfig, {}),
        "standard-reads-x": (standard_sae.StandardSAE, standard_sae.StandardSAEConfig, {"apply_b_dec_to_input": False}),
        "gated": (gated_sae.GatedSAE, gated_sae.GatedSAEConfig, {}),
        "gated-reads-x": (gated_sae.GatedSAE, gated_sae.GatedSAEConfig, {"apply_b_dec_to_input": False}),
        "topk": (topk_sae.TopKSAE, topk_sae.TopKSAEConfig, {"k": 5}),
        "topk-rescaled": (topk_sae.TopKSAE, topk_sae.TopKSAEConfig, {"k": 5, "rescale_acts_by_decoder_norm": True}),
        "jumprelu": (jumprelu_sae.JumpReLUSAE, jumprelu_sae.JumpReLUSAEConfig, {}),
    }
    for layer, (name, (cls, cls_config, more)) in enumerate(plain.items()):
        sae = cls(config(cls_config, f"blocks.{layer}.hook_resid_pre", **more))
        awkward(sae)
        sae.save_model(folder / name)
        note(name, sae)
    for name in ("Transcoder", "JumpReLUTranscoder", "SkipTranscoder"):
        cls, cls_config = getattr(transcoder, name), getattr(transcoder, f"{name}Config")
        made = config(cls_config, "blocks.1.hook_resid_mid", d_out=D + 2, apply_b_dec_to_input=False)
        made.metadata.hook_name_out = "blocks.1.hook_mlp_out"
        sae = cls(made)
        awkward(sae)
        sae.save_model(folder / name)
        note(name, sae)
    scaler = ActivationScaler(scaling_factor=0.07)
    trained = {
        "training-topk": (topk_sae.TopKTrainingSAE, topk_sae.TopKTrainingSAEConfig, {"k": 5}),
        "training-standard": (standard_sae.StandardTrainingSAE, standard_sae.StandardTrainingSAEConfig, {}),
        "training-jumprelu": (jumprelu_sae.JumpReLUTrainingSAE, jumprelu_sae.JumpReLUTrainingSAEConfig, {}),
    }
    for name, (cls, cls_config, more) in trained.items():
        sae = cls(config(cls_config, "blocks.0.hook_mlp_out", normalize_activations="expected_average_only_in", **more))
        awkward(sae)
        sae.save_model(folder / name)
        scaler.save(str(folder / name / "activation_scaler.json"))
        note(name, sae, scaler.scale(x_Nd), scaler.unscale)
    batch = {
        "batchtopk": (batchtopk_sae.BatchTopKTrainingSAE, batchtopk_sae.BatchTopKTrainingSAEConfig, {"k": 5}),
        "matryoshka": (
            matryoshka_batchtopk_sae.MatryoshkaBatchTopKTrainingSAE,
            matryoshka_batchtopk_sae.MatryoshkaBatchTopKTrainingSAEConfig,
            {"k": 5, "matryoshka_widths": [10, 20, H]},
        ),
    }
    for name, (cls, cls_config, more) in batch.items():
        sae = cls(config(cls_config, "blocks.0.hook_attn_out", **more))
        awkward(sae)
        sae.topk_threshold.fill_(0.8)
        sae.save_inference_model(folder / name)
        note(name, jumprelu_sae.JumpReLUSAE.load_from_disk(folder / name))
        sae.save_model(folder / f"training-{name}")  # a checkpoint: its own loader knows no such architecture
        found[f"training-{name}"] = found[name]
    for norm in ("layer_norm", "constant_norm_rescale"):
        standard_sae.StandardSAE(
            config(standard_sae.StandardSAEConfig, "blocks.0.hook_resid_pre", normalize_activations=norm)
        ).save_model(folder / norm)
    return found


def dictionary_learning_saves(folder: Path) -> dict[str, Any]:
    from dictionary_learning.dictionary import AutoEncoderNew
    from dictionary_learning.trainers import batch_top_k, gdm, jumprelu, matryoshka_batch_top_k, standard, top_k
    from dictionary_learning.utils import load_dictionary

    x_Nd, found = activations(), {}
    common = {"steps": 5000, "activation_dim": D, "dict_size": H, "layer": 3, "lm_name": "none", "device": "cpu"}
    common["submodule_name"] = "resid_post_layer_3"
    trainers = {
        "standard": lambda: standard.StandardTrainer(**common),
        "april": lambda: standard.StandardTrainerAprilUpdate(**common),
        "gated": lambda: gdm.GatedSAETrainer(**common),
        "topk": lambda: top_k.TopKTrainer(**common, k=5),
        "batch-topk": lambda: batch_top_k.BatchTopKTrainer(**common, k=5),
        "batch-topk-unset": lambda: batch_top_k.BatchTopKTrainer(**common, k=5),
        "jumprelu": lambda: jumprelu.JumpReluTrainer(**common, target_l0=5),
        "matryoshka": lambda: matryoshka_batch_top_k.MatryoshkaBatchTopKTrainer(
            **common, k=5, group_fractions=[0.25, 0.75]
        ),
    }
    for name, make in trainers.items():
        trainer = make()
        awkward(trainer.ae)
        if name in ("batch-topk", "matryoshka"):
            trainer.ae.threshold.fill_(0.8)
        _save(folder / name, trainer.ae, {"trainer": trainer.config})
    new = AutoEncoderNew(D, H)
    awkward(new)
    _save(folder / "new", new, {"trainer": {"dict_class": "AutoEncoderNew", "submodule_name": None}})
    for name in [*trainers, "new"]:
        ae, _ = load_dictionary(str(folder / name), device="cpu")
        code = ae.encode(x_Nd)
        found[name] = {"code": code, "decoded": ae.decode(code)}
    return found


def _save(folder: Path, ae: torch.nn.Module, config: dict[str, Any]) -> None:
    """As its `trainSAE` does at the end."""
    folder.mkdir()
    torch.save(ae.state_dict(), folder / "ae.pt")
    (folder / "config.json").write_text(json.dumps(config, indent=4))


def dictionary_learning_loads(folder: Path) -> dict[str, Any]:
    from dictionary_learning.utils import get_nested_folders, load_dictionary

    found = {}
    for path in get_nested_folders(str(folder)):
        ae, _ = load_dictionary(path, device="cpu")
        code = ae.encode(torch.load(folder / "x.pt"))
        found[str(Path(path).relative_to(folder))] = {
            "code": code,
            "decoded": ae.decode(code),
            "class": type(ae).__name__,
        }
    return found


def _sparsify_code(sae: Any, x_Nd: torch.Tensor) -> dict[str, Any]:
    acts, indices, _ = sae.encode(x_Nd)
    code = torch.zeros(len(x_Nd), sae.num_latents).scatter(-1, indices.long(), acts)
    return {"code": code, "decoded": sae(x_Nd).sae_out}


def sparsify_saves(folder: Path) -> dict[str, Any]:
    from sparsify import SparseCoder, SparseCoderConfig

    found = {}
    for name, more in {
        "layers.3": {},
        "layers.10": {"k": 7},
        "layers.1.mlp": {"transcode": True},
        "skip": {"transcode": True, "skip_connection": True},
    }.items():
        sae = SparseCoder(D, SparseCoderConfig(num_latents=H, **{"k": 5, **more}))
        awkward(sae)
        sae.save_to_disk(folder / name)
        found[name] = _sparsify_code(sae, activations())
    return found


def sparsify_loads(folder: Path) -> dict[str, Any]:
    from sparsify import SparseCoder

    x_Nd = torch.load(folder / "x.pt")
    return {
        name: _sparsify_code(sae, x_Nd) for name, sae in SparseCoder.load_many(str(folder / "set"), local=True).items()
    }


def circuit_tracer_saves(folder: Path) -> dict[str, Any]:
    from circuit_tracer.transcoder.activation_functions import JumpReLU
    from circuit_tracer.transcoder.single_layer_transcoder import SingleLayerTranscoder, TranscoderSet

    found: dict[str, Any] = {}
    x_Nd = activations()
    for name, skip in {"relu": False, "jumprelu": False, "skip": True}.items():
        made = {}
        for layer in range(2):
            act = JumpReLU(torch.rand(H), 0.1) if name == "jumprelu" else torch.nn.functional.relu
            own = SingleLayerTranscoder(D, H, act, layer, skip_connection=skip, device="cpu", dtype=torch.float32)
            awkward(own)
            made[layer] = own
            found[f"{name}/layer_{layer}"] = {"code": own.encode(x_Nd), "decoded": own(x_Nd)}
        TranscoderSet(made, "hook_resid_mid", "hook_mlp_out").to_safetensors(str(folder / name))
        (folder / name / "config.yaml").write_text(
            "model_name: none\nmodel_kind: transcoder_set\nscan: none\n"
            "feature_input_hook: hook_resid_mid\nfeature_output_hook: hook_mlp_out\n"
        )
    return found


def circuit_tracer_loads(folder: Path) -> dict[str, Any]:
    import yaml
    from circuit_tracer.utils.hf_utils import load_transcoders

    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("config.yaml")):
        config = yaml.safe_load(path.read_text())
        files = sorted(path.parent.glob("layer_*.safetensors"))
        config |= {"transcoders": [str(path.parent / f"layer_{n}.safetensors") for n in range(len(files))]}
        for n, own in enumerate(load_transcoders(config, device=torch.device("cpu"))):
            x_Nd = torch.load(folder / "x.pt")
            found[f"{path.parent.relative_to(folder)}/layer_{n}"] = {"code": own.encode(x_Nd), "decoded": own(x_Nd)}
    return found


WORK = {
    "sae-lens save": sae_lens_saves,
    "dictionary-learning save": dictionary_learning_saves,
    "dictionary-learning load": dictionary_learning_loads,
    "sparsify save": sparsify_saves,
    "sparsify load": sparsify_loads,
    "circuit-tracer save": circuit_tracer_saves,
    "circuit-tracer load": circuit_tracer_loads,
}

if __name__ == "__main__":
    _, library, what, where = sys.argv
    with torch.no_grad():
        torch.save(WORK[f"{library} {what}"](Path(where)), Path(where) / "found.pt")
