// What was written and is not known to have arrived. It outlives a reload of the page, and each message carries an id,
// so that sending one again can't show it twice.

const STORED = "outbox";

export class Outbox {
  #sending = new Set(); // rooms with a publish on its way

  /** storage: a Storage, such as sessionStorage. changed: called with a room's name whenever its messages change. */
  constructor(storage, changed) {
    this.storage = storage;
    this.changed = changed;
    this.items = JSON.parse(storage.getItem(STORED) ?? "[]");
  }

  /** Messages of a room, oldest first: {id, room, text, state, reason}; state: waiting, sent, or refused with a reason. */
  of(room) {
    return this.items.filter((item) => item.room === room);
  }

  add(room, text) {
    this.items.push({ id: newId(), room, text, state: "waiting", reason: "" });
    this.#keep(room);
  }

  /** The message `id` was seen in its room. */
  confirm(id) {
    this.#drop((item) => item.id === id);
  }

  discard(id) {
    this.#drop((item) => item.id === id);
  }

  /** All that this room's history can show has been shown: what the server had accepted need not be kept longer. */
  settle(room) {
    this.#drop((item) => item.room === room && item.state === "sent");
  }

  /** Have another try at a refused message with the next flush. */
  retry(id) {
    const item = this.items.find((candidate) => candidate.id === id);
    if (!item) return;
    item.state = "waiting";
    this.#keep(item.room);
  }

  /**
   * Send what waits for a room, one after the other and in order.
   * publish: takes {id, text}, and rejects with {code, message, temporary}.
   * Resolves to false when a failure that may pass left messages waiting.
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
          if (mayPass(error)) return false;
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

/** Codes below 100 are the SDK's own: a time-out, a lost connection. */
function mayPass(error) {
  return error.temporary === true || !(error.code >= 100);
}

/** 128 random bits. (crypto.randomUUID is missing where the page is not served from localhost or by HTTPS.) */
export function newId() {
  return Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}
