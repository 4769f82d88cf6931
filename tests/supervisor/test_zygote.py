"""The zygote with real processes: what a child gets, and what remains of it."""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import pytest_twisted
from twisted.internet.utils import getProcessOutput
from twisted.logger import capturedLogs

from realtime.process.zygote import Fork
from realtime.supervision.slots import NOT_FORKED
from realtime.supervisor import zygote as supervisor_zygote
from realtime.supervisor.zygote import EX_OSERR, EarlyZygote, ForkedChild, Zygote, ZygoteUnusable
from tests.transports.stage import eventually

HERE = Path(__file__).parent


# A program that has its first zygote forked from itself. It writes what a child gets, and how the zygote has ended.
EARLY = """
import json, os, socket
from realtime.process import zygote
from realtime.supervisor import orphans
from realtime.supervisor.zygote import fork_early

kept = os.open(os.devnull, os.O_RDONLY)
orphans.adopt_all()
early = fork_early(["forked"])
read_end, write_end = os.pipe()
socket.send_fds(early.link, [zygote.encode(zygote.Fork("worker 7", "forked", ("describe",), (5,)))], [write_end])
packets = [zygote.decode(early.link.recv(4096)) for _ in range(2)]
facts = json.loads(os.read(read_end, 65_536))
assert facts.pop("parent") == os.getpid() and os.waitpid(packets[1].pid, 0)[1] == 0
assert early.is_up_to_date and zygote.__file__ in early.files
early.link.close()
print(json.dumps([facts, early.wait()]))
"""


class Children:
    """A zygote, and the children that it has forked."""

    def __init__(self, *modules: str) -> None:
        from twisted.internet import reactor

        self.zygote = Zygote(reactor, modules or ("forked",))
        self.statuses: list[int] = []

    def fork(self, *arguments: str, module: str = "forked", output: int = 2) -> ForkedChild:
        return self.zygote.fork(Fork("worker 7", module, arguments, (5,)), [output], self.statuses.append)

    async def ask(self, *arguments: str, module: str = "forked") -> tuple[ForkedChild, Any]:
        """Fork a child, and wait for what it writes as JSON."""
        read_end, write_end = os.pipe2(os.O_NONBLOCK)
        written = bytearray()

        def read() -> bool:
            try:
                written.extend(os.read(read_end, 65_536))
            except BlockingIOError:
                return False
            return True

        try:
            child = self.fork(*arguments, module=module, output=write_end)
            await eventually(read)
            return child, json.loads(written)
        finally:
            os.close(read_end)
            os.close(write_end)

    async def exits(self, *statuses: int) -> None:
        await eventually(lambda: tuple(self.statuses) == statuses)


@pytest.fixture(autouse=True)
def path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(HERE))


@pytest_twisted.async_yield_fixture
async def children() -> AsyncIterator[Children]:
    children = Children()
    yield children
    children.zygote.close()
    await eventually(lambda: not children.zygote.pids)


