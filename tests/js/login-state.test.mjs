import assert from "node:assert/strict";
import { test } from "node:test";

import { TEXTS, backoff, initial, reduce } from "../../project/static/js/login-state.js";

const noJitter = () => 0;

function card(version, step, more = {}) {
  const interaction = step === "AWAITING_INPUT" ? `mai_${version}` : "";
  return { version, flow: "flow_1", status: "IN_PROGRESS", step, interaction, html: `<p>${version}</p>`, ...more };
}
const form = (version, more) => card(version, "AWAITING_INPUT", more);
const end = (version, status, more) =>
  card(version, "COMPLETED", { status, outcome: status === "SUCCESS" ? "success" : "error", ...more });

/** A page: state, and everything that was to be done so far. */
function page(first = form(5)) {
  return {
    state: initial(first),
    effects: [],
    do(type, more = {}) {
      const [state, effects] = reduce(this.state, { type, ...more }, noJitter);
      this.state = state;
      this.effects.push(...effects);
      this.last = effects;
      return this;
    },
    of(type) {
      return this.effects.filter((effect) => effect.type === type);
    },
    submit(key = "key-1") {
      return this.do("submit", { interaction: this.state.shown.interaction, key });
    },
    rendered() {
      return this.of("render").map((effect) => effect.card.version);
    },
  };
}

test("A06 submitting is shown at once and no look at the state is asked for", () => {
  const it = page().submit();
  assert.deepEqual(it.last.map((effect) => effect.type), ["busy", "post"]);
  assert.equal(it.state.pending.interaction, "mai_5");
  assert.equal(it.of("get").length, 0);
});

test("A06 a second in SUBMITTING is ended by the server's next version alone", () => {
  const it = page().submit().do("accepted", { interaction: "mai_5", card: card(6, "SUBMITTING") });
  assert.deepEqual(it.rendered(), [6]);
  it.do("event", { card: form(8) });
  assert.deepEqual(it.rendered(), [6, 8]);
  assert.equal(it.of("clear").length, 1);
});

test("A07 while the answer is on its way no GET takes the page out of submitting, whatever it says", () => {
  const it = page().do("look").submit();
  it.do("snapshot", { card: form(9) });
  assert.notEqual(it.state.pending, null);
  assert.deepEqual(it.rendered(), []);
  it.do("snapshot_failed", { status: 410 });
  assert.equal(it.state.over, null);
  // What it left unsaid is asked for again afterwards.
  it.do("accepted", { interaction: "mai_5", card: card(6, "SUBMITTING") });
  assert.equal(it.of("get").length, 2);
});

test("A08 an answered form is never shown again, by a GET, an event or a replay", () => {
  const it = page().submit().do("accepted", { interaction: "mai_5", card: card(6, "SUBMITTING") });
  it.do("ended", { kind: "network" }).do("opened").do("event", { card: form(5) });
  it.do("look").do("snapshot", { card: form(5) });
  it.do("event", { card: form(7, { interaction: "mai_5" }) });
  assert.deepEqual(it.rendered(), [6]);
  it.do("event", { card: form(8) });
  assert.deepEqual(it.rendered(), [6, 8]);
});

test("A08 an event that redraws the question on its way is kept, and shown only when the answer failed", () => {
  const it = page().submit().do("event", { card: form(6, { interaction: "mai_5" }) });
  assert.deepEqual(it.rendered(), []);
  it.do("failed", { interaction: "mai_5", status: 422, message: "No." });
  assert.deepEqual(it.rendered(), [6]);
  assert.equal(it.of("release").length, 1);
});

test("A12 success calls back exactly once, stops everything, and nothing happens after it", () => {
  const it = page(card(5, "SUBMITTING")).do("event", { card: end(6, "SUCCESS") });
  assert.deepEqual(it.of("callback"), [{ type: "callback", outcome: "success", code: undefined, message: undefined, flow: "flow_1" }]);
  assert.equal(it.of("stop").length, 1);
  const before = it.effects.length;
  it.do("event", { card: end(7, "FAILED") }).do("ended", { kind: "closed" }).do("wake").do("look").do("quiet");
  assert.equal(it.effects.length, before);
});

