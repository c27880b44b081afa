"""Storage of a fused stack: every parameter of all members in a few tensors, the members' modules as views of them.

Shape suffixes: M members, d model width, h dictionary width, V all one-dimensional parameters of a member end
to end. Encoder matrices are stored (M, h, d), like the decoder, so that a latent is a row everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from saeopt.saes.base import SAE

VECTORS = "vectors"
Store = dict[str, Tensor]


class Packed:
    """Weights, Adam moments and buffers of M members.

    `weights`, `m` and `v` hold {matrix name: (M, h, d)} and `VECTORS`: (M, V); `buffers` {name: (M, …)}. The
    tensors are written in place and keep their addresses until a member is removed, as CUDA graphs need it.
    """

    def __init__(self, saes: Sequence[SAE]) -> None:
        shapes = {name: parameter.shape for name, parameter in saes[0].named_parameters()}
        self.shapes = shapes
        self.matrices = [n for n, s in shapes.items() if len(s) == 2]
        self.slices: dict[str, slice] = {}
        at = 0
        for name, shape in shapes.items():
            if len(shape) < 2:
                self.slices[name] = slice(at, at + shape.numel())
                at += shape.numel()
        self.weights = self._gather(saes)
        self.m = {name: torch.zeros_like(tensor) for name, tensor in self.weights.items()}
        self.v = {name: torch.zeros_like(tensor) for name, tensor in self.weights.items()}
        names = [name for name, _ in saes[0].named_buffers()]
        self.buffers = {name: torch.stack([sae.get_buffer(name) for sae in saes]) for name in names}
        self.attach(saes)

    def _gather(self, saes: Sequence[SAE]) -> Store:
        gathered = {}
        for name in self.matrices:
            rows = [sae.get_parameter(name).detach() for sae in saes]
            gathered[name] = torch.stack([r if name == "W_dec" else r.T for r in rows]).contiguous()
        gathered[VECTORS] = torch.stack(
            [torch.cat([sae.get_parameter(name).detach().view(-1) for name in self.slices]) for sae in saes]
        )
        return gathered

    def vector(self, store: Store, name: str) -> Tensor:
        """A one-dimensional parameter of all members, (M, its length), in `weights` or a store like it."""
        return store[VECTORS][:, self.slices[name]]

    def member_view(self, store: Store, name: str, member: int) -> Tensor:
        """A parameter of one member in the module's own shape."""
        if name in self.slices:
            return store[VECTORS][member, self.slices[name]].view(self.shapes[name])
        return store[name][member] if name == "W_dec" else store[name][member].T

    def attach(self, saes: Sequence[SAE]) -> None:
        """Make the modules' parameters and buffers views of the stack's tensors."""
        self.parameters = [tuple(sae.parameters()) for sae in saes]
        for i, sae in enumerate(saes):
            for name, parameter in sae.named_parameters():
                parameter.data = self.member_view(self.weights, name, i)
                parameter.grad = None
            for name, buffer in sae.named_buffers():
                buffer.data = self.buffers[name][i]

    def remove(self, saes: Sequence[SAE], member: int) -> None:
        """Repack without one member, whose module gets tensors of its own."""
        gone = saes[member]
        for tensor in (*gone.parameters(), *gone.buffers()):
            tensor.data = tensor.data.clone()
        keep = [i for i in range(len(saes)) if i != member]
        for store in (self.weights, self.m, self.v, self.buffers):
            for name in store:
                store[name] = store[name][keep]
        self.attach([saes[i] for i in keep])

    def version(self, member: int) -> int:
        """Grows when a module's parameter is written to (a checkpoint is loaded), not when the stack steps."""
        return sum(parameter._version for parameter in self.parameters[member])
