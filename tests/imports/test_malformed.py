"""Files that are not as their tools write them: one line that names the file, never a traceback."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import saeopt
from saeopt.errors import UserError

D, H = 6, 10
JUNK = [None, [], {}, "x", "", -1, 0, 2.5, 1e300, True, [1, 2], {"a": []}]


def tensors(**shapes):
    generator = torch.Generator().manual_seed(0)
    return {name.replace("__", "."): torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def plain(transposed=False):
    return tensors(W_enc=(H, D) if transposed else (D, H), b_enc=(H,), W_dec=(H, D), b_dec=(D,))


def sae_lens(folder):
    save_file(plain(), folder / "sae_weights.safetensors")
    (folder / "activation_scaler.json").write_text('{"scaling_factor": 0.5, "has_whitening": false}')
    more = {
        "k": 3,
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "rescale_acts_by_decoder_norm": False,
    }
    metadata = {"hook_name": "blocks.0.hook_resid_pre", "hook_head_index": None}
    return folder / "cfg.json", {"architecture": "topk", "d_in": D, "d_sae": H, "metadata": metadata, **more}


def dictionary_learning(folder):
    linear = tensors(encoder__weight=(H, D), encoder__bias=(H,), decoder__weight=(D, H), b_dec=(D,))
    torch.save({**linear, "k": torch.tensor(3), "threshold": torch.tensor(0.1)}, folder / "ae.pt")
    trainer = {"dict_class": "AutoEncoderTopK", "k": 3, "submodule_name": "resid_post_layer_1"}
    return folder / "config.json", {"trainer": trainer, "buffer": {}}


def sparsify(folder):
    save_file(tensors(encoder__weight=(H, D), encoder__bias=(H,), W_dec=(H, D), b_dec=(D,)), folder / "sae.safetensors")
    site = {"reads": ["a"], "writes": ["b"], "key": "here"}
    return folder / "cfg.json", {"d_in": D, "num_latents": H, "k": 3, "transcode": True, "saeopt_site": site}


def circuit_tracer(folder):
    save_file(plain(transposed=True), folder / "layer_0.safetensors")
    hooks = {"feature_input_hook": "hook_resid_mid", "feature_output_hook": "hook_mlp_out"}
    return folder / "config.yaml", {"model_kind": "transcoder_set", **hooks, "transcoders": ["layer_0.safetensors"]}


def replaced(folder):
    names = tensors(encoder__weight=(2 * H, D), encoder__bias=(2 * H,), decoder__weight=(D, H), decoder__bias=(D,))
    torch.save(
        {f"a-b.{name}": t for name, t in names.items()} | {"a-b.beta": torch.tensor(0.5)}, folder / "samples_5.pt"
    )
    limits = {"hard_concrete_stretch_limits": [-0.1, 1.1], "magnitude_activation": None, "input_dependent_gates": True}
    return folder / "final_config.yaml", {"saes": {"sae_type": "hard_concrete", "sae_positions": ["a.b"], **limits}}


FORMATS = [sae_lens, dictionary_learning, sparsify, circuit_tracer, replaced]


def write(path: Path, config) -> None:
    path.write_text(json.dumps(config) if path.suffix == ".json" else yaml.safe_dump(config))


def changed(config):
    """Every field of it, also in the sections, as something else or left out."""
    for name, value in config.items():
        yield {key: v for key, v in config.items() if key != name}
        for junk in JUNK:
            yield {**config, name: junk}
        if isinstance(value, dict):
            for inner in changed(value):
                yield {**config, name: inner}


def told(folder) -> str | None:
    """The error, which is a line; None where it loads."""
    try:
        saes = saeopt.load(folder)
    except UserError as error:
        message = str(error)
    else:
        assert all(sae(torch.randn(3, D)).shape == (3, D) for sae in saes.values())
        return None
    assert "\n" not in message
    return message


@pytest.mark.parametrize("make", FORMATS)
def test_any_value_in_a_config_loads_or_is_refused(make, tmp_path):
    path, config = make(tmp_path)
    write(path, config)
    assert told(tmp_path) is None
    for other in changed(config):
        write(path, other)
        told(tmp_path)
    for text in ("", "[]", "{", "null", "\0", '{"a": 1}', "- a\n- b"):
        path.write_text(text)
        assert told(tmp_path) is not None
    path.write_bytes(b"\xff\xfe\x00")
    assert told(tmp_path) is not None


def broken(found):
    """Weights without one of the tensors, with one of another shape, and with one more."""
    for name, tensor in found.items():
        yield {key: t for key, t in found.items() if key != name}
        yield {**found, name: torch.zeros(3, 5)}
        if tensor.is_floating_point():
            yield {**found, name: tensor * torch.nan}
    yield {**found, ("a-b.more" if any(name.startswith("a-b") for name in found) else "more"): torch.zeros(2)}
    yield {}


@pytest.mark.parametrize("make", FORMATS)
def test_weights_that_do_not_fit_are_refused(make, tmp_path):
    path, config = make(tmp_path)
    write(path, config)
    (weights,) = [p for p in tmp_path.iterdir() if p.suffix in (".pt", ".safetensors")]
    torch_file = weights.suffix == ".pt"
    found = torch.load(weights) if torch_file else load_file(weights)
    for other in broken(found):
        (torch.save if torch_file else save_file)(other, weights)
        message = told(tmp_path)
        unread = "threshold" in {name for name in (*found, *other) if found.get(name) is not other.get(name)}
        assert message is not None or unread  # topk does without its threshold
        assert message is None or weights.name in message
    weights.write_bytes(b"no weights")
    assert weights.name in str(told(tmp_path))
    (torch.save if torch_file else save_file)({**found, "more": torch.zeros(20_000)}, weights)
    whole = weights.read_bytes()
    for kept in (0, len(whole) // 4, len(whole) // 2, len(whole) - 1):
        weights.write_bytes(whole[:kept])
        assert f"{weights.name}: truncated or damaged" in str(told(tmp_path))
