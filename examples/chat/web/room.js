// One room as this page knows it: its messages in the order of their offsets, and who is here. No DOM, no network.

// The page keeps this many messages of a room; older ones are dropped, and come back from history when wanted.
const KEEP = 1000;
const DROP = 200;

export class Room {
  #known = new Set();

  constructor(name) {
    this.name = name;
    this.channel = `room:${name}`;
    this.messages = [];
    this.epoch = "";
    this.atStart = false; // nothing older is left in history
    this.unread = 0;
    this.heard = 0; // messages that came by the subscription: live, or missed and recovered
    this.clients = new Map(); // client id -> {user, nick}
  }

  /** Forget the messages: what comes next does not follow on from them. */
  reset(epoch) {
    this.messages = [];
    this.#known.clear();
    this.epoch = epoch;
    this.atStart = false;
  }

  /**
   * Take a publication, live or from history, in any order and any number of times.
   * Returns its message, or null when it was here already: by its offset, or by the id that its author gave it
   * (a message that was sent again because the answer to the first attempt got lost).
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

  /** Drop the oldest messages when there are too many. Returns whether it did. */
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

  /** Who is here, each person once however many tabs they have open, by name. */
  get people() {
    const people = new Map([...this.clients.values()].map((person) => [person.user, person]));
    return [...people.values()].sort((a, b) => a.nick.localeCompare(b.nick));
  }
}

/** user: as the server knows them. nick: what they call themselves. */
function asPerson(info) {
  return { user: info.user, nick: text(info.connInfo?.nick) || info.user };
}

/**
 * A publication as a message. One of the page's has {id, text, time}, checked by the server, and its author's `info`.
 * One published through the HTTP API has no author and any data at all: its text is shown as a notice.
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
