// The data, numbers as text, and small builders of elements. Every text goes in as text, so that
// no name and no sample can become HTML.

const P = JSON.parse(document.getElementById("data").textContent);
const ROWS = P.rows, COLUMNS = P.columns;
const R = ROWS.length, C = COLUMNS.length;

/** Base64 of little-endian numbers. */
function unpack(text, Type) {
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  return new Type(bytes.buffer);
}

const VALUES = unpack(P.values, Float32Array), ERRORS = unpack(P.stderrs, Float32Array);
const SUPPORT = P.support && unpack(P.support, Uint16Array);
const PAIRS = COLUMNS.map((column) => column.pairs && unpack(column.pairs, Float32Array));
const UNKNOWN = 65535;

const value = (row, column) => VALUES[row * C + column];
const stderr = (row, column) => ERRORS[row * C + column];

/** The place of a pair i < j among all pairs of n, row by row. */
const pairPlace = (i, j, n) => (i * (2 * n - i - 1)) / 2 + j - i - 1;

/** The first row's number less the second's, its standard error, and how that is known. */
function difference(first, second, column) {
  const delta = value(first, column) - value(second, column);
  if (first === second) return { delta: 0, error: 0, paired: true, clear: false };
  const [i, j] = first < second ? [first, second] : [second, first];
  const found = PAIRS[column] ? PAIRS[column][pairPlace(i, j, R)] : NaN;
  const paired = Number.isFinite(found);
  const error = paired ? found : Math.hypot(stderr(first, column), stderr(second, column));
  return { delta, error, paired, clear: Math.abs(delta) > 2 * error };
}

/** The share of bootstrap draws in which a row is on the front of two columns; null: unknown. */
function support(row, x, y) {
  if (!SUPPORT || x === y) return null;
  const count = SUPPORT[pairPlace(Math.min(x, y), Math.max(x, y), C) * R + row];
  return count === UNKNOWN ? null : count / P.draws;
}

/** Better is higher: a value with its column's direction. */
const directed = (row, column) => (COLUMNS[column].lower ? -1 : 1) * value(row, column);

/** The ends between which almost all of a column's values lie (`Matrix.fences`). */
const FENCE_ENDS = unpack(P.fences, Float32Array);
const FENCES = COLUMNS.map((_, c) => [FENCE_ENDS[2 * c], FENCE_ENDS[2 * c + 1]]);

/** Digits after the point: one of percentages, else so many that three figures show. */
const DIGITS = COLUMNS.map((column, c) => {
  if (column.percent) return 1;
  let largest = 0;
  for (let row = 0; row < R; row++) if (value(row, c) === value(row, c)) largest = Math.max(largest, Math.abs(value(row, c)));
  return largest >= 100 ? 1 : largest >= 1 ? 2 : 3;
});

const MINUS = "\u2212";
/** A number with a column's digits; an empty text if it is missing. */
function number(x, column, signed = false) {
  if (!Number.isFinite(x)) return "";
  const text = Math.abs(x).toFixed(DIGITS[column]);
  const zero = Number(text) === 0;
  return (x < 0 && !zero ? MINUS : signed && !zero ? "+" : "") + text;
}
const plusMinus = (x, column) => (Number.isFinite(x) ? `±${number(x, column)}` : "");
const percent = (share) => `${Math.round(100 * share)}\u202f%`;

/** A long name with its middle left out: ends often tell models apart. */
function shortened(name, most) {
  const letters = [...name];
  if (letters.length <= most) return name;
  const tail = Math.floor((most - 1) * 0.55);
  return `${letters.slice(0, most - 1 - tail).join("")}…${letters.slice(-tail).join("")}`;
}

/** What all models' names begin with, up to a sign; short forms leave it out. */
const PREFIX = (() => {
  if (R < 3) return "";
  let most = ROWS[0].name.length;
  for (const { name } of ROWS) while (!name.startsWith(ROWS[0].name.slice(0, most))) most -= 1;
  const found = ROWS[0].name.slice(0, most).replace(/[^/_-]*$/, "");
  return found.length >= 8 && ROWS.every(({ name }) => name.length > found.length) ? found : "";
})();
const brief = (name) => (PREFIX && name.startsWith(PREFIX) ? name.slice(PREFIX.length) : name);

