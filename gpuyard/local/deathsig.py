"""Runs a command that ends with its parent: ``python -I -S deathsig.py SIGNAL PARENT COMMAND...``.

A script of its own, and not a ``preexec_fn``, because code between fork and exec may deadlock in a
process with threads. Standard library only; it costs some 20 ms and keeps the process id.
"""

import ctypes
import os
import sys

PR_SET_PDEATHSIG = 1


def main() -> None:
    signal, parent, command = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:
        return  # The parent died before the signal was asked for: it would never come.
    os.execvp(command[0], command)  # noqa: S606 - replacing this process is the point


if __name__ == "__main__":
    main()
