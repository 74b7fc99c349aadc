// One connection of the page's stream: GET /live, read and swapped by htmx and its sse extension. The extension alone never retries a first
// connection, retries a 401 for ever and hammers a server that accepts and closes. So each connection here is a single one; live.js
// decides whether there is another.

const box = document.getElementById("live");

let now = null; // the present connection: {hear, closing, abort, answer}

/**
 * @param {(name: string, data: object, id: string) => void} hear each frame, once it is on the page; "" for a part of the page
 * @returns {Promise<{status?: number, redirected?: boolean, retry?: string, closing?: boolean}>} how it ended, or what was answered instead
 */
export async function open(query, cursor, hear) {
  const mine = (now = { hear, answer: {} });
  const headers = { Accept: "text/event-stream", "X-Page-User": document.body.dataset.user, ...(cursor && { "Last-Event-ID": cursor }) };
  const url = `${box.dataset.url}&${new URLSearchParams(query)}`;
  try {
    await htmx.ajax("GET", url, { source: box, target: box, swap: "none", headers, timeout: 15_000 });
  } catch (error) {
    console.warn("live:", error);
  }
  now = null;
  return mine.answer;
}

/** End the present connection, wherever it is: before its headers, or while it streams. */
export function close() {
  if (!now) return;
  now.answer.closing = true;
  box._htmx?.sse?.abortController?.abort();
  now.abort?.();
}

const on = (name, handler) => box.addEventListener(name, (event) => now && handler(event.detail, event));

on("htmx:before:request", ({ ctx }) => {
  now.abort = () => ctx.request.abort();
  if (now.answer.closing) now.abort();
});
// Only answers that are no stream come here: nothing of them is ever swapped.
on("htmx:before:response", ({ ctx }, event) => {
  const { status, redirected, headers } = ctx.response.raw;
  Object.assign(now.answer, { status, redirected, retry: headers.get("Retry-After") });
  // Sent away while it was not there: a 204 has no body to say why.
  const why = headers.get("X-Disconnected");
  if (why !== null) now.answer.end = { reconnect: false, message: decodeURIComponent(why) };
  event.preventDefault();
});
on("htmx:sse:after:connection", ({ connection }) => {
  now.answer.status = connection.status;
  now.hear("open");
});
on("htmx:sse:before:message", (_, event) => {
  if (now.answer.closing) event.preventDefault();
});
on("htmx:sse:after:message", ({ message }) => {
  let data = {};
  try {
    if (message.event) data = JSON.parse(message.data) ?? {};
  } catch {
    // A malformed frame is an empty one.
  }
  now.hear(message.event, data, message.id);
});
