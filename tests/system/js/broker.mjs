// The broker dies between two messages: whoever is subscribed is told that continuity is lost, and goes on in a new epoch.
// Arguments: endpoint, pid of the broker.

import { connectApart, delay, disorder, finish, given, subscribe, until } from "./peer.mjs";

const [endpoint, broker] = given;
const [speaker, listener] = await connectApart(endpoint, ["speaker", "listener"]);
const voice = await subscribe(speaker.client, "stream:broker");
const ear = await subscribe(listener.client, "stream:broker");

for (let n = 1; n <= 20; n++) await voice.subscription.publish({ n });
await until(() => ear.seen.publications.length === 20, () => "the messages before");
process.kill(broker, "SIGKILL");

let refused = 0;
for (;;) {
  try {
    await voice.subscription.publish({ n: 21 });
    break;
  } catch {
    refused++;
    await delay(20);
  }
}
await until(() => [voice, ear].every(({ seen, subscription }) => seen.subscribed.length >= 2 && subscription.state === "subscribed"), () => "the second subscribe");
for (let n = 22; n <= 40; n++) await voice.subscription.publish({ n });
const last = ({ seen }) => seen.publications.at(-1)?.data.n;
await until(() => [voice, ear].every((each) => last(each) === 40), () => `${last(voice)} and ${last(ear)}`);

const contexts = ({ seen }) => seen.subscribed.map(({ wasRecovering, recovered, streamPosition }) => ({ wasRecovering, recovered, epoch: streamPosition.epoch }));
const numbers = ear.seen.publications.map(({ data }) => data.n);
const after = ear.seen.publications.slice(20);
finish({
  connections: [speaker.client.state, listener.client.state],
  speaker: contexts(voice),
  listener: contexts(ear),
  before: numbers.slice(0, 20),
  after: numbers.slice(20),
  disorderBefore: disorder(ear.seen.publications.slice(0, 20)),
  disorderAfter: disorder(after, after[0]?.offset),
});
