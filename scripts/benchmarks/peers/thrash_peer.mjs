// The route of the thrash benchmark on Node's http module: it waits 10 ms and then blocks for 20 ms, in five variants.
// shedding: 503 while the loop lags by more than 200 ms. load-aware: a cached answer, renewed after a second by one
// computation, and kept as long as the loop lags. threaded: in four worker threads.
import http from "node:http";
import { setTimeout as wait } from "node:timers/promises";
import { isMainThread, parentPort, Worker } from "node:worker_threads";

const WAIT = 10, BLOCK = 20, MAX_LAG = 200, TTL = 1000, STALE = 30_000, THREADS = 4;
const body = JSON.stringify({ weather: "rain", degrees: 12 });
const cell = new Int32Array(new SharedArrayBuffer(4));
const block = (milliseconds) => Atomics.wait(cell, 0, 0, milliseconds);

function inThisThread() {
  block(WAIT);
  block(BLOCK);
  return body;
}

async function onTheLoop() {
  await wait(WAIT);
  block(BLOCK);
  return body;
}

function serve() {
  const threads = Array.from({ length: THREADS }, () => new Worker(new URL(import.meta.url)));
  const idle = [...threads], queue = [];
  const next = () => {
    while (idle.length && queue.length) {
      const thread = idle.pop(), resolve = queue.shift();
      thread.once("message", (answer) => { idle.push(thread); resolve(answer); next(); });
      thread.postMessage(0);
    }
  };
  const inAThread = () => new Promise((resolve) => { queue.push(resolve); next(); });

  let turned = performance.now();
  setInterval(() => { turned = performance.now(); }, 20);
  const lag = () => performance.now() - turned - 20;

  const cached = (compute) => {
    let value = null, made = 0, making = null;
    return async () => {
      const age = performance.now() - made;
      const stale = TTL + (STALE - TTL) * Math.min(Math.max(lag() / MAX_LAG, 0), 1);
      if (value !== null && age <= TTL) return value;
      making ??= compute().then((answer) => { value = answer; made = performance.now(); making = null; return answer; });
      return value !== null && age <= TTL + stale ? value : making;
    };
  };

  const routes = {
    "/bare": onTheLoop,
    "/shedding": () => (lag() > MAX_LAG ? null : onTheLoop()),
    "/load-aware": cached(onTheLoop),
    "/threaded": inAThread,
    "/threaded-load-aware": cached(inAThread),
  };
  const server = http.createServer(async (request, response) => {
    const answer = await routes[request.url]();
    response.writeHead(answer === null ? 503 : 200, { "Content-Type": "application/json" });
    response.end(answer ?? "busy");
  });
  server.listen(0, "127.0.0.1", () => console.log("port", server.address().port));
}

if (isMainThread) serve();
else parentPort.on("message", () => parentPort.postMessage(inThisThread()));
