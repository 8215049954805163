"use strict";
// Prompts of one's own. LORSAS says how many heads each layer has, and whether they have pages.
// All text goes into the page as text; all answers come from the server that sent the page.
{
  const RANGES = { scale: [-4, 4, 0.1, 1], set: [-2, 2, 0.05, 0], add: [-2, 2, 0.05, 0] };
  const VERBS = { scale: "times", set: "set to", add: "plus" };
  const MAX_ROWS = 64; // of a z pattern

  const element = (id) => document.getElementById(id);
  const body = (id) => document.querySelector(`#${id} tbody`);
  let shown = null; // { prompt, tokens, active, position }
  let edits = []; // { layer, head, kind, value, here, unit }

  function make(tag, properties, ...content) {
    const made = Object.assign(document.createElement(tag), properties);
    made.append(...content);
    return made;
  }

  const number = (value) => value === null ? "–" : String(Number(value.toPrecision(4)));
  const name = (layer, head) => `L${layer}.${head}`;
  const percent = (value) => `${(100 * value).toPrecision(3)} %`;
  const cell = (...content) => make("td", {}, ...content);
  const numbers = (value) => make("td", { className: "number" }, value);

  function linked(layer, head) {
    if (!LORSAS.has_site) return name(layer, head);
    return make("a", { href: `heads/${name(layer, head)}.html` }, name(layer, head));
  }

  function button(text, label, act) {
    const made = make("button", { type: "button", onclick: act }, text);
    made.setAttribute("aria-label", label);
    return made;
  }

  function say(text, failed = false) {
    element("status").textContent = text;
    element("status").classList.toggle("failed", failed);
  }

  async function ask(question, fields) {
    const headers = { "Content-Type": "application/json" };
    const answer = await fetch(`api/${question}`,
      { method: "POST", headers, body: JSON.stringify(fields) });
    const found = await answer.json();
    if (!answer.ok) throw new Error(found.error);
    return found;
  }

  // Runs the newest call only: while one is under way, a newer one takes the place of all that wait.
  function newest(work) {
    let running = false;
    let next = null;
    return async (...given) => {
      next = given;
      if (running) return;
      running = true;
      while (next !== null) {
        const current = next;
        next = null;
        try {
          await work(...current);
        } catch (error) {
          say(error.message, true);
        }
      }
      running = false;
    };
  }

  // --- the prompt ------------------------------------------------------------------------------

  const read = newest(async (prompt) => {
    say("Reading …");
    const { tokens, active } = await ask("read", { prompt });
    shown = { prompt, tokens, active, position: tokens.length - 1 };
    element("result").hidden = false;
    element("z-pattern").hidden = true;
    history.replaceState(null, "", "#" + new URLSearchParams({ prompt }));
    say(`${tokens.length} tokens`);
    element("tokens").replaceChildren(...tokens.map((token, position) =>
      button(token, `token ${position}: ${token}`, () => choose(position))));
    choose(shown.position);
    drawEdits();
  });

  function choose(position) {
    shown.position = position;
    [...element("tokens").children].forEach((made, at) =>
      made.setAttribute("aria-pressed", String(at === position)));
    for (const made of document.querySelectorAll(".chosen")) {
      made.textContent = shown.tokens[position];
    }
    body("active").replaceChildren(...shown.active[position].map(([layer, head, z, source]) =>
      make("tr", {}, cell(linked(layer, head)), numbers(number(z)),
        cell(`${shown.tokens[source]} (${source})`),
        cell(button("z pattern", `z pattern of ${name(layer, head)}`, () => look(layer, head)), " ",
          button("steer", `steer ${name(layer, head)}`, () => addEdit(layer, head))))));
    steer();
  }

  // --- predictions -----------------------------------------------------------------------------

  const predict = newest(async () => {
    const current = shown;
    const { prompt, position } = current;
    const { predictions } = await ask("steer", {
      prompt,
      position,
      edits: edits.map(({ layer, head, kind, value, here }) =>
        ({ layer, head, kind, value, position: here ? position : null })),
    });
    if (shown !== current) return;
    body("predictions").replaceChildren(...predictions.map(
      ([token, logitBefore, logitAfter, before, after]) =>
        make("tr", {}, cell(token), numbers(percent(before)), numbers(percent(after)),
          bars(before, after), numbers(number(logitBefore)), numbers(number(logitAfter)))));
    say(`${shown.tokens.length} tokens`);
  });

  const steer = () => { if (shown !== null) predict(); };

  function bars(...values) {
    const made = make("td", { className: "bars" });
    for (const [place, value] of values.entries()) {
      const bar = make("div", { className: place ? "after" : "before" });
      bar.style.width = `${100 * value}%`;
      made.append(bar);
    }
    made.setAttribute("aria-hidden", "true");
    return made;
  }

  // --- steering --------------------------------------------------------------------------------

  function addEdit(layer, head) {
    if (!edits.some((edit) => edit.layer === layer && edit.head === head)) {
      const here = shown === null ? [] : shown.active.flat();
      const sizes = here.filter(([l, h]) => l === layer && h === head).map((row) => Math.abs(row[2]));
      const unit = Math.max(0, ...sizes) || 1; // the largest |z| of the head that is in sight
      edits.push({ layer, head, kind: "scale", value: RANGES.scale[3], here: false, unit });
    }
    drawEdits();
    element("edits").lastElementChild.querySelector("[type=range]").focus();
    steer();
  }

  function drawEdits() {
    element("edits").replaceChildren(...edits.map(editRow));
  }

  function editRow(edit) {
    const title = name(edit.layer, edit.head);
    const slider = make("input", { type: "range" });
    const typed = make("input", { type: "number", step: "any" });
    const kind = make("select", {}, ...Object.entries(VERBS).map(([value, text]) =>
      new Option(text, value)));
    const here = make("input", { type: "checkbox", checked: edit.here });
    slider.setAttribute("aria-label", `how much to change ${title}`);
    typed.setAttribute("aria-label", `number for ${title}`);
    kind.setAttribute("aria-label", `how to change ${title}`);

    function show() {
      const [low, high, step] = RANGES[edit.kind];
      const unit = edit.kind === "scale" ? 1 : edit.unit;
      Object.assign(slider, { min: low * unit, max: high * unit, step: step * unit });
      slider.value = edit.value;
      typed.value = Number(edit.value.toPrecision(4));
      kind.value = edit.kind;
    }
    function change(changes) {
      Object.assign(edit, changes);
      show();
      steer();
    }
    slider.addEventListener("input", () => change({ value: Number(slider.value) }));
    typed.addEventListener("change", () => {
      if (Number.isFinite(typed.valueAsNumber)) change({ value: typed.valueAsNumber });
    });
    kind.addEventListener("change", () =>
      change({ kind: kind.value, value: RANGES[kind.value][3] }));
    here.addEventListener("change", () => change({ here: here.checked }));
    show();
    return make("div", { className: "edit" },
      make("b", {}, linked(edit.layer, edit.head)), kind, slider, typed,
      button("ablate", `switch ${title} off`, () => change({ kind: "scale", value: 0 })),
      make("label", {}, here, " only here"),
      button("×", `remove ${title}`, () => {
        edits = edits.filter((other) => other !== edit);
        drawEdits();
        steer();
      }));
  }

  function parseHead(text) {
    const found = /^L?(\d+)\.(\d+)$/i.exec(text.trim());
    const [layer, head] = found === null ? [] : [Number(found[1]), Number(found[2])];
    return head < LORSAS.n_heads[layer] ? [layer, head] : null;
  }

  // --- z pattern -------------------------------------------------------------------------------

  const look = newest(async (layer, head) => {
    const current = shown;
    const { fetched } = await ask("z_pattern", { prompt: current.prompt, layer, head });
    if (shown !== current) return;
    const rows = [...fetched].sort((a, b) => Math.abs(b[1]) - Math.abs(a[1])).slice(0, MAX_ROWS)
      .sort((a, b) => a[0] - b[0]);
    const largest = Math.max(0, ...rows.flatMap((row) => row[2].map(Math.abs))) || 1;
    element("z-pattern").hidden = false;
    element("z-pattern-head").replaceChildren(linked(layer, head));
    element("readout").textContent = rows.length ? "Point at a cell." : "It stays nowhere here.";
    const titles = shown.tokens.map((token) => make("th", { scope: "col" },
      make("span", {}, token)));
    element("heat").replaceChildren(
      make("thead", {}, make("tr", {}, make("th", {}, "query"), make("th", {}, "z"), ...titles)),
      make("tbody", {}, ...rows.map((row) => heatRow(row, largest))));
    element("z-pattern").scrollIntoView({ block: "nearest" });
  });

  function heatRow([query, z, values], largest) {
    const token = shown.tokens[query];
    const total = values.reduce((sum, value) => sum + Math.abs(value), 0) || 1;
    const tell = (key) => {
      element("readout").textContent = `${token} (${query}) from ${shown.tokens[key]} (${key}): ` +
        `${number(values[key])}, ${percent(Math.abs(values[key]) / total)} of |A·v|`;
    };
    const strongest = values.reduce(
      (best, value, key) => Math.abs(value) > Math.abs(values[best]) ? key : best, 0);
    const choice = button(token, `query ${query}: ${token}`, () => choose(query));
    choice.addEventListener("focus", () => tell(strongest));
    const cells = values.map((value, key) => {
      const made = make("td", { onmouseenter: () => tell(key) });
      made.className = value < 0 ? "negative" : "positive";
      made.style.setProperty("--share", String(Math.abs(value) / largest));
      return made;
    });
    return make("tr", {}, make("th", { scope: "row" }, choice), numbers(number(z)), ...cells);
  }

  // --- the start -------------------------------------------------------------------------------

  element("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    read(element("prompt").value);
  });
  element("prompt").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      element("ask").requestSubmit();
    }
  });
  element("add").addEventListener("submit", (event) => {
    event.preventDefault();
    const head = parseHead(element("head").value);
    if (head === null) return say("There is no such head: write layer and head as L0.12.", true);
    element("head").value = "";
    addEdit(...head);
  });
  element("clear").addEventListener("click", () => {
    edits = [];
    drawEdits();
    steer();
  });

  const given = new URLSearchParams(location.hash.slice(1));
  const head = parseHead(given.get("head") ?? "");
  if (head !== null) edits.push({ layer: head[0], head: head[1], kind: "scale",
    value: RANGES.scale[3], here: false, unit: 1 });
  if (given.get("prompt")) {
    element("prompt").value = given.get("prompt");
    read(given.get("prompt"));
  } else {
    element("prompt").focus();
  }
}
