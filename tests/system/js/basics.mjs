// Connect, subscribe, publish, presence, history, rpc, unsubscribe: what each says to the SDK.
// Arguments: endpoint.

import { check, connect, failure, finish, given, once, subscribe, until } from "./peer.mjs";

const [endpoint] = given;
const ada = await connect(endpoint, { data: { user: "ada", info: { nick: "Ada" } }, name: "tester" });
const bob = await connect(endpoint, { data: { user: "bob" } });

const here = await subscribe(ada.client, "stream:basics");
const there = await subscribe(bob.client, "stream:basics");
await until(() => here.seen.joins.length === 2, () => "the joins of both");

await here.subscription.publish({ text: "hello", list: [1, 2.5, null], deep: { "ключ": "値" } });
await bob.client.publish("stream:basics", "plain");
await until(() => there.seen.publications.length === 2, () => "two publications");

const presence = await here.subscription.presence();
const stats = await here.subscription.presenceStats();
const all = await here.subscription.history({ limit: 10 });
const newest = await here.subscription.history({ limit: 1, reverse: true });
const since = await here.subscription.history({ limit: 10, since: { offset: 1, epoch: all.epoch } });
const position = await here.subscription.history();

const echoed = await ada.client.rpc("echo", { "a": [1, { b: "ü" }] });
const threaded = await ada.client.rpc("in_thread", {});
const published = await ada.client.rpc("publish", { channel: "stream:basics", data: "by the app" });
await until(() => there.seen.publications.length === 3, () => "the application's publication");
const errors = {
  failing: await failure(ada.client.rpc("fail", {})),
  refusing: await failure(ada.client.rpc("refuse", {})),
  missing: await failure(ada.client.rpc("nobody", {})),
  publishing: await failure(ada.client.publish("elsewhere", {})),
  namespace: await failure(ada.client.publish("nosuch:x", {})),
};
const afterErrors = await ada.client.rpc("echo", "still here");

there.subscription.unsubscribe();
await until(() => here.seen.leaves.length === 1, () => "the leave");
const alone = await here.subscription.presenceStats();
await here.subscription.publish("after the leave");
await until(() => here.seen.publications.length === 4, () => "the publication after the leave");

const moderated = await subscribe(ada.client, "checked:words");
await moderated.subscription.publish("fine");
await until(() => moderated.seen.publications.length === 1, () => "the moderated publication");
errors.moderated = await failure(moderated.subscription.publish("forbidden"));

check(bob.client.state === "connected", "the second client lost its connection");
const gone = once(bob.client, "disconnected");
bob.client.disconnect();
await gone;

finish({
  client: ada.context.client,
  transport: ada.context.transport,
  contextData: ada.context.data,
  subscribed: here.seen.subscribed[0],
  joins: here.seen.joins.map((info) => info.user),
  leaves: here.seen.leaves.map((info) => info.user),
  publications: here.seen.publications.map(({ offset, data, info }) => ({ offset, data, user: info?.user ?? null, nick: info?.connInfo?.nick ?? null })),
  heardElsewhere: there.seen.publications.map(({ offset }) => offset),
  presence: Object.values(presence.clients).map((info) => info.user).sort(),
  stats: [stats.numClients, stats.numUsers],
  alone: [alone.numClients, alone.numUsers],
  history: all.publications.map(({ offset }) => offset),
  newest: newest.publications.map(({ offset }) => offset),
  since: since.publications.map(({ offset }) => offset),
  position: [position.publications.length, position.offset, position.epoch === all.epoch],
  echoed: echoed.data,
  threaded: threaded.data,
  published: published.data,
  afterErrors: afterErrors.data,
  moderated: moderated.seen.publications[0].data,
  errors,
});
