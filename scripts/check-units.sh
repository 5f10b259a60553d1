#!/usr/bin/env bash
# Are the systemd units right, and no more exposed than they were? Needs no running systemd.
set -euo pipefail
cd "$(dirname "$0")/../deploy/bare-metal"

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
# `verify` looks for the program, which need not be installed here; a template is looked at as one of
# its instances.
for unit in baton-coordinator.service baton-worker@.service; do
    sed 's#/usr/local/bin/baton#/bin/true#' "$unit" > "$scratch/${unit/@/@prefill-0}"
done
# Thresholds are tenths of the exposure level.
check() { # UNIT THRESHOLD
    said=$(systemd-analyze verify "$scratch/$1" 2>&1) && [ -z "$said" ] || { echo "$1: $said"; exit 1; }
    systemd-analyze security --offline=true --threshold="$2" "$scratch/$1" | tail -1
}
check baton-coordinator.service 12
check baton-worker@prefill-0.service 22
