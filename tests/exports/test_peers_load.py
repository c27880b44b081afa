"""What leaves in a format of another library gives there, by its own loader, the code and x̂ that it gives here."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from peer_sessions import close, run_peer

import saeopt
from saeopt.config.sites import Site
from saeopt.errors import UserError
from saeopt.exports.formats import About, Placed, Release, get_format
from saeopt.exports.making import How, export_saes
from saeopt.exports.sources import Leaving
from saeopt.saes.base import SAE, Widths
from saeopt.saes.portable import Portable, portable
from saeopt.testing.cases import build, normalise_awkwardly

D, H = 6, 15
HOOK = Site.of("blocks.1.hook_resid_post")
FIELDS = {"batch_topk": {"k": 4}, "matryoshka_batch_topk": {"k": 4, "prefixes": [0.2, 0.6, 1.0]}}
CLASSES = {
    "relu": "AutoEncoder",
    "gated": "GatedAutoEncoder",
    "topk": "AutoEncoderTopK",
    "jumprelu": "JumpReluAutoEncoder",
    "batch_topk": "BatchTopKSAE",
    "matryoshka_batch_topk": "MatryoshkaBatchTopKSAE",
}


def large_mean() -> torch.Tensor:
    generator = torch.Generator().manual_seed(4)
    return 80 * torch.randn(D, generator=generator) + 2 * torch.randn(64, D, generator=generator)


def trained(sae_type: str, seed: int = 0, widths: Widths | None = None) -> SAE:
    """An SAE with a mean and a scale as of those activations, thresholds that bite."""
    fields = {"normalize_activations": "mean_scale", **FIELDS.get(sae_type, {})}
    sae = build(sae_type, fields, seed=seed, recipe=3, dtype=torch.float32, widths=widths)
    normalise_awkwardly(sae)
    sae.mean.copy_(large_mean().mean(0))
    if "batch" in sae_type:
        sae.get_buffer("threshold").fill_(0.4)
    return sae


def about(sae: SAE, site: Site = HOOK) -> About:
    config = {"saes": sae.config.model_dump(mode="json")}
    return About(site, model="somebody/model", config=yaml.safe_dump(config), context_size=128, seed=7)


def written(name: str, given: Portable, of: About, folder: Path) -> Placed:
    """One SAE in its place in a folder."""
    form = get_format(name)
    assert form.problem(given, of.site) is None
    place = form.place(of, True)
    (folder / place).mkdir(parents=True, exist_ok=True)
    for path in form.write(given, of, folder / place):
        assert path.exists()
    return Placed(of, place)


def test_dictionary_learning_loads_every_architecture(tmp_path: Path) -> None:
    x_Nd = large_mean()
    torch.save(x_Nd, tmp_path / "x.pt")
    saes = {name: trained(name) for name in CLASSES}
    for name, sae in saes.items():
        written("dictionary-learning", portable(sae), about(sae), tmp_path / name)
    found = run_peer("dictionary-learning", "load", tmp_path)
    assert len(found) == len(CLASSES)
    for name, sae in saes.items():
        theirs = found[f"{name}/blocks.1.hook_resid_post"]
        assert theirs["class"] == CLASSES[name]
        given = portable(sae).unit_rows() if name == "relu" else portable(sae)
        close(given.encode(x_Nd), theirs["code"], f"{name}: code")
        close(sae(x_Nd), theirs["decoded"], f"{name}: reconstruction")
        back = saeopt.load(tmp_path / name)[HOOK.key]
        close(back(x_Nd), theirs["decoded"], f"{name}: read back")


def test_sparsify_loads_topk_saes_and_transcoders(tmp_path: Path) -> None:
    x_Nd = large_mean()
    torch.save(x_Nd, tmp_path / "x.pt")
    mlp = Site(("blocks.0.hook_resid_mid",), ("blocks.0.hook_mlp_out",), "mlp")
    saes = {HOOK: trained("topk"), mlp: trained("topk", 1, Widths((D,), (D,), False))}
    skipping = Site(("blocks.2.hook_resid_mid",), ("blocks.2.hook_mlp_out",), "skip")
    skip = replaced(portable(saes[mlp]), W_skip=torch.randn(D, D, generator=torch.Generator().manual_seed(6)))
    for site, sae in saes.items():
        written("sparsify", portable(sae), about(sae, site), tmp_path / "set")
    written("sparsify", skip, about(saes[mlp], skipping), tmp_path / "set")
    found = run_peer("sparsify", "load", tmp_path)
    assert list(found) == ["layers.1", "mlp", "skip"]
    for name, sae in {"layers.1": saes[HOOK], "mlp": saes[mlp]}.items():
        close(sae.encode(x_Nd), found[name]["code"], f"{name}: code")
        close(sae(x_Nd), found[name]["decoded"], f"{name}: reconstruction")
    close(skip.decode(skip.encode(x_Nd), x_Nd), found["skip"]["decoded"], "skip")
    back = saeopt.load(tmp_path / "set" / "mlp")
    close(back["mlp"](x_Nd), found["mlp"]["decoded"], "read back")


def test_circuit_tracer_loads_a_set_of_transcoders(tmp_path: Path) -> None:
    x_Nd = large_mean()
    torch.save(x_Nd, tmp_path / "x.pt")
    wanted: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for name in ("relu", "jumprelu", "skip"):
        form, placed = get_format("circuit-tracer"), []
        for layer in range(2):
            hooks = (f"blocks.{layer}.hook_resid_mid",), (f"blocks.{layer}.hook_mlp_out",)
            sae = trained("jumprelu" if name == "jumprelu" else "relu", layer, Widths((D,), (D,), False))
            given = portable(sae)
            if name == "skip":
                given = replaced(given, W_skip=torch.randn(D, D, generator=torch.Generator().manual_seed(layer)))
            placed.append(written("circuit-tracer", given, about(sae, Site(*hooks, f"mlp{layer}")), tmp_path / name))
            code = given.encode(x_Nd)
            wanted[f"{name}/layer_{layer}"] = code, given.decode(code, x_Nd)
        release = Release(name, tuple(placed))
        assert form.set_problem(release) is None
        form.finish(release, tmp_path / name)
    found = run_peer("circuit-tracer", "load", tmp_path)
    assert found.keys() == wanted.keys()
    for name, (code, decoded) in wanted.items():
        close(code, found[name]["code"], f"{name}: code")
        close(decoded, found[name]["decoded"], f"{name}: reconstruction")


def replaced(given: Portable, **changes: torch.Tensor) -> Portable:
    from dataclasses import replace

    return replace(given, **changes)


@pytest.mark.parametrize("name", ["dictionary-learning", "sparsify"])
def test_equal_saes_are_equal_files(name: str, tmp_path: Path) -> None:
    sae = trained("topk")
    for folder in ("a", "b"):
        written(name, portable(sae), about(sae), tmp_path / folder)
    one, other = (sorted(p for p in (tmp_path / folder).rglob("*") if p.is_file()) for folder in ("a", "b"))
    assert [p.read_bytes() for p in one] == [p.read_bytes() for p in other]
    assert len(one) == 2


def test_what_a_format_cannot_say_is_told() -> None:
    between = Site(("blocks.0.hook_resid_mid",), ("blocks.0.hook_mlp_out",), "mlp")
    across = Site(("blocks.0.hook_resid_mid",), ("blocks.1.hook_mlp_out",), "far")
    same, other = Widths((D,), (D,), False), Widths((D,), (4,), False)
    told = [
        ("dictionary-learning", "relu", between, same, "it has autoencoders of one hook point alone"),
        ("sparsify", "relu", HOOK, None, "it has topk alone, and no relu"),
        ("sparsify", "topk", between, other, "it writes as wide as it reads (6, and not 4)"),
        ("circuit-tracer", "relu", HOOK, None, "it has transcoders alone, from one hook point of a block to another"),
        ("circuit-tracer", "topk", between, same, "it has no topk transcoder"),
        ("circuit-tracer", "relu", across, same, "its transcoders read and write the same block"),
    ]
    for name, sae_type, site, widths, message in told:
        assert get_format(name).problem(portable(trained(sae_type, widths=widths)), site) == message
    first = Placed(About(Site(("blocks.1.hook_resid_mid",), ("blocks.1.hook_mlp_out",), "one")), ".")
    problem = get_format("circuit-tracer").set_problem(Release("set", (first,)))
    assert problem == "it needs one transcoder for every layer from 0 on (there are those of 1)"


def test_a_card_says_where_the_code_is_longer_and_a_set_with_a_gap_leaves_nothing(tmp_path: Path) -> None:
    words = {
        "relu": "decoder rows have norm 1, the code is longer by as much",
        "gated": "the code is that of the training",
    }
    for sae_type, said in words.items():
        sae = trained(sae_type)
        leaving = [Leaving(about(sae), sae)]
        export_saes(leaving, [HOOK.key], How("dictionary-learning"), tmp_path / sae_type)
        assert said in (tmp_path / sae_type / "README.md").read_text()
    site = Site(("blocks.1.hook_resid_mid",), ("blocks.1.hook_mlp_out",), "one")
    sae = trained("relu", widths=Widths((D,), (D,), False))
    with pytest.raises(UserError, match=r"circuit-tracer: it needs one transcoder for every layer from 0 on"):
        export_saes([Leaving(about(sae, site), sae)], [site.key], How("circuit-tracer"), tmp_path / "gap")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["gated", "relu"]
