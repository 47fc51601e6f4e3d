"""How long clips take on the ranks of this job, next to torch's documented way and a plain read of the gradients.

    NPROC=4 SCRIPT=launch/bench.py launch/torchrun.sh --case clipped --case folded

Arguments are those of `distclip bench`, which starts ranks of one machine by itself; rank 0 prints.
"""

import sys

from distclip.cli import main

if __name__ == "__main__":
    main(["bench", *sys.argv[1:]])
