// What the scripts of this folder share: the official SDK, unmodified, on Node; waiting; a connection that can be cut.

import net from "node:net";
import { Centrifuge } from "centrifuge";
import WebSocket from "ws";

export { Centrifuge };

/** The script's arguments, decoded. */
export const given = process.argv.slice(2).map((text) => JSON.parse(text));

/** Print the result for the Python side, and end, whatever timers remain. */
export function finish(result) {
  process.stdout.write(`${JSON.stringify(result)}\n`, () => process.exit(0));
}

export function check(condition, message) {
  if (!condition) throw new Error(message);
}

/** The next `event` of an emitter, or an error after `limit` milliseconds. */
export function once(emitter, event, limit = 15_000) {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(() => reject(new Error(`no ${event} within ${limit} ms`)), limit);
    emitter.once(event, (context) => { clearTimeout(timer); resolve(context); });
  });
}

/** Resolves when `condition` holds; it is asked whenever the event loop comes round. */
export async function until(condition, what, limit = 60_000) {
  const deadline = performance.now() + limit;
  while (!condition()) {
    check(performance.now() < deadline, `not within ${limit} ms: ${what()}`);
    await new Promise((resolve) => setTimeout(resolve, 5));
  }
}

export const delay = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds));

/** endpoint: of a WebSocket, a list of transports, or the base URL of a server that is talked to over a stream. */
export function makeClient(endpoint, options = {}) {
  let [transports, emulationEndpoint] = [endpoint, undefined];
  if (typeof endpoint === "string" && endpoint.startsWith("http")) {
    transports = [{ transport: "http_stream", endpoint: `${endpoint}/connection/http_stream` }];
    emulationEndpoint = `${endpoint}/emulation`;
  }
  const client = new Centrifuge(transports, { websocket: WebSocket, emulationEndpoint, minReconnectDelay: 20, maxReconnectDelay: 500, ...options });
  client.on("error", () => {}); // reported where it matters by rejected calls and state changes
  return client;
}

/** A connected client and its connect context. */
export async function connect(endpoint, options = {}) {
  const client = makeClient(endpoint, options);
  const connected = once(client, "connected");
  client.connect();
  return { client, context: await connected };
}

/** Clients on different workers, one for each entry of `users`: {client, pid}. The kernel deals out connections by hash.
 * endpoint: of a node; or the endpoints of several nodes, which get the clients in turn. */
export async function connectApart(endpoint, users) {
  const nodes = [endpoint].flat();
  const found = [];
  for (let attempt = 0; found.length < users.length; attempt++) {
    check(attempt < 200, "all connections went to one worker");
    const { client, context } = await connect(nodes[found.length % nodes.length], { data: { user: users[found.length] } });
    if (found.some((other) => other.pid === context.data.pid)) client.disconnect();
    else found.push({ client, pid: context.data.pid });
  }
  return found;
}

/** A subscribed subscription that records what comes: publications, and the contexts of "subscribed". */
export async function subscribe(client, channel, options = {}) {
  const subscription = client.newSubscription(channel, options);
  const seen = { publications: [], subscribed: [], joins: [], leaves: [], unsubscribed: [] };
  subscription.on("publication", (context) => seen.publications.push(context));
  subscription.on("subscribed", (context) => seen.subscribed.push(context));
  subscription.on("unsubscribed", (context) => seen.unsubscribed.push(context));
  subscription.on("join", (context) => seen.joins.push(context.info));
  subscription.on("leave", (context) => seen.leaves.push(context.info));
  const done = once(subscription, "subscribed");
  subscription.subscribe();
  await done;
  return { subscription, seen };
}

/** The error that a call ends with; an error of ours when it does not. */
export async function failure(promise) {
  try {
    await promise;
  } catch (error) {
    return { code: error.code, message: error.message, temporary: error.temporary ?? false };
  }
  throw new Error("the call succeeded");
}

/** A TCP relay on loopback, before a server's port: `cut` breaks all connections and refuses new ones until `mend`.
 * `to` sends new connections to another port, as a load balancer does. */
export async function relay(port) {
  const pairs = new Set();
  let open = true, target = port;
  const server = net.createServer((near) => {
    if (!open) return near.resetAndDestroy();
    const far = net.connect(target, "127.0.0.1");
    const pair = [near, far];
    pairs.add(pair);
    for (const [one, other] of [[near, far], [far, near]]) {
      one.on("error", () => {});
      one.on("close", () => { other.destroy(); pairs.delete(pair); });
      one.pipe(other);
    }
  });
  await new Promise((resolve) => server.listen(0, "127.0.0.1", resolve));
  return {
    endpoint: `ws://127.0.0.1:${server.address().port}/connection/websocket`,
    cut() { open = false; for (const [near] of pairs) near.resetAndDestroy(); },
    mend() { open = true; },
    to(other) { target = other; },
  };
}

/** Whether a list of publications counts up from `first` without a gap, a repeat or a swap, in offset and in data.n. */
export function disorder(publications, first = 1) {
  for (const [index, { offset }] of publications.entries()) {
    if (offset !== first + index) return `offset ${offset} at place ${index}, expected ${first + index}`;
  }
  return "";
}
