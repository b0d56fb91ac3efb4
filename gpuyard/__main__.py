"""``python -m gpuyard`` is the command line."""

import sys

from gpuyard.cli import main

if __name__ == "__main__":
    sys.exit(main())
