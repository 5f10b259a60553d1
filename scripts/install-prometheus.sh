#!/usr/bin/env bash
# Puts Debian's prometheus and promtool into DIRECTORY, without installing a service.
#
#   scripts/install-prometheus.sh DIRECTORY
set -euo pipefail

fail() { printf 'install-prometheus: %s\n' "$*" >&2; exit 1; }

[ $# -eq 1 ] || fail "give the directory"
directory=$1
[ -x "$directory/prometheus" ] && [ -x "$directory/promtool" ] && exit 0
command -v apt-get >/dev/null && command -v dpkg-deb >/dev/null ||
    fail "this needs Debian's apt-get and dpkg-deb; elsewhere put prometheus and promtool there yourself"

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
chmod 755 "$work"
cd "$work"
apt-get download -qq prometheus || { apt-get update -qq && apt-get download -qq prometheus; } ||
    fail "apt-get could not download the package prometheus"
dpkg-deb -x prometheus_*.deb files
mkdir -p "$directory"
cp files/usr/bin/prometheus files/usr/bin/promtool "$directory/"
"$directory/promtool" --version 2>&1 | head -n 1
