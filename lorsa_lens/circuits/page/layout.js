// What of the graph is shown, and where it stands. No element of the page is touched here.

const SIZE = { height: 24, gap: 10, between: 52, column: 22, lane: 12, char: 7, pad: 22, narrow: 44,
  left: 74, bottom: 58, top: 22, most: 24 };

// Nodes of one position and row stand side by side; many of them in several lines.
const lanesOf = (n) => (n <= 3 ? n : Math.ceil(Math.sqrt(1.8 * n)));

const shorten = (text, most) => (text.length <= most ? text : text.slice(0, most - 1) + "…");

// The text on a node: its name, and its label where it has one.
const inscription = (node) =>
  shorten(node.label && node.kind !== "logit" ? `${node.name} ${node.label}` : node.name, SIZE.most);

// Nodes and edges that come before the thresholds are taken: the fewest that carry so much of the
// influence. Those that reach no logit on what is taken are left out again.
function within(graph, state) {
  const passes = (before, percent) => percent >= 100 || before * 100 < percent;
  const kept = graph.nodes.map((node, i) => i === state.selected || node.kind === "logit" ||
    passes(node.before, state.nodes));
  const edges = graph.edges.filter((edge) => kept[edge.source] && kept[edge.target] &&
    (passes(edge.before, state.edges) ||
      edge.source === state.selected || edge.target === state.selected));
  const leaving = new Map();
  for (const edge of edges) {
    if (!leaving.has(edge.source)) leaving.set(edge.source, []);
    leaving.get(edge.source).push(edge.target);
  }
  const reaches = new Set();
  for (let i = graph.nodes.length - 1; i >= 0; i--) { // targets stand behind their sources
    if (!kept[i]) continue;
    const leads = (leaving.get(i) ?? []).some((target) => reaches.has(target));
    if (leads || i === state.selected || graph.nodes[i].kind === "logit") reaches.add(i);
  }
  const shown = edges.filter((edge) => reaches.has(edge.source) && reaches.has(edge.target));
  const attends = state.attends ? graph.attends.filter((link) => reaches.has(link.target)) : [];
  for (const { source } of attends) {
    if (reaches.has(source)) continue;
    reaches.add(source);
    for (const edge of strongestInto(graph, source)) {
      reaches.add(edge.source);
      shown.push(edge);
    }
  }
  return { nodes: [...reaches].sort((a, b) => a - b), edges: [...new Set(shown)], attends };
}

// What only decides where a head attends has no influence of its own: it brings its sources along.
const strongestInto = (graph, node) => graph.edges.filter((edge) => edge.target === node)
  .sort((a, b) => Math.abs(b.weight) - Math.abs(a.weight)).slice(0, 2);

// Nodes as units to draw: one each, or one for a whole supernode, which stands where its
// strongest member stands. Edges between units add up.
function united(graph, shown, grouped) {
  const home = new Map(); // node -> key of its unit
  const units = new Map();
  const groups = grouped ? graph.supernodes : [];
  for (const i of shown.nodes) {
    const group = groups.findIndex(([, members]) => members.includes(i));
    const key = group < 0 ? i : `group-${group}`;
    home.set(i, key);
    const node = graph.nodes[i];
    const unit = units.get(key) ?? { key, members: [], lead: i, name: "" };
    unit.members.push(i);
    if (node.influence > graph.nodes[unit.lead].influence) unit.lead = i;
    unit.name = group < 0 ? inscription(node) : shorten(groups[group][0], SIZE.most);
    units.set(key, unit);
  }
  const links = new Map();
  for (const edge of shown.edges) {
    const [source, target] = [home.get(edge.source), home.get(edge.target)];
    if (source === target) continue;
    const key = `${source} ${target}`;
    const link = links.get(key) ?? { source, target, flow: 0, edges: [] };
    link.flow += edge.flow;
    link.edges.push(edge);
    links.set(key, link);
  }
  const reasons = new Map();
  for (const link of shown.attends) {
    const [source, target] = [home.get(link.source), home.get(link.target)];
    if (source === target) continue;
    const key = `${source} ${target} attends`;
    const reason = reasons.get(key) ?? { source, target, flow: 0, attends: [] };
    reason.attends.push(link);
    reasons.set(key, reason);
  }
  return { units: [...units.values()], links: [...links.values(), ...reasons.values()], home };
}

