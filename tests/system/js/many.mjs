// A client with many subscriptions, each with a long token, is cut off: it subscribes to all of them in one frame.
// Arguments: endpoint, port, token of the connection, tokens by channel.

import { connect, finish, given, once, relay, subscribe, until } from "./peer.mjs";

const [endpoint, port, token, tokens] = given;
const wire = await relay(port);
const { client } = await connect(wire.endpoint, { token });
const all = await Promise.all(
  Object.entries(tokens).map(([channel, token]) => subscribe(client, channel, { token })),
);
let final = "";
client.on("disconnected", ({ code, reason }) => { final = `${code} ${reason}`; });
const cutOff = once(client, "connecting");
wire.cut();
await cutOff;
wire.mend();
const again = () => all.filter(({ seen }) => seen.subscribed.length === 2).length;
await until(() => final || again() === all.length, () => `subscribed ${again()} again`);

finish({ final, again: again() });