async def test_a_child_is_ours_and_gets_its_arguments_descriptors_and_name(
    children: Children, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", "/nowhere")
    monkeypatch.setenv("REALTIME_HTTP_API_KEY", "secret")
    monkeypatch.setenv("MY_REALTIME_NAME", "kept")
    _, facts = await children.ask("describe")
    assert facts["parent"] == os.getpid()
    assert facts["argv"] == ["describe"]
    assert facts["descriptors"] == [0, 1, 2, 5]
    assert facts["command"] == [sys.executable, "-P", "-m", "forked", "describe"]
    assert facts["name"] == "worker 7"
    assert facts["collects"] is True
    assert "MY_REALTIME_NAME" in facts["environment"]
    assert not {"NOTIFY_SOCKET", "REALTIME_HTTP_API_KEY"} & set(facts["environment"])
    await children.exits(0)


async def test_a_child_of_a_zygote_that_was_forked_early_is_the_same(
    children: Children, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", "/nowhere")
    monkeypatch.setenv("REALTIME_HTTP_API_KEY", "secret")
    _, facts = await children.ask("describe")
    output = await getProcessOutput(sys.executable, ["-c", EARLY], env=os.environ, errortoo=True)
    early, status = json.loads(output)
    assert {**early, "parent": os.getpid()} == facts
    assert status == 0
    await children.exits(0)


async def test_exit_statuses_and_signals_are_reported(children: Children) -> None:
    children.fork("exit", "0")
    children.fork("exit", "78")
    await eventually(lambda: len(children.statuses) == 2)
    assert sorted(children.statuses) == [0, 78]
    child, _ = await children.ask("wait")
    child.signal(signal.SIGTERM)
    await eventually(lambda: len(children.statuses) == 3)
    assert children.statuses[-1] == -signal.SIGTERM
    child.signal(signal.SIGTERM)  # after its exit: without effect


async def test_exits_are_noticed_without_pidfds(children: Children, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(pid: int) -> int:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(os, "pidfd_open", refuse)
    children.fork("exit", "3")
    await children.exits(3)


async def test_the_programs_of_a_child_end_with_it(children: Children) -> None:
    child, other = await children.ask("wait")
    program = psutil.Process(other)
    os.kill(child.pid, signal.SIGKILL)
    await children.exits(-signal.SIGKILL)
    assert program.wait(30) is None or not program.is_running()


async def test_a_child_outlives_the_zygote_and_is_still_ours(children: Children) -> None:
    child, _ = await children.ask("wait")
    (first,) = children.zygote.pids
    os.kill(first, signal.SIGKILL)
    with capturedLogs() as events:
        await eventually(lambda: bool(children.zygote.pids) and children.zygote.pids != [first])
    assert [event["status"] for event in events if "status" in event] == ["was killed by signal 9"]
    _, facts = await children.ask("describe")
    assert facts["parent"] == os.getpid()
    await children.exits(0)
    child.signal(signal.SIGKILL)
    await children.exits(0, -signal.SIGKILL)


async def test_a_signal_to_a_child_that_is_not_forked_yet_reaches_it(children: Children) -> None:
    children.fork("wait").signal(signal.SIGTERM)
    await children.exits(-signal.SIGTERM)
    (hanging,) = children.zygote.pids
    os.kill(hanging, signal.SIGSTOP)
    with capturedLogs():
        children.fork("wait").signal(signal.SIGKILL)
        await children.exits(-signal.SIGTERM, NOT_FORKED)


async def test_modules_that_cannot_be_imported_fail_the_fork_alone(children: Children) -> None:
    broken = Children("not_a_module")
    with capturedLogs():
        broken.fork("exit", "0", module="not_a_module")
        await broken.exits(EX_OSERR)
    assert broken.zygote.pids == []


async def test_a_renewed_zygote_has_imported_the_modules_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = tmp_path / "changing.py"
    source = (HERE / "forked.py").read_text() + 'FORMATS = "FORMATS = 1"\n'
    module.write_text(source)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    children = Children("changing")
    assert (await children.ask("describe", module="changing"))[1]["version"] == 1
    module.write_text(source.replace("VERSION = 1", "VERSION = 2"))
    assert (await children.ask("describe", module="changing"))[1]["version"] == 1
    renewed = children.zygote.renew()
    await renewed
    assert (await children.ask("describe", module="changing"))[1]["version"] == 2
    await eventually(lambda: len(children.zygote.pids) == 1)
    module.write_text("VERSION = ")
    with capturedLogs(), pytest.raises(ZygoteUnusable, match="exited with status 1"):
        await children.zygote.renew()
    module.write_text(source.replace("VERSION = 1", "VERSION = 3"))
    await children.zygote.check()
    assert (await children.ask("describe", module="changing"))[1]["version"] == 2, "the check has no effect"
    module.write_text(source.replace("FORMATS = 1", "FORMATS = 2"))
    with pytest.raises(ZygoteUnusable, match="has other messages than the running processes"):
        await children.zygote.check()
    with pytest.raises(ZygoteUnusable, match="has other messages than the running processes"):
        await children.zygote.renew()
    assert (await children.ask("describe", module="changing"))[1]["version"] == 2
    await eventually(lambda: len(children.statuses) == 4)
    children.zygote.close()
    await eventually(lambda: not children.zygote.pids)


async def test_a_zygote_whose_files_have_not_changed_is_not_renewed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from twisted.internet import reactor

    module = tmp_path / "changing.py"
    module.write_text((HERE / "forked.py").read_text())
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    process, link = supervisor_zygote._execute(("changing",), capture=False)
    files = supervisor_zygote._versions([str(module), sys.executable])
    zygote = Zygote(reactor, ("changing",), early=EarlyZygote(process.pid, link, files))
    statuses: list[int] = []
    zygote.fork(Fork("worker 7", "changing", ("exit", "3"), ()), (), statuses.append)
    await eventually(lambda: statuses == [3])
    await zygote.renew()
    assert zygote.pids == [process.pid]
    module.write_text(module.read_text().replace("VERSION = 1", "VERSION = 22"))
    await zygote.renew()
    await eventually(lambda: len(zygote.pids) == 1 and zygote.pids != [process.pid])
    process.returncode = 0  # it was waited for
    zygote.close()
    await eventually(lambda: not zygote.pids)
