// Connection and subscription tokens, good, bad and expired, and a refresh.
// Arguments: endpoint, {good, wrong, expired, brief, renewed, subscription, foreign}: tokens.

import { check, connect, finish, given, makeClient, once, subscribe } from "./peer.mjs";

const [endpoint, tokens] = given;

async function refusal(options) {
  const client = makeClient(endpoint, options);
  const disconnected = once(client, "disconnected");
  client.connect();
  const { code, reason } = await disconnected;
  return { code, reason };
}

const good = await connect(endpoint, { token: tokens.good });
const { subscription, seen } = await subscribe(good.client, "$private", { token: tokens.subscription });
check(subscription.state === "subscribed", "the private channel");

const foreign = good.client.newSubscription("$other", { token: tokens.foreign });
const unsubscribed = once(foreign, "unsubscribed");
foreign.subscribe();
const refusedChannel = await unsubscribed;

// An expired token makes the SDK ask for another one, and connect with that.
let asked = 0;
const late = await connect(endpoint, { token: tokens.expired, getToken: async () => { asked++; return tokens.good; } });

// One that lasts for seconds is renewed over the same connection.
let renewals = 0;
const brief = await connect(endpoint, { token: tokens.brief, getToken: async () => { renewals++; return tokens.renewed; } });
const id = brief.context.client;
const lost = [];
brief.client.on("connecting", (context) => lost.push(context.code));
while (renewals === 0) await new Promise((resolve) => setTimeout(resolve, 20));
await brief.client.rpc("echo", 1);

finish({
  user: (await good.client.rpc("in_thread", {})).data.user,
  wrong: await refusal({ token: tokens.wrong }),
  none: await refusal({ data: { refuse: [4321, "not today"] } }),
  refusedChannel: { code: refusedChannel.code, reason: refusedChannel.reason },
  lateState: late.client.state,
  asked,
  renewals,
  kept: lost.length === 0 && Boolean(id),
  subscriptions: seen.subscribed.length,
});
