// How this page acts on the server: JSON over POST, with the session, its token, and an end.

const TIMEOUT = 15_000;

/** `crypto.randomUUID` exists in secure contexts only; a machine of the local network is none. */
export function uuid() {
  if (crypto.randomUUID) return crypto.randomUUID();
  const bytes = [...crypto.getRandomValues(new Uint8Array(16))];
  const hex = bytes.map((byte) => byte.toString(16).padStart(2, "0")).join("");
  return hex.replace(/^(.{8})(.{4}).(.{3}).(.{3})(.{12})$/, "$1-$2-4$3-a$4-$5");
}

/** The token of now: signing in again, in any tab, makes a new one. */
export const csrf = () => /(?:^|; )csrftoken=([^;]+)/.exec(document.cookie)?.[1] ?? "";

export function post(url, body, { headers, ...more } = {}) {
  // Whose page this is: somebody else may be signed in by now, in another tab.
  const own = { "Content-Type": "application/json", "X-CSRFToken": csrf(), "X-Page-User": document.body.dataset.user };
  return fetch(url, { method: "POST", body: JSON.stringify(body), headers: { ...own, ...headers }, ...more });
}

/** Whether the answer may be another one later. 0: there was none, or not all of it. */
export const passing = (status) => !status || status === 429 || status >= 500;

export const retryAfter = (headers) => Number(headers.get("Retry-After")) * 1000 || 0;

/**
 * What comes of a request, at most 15 s after it began, its body included.
 *
 * @param {(signal: AbortSignal) => Promise<Response>} begin
 * @returns {Promise<{status: number, after?: number, data?: any, code?: string, text?: string}>} `after`: Retry-After in ms;
 *   `data`: the JSON, if it was JSON; `code` and `text`: of an error body
 */
export async function outcome(begin, timers) {
  const cut = new AbortController();
  let timer;
  const late = new Promise((_, reject) => {
    timer = timers.set(() => {
      cut.abort();
      reject(new Error("no answer in time"));
    }, TIMEOUT);
  });
  const whole = async () => {
    const answer = await begin(cut.signal);
    const news = { status: answer.status, after: retryAfter(answer.headers) };
    const text = await answer.text();
    try {
      const data = JSON.parse(text);
      return { ...news, data, code: data?.code, text: data?.message };
    } catch {
      return news; // a page of HTML
    }
  };
  try {
    return await Promise.race([whole(), late]);
  } catch {
    return { status: 0 };
  } finally {
    timers.clear(timer);
  }
}
