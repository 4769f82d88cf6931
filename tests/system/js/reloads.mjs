// Clients of the official SDK, in Node and in a page of Chromium, while the server is reloaded again and again.
// Arguments: base URL, command that reloads the server, how often, publications for each reload.

import { execFile } from "node:child_process";
import { createRequire } from "node:module";
import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { promisify } from "node:util";
import { Centrifuge } from "centrifuge";
import { Centrifuge as Binary } from "centrifuge/build/protobuf";
import { chromium } from "playwright-core";
import WebSocket from "ws";
import { delay, disorder, finish, given } from "./peer.mjs";

const [base, command, times, each] = given;
const FLAGS = [
  "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
  "--disable-component-update", "--disable-sync",
];
const sdk = createRequire(import.meta.url).resolve("centrifuge").replace(/build.*/, "dist/centrifuge.js");
const websocket = `${base.replace("http", "ws")}/connection/websocket`;
const stream = (transport) => [{ transport, endpoint: `${base}/connection/${transport}` }];
const emulationEndpoint = `${base}/emulation`;

/**
 * A client in two channels, one with deltas. It refers to nothing outside of itself, so it works in a page too. `seen`
 * has what its application learns; `changes` are events that a reload must not cause.
 */
async function listen({ Centrifuge, endpoint, options, name, encode, decode }) {
  const client = new Centrifuge(endpoint, { minReconnectDelay: 20, maxReconnectDelay: 200, ...options, data: encode({ user: name }) });
  const seen = { publications: [], deltas: [], pids: [], changes: [] };
  const note = (emitter, events) => events.forEach((event) => emitter.on(event, (context) => {
    seen.changes.push([event, context.code ?? context.error?.code ?? 0, context.reason ?? context.info?.user ?? context.error?.message ?? ""]);
  }));
  const subscribe = async (channel, into, options) => {
    const subscription = client.newSubscription(channel, options);
    subscription.on("publication", ({ offset, data }) => into.push({ offset, n: decode(data).n }));
    subscription.subscribe();
    await subscription.ready(20_000);
    return subscription;
  };
  client.connect();
  await client.ready(20_000);
  const subscriptions = [await subscribe("stream:sdk", seen.publications), await subscribe("prices:sdk", seen.deltas, { delta: "fossil" })];
  return {
    client, seen, subscriptions,
    begin() {
      note(client, ["connecting", "connected", "disconnected", "error"]);
      for (const subscription of subscriptions) note(subscription, ["subscribing", "subscribed", "unsubscribed", "join", "leave", "error"]);
    },
    async ask() {
      try {
        const { pid } = decode((await client.rpc("in_thread", encode({}))).data);
        if (!seen.pids.includes(pid)) seen.pids.push(pid);
      } catch ({ code, message }) {
        seen.changes.push(["call failed", code, message]);
      }
    },
  };
}

const bytes = { encode: (value) => new TextEncoder().encode(JSON.stringify(value)), decode: (data) => JSON.parse(new TextDecoder().decode(data)) };
const plain = { encode: (value) => value, decode: (data) => data };
const here = {
  json: await listen({ Centrifuge, endpoint: websocket, options: { websocket: WebSocket }, name: "json", ...plain }),
  protobuf: await listen({ Centrifuge: Binary, endpoint: websocket, options: { websocket: WebSocket }, name: "protobuf", ...bytes }),
  http_stream: await listen({ Centrifuge, endpoint: stream("http_stream"), options: { emulationEndpoint }, name: "http_stream", ...plain }),
};

const profile = mkdtempSync(join(tmpdir(), "reloads-"));
const browser = await chromium.launchPersistentContext(profile, { executablePath: "/usr/bin/chromium", headless: true, args: FLAGS });
const page = await browser.newPage();
await page.goto(`${base}/pid`);
await page.addScriptTag({ path: sdk });
await page.evaluate(async ({ source, endpoints, emulationEndpoint }) => {
  const listen = new Function(`return (${source})`)();
  globalThis.there = {};
  const same = (value) => value;
  for (const [name, endpoint] of Object.entries(endpoints)) {
    globalThis.there[name] = await listen({ Centrifuge: globalThis.Centrifuge, endpoint, options: { emulationEndpoint }, name, encode: same, decode: same });
  }
}, { source: listen.toString(), endpoints: { "page websocket": websocket, "page http_stream": stream("http_stream"), "page sse": stream("sse") }, emulationEndpoint });

// Each has seen the joins of the others by now: the last of them subscribed before its answer.
const inPage = (what) => page.evaluate((what) => Promise.all(Object.values(globalThis.there).map((one) => one[what]())), what);
const ask = () => Promise.all([...Object.values(here).map((one) => one.ask()), inPage("ask")]);
await ask();
await delay(500);
Object.values(here).forEach((one) => one.begin());
await inPage("begin");

let published = 0;
const failed = [];
async function publish(count) {
  for (const end = published + count; published < end; published++) {
    const n = published + 1;
    const text = `publication ${n} of many that resemble each other, so that a delta is short`;
    await Promise.all(here.json.subscriptions.map((one) => one.publish({ n, text }).catch((error) => failed.push([n, error.code, error.message]))));
    await delay(5);
  }
}

const run = promisify(execFile);
for (let time = 0; time < times; time++) {
  let done = false;
  const reloading = run(command[0], command.slice(1)).finally(() => { done = true; });
  while (!done) await Promise.all([publish(each), ask()]);
  await reloading;
  await Promise.all([publish(each), ask()]);
}

const results = async () => ({
  ...Object.fromEntries(Object.entries(here).map(([name, { seen }]) => [name, structuredClone(seen)])),
  ...(await page.evaluate(() => Object.fromEntries(Object.entries(globalThis.there).map(([name, { seen }]) => [name, seen])))),
});
let all = await results();
for (let tries = 0; tries < 200 && Object.values(all).some(({ publications, deltas }) => Math.min(publications.length, deltas.length) < published); tries++) {
  await delay(50);
  all = await results();
}
await browser.close();
rmSync(profile, { recursive: true, force: true });
finish({
  published,
  failed,
  clients: Object.fromEntries(Object.entries(all).map(([name, { publications, deltas, pids, changes }]) => [name, {
    heard: [publications.length, deltas.length],
    disorder: [disorder(publications), disorder(deltas)],
    right: [...publications, ...deltas].every(({ offset, n }) => offset === n),
    processes: pids.length,
    changes,
  }])),
});
