"""The plain file: any architecture in, the same code and reconstruction out."""

import json

import pytest
import torch
from safetensors import safe_open

import saeopt
from saeopt.config.sites import Site
from saeopt.errors import UserError
from saeopt.exports.formats import FORMATS, About, get_format, nearest_format
from saeopt.exports.plain import Plain
from saeopt.saes.base import Widths
from saeopt.saes.portable import portable
from saeopt.saes.registry import ARCHITECTURES
from saeopt.testing.cases import activations, build, normalise_awkwardly

KINDS = ("none", "scale", "mean_scale", "whiten")
OWN = ("hard_concrete", "gated_hard_concrete")
HOOK = Site.of("blocks.1.hook_resid_pre")


def large_mean(n: int = 64) -> torch.Tensor:
    """Activations whose mean is some hundred times their spread."""
    return 300 + 2 * activations(n)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sae_type", [name for name in ARCHITECTURES if name not in OWN])
def test_what_is_read_back_is_the_sae(sae_type, kind, tmp_path):
    sae, x_Nd = normalise_awkwardly(build(sae_type, {"normalize_activations": kind}, recipe=3)), large_mean()
    Plain().write(portable(sae), About(HOOK, metrics={"l0": 3.0}), tmp_path)
    ((key, found),) = saeopt.load(tmp_path).items()
    assert key == HOOK.key
    torch.testing.assert_close(found.encode(x_Nd), sae.encode(x_Nd), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found(x_Nd), sae(x_Nd), rtol=1e-9, atol=1e-9)


def test_an_architecture_that_no_other_tool_has_is_written_with_its_own_tensors(tmp_path):
    sae = normalise_awkwardly(build("hard_concrete", {"normalize_activations": "whiten"}, recipe=3))
    (path,) = Plain().write_whole(sae, About(HOOK), tmp_path)
    with safe_open(path, "pt") as file:
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        metadata = file.metadata()
    folded = sae.folded().state_dict()
    assert found.keys() >= {name for name, _ in sae.named_parameters()}
    assert not found.keys() & {"mean", "scale", "whitening", "tokens_since_fired"}
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, folded[name])
    assert list(metadata) == ["saeopt"]  # of several keys the file's order would be random
    assert json.loads(metadata["saeopt"])["form"] == "own"
    (again,), x_Nd = saeopt.load(tmp_path).values(), large_mean()
    torch.testing.assert_close(again.encode(x_Nd), sae.encode(x_Nd), rtol=1e-9, atol=1e-9)


def test_equal_saes_are_equal_files(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Plain().write(portable(build("jumprelu")), About(HOOK), tmp_path / name)
    assert (tmp_path / "a/sae.safetensors").read_bytes() == (tmp_path / "b/sae.safetensors").read_bytes()


def test_the_registry():
    for name in FORMATS:
        assert get_format(name).name == name
    with pytest.raises(UserError, match="--to safetensor: no such format; did you mean 'safetensors'"):
        get_format("safetensor")
    assert nearest_format(None, HOOK) == "safetensors"


@pytest.mark.parametrize(("writes", "layer"), [(("blocks.3.hook_mlp_out",), 3), (("hook_embed",), None)])
def test_the_layer_of_a_site(writes, layer):
    assert About(Site(("blocks.2.hook_resid_mid",), writes, "x")).layer == layer


def test_a_transcoder_is_read_back(tmp_path):
    sae, x_Nd = normalise_awkwardly(build("jumprelu", widths=Widths((6,), (4,), False))), large_mean()
    Plain().write(portable(sae), About(Site(("a",), ("b",), "a->b")), tmp_path)
    torch.testing.assert_close(saeopt.load(tmp_path)["a->b"](x_Nd), sae(x_Nd), rtol=1e-9, atol=1e-9)
