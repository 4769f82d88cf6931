// The outbox: written messages without a confirmed arrival. It survives a reload of the page. Each message carries an id,
// so readers see it only once even if it is sent twice.

const STORED = "outbox";

export class Outbox {
  #sending = new Set(); // rooms with a publish in progress

  /** storage: a Storage, such as sessionStorage. changed: called with a room's name when its messages change. */
  constructor(storage, changed) {
    this.storage = storage;
    this.changed = changed;
    this.items = JSON.parse(storage.getItem(STORED) ?? "[]");
  }

  /** Return a room's messages, oldest first: {id, room, text, state, reason}. state: waiting, sent, or refused with a reason. */
  of(room) {
    return this.items.filter((item) => item.room === room);
  }

  add(room, text) {
    this.items.push({ id: newId(), room, text, state: "waiting", reason: "" });
    this.#keep(room);
  }

  /** Remove the message `id`, because it has arrived in its room. */
  confirm(id) {
    this.#drop((item) => item.id === id);
  }

  discard(id) {
    this.#drop((item) => item.id === id);
  }

  /** Remove a room's accepted messages, because the page now shows the room's whole history. */
  settle(room) {
    this.#drop((item) => item.room === room && item.state === "sent");
  }

  /** Send a refused message again with the next flush. */
  retry(id) {
    const item = this.items.find((candidate) => candidate.id === id);
    if (!item) return;
    item.state = "waiting";
    this.#keep(item.room);
  }

  /**
   * Send a room's waiting messages one after another, in order.
   * publish: takes {id, text}, and rejects with {code, message, temporary}.
   * Resolves to false if messages still wait after a temporary failure.
   */
  async flush(room, publish) {
    if (this.#sending.has(room)) return true;
    this.#sending.add(room);
    try {
      let item;
      while ((item = this.items.find((candidate) => candidate.room === room && candidate.state === "waiting"))) {
        try {
          await publish({ id: item.id, text: item.text });
          item.state = "sent";
        } catch (error) {
          if (isTemporary(error)) return false;
          item.state = "refused";
          item.reason = error.message;
        }
        this.#keep(room);
      }
      return true;
    } finally {
      this.#sending.delete(room);
    }
  }

  #drop(unwanted) {
    const rooms = new Set(this.items.filter(unwanted).map((item) => item.room));
    if (!rooms.size) return;
    this.items = this.items.filter((item) => !unwanted(item));
    for (const room of rooms) this.#keep(room);
  }

  #keep(room) {
    this.storage.setItem(STORED, JSON.stringify(this.items.filter((item) => item.state !== "sent")));
    this.changed(room);
  }
}

/** Return whether an error is temporary. Codes below 100 come from the SDK: a time-out, a lost connection. */
function isTemporary(error) {
  return error.temporary === true || !(error.code >= 100);
}

/** Return 128 random bits as text. (crypto.randomUUID exists only on localhost and over HTTPS.) */
export function newId() {
  return Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}
