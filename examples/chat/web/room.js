// The state of one room: its messages in the order of their offsets, and the people in it. No DOM, no network.

// The page keeps this many messages of a room. It drops older ones, and reads them from history again on demand.
const KEEP = 1000;
const DROP = 200;

export class Room {
  #known = new Set();

  constructor(name) {
    this.name = name;
    this.channel = `room:${name}`;
    this.messages = [];
    this.epoch = "";
    this.atStart = false; // the history has no older messages
    this.unread = 0;
    this.heard = 0; // messages received by the subscription, live or recovered
    this.clients = new Map(); // client id -> {user, nick}
  }

  /** Remove all messages, because the next ones do not continue them. */
  reset(epoch) {
    this.messages = [];
    this.#known.clear();
    this.epoch = epoch;
    this.atStart = false;
  }

  /**
   * Add a publication, live or from history, in any order and any number of times.
   * Returns its message, or null for a duplicate: one with a known offset, or with a known id from its author (the
   * author sent the message again because the answer to the first attempt was lost).
   */
  take(publication) {
    const message = asMessage(publication);
    if (this.#known.has(message.offset) || (message.key && this.#known.has(message.key))) return null;
    this.#known.add(message.offset);
    if (message.key) this.#known.add(message.key);
    let place = this.messages.length;
    while (place > 0 && this.messages[place - 1].offset > message.offset) place--;
    this.messages.splice(place, 0, message);
    return message;
  }

  /** Drop the oldest messages if there are too many. Returns whether any were dropped. */
  trim() {
    if (this.messages.length <= KEEP) return false;
    for (const message of this.messages.splice(0, DROP)) {
      this.#known.delete(message.offset);
      this.#known.delete(message.key);
    }
    this.atStart = false;
    return true;
  }

  get oldest() {
    return this.messages[0]?.offset ?? 0;
  }

  setPresence(clients) {
    this.clients = new Map(Object.entries(clients).map(([id, info]) => [id, asPerson(info)]));
  }

  join(info) {
    this.clients.set(info.client, asPerson(info));
  }

  leave(info) {
    this.clients.delete(info.client);
  }

  /** The people in the room by name; a person with several tabs appears once. */
  get people() {
    const people = new Map([...this.clients.values()].map((person) => [person.user, person]));
    return [...people.values()].sort((a, b) => a.nick.localeCompare(b.nick));
  }
}

/** Return a person. user: the id from the server. nick: the name that the person chose. */
function asPerson(info) {
  return { user: info.user, nick: text(info.connInfo?.nick) || info.user };
}

/**
 * Return a publication as a message. A publication of this page has {id, text, time}, checked by the server, and the
 * `info` of its author. A publication from the HTTP API has no author and may have any data: it appears as a notice.
 */
function asMessage({ offset, data, info }) {
  const author = info ? asPerson(info) : { user: "", nick: text(data?.from) || "Notice" };
  const body = text(data?.text) || (typeof data === "string" ? data : JSON.stringify(data, null, 1));
  const id = text(data?.id);
  return {
    offset,
    ...author,
    id,
    key: info && id ? `${info.user}/${id}` : "",
    text: body,
    time: Number.isFinite(data?.time) ? data.time : 0,
  };
}

function text(value) {
  return typeof value === "string" ? value : "";
}
