"""Who owns a stack's tensors. The members' modules are views of them, so that evaluation and checkpoints read modules.

Shape suffixes: M members, d model width, h dictionary width, V all one-dimensional parameters of a member end
to end. Encoder matrices are stored (M, h, d), like the decoder, so that a latent is a row everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from saeopt.saes.base import SAE
from saeopt.training.step.books import without
from saeopt.training.step.contract import EXTRA, Store
from saeopt.training.step.forms import Form

VECTORS = "vectors"


class Own:
    """Every module keeps its tensors, whatever their shapes; only the counters of silent tokens lie together."""

    def __init__(self, saes: Sequence[SAE]) -> None:
        self.saes = list(saes)
        self.moments: list[Store] = [
            {f"{kind}.{n}": torch.zeros_like(p) for n, p in sae.named_parameters() for kind in ("m", "v")}
            for sae in saes
        ]
        self._gather()

    def _gather(self) -> None:
        self.since_Mh = torch.stack([sae.tokens_since_fired for sae in self.saes])
        for sae, since_h in zip(self.saes, self.since_Mh, strict=True):
            sae.tokens_since_fired.data = since_h

    def state(self, member: int) -> Store:
        """One member's moments."""
        return self.moments[member]

    def loading(self, member: int) -> None:
        """Nothing follows from the weights here."""

    def loaded(self, member: int) -> None:
        """Nor from the state."""

    def remove(self, member: int) -> None:
        """One member leaves with its tensors."""
        gone = self.saes.pop(member)
        gone.tokens_since_fired.data = gone.tokens_since_fired.data.clone()
        del self.moments[member]
        if self.saes:
            self._gather()


