// The chat: one connection with the official Centrifuge SDK, and one subscription for each open room.
//
// No message is lost. While connected, the SDK receives publications in order. After a broken connection it asks the server
// for the missed publications; if recovery fails, the page reads the history again. New messages go through the outbox.

import { newId, Outbox } from "./outbox.js";
import { Room } from "./room.js";
import { loadCentrifuge } from "./sdk.js";
import * as view from "./view.js";

const PAGE = 50; // messages read from history at a time
const PATIENCE = 500; // milliseconds without a connection before the page shows a banner
const SEND_AGAIN = 2_000; // milliseconds between a temporary failure and the next attempt, while connected
const ROOMS_AGAIN = 20_000; // milliseconds between two requests for the list of rooms
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

// Identity. The key stays in this tab. The server derives the public id from it, so other people can't use the id.

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
    view.showBanner("Reconnecting… Your messages are kept and will be sent as soon as the connection is back.");
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
    return; // keep the current list
  }
  showRooms();
}

// Rooms.

/** Subscribe to a room, once. The room then stays open in this tab. */
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
 * Handle the start of a subscription, the first or a repeated one. If the server recovered missed publications, they
 * arrive in the same turn of the event loop, after this call. Otherwise read the history.
 */
async function subscribed(room, subscription, context) {
  const before = room.heard;
  await null; // let the recovered publications come in
  try {
    if (context.recovered) {
      const missed = room.heard - before;
      if (missed) view.showBanner(`Connected again. You missed ${missed} ${missed === 1 ? "message" : "messages"}; here ${missed === 1 ? "it is" : "they are"}.`, { passing: true });
    } else {
      await readLatest(room, subscription);
      if (context.wasRecovering) view.showBanner("You were away for a long time. Some older messages may be missing.", { passing: true });
    }
    outbox.settle(room.name);
    flush(room, subscription);
    room.setPresence((await subscription.presence()).clients);
    showPeople(room);
  } catch {
    // The connection broke again. The next "subscribed" event starts over.
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
    // While connected, the reader can press the button again; otherwise a "subscribed" event follows.
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
  if (subscription.state !== "subscribed") return; // the "subscribed" event flushes
  const done = await outbox.flush(room.name, (message) => subscription.publish(message));
  if (!done) setTimeout(flush, SEND_AGAIN, room, subscription);
}

// Updates of the screen.

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
