"""`saeopt export --to safetensors` and back: any architecture of saeopt, autoencoders and transcoders."""

import pytest
import torch

import saeopt
from saeopt.config.sites import Site
from saeopt.errors import UserError
from saeopt.exports.formats import About
from saeopt.exports.plain import Plain
from saeopt.saes.base import Widths
from saeopt.saes.portable import portable
from saeopt.saes.registry import ARCHITECTURES
from saeopt.testing.cases import activations, build, normalise_awkwardly

HOOK = Site.of("blocks.1.hook_resid_pre")
BETWEEN = Site(("blocks.1.hook_resid_mid",), ("blocks.1.hook_mlp_out",), "mlp")


def write(sae, site, folder):
    if "hard_concrete" in sae.config.sae_type:
        Plain().write_whole(sae, About(site), folder)
    else:
        Plain().write(portable(sae), About(site), folder)


@pytest.mark.parametrize("kind", ["none", "mean_scale", "whiten"])
@pytest.mark.parametrize("widths", [None, Widths((6,), (4,), False)])
@pytest.mark.parametrize("sae_type", ARCHITECTURES)
def test_what_left_comes_back(sae_type, widths, kind, tmp_path):
    sae = normalise_awkwardly(build(sae_type, {"normalize_activations": kind}, recipe=3, widths=widths))
    site = HOOK if widths is None else BETWEEN
    write(sae, site, tmp_path)
    ((key, found),) = saeopt.load(tmp_path).items()
    assert key == site.key
    x_Nd = 20 + activations()
    torch.testing.assert_close(found.encode(x_Nd), sae.encode(x_Nd))
    torch.testing.assert_close(found(x_Nd), sae(x_Nd))


def test_no_module_is_imported_because_a_file_names_it(tmp_path):
    sae = build("hard_concrete")
    sae.config = sae.config.model_copy(update={"sae_type": "os:path"})
    Plain().write_whole(sae, About(HOOK), tmp_path)
    with pytest.raises(UserError, match="its architecture 'os:path' is none of saeopt's"):
        saeopt.load(tmp_path)
