// The view: shows rooms, messages and people on the screen. Text of other people enters the DOM only as text nodes.

const $ = (id) => document.getElementById(id);
const NEAR = 80; // pixels from the end within which new messages keep the list scrolled to its end
const PAUSE = 5 * 60_000; // a longer silence starts a new group of the same author
const NOTICE = 6_000; // milliseconds until a temporary banner disappears

const clock = new Intl.DateTimeFormat(undefined, { hour: "2-digit", minute: "2-digit" });
const longDate = new Intl.DateTimeFormat(undefined, { weekday: "long", day: "numeric", month: "long" });
const relative = new Intl.RelativeTimeFormat(undefined, { numeric: "auto" });

let me = "";
let following = true; // the list is scrolled to its end, and stays there when it grows
let newcomers = 0; // messages below the visible part
let noticeTimer;

/** Return an element with attributes and children; strings become text nodes. */
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

function avatar(person) {
  const letters = [...person.nick.trim()][0]?.toUpperCase() ?? "?";
  const element = make("span", { class: "avatar", "aria-hidden": "true" }, letters);
  element.style.setProperty("--hue", hue(person.user));
  return element;
}

/** Return a constant colour for a person, as a hue in degrees: FNV-1a of the id. */
function hue(text) {
  let hash = 2166136261;
  for (const character of text) hash = Math.imul(hash ^ character.codePointAt(0), 16777619);
  return (hash >>> 0) % 360;
}

/** Return the text with its web addresses as links. */
function linked(text) {
  return text.split(/(https?:\/\/[^\s<>"]+[^\s<>".,;:!?)\]])/g).map((part, index) =>
    index % 2 ? make("a", { href: part, target: "_blank", rel: "noopener noreferrer" }, part) : part);
}

function dayName(time) {
  const days = Math.round((new Date(time).setHours(0, 0, 0, 0) - new Date().setHours(0, 0, 0, 0)) / 86_400_000);
  if (days < -1 || days > 0) return longDate.format(time);
  const name = relative.format(days, "day");
  return name[0].toUpperCase() + name.slice(1);
}

function follows(message, previous) {
  return Boolean(previous) && previous.user === message.user && message.user !== "" && message.time - previous.time < PAUSE;
}

/** Return the heading with the day of a message; a message without a time has the day of the previous message. */
function dayAt(messages, index) {
  while (index >= 0 && !messages[index].time) index--;
  return index < 0 ? "" : dayName(messages[index].time);
}

function messageElements(messages, index) {
  const message = messages[index];
  const previous = messages[index - 1];
  const elements = [];
  const newDay = message.time && dayName(message.time) !== dayAt(messages, index - 1);
  if (newDay) elements.push(make("li", { class: "day" }, make("span", {}, dayName(message.time))));
  const kind = !message.user ? "notice" : message.user === me ? "mine" : "theirs";
  const classes = ["message", kind];
  if (!newDay && follows(message, previous)) classes.push("continued");
  const time = message.time
    ? make("time", { datetime: new Date(message.time).toISOString() }, clock.format(message.time))
    : "";
  const author = make("p", { class: "author" }, make("b", { dir: "auto" }, kind === "mine" ? "You" : message.nick), " ", time);
  const bubble = make("p", { class: "bubble", dir: "auto" }, ...linked(message.text));
  elements.push(make("li", { class: classes.join(" "), "data-offset": message.offset },
    kind === "theirs" ? avatar(message) : "", make("div", {}, author, bubble)));
  return elements;
}

function atEnd() {
  const { scrollTop, clientHeight, scrollHeight } = $("scroll");
  return scrollHeight - scrollTop - clientHeight < NEAR;
}

function scrollToEnd() {
  $("scroll").scrollTop = $("scroll").scrollHeight;
  following = true;
  newcomers = 0;
  $("latest").hidden = true;
}

