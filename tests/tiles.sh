#!/bin/sh
# The native kernels' tests for a processor with AMX on one that has AVX-512 and its products of
# bfloat16 alone: tiles are emulated.
#
#     PYTHON=.venv/bin/python tests/tiles.sh [arguments of pytest]
#
# Builds in build/tiles, a copy of what is needed; what is installed stays as it is.
set -eu
cd "$(dirname "$0")/.."
python=$(realpath -s "${PYTHON:-python3}")
rm -rf build/tiles
mkdir -p build/tiles
cp -r rnnattn tests conftest.py pyproject.toml setup.py build/tiles
cd build/tiles
rm -f rnnattn/native/*.so
export CFLAGS="-DRNNATTN_EMULATED_TILES" CXXFLAGS="-DRNNATTN_EMULATED_TILES"
"$python" setup.py --quiet build_ext --inplace
"$python" -c "from rnnattn.native import status; assert status().instruction_set == 'avx512_amx', status()"
[ $# -gt 0 ] || set -- tests/test_native.py tests/test_native_lstm.py tests/test_native_units.py
exec "$python" -m pytest -k avx512_amx "$@"
