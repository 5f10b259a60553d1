#!/usr/bin/env bash
# docs/bare-metal.md, followed on five hosts on which systemd runs: Debian in containers of systemd-nspawn, with
# the addresses of deploy/bare-metal/baton.toml, and the embedded engine in vLLM's place. Says what held, and
# ends with the first thing that did not. Takes about two minutes.
#
#     scripts/boot-bare-metal.sh PATH/TO/baton
#
# Needs root, a network with Debian's packages, and: apt-get install mmdebstrap systemd-container
set -euo pipefail
cd "$(dirname "$0")/.."
program=$(realpath "$1")

declare -A address=([coordinator]=10.77.0.10 [prefill-0]=10.77.0.11 [prefill-1]=10.77.0.12
    [decode-0]=10.77.0.21 [decode-1]=10.77.0.22)
workers=(prefill-0 prefill-1 decode-0 decode-1)
hosts=(coordinator "${workers[@]}")
bridge=baton-hosts
scratch=$(mktemp -d)
declare -A booted

say() { printf '=== %s\n' "$*"; }
held() { printf '  held: %s\n' "$*"; }
must() { "$@" || { printf 'did not hold: %s\n' "$*"; exit 1; }; }
unit_of() { [ "$1" = coordinator ] && echo baton-coordinator || echo "baton-worker@$1"; }

off() { # HOST
    kill -TERM "${booted[$1]}"
    for _ in $(seq 100); do kill -0 "${booted[$1]}" 2> /dev/null || return 0; sleep 0.1; done
    kill -KILL "$(leader "$1")" "${booted[$1]}"
}
leave() {
    for host in "${!booted[@]}"; do off "$host" || true; done
    for host in "${hosts[@]}"; do umount "$scratch/$host/tree" 2> /dev/null || true; done
    ip link delete "$bridge" 2> /dev/null || true
    rm -rf --one-file-system "$scratch"
}
trap leave EXIT

boot() { # HOST
    systemd-nspawn --quiet --directory "$scratch/$1/tree" --machine "$1" --register=no --keep-unit \
        --network-bridge="$bridge" --capability=all --system-call-filter=bpf --boot --console=passive \
        > "$scratch/$1/console" 2>&1 &
    booted[$1]=$!
    until on "$1" "ip -br address show host0 | grep -q ${address[$1]}" 2> /dev/null; do
        kill -0 "${booted[$1]}" 2> /dev/null || { cat "$scratch/$1/console"; exit 1; }
        sleep 0.2
    done
}
leader() { pgrep -P "${booted[$1]}" | head -1; }
on() { # HOST COMMAND
    nsenter -t "$(leader "$1")" -m -u -i -n -p -C -- env -i HOME=/srv TERM=dumb \
        PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin bash -c "cd; $2"
}
until_on() { # HOST COMMAND: within 30 s
    for _ in $(seq 60); do on "$1" "$2" > /dev/null 2>&1 && return 0; sleep 0.5; done
    printf 'never held on %s: %s\n' "$1" "$2"
    on "$1" "journalctl --no-pager -o cat -u 'baton-*' | tail -40"
    exit 1
}
pid() { on "$1" "systemctl show -P MainPID $(unit_of "$1")"; }
whole='baton status --check --config /etc/baton/baton.toml | grep -q "2 prefill and 2 decode"'

say "a Debian with systemd"
mmdebstrap --quiet --variant=minbase --dpkgopt=force-unsafe-io \
    --include=systemd,systemd-sysv,dbus,iproute2,curl,openssl,procps bookworm "$scratch/debian"
chroot "$scratch/debian" systemctl --quiet enable systemd-networkd
ip link add "$bridge" type bridge
ip link set "$bridge" up

