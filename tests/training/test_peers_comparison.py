"""`scripts/compare_peers.py`: what saeopt trains there is measured as it was trained, thresholds and k included."""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
import compare_peers
from peers.comparison import OWN, Comparison


@pytest.fixture
def comparison(tmp_path, monkeypatch):
    x_Nd = torch.randn(5 * 512, 16, generator=torch.Generator().manual_seed(0)) + 3
    parts = {"train": x_Nd, "chosen_on": x_Nd[:700].clone(), "reported_on": x_Nd[700:1500].clone()}
    save_file(parts, tmp_path / "x.safetensors")
    arguments = [
        "--harvested",
        str(tmp_path / "x.safetensors"),
        "--tokens",
        str(5 * 512),
        "--out",
        str(tmp_path / "out"),
    ]
    monkeypatch.setattr(sys, "argv", ["compare_peers.py", *arguments, "--architectures", "batch_topk,jumprelu"])
    options = compare_peers.arguments()
    options.out.mkdir()
    return Comparison(options)


@pytest.mark.parametrize("kind", ["topk", "batch_topk", "matryoshka_batch_topk", "jumprelu"])
def test_saved_and_measured_as_trained(comparison, kind):
    job = compare_peers.jobs_of(comparison.options, OWN, kind)[0]
    comparison.train_own([job])
    saved = load_file(job.path(comparison.out))
    (point,) = comparison.measure([job])
    loaded = comparison.sae(job)
    assert all(torch.equal(t, loaded.state_dict()[name]) for name, t in saved.items())
    assert ("threshold" in saved) == (kind != "topk")
    if kind != "jumprelu":  # k of all tokens: a threshold that was lost would leave half of the dictionary
        assert point.metrics["reported_on"]["l0"] == pytest.approx(job.sparsity, rel=0.4)
    assert 0 < point.metrics["reported_on"]["fvu"] < 2


def test_dictionary_learning_is_asked_for_an_l0_and_others_for_a_coefficient(comparison):
    wanted = {
        s: [job.sparsity for job in compare_peers.jobs_of(comparison.options, s, "jumprelu")]
        for s in (OWN, "sae-lens", "dictionary-learning")
    }
    assert min(wanted["dictionary-learning"]) > max(wanted[OWN])
    assert wanted[OWN] == wanted["sae-lens"]
    given = Namespace(**{**vars(comparison.options), "sparsity": ["sae-lens:jumprelu=3", "jumprelu=1,2"]})
    found = {s: [job.sparsity for job in compare_peers.jobs_of(given, s, "jumprelu")] for s in (OWN, "sae-lens")}
    assert {s: sorted(set(values)) for s, values in found.items()} == {OWN: [1.0, 2.0], "sae-lens": [3.0]}
