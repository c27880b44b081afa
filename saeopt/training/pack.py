"""The pack: members on one activation stream, grouped into stacks."""

from __future__ import annotations

import hashlib
from collections.abc import Container, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from saeopt.activations.stream import Batch
from saeopt.config.run import RunConfig
from saeopt.config.saes import SAEConfig
from saeopt.config.sites import Site
from saeopt.console import log
from saeopt.errors import DeviceFault, is_device_fault
from saeopt.runs.names import SEEDS
from saeopt.saes.base import SAE, where
from saeopt.saes.noise import derived_seed
from saeopt.training.controls import Control, Controls, schedules
from saeopt.training.resampling import is_due, resample
from saeopt.training.runtime import Runtime
from saeopt.training.steering import TargetL0, penalty_missed
from saeopt.training.step.choose import make_stack
from saeopt.training.step.contract import Example, Numbers, Place, StackOptions
from saeopt.training.step.stack import Stack


@dataclass
class Member:
    """One SAE: of one trial, at one site (`hook_point`: the site's key), of one seed (`replica` 0: the config's own).

    `reason` says why it no longer trains.
    """

    trial: str
    hook_point: str
    config: RunConfig
    sae: SAE
    reason: str | None = None
    replica: int = 0
    begun_from: dict[str, str] | None = None
    """What was loaded instead of new weights: file, its SHA-256, the key of the SAE in it."""

    @property
    def seed(self) -> int:
        """What its initial weights and its noise follow from."""
        return self.config.seed + self.replica

    @property
    def key(self) -> str:
        """What it is called in its trial's checkpoints."""
        return self.hook_point if self.replica == 0 else f"{SEEDS}/{self.seed}/{self.hook_point}"

    def __str__(self) -> str:
        return self.hook_point if self.config.seeds == 1 else f"{self.hook_point} (seed {self.seed})"

    @property
    def sae_config(self) -> SAEConfig:
        """The SAE section as it holds at this site."""
        return self.sae.config

    @cached_property  # asked for in every step
    def site(self) -> Site:
        """What it reads and writes."""
        return self.config.saes.site(self.hook_point)

    def sparsity_warmup(self, total: int) -> int:
        """Samples over which its λ rises."""
        return self.config.sparsity_warmup(self.sae_config, total)

    @property
    def noise_seed(self) -> int:
        """Seed of this member's gate noise."""
        return derived_seed("gate noise", self.seed, self.hook_point)


@dataclass
class _Group:
    """A stack and whom its rows belong to."""

    stack: Stack
    members: list[Member]
    controls: Controls
    centred_by: str

    def keep_N(self, batch: Batch) -> Tensor:
        """Which tokens of a batch count for these members."""
        return batch.keep(self.members[0].site.hooks, self.members[0].sae.norm_limit)

    def example(self, batch: Batch, seen: dict[object, tuple[Tensor, Tensor]]) -> Example:
        """What these members see of a batch, centred; `seen` has what other groups took from it."""
        site, place = self.members[0].site, Place(batch.first_sample, batch.n_samples, batch.tokens_per_sample)
        key = (site, self.centred_by)
        if key not in seen:
            sae, x_Nd = self.members[0].sae, batch.at(site.reads)
            y_Ne = None if site.reads == site.writes else batch.at(site.writes)
            x_Nd = sae.centre(x_Nd)
            seen[key] = x_Nd, x_Nd if y_Ne is None else sae.centre_written(y_Ne)
        return Example(*seen[key], self.keep_N(batch), place)

    def __str__(self) -> str:
        first = self.members[0]
        many = f" × {len(self.members)}" if len(self.members) > 1 else ""
        return f"{first.sae_config.sae_type}{many} at {first.hook_point}, h {first.sae.h}"