test("A13 a failure calls back once with its code and message", () => {
  for (const status of ["FAILED", "CANCELED", "EXPIRED"]) {
    const it = page().do("event", { card: end(6, status, { code: "network_error", message: "Down." }) });
    const [called, ...more] = it.of("callback");
    assert.deepEqual([called.outcome, called.code, called.message, more.length], ["error", "network_error", "Down.", 0]);
  }
});

test("A14 after the end a late 410, a late event and a late answer change nothing", () => {
  const it = page().submit().do("event", { card: end(7, "SUCCESS") });
  const { over } = it.state;
  const before = it.effects.length;
  it.do("snapshot_failed", { status: 410 })
    .do("event", { card: form(8) })
    .do("failed", { interaction: "mai_5", status: 410 })
    .do("accepted", { interaction: "mai_5", card: card(9, "SUBMITTING") })
    .do("fatal", { code: "x" });
  assert.equal(it.state.over, over);
  assert.equal(over.outcome, "success");
  assert.equal(it.effects.length, before);
});

test("A15 the close after the end is normal: no reconnect", () => {
  const it = page().do("event", { card: end(6, "SUCCESS") }).do("ended", { kind: "closed" });
  assert.equal(it.of("connect").length, 0);
});

test("A16 401 and 410 on opening the stream end the session, once, without a reconnect", () => {
  for (const status of [401, 403, 404, 410]) {
    const it = page().do("ended", { kind: "refused", status }).do("ended", { kind: "refused", status });
    assert.deepEqual(it.of("template"), [{ type: "template", name: "expired" }]);
    assert.equal(it.of("callback").length, 1);
    assert.equal(it.of("connect").length, 0);
  }
});

test("A17 401 and 410 on the GET after a reconnect end the session likewise", () => {
  for (const status of [401, 410]) {
    const it = page().do("look").do("snapshot_failed", { status });
    assert.equal(it.of("template")[0].name, "expired");
    assert.equal(it.of("callback").length, 1);
  }
});

test("A18 401 and 410 on submit end the session, or show the end that the answer brings", () => {
  const it = page().submit().do("failed", { interaction: "mai_5", status: 401 });
  assert.equal(it.of("template")[0].name, "expired");
  const ended = page().submit().do("failed", { interaction: "mai_5", status: 410, card: end(9, "SUCCESS") });
  assert.deepEqual([ended.state.over.outcome, ended.of("template").length], ["success", 0]);
});

test("A19 an error event is fatal: error card, reader stopped, one callback, no reconnect", () => {
  const it = page().do("fatal", { code: "internal_error", message: "Broken." }).do("ended", { kind: "closed" });
  assert.deepEqual(it.effects.map((effect) => effect.type), ["stop", "reconnecting", "template", "callback"]);
});

test("A20 a drop reconnects after 1 s, 2 s, 4 s … 15 s, with jitter, and shows it", () => {
  const it = page();
  for (let n = 0; n < 6; n++) it.do("ended", { kind: "network" });
  assert.deepEqual(it.of("connect").map((effect) => effect.delay), [1000, 2000, 4000, 8000, 15_000, 15_000]);
  assert.ok(it.of("reconnecting").every((effect) => effect.on));
  assert.equal(backoff(1, () => 1), 1300);
  assert.equal(backoff(9, () => 1), 15_000);
});

test("A20 a server that names a time is not asked sooner", () => {
  assert.equal(page().do("ended", { kind: "refused", status: 503, retryAfter: 7000 }).of("connect")[0].delay, 7000);
});

test("A21 the delay is reset by an event, not by a mere open", () => {
  const it = page();
  for (let n = 0; n < 3; n++) it.do("opened").do("ended", { kind: "closed" });
  assert.deepEqual(it.of("connect").map((effect) => effect.delay), [1000, 2000, 4000]);
  it.do("opened").do("event", { card: form(5) }).do("ended", { kind: "closed" });
  assert.equal(it.of("connect").at(-1).delay, 1000);
  it.do("opened").do("heartbeat").do("ended", { kind: "closed" });
  assert.equal(it.of("connect").at(-1).delay, 1000);
});

test("A22 after a drop the new stream comes first and one GET after it", () => {
  const it = page().do("resume").do("opened").do("event", { card: form(5) });
  assert.equal(it.of("get").length, 0);
  it.do("ended", { kind: "network" });
  assert.equal(it.of("get").length, 0);
  it.do("opened");
  assert.equal(it.of("get").length, 1);
});

