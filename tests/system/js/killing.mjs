// A process is killed while messages flow between two workers.
// Arguments: endpoint, count, pid: a process to kill, or 0 for the worker of the listener, -1 for that of the speaker.
//
// The speaker publishes again what may have been lost on the way; every message carries its number, so the listener can
// tell a repeat by the speaker from one by the server: the server's repeats would repeat an offset.

import { connectApart, delay, finish, given, subscribe } from "./peer.mjs";

const [endpoint, count, victim] = given;
const [speaker, listener] = await connectApart(endpoint, ["speaker", "listener"]);
const voice = await subscribe(speaker.client, "stream:killing");
const ear = await subscribe(listener.client, "stream:killing");

const accepted = [];
for (let n = 1; n <= count; n++) {
  if (n === Math.floor(count / 3)) process.kill(victim > 0 ? victim : victim === 0 ? listener.pid : speaker.pid, "SIGKILL");
  for (;;) {
    try {
      await voice.subscription.publish({ n });
      accepted.push(n);
      break;
    } catch {
      await delay(20);
    }
  }
}

const heard = () => new Set(ear.seen.publications.map(({ data }) => data.n));
const deadline = performance.now() + 30_000;
while (performance.now() < deadline && !(heard().has(count) && ear.subscription.state === "subscribed")) await delay(20);

const offsets = ear.seen.publications.map(({ offset }) => offset);
finish({
  accepted: accepted.length,
  missing: accepted.filter((n) => !heard().has(n)),
  backwards: offsets.filter((offset, index) => index && offset !== offsets[index - 1] + 1).length,
  subscribed: ear.seen.subscribed.map(({ wasRecovering, recovered, streamPosition }) => ({ wasRecovering, recovered, epoch: streamPosition?.epoch ?? "" })),
  speakerSubscribed: voice.seen.subscribed.map(({ wasRecovering, recovered, streamPosition }) => ({ wasRecovering, recovered, epoch: streamPosition?.epoch ?? "" })),
});
