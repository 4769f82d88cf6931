"""uvicorn with httptools and uvloop; answers each request with a constant."""

import socket

import uvicorn

BODY = b'{"result":{}}'
START = {
    "type": "http.response.start",
    "status": 200,
    "headers": [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(BODY))],
}
END = {"type": "http.response.body", "body": BODY}


async def app(scope, receive, send):
    if scope["method"] == "POST":
        while (await receive()).get("more_body"):
            pass
    await send(START)
    await send(END)


listening = socket.create_server(("127.0.0.1", 0), backlog=1024)
print("port", listening.getsockname()[1], flush=True)
config = uvicorn.Config(app, http="httptools", loop="uvloop", lifespan="off", access_log=False, log_level="error")
uvicorn.Server(config).run([listening])
