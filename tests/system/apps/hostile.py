"""An application whose names are markup, and which blocks the loop under such names."""

from __future__ import annotations

from realtime import App

app = App()

MARKUP = "<script>owned=1</script><img src=x onerror=owned=1>"
SOURCE = """
import time

async def block(request):
    time.sleep(0.5)
    return {}
"""

names = {}
exec(compile(SOURCE, f"/srv/{MARKUP}.py", "exec"), names)


@app.http.get("/fail")
async def fail(request):
    raise type(MARKUP, (Exception,), {})("on purpose")


app.http.get("/block")(names["block"])
app.http.get(f"/{MARKUP.replace(' ', '')}")(names["block"])
