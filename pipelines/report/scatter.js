// The trade-off of two columns: all models with errors, the front, and how often bootstrap draws
// have a model on it.

const TRADE = { x: P.axes[0], y: P.axes[1], errors: true, far: false, front: [] };
const KINDS = [...new Set(ROWS.map((row) => row.kind))];
const SHAPES = ["circle", "square", "diamond", "triangle", "down"];
const WIDE = 620; // pixels, below which a plot is a phone's
const RING = 9; // radius of the ring that shows the support
/** A row's shape and colour, by its kind. */
const lookOf = (row) => {
  const place = KINDS.indexOf(ROWS[row].kind);
  return { shape: SHAPES[place % SHAPES.length], tone: `tone${place % SHAPES.length}` };
};

/** Rows that no other beats in both columns, from left to right. */
function frontOf(x, y) {
  const rows = measuredRows(x, y);
  const beats = (a, b) => directed(a, x) >= directed(b, x) && directed(a, y) >= directed(b, y)
    && (directed(a, x) > directed(b, x) || directed(a, y) > directed(b, y));
  return rows.filter((row) => !rows.some((other) => beats(other, row))).sort((a, b) => value(a, x) - value(b, x) || a - b);
}
const measuredRows = (x, y) => [...ROWS.keys()].filter((row) => value(row, x) === value(row, x) && value(row, y) === value(row, y));

/** Whether a row lies where most do in both columns. */
const isNear = (row) => [TRADE.x, TRADE.y].every((c) => value(row, c) >= FENCES[c][0] && value(row, c) <= FENCES[c][1]);

/** Round numbers between two ends, about `count` of them. */
function ticks(low, high, count) {
  const step = 10 ** Math.floor(Math.log10((high - low) / count));
  const chosen = [1, 2, 5, 10].map((times) => times * step).find((each) => (high - low) / each <= count) || 10 * step;
  const found = [];
  for (let at = Math.ceil(low / chosen) * chosen; at <= high + chosen * 1e-9; at += chosen) found.push(at);
  return { found, digits: Math.max(0, -Math.floor(Math.log10(chosen) + 1e-9)) };
}

/** The ends of an axis: all values, with their errors where these are shown, and a margin. */
function domain(rows, column) {
  let low = Infinity, high = -Infinity;
  for (const row of rows) {
    const error = TRADE.errors && Number.isFinite(stderr(row, column)) ? stderr(row, column) : 0;
    low = Math.min(low, value(row, column) - error);
    high = Math.max(high, value(row, column) + error);
  }
  const margin = (high - low || Math.abs(high) || 1) * 0.06;
  return [low - margin, high + margin];
}

/** A marker around (0, 0). */
function marker(shape, radius, attributes) {
  const r = radius, wide = 1.15 * r;
  if (shape === "circle") return svg("circle", { r, ...attributes });
  const paths = {
    square: `M${-r} ${-r}H${r}V${r}H${-r}Z`, diamond: `M0 ${-1.35 * r}L${1.35 * r} 0L0 ${1.35 * r}L${-1.35 * r} 0Z`,
    triangle: `M0 ${-1.2 * r}L${wide} ${0.9 * r}H${-wide}Z`, down: `M0 ${1.2 * r}L${wide} ${-0.9 * r}H${-wide}Z`,
  };
  return svg("path", { d: paths[shape], ...attributes });
}

/** The part of a ring that a share stands for, clockwise from the top. */
function arc(share, radius) {
  if (share >= 0.9995) return svg("circle", { r: radius, class: "ring" });
  const angle = 2 * Math.PI * share;
  const end = `${radius * Math.sin(angle)} ${-radius * Math.cos(angle)}`;
  return svg("path", { d: `M0 ${-radius}A${radius} ${radius} 0 ${share > 0.5 ? 1 : 0} 1 ${end}`, class: "ring" });
}

function aboutPoint(row) {
  const share = support(row, TRADE.x, TRADE.y);
  const line = (column) => el("div", {}, el("bdi", {}, COLUMNS[column].name), ": ", el("strong", {}, number(value(row, column), column)), ` ${plusMinus(stderr(row, column), column)}`);
  return [el("b", {}, el("bdi", {}, ROWS[row].name)), ROWS[row].kind ? el("div", { class: "faint" }, ROWS[row].kind) : "", line(TRADE.x), line(TRADE.y),
    el("div", {}, TRADE.front.includes(row) ? "on the front" : "not on the front", share === null ? "" : `; in ${percent(share)} of ${P.draws} draws`)].filter(Boolean);
}

