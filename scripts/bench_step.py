"""How fast a training step of SAEs is: architectures × sizes × stack depth, on the CPU or a GPU.

    python scripts/bench_step.py                                  the usual cases of this device
    python scripts/bench_step.py --case relu:768:24576:4096:8     architecture:d:h:batch:members[:k[:dead share]]
    python scripts/bench_step.py --data activations.safetensors   real activations (scripts/harvest_activations.py)
    python scripts/bench_step.py --against reference --json out.json
    python scripts/bench_step.py --peers sae-lens,dictionary-learning   their own loops beside (scripts/interop_envs.sh)

Activations lie on the device; a step is forward, backward, clipping and Adam of all members. Medians over steps, after
`--settle` steps of training: only then do latents fire as often, and as unevenly, as they do in a run.
The share of the peak counts the products that the step makes and a bf16 (CPU: float32) product measured here.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from bench_data import Activations
from bench_peers import KINDS, check, time_peers
from pydantic import ValidationError
from torch import Tensor

from saeopt.config.base import explain
from saeopt.config.machine import PerformanceConfig
from saeopt.console import console
from saeopt.errors import UserError
from saeopt.files import write_json
from saeopt.host.devices import choose_device
from saeopt.options import run_cli
from saeopt.saes.base import SAE
from saeopt.saes.init import match_norm
from saeopt.saes.registry import get_sae
from saeopt.training.pack import detached
from saeopt.training.step.choose import make_stack
from saeopt.training.step.contract import Example, Place, StackOptions
from saeopt.training.step.stack import Stack

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
GPU_CASES = [
    "relu:768:24576:4096:1",
    "relu:768:24576:32768:1",
    "relu:2304:65536:8192:1",
    "gated:768:24576:4096:1",
    "hard_concrete:768:24576:4096:1",
    "gated_hard_concrete:768:24576:4096:1",
    "topk:768:24576:4096:1:64",
    "topk:768:24576:4096:1:64:0.1",
    "topk:768:24576:32768:1:64",
    "topk:2304:65536:8192:1:64",
    "relu:768:24576:4096:8",
    "topk:768:24576:4096:8:64",
    "gated:768:24576:4096:8",
    "batch_topk:768:24576:4096:1:64",
    "batch_topk:768:24576:32768:1:64",
    "matryoshka_batch_topk:768:24576:4096:1:64",
    "matryoshka_batch_topk:768:24576:32768:1:64",
    "jumprelu:768:24576:4096:1",
    "jumprelu:768:24576:32768:1",
    "relu:64:2048:4096:8",
    "relu:64:2048:4096:32",
    "topk:64:2048:4096:32:64",
]
CPU_CASES = ["relu:64:2048:4096:1", "topk:64:2048:4096:1:16", "relu:576:1152:1024:8"]
PRODUCTS = {"relu": 10, "gated": 14, "hard_concrete": 14, "gated_hard_concrete": 14, "topk": 2}
PRODUCTS |= {"batch_topk": 2, "matryoshka_batch_topk": 2, "jumprelu": 10}
"""Dense products per token in units of d · h floating-point operations."""


@dataclass(frozen=True)
class Case:
    """One line of the table."""

    sae_type: str
    d: int
    h: int
    batch: int
    members: int
    k: int | None = None
    dead: float = 0.0

    @classmethod
    def parse(cls, text: str) -> Case:
        """From architecture:d:h:batch:members[:k[:dead share]]."""
        name, *numbers = text.split(":")
        try:
            d, h, batch, members = map(int, numbers[:4])
            usual = ["64" if name.endswith("topk") else "0", "0"]
            k, dead = numbers[4:] + usual[len(numbers) - 4 :]
            case = cls(name, d, h, batch, members, int(k) or None, float(dead))
        except ValueError:
            raise UserError(f"--case {text}: must be architecture:d:h:batch:members[:k[:dead share]]") from None
        fields = get_sae(name).Config.model_fields  # a name that nobody knows is told before anything is timed
        if min(d, h, batch, members) < 1 or not 0 <= case.dead <= 1:
            raise UserError(f"--case {text}: sizes must be above 0, the share of dead latents between 0 and 1")
        if case.k is not None and ("k" not in fields or not 0 < case.k <= h):
            raise UserError(f"--case {text}: k is for those that select k latents, and at most h")
        return case

    @property
    def flops_per_token(self) -> float:
        """Of one member."""
        sparse = 8 * self.d * self.k if self.k else 0
        return PRODUCTS.get(self.sae_type, 10) * self.d * self.h + sparse


def make_saes(case: Case, x_Nd: Tensor) -> list[SAE]:
    """Members as they start: unit decoder rows, tied encoder of the right size, the mean as decoder bias."""
    cls = get_sae(case.sae_type)
    fields: dict[str, Any] = {"sae_type": case.sae_type, "sae_positions": ["x"]}
    if case.k:
        fields["k"] = case.k
    saes = []
    for i in range(case.members):
        sae = cls(case.d, case.h, cls.Config(**fields), device=x_Nd.device)
        generator = torch.Generator(device=x_Nd.device).manual_seed(i)
        with torch.no_grad():
            for parameter in sae.parameters():
                parameter.zero_()
            rows = torch.randn(case.h, case.d, generator=generator, device=x_Nd.device)
            sae.W_dec.copy_(rows / rows.norm(dim=-1, keepdim=True))
            sae.b_dec.copy_(x_Nd.float().mean(0))
            sae.start_encoder(sae.W_dec.T.clone(), x_Nd.float())
            match_norm(sae, x_Nd.float())
        saes.append(sae)
    return saes


@torch.no_grad()
def put_to_sleep(case: Case, saes: list[SAE]) -> None:
    """The case's share of latents does not fire any more and counts as dead."""
    for i, sae in enumerate(saes if case.dead else ()):
        device = sae.W_enc.device
        order = torch.randperm(case.h, generator=torch.Generator(device=device).manual_seed(i), device=device)
        asleep = order[: int(case.dead * case.h)]
        sae.W_enc[:, asleep] *= 0.05
        sae.tokens_since_fired[asleep] = 10**9


