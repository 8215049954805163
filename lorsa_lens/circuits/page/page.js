// The state of the page, and what changes it. GRAPH and KINDS are set before this script.
{
  const element = (id) => document.getElementById(id);
  const svg = element("graph"), tip = element("tip"), stage = element("stage");
  const state = { nodes: GRAPH.nodes_first, edges: GRAPH.edges_first, grouped: true, attends: true,
    selected: null, query: "" };
  const view = new View(svg, GRAPH);
  const panel = new Panel(element("panel"), GRAPH, (i) => shownNow.has(i));
  let shownNow = new Set(), drawn = null, units = null, focused = null;

  // ------------------------------------------------------------------------------------- drawing

  function redraw(keep) {
    const shown = within(GRAPH, state);
    shownNow = new Set(shown.nodes);
    units = united(GRAPH, shown, state.grouped);
    const place = arranged(GRAPH, units);
    drawn = drawGraph(svg, GRAPH, units, place);
    view.drawn = drawn;
    if (keep) view.update();
    else start();
    element("count").textContent = `${shown.nodes.length} of ${GRAPH.nodes.length} nodes, ` +
      `${shown.edges.length} of ${GRAPH.edges.length} edges`;
    for (const name of ["nodes", "edges"]) {
      element(name).value = state[name];
      element(`${name}-value`).textContent = `${state[name]}%`;
    }
    mark();
  }

  // Readable at first sight: text is not drawn below three quarters of its size.
  function start() {
    const [wide, high] = view.whole;
    const scale = Math.min(1.25, Math.max(0.75, svg.clientWidth / wide));
    const most = innerHeight * (innerWidth < 700 ? 0.6 : 0.72);
    stage.style.height = `${Math.round(Math.min(Math.max(high * scale, 280), most))}px`;
    view.fit(0.75);
  }

  const chosen = () => (state.selected === null ? null
    : drawn.nodes.get(units.home.get(state.selected)));

  // Classes of nodes and links: chosen, near it, far from it, found.
  function mark() {
    const centre = chosen();
    const near = new Set(centre ? [centre.unit.key] : []);
    const lines = [...drawn.links.values()];
    // What decides where the chosen head attends is shown with its own sources.
    const deciding = new Set(lines.map((line) => line.link)
      .filter((link) => link.attends && centre && link.target === centre.unit.key)
      .map((link) => link.source));
    for (const line of lines) {
      const { source, target } = line.link;
      const touches = centre && (source === centre.unit.key || target === centre.unit.key ||
        (deciding.has(target) && !line.link.attends));
      if (touches) near.add(source).add(target);
      line.classList.toggle("near", Boolean(touches));
      line.classList.toggle("far", Boolean(centre) && !touches);
    }
    const words = state.query.toLowerCase().split(/\s+/).filter(Boolean);
    for (const [key, node] of drawn.nodes) {
      node.classList.toggle("chosen", node === centre);
      node.classList.toggle("far", Boolean(centre) && !near.has(key));
      node.classList.toggle("found", words.length > 0 && matches(node.unit, words));
      node.setAttribute("aria-pressed", node === centre);
    }
    const start = centre ?? drawn.nodes.get(focused) ?? drawn.nodes.values().next().value;
    for (const node of drawn.nodes.values()) node.setAttribute("tabindex", node === start ? 0 : -1);
  }

  function matches(unit, words) {
    const text = unit.members.map((i) => GRAPH.nodes[i].title).join("\n").toLowerCase();
    return words.every((word) => (text + "\n" + unit.name.toLowerCase()).includes(word));
  }

  // -------------------------------------------------------------------------------------- choosing

  function choose(i, { ungroup = false, reach = false } = {}) {
    const opens = ungroup && state.grouped &&
      GRAPH.supernodes.some(([, members]) => members.includes(i));
    if (opens) {
      state.grouped = false;
      element("grouped").checked = false;
    }
    state.selected = i;
    redraw(!opens);
    const node = chosen();
    const single = node && typeof node.unit.key === "number";
    panel.show(node ? (single ? { key: i } : node.unit) : null);
    if (node && reach) view.reach(node.unit);
    keepInAddress();
  }

  function keepInAddress() {
    const kept = new URLSearchParams({ nodes: state.nodes, edges: state.edges });
    if (state.selected !== null) kept.set("node", GRAPH.nodes[state.selected].id);
    // Pages without an address of their own (in a frame of a notebook) keep none.
    if (location.protocol !== "about:") history.replaceState(null, "", `#${kept}`);
  }

  function readAddress() {
    const given = new URLSearchParams(location.hash.slice(1));
    for (const name of ["nodes", "edges"]) {
      const value = Number(given.get(name) ?? NaN);
      if (value >= 1 && value <= 100) state[name] = value;
    }
    const found = GRAPH.nodes.findIndex((node) => node.id === given.get("node"));
    redraw(false);
    if (found >= 0) choose(found, { ungroup: true, reach: true });
  }

  // -------------------------------------------------------------------------------------- tooltips

  function showTip(parts, x, y) {
    tip.replaceChildren(...parts);
    tip.hidden = false;
    const [width, height] = [stage.clientWidth, stage.clientHeight];
    const right = x + 16 + tip.offsetWidth > width ? x - 16 - tip.offsetWidth : x + 16;
    const below = y + 16 + tip.offsetHeight > height ? y - 12 - tip.offsetHeight : y + 16;
    tip.style.left = `${Math.max(4, Math.min(right, width - tip.offsetWidth - 4))}px`;
    tip.style.top = `${Math.max(4, below)}px`;
  }

  function pointed(event) {
    const box = stage.getBoundingClientRect();
    const [x, y] = [event.clientX - box.left, event.clientY - box.top];
    const node = event.target.closest?.(".node"), line = event.target.closest?.(".link");
    if (node) showTip(panel.brief(node.unit), x, y);
    else if (line) showTip(panel.link(line.link), x, y);
    else tip.hidden = true;
  }

  function showTipOf(node) {
    const box = stage.getBoundingClientRect(), at = node.getBoundingClientRect();
    showTip(panel.brief(node.unit), at.right - box.left, at.bottom - box.top);
  }

  // --------------------------------------------------------------------------------- pointer, wheel

  const fingers = new Map();
  let moved = 0;
  const spread = ([a, b]) => Math.hypot(a.clientX - b.clientX, a.clientY - b.clientY);

  svg.addEventListener("pointerdown", (event) => {
    if (fingers.size === 0) moved = 0;
    fingers.set(event.pointerId, event);
  });
  addEventListener("pointerup", (event) => fingers.delete(event.pointerId));
  addEventListener("pointercancel", (event) => fingers.delete(event.pointerId));
  svg.addEventListener("pointermove", (event) => {
    const before = fingers.get(event.pointerId);
    if (!before) return pointed(event);
    tip.hidden = true;
    const apart = fingers.size === 2 ? spread([...fingers.values()]) : 0;
    fingers.set(event.pointerId, event);
    const [right, down] = [event.clientX - before.clientX, event.clientY - before.clientY];
    moved += Math.hypot(right, down);
    if (apart) view.zoom(spread([...fingers.values()]) / apart);
    else if (moved > 3) view.pan(right, down);
    return undefined;
  });
  svg.addEventListener("pointerleave", () => { tip.hidden = true; });
  svg.addEventListener("click", (event) => {
    if (moved > 3) return;
    const node = event.target.closest(".node");
    choose(node ? node.unit.lead : null);
  });
  svg.addEventListener("wheel", (event) => {
    if (!event.ctrlKey && !event.metaKey) return; // the page scrolls
    event.preventDefault();
    const box = svg.getBoundingClientRect();
    const at = [event.clientX - box.left, event.clientY - box.top];
    view.zoom(Math.exp(-Math.max(-60, Math.min(60, event.deltaY)) / 120), at);
  }, { passive: false });

  // -------------------------------------------------------------------------------------- keyboard

  // Up and down follow the strongest edge, left and right go to the next node as they are read.
  function neighbour(node, key) {
    if (key === "ArrowLeft" || key === "ArrowRight") {
      const all = [...drawn.nodes.values()];
      return all[all.indexOf(node) + (key === "ArrowRight" ? 1 : -1)];
    }
    const [from, to] = key === "ArrowUp" ? ["source", "target"] : ["target", "source"];
    const links = [...drawn.links.values()].map((line) => line.link)
      .filter((link) => link[from] === node.unit.key)
      .sort((a, b) => Math.abs(b.flow) - Math.abs(a.flow));
    return links.length ? drawn.nodes.get(links[0][to]) : undefined;
  }

  function focusOn(node) {
    focused = node.unit.key;
    mark();
    node.setAttribute("tabindex", 0);
    view.reach(node.unit);
    node.focus({ preventScroll: true });
    showTipOf(node);
  }

  const ZOOMS = { "+": 1.25, "=": 1.25, "-": 0.8 };
  svg.addEventListener("keydown", (event) => {
    const node = event.target.closest(".node");
    if (event.key in ZOOMS) view.zoom(ZOOMS[event.key]);
    else if (event.key === "0") view.fit();
    else if (event.key === "Escape") {
      tip.hidden = true;
      choose(null);
    } else if (node && (event.key === "Enter" || event.key === " ")) {
      choose(node.unit.lead);
      focusOn(chosen());
    } else if (node && event.key.startsWith("Arrow")) {
      const next = neighbour(node, event.key);
      if (next) focusOn(next);
    } else return;
    event.preventDefault();
  });
  svg.addEventListener("focusout", () => { tip.hidden = true; });

  // -------------------------------------------------------------------------------------- controls

  for (const name of ["nodes", "edges"]) {
    element(name).addEventListener("input", (event) => {
      state[name] = Number(event.target.value);
      redraw(false);
      keepInAddress();
    });
  }
  for (const name of ["grouped", "attends"]) {
    element(name)?.addEventListener("change", (event) => {
      state[name] = event.target.checked;
      redraw(false);
    });
  }
  element("query").addEventListener("input", (event) => {
    state.query = event.target.value;
    mark();
  });
  element("controls").addEventListener("submit", (event) => {
    event.preventDefault();
    const found = [...drawn.nodes.values()].find((node) => node.classList.contains("found"));
    if (found) choose(found.unit.lead, { reach: true });
  });
  document.addEventListener("click", (event) => {
    const button = event.target.closest("[data-node], [data-action]");
    if (!button) return;
    if (button.dataset.node !== undefined) {
      choose(Number(button.dataset.node), { ungroup: true, reach: true });
    }
    const actions = { in: () => view.zoom(1.25), out: () => view.zoom(0.8), fit: () => view.fit(),
      clear: () => choose(null) };
    actions[button.dataset.action]?.();
  });
  for (const sample of document.querySelectorAll("#legend [data-kind]")) {
    sample.setAttribute("d", outline(sample.dataset.kind, 32));
  }
  addEventListener("resize", () => redraw(false));
  addEventListener("hashchange", readAddress);
  readAddress();
}
