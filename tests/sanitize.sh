#!/bin/sh
# The native kernels' tests with AddressSanitizer and UndefinedBehaviorSanitizer.
#
#     PYTHON=.venv/bin/python tests/sanitize.sh [arguments of pytest]
#
# Builds in build/sanitized, a copy of what is needed; what is installed stays as it is.
set -eu
cd "$(dirname "$0")/.."
python=$(realpath -s "${PYTHON:-python3}")
rm -rf build/sanitized
mkdir -p build/sanitized
cp -r rnnattn tests conftest.py pyproject.toml setup.py build/sanitized
cd build/sanitized
rm -f rnnattn/native/*.so
sed -i s/-O3/-O1/ setup.py  # or it compiles for minutes
export CFLAGS="-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g"
export CXXFLAGS="$CFLAGS" LDFLAGS="-fsanitize=address,undefined"
"$python" setup.py --quiet build_ext --inplace
# jaxlib and Python leak on purpose, and were not built with sanitizers.
export ASAN_OPTIONS=detect_leaks=0 LD_PRELOAD="$(${CC:-gcc} -print-file-name=libasan.so) $(${CC:-gcc} -print-file-name=libubsan.so) $(${CC:-gcc} -print-file-name=libstdc++.so)"
[ $# -gt 0 ] || set -- tests/test_native.py tests/test_native_lstm.py
exec "$python" -m pytest -n 0 "$@"
