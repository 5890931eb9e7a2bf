"use strict";
// Sorts, filters and reads values out of a page that is complete without it.
(() => {
const root = document.documentElement;
const data = JSON.parse(document.getElementById("data").textContent);
const all = (selector, within = document) => Array.from(within.querySelectorAll(selector));
root.classList.add("js");

// Theme: as the system has it, or chosen.  A page from disk may have no storage.
const stored = { get() { try { return localStorage.getItem("theme"); } catch { return null; } },
                 set(value) { try { localStorage.setItem("theme", value); } catch { /* it lasts as long as the page */ } } };
const themes = ["system", "light", "dark"];
const button = document.getElementById("theme");
const show = (theme) => {
  if (theme === "system") delete root.dataset.theme; else root.dataset.theme = theme;
  button.textContent = `Theme: ${theme}`;
};
let theme = themes.includes(stored.get()) ? stored.get() : "system";
show(theme);
button.hidden = false;
button.addEventListener("click", () => {
  theme = themes[(themes.indexOf(theme) + 1) % themes.length];
  stored.set(theme);
  show(theme);
});

// Tables.
const number = new Intl.NumberFormat("en");
const value = (cell, kind) => {
  if (kind === "text") return cell.textContent.trim().toLowerCase();
  return cell.dataset.v === "" || cell.dataset.v === undefined ? null : Number(cell.dataset.v);
};
const compare = (a, b) => (typeof a === "number" ? a - b : a < b ? -1 : a > b ? 1 : 0);
const sort = (table, head, direction) => {
  const heads = all("th", table.tHead), body = table.tBodies[0], kind = head.dataset.kind;
  const column = heads.indexOf(head), sign = direction === "ascending" ? 1 : -1;
  const rows = Array.from(body.rows, (row, i) => [value(row.cells[column], kind), i, row]);
  // What has no value stays at the end either way.
  rows.sort(([a, i], [b, j]) => (a === null) - (b === null) || (a === null ? 0 : sign * compare(a, b)) || i - j);
  body.append(...rows.map(([, , row]) => row));
  for (const other of heads) other.setAttribute("aria-sort", other === head ? direction : "none");
};
const filter = (table, text) => {
  const heads = all("th", table.tHead).map((head) => head.dataset.key);
  const words = text.toLowerCase().split(/\s+/).filter(Boolean).map((word) => {
    const at = word.indexOf("="), column = at > 0 ? heads.indexOf(word.slice(0, at)) : -1;
    return column < 0 ? { word } : { column, word: word.slice(at + 1) };
  });
  let shown = 0;
  for (const row of table.tBodies[0].rows) {
    const cells = Array.from(row.cells, (cell) => cell.textContent.trim().toLowerCase()), line = cells.join(" ");
    row.hidden = !words.every(({ word, column }) => (column === undefined ? line.includes(word) : cells[column] === word));
    shown += !row.hidden;
  }
  const rows = table.tBodies[0].rows.length, total = Number(table.dataset.total), what = table.dataset.what;
  const whole = `${number.format(total)} ${what}${total === 1 ? "" : "s"}`;
  const part = rows < total ? `first ${number.format(rows)} of ${whole}` : whole;
  document.getElementById(`${table.id}-count`).textContent = words.length ? `${number.format(shown)} match, of the ${part}` : part;
};
for (const table of all("table[id]")) {
  for (const head of all("th", table.tHead)) {
    head.firstElementChild.addEventListener("click", () => {
      const now = head.getAttribute("aria-sort");
      // Numbers are asked for to see the largest.
      const first = head.dataset.kind === "number" && head.dataset.key !== "step" ? "descending" : "ascending";
      sort(table, head, now === "none" ? first : now === "ascending" ? "descending" : "ascending");
    });
  }
  const input = document.getElementById(`${table.id}-filter`);
  input.addEventListener("input", () => filter(table, input.value));
  input.addEventListener("keydown", (event) => {
    if (event.key === "Escape") { input.value = ""; filter(table, ""); }
  });
}
document.addEventListener("keydown", (event) => {
  const input = document.querySelector(".bar input");
  if (event.key !== "/" || event.ctrlKey || event.metaKey || event.altKey || !input || event.target.closest("input")) return;
  event.preventDefault();
  input.focus();
});

// Strips and curves: a cursor that follows the pointer or the arrow keys, and a line that reads out what is under it.
const short = (x) => (x === null ? "not recorded" : typeof x === "string" ? x : String(Number(x.toPrecision(6))));
const counts = (n, word) => (n ? [`${number.format(n)} ${word}`] : []);
const readout = (name) => document.querySelector(`.readout[data-for="${CSS.escape(name)}"]`);
const follow = (area, out, { columns, rows, text, place, enter, points = false }) => {
  const cursor = area.querySelector(".cursor");
  let at = null;
  const move = (column, row) => {
    at = [Math.min(columns - 1, Math.max(0, column)), Math.min(rows - 1, Math.max(0, row))];
    cursor.hidden = false;
    place(cursor, ...at);
    out.textContent = text(...at);
  };
  const leave = () => { cursor.hidden = true; out.textContent = ""; };
  const keys = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  area.addEventListener("pointermove", (event) => {
    const box = area.getBoundingClientRect();
    move(...spot((event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height));
  });
  const spot = (x, y) => (points ? [Math.round(x * (columns - 1)), 0] : [Math.floor(x * columns), Math.floor(y * rows)]);
  area.addEventListener("pointerleave", () => { if (document.activeElement !== area) leave(); });
  area.addEventListener("focus", () => { if (area.matches(":focus-visible")) move(...(at ?? [0, 0])); });
  area.addEventListener("blur", leave);
  area.addEventListener("keydown", (event) => {
    const [column, row] = at ?? [0, 0], step = keys[event.key];
    if (step) move(column + step[0], row + step[1]);
    else if (event.key === "Home") move(0, row);
    else if (event.key === "End") move(columns - 1, row);
    else if (event.key === "Enter" && enter) enter(column, row);
    else return;
    event.preventDefault();
  });
  if (enter) area.addEventListener("click", () => { if (at) enter(...at); });
};
const steps = ([first, last]) => (first === last ? `step ${first}` : `steps ${first}–${last}`);
for (const area of all("[data-strip]")) {
  const name = area.dataset.strip, { rows, cells } = data.strips[name], width = data.columns.length;
  const grid = new Map(cells.map((cell) => [cell[1] * width + cell[0], cell]));
  const text = (column, row) => {
    const cell = grid.get(row * width + column), where = `${steps(data.columns[column])}, ${rows[row]}: `;
    if (!cell) return `${where}nothing recorded`;
    const [, , same, within, propagated, diverged, margin, gap] = cell;
    const parts = [...counts(diverged, "diverged"), ...counts(propagated, "propagated"), ...counts(within, "within tolerance"),
      ...counts(same, "same bits")];
    if (!parts.length) parts.push("in one trace only, or not judged");
    if (margin !== null) parts.push(`worst ${short(margin)} of tolerance`);
    if (gap !== null) parts.push(`norms ${short(gap)} apart`);
    return where + parts.join(", ");
  };
  const place = (cursor, column, row) => {
    cursor.style.left = `${(100 * column) / width}%`;
    cursor.style.top = `${(100 * row) / rows.length}%`;
    cursor.style.width = `${100 / width}%`;
    cursor.style.height = `${100 / rows.length}%`;
  };
  const enter = (column, row) => {
    const table = document.getElementById("findings"), [first, last] = data.columns[column];
    if (!table) return;
    const input = document.getElementById("findings-filter"), phase = name === "phases" ? rows[row] : name;
    input.value = `${first === last ? `step=${first} ` : ""}phase=${phase}`;
    filter(table, input.value);
    input.focus();
    input.scrollIntoView({ block: "start" });
  };
  follow(area, readout(name), { columns: width, rows: rows.length, text, place, enter });
}
for (const area of all("[data-curve]")) {
  const name = area.dataset.curve, lines = data.curves[name], all_steps = data.steps, span = all_steps.at(-1) - all_steps[0];
  const text = (i) => `step ${all_steps[i]}: ${lines.map(([line, values]) => `${line} ${short(values[i])}`).join(", ")}`;
  const place = (cursor, i) => { cursor.style.left = `${span ? (100 * (all_steps[i] - all_steps[0])) / span : 50}%`; };
  follow(area, readout(name), { columns: all_steps.length, rows: 1, text, place, points: true });
}
const choices = all("[data-choose]");
for (const choice of choices) {
  choice.addEventListener("click", () => {
    for (const other of choices) other.setAttribute("aria-pressed", String(other === choice));
    for (const layer of all("[data-layer]")) layer.toggleAttribute("data-off", layer.dataset.layer !== choice.dataset.choose);
  });
}
})();
