// The page of the README, with what it writes to the console. Arguments: its script, URL of the server.

import WebSocket from "ws";
import { Centrifuge, finish, given, until } from "./peer.mjs";

const [page, server] = given;
globalThis.WebSocket = WebSocket; // Node 20 has none of its own, unlike a browser
const said = [];
new Function("Centrifuge", "console", page)(Centrifuge, { log: (...words) => said.push(words) });
await until(() => said.length === 1, () => "the answer to the call");
await fetch(`${server}/api/publish`, {
  method: "POST",
  headers: { "X-API-Key": "of this test" },
  body: JSON.stringify({ channel: "news:today", data: { text: "live" } }),
});
await until(() => said.length === 2, () => "the publication");
finish(said);
