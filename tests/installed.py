"""Does an installed rnnattn do what README says, with its kernels?

    python tests/installed.py

To be run where the package is installed: what is imported must not be the sources beside this file.
"""

import doctest
import sys
from pathlib import Path

import rnnattn


def main() -> int:
    status = rnnattn.native.status()
    print(rnnattn.__version__, rnnattn.__file__, status)
    readme = Path(__file__).resolve().parent.parent / "README.md"
    failed, tried = doctest.testfile(str(readme), module_relative=False)
    print(f"{tried - failed} of README's {tried} lines print what README says")
    return int(not status.available or failed > 0 or tried == 0)


if __name__ == "__main__":
    sys.exit(main())
