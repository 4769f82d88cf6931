// Orders of the HTTP API reach the clients of a user on every worker. Arguments: endpoint, URL of the server, API key.

import { connectApart, connect, finish, given, once, subscribe } from "./peer.mjs";

const [endpoint, server, key] = given;

async function order(method, body) {
  const response = await fetch(`${server}/api/${method}`, { method: "POST", headers: { "X-API-Key": key }, body: JSON.stringify(body) });
  const answer = await response.json();
  if (!answer.result) throw new Error(`${method}: ${response.status} ${JSON.stringify(answer)}`);
}

const targets = await connectApart(endpoint, ["target", "target"]);
const { client: spared } = await connect(endpoint, { data: { user: "other" } });
const ears = [];
for (const { client } of targets) ears.push(await subscribe(client, "stream:orders"));
await subscribe(spared, "stream:orders");

const plain = ({ code, reason }) => ({ code, reason });
const unsubscribed = ears.map(({ subscription }) => once(subscription, "unsubscribed"));
await order("unsubscribe", { user: "target", channel: "stream:orders" });
const unsubscribes = (await Promise.all(unsubscribed)).map(plain);
const disconnected = targets.map(({ client }) => once(client, "disconnected"));
await order("disconnect", { user: "target" });
const disconnects = (await Promise.all(disconnected)).map(plain);
await spared.rpc("echo", 1);

finish({ unsubscribed: unsubscribes, disconnected: disconnects, spared: spared.state });
