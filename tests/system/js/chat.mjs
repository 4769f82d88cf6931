// The chat example in headless Chromium. Arguments: URL of the page, scenario, directory for screenshots.

import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { chromium } from "playwright-core";
import { check, delay, finish, given } from "./peer.mjs";

const [url, scenario, artifacts] = given;
const LIMIT = 15_000;
// No look-ups of the browser's own, and no sandbox: the tests may run as root.
const FLAGS = [
  "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
  "--disable-component-update", "--disable-sync",
];
const DESKTOP = { width: 1280, height: 800 };
const PHONE = { width: 390, height: 780 };

const profile = mkdtempSync(join(tmpdir(), "chat-"));
const browser = await chromium.launchPersistentContext(profile, { executablePath: "/usr/bin/chromium", headless: true, args: FLAGS, viewport: DESKTOP });
const trouble = [];

/** A tab that has connected, in a browser session of its own. */
async function openTab(nick, { viewport = DESKTOP, colorScheme = "light", room = "lobby", ...options } = {}) {
  const context = await browser.browser().newContext({ viewport, colorScheme, ...options });
  context.setDefaultTimeout(LIMIT);
  const page = await context.newPage();
  page.on("pageerror", (error) => trouble.push(`${nick}: ${error}`));
  page.on("console", (message) => {
    const text = message.text();
    if (message.type() === "error" && !text.includes("WebSocket connection")) trouble.push(`${nick}: ${text}`);
  });
  await page.goto(`${url}#${room}`);
  await page.getByLabel("Your name").fill(nick);
  await page.getByRole("button", { name: "Start chatting" }).click();
  await connected(page);
  return page;
}

const connected = (page) => page.waitForSelector('body[data-state="connected"]');
const worker = (page) => page.evaluate(() => Number(document.body.dataset.worker));
const texts = (page) => page.locator("#messages .message .bubble").allTextContents();
const people = (page) => page.locator("#people li").allTextContents();
const heard = (page, text) => page.locator("#messages .bubble", { hasText: text }).first().waitFor();

async function say(page, text) {
  await page.getByLabel("Your message").fill(text);
  await page.getByLabel("Your message").press("Enter");
}

/** Two tabs on two workers: the kernel deals out connections by hash, so a few may be needed. */
async function openApart(options) {
  const first = await openTab("Ada", options);
  for (let attempt = 0; attempt < 60; attempt++) {
    const second = await openTab("Grace", options);
    if ((await worker(second)) !== (await worker(first))) return [first, second];
    await second.context().close();
  }
  throw new Error("all tabs sat on one worker");
}

const scenarios = {
  /** A message crosses; both see who is here; a reload keeps person and history. */
  async tabs() {
    const [ada, grace] = await openApart();
    await say(ada, "Hello from one process");
    await heard(grace, "Hello from one process");
    await say(grace, "And hello from another <b>one</b>");
    await heard(ada, "And hello from another");
    const seen = { workers: [await worker(ada), await worker(grace)], ada: await texts(ada), grace: await texts(grace), people: await people(ada) };
    await grace.reload();
    await connected(grace);
    await heard(grace, "Hello from one process");
    seen.reloaded = await texts(grace);
    seen.mine = await grace.locator("#messages .mine .bubble").allTextContents();
    await grace.context().close();
    await ada.waitForFunction(() => document.querySelectorAll("#people li").length === 1);
    seen.left = await people(ada);
    return seen;
  },

  /** The worker under one tab is killed while both write. */
  async killing() {
    const [ada, grace] = await openApart();
    await say(ada, "before");
    await heard(grace, "before");
    process.kill(await worker(grace), "SIGKILL");
    for (let n = 1; n <= 10; n++) {
      await say(ada, `ada ${n}`);
      if (n % 3 === 0) await say(grace, `grace ${n}`);
      await delay(30);
    }
    for (const page of [ada, grace]) {
      for (const text of ["ada 10", "grace 9"]) await heard(page, text);
      await page.waitForFunction(() => document.querySelectorAll("#unsent li").length === 0);
    }
    return { ada: await texts(ada), grace: await texts(grace) };
  },

  /** What is written while there is no connection outlives a reload, and is sent once. */
  async unsent() {
    let blocked = false;
    const context = await browser.browser().newContext({ viewport: DESKTOP });
    context.setDefaultTimeout(LIMIT);
    await context.routeWebSocket(/connection/, (socket) => { if (blocked) socket.close(); else socket.connectToServer(); });
    const page = await context.newPage();
    await page.goto(`${url}#lobby`);
    await page.getByLabel("Your name").fill("Ada");
    await page.getByRole("button", { name: "Start chatting" }).click();
    await connected(page);
    blocked = true;
    process.kill(await worker(page), "SIGKILL");
    await page.waitForSelector('body[data-state="connecting"]');
    await say(page, "kept for later");
    await page.getByText("Waiting to be sent").waitFor();
    await page.getByRole("status").getByText("Reconnecting").waitFor();
    await page.screenshot({ path: join(artifacts, "chat-reconnecting.png") });
    await page.reload();
    await page.locator("#unsent .bubble", { hasText: "kept for later" }).waitFor();
    blocked = false;
    await connected(page);
    await heard(page, "kept for later");
    const other = await openTab("Grace");
    await heard(other, "kept for later");
    return { mine: await texts(page), others: await texts(other), unsent: await page.locator("#unsent li").count() };
  },

  /** A room with more history than one page holds, read back to its beginning; another room's unread messages. */
  async history() {
    const page = await openTab("Ada", { room: "garden" });
    await heard(page, "message 130");
    const first = await texts(page);
    for (let step = 0; step < 10 && !(await page.locator("#start").isVisible()); step++) {
      await page.locator("#scroll").evaluate((element) => { element.scrollTop = 0; });
      await delay(100);
    }
    const all = await texts(page);
    await page.getByRole("link", { name: "kitchen" }).click();
    await page.getByText("There are no messages yet.").waitFor();
    const grace = await openTab("Grace", { room: "garden" });
    await say(grace, "news");
    const badge = page.getByRole("link", { name: /garden 1 unread/ });
    await badge.waitFor();
    const title = await page.title();
    await badge.click();
    await heard(page, "news");
    return { first, all, title, titleAfter: await page.title() };
  },

  /** What the page looks like, light and dark, on a desktop and on a phone. */
  async looks() {
    const seen = {};
    const ada = await openTab("Ada");
    await say(ada, "Good morning!");
    await say(ada, "Has anybody tried the new build? https://example.org/builds/42");
    await heard(ada, "builds/42");
    for (const colorScheme of ["light", "dark"]) {
      for (const [device, viewport] of [["desktop", DESKTOP], ["phone", PHONE]]) {
        const page = await openTab("Grace", { viewport, colorScheme, hasTouch: device === "phone" });
        await heard(page, "builds/42");
        await say(page, `Yes, on a ${device}, and it is ${colorScheme}.`);
        await heard(page, `on a ${device}, and it is ${colorScheme}`);
        const name = `${device}-${colorScheme}`;
        await page.screenshot({ path: join(artifacts, `chat-${name}.png`) });
        seen[name] = await essentials(page);
        if (device === "phone") seen[name].panels = await panels(page, name);
        await page.context().close();
      }
    }
    return seen;
  },
};

