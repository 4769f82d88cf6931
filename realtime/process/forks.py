"""What a process of the server leaves to the processes that application code forks from it: `release_in_forks`.

multiprocessing and `concurrent.futures.ProcessPoolExecutor` fork the process of the handler (until Python 3.14). A fork
inherits every descriptor and every signal handler. It would hold the clients' port and their connections after the
worker's death, so that clients stay connected to no server, and SIGTERM would not end it.

A fork therefore lets go of the server: /dev/null takes the place of the server's descriptors, whose numbers stay taken,
as objects of the application may still close them. Signals have their defaults again, and the kernel kills the fork
when its parent dies. Descriptors of the application stay open. Programs that are executed, as by subprocess, inherit
none of the descriptors (PEP 446), and may outlive the worker.
"""

from __future__ import annotations

import fcntl
import os
import select
import signal
import socket
import sys
import threading
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import suppress

# SIGINT and SIGHUP keep their handlers: they reach the whole group of processes, and the parent alone acts on them.
_DEFAULT_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


def release_in_forks(
    descriptors: Callable[[], Iterable[int]],
    ports: Collection[int] = (),
    forget: Callable[[], None] = lambda: None,
    default_signals: Iterable[int] = _DEFAULT_SIGNALS,
) -> Callable[[], None]:
    """Have each future fork of this process release what belongs to the server. To be called once, never undone.

    Returns a function that kills all forks, for the end of the process: Python waits there for the calls that a
    ProcessPoolExecutor has under way. descriptors: returns those of the server, called in the fork. ports: local TCP
    ports whose sockets are the server's too. forget: called in the fork, after that. default_signals: signals that get
    their default action.
    """
    # The fork reads from the pipe. Its write end closes with this process, however that ends.
    read_end, write_end = os.pipe()
    numbers = tuple(default_signals)
    mask = threading.local()
    is_released = False  # in a fork of a fork: its descriptors are the application's

    def block_signals() -> None:
        # A signal to the fork waits until it has its default action: Process.terminate() may come at once.
        mask.before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)

    def unblock_signals() -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask.before)

    def release() -> None:
        nonlocal is_released
        if not is_released:
            is_released = True
            signal.set_wakeup_fd(-1)  # else the fork's signals would wake the parent's loop
            for number in numbers:
                signal.signal(number, signal.SIG_DFL)
            os.close(write_end)
            _replace_by_null({*descriptors(), *_sockets_of(ports), write_end})
            forget()
        _die_with_the_writer(read_end)
        unblock_signals()

    os.register_at_fork(before=block_signals, after_in_parent=unblock_signals, after_in_child=release)
    return lambda: os.close(write_end)


def _replace_by_null(descriptors: Iterable[int]) -> None:
    null = os.open(os.devnull, os.O_RDWR)
    for fd in descriptors:
        if fd != null:
            with suppress(OSError):
                os.dup2(null, fd, inheritable=False)
    os.close(null)


def _sockets_of(ports: Collection[int]) -> Iterator[int]:
    """Find the open sockets that are bound to one of these TCP ports: listening sockets and their connections."""
    for name in os.listdir("/proc/self/fd") if ports and sys.platform.startswith("linux") else ():
        try:
            found = socket.socket(fileno=int(name))
        except OSError:  # no socket, or closed
            continue
        try:
            if found.family in (socket.AF_INET, socket.AF_INET6) and found.getsockname()[1] in ports:
                yield int(name)
        except OSError:
            continue
        finally:
            found.detach()


def _die_with_the_writer(read_end: int) -> None:
    """Have the kernel kill this process when the last write end of the pipe is closed.

    A process may have the kernel signal what happens on a descriptor (fcntl(2), O_ASYNC), with a signal of its choice.
    PR_SET_PDEATHSIG of prctl(2) would not do: its signal comes at the end of the thread that forked. On systems other
    than Linux there is no such signal.
    """
    if not hasattr(fcntl, "F_SETSIG"):
        return
    with suppress(OSError):
        # Opened anew: the receiver of the signal belongs to the open file, which the fork shares with its parent.
        own = os.open(f"/proc/self/fd/{read_end}", os.O_RDONLY | os.O_NONBLOCK)
        os.dup2(own, read_end, inheritable=False)
        os.close(own)
        fcntl.fcntl(read_end, fcntl.F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(read_end, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(read_end, fcntl.F_SETFL, os.O_NONBLOCK | os.O_ASYNC)
        poll = select.poll()
        poll.register(read_end, select.POLLHUP)
        if poll.poll(0):  # the parent has died meanwhile
            os.kill(os.getpid(), signal.SIGKILL)
