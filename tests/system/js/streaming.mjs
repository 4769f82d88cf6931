// What a client does over a stream, for Node and for a page alike: `exercise` refers to nothing outside of itself.

/**
 * Connect by `transports`, and use every kind of command. options: of the SDK, beside those. name: of the channel.
 * many: how many publications, each by a request of its own. tokens: {brief, renewed}, or nothing.
 */
export async function exercise({ Centrifuge, transports, options, name, many, tokens }) {
  const LIMIT = 20_000;
  const once = (emitter, event) => new Promise((resolve, reject) => {
    const timer = setTimeout(() => reject(new Error(`no ${event} of ${name}`)), LIMIT);
    emitter.once(event, (context) => { clearTimeout(timer); resolve(context); });
  });
  const until = async (condition, what) => {
    const deadline = performance.now() + LIMIT;
    while (!condition()) {
      if (performance.now() > deadline) throw new Error(`not within ${LIMIT} ms: ${what()}`);
      await new Promise((resolve) => setTimeout(resolve, 5));
    }
  };
  const make = (more) => {
    const client = new Centrifuge(transports, { minReconnectDelay: 20, maxReconnectDelay: 200, ...options, ...more });
    client.on("error", () => {});
    return client;
  };
  const open = async (more) => {
    const client = make(more);
    const connected = once(client, "connected");
    client.connect();
    return { client, context: await connected };
  };

  const ada = await open({ data: { user: "ada" } });
  const bob = await open({ data: { user: "bob" } });
  const lost = [];
  ada.client.on("connecting", ({ code }) => lost.push(code));
  const heard = [];
  const subscribed = [];
  const subscription = bob.client.newSubscription(name);
  subscription.on("publication", ({ offset, data }) => heard.push([offset, data]));
  subscription.on("subscribed", (context) => subscribed.push(context));
  subscription.subscribe();
  await subscription.ready(LIMIT);
  const own = ada.client.newSubscription(name);
  own.subscribe();
  await own.ready(LIMIT);

  // Each in order, and then all at once.
  for (let n = 0; n < many; n++) await own.publish({ n });
  await Promise.all(Array.from({ length: many }, (_, n) => own.publish({ n: many + n })));
  await until(() => heard.length === 2 * many, () => `heard ${heard.length} of ${2 * many}`);
  const inOrder = heard.every(([offset, { n }], place) => offset === place + 1 && n === place);

  const echoed = (await ada.client.rpc("echo", { text: "ü", list: [1, null] })).data;
  const refused = await ada.client.rpc("refuse", {}).then(() => null, ({ code, message }) => ({ code, message }));
  const presence = Object.values((await own.presence()).clients).map(({ user }) => user).sort();
  const history = (await own.history({ limit: 2, reverse: true })).publications.map(({ offset }) => offset);

  // What a client misses while it is away, it gets when it is back.
  const away = once(bob.client, "disconnected");
  bob.client.disconnect();
  await away;
  for (let n = 0; n < 5; n++) await own.publish("missed");
  const back = once(subscription, "subscribed");
  bob.client.connect();
  const { wasRecovering, recovered } = await back;
  await until(() => heard.length === 2 * many + 5, () => `heard ${heard.length} after the recovery`);
  const complete = heard.every(([offset], place) => offset === place + 1);

  subscription.unsubscribe();
  await own.publish("unheard");
  subscription.subscribe();
  await subscription.ready(LIMIT);
  await until(() => heard.length === 2 * many + 6, () => "the publication after the unsubscribe");

  let renewed = null;
  if (tokens) {
    let renewals = 0;
    const brief = await open({ token: tokens.brief, getToken: async () => { renewals++; return tokens.renewed; } });
    brief.client.on("connecting", ({ code }) => lost.push(code));
    await until(() => renewals > 0, () => "a renewal");
    const { user } = (await brief.client.rpc("in_thread", {})).data;
    renewed = { renewals, user };
    brief.client.disconnect();
  }
  const result = {
    transports: [ada.context.transport, bob.context.transport],
    inOrder, complete, echoed, refused, presence, history, renewed,
    recovery: { wasRecovering, recovered },
    heard: heard.length,
    lost,
  };
  ada.client.disconnect();
  bob.client.disconnect();
  return result;
}
