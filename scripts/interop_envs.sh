#!/usr/bin/env bash
# Environments of their own for the libraries that saeopt is compared with and exports to: they pin other versions of
# TransformerLens than saeopt does.
#
#   scripts/interop_envs.sh                          both, in .interop/sae-lens and .interop/dictionary-learning
#   scripts/interop_envs.sh sparsify circuit-tracer  those that are named (also syne-tune, for compare_search.py)
#   INTEROP_DIR=PATH scripts/interop_envs.sh         elsewhere
#   TORCH_INDEX=URL scripts/interop_envs.sh          torch from another index (PyTorch's own has small CPU builds)
#   BESIDE=PYTHON scripts/interop_envs.sh sae-lens   with the torch of this interpreter: half a minute, and enough to load SAEs
set -euo pipefail
case ${1:-} in -h | --help) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; exit ;; esac
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/lib/venv.sh
. scripts/lib/venv.sh

declare -A PACKAGES=(
  [sae-lens]="sae-lens==6.54.12 transformer-lens>=3.9,<4"
  [dictionary-learning]="dictionary-learning==0.1.0"
  [sparsify]="eai-sparsify==1.3.3"
  [circuit-tracer]="circuit-tracer==0.5.0"
  [syne-tune]="syne-tune==0.16.0"
)
# What these need that saeopt's environment lacks; the rest they share with it.
declare -A BESIDE_PACKAGES=(
  [sae-lens]="sae-lens==6.54.12 transformer-lens==3.9.0 better-abc==0.0.3 simple-parsing==0.1.9 docstring_parser==0.18.0"
)
[ $# -gt 0 ] || set -- sae-lens dictionary-learning
for name in "$@"; do
  [ -n "${PACKAGES[$name]:-}" ] || { echo "saeopt: '$name' is none of ${!PACKAGES[*]}" >&2; exit 2; }
done
for name in "$@"; do
  folder=${INTEROP_DIR:-.interop}/$name
  want=${PACKAGES[$name]} options=()
  if [ -n "${BESIDE:-}" ]; then
    want=${BESIDE_PACKAGES[$name]:-}
    [ -n "$want" ] || { echo "saeopt: BESIDE is for ${!BESIDE_PACKAGES[*]}, not for '$name'" >&2; exit 2; }
    options=(--no-deps)
  fi
  if [ "$(cat "$folder/.installed" 2>/dev/null)" = "$want" ] ||
    { [ -n "${BESIDE:-}" ] && [ "$(cat "$folder/.installed" 2>/dev/null)" = "${PACKAGES[$name]}" ]; }; then
    continue
  fi
  mkdir -p "$(dirname "$folder")"
  "${BESIDE:-$(python_interpreter)}" -m venv --clear "$folder"
  echo "saeopt: installing $want into $folder (some minutes)" >&2
  pip=("$folder/bin/python" -m pip install --disable-pip-version-check --no-input -q "${options[@]}")
  if [ -n "${TORCH_INDEX:-}" ] && [ -z "${BESIDE:-}" ]; then
    "${pip[@]}" --index-url "$TORCH_INDEX" torch torchvision # of one build: transformers is not imported otherwise
  fi
  # shellcheck disable=SC2086  # several requirements
  if ! "${pip[@]}" $want >"$folder/install.log" 2>&1; then
    tail -n 20 "$folder/install.log" >&2
    echo "saeopt: the installation failed; all of it is in $folder/install.log" >&2
    exit 1
  fi
  if [ -n "${BESIDE:-}" ]; then # after pip, which would take what is shared for what is installed here
    "$BESIDE" -c 'import sys; print("\n".join(p for p in sys.path if p.endswith("-packages")))' \
      >"$("$folder/bin/python" -c 'import site; print(site.getsitepackages()[0])')/shared.pth"
  fi
  echo "$want" >"$folder/.installed"
done
