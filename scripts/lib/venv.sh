# Sourced by the scripts beside it: a virtual environment with saeopt's pinned dependencies.
# shellcheck shell=bash

# python_interpreter: the first of $PYTHON, python3.11, python3.12, python3.13, python3, python that runs and is 3.11 to 3.13.
python_interpreter() {
  local candidate
  for candidate in "${PYTHON:-}" python3.11 python3.12 python3.13 python3 python; do
    [ -n "$candidate" ] || continue
    if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' >/dev/null 2>&1; then
      command -v "$candidate"
      return
    fi
  done
  echo "saeopt: Python 3.11, 3.12 or 3.13 is needed (set PYTHON to its path)" >&2
  return 1
}

# ensure_venv FOLDER EXTRAS: makes or updates the environment; does nothing when pyproject.toml and constraints.txt are unchanged.
ensure_venv() {
  local folder=$1 extras=$2 python want log
  want=$(cat pyproject.toml constraints.txt | cksum | cut -d' ' -f1)-$extras
  if [ -x "$folder/bin/python" ] && [ "$(cat "$folder/.saeopt-installed" 2>/dev/null)" = "$want" ]; then return; fi
  python=$(python_interpreter)
  if [ ! -x "$folder/bin/python" ]; then
    echo "saeopt: making $folder with $("$python" --version)" >&2
    "$python" -m venv "$folder"
  fi
  echo "saeopt: installing the pinned packages into $folder (the first time this takes a few minutes)" >&2
  log=$folder/install.log
  if ! "$folder/bin/python" -m pip install --disable-pip-version-check --no-input -c constraints.txt -e ".[$extras]" \
    >"$log" 2>&1; then
    tail -n 20 "$log" >&2
    echo "saeopt: the installation failed; all of it is in $log" >&2
    return 1
  fi
  echo "$want" >"$folder/.saeopt-installed"
}
