"""Storage of a fused stack: every parameter of all members in a few tensors, the members' modules as views of them.

Shape suffixes: M members, N tokens, d model width, h dictionary width, V all one-dimensional parameters of a
member end to end. Encoder matrices are stored (M, h, d), like the decoder, so that a latent is a row everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from saeopt.saes.base import SAE

VECTORS = "vectors"


class Packed:
    """Weights and Adam moments of M members as `matrices` {name: (M, h, d)} and one (M, V) tensor of vectors.

    The tensors are written in place only; `W.matrices[...]` keeps its address until a member is removed, as
    captured CUDA graphs need it.
    """

    def __init__(self, saes: Sequence[SAE]) -> None:
        first = saes[0]
        shapes = {name: parameter.shape for name, parameter in first.named_parameters()}
        self.transposed = {n for n, s in shapes.items() if len(s) == 2 and n != "W_dec"}
        self.matrix_names = [n for n, s in shapes.items() if len(s) == 2]
        self.slices: dict[str, slice] = {}
        at = 0
        for name, shape in shapes.items():
            if len(shape) < 2:
                self.slices[name] = slice(at, at + shape.numel())
                at += shape.numel()
        self.shapes, self.n_vector = shapes, at
        self.weights = self._gather(saes)
        self.m = {name: torch.zeros_like(tensor) for name, tensor in self.weights.items()}
        self.v = {name: torch.zeros_like(tensor) for name, tensor in self.weights.items()}
        self.since_fired = torch.stack([sae.tokens_since_fired for sae in saes])
        self.scale = torch.stack([sae.scale for sae in saes])
        self.attach(saes)

    def _gather(self, saes: Sequence[SAE]) -> dict[str, Tensor]:
        gathered = {}
        for name in self.matrix_names:
            rows = [dict(sae.named_parameters())[name].detach() for sae in saes]
            gathered[name] = torch.stack([r.T if name in self.transposed else r for r in rows]).contiguous()
        vectors = [
            torch.cat([p.detach().reshape(-1) for n, p in sae.named_parameters() if n in self.slices]) for sae in saes
        ]
        gathered[VECTORS] = torch.stack(vectors)
        return gathered

    # ---- views
    def vector(self, name: str) -> Tensor:
        """The one-dimensional parameter of all members, (M, its length)."""
        return self.weights[VECTORS][:, self.slices[name]]

    def member_view(self, store: dict[str, Tensor], name: str, member: int) -> Tensor:
        """One parameter of one member in the module's own shape."""
        if name in self.slices:
            return store[VECTORS][member, self.slices[name]].view(self.shapes[name])
        return store[name][member].T if name in self.transposed else store[name][member]

    def attach(self, saes: Sequence[SAE]) -> None:
        """Make the modules' parameters and buffers views of the stack's tensors."""
        for i, sae in enumerate(saes):
            for name, parameter in sae.named_parameters():
                parameter.data = self.member_view(self.weights, name, i)
                parameter.grad = None
            sae.tokens_since_fired.data = self.since_fired[i]
            sae.scale.data = self.scale[i]

    def remove(self, saes: Sequence[SAE], member: int) -> None:
        """Repack without one member, whose module gets tensors of its own."""
        gone = saes[member]
        for tensor in (*gone.parameters(), gone.tokens_since_fired, gone.scale):
            tensor.data = tensor.data.clone()
        keep = [i for i in range(len(saes)) if i != member]
        for store in (self.weights, self.m, self.v):
            for name in store:
                store[name] = store[name][keep]
        self.since_fired, self.scale = self.since_fired[keep], self.scale[keep]
        self.attach([saes[i] for i in keep])

    # ---- what the modules do to the weights behind the stack's back
    @staticmethod
    def version(saes: Sequence[SAE]) -> int:
        """Grows when a module's parameter is written to (loading a checkpoint), not when the stack steps."""
        return sum(parameter._version for sae in saes for parameter in sae.parameters())