/** Show all messages of a room. stay: keep the scroll position, for example after older messages were added. */
export function showMessages(room, { stay = false } = {}) {
  const scroll = $("scroll");
  const fromEnd = scroll.scrollHeight - scroll.scrollTop;
  const follow = !stay || following;
  const list = $("messages");
  list.setAttribute("aria-busy", "true"); // old messages are not news to a screen reader
  list.replaceChildren(...room.messages.flatMap((_, index) => messageElements(room.messages, index)));
  list.setAttribute("aria-busy", "false");
  $("older").hidden = room.atStart || !room.messages.length;
  $("start").hidden = !room.atStart || !room.messages.length;
  showEmpty(room);
  if (follow) scrollToEnd();
  else scroll.scrollTop = scroll.scrollHeight - fromEnd;
}

/** Add the room's newest message, and count it if it is out of view. */
export function addMessage(room) {
  const last = room.messages.length - 1;
  $("messages").append(...messageElements(room.messages, last));
  showEmpty(room);
  if (following || room.messages[last].user === me) return scrollToEnd();
  newcomers++;
  $("latest").textContent = newcomers === 1 ? "1 new message ↓" : `${newcomers} new messages ↓`;
  $("latest").hidden = false;
}

function showEmpty(room) {
  $("empty").hidden = !room.atStart || room.messages.length > 0 || $("unsent").childElementCount > 0;
}

/** Show unsent messages. A refused message gets two buttons, for retry(id) and discard(id). */
export function showUnsent(room, items, { retry, discard }) {
  $("unsent").replaceChildren(...items.map((item) => {
    const note = { waiting: "Waiting to be sent", sent: "", refused: `Not sent: ${item.reason}` }[item.state];
    const bubble = make("p", { class: "bubble", dir: "auto" }, ...linked(item.text));
    const status = make("p", { class: "status" }, note);
    if (item.state === "refused") {
      const again = make("button", { type: "button" }, "Try again");
      const away = make("button", { type: "button" }, "Discard");
      again.addEventListener("click", () => retry(item.id));
      away.addEventListener("click", () => discard(item.id));
      status.append(" ", again, " ", away);
    }
    return make("li", { class: `message mine unsent ${item.state}` }, make("div", {}, bubble, status));
  }));
  showEmpty(room);
  if (following) scrollToEnd();
}

/** rooms: [{name, people, unread}]; people: null when unknown. */
export function showRooms(rooms, current) {
  $("rooms").replaceChildren(...rooms.map(({ name, people, unread }) => {
    const link = make("a", { href: `#${name}` }, make("span", { class: "hash", "aria-hidden": "true" }, "#"), make("span", { class: "name" }, name));
    if (name === current) link.setAttribute("aria-current", "page");
    if (unread) link.append(make("span", { class: "badge" }, String(unread), make("span", { class: "hidden" }, " unread")));
    else if (people) link.append(make("span", { class: "quiet" }, String(people), make("span", { class: "hidden" }, " here")));
    return make("li", {}, link);
  }));
  $("room-name").textContent = `# ${current}`;
  $("text").placeholder = `Message #${current}`;
  const unread = rooms.reduce((sum, room) => sum + room.unread, 0);
  $("elsewhere").hidden = unread === 0;
  $("elsewhere").textContent = unread;
  document.title = unread ? `(${unread}) ${current} · Chat` : `${current} · Chat`;
}

export function showPeople(people) {
  $("count").textContent = $("total").textContent = people.length;
  $("people").replaceChildren(...people.map((person) =>
    make("li", { class: "person" }, avatar(person), make("span", { class: "who", dir: "auto" }, person.nick,
      person.user === me ? make("small", {}, " you") : ""))));
}

export function showMe(user, nick) {
  me = user;
  $("my-name").textContent = nick;
  const mine = avatar({ user, nick });
  mine.id = "my-avatar";
  $("my-avatar").replaceWith(mine);
}

/** Show the state: connecting, connected or disconnected. worker: the pid of this tab's worker process. */
export function showConnection(state, { worker = 0, reason = "" } = {}) {
  const words = { connecting: "Connecting…", connected: `Connected · worker ${worker}`, disconnected: `Disconnected: ${reason}` };
  document.body.dataset.state = state;
  document.body.dataset.worker = worker;
  $("connection").textContent = words[state];
}

