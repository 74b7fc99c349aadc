import assert from "node:assert/strict";
import { test } from "node:test";

import { SseParser, parseJson, readStream } from "../../project/static/js/sse.js";

const bytes = (text) => new TextEncoder().encode(text);

function read(...chunks) {
  const parser = new SseParser();
  return chunks.flatMap((chunk) => parser.feed(typeof chunk === "string" ? bytes(chunk) : chunk));
}

/** A response whose body arrives in these chunks. */
function answer(chunks, { status = 200, type = "text/event-stream", headers = {} } = {}) {
  const body = new ReadableStream({
    start(controller) {
      for (const chunk of chunks) controller.enqueue(bytes(chunk));
      controller.close();
    },
  });
  return async () => new Response(body, { status, headers: { "Content-Type": type, ...headers } });
}

async function follow(fetch, on = {}, signal) {
  const seen = [];
  const errors = [];
  const end = await readStream("/events", {
    fetch,
    signal,
    report: (error) => errors.push(error),
    on: { event: (name, value) => seen.push([name, value]), ...on },
  });
  return { end, seen, errors };
}

test("A35 frames separated by LF LF, CR LF CR LF, CR CR and mixtures are read alike", () => {
  for (const gap of ["\n\n", "\r\n\r\n", "\r\r", "\r\n\n", "\n\r\n", "\r\n\r", "\n\r"]) {
    const line = gap.startsWith("\r\n") ? "\r\n" : gap[0];
    const events = read(`event: a${line}data: 1${gap}event: b${line}data: 2${gap}`);
    assert.deepEqual(events.map((event) => [event.name, event.data]), [["a", "1"], ["b", "2"]], JSON.stringify(gap));
  }
});

test("A36 several data lines of one frame are joined with LF", () => {
  assert.equal(read("data: one\ndata:\ndata: three\n\n")[0].data, "one\n\nthree");
});

test("A37 chunk borders anywhere change nothing, in every possible cut into two and byte by byte", () => {
  const whole = bytes('\ufeffevent: tür\r\ndata: {"é":"€ 🎈"}\r\n\r\nevent: b\rdata: 2\r\rdata: x\ndata: y\n\n');
  const expected = read(whole);
  assert.deepEqual(expected.map((event) => [event.name, event.data]), [["tür", '{"é":"€ 🎈"}'], ["b", "2"], ["message", "x\ny"]]);
  for (let cut = 0; cut <= whole.length; cut++) {
    assert.deepEqual(read(whole.slice(0, cut), whole.slice(cut)), expected, `cut at ${cut}`);
  }
  assert.deepEqual(read(...Array.from(whole, (byte) => Uint8Array.of(byte))), expected);
});

test("A38 comment lines give no event but every chunk counts as alive", async () => {
  assert.deepEqual(read(": nothing\n\n:\n\n"), []);
  let alive = 0;
  const { seen } = await follow(answer([": ping\n\n", ": ping\n\n"]), { alive: () => alive++ });
  assert.deepEqual([alive, seen], [2, []]);
});

test("A39 data without the blank, a BOM, id and retry, a line without colon follow the specification", () => {
  const parser = new SseParser();
  const events = parser.feed(bytes("\ufeffdata:x\n\nid: 7\nretry: 250\ndata:  two blanks\nunknown: 1\n\ndata\n\nid: a\0b\nretry: 1s\ndata: z\n\n"));
  assert.deepEqual(events, [
    { name: "message", data: "x", id: "" },
    { name: "message", data: " two blanks", id: "7" },
    { name: "message", data: "", id: "7" },
    { name: "message", data: "z", id: "7" },
  ]);
  assert.equal(parser.retry, 250);
});

test("A39 an event without data is not dispatched and its name does not leak into the next", () => {
  assert.deepEqual(read("event: lonely\n\ndata: 1\n\n").map((event) => event.name), ["message"]);
});

test("A40 malformed JSON in one frame is skipped and the stream goes on", async () => {
  const { seen, end } = await follow(answer(["event: a\ndata: {broken\n\n", 'event: b\ndata: {"n":1}\n\n']));
  assert.deepEqual(seen, [["b", { n: 1 }]]);
  assert.equal(end.kind, "closed");
  assert.equal(parseJson("{"), undefined);
});

test("A40 an exception of the handler is reported as its own and does not stop the stream", async () => {
  let calls = 0;
  const { errors, end } = await follow(answer(["data: 1\n\ndata: 2\n\n"]), {
    event() {
      calls++;
      throw new Error("of the application");
    },
  });
  assert.equal(calls, 2);
  assert.deepEqual(errors.map((error) => error.message), ["of the application", "of the application"]);
  assert.equal(end.kind, "closed");
});

test("A41 a 200 with another content type, or without a body, is an error and nothing of it is read", async () => {
  for (const type of ["text/html", "application/json", "text/event-streams"]) {
    const { end, seen } = await follow(answer(["data: 1\n\n"], { type }));
    assert.deepEqual([end.kind, seen], ["wrong_type", []], type);
  }
  const empty = async () => new Response(null, { status: 200, headers: { "Content-Type": "text/event-stream" } });
  assert.equal((await follow(empty)).end.kind, "wrong_type");
  assert.equal((await follow(answer(["data: 1\n\n"], { type: "Text/Event-Stream; charset=utf-8" }))).seen.length, 1);
});

test("A42 closing by the page itself is silent: it ends as aborted, before and while reading", async () => {
  const early = new AbortController();
  early.abort();
  const refuse = async () => {
    throw new DOMException("aborted", "AbortError");
  };
  assert.equal((await follow(refuse, {}, early.signal)).end.kind, "aborted");

  const control = new AbortController();
  const { end, seen } = await follow(answer(["data: 1\n\ndata: 2\n\n", "data: 3\n\n"]), {
    event: () => control.abort(),
  }, control.signal);
  assert.deepEqual([end.kind, seen], ["aborted", []]);
});

test("A43 an unfinished frame at the end of the stream is discarded", async () => {
  const { seen, end } = await follow(answer(["data: 1\n\ndata: 2\n"]));
  assert.deepEqual([seen, end.kind], [[["message", 1]], "closed"]);
});

test("A16 a refusal is told with its status, and with the wait that the server asks for", async () => {
  assert.deepEqual((await follow(answer(["{}"], { status: 410 }))).end, { kind: "refused", status: 410, retryAfter: 0 });
  const busy = answer(["{}"], { status: 503, headers: { "Retry-After": "7" } });
  assert.deepEqual((await follow(busy)).end, { kind: "refused", status: 503, retryAfter: 7000 });
});

test("A20 a fault of the network is told as one", async () => {
  const down = async () => {
    throw new TypeError("fetch failed");
  };
  assert.equal((await follow(down)).end.kind, "network");
});