/** An element with attributes and children; texts become text nodes. */
function el(tag, attributes = {}, ...children) {
  return filled(document.createElement(tag), attributes, children);
}
function svg(tag, attributes = {}, ...children) {
  return filled(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
}
function filled(node, attributes, children) {
  for (const [name, given] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), given);
    else if (given !== null && given !== false) node.setAttribute(name, given === true ? "" : given);
  }
  node.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== ""));
  return node;
}

/** A name that keeps its own direction of writing, short where there is little room. */
function nameOf(name, most = 34, narrow = 17) {
  return el("span", { class: "name", title: name.length > narrow ? name : null },
    el("bdi", { class: "wide" }, shortened(brief(name), most)),
    el("bdi", { class: "narrow", "aria-hidden": "true" }, shortened(brief(name), narrow)));
}

/** A name that may be broken after its signs. */
function breakable(name) {
  const node = el("bdi");
  for (const part of shortened(name, 60).split(/(?<=[_./,:-])/)) node.append(part, el("wbr"));
  return node;
}

/** A labelled select of options [value, text]. */
function select(label, options, chosen, change) {
  const node = el("select", { onchange: () => change(node.value) },
    options.map(([key, text]) => el("option", { value: key, selected: String(key) === String(chosen) }, text)));
  return el("label", { class: "field" }, el("span", {}, label), node);
}
const columnOptions = () => COLUMNS.map((column, c) => [c, shortened(column.name, 44)]);
const rowOptions = () => ROWS.map((row, r) => [r, shortened(brief(row.name), 44)]);

/** Buttons of which one is pressed. */
function segments(options, chosen, change) {
  const buttons = options.map(([key, text, title]) =>
    el("button", { type: "button", "aria-pressed": String(key === chosen), title, onclick: () => {
      for (const [i, button] of buttons.entries()) button.setAttribute("aria-pressed", String(options[i][0] === key));
      change(key);
    } }, text));
  return buttons;
}

/** A menu of boxes to tick, in a details element. */
function checklist(title, options, chosen, change) {
  const boxes = options.map(([key, text]) => {
    const box = el("input", { type: "checkbox", checked: chosen.has(key), onchange: () => {
      if (box.checked) chosen.add(key); else chosen.delete(key);
      change();
    } });
    return el("label", {}, box, el("bdi", {}, text));
  });
  const all = (on) => () => {
    for (const [i, [key]] of options.entries()) {
      boxes[i].firstChild.checked = on;
      if (on) chosen.add(key); else chosen.delete(key);
    }
    change();
  };
  return el("details", { class: "menu" }, el("summary", {}, title), el("div", { class: "choices" },
    el("div", {}, el("button", { type: "button", onclick: all(true) }, "all"), el("button", { type: "button", onclick: all(false) }, "none")),
    boxes));
}

/** A part of the page with its heading. */
function section(id, title, about, ...children) {
  return el("section", { id, "aria-labelledby": `${id}-title` },
    el("h2", { id: `${id}-title` }, title), about ? el("p", { class: "faint" }, about) : "", ...children);
}

// The card that follows the pointer or the focus.
const CARD = document.getElementById("card");
function showCard(children, x, y) {
  CARD.replaceChildren(...children);
  CARD.hidden = false;
  const box = CARD.getBoundingClientRect(), width = document.documentElement.clientWidth;
  const left = x + 16 + box.width > width ? Math.max(4, x - box.width - 16) : x + 16;
  const top = y + 16 + box.height > window.innerHeight ? Math.max(4, y - box.height - 12) : y + 16;
  CARD.style.transform = `translate(${Math.min(left, Math.max(4, width - box.width - 4))}px, ${top}px)`;
}
function showCardAt(children, node) {
  const box = node.getBoundingClientRect();
  showCard(children, box.right - 12, box.bottom - 12);
}
const hideCard = () => { CARD.hidden = true; };

// What several parts show: the row to compare with, and the rows that a search leaves.
const STATE = { reference: P.reference, search: "" };
const LISTENERS = [];
const onState = (listener) => LISTENERS.push(listener);
function setState(changes) {
  Object.assign(STATE, changes);
  for (const listener of LISTENERS) listener(changes);
}
const isFound = (row) => {
  const words = STATE.search.toLowerCase().split(/\s+/).filter(Boolean);
  const text = `${ROWS[row].name} ${ROWS[row].kind}`.toLowerCase();
  return words.every((word) => text.includes(word));
};
