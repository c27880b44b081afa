"""saeopt's fronts beside sae-lens' and dictionary_learning's, on the same tokens in the same order.

    scripts/interop_envs.sh                  # their environments, once
    python scripts/compare_peers.py --model ../shared/models/stories260K \
        --data ../shared/data/tinystories-1000/tinystories_1000.json --out output/peers

Activations are harvested once and fed to all, without masked tokens. saeopt trains the configs that it ships, as packs;
each peer trains by its own trainer and its authors' recipe. Everybody gets the same sparsities per unit of penalty, the
same seeds and as many learning rates; the learning rate is chosen on one half of the held-out documents, and the table,
the plot and `result.json` report the other. Weights that lie in --out already are not trained again.
"""

from __future__ import annotations

import argparse
import json
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peers.fronts import Point, chosen_lr, write
from safetensors.torch import load_file, save_file
from torch import Tensor

from saeopt.activations.calibration import CALIBRATION_TOKENS, calibration
from saeopt.activations.stream import ActivationStream, Batch
from saeopt.activations.tokens import TokenData
from saeopt.config import RunConfig, apply_overrides, read_yaml, validate_run
from saeopt.config.io import parse_override
from saeopt.console import log, set_up_logging
from saeopt.evaluation.evaluate import evaluate
from saeopt.saes.base import SAE
from saeopt.saes.registry import get_sae
from saeopt.training.pack import Member, Pack
from saeopt.training.runtime import Runtime
from saeopt.training.setup import begin, dictionary_width

ROOT = Path(__file__).resolve().parents[1]
OWN, PEERS = "saeopt", ("sae-lens", "dictionary-learning")
SPARSITIES = {
    "relu": (0.15, 0.3, 0.6, 1.2, 2.4, 4.8),
    "gated": (0.15, 0.3, 0.6, 1.2, 2.4, 4.8),
    "topk": (4.0, 8.0, 16.0, 32.0, 64.0),
}
DEAD_TOKENS = 200_000


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


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", required=True, help="Hugging Face directory of the language model")
    add("--data", required=True, help="data set, as data.dataset_name")
    add("--column", default="text")
    add("--hook", default="blocks.2.hook_resid_pre")
    add("--train", default="0:900", help="documents to train on")
    add("--held-out", default="900:1000", help="documents held out: one half to choose on, one to report on")
    add(
        "--configs",
        default=str(ROOT / "configs/stories260k/stories260k-{}.yaml"),
        help="saeopt's config per {sae_type}",
    )
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="change saeopt's configs")
    add("--tokens", type=int, help="training tokens; default: as the config says")
    add("--ratio", type=float, help="h / d; default: as the config says")
    add("--architectures", default="relu,gated,topk")
    add("--peers", default=",".join(PEERS))
    add("--seeds", default="0,1,2")
    add("--lrs", default="2.5e-3,5e-3,1e-2", help="for everybody; one library's own: --lrs sae-lens=1e-3,3e-3")
    add("--sparsity", action="append", default=[], metavar="[SYSTEM:]TYPE=A,B", help="sparsities, in saeopt's units")
    add("--ablate", action="append", default=[], metavar="NAME[@TYPE+TYPE]:KEY=VALUE,…", help="saeopt, changed")
    add("--device", default="cpu")
    add("--jobs", default="1", help="trainers of peers at a time, on --device; or per device: cuda=6,cpu=9")
    add("--env", default=str(ROOT / ".interop/{}/bin/python"), help="Python of each {peer}'s environment")
    add("--deadline", type=float, help="seconds after which no further SAE of a peer is begun")
    add("--out", type=Path, default=Path("output/peers"))
    return parser.parse_args()


