#!/usr/bin/env bash
# The ring between two processes, for people. Usage: scripts/run_demo.sh [--mode=golden|failure]
# golden: deterministic counts, last line "OK: golden scenario completed", exit 0.
# failure: "ERROR: invalid input or unavailable IPC resource", "exit=2", exit 2.
set -euo pipefail
cd "$(dirname "$0")/.."
mode=golden
for argument in "$@"; do
  case $argument in
    --mode=golden | --mode=failure) mode=${argument#--mode=} ;;
    *) echo "run_demo.sh: $argument: use --mode=golden or --mode=failure" >&2; exit 2 ;;
  esac
done
if [ -z "${RELAY_BIN:-}" ]; then
  cargo build --quiet --release -p relay --bin relay
  RELAY_BIN=${CARGO_TARGET_DIR:-target}/release/relay
fi
exec "$RELAY_BIN" ring-demo --mode "$mode"
