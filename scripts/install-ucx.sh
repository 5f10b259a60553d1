#!/usr/bin/env bash
# Puts UCX into a folder, for tests: over tcp and shared memory, without RDMA. About 140 MB, no root.
#
#     scripts/install-ucx.sh FOLDER        then BATON_UCX_LIBRARY=FOLDER/libucx/lib/libucp.so.0
set -euo pipefail

folder=${1:?the folder to install into}
version=1.22.0

if [ -e "$folder/libucx/lib/libucp.so.0" ]; then exit 0; fi
# The wheel carries CUDA's name, and needs none of it.
python3 -m pip install --quiet --no-deps --target "$folder" "libucx-cu12==$version"
