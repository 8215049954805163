// The graph as SVG: drawing, and the window on it that zooms and pans.

const svgElement = (tag, values = {}, ...children) => {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(values)) made.setAttribute(name, value);
  made.append(...children);
  return made;
};

const rowName = (row, nLayers) => {
  if (row < 0) return "tokens";
  if (row >= 2 * nLayers) return "output";
  return row % 2 ? `MLP ${(row - 1) / 2}` : `attn ${row / 2}`;
};

const percent = (share) => {
  const value = 100 * share;
  return `${Math.abs(value) >= 9.95 || value === 0 ? value.toFixed(0) : value.toFixed(1)}%`;
};

// Draws everything anew; returns the elements of units and links by key.
function drawGraph(svg, graph, united, place) {
  const strongest = Math.max(1e-12, ...united.links.map((link) => Math.abs(link.flow)));
  const byKey = new Map(united.units.map((unit) => [unit.key, unit]));
  const bands = [...place.rows].map(([, row], number) => svgElement("rect", {
    class: number % 2 ? "band" : "band other", x: -4000, width: place.width + 8000,
    y: row.y - row.height / 2 - SIZE.between / 2, height: row.height + SIZE.between }));
  const links = new Map();
  const ordered = [...united.links].sort((a, b) => Math.abs(a.flow) - Math.abs(b.flow));
  for (const [place, link] of ordered.entries()) {
    const path = route(byKey.get(link.source), byKey.get(link.target), place % 2 ? 1 : -1);
    const width = link.attends ? 2.5 : 1 + 6 * Math.sqrt(Math.abs(link.flow) / strongest);
    const kind = link.attends ? "attends" : link.flow < 0 ? "lowers" : "raises";
    const line = svgElement("g", { class: `link ${kind}` },
      svgElement("path", { class: "line", d: path, "stroke-width": width.toFixed(2) }),
      svgElement("path", { class: "hit", d: path }));
    line.link = link;
    links.set(`${link.source} ${link.target} ${kind}`, line);
  }
  const nodes = new Map();
  const reading = [...united.units].sort((a, b) => b.row - a.row || a.pos - b.pos ||
    a.y - b.y || a.x - b.x);
  for (const unit of reading) {
    const text = svgElement("text", { y: 4.5 });
    text.textContent = unit.name;
    const grouped = unit.members.length > 1 || typeof unit.key === "string";
    const shape = outline(unit.kind, unit.width);
    const node = svgElement("g", { class: `node ${unit.kind}${grouped ? " group" : ""}`,
      transform: `translate(${unit.x} ${unit.y})`, role: "button", tabindex: -1,
      "data-key": unit.key }, svgElement("path", { class: "back", d: shape }),
    svgElement("path", { class: "shape", d: shape }), text);
    const lead = graph.nodes[unit.lead];
    node.setAttribute("aria-label", grouped ? `supernode ${unit.name}: ${unit.members.length} nodes`
      : lead.title);
    node.unit = unit;
    nodes.set(unit.key, node);
  }
  const axes = svgElement("g", { class: "axes", "aria-hidden": "true" });
  svg.replaceChildren(svgElement("g", {}, ...bands), svgElement("g", {}, ...links.values()),
    svgElement("g", { id: "nodes" }, ...nodes.values()), axes);
  return { nodes, links, axes, place };
}

// What of the drawing is seen: its left upper corner, and pixels for each of its units.
class View {
  constructor(svg, graph) {
    Object.assign(this, { svg, graph, x: 0, y: 0, scale: 1, drawn: null });
  }

  get size() {
    return [this.svg.clientWidth || 1, this.svg.clientHeight || 1];
  }

  get whole() {
    const { width, height } = this.drawn.place;
    return [width, height + SIZE.top + SIZE.bottom];
  }

  // The whole drawing. Where a smallest scale keeps it from fitting, its right upper corner, where
  // the answer stands.
  fit(smallest = 0.1) {
    const [width, height] = this.size, [wide, high] = this.whole;
    this.scale = Math.min(1.25, Math.max(smallest, Math.min(width / wide, height / high)));
    const spare = [width / this.scale - wide, height / this.scale - high];
    this.x = spare[0] >= 0 ? -spare[0] / 2 : -spare[0];
    this.y = -SIZE.top - Math.max(0, spare[1]) / 2;
    this.update();
  }

  // Around a point of the element, in pixels; its middle if none is given.
  zoom(factor, at = this.size.map((length) => length / 2)) {
    const scale = Math.min(4, Math.max(0.1, this.scale * factor));
    this.x += at[0] / this.scale - at[0] / scale;
    this.y += at[1] / this.scale - at[1] / scale;
    this.scale = scale;
    this.update();
  }

  pan(right, down) {
    this.x -= right / this.scale;
    this.y -= down / this.scale;
    this.update();
  }

  // Brings a unit into sight.
  reach(unit) {
    const [width, height] = this.size.map((length) => length / this.scale);
    const margin = 40 / this.scale;
    const side = unit.width / 2 + margin;
    this.x = Math.min(unit.x - side, Math.max(unit.x + side - width, this.x));
    this.y = Math.min(unit.y - margin, Math.max(unit.y + 2 * margin - height, this.y));
    this.update();
  }

  update() {
    const [width, height] = this.size.map((length) => length / this.scale);
    const { place } = this.drawn;
    this.x = Math.min(place.width - 60, Math.max(60 - width, this.x));
    this.y = Math.min(place.height, Math.max(40 - height, this.y));
    this.svg.setAttribute("viewBox", `${this.x} ${this.y} ${width} ${height}`);
    this.drawn.axes.replaceChildren(...this.#axes(width, height));
  }

  // Names of rows stay at the left edge and tokens at the lower one, always at the same size.
  #axes(width, height) {
    const one = 1 / this.scale;
    const write = (text, x, y, anchor) => {
      const made = svgElement("text", { transform: `translate(${x} ${y}) scale(${one})`,
        "text-anchor": anchor });
      made.textContent = text;
      return made;
    };
    const foot = this.y + height;
    const { rows, columns } = this.drawn.place;
    const strips = [
      svgElement("rect", { class: "strip", x: this.x, y: this.y, width: 58 * one, height }),
      svgElement("rect", { class: "strip", x: this.x, y: foot - 36 * one, width, height: 36 * one }),
    ];
    const texts = [...rows].map(([row, { y }]) =>
      write(rowName(row, this.graph.n_layers), this.x + 8 * one, y + 4 * one, "start"));
    for (const [pos, column] of columns) {
      const room = Math.floor(((column.width + SIZE.column) * this.scale) / 7.2);
      texts.push(write(shorten(this.graph.tokens[pos], Math.max(2, room)), column.x,
        foot - 20 * one, "middle"));
      texts.push(write(String(pos), column.x, foot - 6 * one, "middle"));
      texts.at(-1).setAttribute("class", "soft");
      if (column.skipped) {
        texts.push(write("⋯", column.x - (column.width + SIZE.column) / 2 - SIZE.column / 2,
          foot - 20 * one, "middle"));
      }
    }
    return [...strips, ...texts];
  }
}