class Comparison:
    """Language model, tokens and harvested activations of one comparison."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.out = options, options.out
        self.architectures = options.architectures.split(",")
        self.runtime = Runtime(options.device)
        config = self.config(Job(OWN, self.architectures[0], 1.0, 1e-3, 0))
        self.model = self.runtime.language_model(config)
        (self.hook,) = self.model.resolve([options.hook])
        self.d = self.model.width(self.hook)
        self.h = dictionary_width(config.saes.dict_size_to_input_ratio, self.d)
        self.batch = config.effective_batch * config.data.context_length
        assert config.data.n_train_samples is not None
        self.steps = (options.tokens or config.data.n_train_samples * config.data.context_length) // self.batch
        (self.out / "weights").mkdir(parents=True, exist_ok=True)
        self.activations = self.out / "activations.safetensors"
        self._check_settings(config)
        self.x_Nd = self._harvest(config)

    # ---- configs
    def config(self, job: Job, changes: dict[str, Any] | None = None) -> RunConfig:
        """saeopt's config of a job: what it ships, on this comparison's model and tokens."""
        options = self.options
        raw = read_yaml(options.configs.format(job.sae_type))
        sparsity = "saes.k" if job.sae_type == "topk" else "saes.sparsity_coeff"
        values: dict[str, Any] = {
            "tlens_model_path": options.model, "lm_dtype": "float32", "data.dataset_name": options.data,
            "data.column_name": options.column, "data.split": f"train[{options.train}]", "data.n_eval_samples": 0,
            "saes.sae_positions": [options.hook], sparsity: int(job.sparsity) if sparsity == "saes.k" else job.sparsity,
            "lr": job.lr, "seed": job.seed,
        }  # fmt: skip
        if options.ratio is not None:
            values["saes.dict_size_to_input_ratio"] = options.ratio
        if options.tokens is not None:
            values["data.n_train_samples"] = options.tokens // int(raw["data"]["context_length"])
        values |= dict(map(parse_override, options.set)) | (changes or {})
        return validate_run(apply_overrides(raw, values), options.configs.format(job.sae_type))

    def _check_settings(self, config: RunConfig) -> None:
        """Weights of another comparison must not be taken for this one's."""
        settings = {
            "model": self.options.model, "data": config.data.model_dump(mode="json"), "hook": self.hook, "h": self.h,
            "steps": self.steps, "batch": self.batch, "set": self.options.set,
        }  # fmt: skip
        file = self.out / "settings.json"
        if file.exists() and json.loads(file.read_text()) != settings:
            sys.exit(f"{self.out}: holds a comparison with other settings (settings.json); give another --out")
        file.write_text(json.dumps(settings, indent=1))

    # ---- activations
    def _harvest(self, config: RunConfig) -> Tensor:
        """The kept tokens of the training stream, in their order."""
        wanted = self.steps * self.batch
        tokens = TokenData.load(config.data, self.model)
        self.norm_limit = calibration([self.hook], self.model, tokens, config)[self.hook].norm_limit
        if not self.activations.exists():
            stream = ActivationStream(self.model, tokens, [self.hook], config)
            parts, have = [], 0
            while have < wanted:
                batch = next(stream)
                parts.append(batch.x[self.hook][batch.keep(self.hook, self.norm_limit)].float().cpu())
                have += len(parts[-1])
            stream.close()
            temporary = self.activations.with_name(".activations")
            save_file({"train": torch.cat(parts)[:wanted].contiguous()}, temporary)
            temporary.replace(self.activations)
        return load_file(self.activations)["train"].to(self.runtime.device)

    def held_out(self) -> dict[str, list[Tensor]]:
        """Token sequences of both halves of the held-out documents."""
        start, stop = (int(n) for n in self.options.held_out.split(":"))
        middle = (start + stop) // 2
        base = self.config(Job(OWN, self.architectures[0], 1.0, 1e-3, 0)).data
        found = {}
        for half, first, last in (("chosen_on", start, middle), ("reported_on", middle, stop)):
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
            section = config.sae_at(self.hook)
            sae = get_sae(job.sae_type)(
                self.d, self.h, section, legacy_scaling=bool(config.legacy_scaling), recipe=config.recipe,
                device=self.runtime.device,
            )  # fmt: skip
            members.append(Member(str(number), self.hook, config, sae))
            begin(members[-1], self.x_Nd[:CALIBRATION_TOKENS].cpu(), self.runtime)
        slots = self.batch // members[0].config.data.context_length
        pack = Pack(members, self.runtime, total_samples=self.steps * slots)
        keep_N = torch.ones(self.batch, dtype=torch.bool, device=self.runtime.device)
        for step in range(self.steps):
            x_Nd = self.x_Nd[step * self.batch : (step + 1) * self.batch]
            batch = Batch({self.hook: x_Nd}, keep_N, step * slots, slots, self.batch // slots)
            pack.step(iter([batch]), (step + 1) * slots)
        for job, member in zip(jobs, members, strict=True):
            state = {name: t.detach().float() for name, t in member.sae.folded().named_parameters()}
            save_file({name: t.cpu().contiguous() for name, t in state.items()}, job.path(self.out))

    # ---- measuring
    def sae(self, job: Job) -> SAE:
        """A trained SAE that takes raw activations."""
        cls = get_sae(job.sae_type)
        own: dict[str, Any] = {"k": int(job.sparsity)} if job.sae_type == "topk" else {}
        section = cls.Config(sae_type=job.sae_type, sae_positions=[self.hook], decoder_norm="free", **own)
        sae = cls(self.d, self.h, section, device=self.runtime.device)
        sae.load_state_dict(load_file(job.path(self.out)), strict=False)
        sae.norm_limit = self.norm_limit
        return sae.requires_grad_(False)

    def measure(self, jobs: list[Job]) -> list[Point]:
        """Metrics of every SAE that was trained, on both halves and on the last training tokens."""
        saes = {job: self.sae(job) for job in jobs if job.path(self.out).exists()}
        data = self.config(jobs[0]).data if jobs else None
        rows = {half: evaluate({j: (self.hook, s) for j, s in saes.items()}, self.model, batches, data=data,
                               device=self.runtime.device) for half, batches in self.held_out().items()}  # fmt: skip
        points = []
        for job, sae in saes.items():
            metrics = {half: {k: float(v) for k, v in rows[half][job].items() if isinstance(v, int | float)}
                       for half in rows}  # fmt: skip
            metrics["reported_on"]["dead"] = self._dead(sae)
            points.append(Point(job.system, job.sae_type, job.lr, job.seed, job.sparsity, metrics))
        return points

    def _dead(self, sae: SAE) -> float:
        """Share of latents that do not fire on the last training tokens."""
        fired_h = torch.zeros(self.h, dtype=torch.bool, device=self.runtime.device)
        for x_bd in self.x_Nd[-DEAD_TOKENS:].split(8192):
            fired_h |= (sae.encode(x_bd) != 0).any(0)
        return 1 - fired_h.double().mean().item()


def jobs_of(options: argparse.Namespace, system: str, sae_type: str) -> list[Job]:
    """The same search for everybody, unless told otherwise."""
    sparsities = SPARSITIES.get(sae_type, ())
    for text in options.sparsity:
        name, _, values = text.partition("=")
        if name in (sae_type, f"{system}:{sae_type}"):
            sparsities = tuple(map(float, values.split(",")))
    lrs = ""
    for text in options.lrs.split(";"):
        name, sign, values = text.rpartition("=")
        lrs = values if (not sign and not lrs) or name == system else lrs
    seeds = [int(s) for s in options.seeds.split(",")]
    return [Job(system, sae_type, s, float(lr), seed) for seed in seeds for lr in lrs.split(",") for s in sparsities]


def train_peers(comparison: Comparison, jobs: list[Job], started: float) -> list[threading.Thread]:
    """Processes that share the jobs of the peers; each keeps to one library, whose import takes long."""
    options = comparison.options
    waiting: dict[str, queue.SimpleQueue[Job]] = {}
    for job in jobs:
        if not job.path(options.out).exists():
            waiting.setdefault(job.system, queue.SimpleQueue()).put(job)
    if not waiting:
        return []
    threads = []
    for number, device in enumerate(_devices(options)):
        library = list(waiting)[number % len(waiting)]
        order = [library, *(other for other in waiting if other != library)]
        threads.append(threading.Thread(target=_work, args=(comparison, order, waiting, device, started)))
        threads[-1].start()
    return threads


def _devices(options: argparse.Namespace) -> Iterator[str]:
    for part in options.jobs.split(","):
        device, sign, count = part.rpartition("=")
        yield from [device if sign else options.device] * int(count)


def _work(
    comparison: Comparison,
    order: list[str],
    waiting: dict[str, queue.SimpleQueue[Job]],
    device: str,
    started: float,
) -> None:
    """One thread's processes: its library's jobs first, then those that another library has left."""
    options = comparison.options
    for library in order:
        process: subprocess.Popen[str] | None = None
        while options.deadline is None or time.perf_counter() - started < options.deadline:
            try:
                job = waiting[library].get_nowait()
            except queue.Empty:
                break
            if process is None:
                command = [options.env.format(library), str(ROOT / "scripts/peers/trainer.py"), library]
                command += [str(comparison.activations), device]
                errors = (options.out / f"{library}-{threading.get_ident()}.log").open("w")
                process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
                )
            assert process.stdin is not None
            assert process.stdout is not None
            asked = {"sae_type": job.sae_type, "sparsity": job.sparsity, "lr": job.lr, "seed": job.seed}
            asked |= {
                "d": comparison.d,
                "h": comparison.h,
                "batch": comparison.batch,
                "out": str(job.path(options.out)),
            }
            process.stdin.write(json.dumps(asked) + "\n")
            process.stdin.flush()
            answer = process.stdout.readline()
            if not answer:
                log.error("%s: %s failed; see %s-*.log in %s", library, job, library, options.out)
                break
            log.info("%s %s %g lr %g seed %d on %s: %.0f s", *vars(job).values(), device, json.loads(answer)["seconds"])
        if process is not None and process.stdin is not None:
            process.stdin.close()
            process.wait()


