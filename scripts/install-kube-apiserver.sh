#!/usr/bin/env bash
# Builds a Kubernetes control plane, for tests without nodes: kube-apiserver, the controllers, the scheduler,
# etcd and kubectl, all from their published Go modules, and takes the definitions of the custom resources
# that our manifests use from the modules of the projects that define them.
#
#     scripts/install-kube-apiserver.sh FOLDER        then BATON_KUBE=FOLDER
#
# Needs Go. 360 MB stay; the build takes some 10 minutes of one core, and 4 GB meanwhile. Does nothing where
# FOLDER holds it all in these versions.
set -euo pipefail

folder=${1:?the folder to install into}
kubernetes=1.36.3
# MODULE@VERSION, where in it, and the files.
custom_resources=(
    "github.com/kedacore/keda/v2@v2.21.0 config/crd/bases keda.sh_scaledobjects.yaml"
    "github.com/cert-manager/cert-manager@v1.21.2 deploy/crds cert-manager.io_certificates.yaml cert-manager.io_issuers.yaml"
    "github.com/prometheus-operator/prometheus-operator@v0.85.0 example/prometheus-operator-crd monitoring.coreos.com_podmonitors.yaml monitoring.coreos.com_prometheusrules.yaml"
)
programs=(kube-apiserver kube-controller-manager kube-scheduler kubectl)

say() { printf 'install-kube-apiserver: %s\n' "$*"; }
fail() {
    printf 'install-kube-apiserver: error: %s\n' "$*" >&2
    exit 1
}

mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
stamp=$folder/.baton-complete
print=$(sha256sum "${BASH_SOURCE[0]}" | cut -d' ' -f1)

# One run at a time for a folder; a second one waits and then finds it complete.
exec 9<"$folder"
flock 9
if [ "$(cat "$stamp" 2>/dev/null)" = "$print" ]; then exit 0; fi
command -v go >/dev/null || fail "Go is missing"
rm -f "$stamp"

# What the build leaves behind is of no use to anybody else, and thirty times as large as what it makes.
work=$(mktemp -d)
trap 'chmod -R u+w "$work" && rm -rf "$work"' EXIT
export GOCACHE=$work/cache GOMODCACHE=$work/modules GOWORK=off
cd "$work"

# `go mod download -json` names the module's directory, or its go.mod.
downloaded() { # MODULE@VERSION FIELD
    go mod download -json "$1" | sed -n "s/^[[:space:]]*\"$2\": \"\(.*\)\",\{0,1\}\$/\1/p"
}

say "building Kubernetes $kubernetes"
# In its own tree Kubernetes takes some modules from a subfolder; published, they are numbered 0.MINOR.PATCH.
its_mod=$(downloaded "k8s.io/kubernetes@v$kubernetes" GoMod)
{
    echo "module control-plane"
    grep -E '^(go|godebug) ' "$its_mod"
    echo "require k8s.io/kubernetes v$kubernetes"
    sed -n "s|^[[:space:]]*\(k8s.io/[^ ]*\) => ./staging/.*|replace \1 => \1 v0.${kubernetes#1.}|p" "$its_mod"
} >go.mod
# The API server does not start without these: they are what its policies' versions count from.
IFS=. read -r major minor _ <<<"$kubernetes"
flags="-s -w"
for package in k8s.io/component-base/version k8s.io/client-go/pkg/version; do
    flags+=" -X $package.gitVersion=v$kubernetes -X $package.gitMajor=$major -X $package.gitMinor=$minor"
done
mkdir bin
# etcd in the version that this Kubernetes was made with.
go build -mod=mod -trimpath -ldflags "$flags" -o bin/ \
    go.etcd.io/etcd/server/v3 "${programs[@]/#/k8s.io/kubernetes/cmd/}" \
    2> >(grep -v '^go: downloading' >&2)
mv bin/server bin/etcd
cp bin/* "$folder/"

say "custom resources"
mkdir -p "$folder/crds"
for resources in "${custom_resources[@]}"; do
    read -r module where files <<<"$resources"
    directory=$(downloaded "$module" Dir)
    for file in $files; do
        cp --no-preserve=mode "$directory/$where/$file" "$folder/crds/"
    done
done

printf '%s\n' "$print" >"$stamp"
say "done: $folder"
