"""What the language model loses when x̂ takes the place of x.

Shape suffixes: B samples, T positions, V vocabulary, P = B·T positions in a row, d model width.

Masked positions (special tokens, norm outliers) keep their own activations in every pass. The prediction made AT
position t (of token t+1) counts when position t is unmasked and t+1 exists: these are the positions at which the SAE
acts. All four passes are averaged over the same positions, in nats per token:

    ce_clean        the model as it is
    ce_sae          x̂ at the unmasked positions
    ce_zero         0 at the unmasked positions; with `ce_ablation: all` at the masked ones too, as sae-lens does
    ce_degradation  ce_sae − ce_clean
    ce_recovered    (ce_zero − ce_sae) / (ce_zero − ce_clean): 1 for a perfect SAE, 0 for zero ablation
    kl              mean of KL(clean ‖ spliced) over the vocabulary

The target may be a special token: the end of a document is predicted like any other token.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saeopt.evaluation.metrics import Metrics, divide

LOGITS_BYTES = {"cpu": 2**28, "cuda": 2**31}
"""Memory for one pass's logits in float32."""


def samples_at_once(n_positions: int, vocabulary: int, device: torch.device) -> int:
    """How many samples of `n_positions` tokens fit into the memory for logits, at least one."""
    return max(1, LOGITS_BYTES.get(device.type, 2**28) // (4 * n_positions * vocabulary))


def counted_positions(keep_BT: Bool[Tensor, "B T"]) -> Bool[Tensor, "B T1"]:
    """The positions 0…T−2 whose prediction counts."""
    return keep_BT[:, :-1]


def splice(x_BTd: Float[Tensor, "B T d"], new_BTd: Float[Tensor, "B T d"], keep_BT: Bool[Tensor, "B T"]) -> Tensor:
    """`new` at the unmasked positions, x itself at the others, in the dtype of x."""
    return torch.where(keep_BT.unsqueeze(-1), new_BTd.to(x_BTd.dtype), x_BTd)


def splicer(new_BTd: Tensor | None, keep_BT: Bool[Tensor, "B T"]) -> Callable[[Tensor], Tensor]:
    """The function that a language model applies at a hook point; None stands for zeros."""

    def apply(x_BTd: Tensor) -> Tensor:
        return splice(x_BTd, torch.zeros_like(x_BTd) if new_BTd is None else new_BTd, keep_BT)

    return apply


def cross_entropy_P(logits_PV: Float[Tensor, "P V"], targets_P: Int[Tensor, " P"]) -> Float[Tensor, " P"]:
    """−log p(target) per position, in float32."""
    return torch.nn.functional.cross_entropy(logits_PV.float(), targets_P, reduction="none")


def kl_P(clean_PV: Float[Tensor, "P V"], other_PV: Float[Tensor, "P V"]) -> Float[Tensor, " P"]:
    """KL(clean ‖ other) per position from logits, in float32."""
    clean_PV, other_PV = clean_PV.float().log_softmax(-1), other_PV.float().log_softmax(-1)
    p_PV = clean_PV.exp()
    # a token that the clean model excludes (logit −inf) adds 0, not −inf − (−inf)
    return torch.where(p_PV > 0, p_PV * (clean_PV - other_PV), 0.0).sum(-1)


def sum_counted(values_BT: Tensor, counted_BT: Tensor) -> Tensor:
    """Σ over counted positions in float64; a NaN elsewhere has no influence."""
    return torch.where(counted_BT, values_BT.double(), 0.0).sum()


@torch.no_grad()
def pass_sums(
    clean_BTV: Float[Tensor, "B T V"],
    other_BTV: Float[Tensor, "B T V"],
    tokens_BT: Int[Tensor, "B T"],
    keep_BT: Bool[Tensor, "B T"],
    *,
    with_kl: bool,
) -> Float[Tensor, " two"]:
    """(Σ cross-entropy of `other`, Σ KL(clean ‖ other)) over the counted positions, one sample at a time.

    The KL is 0 where it is not asked for.
    """
    counted_BT = counted_positions(keep_BT)
    sums = torch.zeros(2, dtype=torch.float64, device=other_BTV.device)
    for row in range(
        len(tokens_BT)
    ):  # temporaries of one sample only: log-softmaxes of a batch would triple the memory
        sums[0] += sum_counted(cross_entropy_P(other_BTV[row, :-1], tokens_BT[row, 1:]), counted_BT[row])
        if with_kl:
            sums[1] += sum_counted(kl_P(clean_BTV[row, :-1], other_BTV[row, :-1]), counted_BT[row])
    return sums


class CrossEntropy:
    """Sums of one SAE over batches and, once `sums` is reduced in place, over ranks; :meth:`result` divides."""

    def __init__(self, device: torch.device | str | None = None) -> None:
        self.sums = torch.zeros(5, dtype=torch.float64, device=device)

    def update(self, clean: Tensor, zero: Tensor, sae: Tensor, keep_BT: Bool[Tensor, "B T"]) -> None:
        """Add one batch: what :func:`pass_sums` gave for the clean, the zeroed and the spliced pass."""
        n = counted_positions(keep_BT).sum().double()
        self.sums += torch.stack([n, clean[0], zero[0], sae[0], sae[1]]).to(self.sums.device)

    def result(self) -> Metrics:
        """Means per counted prediction; `n_predictions` says how many there were."""
        n, clean, zero, sae, kl = self.sums.tolist()
        return {
            "ce_clean": divide(clean, n),
            "ce_sae": divide(sae, n),
            "ce_zero": divide(zero, n),
            "ce_degradation": divide(sae - clean, n),
            "ce_recovered": divide(zero - sae, zero - clean),
            "kl": divide(kl, n),
            "n_predictions": int(n),
        }
