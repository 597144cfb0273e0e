"use strict";
(() => {
  const shown = document.getElementById("shown");
  const tables = [...document.querySelectorAll("table.sortable")];
  const body = (table) => [...table.tBodies[0].rows];
  const text = (cell) => cell.textContent.trim();

  const announce = (what) => {
    const rows = tables.flatMap(body);
    const left = rows.filter((row) => !row.hidden).length;
    shown.textContent = `${left === rows.length ? rows.length : `${left} of ${rows.length}`} rows${what}`;
  };

  // Numbers by value, texts with natural sorting (w2 before w10). Cells without a value come last in both directions.
  const compare = (first, second, sign) => {
    if ("value" in first.dataset) {
      const [a, b] = [first.dataset.value, second.dataset.value];
      if (a === "" || b === "") return (a === "") - (b === "");
      return sign * (Number(a) - Number(b));
    }
    return sign * text(first).localeCompare(text(second), "en", { numeric: true });
  };

  const sort = (table, head) => {
    const first = head.dataset.first || "ascending";
    const other = first === "ascending" ? "descending" : "ascending";
    const order = head.getAttribute("aria-sort") === first ? other : first;
    for (const cell of table.tHead.rows[0].cells) cell.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", order);
    const at = head.cellIndex;
    const rows = body(table);
    rows.sort((a, b) => compare(a.cells[at], b.cells[at], order === "ascending" ? 1 : -1));
    table.tBodies[0].append(...rows);
    announce(`, ${table.dataset.name} sorted by ${text(head)}, ${order}`);
  };

  const matches = (row, names, words) => words.every((word) => {
    const [name, value] = word.split(/=(.*)/s);
    const at = value ? names.indexOf(name) : -1;
    return at < 0 ? row.textContent.toLowerCase().includes(word) : text(row.cells[at]).toLowerCase() === value;
  });

  const filter = (wanted) => {
    const words = wanted.toLowerCase().split(/\s+/).filter(Boolean);
    for (const table of tables) {
      const names = [...table.tHead.rows[0].cells].map((cell) => text(cell).toLowerCase());
      for (const row of body(table)) {
        row.hidden = !matches(row, names, words);
        const details = row.dataset.setting && document.getElementById(row.dataset.setting);
        if (details) details.hidden = row.hidden;
      }
    }
    announce("");
  };

  const reveal = () => {
    const target = document.getElementById(location.hash.slice(1));
    if (!(target instanceof HTMLDetailsElement)) return;
    target.open = true;
    target.scrollIntoView();
    target.querySelector("summary").focus({ preventScroll: true });
  };

  for (const table of tables) {
    for (const head of table.tHead.rows[0].cells) {
      head.querySelector("button").addEventListener("click", () => sort(table, head));
    }
  }
  const field = document.getElementById("filter");
  field.addEventListener("input", () => filter(field.value));
  field.form.addEventListener("submit", (event) => event.preventDefault());
  for (const [id, open] of [["open", true], ["close", false]]) {
    document.getElementById(id).addEventListener("click", () => {
      for (const details of document.querySelectorAll("details.setting")) details.open = open;
    });
  }
  addEventListener("hashchange", reveal);
  document.addEventListener("click", (event) => {
    if (event.target.closest("tr[data-setting] a")) setTimeout(reveal);
  });
  filter(field.value);
  reveal();
})();
