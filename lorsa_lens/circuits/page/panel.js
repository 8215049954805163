// What is said about a node or an edge: beside the graph, and where the pointer is. Text enters the
// page as text only; figures come from templates, in which everything is escaped already.

const make = (tag, values = {}, ...children) => {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(values)) made.setAttribute(name, value);
  made.append(...children.filter((child) => child !== null));
  return made;
};

const number = (value) => {
  const size = Math.abs(value);
  const text = size !== 0 && (size < 1e-3 || size >= 1e5) ? value.toExponential(2)
    : String(Number(value.toPrecision(3)));
  return (value > 0 ? "+" : "") + text.replaceAll("-", "−");
};

const figures = (id) => {
  const template = document.getElementById(id);
  return template ? template.content.cloneNode(true) : null;
};

const N_LISTED = 8;

class Panel {
  constructor(element, graph, isShown) {
    Object.assign(this, { element, graph, isShown });
    this.inputs = graph.nodes.map(() => []);
    this.outputs = graph.nodes.map(() => []);
    for (const edge of graph.edges) {
      this.inputs[edge.target].push(edge);
      this.outputs[edge.source].push(edge);
    }
    const bySize = (a, b) => Math.abs(b.flow) - Math.abs(a.flow) ||
      Math.abs(b.weight) - Math.abs(a.weight);
    const byWeight = (a, b) => Math.abs(b.weight) - Math.abs(a.weight);
    this.inputs.forEach((edges) => edges.sort(byWeight));
    this.outputs.forEach((edges) => edges.sort(bySize));
    this.overview = [...element.childNodes];
  }

  show(unit) {
    if (!unit) this.element.replaceChildren(...this.overview);
    else if (typeof unit.key === "string") this.element.replaceChildren(...this.#group(unit));
    else this.element.replaceChildren(...this.#node(unit.key));
    this.element.scrollTop = 0;
  }

  #head(name, note) {
    const close = make("button", { type: "button", "data-action": "clear",
      "aria-label": "close" }, "×");
    return [close, make("h2", {}, name), note ? make("p", { class: "soft" }, note) : null]
      .filter(Boolean);
  }

  #group(unit) {
    const members = unit.members.map((i) => make("li", {}, this.#link(i)));
    return [...this.#head(unit.name, `supernode of ${unit.members.length} nodes`), make("ul", { class: "edges" }, ...members)];
  }

  #node(i) {
    const node = this.graph.nodes[i];
    const facts = make("dl");
    for (const [name, value] of this.#facts(node)) {
      facts.append(make("dt", {}, name), make("dd", {}, value));
    }
    const own = figures(`own-${i}`);
    const contexts = node.head === null ? null : figures(`contexts-${node.head}`);
    const parts = [...this.#head(node.title, KINDS[node.kind]), facts];
    if (own) parts.push(make("h3", {}, "z pattern: what each token gives"), own);
    if (!node.leaf) parts.push(...this.#edges("Comes from", this.inputs[i], "source", node));
    if (node.kind !== "logit") parts.push(...this.#edges("Goes to", this.outputs[i], "target"));
    const qk = figures(`qk-${i}`);
    if (qk) parts.push(make("h3", {}, "Why it attends"), qk);
    if (contexts) parts.push(make("h3", {}, "Contexts in which it is strong"), contexts);
    return parts;
  }

  #facts(node) {
    const facts = [["influence", percent(node.influence)]];
    if (node.kind === "logit" && node.probability !== null) {
      facts.push(["probability", percent(node.probability)]);
    }
    facts.push([{ head: "activation z", feature: "activation", logit: "logit (centred)" }[node.kind]
      ?? "norm of what it writes", number(node.value).replace("+", "")]);
    return facts;
  }

  #edges(title, edges, end, node) {
    const rows = edges.map((edge) => {
      const of = end === "source" ? this.#share(edge) : Math.abs(edge.flow);
      const bar = make("span", { class: `bar ${edge.weight < 0 ? "lowers" : "raises"}` });
      bar.style.width = `${Math.max(2, 40 * of)}px`;
      return make("li", {}, this.#link(edge[end]), make("span", { class: "weight" },
        number(edge.weight)), make("span", { class: "share" }, percent(of)), bar);
    });
    const titles = make("li", { class: "soft" }, make("span"), make("span", { class: "weight" },
      "weight"), make("span", { class: "share" }, end === "source" ? "share" : "infl."));
    const list = make("ul", { class: "edges" }, titles, ...rows.slice(0, N_LISTED));
    const more = rows.slice(N_LISTED);
    const button = make("button", { type: "button", class: "more" }, `${more.length} more`);
    button.addEventListener("click", () => {
      list.append(...more);
      button.remove();
    });
    const parts = [make("h3", {}, title), edges.length ? list
      : make("p", { class: "soft" }, "No edge of the graph.")];
    if (more.length) parts.push(button);
    if (node) parts.push(this.#sum(edges, node));
    return parts;
  }

  // Of all that reaches the target, signs aside, outside the graph too.
  #share(edge) {
    return Math.abs(edge.weight) / (this.graph.nodes[edge.target].gross || 1);
  }

  #sum(edges, node) {
    const sum = edges.reduce((total, edge) => total + edge.weight, 0);
    const text = `edges ${number(sum)}, constant ${number(node.constant)}, outside the graph ` +
      `${number(node.missing)}; together ${number(node.pre)}`;
    return make("p", { class: "soft" }, text);
  }

  #link(i) {
    const button = make("button", { type: "button", "data-node": i,
      class: this.isShown(i) ? "" : "away" }, this.graph.nodes[i].title);
    return button;
  }

  // A few lines for the tooltip.
  brief(unit) {
    if (typeof unit.key === "string") {
      const names = unit.members.map((i) => this.graph.nodes[i].title).join(", ");
      return [make("strong", {}, unit.name), make("div", {}, shorten(names, 200))];
    }
    const node = this.graph.nodes[unit.key];
    const facts = this.#facts(node).map(([name, value]) => `${name} ${value}`).join(" · ");
    const own = figures(`own-${unit.key}`)?.querySelector("figure");
    const context = node.head === null ? null
      : figures(`contexts-${node.head}`)?.querySelector("figure");
    return [make("strong", {}, node.title), make("div", { class: "soft" }, KINDS[node.kind]),
      make("div", {}, facts), own ?? "", ...(context ? [make("div", {}, "Strongest context:"),
        context] : [])];
  }

  link(link) {
    const { nodes } = this.graph;
    if (link.attends) {
      const why = link.attends.map(({ source, target, side, value }) => make("div", {},
        `${nodes[source].title} gives ${number(value)} to the score of ${nodes[target].title}, ` +
        `on the ${side}'s side`));
      return [make("strong", {}, "Why a head attends"), ...why];
    }
    if (link.edges.length > 1) {
      return [make("strong", {}, `${link.edges.length} edges`),
        make("div", {}, `influence ${percent(Math.abs(link.flow))}`)];
    }
    const [edge] = link.edges;
    return [make("strong", {}, `${nodes[edge.source].title} → ${nodes[edge.target].title}`),
      make("div", {}, `${number(edge.weight)}, ${percent(this.#share(edge))} of what ` +
        `reaches it; influence ${percent(Math.abs(edge.flow))}`)];
  }
}
