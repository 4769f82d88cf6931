// A node dies while messages flow to it from another one; its client goes on at the other one.
// Arguments: ports of the two nodes, pids of the first, count.

import { connect, connectApart, finish, given, relay, subscribe, until } from "./peer.mjs";

const [[first, second], pids, count] = given;
const channel = "stream:nodes";
const balancer = await relay(first);
const listener = await connect(balancer.endpoint, { data: { user: "listener" } });
const ear = await subscribe(listener.client, channel);
const [speaker] = await connectApart(`ws://127.0.0.1:${second}/connection/websocket`, ["speaker"]);
const voice = await subscribe(speaker.client, channel);

const users = async ({ subscription }) => Object.values((await subscription.presence()).clients).map(({ user }) => user).sort();
const present = [await users(ear), await users(voice)];
await until(() => ear.seen.joins.length === 2, () => `joins: ${JSON.stringify(ear.seen.joins)}`);

for (let n = 1; n <= count; n++) {
  if (n === Math.floor(count / 2)) {
    for (const pid of pids) process.kill(pid, "SIGKILL");
    balancer.to(second);
  }
  await voice.subscription.publish({ n });
}
await until(() => ear.seen.publications.length >= count, () => `${ear.seen.publications.length} of ${count}`);

finish({
  present,
  joined: ear.seen.joins.map(({ user }) => user),
  heard: ear.seen.publications.map(({ data }) => data.n),
  subscribed: ear.seen.subscribed.map(({ wasRecovering, recovered }) => ({ wasRecovering, recovered })),
});
