import assert from "node:assert/strict";
import { test } from "node:test";

import { KEPT, Screen, bytesOf, palette } from "../../project/static/js/screen.js";
import { Terminal } from "../../project/static/vendor/xterm-headless-6.0.0.mjs";

const encode = (text) => new TextEncoder().encode(text);
const text = (line) => line.runs.map((run) => run.text).join("");
const texts = (lines) => lines.map(text);

async function shown(...parts) {
  const screen = new Screen(Terminal);
  for (const part of parts) await screen.feed(typeof part === "string" ? encode(part) : part);
  return screen;
}

test("lines come out as they were written, and only those that can still change come again", async () => {
  const screen = await shown("one\r\ntwo\r\n");
  let { settled, screen: open } = screen.take();
  assert.deepEqual(texts(settled), []);
  assert.deepEqual(texts(open), ["one", "two", ""]);
  await screen.feed(encode(Array.from({ length: 30 }, (_, n) => `line ${n}\r\n`).join("")));
  ({ settled, screen: open } = screen.take());
  assert.deepEqual(texts(settled).slice(0, 3), ["one", "two", "line 0"]);
  assert.equal(settled.length + open.length, 33);
  ({ settled, screen: open } = screen.take());
  assert.equal(settled.length, 0);
  assert.equal(open.length, 24);
});

test("each line knows the offset of its first byte, in bytes and not in characters", async () => {
  const written = "größe\r\nzwei\r\n\r\nvier\r\n";
  const screen = await shown(written);
  const lines = screen.take().screen;
  const bytes = encode(written);
  assert.equal(screen.end, bytes.length);
  const found = lines.slice(0, 4).map(({ at }) => new TextDecoder().decode(bytes.subarray(at)).split("\r\n")[0]);
  assert.deepEqual(found, ["größe", "zwei", "", "vier"]);
});

test("colours of 16, of 256 and of 24 bits, and the other styles", async () => {
  const screen = await shown("\x1b[1;31mred\x1b[0m \x1b[38;5;208morange\x1b[0m \x1b[48;2;1;2;3mdeep\x1b[0m \x1b[4mline\x1b[24;7minverse\x1b[0m\x1b[2;3;9mx");
  const [line] = screen.take().screen;
  const styles = line.runs.filter(({ style }) => style).map((run) => [run.text, run.style]);
  assert.deepEqual(styles, [
    ["red", { fg: 1, bold: true }],
    ["orange", { fg: "#ff8700" }],
    ["deep", { bg: "#010203" }],
    ["line", { underline: true }],
    ["inverse", { fg: "back", bg: "front" }],
    ["x", { dim: true, italic: true, strike: true }],
  ]);
  assert.deepEqual([palette(9), palette(16), palette(231), palette(232), palette(255)], [9, "#000000", "#ffffff", "#080808", "#eeeeee"]);
});

test("a progress bar is one line: carriage return, backspace and erasing to the end of the line", async () => {
  const screen = await shown("10 %\r50 %\r100 % done\b\b\b\bover\x1b[K\r\nnext");
  assert.deepEqual(texts(screen.take().screen), ["100 % over", "next"]);
});

test("characters and escape sequences that are cut between two parts are whole again", async () => {
  const bytes = encode("\x1b[32mgrün 漢字 🙂\x1b[0m ok");
  const screen = await shown(...Array.from(bytes, (byte) => Uint8Array.of(byte)));
  const [line] = screen.take().screen;
  assert.equal(text(line), "grün 漢字 🙂 ok");
  assert.equal(line.runs[0].style.fg, 2);
});

test("bytes that are no UTF-8 do no harm", async () => {
  const screen = await shown(Uint8Array.of(0xff, 0xfe, 0x41, 0xc3), "\r\nafter\r\n");
  assert.equal(text(screen.take().screen[1]), "after");
});

test("a line that is wider than the terminal is one line", async () => {
  const screen = await shown(`${"x".repeat(200)}\r\nshort\r\n`);
  assert.deepEqual(texts(screen.take().screen).map((each) => each.length), [200, 5, 0]);
});

test("a line without an end is shown in pieces", async () => {
  const screen = await shown("y".repeat(80 * 250));
  const { settled, screen: open } = screen.take();
  const all = [...settled, ...open];
  assert.equal(all.map(text).join("").length, 80 * 250);
  assert.ok(all.length >= 3 && all[0].more);
});

test("of more rows than are kept the newest are there, and what was lost is counted", async () => {
  const screen = new Screen(Terminal);
  const lines = Array.from({ length: 3 * KEPT }, (_, n) => `line ${n}\r\n`);
  await screen.feed(encode(lines.join("")));
  const { settled, screen: open, lost } = screen.take();
  const all = [...settled, ...open];
  assert.equal(lost + all.length, 3 * KEPT + 1);
  assert.equal(text(all.at(-2)), `line ${3 * KEPT - 1}`);
  assert.equal(text(all[0]), `line ${lost}`);
  assert.equal(all[0].at, encode(lines.slice(0, lost).join("")).length);
  await screen.feed(encode("more\r\n"));
  const after = screen.take();
  assert.equal(after.lost, 0);
  assert.equal(after.settled.length, 1);
});

test("a program that takes the whole screen is shown beside the output, which is there again when it leaves", async () => {
  const screen = await shown("before\r\n\x1b[?1049h\x1b[2J\x1b[HFULL\x1b[5;3Hthere");
  let taken = screen.take();
  assert.equal(taken.full.length, 24);
  assert.equal(text(taken.full[0]), "FULL");
  assert.equal(text(taken.full[4]), "  there");
  assert.deepEqual(taken.cursor, { line: 4, column: 7 });
  assert.deepEqual(texts(taken.screen).filter(Boolean), ["before"]);
  await screen.feed(encode("\x1b[?1049lafter\r\n"));
  taken = screen.take();
  assert.equal(taken.full, null);
  assert.deepEqual(texts(taken.screen), ["before", "after", ""]);
});

test("a program that erases its history does not erase what was read", async () => {
  const screen = new Screen(Terminal);
  await screen.feed(encode(Array.from({ length: 100 }, (_, n) => `old ${n}\r\n`).join("")));
  const before = screen.take();
  assert.equal(before.settled.length, 77);
  await screen.feed(encode("\x1b[H\x1b[2J\x1b[3Jnew\r\n"));
  const after = screen.take();
  assert.equal(after.settled.length, 0);
  assert.deepEqual(texts(after.screen), ["new", ""]);
  await screen.feed(encode(Array.from({ length: 40 }, (_, n) => `again ${n}\r\n`).join("")));
  const later = screen.take();
  assert.deepEqual([...texts(later.settled), ...texts(later.screen)].slice(0, 2), ["new", "again 0"]);
  assert.equal(later.settled.length + later.screen.length, 42);
});

test("the cursor is where the program waits", async () => {
  const screen = await shown("Proceed? (y/n) ");
  assert.deepEqual(screen.take().cursor, { line: 0, column: 15 });
});

test("base64 of any bytes", () => {
  const bytes = Uint8Array.from({ length: 256 }, (_, n) => n);
  assert.deepEqual(bytesOf(Buffer.from(bytes).toString("base64")), bytes);
});