/** Whether what matters is on the screen and can be read. */
function essentials(page) {
  return page.evaluate(() => {
    const visible = (selector) => {
      const box = document.querySelector(selector).getBoundingClientRect();
      return box.width > 0 && box.right <= innerWidth + 1 && box.left >= -1 && box.bottom <= innerHeight + 1 && box.top >= -1;
    };
    /** WCAG 2.2 contrast of an element's text on the nearest opaque background. */
    const contrast = (selector) => {
      const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
      const channels = (color) => { canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1); return canvas.getImageData(0, 0, 1, 1).data; };
      const luminance = (color) => {
        const [r, g, b] = [...channels(color)].slice(0, 3).map((value) => value / 255).map((value) => (value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4));
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
      };
      let element = document.querySelector(selector);
      const text = luminance(getComputedStyle(element).color);
      while (channels(getComputedStyle(element).backgroundColor)[3] < 255) element = element.parentElement;
      const ground = luminance(getComputedStyle(element).backgroundColor);
      return (Math.max(text, ground) + 0.05) / (Math.min(text, ground) + 0.05);
    };
    const shown = ["#room-name", "#text", ".send", "#scroll", "#messages li:last-child .bubble"];
    const read = ["#room-name", "#messages .theirs .bubble", "#messages .mine .bubble", ".author time", ".theirs .avatar", ".send", "#connection"];
    return {
      hidden: shown.filter((selector) => !visible(selector)),
      faint: read.map((selector) => [selector, contrast(selector)]).filter(([, ratio]) => ratio < 4.5),
      overflow: document.documentElement.scrollWidth - innerWidth,
      dark: matchMedia("(prefers-color-scheme: dark)").matches,
      unlabelled: [...document.querySelectorAll("button:not([hidden]), input, textarea, a")].filter((element) =>
        !(element.ariaLabel || element.textContent.trim() || element.labels?.length)).map((element) => element.outerHTML),
    };
  });
}

/** The panels of a narrow screen slide in, and Escape closes them. */
async function panels(page, name) {
  const seen = [];
  for (const [button, panel] of [["#show-rooms", "#rooms-panel"], ["#show-people", "#people-panel"]]) {
    await page.locator(button).click();
    await page.waitForFunction((id) => { const box = document.querySelector(id).getBoundingClientRect(); return box.left >= 0 && box.right <= innerWidth; }, panel);
    await page.screenshot({ path: join(artifacts, `chat-${name}-${panel.slice(1)}.png`) });
    seen.push(await page.locator(button).getAttribute("aria-expanded"));
    await page.keyboard.press("Escape");
    await page.locator(panel).waitFor({ state: "hidden" });
  }
  return seen;
}

check(scenarios[scenario], `no scenario ${scenario}`);
try {
  const result = await scenarios[scenario]();
  result.trouble = trouble;
  await browser.close();
  rmSync(profile, { recursive: true, force: true });
  finish(result);
} catch (error) {
  console.error(error, trouble);
  await browser.close();
  process.exit(1);
}
