// The scores: a heat map of models and columns, sorted by any column, or differences to a row.

const SCORES = { mode: "values", sort: null, down: true, errors: true, columns: new Set(COLUMNS.keys()) };
const TABLE = { body: null, rows: [], heads: [] };

/** The ends of each column's colours, and the difference to the chosen row that has full colour. */
function extents() {
  return COLUMNS.map((_, c) => {
    const [low, high] = FENCES[c], own = value(STATE.reference, c);
    return { low, high, far: Math.max(Math.abs(low - own), Math.abs(high - own)) };
  });
}

/** A share that stays on the scale. */
const clipped = (share) => Math.min(1, Math.max(0, share));

/** The best row of each column; those that do not differ from it clearly are as good. */
function leaders() {
  return COLUMNS.map((_, c) => {
    let best = -1;
    for (let row = 0; row < R; row++)
      if (value(row, c) === value(row, c) && (best < 0 || directed(row, c) > directed(best, c))) best = row;
    return best;
  });
}
const LEADERS = leaders();

/** Class and texts of a cell. */
function cellOf(row, c, extent) {
  const x = value(row, c);
  if (x !== x) return { look: "none", main: "–", small: "" };
  const top = P.levels - 1;
  if (SCORES.mode === "values") {
    const share = extent.high > extent.low ? clipped((x - extent.low) / (extent.high - extent.low)) : 0.5;
    const level = Math.round(top * (COLUMNS[c].lower ? 1 - share : share));
    const best = LEADERS[c] === row || value(LEADERS[c], c) === x;
    const tied = !best && !difference(row, LEADERS[c], c).clear;
    return { look: `q${level}${best ? " best" : tied ? " tied" : ""}`, main: number(x, c), small: plusMinus(stderr(row, c), c) };
  }
  if (row === STATE.reference) return { look: "own", main: number(x, c), small: plusMinus(stderr(row, c), c) };
  const { delta, error, clear } = difference(row, STATE.reference, c);
  if (delta !== delta) return { look: "none", main: "–", small: "" };
  const better = COLUMNS[c].lower ? -delta : delta;
  const strength = extent.far > 0 ? Math.max(-1, Math.min(1, better / extent.far)) * (clear ? 1 : 0.25) : 0;
  return {
    look: `d${Math.round(top * (0.5 + strength / 2))}${clear ? " clear" : ""}`,
    main: number(delta, c, true), small: plusMinus(error, c),
  };
}

/** Write every cell anew; elements stay. */
function paint() {
  const extent = extents();
  for (const [row, { cells, tr }] of TABLE.rows.entries()) {
    tr.classList.toggle("chosen", row === STATE.reference);
    for (let c = 0; c < C; c++) {
      const { look, main, small } = cellOf(row, c, extent[c]);
      const cell = cells[c];
      if (cell.className !== look) cell.className = look;
      if (cell.firstChild.textContent !== main) cell.firstChild.textContent = main;
      if (cell.lastChild.textContent !== small) cell.lastChild.textContent = small;
    }
  }
}

/** Put the rows into order; missing numbers come last either way. */
function sortRows() {
  const order = [...ROWS.keys()], c = SCORES.sort;
  if (c === "name") {
    order.sort((a, b) => (SCORES.down ? 1 : -1) * ROWS[a].name.localeCompare(ROWS[b].name));
  } else if (c !== null) {
    const missing = (row) => Number(value(row, c) !== value(row, c));
    const sign = SCORES.down ? -1 : 1;
    order.sort((a, b) => missing(a) - missing(b) || sign * (value(a, c) - value(b, c)) || a - b);
  }
  TABLE.body.append(...order.map((row) => TABLE.rows[row].tr));
  for (const [key, head] of TABLE.heads) {
    head.setAttribute("aria-sort", key !== c ? "none" : (key === "name") !== SCORES.down ? "descending" : "ascending");
  }
}

/** A click on a head: best first, then worst first, then the order of the configs. */
function sortBy(key) {
  const first = key === "name" || !COLUMNS[key].lower;
  if (SCORES.sort !== key) Object.assign(SCORES, { sort: key, down: first });
  else if (SCORES.down === first) SCORES.down = !first;
  else Object.assign(SCORES, { sort: null, down: true });
  sortRows();
}

function showFound() {
  let shown = 0;
  for (const [row, { tr }] of TABLE.rows.entries()) {
    tr.hidden = !isFound(row);
    shown += Number(!tr.hidden);
  }
  document.getElementById("found").textContent = shown === R ? `${R} models` : `${shown} of ${R} models`;
}

function showColumns() {
  for (const [key, head] of TABLE.heads) if (key !== "name") head.hidden = !SCORES.columns.has(key);
  for (const { cells } of TABLE.rows) for (let c = 0; c < C; c++) cells[c].hidden = !SCORES.columns.has(c);
}

