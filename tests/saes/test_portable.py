"""The evaluation form that leaves for other tools has the code and the reconstruction of the SAE, in raw units."""

import pytest
import torch
from sae_cases import IDS, VARIANTS, activations, build

from saeopt.errors import UserError
from saeopt.saes.base import Widths
from saeopt.saes.portable import portable
from saeopt.testing.cases import normalise_awkwardly

TRANSCODER = Widths((6,), (4,), False)


@pytest.mark.parametrize(
    ("kind", "widths"), [("none", None), ("mean_scale", None), ("whiten", None), ("mean_scale", TRANSCODER)]
)
@pytest.mark.parametrize(("sae_type", "fields"), VARIANTS, ids=IDS)
def test_the_portable_form_is_the_sae(sae_type, fields, kind, widths):
    x_Nd = 3 + 2 * activations(64)
    sae = normalise_awkwardly(build(sae_type, {**fields, "normalize_activations": kind}, widths=widths, recipe=3))
    if hasattr(sae, "threshold") and not isinstance(sae.threshold, torch.nn.Parameter):
        sae.threshold.fill_(0.7)
    if "hard_concrete" in sae_type or fields.get("magnitude_activation", "relu") != "relu":
        with pytest.raises(UserError, match="no format of other tools"):
            portable(sae)
        return
    form, f_Nh = portable(sae), sae.encode(x_Nd)
    assert (f_Nh > 0).any()
    assert (form.d, form.h, form.e) == (sae.d, sae.h, sae.e)
    plain = form.without_bias_in_x()
    for other in (form, plain, plain.with_bias_in_x() if widths is None else plain):
        torch.testing.assert_close(other.encode(x_Nd), f_Nh, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(other.decode(f_Nh), sae.decode(f_Nh), rtol=1e-9, atol=1e-9)
    if form.selection_holds:
        unit = form.unit_rows()
        torch.testing.assert_close(unit.W_dec.norm(dim=-1), torch.ones(form.h).double())
        torch.testing.assert_close(unit.encode(x_Nd), sae.unit_decoder().encode(x_Nd), rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(unit.decode(unit.encode(x_Nd)), sae(x_Nd), rtol=1e-8, atol=1e-8)
    else:
        assert sae_type == "topk"


def test_the_unit_form_is_not_made_portable_twice():
    with pytest.raises(UserError, match="unit_decoder"):
        portable(build("relu").unit_decoder())
