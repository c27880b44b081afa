"""Run by the interpreter of sae-lens' environment: what its own loader makes of exported folders.

    python sae_lens_worker.py FOLDER
    python sae_lens_worker.py FOLDER RELEASE TABLE     loaded from the hub at HF_ENDPOINT, by an entry of its table

Each folder below FOLDER holds an SAE and `x.pt`; `found.pt` in it gets what the loaded SAE gives. With a release FOLDER
is where `found.pt` goes, and its SAEs are those of TABLE, on the x of `x.pt`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE


def given(sae: Any, x: torch.Tensor) -> dict[str, Any]:
    with torch.no_grad():
        code = sae.encode(x)
        found = {"code": code, "decoded": sae.decode(code), "forward": sae(x)}
    metadata = sae.cfg.metadata
    return {
        **found,
        "architecture": sae.cfg.architecture(),
        "hook": metadata.hook_name,
        "hook_out": metadata.hook_name_out,
        "model": metadata.model_name,
        "trained": metadata.training_architecture,
        "dtype": str(sae.W_enc.dtype),
    }


def from_table(folder: Path, release: str, table: Path) -> None:
    """Each SAE of a release, as its users load it once the entry stands in its table."""
    from sae_lens.loading import pretrained_saes_directory as directory

    directory.files = lambda _: table.parent  # where it looks for pretrained_saes.yaml
    directory.get_pretrained_saes_directory.cache_clear()
    listed = directory.get_pretrained_saes_directory()[release]
    x = torch.load(folder / "x.pt")
    found = {
        key: {**given(SAE.from_pretrained(release, key, dtype=str(x.dtype).removeprefix("torch.")), x),
              "l0": listed.expected_l0[key], "variance": listed.expected_var_explained[key]}
        for key in listed.saes_map
    }  # fmt: skip
    torch.save(found, folder / "found.pt")


if __name__ == "__main__":
    if len(sys.argv) > 2:
        from_table(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
    else:
        for folder in sorted(path.parent for path in Path(sys.argv[1]).rglob("x.pt")):
            torch.save(given(SAE.load_from_disk(folder), torch.load(folder / "x.pt")), folder / "found.pt")
