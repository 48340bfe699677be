#!/bin/sh
# The native kernels for AArch64, on another machine: a wheel, and their tests in an emulator.
#
#     PYTHON=.venv/bin/python tests/aarch64.sh [arguments of pytest]
#
# All is made in build/aarch64: the wheel in `wheel`; in `root`, once, Python for arm64 from the
# archive of Debian that this machine installs from, and beside it jax and what else the tests want.
set -eu
cd "$(dirname "$0")/.."
host=$(realpath -s "${PYTHON:-python3}")
build=$PWD/build/aarch64
root=$build/root
packages=$root/usr/lib/python3/dist-packages
emulated=$build/python # the interpreter

missing=
for command in apt-get dpkg-deb qemu-aarch64 aarch64-linux-gnu-g++; do
  command -v $command > /dev/null || missing="$missing $command"
done
if [ -n "$missing" ]; then
  echo "missing:$missing. The kernels for AArch64 are built and run with packages of Debian:" \
    "apt-get install g++-aarch64-linux-gnu qemu-user" >&2
  exit 1
fi

# Packages of Debian for arm64, kept apart from those of this machine.
fetch() {
  apt-get -qq -o APT::Architecture=arm64 -o APT::Architectures=arm64 -o APT::Sandbox::User=root \
    -o Debug::NoLocking=1 -o Dir::State="$build/apt" -o Dir::State::status="$build/apt/status" \
    -o Dir::Cache="$build/apt" "$@"
}

# Wheels for the emulated interpreter.
install() {
  "$host" -m pip install --quiet --disable-pip-version-check --target "$packages" --upgrade \
    --python-version "$version" --only-binary=:all: "$@"
}

if [ ! -e "$build/installed" ]; then
  rm -rf "$build"
  mkdir -p "$build/apt/lists/partial" "$build/apt/archives/partial" "$root"
  : > "$build/apt/status"
  fetch update
  fetch install --yes --no-install-recommends --download-only python3 libstdc++6
  for package in "$build"/apt/archives/*.deb; do dpkg-deb --extract "$package" "$root"; done
  cat > "$emulated" << END
#!/bin/sh
PYTHONHOME='$root/usr' exec qemu-aarch64 -L '$root' -0 "\$0" '$root/usr/bin/python3' "\$@"
END
  chmod +x "$emulated"
  version=$("$emulated" -c "import sys; print('%d.%d' % sys.version_info[:2])")
  install --platform manylinux2014_aarch64 --platform manylinux_2_27_aarch64 \
    --platform manylinux_2_28_aarch64 \
    jax jaxtyping beartype pytest pytest-xdist hypothesis matplotlib
  echo "$version" > "$build/installed"
fi
version=$(cat "$build/installed")

rm -rf "$build/sources" "$build/wheel" "$build/tested"
mkdir -p "$build/sources" "$build/tested"
cp -r rnnattn setup.py pyproject.toml MANIFEST.in README.md LICENSE "$build/sources"
rm -f "$build"/sources/rnnattn/native/*.so
CC=aarch64-linux-gnu-gcc CXX=aarch64-linux-gnu-g++ \
  LDSHARED="aarch64-linux-gnu-gcc -shared" LDCXXSHARED="aarch64-linux-gnu-g++ -shared" \
  "$host" -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir "$build/wheel" \
  --config-settings=--build-option=--plat-name=linux_aarch64 "$build/sources"
wheel=$(ls "$build"/wheel/rnnattn-*-abi3-linux_aarch64.whl)
install --no-deps --platform linux_aarch64 "$wheel"
kernels=$packages/rnnattn/native/kernels.abi3.so
if ! aarch64-linux-gnu-readelf -h "$kernels" | grep -q 'Machine: *AArch64'; then
  echo "$wheel has no kernels for AArch64" >&2
  exit 1
fi

cp -r tests conftest.py pyproject.toml "$build/tested"
cd "$build/tested"
for chosen in cortex-a72:baseline max:neon_bf16; do
  QEMU_CPU=${chosen%%:*} "$emulated" -c "
from rnnattn.native import status
assert status().instruction_set == '${chosen#*:}', status()"
done
echo "built and chosen: $wheel"
[ $# -gt 0 ] || set -- -m "not slow" tests/test_native.py tests/test_native_lstm.py
# Hypothesis' profile for slow machines.
QEMU_CPU=max exec "$emulated" -m pytest --hypothesis-profile=ci "$@"