test("A23 an event during a GET wins: the answer of the GET is dropped and asked for again", () => {
  const it = page().do("look").do("event", { card: form(8) }).do("snapshot", { card: form(7) });
  assert.deepEqual(it.rendered(), [8]);
  assert.equal(it.of("get").length, 2);
  it.do("snapshot", { card: form(8) });
  assert.deepEqual(it.rendered(), [8]);
});

test("A23 only a higher version is ever applied", () => {
  const it = page(form(5)).do("event", { card: form(5) }).do("event", { card: form(4) }).do("look").do("snapshot", { card: form(3) });
  assert.deepEqual(it.rendered(), []);
});

test("A24 a failing GET is tried again with growing delay and ends nothing; the stream stays", () => {
  const it = page().do("look");
  for (let n = 0; n < 3; n++) it.do("snapshot_failed", { status: n ? 0 : 503 });
  assert.deepEqual(it.of("get").map((effect) => effect.delay), [0, 1000, 2000, 4000]);
  assert.deepEqual([it.state.over, it.of("connect").length, it.of("stop").length], [null, 0, 0]);
  it.do("event", { card: form(8) }).do("snapshot_failed", { status: 503 });
  assert.equal(it.of("get").length, 4); // the event said what it was for
});

test("A26 a newer login ends this page; a late answer of the old one does not bring it back", () => {
  const it = page().submit().do("event", { card: form(9, { flow: "flow_2" }) });
  assert.equal(it.of("template")[0].name, "expired");
  assert.equal(it.state.pending, null);
  it.do("accepted", { interaction: "mai_5", card: card(10, "SUBMITTING") });
  assert.equal(it.state.pending, null);
  assert.deepEqual(it.rendered(), []);
});

test("A28 a stale answer shows the new form and keeps the message", () => {
  const it = page().submit().do("failed", {
    interaction: "mai_5", status: 400, code: "stale_interaction", message: "Asks something else.", card: form(8),
  });
  assert.deepEqual(it.last.map((effect) => effect.type), ["render", "alert"]);
  assert.equal(it.of("alert")[0].text, "Asks something else.");
  assert.deepEqual([it.state.pending, it.state.shown.version], [null, 8]);
});

test("A28 without the new form in the answer the state is asked for", () => {
  const it = page().submit().do("failed", { interaction: "mai_5", status: 400, code: "stale_interaction", message: "x" });
  assert.equal(it.of("get").length, 1);
});

test("A29 an answer without an interaction, or to another than the shown one, is not sent", () => {
  for (const interaction of ["", undefined, "mai_other"]) {
    const it = page().do("submit", { interaction, key: "k" });
    assert.deepEqual(it.effects, [{ type: "alert", text: TEXTS.incomplete }]);
  }
});

test("A30 a double click sends one answer", () => {
  const it = page().submit("key-1").submit("key-2");
  assert.equal(it.of("post").length, 1);
  it.do("accepted", { interaction: "mai_5" }).submit("key-3");
  assert.equal(it.of("post").length, 1);
});

test("A31 whoever waited on PRIME sees the form at once when it is there", () => {
  const it = page(null).do("started", { card: card(3, "DISCOVERING") }).do("event", { card: form(4) });
  assert.deepEqual(it.rendered(), []);
  it.do("continue");
  assert.deepEqual(it.rendered(), [4]);
});

test("A32 an early click is remembered, and honoured when there is something to show", () => {
  const it = page(null).do("continue");
  assert.deepEqual(it.effects, [{ type: "patience" }]);
  it.do("started", { card: form(4) });
  assert.deepEqual(it.rendered(), [4]);
  assert.equal(it.of("ready").length, 1);
});

test("A32 an unknown link shows its card, a used one has ended", () => {
  const missing = page(null).do("refused", { status: 404, card: { version: 0, html: "<p>none</p>" } });
  assert.deepEqual(missing.effects.map((effect) => effect.type), ["render"]);
  const used = page(null).do("refused", { status: 410, card: { version: 0, html: "", outcome: "error" } });
  assert.equal(used.of("template")[0].name, "expired");
});