class Packed:
    """Weights, Adam moments and buffers of M members, and the copies of weights that hand-written passes read.

    `weights`, `m` and `v` hold {matrix name: (M, h, d)} and `VECTORS`: (M, V); `buffers` {name: (M, …)}. The
    tensors are written in place and keep their addresses until a member is removed, as CUDA graphs need it.
    `low` holds the matrices in the dtype of the products, the decoder as it is used; `norm_Mh` ‖W_dec‖.

    Args:
        own_norms: the optimiser computes the norms in an order of its own: their last bits do not follow from the
            weights, and are state.
    """

    def __init__(self, saes: Sequence[SAE], form: Form, low_dtype: torch.dtype, *, own_norms: bool = False) -> None:
        first, self.form, self.low_dtype = saes[0], form, low_dtype
        self.d, self.h, self.dtype, self.device = first.d, first.h, first.W_enc.dtype, first.W_enc.device
        shapes = {name: parameter.shape for name, parameter in first.named_parameters()}
        self.shapes = shapes
        self.matrices = [n for n, s in shapes.items() if len(s) == 2]
        self.slices: dict[str, slice] = {}
        at = 0
        for name, shape in shapes.items():
            if len(shape) < 2:
                self.slices[name] = slice(at, at + shape.numel())
                at += shape.numel()
        self.rules = [(self.slices[name], rule) for name, rule in first.rules.items()]
        """Parts of the vectors that are stepped in a way of their own."""
        self.weights = self._gather(saes)
        self.m = {name: torch.zeros_like(tensor) for name, tensor in self.weights.items()}
        self.v = {name: torch.zeros_like(tensor) for name, tensor in self.weights.items()}
        names = [name for name, _ in first.named_buffers()]
        self.buffers = {name: torch.stack([sae.get_buffer(name) for sae in saes]) for name in names}
        self.norms = {"norm": torch.ones(len(saes), self.h, dtype=self.dtype, device=self.device)}
        if own_norms and form.directions:
            self.norms["factor"] = torch.ones_like(self.norms["norm"])
        self.own_norms = own_norms
        self.attach(saes)
        self._copy()
        self.refresh()

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
        self.saes = list(saes)
        self.parameters = [tuple(sae.parameters()) for sae in saes]
        for i, sae in enumerate(saes):
            for name, parameter in sae.named_parameters():
                parameter.data = self.member_view(self.weights, name, i)
                parameter.grad = None
            for name, buffer in sae.named_buffers():
                buffer.data = self.buffers[name][i]

    @property
    def since_Mh(self) -> Tensor:
        """Tokens since each latent fired."""
        return self.buffers["tokens_since_fired"]

    @property
    def norm_Mh(self) -> Tensor:
        """‖W_dec‖ per row; ones where it is kept there."""
        return self.norms["norm"]

    @property
    def factor_Mh(self) -> Tensor | None:
        """What W_dec's rows are multiplied by to be decoded with, where the optimiser keeps it."""
        return self.norms.get("factor")

    # ---- members that come and go
    def state(self, member: int) -> Store:
        """One member's moments, and its norms where they are state."""
        moments = {
            f"{kind}.{name}": self.member_view(store, name, member)
            for name in self.shapes
            for kind, store in (("m", self.m), ("v", self.v))
        }
        norms = {EXTRA + name: tensor[member] for name, tensor in self.norms.items()} if self.own_norms else {}
        return moments | norms

    def loading(self, member: int) -> None:
        """A member's weights were loaded: copies and norms follow from them."""
        self.refresh(slice(member, member + 1))

    def loaded(self, member: int) -> None:
        """A member's norms were loaded: the decoder follows from them."""
        self._decode_with(slice(member, member + 1))

    def remove(self, member: int) -> None:
        """Repack without one member, whose module gets tensors of its own."""
        gone = self.saes[member]
        for tensor in (*gone.parameters(), *gone.buffers()):
            tensor.data = tensor.data.clone()
        for store in (self.weights, self.m, self.v, self.buffers, self.norms):
            for name, tensor in store.items():
                store[name] = without(tensor, member)
        self.attach([sae for i, sae in enumerate(self.saes) if i != member])
        self._copy()
        norms = {name: tensor.clone() for name, tensor in self.norms.items()}
        self.refresh()
        if self.own_norms:
            for name, tensor in norms.items():
                self.norms[name].copy_(tensor)
            self._decode_with(slice(None))

    # ---- copies
    def shares(self, name: str) -> bool:
        """Whether the passes read a matrix itself."""
        return self.low_dtype == self.dtype and not (self.form.directions and name == "W_dec")

    def _copy(self) -> None:
        self.low = {
            name: tensor if self.shares(name) else torch.empty_like(tensor, dtype=self.low_dtype)
            for name, tensor in self.weights.items()
            if name != VECTORS
        }

    def refresh(self, rows: slice = slice(None)) -> None:
        """Copies of some members' weights, from the weights."""
        if rows == slice(None):
            self._seen = [-1] * len(self.saes)
        self._seen[rows] = [self._version(i) for i in range(len(self.saes))[rows]]
        W_dec = self.weights["W_dec"][rows]
        if self.form.directions or not self.form.unit:
            torch.linalg.vector_norm(W_dec, dim=-1, out=self.norm_Mh[rows])
        factor_Mh = self.row_factor() if self.form.directions else None
        if self.factor_Mh is not None and factor_Mh is not None:
            self.factor_Mh[rows] = factor_Mh[rows]
        for name, copy in self.low.items():
            if name == "W_dec" and factor_Mh is not None:
                copy[rows] = W_dec * factor_Mh[rows].unsqueeze(-1)
            elif not self.shares(name):
                copy[rows] = self.weights[name][rows]

    def refresh_changed(self) -> bool:
        """Copies of what was written to from outside; whether there was anything."""
        changed = [i for i, seen in enumerate(self._seen) if self._version(i) != seen]
        for i in changed:
            self.refresh(slice(i, i + 1))
        return bool(changed)

    def _version(self, member: int) -> int:
        """Grows when a module's parameter is written to (a checkpoint is loaded), not when the stack steps."""
        return sum(parameter._version for parameter in self.parameters[member])

    def _decode_with(self, rows: slice) -> None:
        if self.factor_Mh is not None:
            self.low["W_dec"][rows] = self.weights["W_dec"][rows] * self.factor_Mh[rows].unsqueeze(-1)

    def row_factor(self) -> Tensor:
        """hard_concrete decodes with rows of norm `row_norm`: W_dec times this."""
        return self.buffers["row_norm"].unsqueeze(-1) / self.norm_Mh.clamp_min(1e-12)