def main() -> None:
    """The whole comparison."""
    options, started = arguments(), time.perf_counter()
    set_up_logging()
    options.out.mkdir(parents=True, exist_ok=True)
    comparison = Comparison(options)
    log.info(
        "%d tokens of width %d harvested, %.0f s", len(comparison.x_Nd), comparison.d, time.perf_counter() - started
    )
    kinds = comparison.architectures
    peers = [name for name in options.peers.split(",") if name]
    jobs = {s: [job for kind in kinds for job in jobs_of(options, s, kind)] for s in (OWN, *peers)}
    in_turn = [job for s in peers for job in jobs[s]]
    in_turn.sort(key=lambda job: job.seed)  # a deadline cuts whole seeds first
    threads = train_peers(comparison, in_turn, started)
    for kind in kinds:
        comparison.train_own([job for job in jobs[OWN] if job.sae_type == kind])
        log.info("saeopt %s: done after %.0f s", kind, time.perf_counter() - started)
    own = comparison.measure(jobs[OWN])
    ablated = _ablations(comparison, own, started)
    log.info("saeopt's ablations: done after %.0f s", time.perf_counter() - started)
    for thread in threads:
        thread.join()
    log.info("peers: done after %.0f s", time.perf_counter() - started)
    sys.stdout.write(write(options.out, [*own, *comparison.measure(in_turn), *ablated]))


def _ablations(comparison: Comparison, own: list[Point], started: float) -> list[Point]:
    """saeopt with one thing changed, at the learning rate that was chosen for what it ships."""
    points: list[Point] = []
    options = comparison.options
    for text in options.ablate:
        head, _, changes = text.partition(":")
        name, _, only = head.partition("@")
        for kind in only.split("+") if only else comparison.architectures:
            if options.deadline is not None and time.perf_counter() - started > options.deadline:
                return points
            lr = chosen_lr([p for p in own if p.sae_type == kind])
            jobs = [Job(f"{OWN}, {name}", p.sae_type, p.sparsity, p.lr, p.seed) for p in own
                    if p.sae_type == kind and p.lr == lr]  # fmt: skip
            comparison.train_own(jobs, dict(map(parse_override, changes.split(","))))
            points += comparison.measure(jobs)
    return points


if __name__ == "__main__":
    main()
