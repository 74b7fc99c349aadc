/**
 * What the hosted page decides, as one pure function: (state, action) → [state, effects]. No DOM, no clock, no network; login.js carries
 * the effects out. Tested row by row in tests/js/login-state.test.mjs.
 *
 * A *card* is `{version, flow, status, step, interaction, outcome, code, message, html}`: one state of the flow as the server drew it.
 * The version only grows, so of two cards the newer is known, wherever they came from.
 */

export const END = new Set(["SUCCESS", "FAILED", "EXPIRED", "CANCELED"]);
export const RETRIES = 3;
export const NEWS_MS = { DISCOVERING: 15_000, SUBMITTING: 20_000 };
export const TEXTS = {
  retrying: (attempt) => `Not delivered yet. Trying again (${attempt} of ${RETRIES})…`,
  unconfirmed: "We could not confirm that this arrived. Sending it again is safe.",
  incomplete: "This page is not complete. Please reload it.",
  ended: "This link has ended.",
  offline: "You are offline. This will be sent when you are back.",
};

/** Answers that mean: this session is over, whatever was being done. */
const isOver = (status) => status === 401 || status === 403 || status === 404 || status === 410;
const isPassing = (status) => status === 0 || status === 408 || status === 429 || status >= 500;

/** @param {object|null} card what the page shows already; null while it shows PRIME */
export function initial(card = null) {
  return {
    started: card !== null, // the code is exchanged, there is a state to show
    primed: card !== null, // the visitor has pressed Continue
    early: false, // … before there was anything to show
    card, // the newest that is known
    version: card?.version ?? 0,
    flow: card?.flow ?? null,
    shown: card, // what is on the page
    pending: null, // {interaction, key, attempt}: an answer on its way
    answered: [], // interactions whose answer the server has
    key: null, // {interaction, key}: of an answer that may have arrived, for sending it again unchanged
    over: null, // the outcome, once and for all
    stream: "off", // off | connecting | open | waiting
    connects: 0,
    failures: 0, // since the last event
    events: 0,
    snapshot: null, // {events, failures}: a GET on its way, and how many events had come when it left
    resync: false, // a GET was not applied because an answer was on its way: ask again
  };
}

/** Delay before the n-th attempt in a row: 1 s … 15 s, spread so that many pages do not come back at once. */
export function backoff(failures, random = Math.random) {
  return Math.round(Math.min(15_000, 1000 * 2 ** (failures - 1) * (1 + 0.3 * random())));
}

export function reduce(before, action, random = Math.random) {
  if (before.over) return [before, []]; // terminal is final
  const state = { ...before, answered: [...before.answered] };
  const effects = [];
  ACTIONS[action.type](state, action, effects, random);
  return [state, effects];
}

