// The SDK's Protobuf variant: its payloads are bytes. With it, and between it and the JSON variant, every command.
// Arguments: endpoint, HTTP endpoint, port, {brief, renewed, channel, renewedChannel}: tokens.

import { Centrifuge as Binary } from "centrifuge/build/protobuf";
import WebSocket from "ws";
import { connect, disorder, failure, finish, given, once, relay, subscribe, until } from "./peer.mjs";

const [endpoint, http, port, tokens] = given;
const bytes = (value) => new TextEncoder().encode(JSON.stringify(value));
const value = (data) => JSON.parse(new TextDecoder().decode(data));
const hex = (data) => Buffer.from(data).toString("hex");
const noise = Uint8Array.from({ length: 256 }, (_, n) => n);

const clients = [];

/** A connected client of the Protobuf variant. */
async function connectBinary(address, options = {}) {
  const client = new Binary(address, { websocket: WebSocket, minReconnectDelay: 20, maxReconnectDelay: 500, ...options });
  client.on("error", () => {});
  const connected = once(client, "connected");
  client.connect();
  clients.push(client);
  return { client, context: await connected };
}

// One is not at a WebSocket, but at a stream over HTTP, and sends by requests of their own.
const stream = [{ transport: "http_stream", endpoint: `${http}/connection/http_stream` }];
const zoe = await connectBinary(stream, { data: bytes({ user: "zoe" }), emulationEndpoint: `${http}/emulation` });
const streamed = await subscribe(zoe.client, "stream:noise");

// A connection and a subscription that last for seconds are renewed in time.
const renewals = [];
const brief = await connectBinary(endpoint, {
  token: tokens.brief,
  getToken: async () => { renewals.push("connection"); return tokens.renewed; },
});
const kept = await subscribe(brief.client, "$private", {
  token: tokens.channel,
  getToken: async () => { renewals.push("subscription"); return tokens.renewedChannel; },
});

const wire = await relay(port);
const ada = await connectBinary(endpoint, { data: bytes({ user: "ada", info: { nick: "Ada" } }) });
const eve = await connectBinary(wire.endpoint, { data: bytes({ user: "eve" }) });
const bob = await connect(endpoint, { data: { user: "bob" } });

// Text passes between the two variants.
const here = await subscribe(ada.client, "stream:mixed");
const there = await subscribe(bob.client, "stream:mixed");
const far = await subscribe(eve.client, "stream:mixed");
await until(() => here.seen.joins.length === 3, () => "the joins of all");
await here.subscription.publish(bytes({ from: "ada", "текст": [1, null] }));
await there.subscription.publish({ from: "bob", "текст": [2.5] });
await here.subscription.publish(new TextEncoder().encode('{\r\n  "lines": 2\n}'));
await until(() => [here, there, far].every(({ seen }) => seen.publications.length === 3), () => "three publications");

const presence = await here.subscription.presence();
const stats = await here.subscription.presenceStats();
const history = await here.subscription.history({ limit: 10 });
const since = await here.subscription.history({ limit: 10, since: { offset: 1, epoch: history.epoch } });
const echoed = await ada.client.rpc("echo", bytes({ a: [1, "ü"] }));
const echoedNoise = await ada.client.rpc("echo", noise);
const errors = {
  missing: await failure(ada.client.rpc("nobody", bytes({}))),
  publishing: await failure(ada.client.publish("elsewhere", bytes({}))),
};

// Cut off, one of them recovers what it missed.
const cutOff = once(eve.client, "connecting");
wire.cut();
await cutOff;
for (let n = 0; n < 20; n++) await there.subscription.publish(n);
const back = once(far.subscription, "subscribed");
wire.mend();
const recovery = await back;
await until(() => far.seen.publications.length === 23, () => `${far.seen.publications.length} publications of 23`);

// Bytes that are no text reach Protobuf clients. For a JSON client they are a gap: it subscribes again at once.
const one = await subscribe(ada.client, "stream:noise");
const other = await subscribe(eve.client, "stream:noise");
const deaf = await subscribe(bob.client, "stream:noise");
const refused = once(deaf.subscription, "subscribing");
const again = once(deaf.subscription, "subscribed");
await one.subscription.publish(noise);
await until(() => [one, other, streamed].every(({ seen }) => seen.publications.length === 1), () => "the noise");
const noiseHistory = await other.subscription.history({ limit: 1 });
const { code, reason } = await refused;
const { wasRecovering, recovered } = await again;
const echoedOverHTTP = await zoe.client.rpc("echo", noise);

// Pings have come meanwhile, too.
await until(() => renewals.length === 2, () => `renewals: ${renewals}`);
await brief.client.rpc("echo", bytes(1));

bob.client.disconnect();
await until(() => far.seen.leaves.length === 1, () => "the leave of bob");
here.subscription.unsubscribe();
await until(() => far.seen.leaves.length === 2, () => "the leaves of bob and ada");

finish({
  contextData: value(ada.context.data),
  subscribed: here.seen.subscribed[0],
  joins: here.seen.joins.slice(0, 3).map((info) => info.user).sort(),
  leaves: far.seen.leaves.map((info) => info.user),
  atAda: here.seen.publications.slice(0, 3).map(({ offset, data, info }) => [offset, value(data), info.user]),
  atBob: there.seen.publications.slice(0, 3).map(({ offset, data, info }) => [offset, data, info.user]),
  nick: value(here.seen.publications[0].info.connInfo),
  presence: Object.values(presence.clients).map((info) => info.user).sort(),
  stats: [stats.numClients, stats.numUsers],
  history: history.publications.map(({ offset, data }) => [offset, value(data)]),
  since: since.publications.map(({ offset }) => offset),
  echoed: value(echoed.data),
  echoedNoise: [echoedNoise, echoedOverHTTP].map(({ data }) => hex(data)),
  errors,
  recovery: [recovery.wasRecovering, recovery.recovered, disorder(far.seen.publications)],
  recovered: far.seen.publications.slice(3).map(({ data }) => value(data)),
  noise: [one, other, streamed].map(({ seen }) => hex(seen.publications[0].data)),
  noiseHistory: noiseHistory.publications.map(({ data }) => hex(data)),
  refused: { code, reason, wasRecovering, recovered },
  renewals: renewals.sort(),
  keptSubscriptions: kept.seen.subscribed.length,
  states: clients.map((client) => client.state),
});
