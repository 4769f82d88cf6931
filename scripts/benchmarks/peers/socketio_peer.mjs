// Socket.IO on Node, over WebSocket only.
import { createServer } from "node:http";
import { Server } from "socket.io";

const http = createServer();
const server = new Server(http, { transports: ["websocket"], perMessageDeflate: false, pingInterval: 600_000 });
server.on("connection", (socket) => {
  socket.on("all", (data) => server.emit("all", data));
  socket.on("echo", (data) => socket.emit("echo", data));
});
http.listen({ host: "127.0.0.1", port: 0, backlog: 4096 }, () => console.log(`port ${http.address().port}`));
