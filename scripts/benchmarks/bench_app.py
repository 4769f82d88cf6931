"""The application of the benchmarks: an RPC and a message handler that echo their data."""

from realtime import App

app = App()


@app.rpc("echo")
async def echo(client, data):
    return data


@app.on_message
async def message(client, data):
    client.send(data)


@app.http.get("/hello")
async def hello(request):
    """Answer at once."""
    return "hello"
