"""A process of its own that waits for the end of any of several processes, and then kills others.

It reacts within a millisecond, which a thread of a program that computes cannot. It is run as a
script, with the standard library alone:

    python -I -S guard_process.py PIDS_TO_WAIT_FOR PIDS_TO_KILL

Both are separated by commas, the second is killed in its order and may be empty. It writes the pid
that ended, or nothing if its standard input had a byte before. If its standard input was closed
without one, the program that started it was killed, and it kills too.
"""

from __future__ import annotations

import os
import select
import signal
import sys


def main(waited_for: str, killed: str) -> None:
    """Wait, kill, and write the pid that ended."""
    poll = select.poll()
    poll.register(sys.stdin.fileno(), select.POLLIN | select.POLLHUP)
    pids = {os.pidfd_open(int(pid)): pid for pid in waited_for.split(",")}
    targets = [os.pidfd_open(int(pid)) for pid in killed.split(",") if pid]
    for descriptor in pids:
        poll.register(descriptor, select.POLLIN)
    ended = [pids[descriptor] for descriptor, _ in poll.poll() if descriptor in pids]
    if ended or not os.read(sys.stdin.fileno(), 1):
        for target in targets:
            try:
                signal.pidfd_send_signal(target, signal.SIGKILL)
            except ProcessLookupError:
                continue  # it has ended by itself
        sys.stdout.write("".join(f"{pid}\n" for pid in ended[:1]))


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # it ends with the program that started it
    main(*sys.argv[1:])