@torch.no_grad()
def densities(sae: SAE, x_Nd: Tensor) -> tuple[float, float]:
    """The share of tokens on which the most frequent latent fires; the most frequent hundredth's share of firings."""
    fired_h = torch.zeros(sae.h, device=x_Nd.device)
    for rows in x_Nd[:8192].split(max(1, 2**26 // sae.h)):
        fired_h += (sae.encode(rows) != 0).sum(0)
    top = fired_h.sort(descending=True).values
    share = top[: max(1, sae.h // 100)].sum() / top.sum().clamp_min(1)
    return (top[0] / min(len(x_Nd), 8192)).item(), share.item()


class Bench:
    """One case: its data, and members that have settled on them."""

    def __init__(self, case: Case, data: Activations, device: torch.device, performance: dict[str, str]) -> None:
        self.case, self.device, self.performance = case, device, performance
        self.on_gpu = device.type == "cuda"
        if self.on_gpu:
            torch.cuda.empty_cache()
        dtype = torch.bfloat16 if self.on_gpu else torch.float32
        self.batches = data.batches(case.d, case.batch, device, dtype)
        numbers = {"lr": 1e-3, "sparsity_coeff": 0.1, "beta": 0.5, "bandwidth": 0.05, "max_grad_norm": 1.0}
        self.numbers = [numbers] * case.members
        self.steps_done = 0

    def stack(self, kind: str, saes: list[SAE]) -> Stack:
        """The members in a stack of this kind."""
        options = StackOptions(10**8, autocast=torch.bfloat16 if self.on_gpu else None)
        settings: Any = {**self.performance, "stack": kind}
        return make_stack(saes, list(range(len(saes))), options, PerformanceConfig(**settings))

    def step(self, stack: Stack) -> None:
        """One step on the next batch."""
        case, samples = self.case, math.gcd(self.case.batch, 8)
        x_Nd = self.batches[self.steps_done % len(self.batches)]
        first_sample = self.steps_done * samples
        self.steps_done += 1
        stack.step(Example(x_Nd, x_Nd, None, Place(first_sample, samples, case.batch // samples)), self.numbers)

    def settled(self, steps: int) -> list[SAE]:
        """Members after so many steps of training."""
        saes = make_saes(self.case, self.batches[0])
        stack = self.stack("auto", saes)
        for _ in range(steps):
            self.step(stack)
        stack.metrics()
        put_to_sleep(self.case, stack.saes)
        copies = [detached(sae) for sae in stack.saes]
        del stack, saes
        return copies

    def run(self, kind: str, settled: list[SAE], steps: int) -> dict[str, Any]:
        """Median time of a step in milliseconds and the memory that it needed."""
        case = self.case
        stack = self.stack(kind, [detached(sae) for sae in settled])
        if self.on_gpu:
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        held = sum(t.numel() * t.element_size() for sae in settled for t in sae.state_dict().values())
        held += sum(x.numel() * x.element_size() for x in self.batches[3:])
        started = time.perf_counter()
        for _ in range(6 if self.on_gpu else 1):
            self.step(stack)
        if self.on_gpu:
            torch.cuda.synchronize()
        warm_s = time.perf_counter() - started
        times = self._times(stack, steps)
        found = stack.metrics()
        ms = statistics.median(times)
        tokens_per_s = case.batch / ms * 1e3
        return {
            **asdict(case),
            "stack": kind,
            "ms": ms,
            "tokens_per_s": tokens_per_s,
            "sae_tokens_per_s": tokens_per_s * case.members,
            "tflops": tokens_per_s * case.members * case.flops_per_token / 1e12,
            "peak_memory_gb": (torch.cuda.max_memory_allocated() - held) / 1e9 if self.on_gpu else None,
            "warm_up_s": warm_s,
            "loss": found[0]["loss"],
            "finite": min(m["finite"] for m in found),
        }

    def beside(self, libraries: list[str], env: str, steps: int) -> dict[str, float]:
        """The peers' milliseconds on the same batches: as many SAEs, one after another in each step."""
        case = self.case
        if case.sae_type not in KINDS:
            return {}
        shared = {name: getattr(case, name) for name in ("sae_type", "d", "h", "batch", "members", "k")}
        job = shared | {"steps": steps}
        return time_peers(libraries, env, job, self.batches)

    def measured(self, settled: list[SAE], steps: int, against: str | None) -> dict[str, Any]:
        """Of the fast stack, and how many times as long the other one takes."""
        row = self.run("auto", settled, steps)
        row["densest_latent"], row["top_percent_share"] = densities(settled[0], self.batches[0])
        if against:
            row["ms_against"] = self.run(against, settled, min(steps, 10))["ms"]
            row["ratio"] = row["ms_against"] / row["ms"]
        return row

    def _times(self, stack: Stack, steps: int) -> list[float]:
        if not self.on_gpu:
            times = []
            for _ in range(steps):
                started = time.perf_counter()
                self.step(stack)
                times.append((time.perf_counter() - started) * 1e3)
            return times
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
        marks[0].record()
        for i in range(steps):
            self.step(stack)
            marks[i + 1].record()
        torch.cuda.synchronize()
        return [a.elapsed_time(b) for a, b in pairwise(marks)]

    def profile(self, settled: list[SAE]) -> str:
        """Where the time of a step goes."""
        stack = self.stack("auto", [detached(sae) for sae in settled])
        for _ in range(6):
            self.step(stack)
        with torch.profiler.profile() as profiler:
            for _ in range(4):
                self.step(stack)
            if self.on_gpu:
                torch.cuda.synchronize()
        by = "self_cuda_time_total" if self.on_gpu else "self_cpu_time_total"
        rows = sorted(profiler.key_averages(), key=lambda e: -_self_time(e, self.device))[:16]
        total = sum(_self_time(e, self.device) for e in profiler.key_averages())
        lines = [f"{_self_time(e, self.device) / 4e3:9.3f} ms {e.count // 4:4d}x  {e.key[:90]}" for e in rows]
        return "\n".join([f"{self.case} ({by}, {total / 4e3:.3f} ms per step)", *lines])


def peak_tflops(device: torch.device) -> float:
    """The matrix product that this device makes fastest, in bf16 (GPU) or float32, on random numbers."""
    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (1536, torch.float32)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    times = []
    for _ in range(12):
        if device.type == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return 2 * size**3 / min(times) / 1e12


def _self_time(event: Any, device: torch.device) -> float:
    return event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total


def usual_cases(device: torch.device, d: int | None) -> list[str]:
    """What is timed where no case is given: for data of width d, those of 4096 tokens at that width."""
    usual = GPU_CASES if device.type == "cuda" else CPU_CASES
    if d is None:
        return usual
    k = 64 if device.type == "cuda" else 16
    cases = [f"{kind}:{d}:{32 * d}:4096:1" + (f":{k}" if kind.endswith("topk") else "") for kind in PRODUCTS]
    return [*cases, f"topk:{d}:{32 * d}:32768:1:{k}"] if device.type == "cuda" else cases


@app.command()
def main(
    case: Annotated[list[str] | None, typer.Option(help="architecture:d:h:batch:members[:k[:dead share]]")] = None,
    data: Annotated[str, typer.Option(help="noise, skewed, or a safetensors file with `x` [N, d]")] = "skewed",
    settle: Annotated[int, typer.Option(min=0, help="steps of training before a case is timed")] = 800,
    device: Annotated[str, typer.Option(help="cpu or cuda; auto: a GPU where there is one")] = "auto",
    against: Annotated[str | None, typer.Option(help="also time this stack (reference) and show the ratio")] = None,
    steps: Annotated[int, typer.Option(help="steps timed per case; 0: 40 on a GPU, 5 on the CPU")] = 0,
    compile: Annotated[str, typer.Option(help="performance.compile")] = "auto",
    graphs: Annotated[str, typer.Option(help="performance.graphs")] = "auto",
    peers: Annotated[str, typer.Option(help="libraries to time beside: sae-lens,dictionary-learning")] = "",
    env: Annotated[str, typer.Option(help="Python of each {library}'s environment")] = ".interop/{}/bin/python",
    profiles: Annotated[bool, typer.Option(help="show where the time of each case goes")] = False,
    json_path: Annotated[Path | None, typer.Option("--json", help="write the numbers here")] = None,
) -> None:
    """Time the training step."""
    asked = {text: Case.parse(text) for text in case or ()}
    libraries = [name for name in peers.split(",") if name]
    check(libraries, env)
    where = choose_device(device)
    performance = {"compile": compile, "graphs": graphs}
    try:
        PerformanceConfig(**{**performance, "stack": against or "auto"})  # type: ignore[arg-type]
    except ValidationError as error:
        raise explain(error, "performance", {}) from None
    activations = Activations.of(data)
    cases = asked or {text: Case.parse(text) for text in usual_cases(where, activations.d)}
    for text, one in cases.items():
        if activations.d not in (None, one.d):
            raise UserError(f"--case {text}: its d is {one.d}, that of {data} is {activations.d}")
    peak = peak_tflops(where)
    name = torch.cuda.get_device_name() if where.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    console.print(f"{name}, torch {torch.__version__}, peak {peak:.1f} TFLOP/s, data: {activations.name}")
    results = []
    for text, one in cases.items():
        bench = Bench(one, activations, where, performance)
        settled = bench.settled(settle)
        count = steps or (40 if where.type == "cuda" else 5)
        row = bench.measured(settled, count, against) | {"peers_ms": bench.beside(libraries, env, min(count, 20))}
        row["share_of_peak"] = row["tflops"] / peak
        results.append(row)
        console.print(_line(text, row), soft_wrap=True)
        if profiles:
            console.print(bench.profile(settled), soft_wrap=True, markup=False)
    if json_path:
        found = {"device": name, "torch": torch.__version__, "peak_tflops": peak, "data": data, "settle": settle}
        write_json(json_path, {**found, "cases": results})


def _line(text: str, row: dict[str, Any]) -> str:
    memory = f"{row['peak_memory_gb']:6.1f} GB " if row["peak_memory_gb"] is not None else ""
    against = f" {row['ratio']:5.2f}x" if "ratio" in row else ""
    beside = "".join(f"\n      {name:34s} {ms:9.3f} ms {ms / row['ms']:5.2f}x" for name, ms in row["peers_ms"].items())
    return (
        f"{text:40s} {row['ms']:9.3f} ms {row['tokens_per_s'] / 1e6:8.3f} M tokens/s"
        f" {row['sae_tokens_per_s'] / 1e6:8.3f} M SAE-tokens/s {row['share_of_peak']:5.1%} of peak"
        f" {memory}densest latent {row['densest_latent']:.2f}, top 1 % {row['top_percent_share']:.0%} of firings"
        f"{against}{beside}"
    )


if __name__ == "__main__":
    run_cli(app)
