"""Another version of the package, installed under a running server: a reload takes it over, or is refused."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from centrifuge import Subscription

from tests.system.serving import CHECKOUT, ServerStarter, wait_until
from tests.system.test_python_sdk import connect, in_own_loop, leave, soon, subscribe

REALTIME = Path(sys.executable).with_name("realtime")
APPLICATION = """
import realtime

app = realtime.App()


@app.on_connecting
async def let_in(request):
    return realtime.Credentials(user="ada")


@app.rpc("version")
async def version(client, data):
    return realtime.__version__
"""


class Installed:
    """A server that runs a copy of the package, which the test changes."""

    def __init__(self, folder: Path, start_server: ServerStarter) -> None:
        self.package = folder / "realtime"
        shutil.copytree(CHECKOUT / "realtime", self.package, ignore=shutil.ignore_patterns("__pycache__"))
        (folder / "deployed.py").write_text(APPLICATION)
        self.environment = {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
        app = {"module": "deployed:app", "path": str(folder)}
        self.server = start_server(app=app, cwd=folder, environment=self.environment)
        self.config = next(folder.glob("realtime-*.toml"))

    def install(self, module: str, before: str, after: str) -> None:
        """Change the text of a module."""
        source = (self.package / module).read_text()
        assert before in source
        (self.package / module).write_text(source.replace(before, after))

    async def run(self, name: str) -> subprocess.CompletedProcess[str]:
        """Run a `realtime` command, while the clients of the test go on."""
        command = [str(REALTIME), name, "--config", str(self.config), "--port", str(self.server.operator_port)]
        environment = os.environ | self.environment

        def run() -> subprocess.CompletedProcess[str]:
            return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)

        return await asyncio.to_thread(run)


@pytest.fixture
def installed(tmp_path: Path, start_server: ServerStarter) -> Installed:
    return Installed(tmp_path, start_server)


def test_a_version_with_the_same_messages_takes_over_and_another_is_refused(installed: Installed) -> None:
    server = installed.server

    async def scenario() -> None:
        client, events = await connect(server.endpoint)
        await soon(events.connected.get())
        before = (await client.rpc("version", None)).data
        installed.install("_version.py", f'"{before}"', '"77.0.0"')
        done = await installed.run("reload")
        assert (done.returncode, done.stderr) == (0, "")
        assert f"the supervisor and the broker go on with version {before} until `realtime upgrade`" in done.stdout
        assert (await soon(client.rpc("version", None))).data == "77.0.0"

        installed.install("_version.py", '"77.0.0"', '"78.0.0"')
        installed.install("pubsub/broker_messages.py", "\nVERSION = ", "\nVERSION = 1")
        workers = server.workers()
        for command in ("reload", "upgrade"):
            done = await installed.run(command)
            assert done.returncode == 1
            assert "has other messages than the running processes; restart the server to use it" in done.stderr
            assert server.workers() == workers
        assert (await soon(client.rpc("version", None))).data == "77.0.0"
        assert events.connected.empty(), "the client did not reconnect"
        await leave(client)

    in_own_loop(scenario(), limit=400)
    server.stop()


async def publish_until(done: asyncio.Event, subscription: Subscription, first: int) -> int:
    """Publish one number after the other. Returns the first that was not published."""
    number = first
    while not done.is_set():
        await soon(subscription.publish(number))
        number += 1
        await asyncio.sleep(0.005)
    return number


def test_a_new_version_takes_the_place_of_the_whole_server_while_clients_publish(installed: Installed) -> None:
    server = installed.server

    async def scenario() -> None:
        clients = [await connect(server.endpoint) for _ in range(4)]
        for _, events in clients:
            await soon(events.connected.get())
        before = (await clients[0][0].rpc("version", None)).data
        watched = [await subscribe(client, "stream:news") for client, _ in clients]
        for _, seen in watched:
            await soon(seen.subscribed.get())
        published, processes = 0, [server.pid, server.broker(), *server.workers()]

        async def while_publishing(command: str) -> subprocess.CompletedProcess[str]:
            nonlocal published
            done = asyncio.Event()
            publishing = asyncio.ensure_future(publish_until(done, watched[0][0], published))
            result = await installed.run(command)
            done.set()
            published = await publishing
            return result

        # A version that would not start changes nothing.
        installed.install(
            "supervisor/steering.py", "from realtime", "from realtime.nowhere import nothing\nfrom realtime"
        )
        refused = await while_publishing("upgrade")
        assert refused.returncode == 1
        assert "the start of the installed version ended its process with status 1" in refused.stderr
        installed.install("supervisor/steering.py", "from realtime.nowhere import nothing\n", "")
        assert [server.pid, server.broker(), *server.workers()] == processes

        # A setting more: only the next version has to understand it.
        installed.install("_version.py", f'"{before}"', '"79.0.0"')
        new = '    of_tomorrow: Annotated[bool, about("New.")] = False\n'
        text = "    publish_timeout: Annotated[PositiveSeconds"
        installed.install("config/settings.py", text, new + text)
        with installed.config.open("a") as config:
            config.write("\n[engine]\nof_tomorrow = true\n")
        done = await while_publishing("upgrade")
        assert (done.returncode, done.stderr) == (0, ""), done
        assert f"version 79.0.0 takes the place of version {before}" in done.stdout
        assert done.stdout.endswith("done\n")
        assert server.pid == processes[0]
        assert not {server.broker(), *server.workers()} & set(processes)
        assert (await soon(clients[0][0].rpc("version", None))).data == "79.0.0"
        supervisor = psutil.Process(server.pid)
        wait_until(lambda: len(supervisor.children()) == 4, "zygote, broker and two workers, and no ended process")

        offsets = [offset + 1 for offset in range(published)]
        for (_, seen), (_, events) in zip(watched, clients, strict=True):
            got = [(await soon(seen.publications.get())).pub for _ in range(published)]
            assert [(pub.offset, pub.data) for pub in got] == list(zip(offsets, range(published), strict=True))
            assert seen.publications.empty() and events.connected.empty(), "none is repeated, none has reconnected"
            assert seen.joined.qsize() <= len(clients) and seen.left.empty()
        assert len((await soon(watched[0][0].presence())).clients) == len(clients)
        await leave(*(client for client, _ in clients))

    in_own_loop(scenario(), limit=400)
    assert server.operate("/ready")[0] == 200
    server.stop()
