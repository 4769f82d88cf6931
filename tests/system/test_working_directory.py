"""What processes take from where the server was started: no module of the directory, no setting of a variable."""

from __future__ import annotations

from pathlib import Path
from urllib.request import urlopen

from tests.system.serving import Server, ServerStarter

APP = """
import os, subprocess, sys
from realtime import App

app = App()


@app.http.get("/worker", pressure="ignore")
def worker(request):
    return sorted(os.environ)


@app.http.get("/process", run="process", pressure="ignore")
def process(request):
    return sorted(os.environ)


@app.http.get("/program", pressure="ignore")
def program(request):
    command = [sys.executable, "-c", "import os; print(*os.environ)"]
    return subprocess.run(command, capture_output=True, text=True).stdout
"""


def get(server: Server, path: str) -> str:
    with urlopen(server.http + path, timeout=20) as response:
        return str(response.read().decode())


def test_the_directory_has_no_modules_and_the_environment_no_settings(
    tmp_path: Path, start_server: ServerStarter
) -> None:
    directory, app = tmp_path / "work", tmp_path / "app"
    directory.mkdir()
    for name in ("queue", "token", "types", "realtime", "msgspec"):
        (directory / f"{name}.py").write_text("raise SystemExit('this file is not meant')")
    app.mkdir()
    (app / "environments.py").write_text(APP)
    server = start_server(
        environment={"REALTIME_HTTP_API_KEY": "of the environment", "SOME_VARIABLE": "1"},
        cwd=directory,
        app={"module": "environments:app", "path": str(app)},
    )
    for path in ("/worker", "/process", "/program"):
        names = get(server, path)
        assert "SOME_VARIABLE" in names
        assert "REALTIME_" not in names