class Pack:
    """Trains its members on whatever batches it is given. Members never influence each other."""

    def __init__(self, members: Sequence[Member], runtime: Runtime, *, total_samples: int) -> None:
        self.members, self.runtime, self.total = list(members), runtime, total_samples
        self.micro_batches = members[0].config.gradient_accumulation_steps if members else 1
        by_key: dict[tuple[object, ...], list[Member]] = {}
        for member in members:
            if member.reason is None:
                by_key.setdefault(self._key(member), []).append(member)
        self.groups = [self._group(members) for members in by_key.values()]

    def _group(self, members: list[Member]) -> _Group:
        first = members[0]
        options = StackOptions(
            first.config.dead_after_tokens(first.sae_config, self.total),
            first.config.adam_betas,
            autocast=self.runtime.autocast(first.config),
            ranks=self.runtime.ranks.data.size,
        )
        controls = Controls(members, controls_of(members, self.total))
        saes, seeds = [m.sae for m in members], [m.noise_seed for m in members]
        watcher = controls if controls.names else None  # who has nothing to learn costs nothing
        stack = make_stack(saes, seeds, options, first.config.performance, watcher)
        return _Group(stack, members, controls, centring(first.sae))

    def _key(self, member: Member) -> tuple[object, ...]:
        sae = member.sae
        static = sae.config.model_dump_json(exclude=set(sae.stack_fields))
        return (
            member.site,
            sae.norm_limit,
            type(sae),
            (sae.d, sae.e, sae.h),
            sae.W_enc.dtype,
            (sae.legacy_scaling, sae.recipe, *sae.tallies),
            (sae.normalisation, centring(sae)),  # a stack shares one normalised x
            member.config.adam_betas,
            member.config.performance,
            member.config.mixed_precision,  # trials that were begun on different devices may go on together
            static,
        )

    @property
    def hooks(self) -> list[str]:
        """Hook points that training members still read or write."""
        return sorted({hook for m in self.active for hook in m.site.hooks})

    @property
    def active(self) -> list[Member]:
        """Members that train."""
        return [m for group in self.groups for m in group.members]

    def step(self, batches: Iterator[Batch], samples_after: int) -> None:
        """Train one window, which ends at `samples_after`: one optimiser step for every member."""
        if self.micro_batches == 1 and self.runtime.ranks.data.size == 1:
            batch = next(batches)
            self._each_stack(batch, samples_after, whole=True)
            self._resample(batch, samples_after)
            return
        for _ in range(self.micro_batches):
            batch = next(batches)
            self._each_stack(batch, samples_after, whole=False)
        if self.runtime.ranks.data.size > 1:
            for group in self.groups:
                for how, tensors in group.stack.partial().items():
                    self.runtime.ranks.data.reduce(tensors, how)
        for group in self.groups:
            with self._blamed(group):
                group.stack.apply(group.controls.numbers(samples_after))
        self._resample(batch, samples_after)

    def _resample(self, batch: Batch, after: int) -> None:
        """New directions for dead latents where it is time for it, from a window's last micro-batch."""
        for group in self.groups:
            first, ranks = group.members[0], self.runtime.ranks.data
            config = first.config
            every = config.resample_every_tokens(first.sae_config, self.total)
            before = after - config.effective_batch * ranks.size
            if not is_due(every, before, after, self.total, config.data.context_length):
                continue
            example, limit = group.example(batch, {}), config.dead_after_tokens(first.sae_config, self.total)
            for number, member in enumerate(group.members):
                seed = (member.seed, member.hook_point, after)
                n = resample(member.sae, group.stack.state(number), example, limit, seed, ranks)
                if n:
                    log.info("%s: %d dead latents of %s are resampled", member.trial, n, member)

    def _each_stack(self, batch: Batch, samples_after: int, *, whole: bool) -> None:
        seen: dict[object, tuple[Tensor, Tensor]] = {}
        for group in self.groups:
            example = group.example(batch, seen)
            with self._blamed(group):
                (group.stack.step if whole else group.stack.accumulate)(example, group.controls.numbers(samples_after))

    @contextmanager
    def _blamed(self, group: _Group) -> Iterator[None]:
        """A fault of the device says where it surfaced."""
        try:
            yield
        except RuntimeError as error:
            if not is_device_fault(error):
                raise
            others = [str(other) for other in self.groups if other is not group]
            beside = f" (or in what ran before it on the device: {', '.join(others)})" if others else ""
            raise DeviceFault(f"{str(error).splitlines()[0]}: seen in the stack {group}{beside}") from error

    def metrics(self, samples: int) -> list[tuple[Member, dict[str, float]]]:
        """Training metrics of every active member since the last call, with its learning rate (synchronises)."""
        found = []
        for group in self.groups:
            numbers = group.controls.numbers(samples)
            with self._blamed(group):
                found_here = group.stack.metrics()
            for i, (member, measured) in enumerate(zip(group.members, found_here, strict=True)):
                told = _told(member.sae, numbers[i], group.controls.moved(i, samples))
                found.append((member, measured | told))
        return found

    def drop(self, members: Iterable[Member], reason: str) -> None:
        """Members leave their stacks with their weights as they are; the others go on and get faster."""
        for member in members:
            if member.reason is not None:
                continue
            member.reason = reason
            for group in self.groups:
                if member in group.members:
                    index = group.members.index(member)
                    member.sae = detached(member.sae)
                    group.members.remove(member)  # the schedules follow the list
                    group.controls.remove(index)
                    group.stack.remove(index)
            self.groups = [group for group in self.groups if group.members]

    def verdicts(self, member: Member) -> list[str]:
        """What is to be said of what steered an active member, at the end of training (synchronises)."""
        said = [text for controls, index in self._controls_of(member) for text in controls.verdicts(index)]
        missed = penalty_missed(member, self.total)
        return [*said, *([missed] if missed else [])]

    def aimed(self, member: Member, samples: int) -> dict[str, float]:
        """The L0 that an active member was to come to, and what its controls have moved (synchronises)."""
        target = member.sae_config.target_l0
        found = {} if target is None else {"target_l0": target}
        for controls, index in self._controls_of(member):
            numbers = controls.numbers(samples)[index]
            found |= {name: float(numbers[name]) for name in controls.moved(index, samples)}
        return found

    def _controls_of(self, member: Member) -> list[tuple[Controls, int]]:
        return [(group.controls, group.members.index(member)) for group in self.groups if member in group.members]

    def state(self, member: Member) -> dict[str, Tensor]:
        """The optimiser state of an active member; empty for one that stopped."""
        for group in self.groups:
            if member in group.members:
                return group.stack.state(group.members.index(member))
        return {}

    def load_state(self, member: Member, state: dict[str, Tensor]) -> None:
        """Inverse of :meth:`state`."""
        for group in self.groups:
            if member in group.members:
                group.stack.load_state(group.members.index(member), state)
                group.controls.forget()


