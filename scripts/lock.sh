#!/usr/bin/env bash
# Writes constraints.txt anew: the newest packages that pyproject.toml allows. Run the tests before committing the result.
#
#   scripts/lock.sh            everything to its newest allowed version
#   scripts/lock.sh --keep     keep what is pinned; only add and drop what pyproject.toml added and dropped
# TORCH=2.13.0 is pinned first, so that pip takes the build that its configuration offers (a CPU build in find-links, say).
set -euo pipefail
case ${1:-} in -h | --help) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; exit ;; esac
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/lib/venv.sh
. scripts/lib/venv.sh

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
echo "torch==${TORCH:-2.13.0}" >"$scratch/seed.txt"
[ "${1:-}" != --keep ] || grep '==' constraints.txt >"$scratch/seed.txt"
"$(python_interpreter)" -m venv "$scratch/venv"
"$scratch/venv/bin/python" -m pip install --quiet --disable-pip-version-check -c "$scratch/seed.txt" -e ".[test,gguf,tensorboard,docs]"
{
  sed -n '/^#/p' constraints.txt
  "$scratch/venv/bin/python" -m pip freeze --all --exclude-editable --disable-pip-version-check |
    grep -vE '^(saeopt|pip|setuptools)( |=)' | sed -E 's/\+[a-z0-9.]+$//'
} >"$scratch/constraints.txt"
cp "$scratch/constraints.txt" constraints.txt
