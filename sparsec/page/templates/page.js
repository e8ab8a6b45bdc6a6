"use strict";
// Sorting, filtering and the view of one layer. Without it the page shows the same numbers in the order they came.
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  const heads = [...table.tHead.rows[0].cells];
  const rows = [...body.rows];
  const text = new Map(rows.map((row) => [row, row.textContent.toLowerCase()]));
  const numeric = heads.map((_, i) => rows.some((row) => row.cells[i].dataset.v !== undefined));
  const value = (row, i) => {
    const cell = row.cells[i];
    if (!numeric[i]) return cell.textContent;
    return cell.dataset.v === undefined ? NaN : Number(cell.dataset.v);
  };
  heads.forEach((head, i) => head.querySelector("button").addEventListener("click", () => {
    const down = head.getAttribute("aria-sort") === "ascending";
    heads.forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const keyed = rows.map((row) => [value(row, i), row]);
    keyed.sort(([a], [b]) => {
      if (!numeric[i]) return (down ? -1 : 1) * a.localeCompare(b, undefined, { numeric: true });
      if (isNaN(a) || isNaN(b)) return isNaN(a) - isNaN(b); // what is not known stays at the end
      return down ? b - a : a - b;
    });
    body.append(...keyed.map(([, row]) => row));
  }));
  const input = document.querySelector(`[data-filter="${table.id}"]`);
  const count = document.querySelector(`[data-count="${table.id}"]`);
  const filter = () => {
    const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const row of rows) {
      row.hidden = !words.every((word) => text.get(row).includes(word));
      shown += !row.hidden;
    }
    count.textContent = `${shown} of ${rows.length} rows`;
  };
  input.addEventListener("input", filter);
  input.closest(".tools").hidden = false;
  filter();
}
const view = document.getElementById("view");
for (const button of document.querySelectorAll("button.show")) {
  button.addEventListener("click", () => {
    view.replaceChildren(document.getElementById(`view-${button.dataset.show}`).content.cloneNode(true));
    view.scrollIntoView({ block: "nearest" });
    view.focus({ preventScroll: true });
  });
}
