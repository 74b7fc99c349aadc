/**
 * A reader of Server-Sent Events that follows the specification (WHATWG HTML, section 9.2) over fetch, because an EventSource can
 * neither tell a 401 from a cable that was pulled, nor be read by a test. No dependency, no DOM.
 */

/** Bytes in, events out. Chunks may be cut anywhere: inside a character, between CR and LF, inside a name. */
export class SseParser {
  #decoder = new TextDecoder("utf-8"); // drops one leading BOM, and replaces what is no UTF-8, as the specification wants
  #line = "";
  #afterCr = false;
  #data = [];
  #name = "";
  lastEventId = "";
  retry = null;

  /** @param {Uint8Array} chunk @returns {{name: string, data: string, id: string}[]} the events that it completed */
  feed(chunk) {
    const events = [];
    let text = this.#decoder.decode(chunk, { stream: true });
    if (this.#afterCr && text !== "") {
      this.#afterCr = false;
      if (text[0] === "\n") text = text.slice(1);
    }
    let start = 0;
    for (let at = 0; at < text.length; at++) {
      const char = text[at];
      if (char !== "\n" && char !== "\r") continue;
      const event = this.#take(this.#line + text.slice(start, at));
      if (event) events.push(event);
      this.#line = "";
      if (char === "\r") {
        if (at + 1 === text.length) this.#afterCr = true;
        else if (text[at + 1] === "\n") at++;
      }
      start = at + 1;
    }
    this.#line += text.slice(start);
    return events;
    // What is unfinished when the stream ends stays in here and is never dispatched.
  }

  #take(line) {
    if (line === "") return this.#dispatch();
    if (line[0] === ":") return null;
    const colon = line.indexOf(":");
    const field = colon < 0 ? line : line.slice(0, colon);
    let value = colon < 0 ? "" : line.slice(colon + 1);
    if (value[0] === " ") value = value.slice(1);
    if (field === "data") this.#data.push(value);
    else if (field === "event") this.#name = value;
    else if (field === "id" && !value.includes("\0")) this.lastEventId = value;
    else if (field === "retry" && /^[0-9]+$/.test(value)) this.retry = Number(value);
    return null;
  }

  #dispatch() {
    const data = this.#data;
    const name = this.#name || "message";
    this.#data = [];
    this.#name = "";
    return data.length ? { name, data: data.join("\n"), id: this.lastEventId } : null;
  }
}

/** @returns the value, or undefined when the text is no JSON */
export function parseJson(text) {
  try {
    return JSON.parse(text);
  } catch {
    return undefined;
  }
}

/** Seconds of a Retry-After header as milliseconds; 0 when there is none that makes sense. */
export function retryAfter(response) {
  const seconds = Number(response.headers.get("Retry-After"));
  return Number.isFinite(seconds) && seconds > 0 ? Math.min(seconds, 60) * 1000 : 0;
}

/**
 * Read one stream to its end.
 *
 * `on.open()` when it was accepted, `on.alive()` for every chunk of bytes (comments and heartbeats included), `on.event(name, value)`
 * for every event whose data is JSON. What a handler throws is reported as its own error; the stream goes on.
 *
 * Resolves, never rejects: `{kind}` is `closed` (by the server), `aborted` (by `signal`), `network`, `refused` (with `status` and
 * `retryAfter`) or `wrong_type` (200, but no event stream: a login page, a proxy's apology).
 */
export async function readStream(url, { signal, on, fetch = globalThis.fetch, report = reportLater }) {
  let response;
  try {
    response = await fetch(url, {
      headers: { Accept: "text/event-stream" },
      credentials: "same-origin",
      cache: "no-store",
      redirect: "follow",
      signal,
    });
  } catch {
    return { kind: signal?.aborted ? "aborted" : "network" };
  }
  if (!response.ok) {
    response.body?.cancel().catch(() => undefined); // nobody reads it; a failure to say so is no news
    return { kind: "refused", status: response.status, retryAfter: retryAfter(response) };
  }
  const type = (response.headers.get("Content-Type") ?? "").split(";")[0].trim().toLowerCase();
  if (type !== "text/event-stream" || !response.body) {
    response.body?.cancel().catch(() => undefined);
    return { kind: "wrong_type", status: response.status };
  }
  call(report, on.open);
  const parser = new SseParser();
  const reader = response.body.getReader();
  for (;;) {
    let part;
    try {
      part = await reader.read();
    } catch {
      return { kind: signal?.aborted ? "aborted" : "network" };
    }
    if (signal?.aborted) return { kind: "aborted" };
    if (part.done) return { kind: "closed" };
    call(report, on.alive);
    for (const event of parser.feed(part.value)) {
      const value = parseJson(event.data);
      if (value === undefined) continue; // malformed: this one is skipped, the stream goes on
      call(report, on.event, event.name, value);
      if (signal?.aborted) {
        reader.cancel().catch(() => undefined);
        return { kind: "aborted" };
      }
    }
  }
}

function call(report, handler, ...values) {
  try {
    handler?.(...values);
  } catch (error) {
    report(error);
  }
}

/** An error of the application must not look like a fault of the stream: it goes where uncaught errors go. */
function reportLater(error) {
  setTimeout(() => {
    throw error;
  });
}
