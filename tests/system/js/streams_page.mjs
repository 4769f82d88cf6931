// Clients over streams in headless Chromium: in a page of the server, and in one of another origin.
// Arguments: base URL, another URL of the same server, how many publications.

import { createRequire } from "node:module";
import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { chromium } from "playwright-core";
import { finish, given } from "./peer.mjs";
import { exercise } from "./streaming.mjs";

const [base, other, many] = given;
const LIMIT = 30_000;
const FLAGS = [
  "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
  "--disable-component-update", "--disable-sync",
];
const sdk = createRequire(import.meta.url).resolve("centrifuge").replace(/build.*/, "dist/centrifuge.js");
const profile = mkdtempSync(join(tmpdir(), "streams-"));
const browser = await chromium.launchPersistentContext(profile, { executablePath: "/usr/bin/chromium", headless: true, args: FLAGS });
browser.setDefaultTimeout(LIMIT);

/** Run `exercise` in a page of `origin` over these transports of the server at `base`. */
async function visit(origin, transports, name) {
  const page = await browser.newPage();
  await page.goto(`${origin}/pid`);
  await page.addScriptTag({ path: sdk });
  const seen = await page.evaluate(
    async ({ source, transports, emulationEndpoint, name, many }) => {
      const run = new Function(`return (${source})`)();
      return run({ Centrifuge: globalThis.Centrifuge, transports, options: { emulationEndpoint }, name, many });
    },
    { source: exercise.toString(), transports, emulationEndpoint: `${base}/emulation`, name, many },
  );
  await page.close();
  return seen;
}

const http_stream = { transport: "http_stream", endpoint: `${base}/connection/http_stream` };
const sse = { transport: "sse", endpoint: `${base}/connection/sse` };
const blocked = { transport: "websocket", endpoint: `${base.replace("http", "ws")}/blocked` };

let seen;
try {
  seen = {
    http_stream: await visit(base, [http_stream], "stream:a"),
    sse: await visit(base, [sse], "stream:b"),
    elsewhere: await visit(other, [sse], "stream:c"),
    fallback: await visit(other, [blocked, http_stream], "stream:d"),
  };
} finally {
  await browser.close();
  rmSync(profile, { recursive: true, force: true });
}
finish(seen);
