// Two clients on two workers say `count` messages each other, at the same time, in one channel.
// Arguments: endpoint, count.

import { connectApart, disorder, finish, given, subscribe, until } from "./peer.mjs";

const [endpoint, count] = given;
const WINDOW = 32; // publishes of one client that wait for their answer

const [left, right] = await connectApart(endpoint, ["left", "right"]);
const ears = [await subscribe(left.client, "stream:exchange"), await subscribe(right.client, "stream:exchange")];

async function speak({ subscription }, from) {
  const waiting = [];
  for (let n = 1; n <= count; n++) {
    waiting.push(subscription.publish({ from, n }));
    if (waiting.length === WINDOW) await waiting.shift();
  }
  await Promise.all(waiting);
}

const began = performance.now();
await Promise.all([speak(ears[0], "left"), speak(ears[1], "right")]);
await until(() => ears.every(({ seen }) => seen.publications.length >= 2 * count), () => ears.map(({ seen }) => seen.publications.length).join(" and "));
const seconds = (performance.now() - began) / 1000;

/** Each speaker's messages, in the order in which they came, count from 1 up. */
function outOfTurn(publications) {
  const next = { left: 1, right: 1 };
  for (const { data } of publications) if (data.n !== next[data.from]++) return `${data.from} ${data.n}`;
  return "";
}

finish({
  workers: [left.pid, right.pid],
  heard: ears.map(({ seen }) => seen.publications.length),
  disorder: ears.map(({ seen }) => disorder(seen.publications)),
  outOfTurn: ears.map(({ seen }) => outOfTurn(seen.publications)),
  seconds,
});
