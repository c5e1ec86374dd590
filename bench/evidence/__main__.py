"""Command line: python -m bench.evidence."""

import sys

from bench.evidence.command import main

if __name__ == "__main__":
    sys.exit(main())
