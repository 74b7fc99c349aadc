// Who this tab is: a cid, which outlives reconnects and reloads, and the nonce of this page. Names, never credentials.

import { hold } from "./locks.js";
import { post, uuid } from "./post.js";

const KEY = "switchboard.cid";
const FORM = /^cid-[\da-f]{8}(-[\da-f]{4}){3}-[\da-f]{12}$/;
const PATIENCE = 1000;

/** The one spelling of a client id: `cid-` and a UUID of any version, in lower case; or null. */
export function normal(text) {
  const cid = String(text).toLowerCase();
  return FORM.test(cid) ? cid : null;
}

/** One of this tab's own operations: probe, answer, suspend, claims, presence. */
export const operate = (what, body, more) => post(`/api/clients/${client.cid}/${what}`, body, more);

function stored(cid) {
  try {
    if (cid) sessionStorage.setItem(KEY, cid);
    return sessionStorage.getItem(KEY);
  } catch {
    return null; // private mode: it lasts as long as the page
  }
}

let release = null;

function free() {
  release?.();
  release = null;
}

async function own(cid) {
  client.cid = cid;
  stored(cid);
  free();
  if (!navigator.locks) return true; // the server finds out, by asking the other page
  // The page before this one gives its lock back as it leaves, which may take a moment. A tab that was copied keeps it.
  const patience = new AbortController();
  const timer = setTimeout(() => patience.abort(), PATIENCE);
  const held = await hold(`switchboard-${cid}`, { signal: patience.signal });
  clearTimeout(timer);
  if (client.page && client.cid === cid) release = held || null;
  else if (held) held();
  return Boolean(held);
}

export const client = {
  cid: null,
  page: null,
  known: false, // the server said welcome to this page

  /** Before connecting: an id that no other tab has. */
  async settle() {
    if (this.page) return;
    this.page = uuid();
    const fresh = () => `cid-${uuid()}`;
    if (!(await own(normal(stored()) ?? this.cid ?? fresh()))) await own(fresh());
  },

  /** What `welcome` said. False: it names no client, so nothing of this stream is to be trusted. */
  welcome({ connection_id: id }) {
    const cid = id === undefined ? this.cid : normal(id);
    if (cid && cid !== this.cid) own(cid);
    this.known = Boolean(cid && id);
    return Boolean(cid);
  },

  /** The page goes away. Should it come back, from the back-forward cache, it is another page of this tab. */
  leave() {
    free();
    this.page = null;
    this.known = false;
  },
};