test("A33 in DISCOVERING 15 s without news ask for the state once", () => {
  const it = page(null).do("started", { card: card(3, "DISCOVERING") }).do("continue");
  assert.equal(it.of("news")[0].delay, 15_000);
  it.do("quiet");
  assert.equal(it.of("get").length, 1);
  it.do("snapshot", { card: card(3, "DISCOVERING") });
  assert.equal(it.of("news").length, 1);
});

test("A34 a GET that ends during a reconnect delay neither shortens nor restarts it", () => {
  const it = page().do("look").do("ended", { kind: "network" });
  it.do("snapshot", { card: form(7) });
  assert.equal(it.of("connect").length, 1);
  it.do("look").do("snapshot_failed", { status: 503 });
  assert.equal(it.of("connect").length, 1);
});

test("A41 a stream that never gets through is tried again while the state is read at the same pace", () => {
  const it = page();
  it.do("ended", { kind: "wrong_type", status: 200 });
  assert.equal(it.of("get").length, 0);
  it.do("ended", { kind: "wrong_type", status: 200 });
  assert.equal(it.of("get").length, 1);
  assert.equal(it.state.over, null);
});

test("A42 closing by the page itself is silent", () => {
  assert.deepEqual(page().do("ended", { kind: "aborted" }).effects, []);
});

test("A44 a refused answer shows its message and gives the form back, with what was typed", () => {
  const it = page().submit().do("failed", { interaction: "mai_5", status: 400, code: "invalid_submission", message: "Fill in." });
  assert.deepEqual(it.of("alert").map((effect) => effect.text), ["Fill in."]);
  assert.equal(it.of("release").length, 1);
  assert.equal(it.of("clear").length, 0);
  it.do("event", { card: form(8) });
  assert.deepEqual(it.rendered(), [8]);
});

test("A44 a failing network is tried three times with the same key after 1, 2, 4 s, then said honestly", () => {
  const it = page().submit("key-1");
  for (let n = 0; n < 4; n++) it.do("failed", { interaction: "mai_5", status: n % 2 ? 503 : 0 });
  assert.deepEqual(it.of("post").map((effect) => [effect.delay, effect.key]), [
    [0, "key-1"], [1000, "key-1"], [2000, "key-1"], [4000, "key-1"],
  ]);
  assert.equal(it.of("alert").at(-1).text, TEXTS.unconfirmed);
  assert.equal(it.of("release").length, 1);
  assert.equal(it.of("clear").length, 0);
});

test("A44 sent again unchanged it has the same key, after an edit a new one", () => {
  const failed = () => {
    const it = page().submit("key-1");
    for (let n = 0; n < 4; n++) it.do("failed", { interaction: "mai_5", status: 0 });
    return it;
  };
  assert.equal(failed().submit("key-2").of("post").at(-1).key, "key-1");
  assert.equal(failed().do("edited").submit("key-2").of("post").at(-1).key, "key-2");
});

test("A44 attempts are not counted while offline", () => {
  const it = page().submit();
  for (let n = 0; n < 9; n++) it.do("failed", { interaction: "mai_5", status: 0, offline: true });
  assert.equal(it.state.pending.attempt, 0);
  assert.equal(it.of("release").length, 0);
});

test("A44 a 429 is tried again when the server says", () => {
  const it = page().submit().do("failed", { interaction: "mai_5", status: 429, retryAfter: 9000 });
  assert.equal(it.of("post").at(-1).delay, 9000);
});

test("A46 the event after an external action moves on", () => {
  const it = page(card(5, "AWAITING_EXTERNAL_ACTION")).do("event", { card: card(6, "SUBMITTING") }).do("event", { card: end(7, "SUCCESS") });
  assert.deepEqual(it.rendered(), [6, 7]);
});

test("A50 an answer in another tab moves this one out of the form, and stops what it was sending", () => {
  const it = page().do("event", { card: card(6, "SUBMITTING") });
  assert.deepEqual(it.rendered(), [6]);
  const sending = page().submit().do("event", { card: card(6, "SUBMITTING") });
  assert.deepEqual([sending.rendered(), sending.state.pending, sending.of("abort_post").length], [[6], null, 1]);
});

test("A25 what is reduced is never changed in place", () => {
  const before = Object.freeze({ ...initial(form(5)), answered: Object.freeze([]) });
  reduce(before, { type: "submit", interaction: "mai_5", key: "k" });
  reduce(before, { type: "accepted", interaction: "mai_5" });
  assert.equal(before.pending, null);
});
