"""Exports for SAELens, loaded by its own loader: code, reconstruction, and what it knows besides the weights."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from interop import run_worker
from torch import Tensor

from saeopt.config.sites import Site
from saeopt.exports.formats import About
from saeopt.exports.sae_lens import SAELens
from saeopt.saes.base import SAE, Widths
from saeopt.saes.portable import Portable, portable
from saeopt.testing.cases import activations, build, normalise_awkwardly

D, H, N = 6, 24, 200
AUTOENCODER, TRANSCODER = (
    Site.of("blocks.1.hook_resid_pre"),
    Site(("blocks.1.hook_resid_mid",), ("blocks.1.hook_mlp_out",), "mlp"),
)
HEADS = Site.of("blocks.1.attn.hook_z")
THEIRS = {"relu": "standard", "gated": "gated", "topk": "topk"}


@dataclass(frozen=True)
class Case:
    """An SAE and how it leaves."""

    sae_type: str
    kind: str
    site: Site = AUTOENCODER
    unit: bool = False
    fields: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float64

    @property
    def name(self) -> str:
        site = {AUTOENCODER: "", TRANSCODER: "-transcoder", HEADS: "-heads"}[self.site]
        number = "" if self.dtype == torch.float64 else "-float32"
        return f"{self.sae_type}-{self.kind}{site}{'-unit' if self.unit else ''}{number}"

    def build(self) -> SAE:
        widths = Widths((D,), (4,), False) if self.site == TRANSCODER else None
        fields = {**self.fields, "normalize_activations": self.kind}
        sae = normalise_awkwardly(build(self.sae_type, fields, d=D, h=H, recipe=3, dtype=self.dtype, widths=widths))
        if "batch" in self.sae_type:
            sae.get_buffer("threshold").fill_(0.8)
        return sae


KINDS = ("none", "scale", "mean_scale", "whiten")
ARCHITECTURES = ("relu", "gated", "topk", "jumprelu", "batch_topk", "matryoshka_batch_topk")
CASES = [
    *(Case(sae_type, kind) for sae_type in ARCHITECTURES for kind in KINDS),
    *(Case(sae_type, "mean_scale", unit=True) for sae_type in ARCHITECTURES),
    *(Case(t, kind, TRANSCODER) for t in ("relu", "jumprelu", "batch_topk") for kind in KINDS),
    Case("jumprelu", "mean_scale", HEADS),
    *(Case(sae_type, "mean_scale", dtype=torch.float32) for sae_type in ARCHITECTURES),
]  # fmt: skip


def given_x(case: Case) -> Tensor:
    """Activations whose mean is 20 times their spread, so that a forgotten mean would show everywhere."""
    return (20 + activations(N, D)).to(case.dtype)


STRICT = "on-the-threshold"


def on_the_threshold() -> tuple[Portable, Tensor]:
    """A jumprelu whose first threshold is exactly π of the first token."""
    form, x_Nd = portable(build("jumprelu", d=D, h=H)), activations(2, D)
    pre_h = ((x_Nd - form.b_dec) @ form.W_enc + form.b_enc)[0]
    sign = 1.0 if pre_h[0] > 0 else -1.0  # a negative π is never on a threshold
    form = replace(form, W_enc=form.W_enc * sign, b_enc=form.b_enc * sign)
    assert form.threshold is not None
    return replace(form, threshold=form.threshold.index_fill(0, torch.tensor(0), pre_h[0].abs().item())), x_Nd


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What SAELens makes of every case, in one process."""
    folder = tmp_path_factory.mktemp("sae-lens")
    for case in CASES:
        target, x_Nd = folder / case.name, given_x(case)
        target.mkdir()
        form = portable(case.build())
        assert SAELens().problem(form, case.site) is None
        SAELens().write(form.unit_rows() if case.unit else form, About(case.site, model="m", prepend_bos=False), target)
        torch.save(x_Nd.view(2, N // 2, 2, D // 2) if case.site == HEADS else x_Nd, target / "x.pt")
    form, x_Nd = on_the_threshold()
    (folder / STRICT).mkdir()
    SAELens().write(form, About(AUTOENCODER), folder / STRICT)
    torch.save(x_Nd, folder / STRICT / "x.pt")
    run_worker("sae-lens", Path(__file__).with_name("sae_lens_worker.py"), folder)
    return {case.name: torch.load(folder / case.name / "found.pt") for case in CASES} | {
        STRICT: torch.load(folder / STRICT / "found.pt")
    }


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_its_code_and_reconstruction_are_ours(found: dict[str, dict[str, Any]], case: Case) -> None:
    sae, theirs, x_Nd = case.build(), found[case.name], given_x(case)
    if case.unit:
        sae = sae.unit_decoder()
    code, y_Ne = sae.encode(x_Nd), sae(x_Nd)
    assert 0 < (code != 0).double().mean() < 1
    # float32: what is added up is as large as the mean times the encoder, 20 times the code
    close = {"rtol": 1e-5, "atol": 1e-5 if case.dtype == torch.float64 else 3e-4}
    torch.testing.assert_close(theirs["code"].reshape(code.shape), code, **close)
    for name in ("decoded", "forward"):
        torch.testing.assert_close(theirs[name].reshape(y_Ne.shape), y_Ne, **close)
    assert theirs["dtype"] == str(case.dtype)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_what_it_knows_of_the_sae(found: dict[str, dict[str, Any]], case: Case) -> None:
    theirs = found[case.name]
    base = THEIRS.get(case.sae_type, "jumprelu")
    transcoder = "transcoder" if case.sae_type == "relu" else "jumprelu_transcoder"
    assert theirs["architecture"] == (transcoder if case.site == TRANSCODER else base)
    assert (theirs["trained"], theirs["model"], theirs["hook"]) == (case.sae_type, "m", case.site.reads[0])
    assert theirs["hook_out"] == (case.site.writes[0] if case.site == TRANSCODER else None)


def test_a_threshold_is_compared_strictly_there_too(found: dict[str, dict[str, Any]]) -> None:
    form, x_Nd = on_the_threshold()
    assert form.encode(x_Nd)[0, 0] == found[STRICT]["code"][0, 0] == 0
    assert (form.encode(x_Nd) != 0).equal(found[STRICT]["code"] != 0)


@pytest.mark.parametrize(
    ("sae_type", "site", "why"),
    [
        ("topk", TRANSCODER, "no topk transcoder"),
        ("gated", TRANSCODER, "no gated transcoder"),
        ("relu", Site(("a", "b"), ("a", "b"), "a+b"), "over several hook points"),
        ("relu", Site(("blocks.0.attn.hook_z",), ("blocks.0.hook_attn_out",), "z"), "heads side by side"),
    ],
)
def test_what_it_cannot_say(sae_type: str, site: Site, why: str) -> None:
    form = portable(build(sae_type, widths=Widths((D,), (4,), False)))
    assert why in str(SAELens().problem(form, site))
