#!/usr/bin/env bash
# Writes .env from .env.example with fresh passwords and this user's ids; what is set already stays as it is.
set -euo pipefail
case ${1:-} in -h | --help) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; exit ;; esac
cd "$(dirname "${BASH_SOURCE[0]}")/.."

secret() { LC_ALL=C tr -dc 'A-Za-z0-9' < <(head -c 4096 /dev/urandom) | head -c 32 || true; }

# fill NAME VALUE: where the file has no value for NAME
fill() {
  if grep -q "^$1=..*" .env; then return; fi
  if grep -q "^$1=" .env; then sed -i "s|^$1=\$|$1=$2|" .env; else echo "$1=$2" >>.env; fi
  echo "saeopt: set $1 in .env"
}

umask 077
if [ ! -e .env ]; then
  if [ "$(id -u)" = 0 ]; then # containers do not run as root, whoever starts them
    cp .env.example .env
  else
    sed -e "s/^UID=.*/UID=$(id -u)/" -e "s/^GID=.*/GID=$(id -g)/" .env.example >.env
  fi
  echo "saeopt: wrote .env from .env.example"
fi
chmod 600 .env
fill POSTGRES_PASSWORD "$(secret)"
fill DASHBOARD_PASSWORD "$(secret)"
# The folder that results of `docker compose run --rm study …` come to: made here, or the engine makes it as root's.
if [ ! -e results ]; then
  mkdir -m 755 results
  if [ "$(id -u)" = 0 ]; then chown "$(sed -n 's/^UID=//p' .env):$(sed -n 's/^GID=//p' .env)" results; fi
fi
