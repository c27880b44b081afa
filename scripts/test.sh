#!/usr/bin/env bash
# Runs the tests in an environment of their own.
#
#   scripts/test.sh                      all tests
#   scripts/test.sh tests/saes -k topk   arguments go to pytest
#   SAEOPT_VENV=PATH scripts/test.sh     use this environment as it is (made and filled when it is not there)
set -euo pipefail
case ${1:-} in -h | --help) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; exit ;; esac
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/lib/venv.sh
. scripts/lib/venv.sh

venv=${SAEOPT_VENV:-.venv-test}
if [ -z "${SAEOPT_VENV:-}" ] || [ ! -x "$venv/bin/python" ]; then
  ensure_venv "$venv" test,gguf,docs
fi

export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1} MPLBACKEND=Agg
exec "$venv/bin/python" -m pytest "$@"
