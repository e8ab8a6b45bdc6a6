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
// A diff gets its colours when it is opened: a line for each of thousands of weights costs time.
for (const details of document.querySelectorAll("details.pass")) {
  details.addEventListener("toggle", () => {
    const diff = details.querySelector(".diff");
    if (diff === null || diff.firstElementChild !== null) return;
    const lines = diff.textContent.split("\n").map((line) => {
      const span = document.createElement("span");
      span.className = line.startsWith("-") ? "gone" : "come";
      span.textContent = `${line}\n`;
      return span;
    });
    diff.replaceChildren(...lines);
  });
}
const view = document.getElementById("view");
if (view !== null) {
  const unpacked = async () => {
    const bytes = Uint8Array.from(atob(document.getElementById("views").textContent), (sign) => sign.charCodeAt(0));
    return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).json();
  };
  let views = null;
  if (!("DecompressionStream" in window)) view.textContent = "The pictures of single layers need a newer browser.";
  else for (const button of document.querySelectorAll("button.show")) {
    button.addEventListener("click", async () => {
      views ??= unpacked();
      const chosen = (await views)[Number(button.dataset.show)];
      const frame = document.getElementById("view-frame").content.cloneNode(true);
      for (const part of frame.querySelectorAll("[data-text]")) part.textContent = chosen[part.dataset.text];
      for (const part of frame.querySelectorAll("[data-image]")) {
        part.src = chosen[part.dataset.image];
        part.alt = chosen[`${part.dataset.image}_says`];
      }
      frame.querySelector(".picture").innerHTML = chosen.sizes;
      view.replaceChildren(frame);
      view.scrollIntoView({ block: "nearest" });
      view.focus({ preventScroll: true });
    });
  }
}
