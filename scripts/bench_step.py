"""How fast a training step of SAEs is: architectures × sizes × stack depth, on the CPU or a GPU.

    python scripts/bench_step.py                                  the usual cases of this device
    python scripts/bench_step.py --case relu:768:24576:4096:8     architecture:d:h:batch:members[:k[:dead share]]
    python scripts/bench_step.py --against reference --json out.json

Activations lie on the device; a step is forward, backward, clipping and Adam of all members. Medians over steps.
The share of the peak counts the products that the step makes and a bf16 (CPU: float32) product measured here.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from pydantic import ValidationError

from saeopt.config.base import explain
from saeopt.config.run import PerformanceConfig
from saeopt.console import console
from saeopt.errors import UserError, run_cli
from saeopt.evaluation.__main__ import choose_device
from saeopt.saes.base import SAE
from saeopt.saes.registry import get_sae
from saeopt.training.stacks import make_stack
from saeopt.training.stacks.base import Hyper, Stack, StackBatch, StackOptions

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
    "relu:64:2048:4096:8",
    "relu:64:2048:4096:32",
    "topk:64:2048:4096:32:64",
]
CPU_CASES = ["relu:64:2048:4096:1", "topk:64:2048:4096:1:16", "relu:576:1152:1024:8"]
PRODUCTS = {"relu": 10, "gated": 14, "hard_concrete": 14, "gated_hard_concrete": 14, "topk": 2}
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
            usual = ["64" if name == "topk" else "0", "0"]
            k, dead = numbers[4:] + usual[len(numbers) - 4 :]
            case = cls(name, d, h, batch, members, int(k) or None, float(dead))
        except ValueError:
            raise UserError(f"--case {text}: must be architecture:d:h:batch:members[:k[:dead share]]") from None
        fields = get_sae(name).Config.model_fields  # a name that nobody knows is told before anything is timed
        if min(d, h, batch, members) < 1 or not 0 <= case.dead <= 1:
            raise UserError(f"--case {text}: sizes must be above 0, the share of dead latents between 0 and 1")
        if case.k is not None and ("k" not in fields or not 0 < case.k <= h):
            raise UserError(f"--case {text}: k is for topk, and at most h")
        return case

    @property
    def flops_per_token(self) -> float:
        """Of one member."""
        sparse = 8 * self.d * self.k if self.k else 0
        return PRODUCTS.get(self.sae_type, 10) * self.d * self.h + sparse


def make_saes(case: Case, device: torch.device) -> list[SAE]:
    """Members as they look early in training: unit decoder rows, tied encoder, some latents asleep if asked for."""
    cls = get_sae(case.sae_type)
    fields: dict[str, Any] = {"sae_type": case.sae_type, "sae_positions": ["x"]}
    if case.k:
        fields["k"] = case.k
    saes = []
    for i in range(case.members):
        sae = cls(case.d, case.h, cls.Config(**fields), device=device)
        generator = torch.Generator(device=device).manual_seed(i)
        with torch.no_grad():
            rows = torch.randn(case.h, case.d, generator=generator, device=device)
            rows /= rows.norm(dim=-1, keepdim=True)
            sae.W_dec.copy_(rows)
            sae.W_enc.copy_(rows.T * 0.5)
            asleep = torch.randperm(case.h, generator=generator, device=device)[: int(case.dead * case.h)]
            sae.W_enc[:, asleep] *= 0.05
            if len(asleep):
                sae.tokens_since_fired[asleep] = 10**9
        saes.append(sae)
    return saes


def run(case: Case, stack_kind: str, device: torch.device, performance: dict[str, str], steps: int) -> dict[str, Any]:
    """Median time of a step in milliseconds and the memory that it needed."""
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    saes = make_saes(case, device)
    options = StackOptions(10**8, autocast=torch.bfloat16 if on_gpu else None)
    settings: Any = {**performance, "stack": stack_kind}
    stack = make_stack(saes, list(range(case.members)), options, PerformanceConfig(**settings))
    hyper = [Hyper(1e-5, 0.1, 0.5, 1.0)] * case.members
    dtype = torch.bfloat16 if on_gpu else torch.float32
    inputs = [torch.randn(case.batch, case.d, device=device).to(dtype) for _ in range(3)]
    started = time.perf_counter()
    warm = 6 if on_gpu else 1
    for i in range(warm):
        _step(stack, inputs[i % 3], i, case, hyper)
    if on_gpu:
        torch.cuda.synchronize()
    warm_s = time.perf_counter() - started
    times = (_time_on_gpu if on_gpu else _time_on_cpu)(stack, inputs, case, hyper, steps)
    found = stack.metrics()
    ms = statistics.median(times)
    tokens_per_s = case.batch / ms * 1e3
    return {
        **asdict(case),
        "stack": stack_kind,
        "ms": ms,
        "tokens_per_s": tokens_per_s,
        "sae_tokens_per_s": tokens_per_s * case.members,
        "tflops": tokens_per_s * case.members * case.flops_per_token / 1e12,
        "peak_memory_gb": torch.cuda.max_memory_allocated() / 1e9 if on_gpu else None,
        "warm_up_s": warm_s,
        "loss": found[0]["loss"],
        "finite": min(m["finite"] for m in found),
    }


def _step(stack: Stack, x_Nd: torch.Tensor, i: int, case: Case, hyper: list[Hyper]) -> None:
    slots = math.gcd(case.batch, 8)
    stack.step(StackBatch(x_Nd, None, i * slots, slots, case.batch // slots), hyper)


def _time_on_gpu(stack: Stack, inputs: list[torch.Tensor], case: Case, hyper: list[Hyper], steps: int) -> list[float]:
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    marks[0].record()
    for i in range(steps):
        _step(stack, inputs[i % 3], i, case, hyper)
        marks[i + 1].record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in pairwise(marks)]


def _time_on_cpu(stack: Stack, inputs: list[torch.Tensor], case: Case, hyper: list[Hyper], steps: int) -> list[float]:
    times = []
    for i in range(steps):
        started = time.perf_counter()
        _step(stack, inputs[i % 3], i, case, hyper)
        times.append((time.perf_counter() - started) * 1e3)
    return times


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


def profile(case: Case, device: torch.device, performance: dict[str, str]) -> str:
    """Where the time of a step goes."""
    saes = make_saes(case, device)
    options = StackOptions(10**8, autocast=torch.bfloat16 if device.type == "cuda" else None)
    settings: Any = {**performance, "stack": "fused"}
    stack = make_stack(saes, list(range(case.members)), options, PerformanceConfig(**settings))
    hyper = [Hyper(1e-5, 0.1, 0.5, 1.0)] * case.members
    x_Nd = torch.randn(case.batch, case.d, device=device)
    x_Nd = x_Nd.bfloat16() if device.type == "cuda" else x_Nd
    for i in range(6):
        _step(stack, x_Nd, i, case, hyper)
    with torch.profiler.profile() as profiler:
        for i in range(4):
            _step(stack, x_Nd, i, case, hyper)
        if device.type == "cuda":
            torch.cuda.synchronize()
    by = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    rows = sorted(profiler.key_averages(), key=lambda e: -_self_time(e, device))[:16]
    total = sum(_self_time(e, device) for e in profiler.key_averages())
    lines = [f"{_self_time(e, device) / 4e3:9.3f} ms {e.count // 4:4d}x  {e.key[:90]}" for e in rows]
    return "\n".join([f"{case} ({by}, {total / 4e3:.3f} ms per step)", *lines])


def _self_time(event: Any, device: torch.device) -> float:
    return event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total


@app.command()
def main(
    case: Annotated[list[str] | None, typer.Option(help="architecture:d:h:batch:members[:k[:dead share]]")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda; auto: a GPU where there is one")] = "auto",
    against: Annotated[str | None, typer.Option(help="also time this stack (reference) and show the ratio")] = None,
    steps: Annotated[int, typer.Option(help="steps timed per case; 0: 40 on a GPU, 5 on the CPU")] = 0,
    compile: Annotated[str, typer.Option(help="performance.compile")] = "auto",
    graphs: Annotated[str, typer.Option(help="performance.graphs")] = "auto",
    profiles: Annotated[bool, typer.Option(help="show where the time of each case goes")] = False,
    json_path: Annotated[Path | None, typer.Option("--json", help="write the numbers here")] = None,
) -> None:
    """Time the training step."""
    asked = {text: Case.parse(text) for text in case or ()}
    where = choose_device(device)
    performance = {"compile": compile, "graphs": graphs}
    try:
        PerformanceConfig(**{**performance, "stack": against or "auto"})  # type: ignore[arg-type]
    except ValidationError as error:
        raise explain(error, "performance", {}) from None
    peak = peak_tflops(where)
    name = torch.cuda.get_device_name() if where.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    console.print(f"{name}, torch {torch.__version__}, peak {peak:.1f} TFLOP/s")
    results = []
    usual = GPU_CASES if where.type == "cuda" else CPU_CASES
    for text, one in (asked or {text: Case.parse(text) for text in usual}).items():
        count = steps or (40 if where.type == "cuda" else 5)
        row = run(one, "fused", where, performance, count)
        row["share_of_peak"] = row["tflops"] / peak
        if against:
            row["ms_against"] = run(one, against, where, performance, min(count, 10))["ms"]
            row["ratio"] = row["ms_against"] / row["ms"]
        results.append(row)
        console.print(_line(text, row), soft_wrap=True)
        if profiles:
            console.print(profile(one, where, performance), soft_wrap=True, markup=False)
    if json_path:
        json_path.write_text(
            json.dumps({"device": name, "torch": torch.__version__, "peak_tflops": peak, "cases": results}, indent=1)
        )


def _line(text: str, row: dict[str, Any]) -> str:
    memory = f"{row['peak_memory_gb']:6.1f} GB " if row["peak_memory_gb"] is not None else ""
    against = f" {row['ratio']:5.2f}x" if "ratio" in row else ""
    return (
        f"{text:40s} {row['ms']:9.3f} ms {row['tokens_per_s'] / 1e6:8.3f} M tokens/s"
        f" {row['sae_tokens_per_s'] / 1e6:8.3f} M SAE-tokens/s {row['share_of_peak']:5.1%} of peak"
        f" {memory}warm-up {row['warm_up_s']:.1f} s{against}"
    )


if __name__ == "__main__":
    run_cli(app)
