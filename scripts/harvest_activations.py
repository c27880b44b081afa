"""Write activations of a language model to a safetensors file: `x` [N, d] in bfloat16, with --write also `y` [N, e].

    python scripts/harvest_activations.py MODEL_DIR TEXT FILE N [--hook blocks.9.hook_resid_pre] [--write HOOK]

For `data.activations: FILE` of a config and for `scripts/bench_step.py --data FILE`. Special tokens are left out, and
the first positions of each sample, where many models keep an attention sink of many times the usual norm.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from safetensors.torch import save_file

from saeopt.activations.stream import ActivationStream
from saeopt.config import RunConfig, validate_run
from saeopt.console import console
from saeopt.errors import UserError
from saeopt.files import atomic_write
from saeopt.options import run_cli
from saeopt.training.runtime import Runtime

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def harvested(
    config: RunConfig, runtime: Runtime, hooks: dict[str, str], n: int, skip_first: int
) -> list[dict[str, torch.Tensor]]:
    """Activations of whole micro-batches, at least n tokens, by what each hook point is called in the file."""
    model = runtime.language_model(config)
    tokens = runtime.token_data(config, model)
    batch_size, context = config.data.train_batch_size, config.data.context_length
    stream = ActivationStream(model, tokens, model.resolve(list(hooks.values())), config)
    found: list[dict[str, torch.Tensor]] = []
    have = 0
    try:
        while have < n and len(found) < (tokens.n_train_available or 0) // batch_size:
            batch = next(stream)
            position_N = torch.arange(len(batch.keep_N), device=batch.keep_N.device) % context
            kept_N = batch.keep_N & (position_N >= skip_first)
            found.append({name: batch.x[h][kept_N].to("cpu", torch.bfloat16) for name, h in hooks.items()})
            have += len(found[-1]["x"])
    finally:
        stream.close()
    if have < n:
        text = config.data.dataset_name
        raise UserError(f"{text}: holds {have:,} tokens in whole batches of {batch_size} samples, {n:,} are wanted")
    return found


@app.command()
def main(
    model_dir: Annotated[Path, typer.Argument(help="a Hugging Face directory")],
    text: Annotated[Path, typer.Argument(help="a .txt file; documents end at blank lines")],
    file: Annotated[Path, typer.Argument(help="the safetensors file to write")],
    n: Annotated[int, typer.Argument(min=1, help="number of tokens")],
    hook: Annotated[str, typer.Option(help="hook point")] = "blocks.9.hook_resid_pre",
    write: Annotated[str | None, typer.Option(help="hook point of y: what a transcoder is to give")] = None,
    context: Annotated[int, typer.Option(min=2, help="tokens of a sample")] = 128,
    skip_first: Annotated[int, typer.Option(min=0, help="positions to leave out of each sample")] = 1,
    device: Annotated[str, typer.Option(help="cpu or cuda; auto: a GPU where there is one")] = "auto",
) -> None:
    """Harvest N tokens of activations."""
    if skip_first >= context:
        raise UserError(f"--skip-first {skip_first}: must be below --context {context}")
    config = validate_run(
        {
            "tlens_model_path": str(model_dir),
            "lr": 1e-3, "lr_schedule": "constant",
            "data": {
                "dataset_name": str(text), "tokenizer_name": str(model_dir), "is_tokenized": False, "streaming": False,
                "column_name": "text", "context_length": context, "n_train_samples": None, "n_eval_samples": 0,
                "train_batch_size": 8,
            },
            "saes": {"sae_type": "relu", "sae_positions": [hook]},
        },
        "the command line",
    )  # fmt: skip
    hooks = {"x": hook} if write is None else {"x": hook, "y": write}
    found = harvested(config, Runtime(device), hooks, n, skip_first)
    whole = {name: torch.cat([part[name] for part in found])[:n].contiguous() for name in hooks}
    with atomic_write(file) as path:
        save_file(whole, path)
    for name, x_Nd in whole.items():
        norm_N = x_Nd.float().norm(dim=-1)
        told = f"norm {norm_N.mean():.2f} in the mean, {norm_N.max():.2f} at most"
        console.print(f"{file}: {name} {list(x_Nd.shape)}, {told}")


if __name__ == "__main__":
    run_cli(app)