def centring(sae: SAE) -> str:
    """The same for SAEs that do the same to activations before they scale them."""
    if not sae.centres:
        return ""
    found = hashlib.sha256()
    for name, buffer in sae.normalising():
        if not name.startswith("scale"):
            found.update(name.encode() + buffer.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def controls_of(members: Sequence[Member], total: int) -> list[Control]:
    """What sets the numbers of some members, all of one stack, in a run of `total` samples."""
    found = schedules(members, total)
    if any(m.sae_config.steers for m in members):
        found.append(TargetL0(members, total))
    return found


def _told(sae: SAE, numbers: Numbers, moved: Container[str]) -> dict[str, float]:
    """The learning rate, and the numbers that a control has moved or that the architecture has told."""
    names = [name for name, number in sae.numbers.items() if number.logged or name in moved]
    return {name: float(numbers[name]) for name in ("lr", *names)}


def detached(sae: SAE) -> SAE:
    """A copy with tensors of its own (a member's SAE is a view of its stack)."""
    copied = type(sae)(
        sae.d,
        sae.h,
        sae.config,
        legacy_scaling=sae.legacy_scaling,
        recipe=sae.recipe,
        dtype=sae.W_enc.dtype,
        device=sae.W_enc.device,
        **where(sae.widths),
    )
    with torch.no_grad():
        copied.load_state_dict(sae.state_dict())
    copied.norm_limit = sae.norm_limit
    return copied
