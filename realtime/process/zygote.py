"""The process that all children are forked from: it has imported everything that they need but the application.

    python -m realtime.process.zygote --link FD MODULE,MODULE

The supervisor starts it like this, or forks it from its own process (`realtime.supervisor.zygote.fork_early`). `link`
is a socket of the type SOCK_SEQPACKET. Each packet from the supervisor is a `Fork` with descriptors (SCM_RIGHTS), and
each packet to it is one of `FromZygote`. A forked child calls the function `main` of one of the modules with its
arguments, as `python -m MODULE` would. It begins within milliseconds, and its memory is that of the zygote until it
writes to it.

A child is forked twice. Its parent exits at once, so the kernel makes the supervisor its parent, as the nearest process
that adopts orphans (`realtime.supervisor.orphans`): the supervisor waits for the child itself, the kernel kills the
child when the supervisor dies, and an end of the zygote concerns no child.

The zygote runs no thread, no reactor and no code of the application. What must differ between processes is made after
the fork: Python and OpenSSL seed their random generators anew in each fork. The key of hash() is shared.
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import fcntl
import gc
import importlib
import os
import signal
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from types import ModuleType

import msgspec

from realtime.process import stack_dumps
from realtime.process.heap import find_malloc_trim

MAX_DESCRIPTORS = 64
"""Descriptors that one child can get."""

_MAX_PACKET = 65_536
_MAX_PID_DIGITS = 20
_PR_SET_NAME = 15
# Seconds between two looks for the new parent, which has changed at the first one in nearly all cases.
_ADOPTION_INTERVAL = 0.0005


class Fork(msgspec.Struct, frozen=True, array_like=True):
    """Fork a child. name: for ps(1) and top(1), 15 characters at most. module: to call `main` of, with `arguments`.
    descriptors: their numbers in the child, in the order in which they are sent."""

    name: str
    module: str
    arguments: tuple[str, ...]
    descriptors: tuple[int, ...]


class ZygoteStarted(msgspec.Struct, frozen=True, tag=True):
    """Everything is imported. The first packet to the supervisor. formats: the constants FORMATS of the modules."""

    formats: str


class Forked(msgspec.Struct, frozen=True, tag=True):
    """The answer to a `Fork`: the child's pid."""

    pid: int


class NotForked(msgspec.Struct, frozen=True, tag=True):
    """The answer to a `Fork` that has failed. error: of errno(3)."""

    error: int


FromZygote = ZygoteStarted | Forked | NotForked

decode = msgspec.msgpack.Decoder(FromZygote).decode
encode = msgspec.msgpack.encode
_decode_fork = msgspec.msgpack.Decoder(Fork).decode


def main(argv: Sequence[str]) -> int:
    """Fork children until the supervisor closes the link. Returns in the zygote and in each child: the exit status."""
    options = _arguments().parse_args(argv)
    ignore_signals()
    modules = load(options.modules)
    os.set_inheritable(options.link, False)
    return serve(socket.socket(fileno=options.link), modules)


def ignore_signals() -> None:
    """Leave signals to all processes to the supervisor. A child that is not set up yet can't write its stack."""
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR2, stack_dumps.STACK, stack_dumps.STACK_IN_C):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})


def load(names: Sequence[str]) -> dict[str, ModuleType]:
    """Import modules, by their names, and prepare the memory of this process for being shared with its forks."""
    modules = {name: importlib.import_module(name) for name in names}
    gc.collect()
    gc.freeze()  # a collection in a child would write to each object, and so copy it
    sys._clear_type_cache()  # a child that replaces an entry would write to the name in it
    if trim := find_malloc_trim():
        trim(0)
    return modules


def serve(link: socket.socket, modules: Mapping[str, ModuleType]) -> int:
    """See `main`. Closes the link. modules: of the children, see `load`."""
    _copy_environment()
    _set_name("zygote", [sys.executable, "-P", "-m", "realtime.process.zygote", ",".join(modules)])
    with link:
        try:
            link.send(encode(ZygoteStarted(" ".join(getattr(module, "FORMATS", "") for module in modules.values()))))
            fork = _serve(link)
        except (BrokenPipeError, ConnectionResetError):
            fork = None  # the supervisor has died
    if fork is None:
        return 0
    module = modules[fork.module]
    sys.argv = [str(module.__file__), *fork.arguments]
    # Out here, so that the stack of a child begins with few frames of the zygote.
    return int(module.main(fork.arguments))


