// The SDK's Protobuf variant in headless Chromium, over a WebSocket and over a stream; in Node, beside it, one in JSON.
// Arguments: base URL, endpoint, port.

import { createRequire } from "node:module";
import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { chromium } from "playwright-core";
import { connect, finish, given, relay, subscribe, until } from "./peer.mjs";

const [base, endpoint, port] = given;
const FLAGS = [
  "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
  "--disable-component-update", "--disable-sync",
];
const sdk = createRequire(import.meta.url).resolve("centrifuge").replace(/build.*/, "dist/centrifuge.protobuf.js");
const profile = mkdtempSync(join(tmpdir(), "binary-"));
const browser = await chromium.launchPersistentContext(profile, { executablePath: "/usr/bin/chromium", headless: true, args: FLAGS });
browser.setDefaultTimeout(30_000);

/** In a page: connect and subscribe. What the other steps need stays at `globalThis.peer`. */
async function enter({ transports, emulationEndpoint, channel }) {
  const encode = (value) => new TextEncoder().encode(JSON.stringify(value));
  const client = new globalThis.Centrifuge(transports, {
    emulationEndpoint, data: encode({ user: "ada" }), minReconnectDelay: 20, maxReconnectDelay: 200,
  });
  const peer = { client, encode, heard: [], subscribed: [], lost: 0 };
  globalThis.peer = peer;
  client.on("error", () => {});
  const connected = new Promise((resolve) => client.once("connected", resolve));
  client.connect();
  const { transport } = await connected;
  client.on("connecting", () => peer.lost++);
  peer.subscription = client.newSubscription(channel);
  peer.subscription.on("publication", ({ offset, data, info }) => {
    peer.heard.push([offset, data instanceof Uint8Array && JSON.parse(new TextDecoder().decode(data)), info?.user]);
  });
  peer.subscription.on("subscribed", ({ wasRecovering, recovered }) => peer.subscribed.push([wasRecovering, recovered]));
  peer.subscription.subscribe();
  await peer.subscription.ready();
  return transport;
}

/** In a page: publish, and have bytes that are no text echoed. */
async function speak() {
  const { client, encode, subscription } = globalThis.peer;
  await subscription.publish(encode({ from: "ada", "текст": [1, null] }));
  const noise = Uint8Array.from({ length: 256 }, (_, n) => n);
  const { data } = await client.rpc("echo", noise);
  return Array.from(data, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

async function visit(transport, channel) {
  const wire = await relay(port);
  const near = `http://127.0.0.1:${new URL(wire.endpoint).port}`;
  const address = transport === "websocket" ? wire.endpoint : `${near}/connection/${transport}`;
  const page = await browser.newPage();
  await page.goto(`${base}/pid`);
  await page.addScriptTag({ path: sdk });
  const bob = await connect(endpoint, { data: { user: "bob" } });
  const { subscription, seen } = await subscribe(bob.client, channel);

  const transports = [{ transport, endpoint: address }];
  const used = await page.evaluate(enter, { transports, emulationEndpoint: `${near}/emulation`, channel });
  const echoed = await page.evaluate(speak);
  await subscription.publish({ from: "bob" });
  await page.waitForFunction(() => globalThis.peer.heard.length === 2);
  wire.cut();
  await page.waitForFunction(() => globalThis.peer.lost > 0);
  for (let n = 0; n < 5; n++) await subscription.publish(n);
  wire.mend();
  await page.waitForFunction(() => globalThis.peer.heard.length === 7);
  await until(() => seen.publications.length === 7, () => `${seen.publications.length} publications of 7`);
  const { heard, subscribed } = await page.evaluate(() => ({ heard: globalThis.peer.heard, subscribed: globalThis.peer.subscribed }));
  await page.close();
  return { used, echoed, heard, subscribed, atBob: seen.publications.map(({ offset, data, info }) => [offset, data, info.user]) };
}

let seen;
try {
  const [websocket, stream] = await Promise.all([visit("websocket", "stream:page"), visit("http_stream", "stream:other")]);
  seen = { websocket, http_stream: stream };
} finally {
  await browser.close();
  rmSync(profile, { recursive: true, force: true });
}
finish(seen);
