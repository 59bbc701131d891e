// Samples of two models side by side, those on which they differ most first.

const SAMPLES = { task: 0, first: 0, second: 0, metric: 0, show: "all", search: "", most: 10 };
const text = (place) => P.samples.texts[place];

/** A model's value of a sample; numbers alone can be compared. */
const sampleValue = (document, row) => {
  const answer = document.answers[row], found = answer && answer[1][SAMPLES.metric];
  return typeof found === "number" ? found : NaN;
};

/** The documents that are to be shown: differences first, the largest first. */
function chosenDocuments() {
  const task = P.samples.tasks[SAMPLES.task], words = SAMPLES.search.toLowerCase();
  const scored = task.documents.map((document, place) => {
    const [a, b] = [sampleValue(document, SAMPLES.first), sampleValue(document, SAMPLES.second)];
    return { document, place, delta: a - b, away: Number.isFinite(a - b) ? Math.abs(a - b) : -1 };
  });
  const answerText = (document, row) => (document.answers[row] ? text(document.answers[row][0]) : "");
  const wanted = { all: () => true, differ: (each) => each.away > 0, first: (each) => each.delta > 0, second: (each) => each.delta < 0 }[SAMPLES.show];
  return scored.filter(({ document }) => document.answers[SAMPLES.first] || document.answers[SAMPLES.second]).filter(wanted)
    .filter(({ document }) => !words || [document.id, ...document.prompt.map(([, t]) => text(t)), answerText(document, SAMPLES.first), answerText(document, SAMPLES.second)]
      .some((each) => each.toLowerCase().includes(words)))
    .sort((a, b) => b.away - a.away || a.place - b.place);
}

const shown = (x) => (Number.isInteger(x) ? String(x) : Math.abs(x) >= 100 ? x.toFixed(1) : x.toFixed(3));

function answerBox(document, row, other, names) {
  const answer = document.answers[row];
  const head = el("h4", {}, nameOf(ROWS[row].name, 40, 26));
  if (!answer) return el("div", { class: "answer" }, head, el("p", { class: "faint" }, "not measured"));
  const values = names.map((name, i) => {
    const found = answer[1][i];
    if (found === null || found === undefined) return el("span", { class: "badge" }, `${name}: none`);
    if (typeof found !== "number") return el("div", { class: "said" }, el("b", {}, `${name}: `), el("bdi", { dir: "auto" }, text(found[0])));
    const rival = other && other[1][i];
    const wins = typeof rival === "number" && found > rival;
    return el("span", { class: wins ? "badge wins" : "badge" }, `${name}: ${shown(found)}${wins ? " ▲" : ""}`);
  });
  const own = answer[2] ? [el("p", { class: "faint" }, "asked in other words:"), ...messages(answer[2])] : [];
  return el("div", { class: "answer" }, head, own, el("pre", { dir: "auto" }, text(answer[0]) || " "), el("div", { class: "values" }, values));
}

const messages = (prompt) => prompt.map(([role, place]) => el("div", { class: "message" }, role ? el("span", { class: "role" }, role) : "", el("pre", { dir: "auto" }, text(place))));

function sampleCard({ document, away }, names) {
  const [a, b] = [document.answers[SAMPLES.first], document.answers[SAMPLES.second]];
  return el("article", { class: away > 0 ? "sample differs" : "sample" }, el("h3", {}, el("bdi", {}, document.id), away > 0 ? el("span", { class: "tag" }, "differ") : ""),
    messages(document.prompt), el("div", { class: "pair" }, answerBox(document, SAMPLES.first, b, names), SAMPLES.first === SAMPLES.second ? "" : answerBox(document, SAMPLES.second, a, names)));
}

function samplesSection() {
  const tasks = P.samples.tasks;
  const list = el("div", { class: "cards" }), words = el("p", { class: "faint", "aria-live": "polite" });
  const more = el("button", { type: "button", onclick: () => { SAMPLES.most += 20; draw(); } }, "show more");
  const metricPlace = el("span");
  const draw = () => {
    const task = tasks[SAMPLES.task], found = chosenDocuments();
    list.replaceChildren(...found.slice(0, SAMPLES.most).map((each) => sampleCard(each, task.metrics)));
    more.hidden = found.length <= SAMPLES.most;
    const out = task.total - task.documents.length;
    words.textContent = `${Math.min(found.length, SAMPLES.most)} of ${found.length} shown. This page holds ${task.documents.length} of ${task.total.toLocaleString("en")} documents of the task`
      + `${out ? `, those on which the models differ most; ${out.toLocaleString("en")} are left out` : ""}. On ${task.differing.toLocaleString("en")} some models differ.`;
  };
  const pickMetric = () => metricPlace.replaceChildren(select("by", tasks[SAMPLES.task].metrics.map((name, i) => [i, name]), SAMPLES.metric, (i) => { SAMPLES.metric = Number(i); draw(); }));
  const set = (key) => (given) => {
    SAMPLES[key] = Number(given);
    SAMPLES.most = 10;
    if (key === "task") { SAMPLES.metric = 0; pickMetric(); }
    draw();
  };
  const marked = ROWS.findIndex((row) => row.mark), other = STATE.reference === 0 ? Math.min(1, R - 1) : 0;
  SAMPLES.first = marked < 0 ? other : marked;
  SAMPLES.second = STATE.reference;
  const second = select("right", rowOptions(), SAMPLES.second, set("second"));
  onState((changes) => {
    if (!("reference" in changes)) return;
    SAMPLES.second = STATE.reference;
    second.lastChild.value = String(STATE.reference);
    draw();
  });
  const search = el("input", { type: "search", placeholder: "words", oninput: () => { SAMPLES.search = search.value; draw(); } });
  const parts = segments([["all", "all"], ["differ", "differ"], ["first", "left higher"], ["second", "right higher"]], "all", (show) => { SAMPLES.show = show; draw(); });
  pickMetric();
  draw();
  return section("samples", "Samples side by side", "", el("div", { class: "controls" }, select("task", tasks.map((task, i) => [i, shortened(task.task, 44)]), 0, set("task")),
    select("left", rowOptions(), SAMPLES.first, set("first")), second, metricPlace,
    el("div", { class: "segments", role: "group", "aria-label": "Which samples" }, parts), el("label", { class: "field" }, el("span", {}, "find"), search)), words, list, more);
}
