#!/usr/bin/env bash
# Looks for bytes that one of our decoders does not take well, guided by the code that they reach.
#
#   scripts/fuzz.sh build              builds all targets (a C++ compiler is needed, no nightly Rust)
#   scripts/fuzz.sh TARGET SECONDS     starts from fuzz/corpus/TARGET, keeps what it finds in
#                                      fuzz/libfuzzer/found/TARGET, and a crash beside it
#   scripts/fuzz.sh keep TARGET        adds to fuzz/corpus/TARGET what reaches code that nothing there reaches
#
# Further arguments go to libFuzzer. `cargo test -p baton-fuzz` feeds every target with its corpus.
set -euo pipefail
cd "$(dirname "$0")/../fuzz"

triple=$(rustc -vV | sed -n 's/^host: //p')
target_dir=${CARGO_TARGET_DIR:-$PWD/libfuzzer/target}
program=$target_dir/$triple/release/baton-libfuzzer

case ${1:?TARGET SECONDS, build, or keep TARGET} in
    build)
        # The workspace's own versions of everything.
        cp ../Cargo.lock libfuzzer/Cargo.lock
        # What cargo-fuzz sets, without a sanitizer: there is no unsafe code in a decoder.
        coverage="-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4
            -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table
            -Cllvm-args=-sanitizer-coverage-trace-compares"
        # With a target named, build scripts and macros are built without.
        RUSTFLAGS="$(echo $coverage)" cargo build --release --manifest-path libfuzzer/Cargo.toml \
            --target "$triple" --target-dir "$target_dir"
        ;;
    keep)
        mkdir -p "corpus/$2" "libfuzzer/found/$2"
        BATON_FUZZ_TARGET=$2 "$program" -set_cover_merge=1 -use_counters=0 "corpus/$2" "libfuzzer/found/$2" "${@:3}"
        ;;
    *)
        mkdir -p "corpus/$1" "libfuzzer/found/$1"
        BATON_FUZZ_TARGET=$1 exec "$program" -max_total_time="${2:?SECONDS}" -timeout=10 -rss_limit_mb=2048 \
            -max_len=8192 -print_final_stats=1 -artifact_prefix="libfuzzer/found/$1-" \
            "${@:3}" "libfuzzer/found/$1" "corpus/$1"
        ;;
esac
