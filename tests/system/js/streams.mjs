// A client over a stream in Node, each of its commands over a new connection; then one whose WebSocket does not get
// through, and one that is refused. Arguments: base URL, how many publications, tokens.

import http from "node:http";
import { Centrifuge, finish, given, makeClient, once } from "./peer.mjs";
import { exercise } from "./streaming.mjs";

const [base, many, tokens] = given;
const endpoint = `${base}/connection/http_stream`;
const emulationEndpoint = `${base}/emulation`;
const statuses = {};

/** As fetch, without keeping the connection. */
function post(url, { method, headers, body }) {
  return new Promise((resolve, reject) => {
    const request = http.request(url, { method, headers, agent: false }, (response) => {
      statuses[response.statusCode] = (statuses[response.statusCode] ?? 0) + 1;
      response.resume().on("end", () => resolve({ status: response.statusCode, ok: response.statusCode < 300 }));
    });
    request.on("error", reject).end(body);
  });
}

const seen = await exercise({
  Centrifuge,
  transports: [{ transport: "http_stream", endpoint }],
  options: { emulationEndpoint, fetch: (url, init) => (url === emulationEndpoint ? post(url, init) : fetch(url, init)) },
  name: "stream:node",
  many,
  tokens,
});

const fallen = makeClient(
  [{ transport: "websocket", endpoint: `${base.replace("http", "ws")}/blocked` }, { transport: "http_stream", endpoint }],
  { emulationEndpoint },
);
const connected = once(fallen, "connected");
fallen.connect();
const { transport } = await connected;

const stranger = makeClient([{ transport: "http_stream", endpoint }], { emulationEndpoint, token: "of nobody" });
const disconnected = once(stranger, "disconnected");
stranger.connect();
const { code, reason } = await disconnected;

finish({
  ...seen,
  statuses,
  fallback: transport,
  answered: (await fallen.rpc("echo", "by the other way")).data,
  final: { code, reason },
});
