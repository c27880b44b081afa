"""Write Python's language reference (the topics of `help()`) as one .jsonl file; print its path.

Every Python carries this text: 0.47 MB, about 110,000 tokens. One topic is one document.

    python scripts/quickstart_data.py [FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from pydoc_data.topics import topics


def default_file() -> Path:
    """`$SAEOPT_CACHE_DIR/data/…`, or the user's cache folder."""
    base = os.environ.get("SAEOPT_CACHE_DIR")
    cache = Path(base) if base else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "saeopt"
    return cache / "data" / f"python-{sys.version_info[0]}.{sys.version_info[1]}-reference.jsonl"


def write(path: Path) -> Path:
    """The file, made if it is not there; it appears complete or not at all."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        lines = (json.dumps({"text": text}) + "\n" for _, text in sorted(topics.items()))
        temporary.write_text("".join(lines), encoding="utf-8")
        temporary.replace(path)
    return path


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", nargs="?", type=Path, default=None, help="default: in the user's cache folder")
    sys.stdout.write(f"{write((parser.parse_args().file or default_file()).expanduser().resolve())}\n")


if __name__ == "__main__":
    main()
