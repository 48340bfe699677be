"""The native kernels for CPUs: C++ that XLA calls within a program.

They are compiled with the package, if there is a compiler (`setup.py`); their sources are in `src`.
`status` tells whether they are there, and if not, why; all then works through XLA.

Importing `rnnattn` makes them known to XLA, so that a program compiled and kept by another process
finds them. The environment variable RNNATTN_NATIVE forces an instruction set, "avx512_amx",
"avx512_bf16", "avx512" or "avx2" on x86-64, "neon_bf16" on AArch64, "baseline" on both, when the
kernels are first asked for; or it turns them "off", which from before the import on leaves the
extension alone.
"""

from rnnattn.native.load import Status, ffi_version, status

__all__ = ["Status", "ffi_version", "status"]