def _serve(link: socket.socket) -> Fork | None:
    """Carry out the requests. Returns in each child, with its request, and in the zygote at the end, with None."""
    while True:
        packet, descriptors, _, _ = socket.recv_fds(link, _MAX_PACKET, MAX_DESCRIPTORS, socket.MSG_CMSG_CLOEXEC)
        if not packet:
            return None
        fork = _decode_fork(packet)
        try:
            if len(descriptors) < len(fork.descriptors):
                raise OSError(errno.EMFILE, "the kernel has dropped descriptors")
            pid = _fork_twice()
        except OSError as error:
            link.send(encode(NotForked(error.errno or 1)))
        else:
            if not pid:
                link.close()
                _place(descriptors, fork.descriptors)
                signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
                _set_name(fork.name, [sys.executable, "-P", "-m", fork.module, *fork.arguments])
                return fork
            link.send(encode(Forked(pid)))
        for fd in descriptors:
            os.close(fd)


def _fork_twice() -> int:
    """Fork a child of the supervisor. Returns its pid here, and 0 in the child. Raises OSError."""
    supervisor = os.getppid()
    read_end, write_end = os.pipe()
    intermediate = os.fork()
    if intermediate:
        os.close(write_end)
        status = os.waitstatus_to_exitcode(os.waitpid(intermediate, 0)[1])
        with open(read_end, "rb") as pipe:
            pid = int(pipe.read(_MAX_PID_DIGITS) or 0)
        if not pid:
            raise OSError(max(status, 1), "the second fork failed")
        return pid
    intermediate = os.getpid()
    try:
        pid = os.fork()
    except OSError as error:
        os._exit(error.errno or 1)
    if pid:
        os.write(write_end, str(pid).encode())
        os._exit(0)
    os.close(read_end)
    os.close(write_end)
    while os.getppid() == intermediate:
        time.sleep(_ADOPTION_INTERVAL)
    if os.getppid() != supervisor:
        os._exit(0)  # it has died meanwhile
    return 0


def _place(descriptors: Sequence[int], numbers: Sequence[int]) -> None:
    """Move open descriptors to these numbers."""
    above = max(numbers, default=0) + 1
    moved = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, above) for fd in descriptors]
    for fd in descriptors:
        os.close(fd)
    for fd, number in zip(moved, numbers, strict=True):
        os.dup2(fd, number, inheritable=number <= 2)
        os.close(fd)


def _copy_environment() -> None:
    """Copy the variables elsewhere: the command lines of the children are written over the first ones."""
    for name, value in os.environb.items():
        os.unsetenv(name)
        os.putenv(name, value)


def _set_name(name: str, command: Sequence[str]) -> None:
    """Show a name in top(1), and as much of a command line in ps(1) as there is room for. After `_copy_environment`."""
    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_NAME, name.encode()[:15], 0, 0, 0)
    begin, end_of_arguments, end = _command_line()
    arguments = [os.fsencode(argument) for argument in command]
    text = b"\0".join(arguments) + b"\0"
    if len(text) > end_of_arguments - begin:
        text = b" ".join(arguments)  # which the kernel then reads as one string
    if begin < end:
        ctypes.memmove(begin, text[: end - begin - 1].ljust(end - begin, b"\0"), end - begin)


def _command_line() -> tuple[int, int, int]:
    """Return the addresses of the begin and the end of this process's command line, and the end of the room for it.

    The kernel reads it on into the environment if its own last byte is not 0, as setproctitle(3) of BSD leaves it.
    """
    with open("/proc/self/stat", "rb") as file:
        fields = file.read().rpartition(b")")[2].split()
    begin, end, environment, environment_end = map(int, fields[45:49])  # arg_start to env_end of proc(5), 0 for unknown
    return begin, end, environment_end if environment == end else end


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Forks the processes of a realtime server; its supervisor starts it.")
    parser.add_argument("--link", type=int, required=True, metavar="FD")
    parser.add_argument("modules", type=lambda text: text.split(","), metavar="MODULE,MODULE")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
