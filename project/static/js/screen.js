// What a program wrote to its terminal, as lines to read: bytes go through a terminal emulator (@xterm/headless), its buffer comes out as lines
// of styled text. No DOM in here: task.js shows it.

/** As many rows are kept above the screen; what is older is asked for by its offset. */
export const KEPT = 5_000;
/** A line that the program never ended is shown in pieces of so many rows. */
const LONGEST = 100;
const PIECE = 4_096;
const LINE_FEED = 10;

/**
 * @typedef {object} Style any of: bold, dim, italic, underline, strike, hidden; `fg`, `bg`: 0 to 15, or "#rrggbb"
 * @typedef {{text: string, style: Style | null}} Run
 * @typedef {{at: number | null, runs: Run[], more: boolean, key: string}} Line `at`: the offset of its first byte, where that is known; `more`: the next
 *   line goes on with it; `key`: equal for lines that look the same
 */

const CUBE = [0, 95, 135, 175, 215, 255];
const hex = (number) => `#${number.toString(16).padStart(6, "0")}`;

/** A colour of the palette of 256: the first 16 are the reader's, the others are what they are. */
export function palette(index) {
  if (index < 16) return index;
  if (index >= 232) return hex((8 + (index - 232) * 10) * 0x010101);
  const at = index - 16;
  return hex((CUBE[Math.floor(at / 36)] << 16) | (CUBE[Math.floor(at / 6) % 6] << 8) | CUBE[at % 6]);
}

function colour(isDefault, isRGB, value) {
  if (isDefault) return null;
  return isRGB ? hex(value) : palette(value);
}

function styleOf(cell) {
  if (cell.isAttributeDefault()) return null;
  let fg = colour(cell.isFgDefault(), cell.isFgRGB(), cell.getFgColor());
  let bg = colour(cell.isBgDefault(), cell.isBgRGB(), cell.getBgColor());
  if (cell.isInverse()) [fg, bg] = [bg ?? "back", fg ?? "front"];
  const flags = {
    bold: cell.isBold(), dim: cell.isDim(), italic: cell.isItalic(), underline: cell.isUnderline(), strike: cell.isStrikethrough(), hidden: cell.isInvisible(),
  };
  const style = { ...(fg !== null && { fg }), ...(bg !== null && { bg }) };
  for (const [name, on] of Object.entries(flags)) if (on) style[name] = true;
  return Object.keys(style).length ? style : null;
}

export class Screen {
  #terminal;
  #cell;
  #end = 0; // the offset after the last byte that was fed
  #base = 0; // the number of the buffer's first row, counted from the first row that there ever was
  #mark = null; // a marker and the number of its row: it moves when rows leave the buffer
  #done = 0; // the number of the first row that was not handed out as settled
  #offsets = new Map(); // number of a row → offset of its first byte
  #fed = Promise.resolve();

  /** @param {typeof import("../vendor/xterm-headless-6.0.0.mjs").Terminal} Terminal */
  constructor(Terminal, { rows = 24, cols = 80, at = 0, kept = KEPT } = {}) {
    this.#terminal = new Terminal({ rows, cols, scrollback: kept, allowProposedApi: true, logLevel: "off" });
    this.#cell = this.#terminal.buffer.normal.getNullCell();
    this.#end = at;
    this.#offsets.set(0, at);
  }

  /** The offset after the last byte that was fed. */
  get end() {
    return this.#end;
  }

  /** Whether a program has the whole screen (`less`, `vim`): then what it shows is no part of the output above it. */
  get full() {
    return this.#terminal.buffer.active.type === "alternate";
  }