// Positions across, layers up; in one cell the strongest first.
function arranged(graph, { units }) {
  const cells = new Map();
  for (const unit of units) {
    const { row, pos, kind } = graph.nodes[unit.lead];
    const { influence } = graph.nodes[unit.lead];
    Object.assign(unit, { row, pos, kind, influence, width: Math.max(SIZE.narrow,
      [...unit.name].length * SIZE.char + SIZE.pad) });
    const key = `${row} ${pos}`;
    cells.set(key, [...(cells.get(key) ?? []), unit]);
  }
  const rows = [...new Set(units.map((unit) => unit.row))].sort((a, b) => a - b);
  const columns = [...new Set(units.map((unit) => unit.pos))].sort((a, b) => a - b);
  const place = { rows: new Map(), columns: new Map() };
  let x = SIZE.left;
  for (const [number, pos] of columns.entries()) {
    const here = [...cells].filter(([key]) => key.endsWith(` ${pos}`)).map(([, cell]) => cell);
    const lane = Math.max(...here.flat().map((unit) => unit.width)) + SIZE.lane;
    const width = lane * Math.max(...here.map((cell) => lanesOf(cell.length)));
    const skipped = number > 0 && pos > columns[number - 1] + 1;
    x += skipped ? SIZE.column : 0;
    place.columns.set(pos, { x: x + width / 2, width, lane, skipped });
    x += width + SIZE.column;
  }
  let y = 0;
  for (const row of [...rows].reverse()) {
    const here = [...cells].filter(([key]) => key.startsWith(`${row} `)).map(([, cell]) => cell);
    const high = Math.max(...here.map((cell) => Math.ceil(cell.length / lanesOf(cell.length))));
    const height = high * (SIZE.height + SIZE.gap) - SIZE.gap;
    place.rows.set(row, { y: y + height / 2, height });
    y += height + SIZE.between;
  }
  for (const cell of cells.values()) fill(cell, place);
  return { ...place, width: x, height: y - SIZE.between };
}

function fill(cell, place) {
  cell.sort((a, b) => b.influence - a.influence);
  const row = place.rows.get(cell[0].row), column = place.columns.get(cell[0].pos);
  const lanes = lanesOf(cell.length), lines = Math.ceil(cell.length / lanes);
  for (const [number, unit] of cell.entries()) {
    const line = Math.floor(number / lanes);
    const inLine = Math.min(lanes, cell.length - line * lanes);
    unit.x = column.x + ((number % lanes) - (inLine - 1) / 2) * column.lane;
    unit.y = row.y + (line - (lines - 1) / 2) * (SIZE.height + SIZE.gap);
  }
}

// From the top of the source to the foot of the target. Ends lean towards each other; a link that
// climbs past other nodes of its own column bows out, to the left or to the right in turn.
function route(source, target, side) {
  const across = target.x - source.x;
  const lean = (unit, way) => Math.max(-unit.width / 3, Math.min(unit.width / 3, way / 9));
  const [y0, y1] = [source.y - SIZE.height / 2, target.y + SIZE.height / 2];
  const reach = Math.max(22, Math.abs(y0 - y1) * 0.45);
  const passes = Math.abs(across) < 8 && y0 - y1 > 1.6 * SIZE.between;
  const bow = passes ? side * (source.width / 2 + 12 + 0.12 * (y0 - y1)) : 0;
  const x0 = source.x + lean(source, passes ? bow : across);
  const x1 = target.x - lean(target, passes ? -bow : across);
  return `M${x0} ${y0}C${x0 + bow} ${y0 - reach} ${x1 + bow} ${y1 + reach} ${x1} ${y1}`;
}

// The outline of a node around (0, 0): kinds differ in shape, not in colour alone.
function outline(kind, width) {
  const [w, h] = [width / 2, SIZE.height / 2];
  const round = (r) => `M${r - w} ${-h}H${w - r}A${r} ${r} 0 0 1 ${w} ${r - h}V${h - r}` +
    `A${r} ${r} 0 0 1 ${w - r} ${h}H${r - w}A${r} ${r} 0 0 1 ${-w} ${h - r}V${r - h}` +
    `A${r} ${r} 0 0 1 ${r - w} ${-h}Z`;
  const cut = 7;
  const shapes = {
    attention_head: `M${cut - w} ${-h}H${w - cut}L${w} ${cut - h}V${h - cut}L${w - cut} ${h}` +
      `H${cut - w}L${-w} ${h - cut}V${cut - h}Z`,
    mlp: `M${cut + 2 - w} ${-h}H${w}L${w - cut - 2} ${h}H${-w}Z`,
    error: `M${h - w} ${-h}H${w - h}L${w} 0L${w - h} ${h}H${h - w}L${-w} 0Z`,
    logit: `${round(3)}M${3 - w} ${3 - h}H${w - 3}V${h - 3}H${3 - w}Z`,
    head: round(h),
    feature: round(6),
  };
  return shapes[kind] ?? round(1.5);
}
