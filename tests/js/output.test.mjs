import assert from "node:assert/strict";
import { test } from "node:test";

import { follow, piece } from "../../project/static/js/output.js";

const encode = (text) => new TextEncoder().encode(text);
const frame = (name, data, id) => `${id === undefined ? "" : `id: ${id}\n`}event: ${name}\ndata: ${JSON.stringify(data)}\n\n`;
const bytes = (text, end) => frame("output", { data: Buffer.from(text).toString("base64") }, end);

/** A server that answers one request after the other with what `answers` say; a text is a stream of these frames, which then breaks off. */
function server(...answers) {
  const asked = [];
  const fetch = async (url, { headers, signal }) => {
    asked.push({ url, headers });
    const answer = answers.shift();
    if (answer === undefined) return new Promise((_, refuse) => signal.addEventListener("abort", () => refuse(new Error("aborted"))));
    if (typeof answer === "function") return answer();
    return new Response(answer, { headers: { "Content-Type": "text/event-stream; charset=utf-8" } });
  };
  return { asked, fetch };
}

/** Follow to the end. Time passes at once. */
async function read(from, answers, more = {}) {
  const { asked, fetch } = server(...answers);
  const got = [];
  const cuts = [];
  const states = [];
  const slept = [];
  const timers = {
    setTimeout(work, ms) {
      if (ms >= 40_000) return null; // the watch over silence
      slept.push(ms);
      return setImmediate(work);
    },
    clearTimeout: (timer) => timer && clearImmediate(timer),
  };
  const end = await new Promise((resolve) => {
    follow("/o", from, {
      more: async (part) => void got.push(Buffer.from(part).toString()),
      over: resolve,
      cut: (at) => cuts.push(at),
      state: (name, status) => {
        states.push(name);
        if (name === "refused") resolve({ refused: status });
      },
      seat: async () => () => {},
      user: "user:1",
      fetch,
      timers,
      ...more,
    });
  });
  return { asked, got: got.join(""), cuts, states, slept, end };
}

test("bytes come in order until the task is over, and how it ended", async () => {
  const { asked, got, end, states } = await read(5, [frame("ready", { offset: 5 }, 5) + bytes("hello ", 11) + bytes("world", 16) + frame("end", { status: "completed", exit_code: 0 })]);
  assert.equal(got, "hello world");
  assert.deepEqual(end, { status: "completed", exit_code: 0 });
  assert.deepEqual(states, ["live"]);
  assert.equal(asked[0].url, "/o?from=5");
  assert.equal(asked[0].headers.Accept, "text/event-stream");
  assert.equal(asked[0].headers["X-Page-User"], "user:1");
});

test("a stream that breaks off goes on at the same byte, and what comes twice is taken once", async () => {
  const { asked, got } = await read(0, [bytes("abc", 3), bytes("abcdef", 6), bytes("def", 6) + bytes("efghi", 9) + frame("end", { status: "failed" })]);
  assert.equal(got, "abcdefghi");
  assert.deepEqual(asked.map(({ url }) => url), ["/o?from=0", "/o?from=3", "/o?from=6"]);
});

test("a server that wants to be asked again is, and one that refuses for good is not", async () => {
  const again = await read(0, [frame("end", { reason: "shutdown", reconnect: true }), frame("end", { status: "killed" })]);
  assert.equal(again.asked.length, 2);
  const busy = () => new Response("", { status: 503, headers: { "Retry-After": "7" } });
  const { slept, end } = await read(0, [busy, () => new Response("", { status: 404 })]);
  assert.ok(slept[0] >= 7000);
  assert.deepEqual(end, { refused: 404 });
});

test("a page that is no stream is not read as one", async () => {
  const page = () => new Response("<h1>Sign in</h1>", { headers: { "Content-Type": "text/html" } });
  const { got } = await read(0, [page, bytes("x", 1) + frame("end", { status: "completed" })]);
  assert.equal(got, "x");
});

test("the cut is told, and a malformed frame is passed over", async () => {
  const { got, cuts } = await read(0, ["event: output\ndata: {no\n\n" + bytes("x", 1) + frame("cut", { at: 1, dropped: 9 }) + frame("end", { status: "completed" })]);
  assert.equal(got, "x");
  assert.deepEqual(cuts, [{ at: 1, dropped: 9 }]);
});

test("without a seat it looks now and then, a piece at a time", async () => {
  const look = (text, size, status) => () =>
    new Response(encode(text), { headers: { "X-Output-Size": size, "X-Output-Dropped": "4", "X-Task-Status": status } });
  const { asked, got, end, cuts, states } = await read(0, [look("abc", 6, "running"), look("def", 6, "running"), look("", 6, "completed")], { seat: async () => false });
  assert.equal(got, "abcdef");
  assert.deepEqual(end, { status: "completed" });
  assert.deepEqual(asked.map(({ url }) => url.split("&")[0]), ["/o?from=0", "/o?from=3", "/o?from=6"]);
  assert.equal(cuts.at(-1).dropped, 4);
  assert.deepEqual(states, ["polling"]);
});

test("nothing is asked while nobody looks, and it goes on where it was", async () => {
  const { asked, fetch } = server(bytes("abc", 3), bytes("def", 6) + frame("end", { status: "completed" }));
  const got = [];
  let rested;
  await new Promise((resolve) => {
    const stream = follow("/o", 0, {
      more: async (part) => {
        got.push(Buffer.from(part).toString());
        if (got.length === 1) {
          stream.rest();
          setTimeout(() => {
            rested = asked.length;
            stream.back();
          }, 30);
        }
      },
      over: resolve,
      cut() {},
      state() {},
      seat: async () => () => {},
      fetch,
    });
  });
  assert.equal(rested, 1);
  assert.deepEqual(got, ["abc", "def"]);
  assert.equal(asked[1].url, "/o?from=3");
});

test("a piece is asked for by its offset", async () => {
  const { asked, fetch } = server(() => new Response(encode("abc"), { headers: { "X-Output-Size": "10" } }));
  const found = await piece("/o", 4, 3, "user:1", fetch);
  assert.equal(asked[0].url, "/o?from=4&limit=3");
  assert.deepEqual([Buffer.from(found.bytes).toString(), found.size], ["abc", 10]);
});