  /** @param {Uint8Array} bytes @returns {Promise<void>} when the screen shows them */
  feed(bytes) {
    let last = this.#fed;
    for (let start = 0; start < bytes.length; ) {
      const feed = bytes.indexOf(LINE_FEED, start);
      const end = Math.min(feed < 0 ? bytes.length : feed + 1, start + PIECE);
      this.#end += end - start;
      const at = this.#end;
      const piece = bytes.subarray(start, end);
      last = new Promise((resolve) => this.#terminal.write(piece, () => resolve(this.#wrote(at))));
      start = end;
    }
    this.#fed = last;
    return last;
  }

  #wrote(at) {
    const buffer = this.#terminal.buffer.normal;
    if (this.#mark) {
      // The program erased what is above its screen: what was read of it stays read.
      if (this.#mark.marker.isDisposed) this.#base = Math.max(this.#base, this.#done);
      else this.#base = this.#mark.row - this.#mark.marker.line;
    }
    if (this.full) return;
    if (buffer.baseY && (!this.#mark || this.#mark.marker.isDisposed || this.#mark.marker.line < buffer.baseY / 2)) {
      this.#mark?.marker.dispose();
      const marker = this.#terminal.registerMarker(-buffer.cursorY - 1);
      this.#mark = marker && { marker, row: this.#base + marker.line };
    }
    const row = this.#base + buffer.baseY + buffer.cursorY;
    if (!buffer.cursorX && !this.#offsets.has(row)) this.#offsets.set(row, at);
    if (this.#offsets.size > 4 * KEPT) for (const each of [...this.#offsets.keys()].slice(0, KEPT)) this.#offsets.delete(each);
  }

  /**
   * What is new since the last time.
   *
   * @returns {{settled: Line[], screen: Line[], full: Line[] | null, cursor: {line: number, column: number} | null, lost: number}}
   *   `settled`: lines that do not change any more; `screen`: those below them, which may; `full`: of a program that has the whole screen; `cursor`:
   *   where it is in `screen` or `full`; `lost`: rows that came and went between two looks
   */
  take() {
    const buffer = this.#terminal.buffer.normal;
    const top = this.#base + buffer.baseY;
    const first = Math.max(this.#done, this.#base);
    const lost = first - this.#done;
    const cursorRow = top + buffer.cursorY;
    let last = top + this.#terminal.rows - 1;
    while (last > cursorRow && !buffer.getLine(last - this.#base)?.translateToString(true)) last -= 1;
    const settled = [];
    const screen = [];
    let cursor = null;
    for (let row = first; row <= last; ) {
      let next = row + 1;
      while (next <= last && next - row < LONGEST && buffer.getLine(next - this.#base)?.isWrapped) next += 1;
      const line = this.#line(buffer, row, next);
      if (next <= top && !screen.length) {
        settled.push(line);
        this.#done = next;
      } else {
        if (cursorRow >= row && cursorRow < next) cursor = { line: screen.length, column: (cursorRow - row) * this.#terminal.cols + buffer.cursorX };
        screen.push(line);
      }
      row = next;
    }
    const full = this.full ? this.#whole() : null;
    const active = this.#terminal.buffer.active;
    if (full) cursor = { line: active.cursorY, column: active.cursorX };
    return { settled, screen, full, cursor, lost };
  }

  #whole() {
    const buffer = this.#terminal.buffer.alternate;
    return Array.from({ length: this.#terminal.rows }, (_, row) => this.#line(buffer, row, row + 1, 0));
  }

  /** Rows `from` to `to` (numbers; the latter not included) as one line. */
  #line(buffer, from, to, base = this.#base) {
    const runs = [];
    let key = null;
    for (let row = from; row < to; row += 1) {
      const found = buffer.getLine(row - base);
      if (!found) continue;
      // Blanks that nobody wrote are not part of the text; a row that goes on in the next one is full.
      const goesOn = row + 1 < to;
      const width = goesOn ? found.length : this.#width(found);
      for (let x = 0; x < width; x += 1) {
        const cell = found.getCell(x, this.#cell);
        if (!cell.getWidth()) continue; // the second half of a wide character
        const style = styleOf(cell);
        const now = style ? JSON.stringify(style) : "";
        if (now !== key) runs.push({ text: "", style });
        key = now;
        runs.at(-1).text += cell.getChars() || " ";
      }
    }
    const following = buffer.getLine(to - base);
    const more = to - from >= LONGEST && Boolean(following?.isWrapped);
    const at = (buffer.type === "normal" && this.#offsets.get(from)) ?? null;
    return { at: at === false ? null : at, runs, more, key: JSON.stringify(runs) };
  }

  /** Up to the last cell that holds a character or has a background. */
  #width(line) {
    let width = line.length;
    while (width) {
      const cell = line.getCell(width - 1, this.#cell);
      if (cell.getChars().trim() || !cell.isBgDefault() || cell.isInverse() || cell.isUnderline()) break;
      width -= 1;
    }
    // A wide character has its width in the cell before.
    return Math.min(line.length, width);
  }

  dispose() {
    this.#terminal.dispose();
  }
}

/** Base64 to bytes. */
export function bytesOf(base64) {
  const text = atob(base64);
  const bytes = new Uint8Array(text.length);
  for (let at = 0; at < text.length; at += 1) bytes[at] = text.charCodeAt(at);
  return bytes;
}
