// The parts of the chat page that know no DOM: rooms and the outbox. Prints what a test would want to know.

import { Outbox } from "../../../examples/chat/web/outbox.js";
import { Room } from "../../../examples/chat/web/room.js";
import { finish } from "./peer.mjs";

const author = (user) => ({ user, client: `${user}-1`, connInfo: { nick: user.toUpperCase() } });
const publication = (offset, user, id, text = id) => ({ offset, info: author(user), data: { id, text, time: offset } });

function storage() {
  const kept = new Map();
  return { getItem: (key) => kept.get(key) ?? null, setItem: (key, value) => kept.set(key, value) };
}

function order() {
  const room = new Room("lobby");
  for (const offset of [5, 3, 4, 9, 1]) room.take(publication(offset, "ada", `m${offset}`));
  const again = room.take(publication(4, "ada", "m4"));
  const resent = room.take(publication(10, "ada", "m9")); // published twice: the first answer was lost
  const other = room.take(publication(11, "bob", "m9")); // another author's id is another message
  return { offsets: room.messages.map(({ offset }) => offset), again, resent, other: other?.offset, oldest: room.oldest };
}

function bounds() {
  const room = new Room("lobby");
  room.atStart = true;
  let trims = 0;
  for (let offset = 1; offset <= 2500; offset++) {
    room.take(publication(offset, "ada", `m${offset}`));
    trims += room.trim();
  }
  const back = room.take(publication(1, "ada", "m1"));
  return { kept: room.messages.length <= 1001, trims: trims > 0, atStart: room.atStart, back: back?.offset };
}

function strangers() {
  const room = new Room("lobby");
  const odd = [null, 7, "words", [1], { text: 5 }, { text: "ok", time: "noon", id: {} }, {}];
  odd.forEach((data, index) => room.take({ offset: index + 1, data }));
  return room.messages.map(({ text, time, user }) => [text, time, user]);
}

function people() {
  const room = new Room("lobby");
  room.setPresence({ a1: { ...author("ada"), client: "a1" }, a2: { ...author("ada"), client: "a2" } });
  room.join({ ...author("bob"), client: "b1" });
  room.leave({ client: "a1" });
  const both = room.people.map(({ nick }) => nick);
  room.leave({ client: "a2" });
  return { both, left: room.people.map(({ nick }) => nick) };
}

async function outbox() {
  const disk = storage();
  const box = new Outbox(disk, () => {});
  for (const text of ["one", "two", "three"]) box.add("lobby", text);
  box.add("garden", "elsewhere");
  const sent = [];
  const broken = await box.flush("lobby", async ({ text }) => { sent.push(text); throw { code: 11, message: "connection closed" }; });
  const afterBreak = box.of("lobby").map(({ state }) => state);
  const fine = await box.flush("lobby", async ({ text }) => {
    sent.push(text);
    if (text === "two") throw { code: 400, message: "no" };
  });
  const states = box.of("lobby").map(({ text, state }) => [text, state]);
  const reloaded = new Outbox(disk, () => {}).items.map(({ text }) => text);
  box.settle("lobby");
  const settled = box.of("lobby").map(({ text }) => text);
  box.retry(box.of("lobby")[0].id);
  await box.flush("lobby", async ({ id }) => box.confirm(id)); // its publication arrives before the answer
  return { broken, afterBreak, fine, states, sent, reloaded, settled, left: box.items.map(({ text }) => text) };
}

async function concurrency() {
  const box = new Outbox(storage(), () => {});
  box.add("lobby", "one");
  let release;
  let calls = 0;
  const publish = () => { calls++; return new Promise((resolve) => { release = resolve; }); };
  const first = box.flush("lobby", publish);
  const second = await box.flush("lobby", publish);
  box.add("lobby", "two");
  release();
  await new Promise((resolve) => setTimeout(resolve));
  release();
  return { results: [await first, second], calls };
}

finish({ order: order(), bounds: bounds(), strangers: strangers(), people: people(), outbox: await outbox(), concurrency: await concurrency() });
