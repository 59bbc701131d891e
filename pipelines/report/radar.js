// A radar of each model over some columns, with the chosen model's outline behind it.

const RADAR = { axes: firstAxes(), zoom: false };

/** Groups of tasks, without averages of groups; else all groups, else tasks; three to eight. */
function firstAxes() {
  const all = [...COLUMNS.keys()];
  const choices = [all.filter((c) => COLUMNS[c].kind === "group" && COLUMNS[c].inner), all.filter((c) => COLUMNS[c].kind === "group"), all];
  return new Set((choices.find((each) => each.length >= 3) || all).slice(0, 8));
}

/** The ends of an axis: of percentages 0 and 100, or those of the models. */
function radarEnds(c) {
  let low = Infinity, high = -Infinity;
  for (let row = 0; row < R; row++) {
    if (value(row, c) !== value(row, c)) continue;
    low = Math.min(low, value(row, c));
    high = Math.max(high, value(row, c));
  }
  if (!RADAR.zoom && COLUMNS[c].bounds) [low, high] = COLUMNS[c].bounds;
  else if (!RADAR.zoom) low = Math.min(0, low);
  return COLUMNS[c].lower ? [high, low] : [low, high];
}

function radarOf(row, axes, ends, size) {
  const middle = size / 2, radius = size / 2 - 22;
  const spot = (i, share) => {
    const angle = (2 * Math.PI * i) / axes.length;
    return [middle + radius * share * Math.sin(angle), middle - radius * share * Math.cos(angle)];
  };
  const outline = (shares) => shares.map((share, i) => spot(i, share).map((v) => v.toFixed(1)).join(" ")).join("L");
  const shares = (r) => axes.map((c, i) => {
    const [low, high] = ends[i], x = value(r, c);
    const share = high === low ? 1 : (x - low) / (high - low);
    return Number.isFinite(share) ? 0.06 + 0.94 * Math.min(1, Math.max(0, share)) : 0; // a missing number lies in the middle
  });
  const words = axes.map((c) => `${COLUMNS[c].name} ${number(value(row, c), c) || "not measured"}`).join(", ");
  const corners = axes.map((_, i) => spot(i, 1)[1]), top = Math.min(...corners) - 18, bottom = Math.max(...corners) + 20;
  const drawn = svg("svg", { viewBox: `0 ${top} ${size} ${bottom - top}`, role: "img", "aria-label": `${ROWS[row].name}: ${words}` });
  for (const ring of [0.53, 1]) drawn.append(svg("path", { d: `M${outline(axes.map(() => ring))}Z`, class: "gridline" }));
  for (const [i, c] of axes.entries()) {
    const [x, y] = spot(i, 1), beside = Math.abs(y - middle) < radius * 0.45;
    drawn.append(svg("line", { x1: middle, y1: middle, x2: x, y2: y, class: "gridline" }));
    const name = shortened(COLUMNS[c].name, beside ? 9 : 15), half = 2.9 * [...name].length;
    const across = Math.min(size - half, Math.max(half, beside ? x + Math.sign(x - middle) * (half + 4) : x));
    drawn.append(svg("text", { x: across, y: beside ? y + 3.5 : y < middle ? y - 7 : y + 14, "text-anchor": "middle" }, name));
  }
  if (row !== STATE.reference) drawn.append(svg("path", { d: `M${outline(shares(STATE.reference))}Z`, class: "other" }));
  drawn.append(svg("path", { d: `M${outline(shares(row))}Z`, class: "own" }));
  return drawn;
}

function radarCard(row, axes, ends) {
  const lines = () => [el("b", {}, el("bdi", {}, ROWS[row].name)), ...axes.map((c) => {
    const { delta, error } = difference(row, STATE.reference, c);
    return el("div", {}, el("bdi", {}, COLUMNS[c].name), ": ", el("strong", {}, number(value(row, c), c) || "–"),
      row === STATE.reference || delta !== delta ? "" : el("span", { class: "faint" }, ` ${number(delta, c, true)} ${plusMinus(error, c)}`));
  })];
  const button = el("button", { type: "button", class: "plain", title: "compare all others with it", onclick: () => setState({ reference: row }) }, nameOf(ROWS[row].name, 24, 18));
  const figure = el("figure", { class: row === STATE.reference ? "radar chosen" : "radar" }, radarOf(row, axes, ends, 190), el("figcaption", {}, button));
  figure.addEventListener("pointermove", (event) => showCard(lines(), event.clientX, event.clientY));
  figure.addEventListener("pointerleave", hideCard);
  button.addEventListener("focus", () => showCardAt(lines(), button));
  button.addEventListener("blur", hideCard);
  return figure;
}

function radarSection() {
  const place = el("div", { class: "radars" });
  const draw = () => {
    const axes = [...RADAR.axes].sort((a, b) => a - b), ends = axes.map(radarEnds);
    if (axes.length < 3) return place.replaceChildren(el("p", { class: "faint" }, "A radar needs three columns or more."));
    return place.replaceChildren(...[...ROWS.keys()].filter(isFound).map((row) => radarCard(row, axes, ends)));
  };
  const zoom = el("input", { type: "checkbox", onchange: () => { RADAR.zoom = zoom.checked; draw(); } });
  onState(draw);
  draw();
  return section("radar", "Each model", "Farther out is better. Dashed: the model that others are compared with.", el("div", { class: "controls" },
    checklist("columns", COLUMNS.map((column, c) => [c, column.name]), RADAR.axes, draw),
    el("label", { class: "tick" }, zoom, "each axis from the lowest to the highest model")), place);
}
