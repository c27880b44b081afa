"""What sets the numbers of the members' windows: schedules, and controls that look at the windows before.

A control that only follows the sample count has no state. One that learns from windows keeps its state on the device,
where it is part of the step (also inside CUDA graphs), and in the checkpoints of its members.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from saeopt.saes.numbers import Progress
from saeopt.training.schedules import learning_rate, max_grad_norm
from saeopt.training.step.contract import Numbers, Store

if TYPE_CHECKING:
    from saeopt.training.pack import Member

SAMPLES = "samples"
_STATE = "control."


class Control(Protocol):
    """Sets numbers of some members, all of one stack, for the next window. `name` is that of its state.

    What one control sets, a later one may set otherwise.
    """

    name: str

    def state(self, members: Sequence[Member]) -> Store:
        """What it starts with, {what: (M, …)}; nothing where it does not learn from windows."""
        return {}

    def moves(self, member: Member) -> bool:
        """Whether it is for this member: nothing is kept or told of those in the stack that it only passes over."""
        return True

    def numbers(self, state: Store, samples: int) -> Mapping[str, Sequence[float] | Tensor]:
        """Each member's numbers for the window that ends at `samples`, (M); from the state, if any, on the device."""
        ...

    def verdict(self, state: Store, member: int) -> str | None:
        """What is to be said at the end of training, if something is (a synchronisation)."""
        return None

    def observe(self, state: Store, window: Mapping[str, Tensor]) -> None:
        """Learn from a window: write to the state. Inside CUDA graphs: nothing may wait or be decided on the host.

        `window` holds, each (M) over all micro-batches and ranks: `n` kept tokens, `samples` at its end, the means
        `loss`, `mse`, `sparsity` and `l0`, and the architecture's tallies. Undone for a member that it broke.
        """
        return


class Schedule(Control):
    """A number as a pure function of the sample count."""

    def __init__(self, name: str, members: Sequence[Member], at: Callable[[Member, int], float]) -> None:
        self.name, self.members, self.at = name, members, at

    def numbers(self, state: Store, samples: int) -> Mapping[str, Sequence[float] | Tensor]:
        """As the contract says."""
        return {self.name: [self.at(member, samples) for member in self.members]}


def progress_of(member: Member, samples: int, total: int) -> Progress:
    """How far a member is."""
    return Progress(samples, total, member.config.warmup_samples, member.sparsity_warmup(total))


def schedules(members: Sequence[Member], total: int) -> list[Control]:
    """The learning rate, the norm to clip at, and every number that the members' architecture declares.

    The controls follow `members` when some leave.
    """
    found: list[Control] = [
        Schedule("lr", members, lambda m, samples: learning_rate(m.config, samples, total)),
        Schedule("max_grad_norm", members, lambda m, samples: max_grad_norm(m.config)),
    ]
    for name, number in members[0].sae.numbers.items():

        def at(m: Member, samples: int, at: Callable[..., float] = number.at) -> float:
            return at(m.sae.config, progress_of(m, samples, total))

        found.append(Schedule(name, members, at))
    return found


class Controls:
    """The controls of one stack's members, with their states."""

    def __init__(self, members: Sequence[Member], controls: Iterable[Control]) -> None:
        self.members, self.controls, device = members, list(controls), members[0].sae.W_enc.device
        self.states = [{n: t.to(device) for n, t in c.state(members).items()} for c in self.controls]
        self.names: Sequence[str] = (SAMPLES,) if any(self.states) else ()
        self._newest: tuple[int, list[Numbers]] = (-1, [])

    def numbers(self, samples: int) -> list[Numbers]:
        """Each member's numbers for the window that ends at `samples`."""
        if self._newest[0] != samples:
            columns: dict[str, Sequence[float] | Tensor] = {}
            for control, state in zip(self.controls, self.states, strict=True):
                columns |= control.numbers(state, samples)
            if self.names:
                columns[SAMPLES] = [float(samples)] * len(self.members)
            rows = zip(*map(_each, columns.values()), strict=True)
            self._newest = samples, [dict(zip(columns, row, strict=True)) for row in rows]
        return self._newest[1]

    def observe(self, window: Mapping[str, Tensor], went_M: Tensor) -> None:
        """A window has ended."""
        for control, state in zip(self.controls, self.states, strict=True):
            own, before = dict(state), {name: tensor.clone() for name, tensor in state.items()}
            if not own:
                continue
            control.observe(state, window)
            for name, tensor in own.items():  # kept where it is: graphs read and write there
                went = went_M.view(-1, *[1] * (tensor.dim() - 1))
                tensor.copy_(torch.where(went, state[name], before[name]))
            state.update(own)

    def state(self, member: int) -> Store:
        """What is kept of a member."""
        return {f"{_STATE}{c.name}.{n}": t[member] for c, state in self._of(member) for n, t in state.items()}

    def moved(self, member: int, samples: int) -> set[str]:
        """The numbers of a member that do not follow from the sample count."""
        return {name for c, state in self._of(member) if state for name in c.numbers(state, samples)}

    def verdicts(self, member: int) -> list[str]:
        """What its controls have to say at the end of training."""
        return [said for c, state in self._of(member) if state and (said := c.verdict(state, member))]

    def _of(self, member: int) -> list[tuple[Control, Store]]:
        return [(c, s) for c, s in zip(self.controls, self.states, strict=True) if c.moves(self.members[member])]

    def forget(self) -> None:
        """States were written to: the numbers that followed from them do not hold."""
        self._newest = (-1, [])

    def remove(self, member: int) -> None:
        """A member leaves."""
        self.forget()
        for state in self.states:
            for name, tensor in state.items():
                state[name] = torch.cat([tensor[:member], tensor[member + 1 :]])


def _each(column: Sequence[float] | Tensor) -> Sequence[float | Tensor]:
    return column.unbind() if isinstance(column, Tensor) else column
