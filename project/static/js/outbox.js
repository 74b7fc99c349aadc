// Messages that arrive: an ordered queue per object, one POST at a time. No page in here: sends.js shows it.

import { outcome, passing } from "./post.js";

const KEY = "switchboard.outbox";
const DELAYS = [3_000, 6_000, 12_000, 30_000];
const LIMIT = 100; // of one object

const isOpen = ({ state }) => ["pending", "sending", "retrying"].includes(state);

export function createOutbox({ post, storage, user, login = () => {}, now, timers, uuid, online, mine, reconnect, changed, failed }) {
  let all = [];
  let stopped = false;
  const busy = new Set();
  const waits = new Map();
  const drafts = [];

  function save() {
    const messages = all.filter(({ secret, once, state }) => !secret && !once && state !== "sent");
    try {
      storage().removeItem(KEY); // no room below: nothing old stays
      storage().setItem(KEY, JSON.stringify({ user, login: login(), messages }));
    } catch {
      // No storage, or full: it is sent from memory.
    }
    changed(all);
  }

  function restore() {
    try {
      const kept = JSON.parse(storage().getItem(KEY));
      const messages = kept.user === user ? kept.messages : [];
      for (const each of messages) if (each.state === "sending") Object.assign(each, { state: "pending", maybe: true });
      all = [...messages, ...all.filter(({ secret }) => secret)];
      // Nothing is sent under another login.
      if (kept.login !== login()) end(messages);
    } catch {
      return;
    }
    save();
  }

  function report(message, { status = 0, code, text }, willRetry) {
    // It may have arrived, and nobody asks any more.
    const uncertain = !willRetry && message.maybe && (passing(status) || status < 300 || status === 401);
    const state = willRetry ? "retrying" : uncertain ? "uncertain" : "failed";
    const { id, object, tries } = Object.assign(message, { state, status, code, text });
    failed({ id, object, status, code, text, tries, willRetry, uncertain });
  }

  function end(messages) {
    for (const each of messages) if (isOpen(each) && each.state !== "sending") report(each, { status: 401 });
  }

  const ask = ({ id, url, body, tries }) =>
    outcome(async (signal) => {
      if (!(await mine(tries))) return new Response(null, { status: 401 });
      return post(url, body, { headers: { "Idempotency-Key": id }, signal });
    }, timers);

  function isReceipt({ id, object }, data) {
    const named = object.startsWith("draft:") ? data?.task_id : object === `task:${data?.task_id}`;
    return data?.accepted === true && data.client_message_id === id && Boolean(named);
  }

  function sent(message, task) {
    const { object } = message;
    message.state = "sent";
    if (message.secret) message.body = null;
    if (!object.startsWith("draft:")) return;
    for (const each of [...all, ...drafts]) if (each.object === object) Object.assign(each, { object: `task:${task}`, url: `/api/tasks/${task}/input` });
  }

  async function attempt(message) {
    message.state = "sending";
    save();
    const news = await ask(message);
    const { status, code, data } = news;
    if (!all.includes(message)) return; // discarded meanwhile
    const ok = status >= 200 && status < 300;
    const unknown = code === "connection_unknown";
    if (ok || !status || status >= 500) message.maybe = true;
    if (status || online()) message.tries += 1;
    if (ok && (message.once || isReceipt(message, data))) sent(message, data?.task_id);
    else if (!message.once && (ok || unknown || passing(status))) {
      message.due = now() + (news.after || DELAYS[Math.min(message.tries, DELAYS.length) - 1] || 0);
      report(message, news, true);
      if (unknown) reconnect();
    } else {
      report(message, news, false);
      if (status === 401) end(all);
    }
    save();
  }

  async function pump(object) {
    const message = all.find((each) => each.object === object && isOpen(each) && !each.once);
    if (!message || stopped || busy.has(object) || !online()) return;
    timers.clear(waits.get(object));
    const rest = message.due - now();
    if (rest > 0) return void waits.set(object, timers.set(() => pump(object), rest));
    busy.add(object);
    await attempt(message);
    busy.delete(object);
    pump(message.object);
  }

  function resume() {
    stopped = false;
    for (const { object } of all) pump(object);
  }

  function change(wanted, how) {
    for (const each of all) if (wanted(each)) Object.assign(each, how);
    save();
    resume();
  }

  function send({ id = uuid(), object, url, body, secret = false, once = false }) {
    const known = all.find((each) => each.id === id);
    if (known) return known;
    const message = { id, object, url, body, secret, once, at: now(), due: 0, tries: 0, state: "pending", maybe: false };
    if (all.filter((each) => each.object === object && isOpen(each)).length >= LIMIT && !once) {
      report(message, { code: "outbox_full" }, false);
      return null;
    }
    all.push(message);
    if (once && !online()) report(message, { code: "offline" }, false);
    else if (once) attempt(message);
    save();
    pump(object);
    return message;
  }

  return {
    send,
    restore,
    resume,
    refresh: () => changed(all),
    stop: () => (stopped = true),
    retry: (id) => change((each) => each.id === id && !each.once && each.state !== "sending", { state: "pending", due: 0 }),
    discard(id) {
      all = all.filter((each) => each.id !== id);
      change(() => false);
    },
    /** The server knows this client again. */
    healed: () => change((each) => each.state === "retrying" && each.code === "connection_unknown", { due: 0 }),
    /** For a task to come: the first message makes it at `url`; the others follow. */
    draft(url) {
      const draft = { object: `draft:${uuid()}`, url, send: (message) => send({ ...message, ...draft }) };
      drafts.push(draft);
      return draft;
    },
  };
}
