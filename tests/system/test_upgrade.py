"""Another version of the package, installed under a running server: a reload takes it over, or is refused."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import sys
from pathlib import Path

from tests.system.serving import CHECKOUT, ServerStarter
from tests.system.test_python_sdk import connect, in_own_loop, leave, soon

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


def test_a_version_with_the_same_messages_takes_over_and_another_is_refused(
    tmp_path: Path, start_server: ServerStarter
) -> None:
    package = tmp_path / "realtime"
    shutil.copytree(CHECKOUT / "realtime", package, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "deployed.py").write_text(APPLICATION)
    environment = {"PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    app = {"module": "deployed:app", "path": str(tmp_path)}
    server = start_server(app=app, cwd=tmp_path, environment=environment)
    config = next(tmp_path.glob("realtime-*.toml"))

    def install(module: str, before: str, after: str) -> None:
        source = (package / module).read_text()
        assert before in source
        (package / module).write_text(source.replace(before, after))

    def reload() -> subprocess.CompletedProcess[str]:
        command = [str(REALTIME), "reload", "--config", str(config), "--port", str(server.operator_port)]
        return subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, timeout=100)

    async def scenario() -> None:
        client, events = await connect(server.endpoint)
        await soon(events.connected.get())
        before = (await client.rpc("version", None)).data
        install("_version.py", f'"{before}"', '"77.0.0"')
        done = await asyncio.get_running_loop().run_in_executor(None, reload)
        assert (done.returncode, done.stderr) == (0, "")
        assert f"the supervisor and the broker go on with version {before} until `realtime upgrade`" in done.stdout
        assert (await soon(client.rpc("version", None))).data == "77.0.0"

        install("_version.py", '"77.0.0"', '"78.0.0"')
        install("pubsub/broker_messages.py", "\nVERSION = ", "\nVERSION = 1")
        workers = server.workers()
        done = await asyncio.get_running_loop().run_in_executor(None, reload)
        assert done.returncode == 1
        assert "has other messages than the running processes; restart the server to use it" in done.stderr
        assert server.workers() == workers
        assert (await soon(client.rpc("version", None))).data == "77.0.0"
        assert events.connected.empty(), "the client did not reconnect"
        await leave(client)

    in_own_loop(scenario())
    server.stop()
