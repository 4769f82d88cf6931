// Clients behind slow links are away while much is published, and come back.
// Arguments: HTTP address of the server, ports of links with 20, 50 and 100 KB/s, a token with eight channels.

import { connect, disorder, finish, given, once, relay, until } from "./peer.mjs";

const [http, port20, port50, port100, token] = given;
const text = "x".repeat(2000);
const LIMIT = 90_000;

/** Keep an emitter's errors, apart from connections that the relay has cut. */
function keepErrors(emitter, errors) {
  emitter.on("error", ({ error }) => { if (error.message !== "transport closed") errors.push(error.message); });
}

async function publish(channels, count, first = 1) {
  for (let n = first; n < first + count; n++) {
    const body = JSON.stringify({ channels, data: { n, text } });
    await fetch(`${http}/api/broadcast`, { method: "POST", body, headers: { "X-API-Key": "test-key" } });
  }
}

/** A client that records what happens to it, and a subscription of its own. */
async function listen(endpoint, channel, options = {}) {
  const { client } = await connect(endpoint, options);
  const seen = { publications: [], recovered: [], errors: [] };
  const subscription = client.newSubscription(channel);
  keepErrors(client, seen.errors);
  keepErrors(subscription, seen.errors);
  subscription.on("publication", (context) => seen.publications.push(context));
  const subscribed = once(subscription, "subscribed");
  subscription.subscribe();
  await subscribed;
  subscription.on("subscribed", (context) => seen.recovered.push(context.recovered));
  return { client, seen };
}

const heard = (seen, count) => until(() => seen.publications.length >= count, () => `${seen.publications.length} of ${count}`, LIMIT);

/** 474 KB at 50 KB/s, cut in the middle, while publishing goes on. */
async function oneChannel() {
  const wire = await relay(port50);
  const { client, seen } = await listen(wire.endpoint, "bulk:one");
  let lost = once(client, "connecting");
  wire.cut();
  await lost;
  await publish(["bulk:one"], 230);
  wire.mend();
  await heard(seen, 80);
  await publish(["bulk:one"], 5, 231);
  lost = once(client, "connecting", LIMIT);
  wire.cut();
  await lost;
  const before = seen.publications.length;
  await publish(["bulk:one"], 5, 236);
  wire.mend();
  await heard(seen, before + 1);
  await publish(["bulk:one"], 5, 241);
  await heard(seen, 245);
  return { ...summary(seen), cutIn: before < 230 };
}

const summary = ({ publications, recovered, errors }) => ({ heard: publications.length, disorder: disorder(publications), recovered, errors });

/** Eight channels of the token with 150 KB each, at 100 KB/s. */
async function eightChannels() {
  const wire = await relay(port100);
  const channels = [...Array(8).keys()].map((n) => `bulk:of-token-${n}`);
  const { client } = await connect(wire.endpoint, { token });
  const seen = { recovered: [], errors: [], publications: Object.fromEntries(channels.map((channel) => [channel, []])) };
  keepErrors(client, seen.errors);
  client.on("subscribed", (context) => seen.recovered.push(context.recovered));
  client.on("publication", (context) => seen.publications[context.channel].push(context));
  const lost = once(client, "connecting");
  wire.cut();
  await lost;
  await publish(channels, 75);
  wire.mend();
  const lists = Object.values(seen.publications);
  const count = () => lists.reduce((sum, list) => sum + list.length, 0);
  await until(() => count() >= 600, () => `${count()} of 600`, LIMIT);
  return { heard: count(), disorder: lists.map((list) => disorder(list)).join(""), recovered: seen.recovered, errors: seen.errors };
}

/** 100 KB at 20 KB/s over a stream, while another command is answered. */
async function overAStream() {
  const { client, seen } = await listen(`http://127.0.0.1:${port20}`, "bulk:streamed");
  client.disconnect();
  await publish(["bulk:streamed"], 50);
  client.connect();
  await heard(seen, 1);
  const echoed = (await client.rpc("echo", { a: 1 })).data;
  const before = seen.publications.length;
  await heard(seen, 50);
  return { ...summary(seen), echoed, answeredMeanwhile: before < 50 };
}

const [one, eight, streamed] = await Promise.all([oneChannel(), eightChannels(), overAStream()]);
finish({ one, eight, streamed });
