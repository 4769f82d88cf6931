"""`realtime reload` on a real server: new code and new configuration while the clients stay, and what is bad changes
nothing."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from centrifuge import CentrifugeError

from tests.system.serving import CHECKOUT, Server, ServerStarter, wait_until
from tests.system.test_python_sdk import connect, in_own_loop, leave, soon, subscribe

REALTIME = Path(sys.executable).with_name("realtime")
APPLICATION = """
from realtime import App, Credentials

app = App()
VERSION = 1


@app.on_connecting
async def let_in(request):
    return Credentials(user="ada")


@app.rpc("version")
async def version(client, data):
    return VERSION
"""


class Deployed:
    """A server whose application and configuration the test changes."""

    def __init__(self, folder: Path, start_server: ServerStarter) -> None:
        self.application = folder / "deployed.py"
        self.application.write_text(APPLICATION)
        channel = {
            "name": "news",
            "allow_subscribe_for_client": True,
            "allow_publish_for_subscriber": True,
            "presence": True,
            "allow_presence_for_subscriber": False,
            "allow_history_for_subscriber": True,
            "history_size": 10,
            "history_ttl": "60s",
            "force_recovery": True,
        }
        self.server: Server = start_server(
            app={"module": "deployed:app", "path": str(folder)}, channel={"namespaces": [channel]}
        )
        self.config = folder / "realtime-0.toml"

    def change(self, file: Path, before: str, after: str) -> None:
        text = file.read_text()
        assert before in text
        file.write_text(text.replace(before, after))

    def reload(self) -> subprocess.CompletedProcess[str]:
        return self.run("reload")

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run a `realtime` command."""
        command = [str(REALTIME), *arguments, "--config", str(self.config), "--port", str(self.server.operator_port)]
        return subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, timeout=100)

    def workers(self) -> list[int]:
        return [worker["pid"] for worker in self.server.health()["workers"]]

    def replaced(self, before: list[int]) -> bool:
        now = self.workers()
        return len(now) == len(before) and not set(now) & set(before)


@pytest.fixture
def deployed(tmp_path: Path, start_server: ServerStarter) -> Deployed:
    return Deployed(tmp_path, start_server)


def test_new_code_and_a_new_option_reach_the_clients_that_stay(deployed: Deployed) -> None:
    async def scenario() -> None:
        client, events = await connect(deployed.server.endpoint)
        await soon(events.connected.get())
        news, seen = await subscribe(client, "news:today")
        await soon(seen.subscribed.get())
        with pytest.raises(CentrifugeError):
            await news.presence_stats()
        assert (await client.rpc("version", None)).data == 1

        zygotes = deployed.server.processes("realtime.process.zygote")
        deployed.change(deployed.application, "VERSION = 1", "VERSION = 2")
        deployed.change(deployed.config, "for_subscriber = false", "for_subscriber = true")
        done = await asyncio.get_running_loop().run_in_executor(None, deployed.reload)
        assert (done.returncode, done.stderr) == (0, "")
        lines = done.stdout.splitlines()
        assert [line for line in lines if line.endswith("replaced")] == [
            f"worker {n} has been replaced" for n in (0, 1)
        ]
        assert sum(int(found[1]) for found in re.finditer(r"handed over (\d+) connections", done.stdout)) == 1
        assert lines[-1] == "done"
        assert zygotes == deployed.server.processes("realtime.process.zygote"), "the server's own files are the same"
        memory = psutil.Process(deployed.server.pid).memory_full_info()
        assert memory.uss < memory.rss / 2, "the supervisor and its children share most of their memory"
        assert (await soon(client.rpc("version", None))).data == 2
        assert (await soon(news.presence_stats())).num_clients == 1
        await soon(news.publish("after"))
        assert (await soon(seen.publications.get())).pub.data == "after"
        assert events.connected.empty(), "the client did not reconnect"
        await leave(client)

    in_own_loop(scenario())


def test_bad_code_and_a_bad_configuration_change_nothing(deployed: Deployed) -> None:
    server, before = deployed.server, sorted(deployed.workers())
    server.expect_traceback()
    deployed.change(deployed.application, "app = App()", "app = App(")
    done = deployed.reload()
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(r'failed: app.module = "deployed:app": .*deployed.py:\d+: SyntaxError: .*\n', done.stderr)
    deployed.change(deployed.application, "app = App(", "app = App()")

    # Bad where only a worker notices it.
    deployed.change(deployed.application, "VERSION = 1", "VERSION = 1\n\n@app.on_start\nasync def fail():\n    1 / 0\n")
    done = deployed.reload()
    assert done.returncode == 1
    assert "worker 0 goes on as it is: its successor can't start" in done.stderr
    wait_until(lambda: sorted(deployed.workers()) == before, "the end of the successor")
    assert server.operate("/ready")[0] == 200

    deployed.config.write_text(deployed.config.read_text() + "\n[workers2]\n")
    deployed.server.process.send_signal(signal.SIGHUP)
    server.wait_for_log(r"the reload failed: .*realtime-0.toml:\d+: workers2: unknown")
    assert sorted(deployed.workers()) == before


def test_sighup_reloads(deployed: Deployed) -> None:
    before = deployed.workers()
    os.kill(deployed.server.pid, signal.SIGHUP)
    deployed.server.wait_for_log("SIGHUP: reloading")
    deployed.server.wait_for_log("the reload took")
    assert deployed.replaced(before)


def test_another_limit_of_the_broker_replaces_it_with_all_its_state(deployed: Deployed) -> None:
    async def scenario() -> None:
        client, events = await connect(deployed.server.endpoint)
        await soon(events.connected.get())
        news, seen = await subscribe(client, "news:today")
        await soon(seen.subscribed.get())
        await soon(news.publish(1))
        before = await soon(news.history(limit=10))
        broker = deployed.server.broker()
        with deployed.config.open("a") as config:
            config.write("\n[engine]\nmax_channels = 5000\n")
        done = await asyncio.get_running_loop().run_in_executor(None, deployed.reload)
        assert (done.returncode, done.stderr) == (0, "")
        assert "the broker has handed its state over, and the streams of 2 workers" in done.stdout
        assert "broker has been replaced" in done.stdout
        assert deployed.server.broker() != broker
        after = await soon(news.history(limit=10))
        assert (after.offset, after.epoch) == (before.offset, before.epoch)
        await soon(news.publish(2))
        assert [(await soon(seen.publications.get())).pub.offset for _ in range(2)] == [1, 2]
        assert events.connected.empty(), "the client did not reconnect"
        await leave(client)

    in_own_loop(scenario())


def test_clients_stay_while_workers_are_added_and_removed(deployed: Deployed) -> None:
    async def scenario() -> None:
        clients = [await connect(deployed.server.endpoint) for _ in range(8)]
        for _, events in clients:
            await soon(events.connected.get())
        run = asyncio.get_running_loop().run_in_executor
        done = await run(None, deployed.run, "scale", "3")
        assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "done")
        assert len(deployed.workers()) == 3
        done = await run(None, deployed.run, "scale", "1")
        assert (done.returncode, done.stderr) == (0, "")
        assert len(deployed.workers()) == 1
        late = await connect(deployed.server.endpoint)
        await soon(late[1].connected.get())
        for client, events in (*clients, late):
            assert (await soon(client.rpc("version", None))).data == 1
            assert events.connected.empty(), "the client did not reconnect"
            await leave(client)

    in_own_loop(scenario())
