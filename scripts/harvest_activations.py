"""Write activations of a language model to a safetensors file: `x` [N, d] in bfloat16.

    python scripts/harvest_activations.py MODEL_DIR TEXT FILE N [--hook blocks.9.hook_resid_pre]

For `scripts/bench_step.py --data FILE`. Special tokens are left out, and the first positions of each sequence, where
many models keep an attention sink of many times the usual norm.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from safetensors.torch import save_file

from saeopt.activations.stream import ActivationStream
from saeopt.config import validate_run
from saeopt.console import console
from saeopt.errors import UserError
from saeopt.files import atomic_write
from saeopt.options import run_cli
from saeopt.training.runtime import Runtime

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    model_dir: Annotated[Path, typer.Argument(help="a Hugging Face directory")],
    text: Annotated[Path, typer.Argument(help="a .txt file; documents end at blank lines")],
    file: Annotated[Path, typer.Argument(help="the safetensors file to write")],
    n: Annotated[int, typer.Argument(min=1, help="number of tokens")],
    hook: Annotated[str, typer.Option(help="hook point")] = "blocks.9.hook_resid_pre",
    context: Annotated[int, typer.Option(min=2, help="tokens of a sequence")] = 128,
    skip_first: Annotated[int, typer.Option(min=0, help="positions to leave out of each sequence")] = 1,
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
    runtime = Runtime(device)
    model = runtime.language_model(config)
    tokens = runtime.token_data(config, model)
    available = (tokens.n_train_available or 0) // 8
    stream = ActivationStream(model, tokens, model.resolve([hook]), config)
    found: list[torch.Tensor] = []
    try:
        while sum(map(len, found)) < n and len(found) < available:
            batch = next(stream)
            late_N = torch.arange(len(batch.keep_N), device=batch.keep_N.device) % context >= skip_first
            found.append(batch.x[hook][batch.keep_N & late_N].to("cpu", torch.bfloat16))
    finally:
        stream.close()
    if sum(map(len, found)) < n:
        raise UserError(
            f"{text}: holds {sum(map(len, found)):,} tokens in whole batches of 8 sequences, {n:,} are wanted"
        )
    x_Nd = torch.cat(found)[:n].contiguous()
    with atomic_write(file) as path:
        save_file({"x": x_Nd}, path)
    norm_N = x_Nd.float().norm(dim=-1)
    console.print(f"{file}: x {list(x_Nd.shape)}, norm {norm_N.mean():.2f} in the mean, {norm_N.max():.2f} at most")


if __name__ == "__main__":
    run_cli(app)
