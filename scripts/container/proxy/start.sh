#!/bin/sh
# Caddy wants the password's hash; .env holds the password. It goes through a pipe, not over a command line.
set -eu
if [ "${#DASHBOARD_PASSWORD}" -lt 12 ]; then
  echo "saeopt: error: set DASHBOARD_PASSWORD (12 characters or more) in .env; scripts/make_env.sh writes one" >&2
  exit 2
fi
DASHBOARD_HASH=$(printf '%s\n%s\n' "$DASHBOARD_PASSWORD" "$DASHBOARD_PASSWORD" | caddy hash-password)
unset DASHBOARD_PASSWORD
export DASHBOARD_HASH
exec caddy run --config /etc/caddy/Caddyfile --adapter caddyfile
