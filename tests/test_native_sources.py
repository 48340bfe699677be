"""The C++ sources: each file includes what it uses, so that an editor can open it alone; and what
no call of the kernels can show.
"""

import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

import jax
import pytest

pytestmark = pytest.mark.slow

FOLDER = Path(__file__).resolve().parent.parent / "rnnattn/native/src"
SOURCES = sorted(FOLDER.glob("*"))
COMPILER = shutil.which(os.environ.get("CXX", "c++"))

needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")


@pytest.mark.thorough
@needs_compiler
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_a_source_can_be_parsed_alone(source):
    """And no name of it hides another."""
    command = [str(COMPILER), "-std=c++17", "-fsyntax-only", "-Wshadow", "-Werror=shadow"]
    for folder in (jax.ffi.include_dir(), sysconfig.get_paths()["include"]):
        command += ["-isystem", folder]
    parsed = subprocess.run([*command, "-x", "c++", source], capture_output=True, text=True)
    assert parsed.returncode == 0, parsed.stderr


# Threads write into what they take, and read it again; the rest is of one thread.
MEMORY = r"""
#include <cassert>
#include <cstdint>
#include <thread>
#include <vector>

#include "memory.h"
#include "threads.h"

using namespace rnnattn;

void fill_and_look(float number) {
  for (int64_t i = 0; i < 2000; ++i) {
    const int64_t floats = 1 + i * 37 % 5000;
    float* memory = take_memory(floats);
    assert(reinterpret_cast<uintptr_t>(memory) % LINE_BYTES == 0);
    for (int64_t k = 0; k < floats; ++k) memory[k] = number;
    for (int64_t k = 0; k < floats; ++k) assert(memory[k] == number);
    give_back_memory(memory);
  }
}

int main() {
  float *small = take_memory(112), *large = take_memory(1000);
  give_back_memory(large);
  give_back_memory(small);
  assert(take_memory(1000) == large && take_memory(113) != small && take_memory(1) == small);
  give_back_memory(nullptr);
  assert(take_memory(INT64_MAX / 16) == nullptr);

  // the last that are given back, and none above the limit
  const int64_t most = KEPT_BYTES / sizeof(float);
  std::vector<float*> all;
  for (int i = 0; i < KEPT_BLOCKS + 1; ++i) all.push_back(take_memory(most - 16 * i));
  float* above = take_memory(most + 1);
  for (float* one : all) give_back_memory(one);
  give_back_memory(above);
  for (int i = KEPT_BLOCKS; i > 0; --i) assert(take_memory(1) == all[i]);

  std::vector<std::thread> threads;
  for (int i = 0; i < 8; ++i) threads.emplace_back(fill_and_look, static_cast<float>(i));
  for (std::thread& thread : threads) thread.join();
}
"""


@needs_compiler
def test_memory_is_kept_for_the_next_call(tmp_path):
    program = tmp_path / "memory"
    (tmp_path / "memory.cc").write_text(MEMORY)
    command = [str(COMPILER), "-std=c++17", "-pthread", f"-I{FOLDER}", tmp_path / "memory.cc"]
    subprocess.run([*command, FOLDER / "memory.cc", "-o", program], check=True)
    subprocess.run([program], check=True)
