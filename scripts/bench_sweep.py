#!/usr/bin/env python
"""The whole pipeline: one trial after another against one pack, and both against the sum of their parts.

    python scripts/bench_sweep.py                                        # a tiny model on the CPU
    python scripts/bench_sweep.py --model gpt2-small --trials 8 --ratio 32 --hooks blocks.8.hook_resid_pre
    python scripts/bench_sweep.py --model path/to/huggingface-directory --json result.json
    python scripts/bench_sweep.py --model gpt2-small --trials 1 --seeds 3 --hooks blocks.8.hook_resid_pre

Models of the given shapes get random weights and random tokens: speed does not depend on them.
limit = 1 / (1 / language model alone + 1 / step alone), in tokens/s of the stream.

A share compares rates of one round, and everything is timed in windows of equally many steps: a machine's speed drifts
within minutes, and the median over short windows hides disturbances that the median over longer ones shows.
"""

from __future__ import annotations

import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise, repeat
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table

from saeopt.config import RunConfig, validate_run
from saeopt.console import console, log
from saeopt.errors import UserError
from saeopt.options import run_cli
from saeopt.saes.registry import sae_config_class
from saeopt.training import Observer, TrialPlan, train_pack
from saeopt.training.runtime import Runtime

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
VOCABULARY = 50257


def model_config(shape: str, context: int) -> Any:
    """A transformers config of a well-known shape, or None where `shape` is a folder."""
    from transformers import GPT2Config, GPTNeoConfig, LlamaConfig

    if shape == "gpt2-small":
        return GPT2Config(n_positions=max(1024, context))
    if shape == "tinystories-1m":
        layers = [[["global", "local"], 4]]
        return GPTNeoConfig(
            hidden_size=64,
            num_layers=8,
            attention_types=layers,
            num_heads=16,
            max_position_embeddings=max(2048, context),
        )
    if shape == "tiny":
        return LlamaConfig(
            vocab_size=512, hidden_size=64, intermediate_size=172, num_hidden_layers=4, num_attention_heads=8,
            num_key_value_heads=4, max_position_embeddings=max(512, context),
        )  # fmt: skip
    return None


