"""Makes the environment with PyTorch that some tests compare with; a CPU is enough for them.

python3 tests/oracle/make_environment.py .venv-peft

The tests find ``.venv-peft`` in the checkout by themselves; for another folder set the variable
that is printed at the end. Needs only Python's own library, and a network for pip.
"""

import argparse
import subprocess
import sys
import venv
from pathlib import Path

TORCH = "torch==2.13.0"
OTHERS = ("transformers", "peft", "safetensors", "pillow", "sentencepiece", "protobuf", "numpy")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="to make, such as .venv-peft")
    folder = parser.parse_args().folder.absolute()
    if folder.exists():
        sys.exit(f"{folder} is there already; remove it, or give another folder")
    venv.create(folder, with_pip=True)
    python = folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")

    def install(*arguments: str) -> None:
        if subprocess.run([python, "-m", "pip", "install", *arguments]).returncode:
            sys.exit(f"pip failed; remove {folder} and try again")

    install(TORCH)
    install(*OTHERS)
    check = "import peft, torch, transformers as t; print(torch.__version__, t.__version__)"
    subprocess.run([python, "-c", check], check=True)
    print(f"export RMLORA_PEFT_PYTHON={python}")


if __name__ == "__main__":
    main()
