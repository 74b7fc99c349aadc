// The stream of one task's output: GET …/output, byte-exact from an offset on, until the task is over. No DOM in here: task.js shows it.

import { SseParser, parseJson, retryAfter } from "./sse.js";
import { bytesOf } from "./screen.js";

const WAIT = 500;
const LONGEST = 30_000;
const POLL = 2_000;
const SILENCE = 40_000; // heartbeats come every 15 s
const FINAL = [400, 401, 403, 404, 410];

/**
 * Follow an output from the offset `from` on.
 *
 * @param {object} to
 * @param {(bytes: Uint8Array, end: number) => Promise<void>} to.more what comes, in order and once; the next is read when it is done with it
 * @param {(how: {status?: string, exit_code?: number | null, signal?: string | null, dropped?: number, reason?: string}) => void} to.over
 * @param {(at: {at: number, dropped: number}) => void} to.cut
 * @param {(state: "live" | "waiting" | "polling" | "refused", status?: number) => void} to.state when it is another one
 * @param {() => Promise<false | (() => void)>} to.seat one of the few connections that a browser has for a host; false: look now and then instead
 */
export function follow(url, from, { more, over, cut, state: tell, seat, user = "", fetch = globalThis.fetch, timers = globalThis }) {
  let at = from;
  let done = false;
  let away = false; // hidden: nobody looks
  let running = null; // the AbortController of what runs
  let failures = 0;
  let wake = () => {};
  let free = null;

  let told = "";
  function state(name, status) {
    if (name !== told) tell(name, status);
    told = name;
  }

  const headers = { "X-Page-User": user };

  async function take(bytes, end) {
    // Whatever was seen before is not shown again.
    const fresh = bytes.subarray(Math.max(0, bytes.length - (end - at)));
    if (end <= at) return;
    at = end;
    await more(fresh, end);
  }

  function finish(how) {
    done = true;
    over(how);
  }

  async function read(response, cutOff) {
    const parser = new SseParser();
    const reader = response.body.getReader();
    for (;;) {
      const timer = timers.setTimeout(() => cutOff.abort(), SILENCE);
      const part = await reader.read().finally(() => timers.clearTimeout(timer));
      if (part.done) return;
      for (const event of parser.feed(part.value)) {
        const data = parseJson(event.data);
        if (!data || cutOff.signal.aborted) continue;
        if (event.name === "output") await take(bytesOf(data.data), Number(event.id));
        else if (event.name === "cut") cut(data);
        else if (event.name === "ready") {
          failures = 0;
          state("live");
        } else if (event.name === "end" && !data.reconnect) {
          finish(data);
          return;
        }
      }
    }
  }

  async function stream() {
    const cutOff = (running = new AbortController());
    const response = await fetch(`${url}?from=${at}`, { headers: { ...headers, Accept: "text/event-stream" }, cache: "no-store", signal: cutOff.signal });
    if (!response.ok || !response.headers.get("Content-Type")?.startsWith("text/event-stream")) {
      response.body?.cancel().catch(() => {});
      return response;
    }
    await read(response, cutOff);
    return null;
  }

  /** A look without a stream: what there is by now. */
  async function look() {
    const cutOff = (running = new AbortController());
    const response = await fetch(`${url}?from=${at}&limit=${1 << 18}`, { headers, cache: "no-store", signal: cutOff.signal });
    if (!response.ok) return response;
    const bytes = new Uint8Array(await response.arrayBuffer());
    await take(bytes, at + bytes.length);
    const named = (name) => response.headers.get(name);
    const whole = at >= Number(named("X-Output-Size"));
    if (whole && Number(named("X-Output-Dropped"))) cut({ at, dropped: Number(named("X-Output-Dropped")) });
    if (whole && ["completed", "failed", "killed"].includes(named("X-Task-Status"))) finish({ status: named("X-Task-Status") });
    else state("polling");
    return whole ? null : look();
  }

  const pause = (ms) =>
    new Promise((resolve) => {
      const timer = ms && timers.setTimeout(resolve, ms);
      wake = () => resolve(timers.clearTimeout(timer));
    });

  async function run() {
    while (!done) {
      if (away) {
        await pause();
        continue;
      }
      free = await seat(() => running?.abort());
      const polls = !free;
      let refused = null;
      try {
        refused = polls ? await look() : await stream();
      } catch {
        // The line broke, or was cut on purpose: the next try goes on at the same byte.
      }
      if (free) free();
      free = null;
      if (done) return;
      if (refused && FINAL.includes(refused.status)) {
        done = true;
        state("refused", refused.status);
        return;
      }
      if (polls && !refused) {
        failures = 0;
        await pause(POLL);
      } else if (!away) {
        failures += 1;
        const wait = Math.min(LONGEST, WAIT * 2 ** Math.min(failures - 1, 6)) * (0.7 + Math.random() * 0.6);
        if (failures > 1) state("waiting");
        await pause(Math.max(wait, refused ? retryAfter(refused) : 0));
      }
    }
  }

  run();
  return {
    get at() {
      return at;
    },
    /** Nobody looks: the connection is for others. */
    rest() {
      away = true;
      running?.abort();
    },
    back() {
      away = false;
      failures = 0;
      wake();
    },
    stop() {
      done = true;
      running?.abort();
      wake();
    },
  };
}

/** A piece of an output. @returns {Promise<{bytes: Uint8Array, start: number, size: number}>} `size`: of all that is kept */
export async function piece(url, from, limit, user = "", fetch = globalThis.fetch) {
  const response = await fetch(`${url}?from=${from}&limit=${limit}`, { headers: { "X-Page-User": user }, cache: "no-store" });
  if (!response.ok) throw new Error(`the output answers ${response.status}`);
  return { bytes: new Uint8Array(await response.arrayBuffer()), start: from, size: Number(response.headers.get("X-Output-Size")) };
}