say "certificates"
certs() { "$program" certs "$@" > /dev/null; }
certs init --out "$scratch/certs"
certs issue 10.77.0.10 --ca "$scratch/certs"
for worker in "${workers[@]}"; do certs issue "${address[$worker]}" --worker "$worker" --ca "$scratch/certs"; done
# The file as it is deployed, but for the engine, and arenas that fit.
python3 - "$scratch/baton.toml" <<'PYTHON'
import pathlib, re, sys
text = pathlib.Path("deploy/bare-metal/baton.toml").read_text()
text = re.sub(r"\[engine\].*?(?=# Staging memory)", '[engine]\nkind = "sim"\n\n', text, flags=re.S)
text = re.sub(r"\[worker\.engine\]\nconnector_socket = .*\n", "", text)
text = re.sub(r'(port_bytes = )"\d+ [GM]iB"', r'\1"64 MiB"', text)
pathlib.Path(sys.argv[1]).write_text(text)
PYTHON

say "five hosts"
for host in "${hosts[@]}"; do
    mkdir -p "$scratch/$host"/{upper,work,tree}
    mount -t overlay -o "lowerdir=$scratch/debian,upperdir=$scratch/$host/upper,workdir=$scratch/$host/work" \
        overlay "$scratch/$host/tree"
    tree=$scratch/$host/tree
    echo "$host" > "$tree/etc/hostname"
    mkdir -p "$tree/etc/systemd/network"
    printf '[Match]\nName=host0\n[Network]\nAddress=%s/24\nLinkLocalAddressing=no\n' "${address[$host]}" \
        > "$tree/etc/systemd/network/10-host0.network"
    install -D -m 755 "$program" "$tree/usr/local/bin/baton"
    boot "$host"
    on "$host" 'useradd --system --home-dir /nonexistent --shell /usr/sbin/nologin baton
        install -d -m 750 -g baton /etc/baton /etc/baton/tls'
    cp "$scratch/certs/${address[$host]}"/* "$tree/etc/baton/tls/"
    on "$host" 'chgrp baton /etc/baton/tls/host.key && chmod 640 /etc/baton/tls/host.key'
    install -m 644 "$scratch/baton.toml" "$tree/etc/baton/baton.toml"
    unit=baton-worker@.service
    [ "$host" = coordinator ] && unit=baton-coordinator.service
    install -m 644 "deploy/bare-metal/$unit" "$tree/etc/systemd/system/"
done
on coordinator 'install -d -m 750 -g baton /etc/baton/keys
    (umask 027; openssl rand -hex 32 > /etc/baton/keys/default; chgrp baton /etc/baton/keys/default)
    (umask 027; openssl rand -hex 32 > /etc/baton/admin.token; chgrp baton /etc/baton/admin.token)'
for host in "${hosts[@]}"; do
    must on "$host" "baton check /etc/baton/baton.toml | grep -q 'is right'"
    on "$host" "systemctl daemon-reload; systemctl --quiet enable --now $(unit_of "$host") 2>&1"
done
until_on coordinator "$whole"
held "all units start, and all workers attach"
for host in "${hosts[@]}"; do
    status=$(on "$host" "cat /proc/$(pid "$host")/status")
    for line in NoNewPrivs:.1 Seccomp:.2 CapEff:.0000000000000000 'Uid:.[1-9]'; do
        must grep -q "^$line" <<< "$status"
    done
    on "$host" "systemd-analyze security --no-pager $(unit_of "$host") | tail -1"
done
held "none runs as root, none has a capability, all have their filter of system calls"

say "requests"
# Writes its answer, and the worker that decodes it, into files.
cat > "$scratch/coordinator/tree/srv/ask" <<'ASK'
curl -sN --cacert /etc/baton/tls/ca.pem https://10.77.0.10:8000/v1/completions -D "$1.head" \
    -H "authorization: Bearer $(cat /etc/baton/keys/default)" -H 'content-type: application/json' \
    -d '{"model": "baton-sim", "prompt": "The baton passes from hand to hand.", "stream": true,
        "ignore_eos": true, "max_tokens": '"$2"'}' > "$1.body"
ASK
must on coordinator "bash ask first 8; grep -q DONE first.body"
on coordinator "baton mode disaggregated --config /etc/baton/baton.toml > /dev/null; bash ask split 8"
must on coordinator "grep -q 'path: disaggregated' split.head && grep -q DONE split.body"
held "answers come, split too"
on coordinator "bash ask long 700" &
until_on coordinator "grep -q decode-worker long.head"
decodes=$(on coordinator "sed -n 's/x-baton-decode-worker: \(decode-[01]\).*/\1/p' long.head")
must on "$decodes" "systemctl stop baton-worker@$decodes; [ -z \"\$(ls -A /dev/shm)\" ]"
wait $!
must on coordinator "grep -q DONE long.body"
held "a worker that is stopped ends its answers first, and leaves nothing in /dev/shm"
on "$decodes" "systemctl start baton-worker@$decodes"
until_on coordinator "$whole"

