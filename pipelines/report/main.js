// The page: findings, then the parts; light, dark and print.

function findingsSection() {
  const lines = P.findings.map(([topic, sentence]) => el("li", {}, topic ? el("strong", {}, `${topic}: `) : "", el("bdi", {}, sentence)));
  return section("findings", "What the numbers say", "", el("ul", { class: "findings" }, lines), P.findings_note ? el("p", { class: "faint" }, P.findings_note) : "");
}

function setTheme() {
  const put = (theme) => {
    if (theme === "auto") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = theme;
  };
  document.getElementById("theme").append(...segments([["auto", "auto", "as the system has it"], ["light", "light"], ["dark", "dark"]], "auto", put));
}

const PARTS = [[P.findings.length, findingsSection, "Findings"], [R, scoresSection, "Scores"], [R && C > 1, tradeSection, "Trade-off"], [C >= 3, radarSection, "Models"],
  [P.samples && P.samples.texts.length, samplesSection, "Samples"], [P.origins.length, modelsSection, "Origins"], [true, runsSection, "Runs"]];

setTheme();
for (const [wanted, make, title] of PARTS) {
  if (!wanted) continue;
  const node = make();
  document.getElementById("main").append(node);
  document.getElementById("links").append(el("a", { href: `#${node.id}` }, title));
}
paint();
sortRows();
showFound();
window.addEventListener("scroll", hideCard, { passive: true });
// Folded parts that fit on paper are opened for it.
window.addEventListener("beforeprint", () => { for (const each of document.querySelectorAll("details.origin")) each.open = R <= 20; });
