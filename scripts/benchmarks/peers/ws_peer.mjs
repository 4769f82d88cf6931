// The `ws` library on Node.
import { WebSocketServer } from "ws";

const server = new WebSocketServer({ host: "127.0.0.1", port: 0, backlog: 4096, perMessageDeflate: false });
server.on("listening", () => console.log(`port ${server.address().port}`));
server.on("connection", (socket, request) => {
  const echoes = request.url === "/echo";
  socket.on("error", () => {});
  socket.on("message", (message) => {
    if (echoes) socket.send(message, { binary: false });
    else for (const peer of server.clients) peer.send(message, { binary: false });
  });
});
