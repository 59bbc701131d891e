// Where each model comes from, and the runs themselves: failures, remarks, configs, versions.

const ORIGINS = new Map(P.origins.map((origin) => [origin.name, origin]));

/** A model with its parents below it; one that stands there already is not opened again. */
function ancestry(name, seen = new Set()) {
  const origin = ORIGINS.get(name);
  const again = seen.has(name);
  seen.add(name);
  const parents = origin && !again ? origin.parents : [];
  return el("li", {}, nameOf(name, 48, 26), origin && origin.how ? el("span", { class: "faint" }, ` ${origin.how}`) : "", again && origin && origin.parents.length ? el("span", { class: "faint" }, " (above)") : "",
    parents.length ? el("ul", {}, parents.map((parent) => ancestry(parent, seen))) : "");
}

function originCard(origin) {
  const line = (term, content) => (content === "" || (Array.isArray(content) && !content.length) ? [] : [el("dt", {}, term), el("dd", {}, content)]);
  const words = [origin.kind === origin.name ? "" : origin.kind, origin.how].filter(Boolean).join(": ");
  return el("details", { class: "origin" }, el("summary", {}, nameOf(origin.name, 60, 28), el("span", { class: "faint" }, words ? ` ${words}` : "")),
    el("div", { class: "inside" }, origin.parents.length ? el("ul", { class: "tree" }, ancestry(origin.name)) : "", el("dl", {},
      line("made from", origin.parents.length ? origin.parents.map((parent, i) => [i ? ", " : "", el("bdi", {}, parent)]).flat() : ""),
      line("data", origin.data.map((each) => el("div", {}, el("bdi", {}, each)))),
      line("path", origin.path && el("bdi", {}, origin.path)),
      Object.entries(origin.digests).map(([key, digest]) => line(key, el("code", {}, digest))).flat(),
      line("seed", origin.seed === null ? "" : String(origin.seed)),
      line("versions", Object.entries(origin.versions).map(([name, version]) => `${name} ${version}`).join(", "))),
    origin.config ? el("pre", { class: "config" }, origin.config) : el("p", { class: "faint" }, "No record (poise.json) was found beside its weights.")));
}

function modelsSection() {
  const place = el("div");
  const draw = () => place.replaceChildren(...P.origins.filter((origin) => {
    const row = ROWS.findIndex((each) => each.name === origin.name);
    return row < 0 ? !STATE.search : isFound(row);
  }).map(originCard));
  onState((changes) => { if ("search" in changes) draw(); });
  draw();
  return section("models", "Where each model comes from", "From the records beside the weights: what it was merged from or trained on, with digests.", place);
}

function plainTable(heads, rows) {
  return el("div", { class: "scroll" }, el("table", {}, el("thead", {}, el("tr", {}, heads.map((head) => el("th", { scope: "col" }, head)))),
    el("tbody", {}, rows.map((row) => el("tr", {}, row.map((cell) => el("td", {}, el("bdi", {}, cell))))))));
}

function runsSection() {
  const failed = P.runs.flatMap((run) => run.failed.map((each) => [each.model, each.task, each.reason]));
  const remarks = P.runs.flatMap((run) => Object.entries(run.remarks).map(([task, remark]) => [task, remark]));
  const groups = COLUMNS.filter((column) => column.kind === "group" && column.members).map((column) => [column.name, column.members]);
  const parts = [];
  if (P.runs.length) parts.push(plainTable(["evaluation", "documents", "engine"], P.runs.map((run) => [run.folder, run.frame, run.engine])));
  if (failed.length) parts.push(el("h3", {}, "Not measured"), plainTable(["model", "task", "reason"], failed));
  if (remarks.length) parts.push(el("h3", {}, "Remarks"), plainTable(["task", "remark"], remarks));
  if (groups.length) parts.push(el("h3", {}, "Groups"), plainTable(["group", "is"], groups));
  for (const { path, models, text: content } of P.configs) {
    parts.push(el("details", {}, el("summary", {}, el("bdi", {}, path), el("span", { class: "faint" }, ` ${models.join(", ")}`)), el("pre", { class: "config" }, content === null ? "not in the run's folder" : content)));
  }
  const seconds = P.timings.map(([step, s]) => [step, s.toFixed(1)]);
  if (seconds.length) parts.push(el("h3", {}, "Timings"), plainTable(["step", "seconds"], [...seconds, ["all", P.timings.reduce((sum, [, s]) => sum + s, 0).toFixed(1)]]));
  if (P.versions.length) parts.push(el("h3", {}, "Versions"), plainTable(["package", "version"], P.versions));
  return section("runs", "How it was measured", "", parts);
}
