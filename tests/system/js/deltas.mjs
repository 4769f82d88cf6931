// Publications as deltas, over JSON and Protobuf, through a reconnect with recovery. Arguments: endpoint, port.

import { Centrifuge as Binary } from "centrifuge/build/protobuf";
import WebSocket from "ws";
import { connect, disorder, finish, given, once, relay, subscribe, until } from "./peer.mjs";

const [endpoint, port] = given;
const delta = { delta: "fossil" };
const text = (data) => JSON.parse(new TextDecoder().decode(data));

/** A document of which only little changes from one number to the next, within characters of several bytes too. */
const document = (n) => ({
  n,
  name: ["Müller", "Möller", "Mëller"][n % 3],
  clock: ["🕐", "🕑", "🕒", "🕓"][n % 4],
  rows: Array.from({ length: 20 }, (_, row) => ({ row, text: `zeile ${row} — ${row === n % 20 ? "jetzt" : "später"}` })),
});

const wire = await relay(port);
const json = await connect(wire.endpoint, { data: { user: "json" } });
const plain = await connect(endpoint, { data: { user: "plain" } });
const binary = new Binary(wire.endpoint, { websocket: WebSocket, minReconnectDelay: 20, maxReconnectDelay: 500 });
binary.on("error", () => {});
binary.connect();
await once(binary, "connected");

const heard = {
  json: await subscribe(json.client, "prices:a", delta),
  binary: await subscribe(binary, "prices:a", delta),
  plain: await subscribe(plain.client, "prices:a"),
};
let published = 0;
async function publish(count) {
  for (const end = published + count; published < end; published++) await heard.plain.subscription.publish(document(published));
}
const all = (count) => until(
  () => Object.values(heard).every(({ seen }) => seen.publications.length === count),
  () => JSON.stringify(Object.values(heard).map(({ seen }) => seen.publications.length)),
);
const stats = () => ({ json: heard.json.subscription.deltaStats(), binary: heard.binary.subscription.deltaStats() });

await publish(30);
await all(30);
const before = stats();

const back = [once(heard.json.subscription, "subscribed"), once(heard.binary.subscription, "subscribed")];
wire.cut();
await publish(10);
wire.mend();
const recoveries = await Promise.all(back);
await publish(10);
await all(50);
const after = stats();

const late = await subscribe(plain.client, "prices:b", delta);
await late.subscription.publish(document(1));
await late.subscription.publish("short");
await late.subscription.publish(document(2));
await until(() => late.seen.publications.length === 3, () => "the late ones");

const expected = JSON.stringify(Array.from({ length: 50 }, (_, n) => document(n)));
finish({
  same: Object.entries(heard).map(([name, { seen }]) => {
    const datas = seen.publications.map(({ data }) => (name === "binary" ? text(data) : data));
    return JSON.stringify(datas) === expected;
  }),
  disorder: Object.values(heard).map(({ seen }) => disorder(seen.publications)),
  recovered: recoveries.map(({ recovered }) => recovered),
  before,
  after,
  late: late.seen.publications.map(({ data }) => data.n ?? data),
  lateStats: late.subscription.deltaStats(),
});