def prepare(shape: str, context: int, samples: int, folder: Path) -> tuple[Path, Path]:
    """A model directory and a parquet file of random token rows."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from transformers import AutoConfig, AutoModelForCausalLM

    config, path = model_config(shape, context), folder / "model"
    if config is None:
        path = Path(shape)
        if not path.is_dir():
            raise UserError(f"--model {shape}: must be gpt2-small, tinystories-1m, tiny or a model directory")
        config = AutoConfig.from_pretrained(path)
    else:
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(path)
    rows = torch.randint(8, config.vocab_size, (samples, context), generator=torch.Generator().manual_seed(0))
    pq.write_table(pa.table({"input_ids": list(rows.numpy())}), folder / "tokens.parquet")
    return path, folder / "tokens.parquet"


class Rates(Observer):
    """Collects the stream's tokens/s of each log step, and the processor's time until then, without the first ones."""

    def __init__(self) -> None:
        self.seen: list[float] = []
        self.busy: list[float] = []

    def progress(self, samples: int, total: int, tokens_per_s: float) -> None:
        self.seen.append(tokens_per_s)
        self.busy.append(time.process_time())

    def processor_seconds(self) -> float:
        """Between two log steps, over all threads: what else a machine does changes this less than the wall's time."""
        kept = self.busy[len(self.busy) // 3 :]
        return statistics.median(after - before for before, after in pairwise(kept))

    def median(self) -> float:
        """Tokens per second of the stream."""
        return statistics.median(self.seen[len(self.seen) // 3 :])


def timed(work: Callable[[], object], tokens: int, device: torch.device, repeats: int) -> float:
    """Median tokens/s of `work`, which handles `tokens` tokens."""
    found = []
    for turn in range(repeats + 2):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if turn >= 2:
            found.append(tokens / (time.perf_counter() - start))
    return statistics.median(found)


def language_model_alone(config: RunConfig, runtime: Runtime, repeats: int) -> float:
    """Tokens/s of harvesting with nothing to train on them, in windows of whole groups and at least a log step."""
    from saeopt.activations.stream import ActivationStream

    model = runtime.language_model(config)
    stream = ActivationStream(model, runtime.token_data(config, model), model.resolve(config.saes.hooks), config)
    group = stream.schedule.group
    batches = -(-config.log_every_n_grad_steps * config.gradient_accumulation_steps // group) * group
    tokens = batches * config.data.train_batch_size * config.data.context_length
    try:
        return timed(lambda: [next(stream) for _ in range(batches)], tokens, runtime.device, repeats)
    finally:
        stream.close()


def step_alone(configs: dict[str, RunConfig], runtime: Runtime, repeats: int) -> float:
    """Tokens/s (of the stream) of the SAE step of all members on one batch that is there already, per log step."""
    from saeopt.activations.stream import ActivationStream
    from saeopt.training.pack import Pack
    from saeopt.training.setup import blank_members, calibrate, sites_of

    plans = [TrialPlan(name, config, Path()) for name, config in configs.items()]
    config = plans[0].config
    model = runtime.language_model(config)
    tokens, hooks = runtime.token_data(config, model), sites_of(plans, model)
    members = [m for plan in plans for m in blank_members(plan, hooks[plan.name], model, runtime)]
    calibrate(members, model, tokens, config, runtime)
    pack = Pack(members, runtime, total_samples=config.data.n_train_samples or 1)
    stream = ActivationStream(model, tokens, pack.hooks, config)
    batch = next(stream)

    window = config.log_every_n_grad_steps

    def steps() -> None:
        for _ in range(window):
            pack.step(repeat(batch), config.effective_batch)

    try:
        return timed(steps, window * config.effective_batch * config.data.context_length, runtime.device, repeats)
    finally:
        stream.close()


def pipeline(configs: dict[str, RunConfig], runtime: Runtime, folder: Path, rates: Rates | None = None) -> float:
    """Tokens/s of the stream while the configs train as one pack."""
    rates = rates or Rates()
    names = "-".join(configs)[:40]
    plans = [TrialPlan(name, config, folder / names / name) for name, config in configs.items()]
    train_pack(plans, runtime, rates)
    return rates.median()


@app.command()
def main(
    model: Annotated[str, typer.Option(help="gpt2-small, tinystories-1m, tiny, or a model directory.")] = "tiny",
    hooks: Annotated[str, typer.Option(help="Hook points, comma-separated.")] = "blocks.2.hook_resid_pre",
    sae_type: Annotated[str, typer.Option(help="Architecture of the trials.")] = "relu",
    trials: Annotated[
        int, typer.Option(min=1, help="Trials of the sweep, each with its own learning rate and λ (or k).")
    ] = 8,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds of each trial; more than one: also what they cost.")] = 1,
    ratio: Annotated[float, typer.Option(help="Dictionary width / model width.")] = 8.0,
    context: Annotated[int, typer.Option(help="Tokens per sample.")] = 128,
    batch: Annotated[int, typer.Option(help="Samples of a micro-batch.")] = 8,
    accumulation: Annotated[int, typer.Option(min=1, help="Micro-batches per step.")] = 1,
    steps: Annotated[int, typer.Option(help="Steps of each pipeline run.")] = 60,
    repeats: Annotated[int, typer.Option(help="Windows in which the parts alone are timed.")] = 10,
    rounds: Annotated[int, typer.Option(min=1, help="Times that everything is measured in turn; medians.")] = 3,
    alone: Annotated[bool, typer.Option(help="Also run one trial by itself.")] = True,
    cache: Annotated[bool, typer.Option(help="Also run the pack from a warm activation cache.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, …")] = "auto",
    stack: Annotated[str, typer.Option(help="auto, fused or reference.")] = "auto",
    json_path: Annotated[Path | None, typer.Option("--json", help="Also write the numbers here.")] = None,
) -> None:
    """Measure one pack against its parts and against its trials one by one."""
    from saeopt.console import set_up_logging

    set_up_logging()
    runtime = Runtime(device)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model_dir, tokens = prepare(model, context, min(20_000, batch * (accumulation * steps + 8)), folder)
        raw: dict[str, Any] = {
            "tlens_model_path": str(model_dir), "save_dir": str(folder / "output"), "performance": {"stack": stack},
            "activations": {"cache": "off"},
            "eval_every_n_samples": None, "log_every_n_grad_steps": max(1, steps // 12),
            "gradient_accumulation_steps": accumulation, "seeds": seeds,
            "data": {
                "dataset_name": str(tokens), "streaming": False, "context_length": context, "n_eval_samples": 0,
                "n_train_samples": batch * accumulation * steps, "train_batch_size": batch,
            },
        }  # fmt: skip
        configs = configs_of(raw, trials, sae_type, hooks, ratio)
        numbers = measure(configs, runtime, folder, repeats, rounds, alone, cache)
    numbers |= {"model": model, "hooks": hooks, "sae_type": sae_type, "trials": trials, "seeds": seeds}
    numbers |= {"ratio": ratio, "batch": batch}
    numbers |= {"context": context, "accumulation": accumulation, "device": str(runtime.device)}
    numbers["threads"] = torch.get_num_threads()
    show(numbers)
    if json_path is not None:
        json_path.write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")


def configs_of(raw: dict[str, Any], trials: int, sae_type: str, hooks: str, ratio: float) -> dict[str, RunConfig]:
    """The sweep's trials."""
    configs, fields = {}, sae_config_class(sae_type).model_fields
    for i in range(trials):
        saes = {"sae_type": sae_type, "sae_positions": hooks.split(","), "dict_size_to_input_ratio": ratio}
        saes |= {"k": 16 * 2 ** (i % 4)} if "k" in fields else {"sparsity_coeff": 0.5 * 1.3**i}
        configs[f"trial{i}"] = validate_run({**raw, "lr": 1e-3 * 1.05**i, "saes": saes}, "bench_sweep")
    return configs


class Found(dict[str, Any]):
    """Numbers by name, each told as soon as it is known."""

    def __setitem__(self, name: str, value: Any) -> None:
        super().__setitem__(name, value)
        log.info("%s: %s", name.replace("_", " "), f"{value:,.4g}" if isinstance(value, float) else value)


def measure(
    configs: dict[str, RunConfig], runtime: Runtime, folder: Path, repeats: int, rounds: int, alone: bool, cache: bool
) -> dict[str, Any]:
    """Medians over the rounds, and every round. Rates in tokens/s of the stream unless the name says otherwise."""
    cached = None
    if cache:
        section = {"activations": {"cache": str(folder / "cache")}}
        cached = {
            name: validate_run({**c.model_dump(mode="json"), **section}, "bench_sweep") for name, c in configs.items()
        }
        pipeline(cached, runtime, folder / "cold")
    seen = []
    for number in range(rounds):
        log.info("round %d of %d", number + 1, rounds)
        seen.append(one_round(configs, cached, runtime, folder / f"round{number}", repeats, alone))
    found = {name: statistics.median(row[name] for row in seen) for name in seen[0]}
    if runtime.device.type == "cuda":
        found["predicted_gib"] = predicted(list(configs.values())) / 2**30
    return {**found, "rounds": seen}


def one_round(
    configs: dict[str, RunConfig], cached: dict[str, RunConfig] | None, runtime: Runtime, folder: Path, repeats: int,
    alone: bool,
) -> dict[str, Any]:  # fmt: skip
    """All rates once."""
    first = dict([next(iter(configs.items()))])
    config = first[next(iter(first))]
    found = Found()
    found["language_model"] = language_model_alone(config, runtime, repeats)
    found["step"] = step_alone(configs, runtime, repeats)
    if cached:
        found["pack_cached"] = pipeline(cached, runtime, folder / "warm")
        found["cached_share_of_step"] = found["pack_cached"] / found["step"]
    if runtime.device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    found["limit"] = 1 / (1 / found["language_model"] + 1 / found["step"])
    pack, single = Rates(), Rates()
    found["pack"] = pipeline(configs, runtime, folder / "pack", pack)
    if runtime.device.type == "cuda":
        found["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    found["share_of_limit"] = found["pack"] / found["limit"]
    found["sae_tokens_per_s"] = found["pack"] * sum(c.seeds * len(c.saes.sae_positions) for c in configs.values())
    if config.seeds > 1:
        one = {name: other.model_copy(update={"seeds": 1}) for name, other in configs.items()}
        found["one_seed"] = pipeline(one, runtime, folder / "one_seed", single)
        found["language_model_share_of_one_seed"] = found["one_seed"] / found["language_model"]
        found["cost_of_seeds"] = found["one_seed"] / found["pack"]  # how much longer a training takes
        found["cost_of_seeds_in_processor_time"] = pack.processor_seconds() / single.processor_seconds()
    if alone:
        found["one_by_one"] = pipeline(first, runtime, folder / "alone") / len(configs)
        found["pack_over_one_by_one"] = found["pack"] / found["one_by_one"]
        if cached:
            found["pack_cached_over_one_by_one"] = found["pack_cached"] / found["one_by_one"]
    return found


def predicted(configs: list[RunConfig]) -> int:
    """Peak bytes on a GPU as `study create --dry-run` estimates them."""
    from saeopt.training.dry_run import shapes, weightless
    from saeopt.training.memory import estimate

    model, lm = weightless(configs[0])
    members = [shape for config in configs for shape in shapes(config, model)]
    return sum(estimate(configs[0], members, lm, 2).values())


def show(numbers: dict[str, Any]) -> None:
    """A table of what was measured."""
    table = Table("what", "value", title=f"{numbers['model']} on {numbers['device']}")
    for name, value in numbers.items():
        if name == "rounds":
            continue
        table.add_row(name.replace("_", " "), f"{value:,.3g}" if isinstance(value, float) else str(value))
    console.print(table)


if __name__ == "__main__":
    run_cli(app)
