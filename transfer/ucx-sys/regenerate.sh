#!/usr/bin/env bash
# Makes src/bindings.rs anew from the headers of UCX 1.13. Nobody needs it to build Baton.
#
# The oldest headers are taken on purpose: from 1.13 to 1.22 structs only grew at their ends, guarded by
# field masks, so that one binary runs on all of them. Wanted here: bindgen (cargo install bindgen-cli),
# libclang (pip install libclang), and the headers (apt-get download libucx-dev, unpacked by dpkg -x).
set -euo pipefail
cd "$(dirname "$0")"

: "${UCX_INCLUDE:?where ucp/api/ucp.h of UCX 1.13 lies}"
: "${LIBCLANG_PATH:?the folder of libclang.so}"
export BINDGEN_EXTRA_CLANG_ARGS="-I$(gcc -print-file-name=include)"

functions=(
    ucp_get_version ucs_status_string
    ucp_config_read ucp_config_modify ucp_config_release ucp_init_version ucp_cleanup
    ucp_context_print_info
    ucp_worker_create ucp_worker_destroy ucp_worker_query ucp_worker_release_address
    ucp_worker_progress ucp_worker_get_efd ucp_worker_arm
    ucp_ep_create ucp_ep_close_nbx ucp_ep_flush_nbx ucp_ep_print_info
    ucp_mem_map ucp_mem_unmap ucp_rkey_pack ucp_rkey_buffer_release
    ucp_ep_rkey_unpack ucp_rkey_destroy
    ucp_put_nbx ucp_request_free
)
flags=(
    ucp_params_field ucp_feature ucp_worker_params_field ucp_worker_attr_field
    ucp_ep_params_field ucp_ep_close_flags_t ucp_mem_map_params_field ucp_op_attr_t
)
allow=()
for name in "${functions[@]}"; do allow+=(--allowlist-function "$name"); done
for name in "${flags[@]}"; do allow+=(--allowlist-type "$name"); done

bindgen "$UCX_INCLUDE/ucp/api/ucp.h" "${allow[@]}" \
    --allowlist-var 'UCP_API_(MAJOR|MINOR)' --blocklist-type 'FILE|_IO_.*|__off.*' \
    --dynamic-loading Ucp --dynamic-link-require-all \
    --no-layout-tests --no-prepend-enum-name --no-doc-comments --default-enum-style consts \
    --raw-line '// Made from ucp/api/ucp.h of UCX 1.13 by regenerate.sh; LICENSE.ucx is its licence.' \
    --raw-line 'use libc::FILE;' \
    -o src/bindings.rs -- -I"$UCX_INCLUDE"
# Their values move from version to version.
sed -i '/UCS_MEMORY_TYPE_\(LAST\|UNKNOWN\)/d' src/bindings.rs
rustfmt --edition 2024 --config-path ../.. src/bindings.rs
