// A channel without history, before and after the broker dies. Arguments: endpoint, pid of the broker.

import { connectApart, delay, finish, given, subscribe, until } from "./peer.mjs";

const [endpoint, broker] = given;
const [speaker, listener] = await connectApart(endpoint, ["speaker", "listener"]);
const voice = await subscribe(speaker.client, "plain");
const ear = await subscribe(listener.client, "plain");
await voice.subscription.publish("before");
await until(() => ear.seen.publications.length === 1, () => "the message before");
const before = ear.seen.publications.map(({ data }) => data);
process.kill(broker, "SIGKILL");

// Without history a message may pass by a listener whose worker is not attached again yet; a later one must not.
const heardAfter = () => ear.seen.publications.some(({ data }) => data === "after");
for (let attempt = 0; attempt < 500 && !heardAfter(); attempt++) {
  await voice.subscription.publish("after").catch(() => {});
  await delay(20);
}
finish({ before, after: ear.seen.publications.at(-1).data, resubscribed: ear.seen.subscribed.length - 1 });
