// The operators' page: shows the server's snapshots, one a second by server-sent events, as figures, charts and incidents.
//
// Names in snapshots come from applications and their clients: they are put into the page as text, never as HTML.

const SPAN = 300; // seconds that the charts show
const STALE = 4_000; // milliseconds without a snapshot after which the page says that its figures are old
const DEAD = 20_000; // milliseconds without a snapshot after which the page opens a new connection
const RETRY = { first: 500, longest: 5_000 }; // milliseconds between two attempts after a refusal
const WIDTH = 300, HEIGHT = 60; // of a chart's own coordinates

const $ = (selector, from = document) => from.querySelector(selector);
const copy = (template) => $(`#${template}`).content.firstElementChild.cloneNode(true);

/** An element with text in it. */
function make(name, text = "", properties = {}) {
  const element = Object.assign(document.createElement(name), properties);
  element.textContent = text;
  return element;
}

/** Change an element's text only when it differs, so that a selection in the page survives. */
function write(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

// How figures are written

const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const short = new Intl.NumberFormat("en", { maximumSignificantDigits: 3, notation: "compact" });
const NONE = "–";

function seconds(value) {
  if (value === null || value === undefined) return NONE;
  if (value < 0.0995) return `${(value * 1000).toFixed(value < 0.00995 ? 1 : 0)} ms`;
  if (value < 0.9995) return `${Math.round(value * 1000)} ms`;
  return value < 99.5 ? `${value.toFixed(value < 9.95 ? 2 : 1)} s` : age(value);
}

function age(value) {
  const [days, hours, minutes] = [value / 86_400, (value / 3600) % 24, (value / 60) % 60].map(Math.floor);
  if (days) return `${days} d ${hours} h`;
  if (hours) return `${hours} h ${minutes} min`;
  return minutes ? `${minutes} min` : `${Math.floor(value)} s`;
}

function bytes(value) {
  if (value === null || value === undefined) return NONE;
  const units = ["B", "KB", "MB", "GB", "TB"];
  let unit = 0;
  for (; value >= 999.5 && unit < 4; unit++) value /= 1000;
  return `${unit && value < 99.5 ? value.toFixed(1) : Math.round(value)} ${units[unit]}`;
}

const count = (value) => (value === null || value === undefined ? NONE : whole.format(value));
const share = (value) => `${(value * 100).toFixed(value < 0.0995 ? 1 : 0)} %`;
const percent = (value) => (value === null || value === undefined ? NONE : `${Math.round(value * 100)} %`);
const rate = (value) => (value === null || value === undefined ? NONE : value > 0 && value < 9.95 ? `${value.toFixed(1)}/s` : `${short.format(value)}/s`);
const clock = (at) => new Date(at * 1000).toLocaleTimeString("en-GB");

// The charts. `place` gives the height of a value as a share of the chart, 0 to 1.

const CHARTS = [
  {
    kind: "lag", name: "Lag", show: seconds, marks: [0.01, 0.1, 1],
    place: (value) => Math.log10(Math.max(value ?? 0, 0.001) / 0.001) / 4,
  },
  { kind: "utilization", name: "Utilization", show: percent, marks: [0.5, 1], place: (value) => value ?? 0 },
  { kind: "connections", name: "Connections", show: count, marks: [], place: (value) => (value ?? 0) / ceiling },
];

let past = []; // [Unix time, [[lag, utilization, connections] of each worker]]
let ceiling = 10; // largest value of all charts of connections
let snapshot = null;
let cursor = null; // Unix time under the pointer
const workers = new Map(); // slot -> its elements
const incidents = new Map(); // key -> its element
let heard = performance.now(); // when the latest snapshot came, or the latest connection was opened

/** The next of 1, 2, 5, 10, 20 … at or above a value. */
function round(value) {
  const power = 10 ** Math.floor(Math.log10(Math.max(value, 1)));
  return [1, 2, 5, 10].map((step) => step * power).find((step) => step >= value);
}

class Chart {
  constructor(description, worker, position) {
    Object.assign(this, { description, worker, position });
    this.figure = copy("chart");
    this.figure.classList.add(description.kind);
    write($(".name", this.figure), description.name);
    [this.grid, this.area, this.line, this.cursor] = ["grid", "area", "line", "cursor"].map((name) => $(`.${name}`, this.figure));
    this.output = $("output", this.figure);
    this.marked = "";
  }

  height(value) {
    return HEIGHT * (1 - Math.min(Math.max(this.description.place(value), 0), 1));
  }

  draw(now) {
    this.mark();
    const runs = [];
    let last = -Infinity;
    for (const [at, points] of past) {
      const value = points[this.worker]?.[this.position];
      if (value === undefined) continue;
      if (at - last > 5) runs.push([]); // a hole: the page was disconnected
      last = at;
      runs.at(-1).push([Math.max(WIDTH * (1 - (now - at) / SPAN), 0), this.height(value)]);
    }
    const points = (run) => run.map(([x, y]) => `${x.toFixed(1)} ${y.toFixed(1)}`).join("L");
    this.line.setAttribute("d", runs.map((run) => `M${points(run)}${run.length === 1 ? "h1" : ""}`).join(""));
    this.area.setAttribute("d", runs.map((run) => `M${run[0][0].toFixed(1)} ${HEIGHT}L${points(run)}V${HEIGHT}Z`).join(""));
  }

  /** The value at the pointer's moment, or now. */
  read(now, index) {
    const point = past.at(index)?.[1][this.worker];
    write(this.output, this.description.show(point?.[this.position]));
    const x = (WIDTH * (1 - (now - (past.at(index)?.[0] ?? now)) / SPAN)).toFixed(1);
    this.cursor.setAttribute("d", cursor === null ? "" : `M${x} 0V${HEIGHT}`);
  }

  /** Lines at round values, named. */
  mark() {
    const marks = this.description.kind === "connections" ? [ceiling] : this.description.marks;
    if (this.marked === String(marks)) return;
    this.marked = String(marks);
    this.grid.setAttribute("d", marks.map((value) => `M0 ${this.height(value).toFixed(1)}H${WIDTH}`).join(""));
    $(".scale", this.figure).replaceChildren(...marks.map((value) => {
      const label = make("span", this.description.show(value).replace(".00", "").replace(".0", ""));
      label.style.top = `${(100 * this.height(value)) / HEIGHT}%`;
      return label;
    }));
  }
}

// The parts of the page

const TONES = { healthy: "fine", lagging: "warn", draining: "warn", pressed: "bad", absent: "bad" };

/** A worker's condition in a word, or the state of its slot while it has no condition. */
function conditionOf(worker) {
  return worker.condition && worker.condition !== "absent" ? worker.condition : worker.state;
}

const toneOf = (worker) => TONES[worker.condition] ?? "warn";

/** Show names and values as a list of definitions; a third item is the tone. */
function showFigures(list, figures) {
  while (list.children.length < figures.length) {
    const pair = make("div");
    pair.append(make("dt"), make("dd"));
    list.append(pair);
  }
  figures.forEach(([name, value, tone = ""], index) => {
    const [term, figure] = list.children[index].children;
    write(term, name);
    write(figure, value);
    figure.dataset.tone = tone;
  });
}

/** Bring the children of an element to a number, adding what `create` creates. */
function fill(element, length, create) {
  while (element.children.length < length) element.append(create());
  while (element.children.length > length) element.lastElementChild.remove();
}

const NAMED = 4; // accounts of loop time that are named under a worker's bar

/** Show how a worker's loop spent its time: as a bar, and the largest shares in words. */
function showLoop(card, accounts) {
  const box = $(".loop", card);
  box.hidden = !accounts?.length;
  if (box.hidden) return;
  const stack = $(".stack", box);
  fill(stack, accounts.length, () => make("i"));
  accounts.forEach((account, index) => {
    const part = stack.children[index];
    part.style.width = `${100 * account.share}%`;
    part.dataset.kind = account.kind;
    part.title = `${account.account} ${share(account.share)}`;
  });
  write($("p", box), accounts.slice(0, NAMED).map((account) => `${account.account} ${share(account.share)}`).join(" · "));
}

const processOf = ({ pid, state, since, replacement }) =>
  (pid ? `pid ${pid} · ${state} for ${age(since)}` : `no process for ${age(since)}`) +
  (replacement ? ` · ${replacement.role} ${replacement.state}, ${count(replacement.connections)} connections` : "");

function addWorker(slot) {
  const card = copy("worker");
  const charts = CHARTS.map((description, position) => new Chart(description, slot, position));
  $(".charts", card).append(...charts.map((chart) => chart.figure));
  $("#workers").append(card);
  const entry = { card, charts };
  workers.set(slot, entry);
  return entry;
}

function showWorker(worker) {
  const { card } = workers.get(worker.slot) ?? addWorker(worker.slot);
  const tone = toneOf(worker);
  card.dataset.tone = tone;
  card.dataset.slot = worker.slot;
  write($("h3", card), String(worker.slot));
  const condition = $(".condition", card);
  write(condition, conditionOf(worker));
  condition.dataset.tone = tone;
  write($(".process", card), processOf(worker));
  write($(".running", card), worker.handler ? handlerOf(worker) : "");
  showLoop(card, worker.loop);
  const { rates } = worker;
  const queue = worker.accept_queue;
  showFigures($(".figures", card), [
    ["in", rate(rates?.received)],
    ["out", rate(rates?.sent)],
    ["connects", rate(rates?.connects)],
    ["queued", bytes(worker.queued_bytes)],
    ["threads", `${count(worker.threads_busy)}${worker.threads_waiting ? ` + ${count(worker.threads_waiting)} waiting` : ""}`, worker.threads_waiting ? "warn" : ""],
    ["memory", bytes(worker.rss)],
    ["weight", count(worker.weight), worker.weight === 0 ? "warn" : ""],
    ["accept queue", `${count(queue)} of ${count(worker.accept_queue_limit)}`, queue > worker.accept_queue_limit / 2 ? "bad" : queue > 16 ? "warn" : ""],
    ["restarts", count(worker.restarts) + (worker.crash_loop ? ", crash loop" : ""), worker.crash_loop ? "bad" : ""],
  ]);
}

function showHead() {
  const all = snapshot.workers;
  const sum = (read) => all.reduce((total, worker) => total + (read(worker) ?? 0), 0);
  const ready = all.filter((worker) => worker.state === "ready").length;
  const [worst, ...further] = snapshot.problems;
  const status = $("#status");
  write(status, worst?.text ?? "all processes are healthy");
  status.dataset.tone = worst?.tone ?? "fine";
  document.title = worst ? `⚠ ${worst.text} · realtime` : "realtime";
  const list = $("#problems");
  list.hidden = further.length === 0;
  fill(list, further.length, () => make("li"));
  further.forEach((problem, index) => {
    write(list.children[index], problem.text);
    list.children[index].dataset.tone = problem.tone;
  });
  const errors = snapshot.handler_errors;
  showFigures($("#totals"), [
    ["workers ready", `${ready} of ${all.length}`],
    ["connections", count(sum((worker) => worker.connections))],
    ["messages in", rate(sum((worker) => worker.rates?.received))],
    ["messages out", rate(sum((worker) => worker.rates?.sent))],
    ["connects", rate(sum((worker) => worker.rates?.connects))],
    ["worst lag", seconds(Math.max(0, ...all.map((worker) => worker.peak_lag ?? 0)))],
    ["errors of handlers", count(errors.count), errors.last_minute ? "warn" : ""],
  ]);
}

function showBroker() {
  const { broker } = snapshot;
  const card = $("#broker");
  const tone = toneOf(broker);
  card.dataset.tone = tone;
  const condition = $(".condition", card);
  write(condition, conditionOf(broker));
  condition.dataset.tone = tone;
  write($(".process", card), processOf(broker));
  showFigures($(".figures", card), [
    ["lag", seconds(broker.peak_lag)],
    ["utilization", percent(broker.utilization)],
    ["memory", bytes(broker.rss)],
    ["restarts", count(broker.restarts) + (broker.crash_loop ? ", crash loop" : ""), broker.crash_loop ? "bad" : ""],
  ]);
}

function showLoops() {
  const { loop } = snapshot;
  $("#no-loop").hidden = loop.length > 0;
  $("#loop").hidden = loop.length === 0;
  const body = $("#loop tbody");
  fill(body, loop.length, () => {
    const row = make("tr");
    const bar = make("td", "", { className: "bar" });
    bar.append(make("i"));
    row.append(make("td"), make("td", "", { className: "number" }), make("td", "", { className: "number" }), bar);
    return row;
  });
  loop.forEach((account, index) => {
    const [name, all, most, bar] = body.children[index].children;
    write(name, account.account);
    write(all, share(account.share));
    write(most, snapshot.workers.length > 1 ? `${share(account.most)} of worker ${account.slot}` : share(account.most));
    bar.firstElementChild.style.width = `${100 * account.share}%`;
    bar.firstElementChild.dataset.kind = account.kind;
  });
}

function showPlaces() {
  const { places } = snapshot;
  $("#no-places").hidden = places.length > 0;
  $("#places").hidden = places.length === 0;
  const body = $("#places tbody");
  const known = JSON.stringify(places);
  if (body.dataset.known === known) return;
  body.dataset.known = known;
  body.replaceChildren(...places.map((place) => {
    const row = make("tr");
    const share = make("td", "", { className: "bar" });
    const bar = make("i");
    bar.style.width = `${(100 * place.seconds) / (places[0].seconds || 1)}%`;
    share.append(bar);
    row.append(
      make("td", place.place), make("td", place.handler || NONE), make("td", count(place.count), { className: "number" }),
      make("td", seconds(place.seconds), { className: "number" }),
      make("td", place.relieved ? seconds(place.relieved) : NONE, { className: "number" }), share,
    );
    return row;
  }));
}

/** A handler, and the channel or method of its call unless the handler's name includes it. */
function handlerOf({ handler, subject }) {
  return handler && subject && !handler.endsWith(subject) ? `${handler} · ${subject}` : handler ?? "";
}

const keyOf = (incident) => `${incident.slot} ${incident.pid} ${incident.at}`;

function showIncidents() {
  const list = $("#incidents");
  list.hidden = snapshot.incidents.length === 0;
  $("#no-incidents").hidden = !list.hidden;
  const present = new Set(snapshot.incidents.map(keyOf));
  for (const [key, element] of incidents) {
    if (!present.has(key) && !element.open) {
      element.remove();
      incidents.delete(key);
    }
  }
  // Oldest first: each new one goes to the top.
  for (const incident of [...snapshot.incidents].reverse()) showIncident(list, incident);
}

function showIncident(list, incident) {
  const key = keyOf(incident);
  let element = incidents.get(key);
  if (!element) {
    element = copy("incident");
    element.addEventListener("toggle", () => { if (element.open) showStack(element, incident); });
    incidents.set(key, element);
    list.prepend(element);
  }
  write($("time", element), clock(incident.at));
  write($(".slot", element), `worker ${incident.slot}`);
  const duration = $(".duration", element);
  write(duration, seconds(incident.duration));
  duration.dataset.tone = incident.lasts ? "bad" : incident.duration >= 1 ? "warn" : "";
  const relief = incident.relieved ? `relief served the worker's clients for ${seconds(incident.relieved)}` : "";
  duration.title = [incident.lasts ? "still blocked" : "", relief].filter(Boolean).join("; ");
  write($(".place", element), incident.function ? `${incident.place} in ${incident.function}` : incident.place);
  write($(".handler", element), handlerOf(incident));
}

/** Fetch an incident's stack, which snapshots leave out, and show it. */
async function showStack(element, incident) {
  const more = $(".more", element);
  more.replaceChildren(make("p", "…"));
  try {
    const answer = await fetch(`incidents?at=${incident.at}`, { cache: "no-store" });
    const found = (await answer.json()).incidents.find((candidate) => keyOf(candidate) === keyOf(incident));
    if (!found) throw new Error("the server no longer keeps this incident");
    const summary = `worker ${found.slot}, pid ${found.pid}, ${found.samples} ${found.samples === 1 ? "sample" : "samples"}${found.thread ? ", blocked by another thread" : ""}`;
    more.replaceChildren(make("p", found.ending === "turned" ? summary : `${summary}; ${found.ending}`));
    more.append(make("pre", found.stack.length ? found.stack.join("\n") : "the block ended before a stack was taken"));
    if (found.stacks) more.append(make("pre", found.stacks));
  } catch (error) {
    more.replaceChildren(make("p", `could not load the stack: ${error.message}`));
  }
}

// Drawing

/** The index in `past` of the snapshot nearest to a moment; -1, the last one, when `moment` is null. */
function indexAt(moment) {
  if (moment === null) return -1;
  let best = -1, distance = Infinity;
  past.forEach(([at], index) => {
    if (Math.abs(at - moment) < distance) [best, distance] = [index, Math.abs(at - moment)];
  });
  return best;
}

function draw() {
  const now = past.at(-1)?.[0] ?? 0;
  ceiling = round(past.reduce((most, [, points]) => Math.max(most, ...points.map((point) => point[2])), 10));
  for (const { charts } of workers.values()) for (const chart of charts) chart.draw(now);
  read();
}

function read() {
  const now = past.at(-1)?.[0] ?? 0;
  const index = indexAt(cursor);
  for (const { charts } of workers.values()) for (const chart of charts) chart.read(now, index);
}

$("#workers").addEventListener("pointermove", (event) => {
  const plot = event.target.closest(".plot");
  const box = plot?.getBoundingClientRect();
  cursor = plot ? (past.at(-1)?.[0] ?? 0) - SPAN * (1 - (event.clientX - box.left) / box.width) : null;
  read();
});
$("#workers").addEventListener("pointerleave", () => { cursor = null; read(); });

// The feed

function take(message) {
  snapshot = message.snapshot;
  if (!snapshot) return;
  if (message.past) past = message.past;
  if (past.at(-1)?.[0] !== snapshot.at) {
    past.push([snapshot.at, snapshot.workers.map((worker) => [worker.peak_lag, worker.utilization ?? 0, worker.connections ?? 0])]);
  }
  while (past.length && past[0][0] < snapshot.at - SPAN) past.shift();
  heard = performance.now();
  document.body.dataset.state = "live";
  showHead();
  if (snapshot.broker) showBroker();
  snapshot.workers.forEach(showWorker);
  showLoops();
  showPlaces();
  showIncidents();
  if (!document.hidden) draw();
}

/** Say that the figures are old. `reason`: why there are no new ones. */
function markStale(reason = "no answer") {
  document.body.dataset.state = "lost";
  const status = $("#status");
  write(status, snapshot ? `${reason} since ${clock(snapshot.at)}` : reason);
  status.dataset.tone = "bad";
  document.title = `⚠ ${reason} · realtime`;
}

let source = null; // the open EventSource; null between two attempts

/** Open the feed. `delay`: milliseconds until the next attempt, should this one be refused. */
function connect(delay = RETRY.first) {
  source = new EventSource("live");
  heard = performance.now();
  source.addEventListener("message", ({ data }) => { delay = RETRY.first; take(JSON.parse(data)); });
  source.addEventListener("error", async () => {
    markStale();
    // The browser reconnects by itself when a connection is lost, but gives up when the server refuses one.
    if (source?.readyState !== EventSource.CLOSED) return;
    source = null;
    setTimeout(connect, delay, Math.min(delay * 2, RETRY.longest));
    if (await isRefused() && source === null) markStale("too many live pages are open: close one; no figures");
  });
}

/** Whether the server lets no more pages watch; an EventSource does not say why it failed. */
async function isRefused() {
  try {
    return (await fetch("live", { method: "HEAD", cache: "no-store" })).status === 503;
  } catch {
    return false;
  }
}

setInterval(() => {
  const silence = performance.now() - heard;
  if (document.body.dataset.state === "live" && silence > STALE) markStale();
  if (source && silence > DEAD) {
    source.close();
    connect();
  }
}, 1_000);
document.addEventListener("visibilitychange", () => { if (!document.hidden) draw(); });
connect();
