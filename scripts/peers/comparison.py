"""One comparison: the activations that everybody trains on, saeopt's own training, and the measuring of every SAE."""

from __future__ import annotations

import json
import math
import sys
from argparse import Namespace
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from peers.fronts import Half, Point
from saeopt.activations.calibration import CALIBRATION_TOKENS, Calibration, calibration
from saeopt.activations.stream import ActivationStream, Batch
from saeopt.activations.tokens import TokenData
from saeopt.config import RunConfig, apply_overrides, read_yaml, validate_run
from saeopt.config.io import parse_override
from saeopt.config.sites import Site
from saeopt.evaluation.evaluate import evaluate, keep_rule, reconstruct
from saeopt.evaluation.metrics import Accumulator
from saeopt.saes.base import SAE
from saeopt.saes.batch_topk import BatchTopKSAE
from saeopt.saes.registry import get_sae
from saeopt.training.pack import Member, Pack
from saeopt.training.runtime import Runtime
from saeopt.training.setup import begin, dictionary_width

OWN = "saeopt"
DEAD_TOKENS = 200_000
HALVES: tuple[Half, Half] = ("chosen_on", "reported_on")


@dataclass(frozen=True)
class Job:
    """One SAE to train."""

    system: str
    sae_type: str
    sparsity: float
    lr: float
    seed: int

    def path(self, out: Path) -> Path:
        """Where its weights lie."""
        system = self.system.replace(" ", "_").replace(",", "")
        return out / "weights" / f"{system}-{self.sae_type}-{self.sparsity:g}-lr{self.lr:g}-seed{self.seed}.safetensors"


def job_of(point: Point) -> Job:
    """What gave a point."""
    return Job(point.system, point.sae_type, point.sparsity, point.lr, point.seed)


