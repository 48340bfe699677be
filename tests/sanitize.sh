#!/bin/sh
# The native kernels' tests with sanitizers: AddressSanitizer and UndefinedBehaviorSanitizer, or
# ThreadSanitizer.
#
#     PYTHON=.venv/bin/python tests/sanitize.sh [arguments of pytest]
#     PYTHON=.venv/bin/python SANITIZE=thread tests/sanitize.sh [arguments of pytest]
#
# Builds in build/sanitized, a copy of what is needed; what is installed stays as it is.
set -eu
cd "$(dirname "$0")/.."
python=$(realpath -s "${PYTHON:-python3}")
sanitizers=${SANITIZE:-address,undefined}
rm -rf build/sanitized
mkdir -p build/sanitized
cp -r rnnattn tests conftest.py pyproject.toml setup.py build/sanitized
cd build/sanitized
rm -f rnnattn/native/*.so
export CFLAGS="-fsanitize=$sanitizers -fno-sanitize-recover=undefined -fno-omit-frame-pointer"
export CXXFLAGS="$CFLAGS" LDFLAGS="-fsanitize=$sanitizers"
RNNATTN_BUILD=debug "$python" setup.py --quiet build_ext --inplace
# jaxlib and Python leak on purpose, and were not built with sanitizers. How they synchronise their
# threads is not seen, and so only what the kernels do themselves is looked at for races.
export ASAN_OPTIONS=detect_leaks=0
export TSAN_OPTIONS="ignore_noninstrumented_modules=1:halt_on_error=1:suppressions=$PWD/tests/thread_sanitizer.supp"
case $sanitizers in
  thread) runtimes=tsan ;;
  *) runtimes="asan ubsan" ;;
esac
LD_PRELOAD=
for name in $runtimes stdc++; do
  LD_PRELOAD="$LD_PRELOAD $("${CC:-gcc}" -print-file-name="lib$name.so")"
done
export LD_PRELOAD
"$python" -c "from rnnattn.native import status; assert status().available, status().reason"
[ $# -gt 0 ] || set -- tests/test_native.py tests/test_native_lstm.py
exec "$python" -m pytest -n 0 --capture=sys "$@"
