// A client is cut off while others publish: afterwards it has exactly what it missed.
// Arguments: endpoint, port, number of publications before, during and after the cut.

import { connect, disorder, finish, given, once, relay, subscribe, until } from "./peer.mjs";

const [endpoint, port, before, during, after] = given;
const wire = await relay(port);
const speaker = await connect(endpoint);
const voice = await subscribe(speaker.client, "stream:recovery");
const listener = await connect(wire.endpoint);
const ear = await subscribe(listener.client, "stream:recovery");

async function speak(count) {
  for (let n = 0; n < count; n++) await voice.subscription.publish({ n: voice.seen.publications.length });
}

await speak(before);
await until(() => ear.seen.publications.length === before, () => `heard ${ear.seen.publications.length} before the cut`);
const cutOff = once(listener.client, "connecting");
wire.cut();
await cutOff;
await speak(during);
const back = once(ear.subscription, "subscribed");
wire.mend();
const context = await back;
await speak(after);
const total = before + during + after;
await until(() => ear.seen.publications.length >= total, () => `heard ${ear.seen.publications.length} of ${total}`);

finish({
  heard: ear.seen.publications.length,
  disorder: disorder(ear.seen.publications),
  wasRecovering: context.wasRecovering,
  recovered: context.recovered,
  subscribedTimes: ear.seen.subscribed.length,
});
