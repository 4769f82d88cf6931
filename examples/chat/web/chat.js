// The chat: one connection by the official Centrifuge SDK, a subscription for each room that was opened.
//
// Nothing is lost on the way: while connected, the SDK receives publications in order; after a break it asks the server
// for those it missed; what can't be recovered is read again from history. What is written goes through the outbox.

import { newId, Outbox } from "./outbox.js";
import { Room } from "./room.js";
import { loadCentrifuge } from "./sdk.js";
import * as view from "./view.js";

const PAGE = 50; // messages read from history at a time
const PATIENCE = 500; // milliseconds without a connection before the reader is told
const SEND_AGAIN = 2_000; // milliseconds, after a failure that may pass while connected
const ROOMS_AGAIN = 20_000; // milliseconds between two looks at the list of rooms
const FIRST_ROOM = "lobby";

const rooms = new Map(); // name -> {room, subscription}
let listed = []; // the server's rooms: [{name, people}]
let current; // the room on the screen
let client;
let me = { user: "", nick: "" };
let patience;

const outbox = new Outbox(sessionStorage, (name) => { if (name === current?.name) showUnsent(); });

await start();

async function start() {
  const Centrifuge = await loadCentrifuge();
  me.nick = sessionStorage.getItem("nick") ?? await askForName(localStorage.getItem("nick") ?? suggestName());
  client = new Centrifuge(`${location.origin.replace("http", "ws")}/connection/websocket`, {
    data: credentials(),
    minReconnectDelay: 200,
    maxReconnectDelay: 5_000,
  });
  client.on("connecting", connecting);
  client.on("connected", connected);
  client.on("disconnected", (context) => {
    view.showConnection("disconnected", { reason: context.reason });
    view.showBanner("The server ended this connection. Reload the page to connect again.");
  });
  view.listen({ open, send, older, rename });
  for (const name of JSON.parse(sessionStorage.getItem("rooms") ?? "[]")) enter(name);
  open(location.hash.slice(1) || FIRST_ROOM);
  setInterval(() => { if (client.state === "connected" && !document.hidden) listRooms(); }, ROOMS_AGAIN);
  client.connect();
}

// Who I am. The key stays in this tab: the server makes the public name from it, so nobody else can take it over.

function credentials() {
  const key = sessionStorage.getItem("key") ?? newId();
  sessionStorage.setItem("key", key);
  return { key, nick: me.nick };
}

async function askForName(suggestion, options) {
  const nick = await view.askName(suggestion, options);
  if (nick) {
    sessionStorage.setItem("nick", nick);
    localStorage.setItem("nick", nick);
  }
  return nick;
}

function suggestName() {
  const pick = (words) => words[Math.floor(Math.random() * words.length)];
  return `${pick(["Calm", "Bright", "Swift", "Gentle", "Merry", "Quiet"])} ${pick(["Otter", "Heron", "Fox", "Wren", "Hare", "Lynx"])}`;
}

async function rename() {
  const nick = await askForName(me.nick, { optional: true });
  if (!nick || nick === me.nick) return;
  me.nick = nick;
  client.setData(credentials());
  client.disconnect();
  client.connect();
}

// The connection.

function connecting() {
  view.showConnection("connecting");
  clearTimeout(patience);
  patience = setTimeout(() => {
    view.showBanner("Reconnecting… What you write is kept, and sent as soon as the connection is back.");
  }, PATIENCE);
}

function connected(context) {
  clearTimeout(patience);
  me = { user: context.data.user, nick: context.data.nick };
  view.showMe(me.user, me.nick);
  view.showConnection("connected", { worker: context.data.worker });
  view.showBanner("");
  listRooms();
}

async function listRooms() {
  try {
    listed = (await client.rpc("rooms", {})).data;
  } catch {
    return; // the list that we have will do
  }
  showRooms();
}

// Rooms.

/** Subscribe to a room, once; it then stays open in this tab. */
function enter(name) {
  if (rooms.has(name)) return rooms.get(name).room;
  const room = new Room(name);
  const subscription = client.newSubscription(room.channel);
  rooms.set(name, { room, subscription });
  sessionStorage.setItem("rooms", JSON.stringify([...rooms.keys()]));
  subscription.on("publication", (publication) => received(room, publication));
  subscription.on("subscribed", (context) => subscribed(room, subscription, context));
  subscription.on("unsubscribed", (context) => view.showBanner(`#${name} is not open to you: ${context.reason}`));
  subscription.on("join", ({ info }) => { room.join(info); showPeople(room); });
  subscription.on("leave", ({ info }) => { room.leave(info); showPeople(room); });
  subscription.subscribe();
  return room;
}

