"""An application whose handlers raise, and whose handler processes do not survive the import of this module."""

from __future__ import annotations

import os
import sys
from typing import Any

from realtime import App

if "compute_process" in sys.argv[0]:
    os._exit(3)

app = App()


@app.http.get("/fail")
async def fail(request: Any) -> Any:
    return {}["missing"]


@app.http.get("/crunch", run="process")
def crunch(request: Any) -> Any:
    return {}