class Comparison:
    """Tokens and activations of one comparison; the language model is loaded where something asks it."""

    def __init__(self, options: Namespace) -> None:
        self.options, self.out = options, options.out
        self.architectures = options.architectures.split(",")
        self.runtime = Runtime(options.device)
        config = self.config(Job(OWN, self.architectures[0], 1.0, 1e-3, 0))
        self.batch = config.effective_batch * config.data.context_length
        assert config.data.n_train_samples is not None
        self.steps = (options.tokens or config.data.n_train_samples * config.data.context_length) // self.batch
        (self.out / "weights").mkdir(parents=True, exist_ok=True)
        self.activations = self.out / "activations.safetensors"
        self._check_settings(config)
        if options.harvested:
            self._from_file(options.harvested)
        elif not self.activations.exists():
            self._write(self._harvest(config))
        parts = load_file(self.activations)
        self.x_Nd, self.norm_limit = parts["train"].to(self.runtime.device), parts["norm_limit"].item()
        self.d = self.x_Nd.shape[1]
        self.h = dictionary_width(config.saes, self.d)

    # ---- configs
    def config(self, job: Job, changes: dict[str, Any] | None = None) -> RunConfig:
        """saeopt's config of a job: what it ships, on this comparison's model and tokens."""
        options = self.options
        raw = read_yaml(options.configs.format(job.sae_type))
        sparsity = "saes.k" if get_sae(job.sae_type).Config.selects_k() else "saes.sparsity_coeff"
        values: dict[str, Any] = {
            "tlens_model_path": options.model or "none", "lm_dtype": "float32",
            "data.dataset_name": options.data or "none",
            "data.column_name": options.column, "data.split": f"train[{options.train}]", "data.n_eval_samples": 0,
            "saes.sae_positions": [options.hook], sparsity: job.sparsity, "lr": job.lr, "seed": job.seed,
        }  # fmt: skip
        if options.ratio is not None:
            values["saes.dict_size_to_input_ratio"] = options.ratio
        if options.tokens is not None:
            values["data.n_train_samples"] = samples = options.tokens // int(raw["data"]["context_length"])
            values["warmup_samples"] = raw.get("warmup_samples", 0) * samples // int(raw["data"]["n_train_samples"])
        values |= dict(map(parse_override, options.set)) | (changes or {})
        return validate_run(apply_overrides(raw, values), options.configs.format(job.sae_type))

    def _check_settings(self, config: RunConfig) -> None:
        """Weights of another comparison must not be taken for this one's."""
        settings = {
            "model": self.options.model, "harvested": self.options.harvested, "hook": self.options.hook,
            "data": config.data.model_dump(mode="json"), "ratio": config.saes.dict_size_to_input_ratio,
            "steps": self.steps, "batch": self.batch, "set": self.options.set,
        }  # fmt: skip
        file = self.out / "settings.json"
        if file.exists() and json.loads(file.read_text()) != settings:
            sys.exit(f"{self.out}: holds a comparison with other settings (settings.json); give another --out")
        file.write_text(json.dumps(settings, indent=1))

    # ---- activations
    @cached_property
    def model(self) -> Any:
        """The language model."""
        return self.runtime.language_model(self.config(Job(OWN, self.architectures[0], 1.0, 1e-3, 0)))

    @property
    def hook(self) -> str:
        """The hook point, by its full name where there is a model to ask."""
        return self.options.hook if self.options.harvested else self.model.resolve([self.options.hook])[0]

    def _write(self, parts: dict[str, Tensor]) -> None:
        temporary = self.activations.with_name(".activations")
        save_file(parts, temporary)
        temporary.replace(self.activations)

    def _from_file(self, path: str) -> None:
        """Given activations; the training part is repeated as often as the run is long."""
        parts = load_file(path)
        if missing := {"train", *HALVES} - set(parts):
            sys.exit(f"--harvested {path}: holds no {', '.join(sorted(missing))}")
        rows = torch.arange(self.steps * self.batch) % len(parts["train"])
        held_out: dict[str, Tensor] = {half: parts[half].float() for half in HALVES}
        self._write({"train": parts["train"][rows].float(), "norm_limit": torch.tensor(math.inf), **held_out})

    def _harvest(self, config: RunConfig) -> dict[str, Tensor]:
        """The kept tokens of the training stream, in their order, and of both halves of the held-out documents."""
        hook, site, wanted = self.hook, Site.of(self.hook), self.steps * self.batch
        tokens = TokenData.load(config.data, self.model)
        limit = calibration([site], self.model, tokens, config)[site].norm_limit
        stream = ActivationStream(self.model, tokens, [hook], config)
        parts, have = [], 0
        while have < wanted:
            batch = next(stream)
            parts.append(batch.x[hook][batch.keep(site.hooks, limit)].float().cpu())
            have += len(parts[-1])
        stream.close()
        found = {"train": torch.cat(parts)[:wanted].contiguous(), "norm_limit": torch.tensor(limit)}
        keep = keep_rule(self.model, config.data, limit)
        for half, batches in self.held_out().items():
            kept = []
            for batch_BT in batches:
                tokens_BT = batch_BT.to(self.runtime.device)
                x_BTd = self.model.activations(tokens_BT, [hook])[hook]
                kept.append(x_BTd[keep(tokens_BT, x_BTd)].float().cpu())
            found[half] = torch.cat(kept)
        return found

    def held_out(self) -> dict[Half, list[Tensor]]:
        """Token sequences of both halves of the held-out documents."""
        start, stop = (int(n) for n in self.options.held_out.split(":"))
        middle = (start + stop) // 2
        base = self.config(Job(OWN, self.architectures[0], 1.0, 1e-3, 0)).data
        found: dict[Half, list[Tensor]] = {}
        for half, first, last in zip(HALVES, (start, middle), (middle, stop), strict=True):
            data = base.model_copy(
                update={"split": f"train[{first}:{last}]", "n_train_samples": None, "shuffle_documents": False}
            )
            tokens = TokenData.load(data, self.model)
            found[half] = list(tokens.calibration(tokens.n_train_available or 0).split(data.eval_batch_size))
        return found

    # ---- saeopt
    def train_own(self, jobs: list[Job], changes: dict[str, Any] | None = None) -> None:
        """The jobs of one architecture as one pack."""
        jobs = [job for job in jobs if not job.path(self.out).exists()]
        if not jobs:
            return
        members = []
        for number, job in enumerate(jobs):
            config = self.config(job, changes)
            sae = get_sae(job.sae_type)(
                self.d, self.h, config.sae_at(self.hook), legacy_scaling=bool(config.legacy_scaling),
                recipe=config.recipe, device=self.runtime.device,
            )  # fmt: skip
            members.append(Member(str(number), self.hook, config, sae))
            first_Nd = self.x_Nd[:CALIBRATION_TOKENS].cpu()
            begin(members[-1], Calibration(first_Nd, first_Nd, math.inf), self.runtime)
        samples = self.batch // members[0].config.data.context_length
        pack = Pack(members, self.runtime, total_samples=self.steps * samples)
        keep_N = torch.ones(self.batch, dtype=torch.bool, device=self.runtime.device)
        for step in range(self.steps):
            x_Nd = self.x_Nd[step * self.batch : (step + 1) * self.batch]
            batch = Batch({self.hook: x_Nd}, keep_N, step * samples, samples, self.batch // samples)
            pack.step(iter([batch]), (step + 1) * samples)
        for job, member in zip(jobs, members, strict=True):
            sae = member.sae.folded()
            state = {name: t.detach().float() for name, t in sae.named_parameters()}
            if isinstance(sae, BatchTopKSAE):
                state["threshold"] = sae.threshold.float()
            save_file({name: t.cpu().contiguous() for name, t in state.items()}, job.path(self.out))

    # ---- measuring
    def sae(self, job: Job) -> SAE:
        """A trained SAE that takes raw activations."""
        cls = get_sae(job.sae_type)
        own: dict[str, Any] = {"k": job.sparsity} if cls.Config.selects_k() else {}
        section = cls.Config(sae_type=job.sae_type, sae_positions=[self.hook], decoder_norm="free", **own)
        sae = cls(self.d, self.h, section, device=self.runtime.device)
        sae.load_state_dict(load_file(job.path(self.out)), strict=False)
        sae.norm_limit = self.norm_limit
        return sae.requires_grad_(False)

    def measure(self, jobs: list[Job]) -> list[Point]:
        """Metrics of every SAE that was trained, on both halves and on the last training tokens."""
        halves = {h: load_file(self.activations)[h].to(self.runtime.device) for h in HALVES}
        points = []
        for job in jobs:
            if not job.path(self.out).exists():
                continue
            sae, metrics = self.sae(job), {}
            for half, x_Nd in halves.items():
                sums = Accumulator(sae.d, sae.h, scale=sae.scale, norm_h=sae.decoder_norm_h(), device=x_Nd.device)
                reconstruct(sae, x_Nd, None, sums)
                metrics[str(half)] = {k: float(v) for k, v in sums.result().items() if isinstance(v, int | float)}
            metrics["reported_on"]["dead"] = self._dead(sae)
            points.append(Point(**vars(job), metrics=metrics))
        return points

    def add_cross_entropy(self, points: list[Point]) -> None:
        """CE recovered on the half that is reported (none without a language model: `--harvested`)."""
        if self.options.harvested or not points:
            return
        saes = {i: (self.hook, self.sae(job_of(point))) for i, point in enumerate(points)}
        data, tokens = self.config(job_of(points[0])).data, self.held_out()["reported_on"]
        rows = evaluate(saes, self.model, tokens, data=data, device=self.runtime.device)
        for i, point in enumerate(points):
            point.metrics["reported_on"]["ce_recovered"] = float(rows[i]["ce_recovered"])

    def _dead(self, sae: SAE) -> float:
        """Share of latents that do not fire on the last training tokens."""
        fired_h = torch.zeros(self.h, dtype=torch.bool, device=self.runtime.device)
        for x_bd in self.x_Nd[-DEAD_TOKENS:].split(8192):
            fired_h |= (sae.encode(x_bd) != 0).any(0)
        return 1 - fired_h.double().mean().item()