/** Show a line above the messages; an empty text removes it. passing: the line disappears after a while. */
export function showBanner(text, { passing = false } = {}) {
  clearTimeout(noticeTimer);
  $("banner").textContent = text;
  $("banner").classList.toggle("passing", passing);
  if (passing) noticeTimer = setTimeout(() => showBanner(""), NOTICE);
}

/** Ask for a name. Resolves to the name, or to null if it is `optional` and the reader cancels. */
export function askName(suggestion, { optional = false } = {}) {
  const dialog = $("hello");
  $("nick").value = suggestion;
  dialog.returnValue = "";
  dialog.showModal();
  $("nick").select();
  return new Promise((resolve) => {
    const refuse = (event) => { if (!optional) event.preventDefault(); };
    const form = (event) => { if (!$("nick").value.trim()) event.preventDefault(); else dialog.returnValue = "named"; };
    dialog.addEventListener("cancel", refuse);
    $("hello-form").addEventListener("submit", form);
    dialog.addEventListener("close", () => {
      dialog.removeEventListener("cancel", refuse);
      $("hello-form").removeEventListener("submit", form);
      resolve(dialog.returnValue === "named" ? $("nick").value.trim() : null);
    }, { once: true });
  });
}

/** Connect the page's controls. on: {open(name), send(text), older(), rename()}. */
export function listen(on) {
  addEventListener("hashchange", () => { closePanels(); on.open(location.hash.slice(1)); });
  $("other-room").addEventListener("submit", (event) => {
    event.preventDefault();
    location.hash = $("other-room-name").value;
    event.target.reset();
  });
  const submit = () => {
    const text = $("text").value.trim();
    $("text").value = "";
    fit();
    if (text) on.send(text);
    $("text").focus();
  };
  $("composer").addEventListener("submit", (event) => { event.preventDefault(); submit(); });
  $("text").addEventListener("input", fit);
  $("text").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    submit();
  });
  $("rename").addEventListener("click", on.rename);
  $("older").addEventListener("click", on.older);
  $("latest").addEventListener("click", scrollToEnd);
  $("scroll").addEventListener("scroll", () => {
    following = atEnd();
    if (following && newcomers) scrollToEnd();
  }, { passive: true });
  // A phone's keyboard, a banner or a long draft make the list smaller.
  const sizes = new ResizeObserver(() => { if (following) scrollToEnd(); });
  for (const id of ["scroll", "unsent"]) sizes.observe($(id));
  new IntersectionObserver((entries) => { if (entries.at(-1).isIntersecting) on.older(); }, { root: $("scroll") }).observe($("older"));
  listenToPanels();
}

function fit() {
  const box = $("text");
  box.style.height = "auto";
  box.style.height = `${box.scrollHeight + 2}px`;
}

/** Let the two side panels slide over the conversation on a narrow screen. */
function listenToPanels() {
  for (const [button, panel] of [["show-rooms", "rooms-panel"], ["show-people", "people-panel"]]) {
    $(button).addEventListener("click", () => {
      const open = !$(panel).classList.contains("open");
      closePanels();
      if (!open) return;
      $(panel).classList.add("open");
      $(button).setAttribute("aria-expanded", "true");
      $("scrim").hidden = false;
    });
  }
  $("scrim").addEventListener("click", closePanels);
  addEventListener("keydown", (event) => { if (event.key === "Escape") closePanels(); });
}

function closePanels() {
  for (const panel of document.querySelectorAll(".panel.open")) panel.classList.remove("open");
  for (const button of document.querySelectorAll("[aria-expanded]")) button.setAttribute("aria-expanded", "false");
  $("scrim").hidden = true;
}

export function focusComposer() {
  if (matchMedia("(pointer: fine)").matches) $("text").focus(); // on a phone, focus would open the keyboard
}
