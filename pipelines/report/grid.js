// Moving in the table: the pointer and the arrow keys. One cell at a time is in the order of tabs.

/** What can hold the focus in a row of a table, left to right: buttons of heads, and cells. */
function stops(tr) {
  return [...tr.children].filter((cell) => !cell.hidden).map((cell) => cell.querySelector("button") || cell);
}

function moveInGrid(table, about) {
  const lines = () => [table.tHead.rows[0], ...[...table.tBodies[0].rows].filter((tr) => !tr.hidden)];
  let current = table.tHead.rows[0].querySelector("button");
  current.tabIndex = 0;
  const go = (target) => {
    if (!target) return;
    current.tabIndex = -1;
    current = target;
    current.tabIndex = 0;
    current.focus({ preventScroll: true });
    current.closest("th, td").scrollIntoView({ block: "nearest", inline: "nearest" });
  };
  const placeOf = (cell) => {
    const tr = cell.closest("tr");
    return [TABLE.rows.findIndex((each) => each.tr === tr), TABLE.rows[0] ? [...tr.cells].indexOf(cell) - 1 : -1];
  };
  const show = (cell, x, y) => {
    const [row, column] = placeOf(cell);
    if (row < 0 || column < 0) return hideCard();
    if (x === undefined) showCardAt(about(row, column), cell); else showCard(about(row, column), x, y);
  };
  table.addEventListener("keydown", (event) => {
    const all = lines(), tr = event.target.closest("tr"), at = all.indexOf(tr);
    const own = stops(tr), place = own.indexOf(event.target);
    const rowsAway = { ArrowUp: -1, ArrowDown: 1, PageUp: -10, PageDown: 10 }[event.key];
    const cellsAway = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (event.key === "Escape") return hideCard();
    if (place < 0) return undefined;
    if (rowsAway) go(stops(all[Math.min(all.length - 1, Math.max(0, at + rowsAway))])[place]);
    else if (cellsAway) go(own[Math.min(own.length - 1, Math.max(0, place + cellsAway))]);
    else if (event.key === "Home") go((event.ctrlKey ? stops(all[0]) : own)[0]);
    else if (event.key === "End") go((event.ctrlKey ? stops(all.at(-1)) : own).at(-1));
    else return undefined;
    return event.preventDefault();
  });
  table.addEventListener("focusin", (event) => {
    if (event.target !== current) {
      current.tabIndex = -1;
      current = event.target;
      current.tabIndex = 0;
    }
    if (event.target.tagName === "TD") show(event.target); else hideCard();
  });
  table.addEventListener("focusout", hideCard);
  table.addEventListener("pointermove", (event) => {
    const cell = event.target.closest("td");
    if (cell && event.pointerType !== "touch") show(cell, event.clientX, event.clientY);
    else if (!cell) hideCard();
  });
  table.addEventListener("pointerleave", hideCard);
}