say "what breaks"
before=$(pid decode-0)
on decode-0 "kill -9 $before"
until_on decode-0 "[ \"\$(systemctl show -P MainPID baton-worker@decode-0)\" -gt 0 ]"
until_on coordinator "$whole"
must test "$(pid decode-0)" != "$before"
must on decode-0 "[ \$(ls /dev/shm/baton-kv.decode-0* | wc -l) = 1 ]"
held "a worker that was killed is started again, and its arena is removed"
former=$(for worker in "${workers[@]}"; do pid "$worker"; done)
on coordinator "systemctl restart baton-coordinator"
until_on coordinator "$whole"
must test "$former" = "$(for worker in "${workers[@]}"; do pid "$worker"; done)"
held "workers come back to a coordinator that was started again, without a restart of their own"
certs issue 10.77.0.11 --worker prefill-0 --ca "$scratch/certs" --renew
install -m 640 "$scratch"/certs/10.77.0.11/* "$scratch/prefill-0/tree/etc/baton/tls/"
on prefill-0 'chgrp baton /etc/baton/tls/*'
until_on prefill-0 "journalctl -o cat -u baton-worker@prefill-0 | grep 'certificates changed'"
on prefill-0 "systemctl kill -s HUP baton-worker@prefill-0"
until_on prefill-0 "journalctl -o cat -u baton-worker@prefill-0 | grep 'SIGHUP changes nothing'"
must test "$former" = "$(for worker in "${workers[@]}"; do pid "$worker"; done)"
held "a renewed certificate is used, and SIGHUP stops nothing"
on coordinator "baton drain prefill-1 --wait --config /etc/baton/baton.toml" | grep -q "prefill-1 is drained"
on prefill-1 "systemctl restart baton-worker@prefill-1"
until_on coordinator "$whole"
held "a worker that was drained and restarted is ready"
off decode-1
until_on coordinator "! $whole"
boot decode-1
until_on coordinator "$whole"
held "a host that was switched off comes back by itself"
cat > "$scratch/decode-1/tree/srv/reach" <<'REACH'
echo $$ > "/sys/fs/cgroup/unified$1/cgroup.procs" 2> /dev/null || echo $$ > "/sys/fs/cgroup$1/cgroup.procs"
timeout 2 bash -c "exec 3<> /dev/tcp/$2"
REACH
group=$(on decode-1 "systemctl show -P ControlGroup baton-worker@decode-1")
on decode-1 "ip address add 10.99.0.1/24 dev lo"
must on decode-1 "bash reach '$group' 10.77.0.10/7000"
code=0
on decode-1 "bash reach '$group' 10.99.0.1/7000" 2> /dev/null || code=$?
must test "$code" = 124
held "what runs in a worker's unit reaches the cluster's network, and no other"
on coordinator "sed -i 's/^ttft_ms = .*/ttft_ms = -1/' /etc/baton/baton.toml; systemctl restart baton-coordinator" 2> /dev/null || true
until_on coordinator "journalctl -o cat -u baton-coordinator | grep 'slo.ttft_ms'"
on coordinator "sed -i 's/^ttft_ms = .*/ttft_ms = 1500/' /etc/baton/baton.toml"
until_on coordinator "$whole"
held "a file that is wrong is complained of in the journal, and taken once it is right"