function open(name) {
  const room = enter(name || FIRST_ROOM);
  room.unread = 0;
  current = room;
  if (location.hash !== `#${room.name}`) history.replaceState(null, "", `#${room.name}`);
  showRooms();
  showUnsent();
  view.showMessages(room);
  showPeople(room);
  view.focusComposer();
}

/**
 * The subscription stands, for the first time or again. What was missed comes as publications, in this same turn and
 * after this call, if the server could recover it; else it is read from history.
 */
async function subscribed(room, subscription, context) {
  const before = room.heard;
  await null; // let the recovered publications come in
  try {
    if (context.recovered) {
      const missed = room.heard - before;
      if (missed) view.showBanner(`Back again, with ${missed} ${missed === 1 ? "message" : "messages"} that you missed.`, { passing: true });
    } else {
      await readLatest(room, subscription);
      if (context.wasRecovering) view.showBanner("You were away for long: older messages that you missed may be gone.", { passing: true });
    }
    outbox.settle(room.name);
    flush(room, subscription);
    room.setPresence((await subscription.presence()).clients);
    showPeople(room);
  } catch {
    // The connection broke off again: the next "subscribed" starts over.
  }
}

async function readLatest(room, subscription) {
  const { publications, epoch } = await subscription.history({ limit: PAGE, reverse: true });
  room.reset(epoch);
  for (const publication of publications) take(room, publication);
  room.atStart = publications.length < PAGE;
  if (room === current) view.showMessages(room);
}

let reading = false;

async function older() {
  const room = current;
  const { subscription } = rooms.get(room.name);
  if (reading || room.atStart || !room.messages.length || subscription.state !== "subscribed") return;
  reading = true;
  try {
    const since = { offset: room.oldest, epoch: room.epoch };
    const { publications } = await subscription.history({ limit: PAGE, reverse: true, since });
    for (const publication of publications) take(room, publication);
    room.atStart = publications.length < PAGE;
    if (room === current) view.showMessages(room, { stay: true });
  } catch {
    // Still connected, the button is there for another try; if not, "subscribed" follows.
  } finally {
    reading = false;
  }
}

// Messages.

function take(room, publication) {
  const message = room.take(publication);
  if (message?.user === me.user) outbox.confirm(message.id);
  return message;
}

function received(room, publication) {
  const message = take(room, publication);
  if (!message) return;
  room.heard++;
  const newest = room.messages.at(-1) === message;
  if (room === current) {
    if (newest && !room.trim()) view.addMessage(room);
    else view.showMessages(room, { stay: true });
  }
  if (message.user !== me.user && (room !== current || document.hidden)) {
    room.unread++;
    showRooms();
  }
}

document.addEventListener("visibilitychange", () => {
  if (document.hidden || !current?.unread) return;
  current.unread = 0;
  showRooms();
});

function send(text) {
  outbox.add(current.name, text);
  flush(current, rooms.get(current.name).subscription);
}

async function flush(room, subscription) {
  if (subscription.state !== "subscribed") return; // "subscribed" flushes
  const done = await outbox.flush(room.name, (message) => subscription.publish(message));
  if (!done) setTimeout(flush, SEND_AGAIN, room, subscription);
}

// What the screen shows of all this.

function showRooms() {
  const people = new Map(listed.map((entry) => [entry.name, entry.people]));
  const names = new Set([...people.keys(), ...rooms.keys()]);
  view.showRooms([...names].map((name) => ({ name, people: people.get(name) ?? null, unread: rooms.get(name)?.room.unread ?? 0 })), current.name);
}

function showPeople(room) {
  if (room === current) view.showPeople(room.people);
}

function showUnsent() {
  view.showUnsent(current, outbox.of(current.name), {
    retry: (id) => { outbox.retry(id); flush(current, rooms.get(current.name).subscription); },
    discard: (id) => outbox.discard(id),
  });
}
