// A page without a browser: enough of a document, storage, locks, fetch and htmx for the scripts to believe in it. Everything is fresh for
// each page: the scripts are copied, since a module is loaded once per address.

import { cpSync, mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { mock } from "node:test";
import { fileURLToPath, pathToFileURL } from "node:url";

const ROOM = mkdtempSync(join(tmpdir(), "scripts-"));
process.on("exit", () => rmSync(ROOM, { recursive: true }));

export const SCRIPTS = fileURLToPath(new URL("../../project/static/js/", import.meta.url));
export const CID = /^cid-[\da-f]{8}(-[\da-f]{4}){3}-[\da-f]{12}$/;
export const START = Date.UTC(2030, 0, 1, 12);

/** Let everything that needs no clock happen. */
export async function settle() {
  for (let turn = 0; turn < 5; turn += 1) await new Promise((resolve) => setImmediate(resolve));
}

/** Move the clock, a second at a time, and let happen what follows. */
export async function pass(ms) {
  for (let rest = ms; rest > 0; rest -= 1000) {
    mock.timers.tick(Math.min(rest, 1000));
    await settle();
  }
}

export function storage(kept = {}) {
  const map = new Map(Object.entries(kept));
  return {
    map,
    getItem: (key) => map.get(key) ?? null,
    setItem: (key, value) => void map.set(key, String(value)),
    removeItem: (key) => void map.delete(key),
  };
}

/** As the specification has it, in small: requests for one name wait for each other; `steal` breaks the holder's. */
export function locks() {
  const held = new Map();
  const queues = new Map();
  const failure = () => Object.assign(new Error("taken"), { name: "AbortError" });

  async function run(name, work) {
    let stolen;
    const broken = new Promise((_, reject) => {
      stolen = () => reject(failure());
    });
    held.set(name, stolen);
    try {
      return await Promise.race([work({ name }), broken]);
    } finally {
      if (held.get(name) === stolen) {
        held.delete(name);
        queues.get(name)?.shift()?.();
      }
    }
  }
  return {
    held,
    async request(name, options, work) {
      if (options.steal && held.has(name)) held.get(name)();
      else if (held.has(name) && options.ifAvailable) return work(null);
      else if (held.has(name)) {
        await new Promise((resolve, reject) => {
          queues.set(name, [...(queues.get(name) ?? []), resolve]);
          options.signal?.addEventListener("abort", () => {
            queues.set(name, queues.get(name).filter((each) => each !== resolve));
            reject(failure());
          });
        });
      }
      return run(name, work);
    },
  };
}

/** An element: what the scripts use of one, no more. */
export class Element extends EventTarget {
  constructor(name = "div", dataset = {}) {
    super();
    Object.assign(this, { name, dataset, hidden: false, className: "", attributes: new Map(), childNodes: [], parentNode: null });
  }

  setAttribute(name, value) {
    this.attributes.set(name, String(value));
  }

  removeAttribute(name) {
    this.attributes.delete(name);
  }

  get textContent() {
    return this.childNodes.map((node) => (typeof node === "string" ? node : node.textContent)).join("");
  }

  set textContent(text) {
    this.childNodes = text ? [String(text)] : [];
  }

  get children() {
    return this.childNodes.filter((node) => typeof node !== "string");
  }

  append(...nodes) {
    for (const node of nodes) {
      if (typeof node !== "string") {
        node.remove();
        node.parentNode = this;
      }
      this.childNodes.push(node);
    }
  }

  replaceChildren(...nodes) {
    this.childNodes = [];
    this.append(...nodes);
  }

  remove() {
    if (this.parentNode) this.parentNode.childNodes = this.parentNode.childNodes.filter((node) => node !== this);
    this.parentNode = null;
  }

  /** By class name only. */
  querySelector(selector) {
    for (const child of this.children) {
      if (child.className.split(" ").includes(selector.slice(1))) return child;
      const found = child.querySelector(selector);
      if (found) return found;
    }
    return null;
  }

  find(test) {
    return [...(test(this) ? [this] : []), ...this.children.flatMap((child) => child.find(test))];
  }

  click() {
    this.dispatchEvent(new Event("click"));
  }
}

const define = (name, value) => Object.defineProperty(globalThis, name, { value, configurable: true, writable: true });

/**
 * A page that is about to load its scripts.
 *
 * @param {object} [options] storage (or null: it throws), locks (or null), protocol, user, hidden, fetch
 */
export function page({ storage: kept = storage(), locks: shared = locks(), protocol = "h2", user = "user:1", hidden = false, fetch } = {}) {
  const elements = Object.fromEntries(["live", "badge", "badge-text", "badge-act", "stale-line", "main", "outbox-rest"].map((id) => [id, new Element("div")]));
  elements.live.dataset = { url: "/live?topics=connections&since=5", heartbeat: "15" };
  const box = elements.live;
  const window = new EventTarget();
  const world = { elements, box, window, asked: [], streams: [], beacons: [], reloads: 0, events: [], locks: shared, storage: kept };

  const document = new EventTarget();
  Object.assign(document, {
    body: { dataset: { user } },
    hidden,
    cookie: "csrftoken=token-1",
    forms: [],
    getElementById: (id) => elements[id] ?? null,
    createElement: (name) => new Element(name),
    querySelector: (selector) => (selector.startsWith("form[") ? document.forms.find(({ object }) => selector.includes(`"${object}"`)) ?? null : elements[selector] ?? null),
    querySelectorAll: (selector) => (elements[selector] ? [elements[selector]] : []),
  });
  const dispatch = document.dispatchEvent.bind(document);
  document.dispatchEvent = (event) => {
    world.events.push([event.type, event.detail]);
    return dispatch(event);
  };
  define("document", document);
  define("CSS", { escape: (text) => text });
  define("location", { pathname: "/tasks/tk_1", search: "", href: "http://here/tasks/tk_1", assign: (to) => (world.went = to), reload: () => (world.reloads += 1) });
  define("navigator", {
    onLine: true,
    ...(shared && { locks: shared }),
    sendBeacon: (url, body) => world.beacons.push([url, Object.fromEntries(body)]),
  });
  define("performance", { getEntriesByType: () => [{ nextHopProtocol: protocol }], now: () => Date.now() });
  Object.defineProperty(globalThis, "sessionStorage", {
    configurable: true,
    get() {
      if (kept === null) throw new Error("SecurityError");
      return kept;
    },
  });
  define("addEventListener", window.addEventListener.bind(window));
  define("fetch", async (url, init = {}) => {
    world.asked.push({ url, method: init.method ?? "GET", headers: init.headers ?? {}, body: init.body && JSON.parse(init.body), keepalive: init.keepalive });
    return fetch ? fetch(url, init) : new Response(null, { status: 204 });
  });
  const mine = (box.page = { world, box });
  define("htmx", {
    registerExtension() {},
    ajax(method, url, { source, headers = {}, timeout }) {
      // Of several pages the one whose element this is.
      const { world, box } = source.page ?? mine;
      const stream = { url: new URL(url, "http://here"), headers, timeout, over: false };
      const emit = (name, detail) => box.dispatchEvent(new CustomEvent(`htmx:${name}`, { detail, cancelable: true }));
      const done = new Promise((resolve) => {
        stream.end = () => {
          stream.over = true;
          delete box._htmx;
          resolve();
        };
      });
      if (!url.startsWith("/live")) {
        world.refetched = (world.refetched ?? 0) + 1;
        return Promise.resolve();
      }
      world.streams.push(stream);
      emit("before:request", { ctx: { request: { abort: stream.end } } });
      Object.assign(stream, {
        answer(status, more = {}) {
          emit("before:response", { ctx: { response: { raw: { status, redirected: false, headers: new Headers(), ...more } } } });
          stream.end();
        },
        open() {
          box._htmx = { sse: { abortController: { abort: stream.end } } };
          emit("sse:after:connection", { connection: { status: 200 } });
        },
        frame(event, data, id) {
          const message = { event, id, data: typeof data === "string" ? data : JSON.stringify(data) };
          if (!stream.over && emit("sse:before:message", { message })) emit("sse:after:message", { message });
        },
        welcome(more = {}) {
          stream.open();
          stream.frame("welcome", { connection_id: stream.url.searchParams.get("cid"), epoch: world.streams.length, cid_accepted: true, resumed: true, heartbeat_seconds: 15, ...more });
        },
        live(more) {
          stream.welcome(more);
          stream.frame("ready", { cursor: 7 });
        },
      });
      return done;
    },
  });

  Object.defineProperties(world, {
    stream: { get: () => world.streams.at(-1) },
    state: { get: () => elements.badge.dataset.state },
    text: { get: () => elements["badge-text"].textContent },
  });
  return Object.assign(world, {
    document,
    cid: () => world.stream.url.searchParams.get("cid"),
    posts: (what) => world.asked.filter(({ url, method }) => method === "POST" && url.endsWith(what)),
    fire: (name, more = {}) => window.dispatchEvent(Object.assign(new Event(name), more)),
    hide(hidden) {
      document.hidden = hidden;
      document.dispatchEvent(new Event("visibilitychange"));
    },
    /** Load a script with everything that it imports; what two of them share is the same. */
    async load(name) {
      world.folder ??= mkdtempSync(join(ROOM, "page-"));
      cpSync(SCRIPTS, world.folder, { recursive: true });
      return import(pathToFileURL(join(world.folder, name)).href);
    },
  });
}