/** Draw the plot into its place, as wide as the place is. */
function drawTrade(place) {
  const width = Math.max(280, Math.min(1160, place.clientWidth)), phone = width < WIDE;
  const height = phone ? Math.round(width * 1.05) : Math.round(Math.min(600, width * 0.6));
  const measured = measuredRows(TRADE.x, TRADE.y);
  TRADE.front = frontOf(TRADE.x, TRADE.y);
  // What is on the front is always drawn.
  const rows = measured.filter((row) => TRADE.far || isNear(row) || TRADE.front.includes(row));
  if (!rows.length) return place.replaceChildren(el("p", { class: "faint" }, "No model has both columns."));
  const edge = { left: phone ? 44 : 60, right: 14, top: 14, bottom: 48 };
  const [x0, x1] = domain(rows, TRADE.x), [y0, y1] = domain(rows, TRADE.y);
  const sx = (v) => edge.left + ((v - x0) / (x1 - x0)) * (width - edge.left - edge.right);
  const sy = (v) => height - edge.bottom - ((v - y0) / (y1 - y0)) * (height - edge.top - edge.bottom);
  const plot = svg("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "group", "aria-label": `${COLUMNS[TRADE.x].name} against ${COLUMNS[TRADE.y].name}` });
  plot.append(...axes(width, height, edge, sx, sy, [x0, x1], [y0, y1], phone), frontLine(sx, sy, [x0, x1], [y0, y1]));
  const groups = rows.map((row) => point(row, sx, sy, rows.length));
  const order = groups.map((_, i) => i).sort((a, b) => value(rows[a], TRADE.x) - value(rows[b], TRADE.x));
  // Important points last, so that they lie on top.
  const layers = groups.map((group, i) => [group, TRADE.front.includes(rows[i]) ? 1 : 0]).sort((a, b) => a[1] - b[1]);
  plot.append(...layers.map(([group]) => group));
  place.replaceChildren(plot);
  label(plot, rows, sx, sy, { width, height, edge }, phone);
  moveAmongPoints(plot, order.map((i) => groups[i]));
  return undefined;
}

function axes(width, height, edge, sx, sy, [x0, x1], [y0, y1], phone) {
  const parts = [], across = ticks(x0, x1, phone ? 4 : 8), up = ticks(y0, y1, phone ? 5 : 7);
  const text = (x, y, anchor, content, extra = {}) => svg("text", { x, y, "text-anchor": anchor, ...extra }, content);
  for (const at of across.found) {
    parts.push(svg("line", { x1: sx(at), x2: sx(at), y1: edge.top, y2: height - edge.bottom, class: "gridline" }));
    parts.push(text(sx(at), height - edge.bottom + 18, "middle", at.toFixed(across.digits)));
  }
  for (const at of up.found) {
    parts.push(svg("line", { x1: edge.left, x2: width - edge.right, y1: sy(at), y2: sy(at), class: "gridline" }));
    parts.push(text(edge.left - 7, sy(at) + 4, "end", at.toFixed(up.digits)));
  }
  const named = (c) => `${shortened(COLUMNS[c].name, phone ? 26 : 60)}${COLUMNS[c].percent ? ", percent" : ""}${COLUMNS[c].lower ? " (lower is better)" : ""}`;
  parts.push(text((edge.left + width - edge.right) / 2, height - 8, "middle", named(TRADE.x), { class: "axis" }));
  const middle = (edge.top + height - edge.bottom) / 2;
  parts.push(text(0, 0, "middle", named(TRADE.y), { class: "axis", transform: `translate(${phone ? 11 : 14} ${middle}) rotate(-90)` }));
  return parts;
}

/** Steps through the front: no model lies on the better side of them. */
function frontLine(sx, sy, xs, ys) {
  const flipX = COLUMNS[TRADE.x].lower, flipY = COLUMNS[TRADE.y].lower;
  const bestFirst = [...TRADE.front].sort((a, b) => directed(b, TRADE.x) - directed(a, TRADE.x));
  const [right, left] = [bestFirst[0], bestFirst.at(-1)].map((row) => [sx(value(row, TRADE.x)), sy(value(row, TRADE.y))]);
  let path = `M${right[0]} ${sy(flipY ? ys[1] : ys[0])}V${right[1]}`;
  for (const row of bestFirst.slice(1)) path += `H${sx(value(row, TRADE.x))}V${sy(value(row, TRADE.y))}`;
  return svg("path", { d: `${path}H${left ? sx(flipX ? xs[1] : xs[0]) : 0}`, class: "front" });
}

function point(row, sx, sy, count) {
  const { shape, tone } = lookOf(row), x = sx(value(row, TRADE.x)), y = sy(value(row, TRADE.y));
  const onFront = TRADE.front.includes(row), share = support(row, TRADE.x, TRADE.y);
  const group = svg("g", { transform: `translate(${x} ${y})`, class: `point ${tone}${onFront ? " on-front" : ""}${isFound(row) ? "" : " lost"}`, tabindex: "-1", role: "img", "data-row": row,
    "aria-label": `${ROWS[row].name}: ${number(value(row, TRADE.x), TRADE.x)}, ${number(value(row, TRADE.y), TRADE.y)}${onFront ? ", on the front" : ""}${share === null ? "" : `, in ${percent(share)} of draws`}` });
  const across = stderr(row, TRADE.x), up = stderr(row, TRADE.y);
  if (TRADE.errors && across > 0) group.append(svg("line", { x1: sx(value(row, TRADE.x) - across) - x, x2: sx(value(row, TRADE.x) + across) - x, class: "error" }));
  if (TRADE.errors && up > 0) group.append(svg("line", { y1: sy(value(row, TRADE.y) - up) - y, y2: sy(value(row, TRADE.y) + up) - y, class: "error" }));
  if (share) group.append(arc(share, RING));
  group.append(marker(shape, count > 50 ? 4 : 5, { class: "dot" }));
  if (row === STATE.reference) group.append(svg("circle", { r: RING + 4, class: "reference" }));
  group.append(svg("circle", { r: 13, class: "target" }));
  group.addEventListener("pointermove", (event) => showCard(aboutPoint(row), event.clientX, event.clientY));
  group.addEventListener("pointerleave", hideCard);
  group.addEventListener("click", () => setState({ reference: row }));
  return group;
}

/** Names beside points, where they cover no point and no other name; important ones first. */
function label(plot, rows, sx, sy, { width, height, edge }, phone) {
  const taken = rows.map((row) => ({ x: sx(value(row, TRADE.x)) - 9, y: sy(value(row, TRADE.y)) - 9, w: 18, h: 18 }));
  const overlaps = (a, b) => a.x < b.x + b.w && b.x < a.x + a.w && a.y < b.y + b.h && b.y < a.y + a.h;
  const weight = (row) => (row === STATE.reference ? 4 : 0) + (TRADE.front.includes(row) ? 2 : 0) + (support(row, TRADE.x, TRADE.y) || 0);
  const order = [...rows].sort((a, b) => weight(b) - weight(a));
  for (const row of order.slice(0, phone ? 14 : 60)) {
    if (!isFound(row)) continue;
    const text = svg("text", { class: "label" }, shortened(brief(ROWS[row].name), phone ? 16 : 28));
    plot.append(text);
    const w = text.getComputedTextLength(), h = 13, x = sx(value(row, TRADE.x)), y = sy(value(row, TRADE.y));
    const places = [11, 20].flatMap((d) => [[x + d, y - h / 2], [x - d - w, y - h / 2], [x - w / 2, y - d - h], [x - w / 2, y + d],
      [x + d - 3, y - d - h + 6], [x + d - 3, y + d - 6], [x - d - w + 3, y - d - h + 6], [x - d - w + 3, y + d - 6]]);
    const free = places.map(([left, top]) => ({ x: left, y: top, w, h })).find((box) => box.x > edge.left && box.x + w < width - 2
      && box.y > 2 && box.y + h < height - edge.bottom && !taken.some((other) => overlaps(box, other)));
    if (!free) {
      text.remove();
      continue;
    }
    taken.push(free);
    text.setAttribute("x", free.x);
    text.setAttribute("y", free.y + h - 3);
  }
}

function moveAmongPoints(plot, groups) {
  let current = 0;
  groups[0].setAttribute("tabindex", "0");
  plot.addEventListener("keydown", (event) => {
    const away = { ArrowLeft: -1, ArrowDown: -1, ArrowRight: 1, ArrowUp: 1 }[event.key];
    if (event.key === "Escape") hideCard();
    if (event.key === "Enter") setState({ reference: Number(groups[current].dataset.row) });
    if (!away) return;
    groups[current].setAttribute("tabindex", "-1");
    current = Math.min(groups.length - 1, Math.max(0, current + away));
    groups[current].setAttribute("tabindex", "0");
    groups[current].focus();
    event.preventDefault();
  });
  plot.addEventListener("focusin", (event) => {
    const group = event.target.closest(".point");
    if (!group) return;
    current = groups.indexOf(group);
    showCardAt(aboutPoint(Number(group.dataset.row)), group);
  });
  plot.addEventListener("focusout", hideCard);
}

/** The front in words, with those that some draws have on it. */
function frontWords() {
  const entry = (row) => {
    const share = support(row, TRADE.x, TRADE.y);
    return el("li", {}, el("button", { type: "button", class: "plain", title: "compare all others with it", onclick: () => setState({ reference: row }) }, nameOf(ROWS[row].name, 60, 30)), share === null ? "" : ` ${percent(share)}`);
  };
  const near = measuredRows(TRADE.x, TRADE.y).filter((row) => !TRADE.front.includes(row) && (support(row, TRADE.x, TRADE.y) || 0) >= 0.05);
  near.sort((a, b) => support(b, TRADE.x, TRADE.y) - support(a, TRADE.x, TRADE.y));
  const list = (title, rows) => (rows.length ? el("div", {}, el("b", {}, title), el("ul", { class: "inline" }, rows.map(entry))) : "");
  const away = TRADE.far ? [] : measuredRows(TRADE.x, TRADE.y).filter((row) => !isNear(row) && !TRADE.front.includes(row));
  return [list("On the front: ", TRADE.front), list("Outside the plot, far from the others: ", away), list("In at least 5 percent of draws: ", near.slice(0, 12)),
    TRADE.front.length && support(TRADE.front[0], TRADE.x, TRADE.y) === null ? el("p", { class: "faint" }, "Without samples, or for a metric that is no mean, the front's support is not known.") : ""];
}

function tradeSection() {
  const place = el("div", { class: "plot" }), words = el("div", { class: "words" });
  const draw = () => {
    drawTrade(place);
    words.replaceChildren(...frontWords().filter(Boolean));
  };
  const pick = (axis) => (c) => { TRADE[axis] = Number(c); draw(); };
  const x = select("across", columnOptions(), TRADE.x, pick("x")), y = select("up", columnOptions(), TRADE.y, pick("y"));
  const swap = el("button", { type: "button", onclick: () => {
    [TRADE.x, TRADE.y] = [TRADE.y, TRADE.x];
    x.lastChild.value = TRADE.x;
    y.lastChild.value = TRADE.y;
    draw();
  } }, "exchange");
  const errors = el("input", { type: "checkbox", checked: true, onchange: () => { TRADE.errors = errors.checked; draw(); } });
  const far = el("input", { type: "checkbox", onchange: () => { TRADE.far = far.checked; draw(); } });
  const kinds = KINDS.filter(Boolean).map((kind) => {
    const row = ROWS.findIndex((each) => each.kind === kind), { shape, tone } = lookOf(row);
    return el("span", { class: "key" }, svg("svg", { width: 16, height: 16, viewBox: "-8 -8 16 16", class: `point ${tone}`, "aria-hidden": "true" }, marker(shape, 5, { class: "dot" })), kind);
  });
  const ring = el("span", { class: "key" }, svg("svg", { width: 24, height: 24, viewBox: "-12 -12 24 24", class: "point tone0", "aria-hidden": "true" }, arc(0.7, RING), marker("circle", 5, { class: "dot" })), "ring: share of bootstrap draws on the front");
  new ResizeObserver(draw).observe(place);
  onState(draw);
  return section("tradeoff", "Trade-off", "", el("div", { class: "controls" }, x, y, swap, el("label", { class: "tick" }, errors, "errors"), el("label", { class: "tick" }, far, "outliers too")),
    el("div", { class: "paper" }, place, el("p", { class: "legend faint" }, kinds, SUPPORT ? ring : "", el("span", { class: "key" }, svg("svg", { width: 28, height: 10, viewBox: "0 0 28 10", "aria-hidden": "true" }, svg("line", { x1: 0, x2: 28, y1: 5, y2: 5, class: "front" })), "front: no model is better in both")), words));
}
