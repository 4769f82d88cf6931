// The SDK over compressed WebSockets, beside a client that wants none of it.
// Arguments: endpoint. What each side of the first connection sent is counted where it passes the network.

import WebSocket from "ws";
import { connect, delay, finish, given, subscribe, until } from "./peer.mjs";

const [endpoint] = given;
const opened = [];

function sockets(options) {
  return class extends WebSocket {
    constructor(address, protocols) {
      super(address, protocols, options);
      this.on("upgrade", (response) => { this.tcp = response.socket; });
      opened.push(this);
    }
  };
}

const compressing = await connect(endpoint, {
  data: { user: "ada" },
  websocket: sockets({ perMessageDeflate: { threshold: 0 } }),
});
const plain = await connect(endpoint, { data: { user: "bob" }, websocket: sockets({ perMessageDeflate: false }) });
const ada = await subscribe(compressing.client, "stream:compressed");
const bob = await subscribe(plain.client, "stream:compressed");

const text = "all of this is said again and again. ".repeat(500);
for (let number = 0; number < 10; number++) {
  await (number % 2 ? ada : bob).subscription.publish({ number, text });
}
await until(() => [ada, bob].every(({ seen }) => seen.publications.length === 10), () => "publications");
const echo = await compressing.client.rpc("echo", { text: "ß".repeat(20_000) });
await delay(50);

finish({
  extensions: opened.map((socket) => socket.extensions),
  numbers: [ada, bob].map(({ seen }) => seen.publications.map(({ data }) => data.text === text && data.number)),
  echoed: echo.data.text === "ß".repeat(20_000),
  received: opened.map((socket) => socket.tcp.bytesRead),
  sent: opened.map((socket) => socket.tcp.bytesWritten),
});