const ACTIONS = {
  // ── the start ──
  started(state, { card }, effects) {
    state.started = true;
    connect(state, effects, 0);
    effects.push({ type: "ready" });
    if (state.early) state.primed = true;
    apply(state, card, effects);
  },
  refused(state, { status, card }, effects) {
    if (!card || card.outcome || status !== 404) expire(state, effects);
    else {
      state.over = { outcome: "missing" };
      effects.push({ type: "render", card, focus: true });
    }
  },
  continue(state, _, effects) {
    if (!state.started) {
      state.early = true;
      effects.push({ type: "patience" });
    } else if (!state.primed) {
      state.primed = true;
      show(state, state.card, effects);
    }
  },

  // ── the stream ──
  resume(state, _, effects) {
    connect(state, effects, 0);
  },
  wake(state, _, effects) {
    if (state.stream === "waiting") connect(state, effects, 0);
  },
  opened(state, _, effects) {
    state.stream = "open";
    state.connects += 1;
    // After a gap: the new stream first, then one look, so that nothing falls between them.
    if (state.connects > 1) look(state, effects);
  },
  event(state, { card }, effects) {
    alive(state, effects);
    state.events += 1;
    apply(state, card, effects);
  },
  heartbeat(state, _, effects) {
    alive(state, effects);
  },
  fatal(state, { code, message }, effects) {
    end(state, { outcome: "error", code: code || "internal_error", message }, effects);
    effects.push({ type: "template", name: "fatal", code, message });
    callback(state, effects);
  },
  ended(state, { kind, status, retryAfter }, effects, random) {
    if (kind === "aborted") return;
    if (kind === "refused" && isOver(status)) return expire(state, effects);
    state.failures += 1;
    const delay = Math.max(backoff(state.failures, random), retryAfter ?? 0);
    connect(state, effects, delay);
    effects.push({ type: "reconnecting", on: true });
    // No stream gets through at all: the page still learns what happens, at the pace of the attempts.
    if (state.failures > 1) look(state, effects);
  },

  // ── a look at the state ──
  quiet(state, _, effects) {
    if (state.shown?.step === "SUBMITTING" || state.shown?.step === "DISCOVERING") {
      effects.push({ type: "slow" });
    }
    look(state, effects);
  },
  look(state, _, effects) {
    look(state, effects);
  },
  snapshot(state, { card }, effects) {
    const asked = state.snapshot;
    state.snapshot = null;
    if (state.pending) state.resync = true;
    else if (asked && asked.events !== state.events) look(state, effects);
    else apply(state, card, effects);
  },
  snapshot_failed(state, { status, retryAfter }, effects, random) {
    const asked = state.snapshot;
    state.snapshot = null;
    if (state.pending) {
      state.resync = true;
      return;
    }
    if (isOver(status)) return expire(state, effects);
    // An event that came meanwhile said what the look was for.
    if (asked && asked.events !== state.events) return;
    const failures = (asked?.failures ?? 0) + 1;
    state.snapshot = { events: state.events, failures };
    effects.push({ type: "get", delay: Math.max(backoff(failures, random), retryAfter ?? 0) });
  },

  // ── the answer ──
  submit(state, { interaction, key }, effects) {
    if (state.pending) return;
    if (!interaction || interaction !== state.shown?.interaction || state.answered.includes(interaction)) {
      effects.push({ type: "alert", text: TEXTS.incomplete });
      return;
    }
    const again = state.key?.interaction === interaction;
    state.pending = { interaction, key: again ? state.key.key : key, attempt: 0 };
    state.key = null;
    effects.push({ type: "busy" }, { type: "post", delay: 0, ...state.pending });
  },
  edited(state) {
    if (!state.pending) state.key = null;
  },
  accepted(state, { interaction, card }, effects) {
    if (!state.answered.includes(interaction)) state.answered.push(interaction);
    if (state.pending?.interaction === interaction) {
      state.pending = null;
      effects.push({ type: "clear" });
    }
    if (card) apply(state, card, effects);
    if (state.shown?.interaction === interaction) effects.push({ type: "news", delay: NEWS_MS.SUBMITTING });
    settle(state, effects);
  },
  failed(state, { interaction, status, code, message, card, retryAfter, offline }, effects) {
    if (state.pending?.interaction !== interaction) return; // somebody else's, or overtaken by an event
    if (isOver(status) && code !== "csrf_failed") {
      state.pending = null;
      if (card?.outcome) return apply(state, card, effects);
      return expire(state, effects);
    }
    if (isPassing(status) && state.pending.attempt < RETRIES) {
      const attempt = offline ? state.pending.attempt : state.pending.attempt + 1;
      state.pending = { ...state.pending, attempt };
      const delay = Math.max(1000 * 2 ** Math.max(attempt - 1, 0), retryAfter ?? 0);
      effects.push(
        { type: "alert", text: offline ? TEXTS.offline : TEXTS.retrying(attempt) },
        { type: "post", delay, ...state.pending },
      );
      return;
    }
    const { key } = state.pending;
    state.pending = null;
    if (code === "stale_interaction") {
      state.answered.push(interaction);
      if (card) apply(state, card, effects);
      else look(state, effects);
      effects.push({ type: "alert", text: message });
    } else {
      if (isPassing(status)) state.key = { interaction, key };
      if (state.card?.interaction === interaction) {
        if (state.shown !== state.card) show(state, state.card, effects);
        effects.push({ type: "release" });
      }
      effects.push({ type: "alert", text: isPassing(status) ? TEXTS.unconfirmed : message, focus: true });
    }
    settle(state, effects);
  },
};

function alive(state, effects) {
  state.failures = 0;
  effects.push({ type: "reconnecting", on: false });
}

function connect(state, effects, delay) {
  state.stream = delay ? "waiting" : "connecting";
  effects.push({ type: "connect", delay });
}

function look(state, effects) {
  if (state.snapshot) return; // one at a time; it will be newer than this moment, or asked again
  state.snapshot = { events: state.events, failures: 0 };
  effects.push({ type: "get", delay: 0 });
}

function settle(state, effects) {
  if (state.over || state.pending || !state.resync) return;
  state.resync = false;
  look(state, effects);
}

/** A card from anywhere: only what is newer counts. */
function apply(state, card, effects) {
  if (state.flow && card.flow && card.flow !== state.flow) return expire(state, effects); // a newer login took its place
  if (card.version <= state.version) return;
  state.version = card.version;
  state.flow = card.flow ?? state.flow;
  state.card = card;
  if (END.has(card.status)) {
    end(state, { outcome: card.outcome, code: card.code, message: card.message, flow: state.flow }, effects);
    effects.push({ type: "render", card, focus: true });
    state.shown = card;
    return callback(state, effects);
  }
  if (card.interaction && state.answered.includes(card.interaction)) return; // never an answered form again
  if (state.pending) {
    if (card.interaction === state.pending.interaction) return; // kept in state.card until the answer is decided
    state.pending = null;
    effects.push({ type: "abort_post" });
  }
  if (state.primed) show(state, card, effects);
  settle(state, effects);
}

function show(state, card, effects) {
  state.shown = card;
  effects.push({ type: "render", card, focus: true });
  if (NEWS_MS[card.step]) effects.push({ type: "news", delay: NEWS_MS[card.step] });
}

function expire(state, effects) {
  end(state, { outcome: "error", code: "session_expired", message: TEXTS.ended }, effects);
  effects.push({ type: "template", name: "expired" });
  callback(state, effects);
}

function end(state, over, effects) {
  state.over = over;
  state.pending = null;
  state.stream = "off";
  effects.push({ type: "stop" }, { type: "reconnecting", on: false });
}

/** Pushed on the way into `over`, and nothing leads out of `over`: therefore once. */
function callback(state, effects) {
  effects.push({ type: "callback", ...state.over });
}