/** What the card says of a cell. */
function aboutCell(row, c) {
  const column = COLUMNS[c], x = value(row, c);
  const unit = column.percent ? " percent" : "";
  const lines = [el("b", {}, el("bdi", {}, ROWS[row].name)), el("div", {}, el("bdi", {}, column.name),
    column.n ? ` · ${column.n.toLocaleString("en")} documents` : "", column.lower ? " · lower is better" : "")];
  if (x !== x) return [...lines, el("div", {}, "not measured, or a member of the group is missing")];
  const order = [...ROWS.keys()].filter((r) => value(r, c) === value(r, c)).map((r) => directed(r, c));
  const rank = 1 + order.filter((other) => other > directed(row, c)).length;
  lines.push(el("div", {}, el("strong", {}, number(x, c)), ` ${plusMinus(stderr(row, c), c)}${unit} · rank ${rank} of ${order.length}`));
  if (row !== STATE.reference && value(STATE.reference, c) === value(STATE.reference, c)) {
    const { delta, error, paired, clear } = difference(row, STATE.reference, c);
    lines.push(el("div", {}, el("strong", {}, number(delta, c, true)), ` ${plusMinus(error, c)} to `, el("bdi", {}, ROWS[STATE.reference].name)),
      el("div", { class: "faint" }, Number.isFinite(error) ? `${clear ? "clear" : "not clear"}: ${clear ? "more" : "not more"} than two standard errors` : "its error is not known",
        paired ? ", paired by document" : ", as if measured independently"));
  }
  if (column.members && column.kind === "group") lines.push(el("div", { class: "faint" }, column.members));
  return lines;
}

function headOf(key, content, title) {
  const head = el("th", { scope: "col", role: "columnheader", "aria-sort": "none", class: key === "name" ? "corner" : COLUMNS[key].kind },
    el("button", { type: "button", title, tabindex: "-1", onclick: () => sortBy(key) }, content));
  TABLE.heads.push([key, head]);
  return head;
}

function rowOf(row) {
  const { name, kind, notes, mark } = ROWS[row];
  const cells = COLUMNS.map(() => el("td", { role: "gridcell", tabindex: "-1" }, el("span"), el("small")));
  const button = el("button", { type: "button", tabindex: "-1", title: `${name}: compare all others with it`,
    onclick: () => setState({ reference: row }) }, nameOf(name), mark ? el("span", { class: "mark", title: mark }, " ◆") : "");
  const tr = el("tr", { role: "row" }, el("th", { scope: "row", role: "rowheader" }, button,
    kind || notes.length ? el("small", {}, [kind, ...notes].filter(Boolean).join(" · ")) : ""), cells);
  TABLE.rows.push({ tr, cells });
  return tr;
}

function legend() {
  const bar = (letter) => el("span", { class: "bar", "aria-hidden": "true" }, Array.from({ length: P.levels }, (_, i) => el("i", { class: `${letter}${i}` })));
  return el("p", { class: "legend faint" },
    el("span", { class: "of-values" }, "worst of the column ", bar("q"), " best. ", el("span", { class: "best example" }, "outlined"), " the best, ",
      el("span", { class: "tied example" }, "underlined"), " not clearly below it (two standard errors of the difference); far outliers have the colour of the end."),
    el("span", { class: "of-differences" }, "worse ", bar("d"), " better than the chosen model. ", el("b", {}, "Bold"),
      " and in full colour where the difference is more than two of its standard errors, pale where it is not."),
    " ", COLUMNS.some((column, c) => PAIRS[c]) ? "Errors of differences are paired by document" : "Errors of differences are those of independent measurements; models answer the same prompts, so the true ones are mostly smaller",
    COLUMNS.some((column, c) => PAIRS[c]) && COLUMNS.some((column, c) => !PAIRS[c]) ? ", but for metrics that are no means." : ".");
}

function scoresSection() {
  const vertical = C > 14;
  const head = el("thead", { role: "rowgroup" }, el("tr", { role: "row" }, headOf("name", ["model", PREFIX ? el("small", {}, " ", el("bdi", {}, `${shortened(PREFIX, 24)}…`)) : ""], "sort by name"),
    COLUMNS.map((column, c) => headOf(c, [vertical ? el("bdi", {}, shortened(column.name, 26)) : breakable(column.name), column.lower ? " ↓" : ""],
      `${column.name}${column.members ? `: ${column.members}` : ""}; sort`))));
  TABLE.body = el("tbody", { role: "rowgroup" }, ROWS.map((_, row) => rowOf(row)));
  const table = el("table", { class: `heat${vertical ? " vertical" : ""}${R * C > 1500 ? " large" : ""}`, role: "grid", "aria-label": "Scores of models" }, head, TABLE.body);
  table.style.setProperty("--columns", String(C));
  const scroll = el("div", { class: "scroll grid", "data-mode": "values" }, table);
  const reference = select("compare with", rowOptions(), STATE.reference, (row) => setState({ reference: Number(row) }));
  const search = el("input", { type: "search", placeholder: "all", oninput: () => setState({ search: search.value }) });
  const modes = segments([["values", "Scores"], ["differences", "Differences"]], "values", (mode) => {
    SCORES.mode = mode;
    scroll.dataset.mode = mode;
    paint();
  });
  const errors = el("input", { type: "checkbox", checked: true, onchange: () => table.classList.toggle("no-errors", !errors.checked) });
  onState((changes) => {
    if ("reference" in changes) {
      reference.lastChild.value = String(STATE.reference);
      paint();
    }
    if ("search" in changes) showFound();
  });
  const node = section("scores", "Scores", "", el("div", { class: "controls" },
    el("div", { class: "segments", role: "group", "aria-label": "What cells show" }, modes), reference,
    el("label", { class: "field" }, el("span", {}, "models"), search), el("span", { id: "found", class: "faint", "aria-live": "polite" }),
    checklist("columns", COLUMNS.map((column, c) => [c, column.name]), SCORES.columns, showColumns),
    el("label", { class: "tick" }, errors, "errors")), scroll, legend(),
    el("p", { class: "faint hint" }, "A head sorts, a model's name chooses what to compare with, arrow keys move in the table."));
  moveInGrid(table, aboutCell);
  return node;
}
