"use strict";
// The table of all heads. HEADS holds a row for each; the state stands in the address, so that a
// sorted and filtered table can be linked to.
{
  const [LAYER, HEAD, BEHAVIOURS, , , , , , WRITES, READS] = HEADS[0].keys();
  const AT = { head: HEAD, behaviours: BEHAVIOURS, density: 3, size: 4, distance: 5, origin: 6,
    effective: 7, writes: WRITES, reads: READS };
  const NUMBERS = ["density", "size", "distance", "effective"];
  const PER_PAGE = 100;
  const START = { query: "", layer: "", behaviour: "", alive: "", sort: "head", down: "", page: "0" };

  const element = (id) => document.getElementById(id);
  const body = document.querySelector("#heads tbody");
  const buttons = [...document.querySelectorAll("#heads th button")];
  const name = (row) => `L${row[LAYER]}.${row[HEAD]}`;
  const texts = HEADS.map((row) =>
    [name(row), ...row[BEHAVIOURS], ...row[WRITES], ...row[READS]].join("\n").toLowerCase());
  let state = { ...START };

  function key(row) {
    if (state.sort === "head") return row[LAYER] * 1e7 + row[HEAD];
    const value = row[AT[state.sort]];
    return Array.isArray(value) ? value.join(" ") : value;
  }

  function compare(one, other) {
    const [a, b] = [key(one), key(other)];
    const missing = (value) => value === null || value === "";
    if (missing(a) || missing(b)) return missing(a) - missing(b); // what is not known comes last
    const order = typeof a === "number" ? a - b : a.localeCompare(b, "en", { numeric: true });
    return state.down ? -order : order;
  }

  function chosen() {
    const words = state.query.toLowerCase().split(/\s+/).filter(Boolean);
    return HEADS.filter((row, index) =>
      (state.layer === "" || row[LAYER] === Number(state.layer)) &&
      (state.behaviour === "" || row[BEHAVIOURS].includes(state.behaviour)) &&
      (state.alive === "" || row[AT.density] > 0) &&
      words.every((word) => texts[index].includes(word))).sort(compare);
  }

  function cell(content, number) {
    const made = document.createElement("td");
    made.append(content);
    if (number) made.className = "number";
    return made;
  }

  function line(row) {
    const made = document.createElement("tr");
    const link = document.createElement("a");
    link.href = `heads/${name(row)}.html`;
    link.textContent = name(row);
    made.append(cell(link));
    for (const column of Object.keys(AT).slice(1)) {
      const value = row[AT[column]];
      const gap = column === "behaviours" ? ", " : "  ";
      made.append(cell(Array.isArray(value) ? value.join(gap) : String(value ?? ""),
        NUMBERS.includes(column)));
    }
    return made;
  }

  function draw() {
    const rows = chosen();
    const last = Math.max(0, Math.ceil(rows.length / PER_PAGE) - 1);
    const page = Math.min(Math.max(0, Number(state.page) || 0), last);
    const from = page * PER_PAGE;
    body.replaceChildren(...rows.slice(from, from + PER_PAGE).map(line));
    element("count").textContent = `${rows.length} of ${HEADS.length} heads`;
    element("place").textContent = `page ${page + 1} of ${last + 1}`;
    element("previous").disabled = page === 0;
    element("next").disabled = page === last;
    for (const button of buttons) {
      const sorted = button.dataset.column === state.sort;
      const order = !sorted ? "none" : state.down ? "descending" : "ascending";
      button.parentElement.setAttribute("aria-sort", order);
    }
    state.page = String(page);
  }

  function change(changes) {
    state = { ...state, page: "0", ...changes };
    draw();
    const kept = Object.entries(state).filter(([field, value]) => value !== START[field]);
    history.replaceState(null, "", "#" + new URLSearchParams(kept));
  }

  function read() {
    const given = new URLSearchParams(location.hash.slice(1));
    for (const field of Object.keys(START)) state[field] = given.get(field) ?? START[field];
    if (!(state.sort in AT)) state.sort = START.sort;
    for (const field of ["query", "layer", "behaviour"]) element(field).value = state[field];
    element("alive").checked = state.alive !== "";
    draw();
  }

  for (const behaviour of [...new Set(HEADS.flatMap((row) => row[BEHAVIOURS]))].sort()) {
    element("behaviour").append(new Option(behaviour, behaviour));
  }
  element("query").addEventListener("input", (event) => change({ query: event.target.value }));
  for (const field of ["layer", "behaviour"]) {
    element(field).addEventListener("change", (event) => change({ [field]: event.target.value }));
  }
  element("alive").addEventListener("change", (event) =>
    change({ alive: event.target.checked ? "1" : "" }));
  element("controls").addEventListener("submit", (event) => event.preventDefault());
  for (const button of buttons) {
    button.addEventListener("click", () => {
      const column = button.dataset.column;
      // Numbers start with the largest.
      const first = NUMBERS.includes(column) ? "1" : "";
      const down = state.sort === column ? (state.down ? "" : "1") : first;
      change({ sort: column, down });
    });
  }
  element("previous").addEventListener("click", () => change({ page: String(state.page - 1) }));
  element("next").addEventListener("click", () => change({ page: String(Number(state.page) + 1) }));
  addEventListener("hashchange", read);
  read();
}
