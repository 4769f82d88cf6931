// The operators' page in headless Chromium. Arguments: its URL, port and path of a route that blocks, path of a route
// that raises, pid of the broker, directory for screenshots.

import { mkdtempSync, rmSync } from "node:fs";
import http from "node:http";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { chromium } from "playwright-core";
import { finish, given } from "./peer.mjs";

const [url, port, path, failing, broker, artifacts] = given;
const LIMIT = 20_000;
const FLAGS = [
  "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
  "--disable-component-update", "--disable-sync",
];
const DESKTOP = { width: 1280, height: 1000 };
const PHONE = { width: 390, height: 844 };

const profile = mkdtempSync(join(tmpdir(), "operators-"));
const browser = await chromium.launchPersistentContext(profile, { executablePath: "/usr/bin/chromium", headless: true, args: FLAGS, viewport: DESKTOP });
const trouble = [];

async function open(viewport, colorScheme) {
  const context = await browser.browser().newContext({ viewport, colorScheme });
  context.setDefaultTimeout(LIMIT);
  const page = await context.newPage();
  page.on("pageerror", (error) => trouble.push(String(error)));
  page.on("console", (message) => { if (["error", "warning"].includes(message.type())) trouble.push(message.text()); });
  await page.goto(url);
  await page.waitForSelector('body[data-state="live"]');
  return page;
}

const texts = (page, selector) => page.locator(selector).allTextContents();

/** Text whose contrast with the nearest opaque background is below WCAG's 4.5, and whether the page scrolls sideways. */
function look(page) {
  return page.evaluate(() => {
    const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
    const channels = (color) => { canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1); return [...canvas.getImageData(0, 0, 1, 1).data]; };
    const luminance = (color) => {
      const [r, g, b] = channels(color).slice(0, 3).map((value) => value / 255).map((value) => (value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4));
      return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const contrast = (element) => {
      const text = luminance(getComputedStyle(element).color);
      while (channels(getComputedStyle(element).backgroundColor)[3] < 255) element = element.parentElement;
      const ground = luminance(getComputedStyle(element).backgroundColor);
      return (Math.max(text, ground) + 0.05) / (Math.min(text, ground) + 0.05);
    };
    const read = ["h1", "#status", "h3", ".condition", ".process", "figcaption", "output", ".scale span", "dt", "dd", "th", "td", "summary time", ".loop p", ".duration", ".place", ".handler", ".more pre"];
    return {
      faint: read.map((selector) => [selector, contrast(document.querySelector(selector))]).filter(([, ratio]) => ratio < 4.5),
      overflow: document.documentElement.scrollWidth - innerWidth,
      dark: matchMedia("(prefers-color-scheme: dark)").matches,
    };
  });
}

try {
  const page = await open(DESKTOP, "light");
  // The start of the browser makes workers late.
  await page.locator("#status", { hasText: "all processes are healthy" }).waitFor();
  const result = { conditions: await texts(page, "#workers .condition"), running: await texts(page, "#workers .process"), broker: await texts(page, "#broker .process") };
  // A worker that is late because the browser starts may refuse it. Node sends the path unquoted; fetch would quote it.
  const place = page.locator("#incidents details", { hasText: ".py" }).first();
  for (let attempt = 0; attempt < 10 && !(await place.count()); attempt++) {
    http.get({ host: "127.0.0.1", port, path, agent: false }).on("response", (response) => response.resume()).on("error", () => {});
    await place.waitFor({ timeout: 3_000 }).catch(() => {});
  }
  await page.locator("#places tbody tr", { hasText: "script" }).first().waitFor();
  await place.locator("summary").click();
  await place.locator("pre").first().waitFor();
  result.incident = { place: await place.locator(".place").textContent(), handler: await place.locator(".handler").textContent(), stack: await place.locator("pre").first().textContent() };
  result.table = await texts(page, "#places tbody td:nth-child(2)");
  await page.locator("#loop tbody tr", { hasText: "script" }).first().waitFor();
  result.busy = await texts(page, "#loop tbody td:first-child");
  result.strips = await texts(page, ".loop p");
  result.elements = await page.evaluate(() => [document.scripts.length, document.images.length, "owned" in window]);
  await page.waitForFunction(() => document.querySelector(".chart.lag .line").getAttribute("d").length > 20);
  // After a few seconds the charts have something to show.
  await page.waitForTimeout(3_000);
  result.looks = {};
  for (const [device, viewport] of [["desktop", DESKTOP], ["phone", PHONE]]) {
    for (const scheme of ["light", "dark"]) {
      await page.setViewportSize(viewport);
      await page.emulateMedia({ colorScheme: scheme });
      await page.evaluate(() => scrollTo(0, 0));
      result.looks[`${device}-${scheme}`] = await look(page);
      await page.screenshot({ path: join(artifacts, `operators-${device}-${scheme}.png`) });
    }
  }
  await page.setViewportSize(DESKTOP);
  const plot = page.locator(".chart.lag .plot").first();
  const box = await plot.boundingBox();
  await page.mouse.move(box.x + box.width * 0.9, box.y + 10);
  result.cursor = await page.locator(".chart.lag .cursor").first().getAttribute("d");
  // An error of a handler, and a broker that is stopped.
  const problem = page.locator("#status, #problems li", { hasText: "errors of handlers in the last minute" });
  for (let attempt = 0; attempt < 10 && !(await problem.count()); attempt++) {
    http.get({ host: "127.0.0.1", port, path: failing, agent: false }).on("response", (response) => response.resume()).on("error", () => {});
    await problem.waitFor({ timeout: 3_000 }).catch(() => {});
  }
  result.problem = await problem.textContent();
  process.kill(broker, "SIGSTOP");
  await page.locator("#status", { hasText: "the broker is not turning its loop" }).waitFor();
  result.stopped = { card: await page.locator("#broker .condition").textContent(), tone: await page.locator("#status").getAttribute("data-tone") };
  process.kill(broker, "SIGCONT");
  await page.locator("#broker .condition", { hasText: "healthy" }).waitFor();
  result.trouble = [...trouble];
  // A page that is refused says so, and is live as soon as there is room.
  const viewers = Array.from({ length: 20 }, () => http.get(new URL("live", url), { agent: false }).on("error", () => {}));
  await Promise.all(viewers.map((viewer) => new Promise((resolve) => viewer.on("response", (response) => resolve(response.resume())))));
  const refused = await browser.browser().newContext();
  const late = await refused.newPage();
  await late.goto(url);
  await late.locator("#status", { hasText: "too many live pages are open: close one" }).waitFor({ timeout: LIMIT });
  for (const viewer of viewers) viewer.destroy();
  await late.waitForSelector('body[data-state="live"]', { timeout: LIMIT });
  await browser.close();
  rmSync(profile, { recursive: true, force: true });
  finish(result);
} catch (error) {
  console.error(error, trouble);
  await browser.close();
  process.exit(1);
}
