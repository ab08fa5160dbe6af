// The interactive view of a mixture of experts: merge tree, distances, usage, and what every cut costs.
// One module for JupyterLab (anywidget calls the default export) and for a single HTML file (which calls mount).
// Everything that a drag needs is computed here; nothing is fetched.

const GROUPS = ["#0173b2", "#de8f05", "#029e73", "#d55e00", "#cc78bc", "#ca9161", "#56b4e9", "#c9b80a", "#fbafe4"];
const ALONE = "#8d8d8d";
const DISTANCES = [ // seaborn's mako: dark is similar
  [11, 4, 5], [40, 25, 46], [59, 46, 93], [64, 73, 142], [54, 106, 159], [52, 139, 166], [56, 170, 172],
  [85, 202, 173], [161, 223, 185], [222, 245, 229]];
const COSTS = [ // seaborn's rocket, reversed: dark is more
  [250, 235, 221], [246, 193, 159], [245, 148, 107], [240, 96, 67], [221, 44, 69], [180, 22, 88], [132, 30, 90],
  [84, 30, 78], [42, 22, 54], [12, 8, 26]];
const FONT = "system-ui, -apple-system, 'Segoe UI', sans-serif";

// ---- numbers ------------------------------------------------------------------------------------------

const clamp = (x, low, high) => Math.min(high, Math.max(low, x));
const sum = (values) => values.reduce((a, b) => a + b, 0);
const percent = (x, digits = 1) => `${(100 * x).toFixed(digits)} %`;

function short(x) { // four digits that count
  if (x === null || Number.isNaN(x)) return "unknown";
  if (x === 0) return "0";
  const size = Math.abs(x);
  return size >= 1e5 || size < 1e-3 ? x.toExponential(2) : String(Number(x.toPrecision(4)));
}

function bytes(x) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let i = 0;
  for (; x >= 1000 && i < 4; i++) x /= 1000;
  return `${x >= 100 || i === 0 ? Math.round(x) : x.toPrecision(3)} ${units[i]}`;
}

function ramp(stops, t) {
  const x = clamp(t, 0, 1) * (stops.length - 1), i = Math.min(stops.length - 2, Math.floor(x)), f = x - i;
  return stops[i].map((low, c) => Math.round(low + f * (stops[i + 1][c] - low)));
}

function table256(stops) {
  return Array.from({ length: 256 }, (_, i) => ramp(stops, i / 255));
}

function unpack(packed) { // see viewdata.py: 16 bits, of the square root
  if (!packed || packed.max === null) return null;
  const text = atob(packed.values), values = new Float32Array(text.length / 2);
  for (let i = 0; i < values.length; i++) {
    const q = (text.charCodeAt(2 * i) + 256 * text.charCodeAt(2 * i + 1)) / 65535;
    values[i] = packed.max * q * q;
  }
  return values;
}

function byFirstAppearance(labels) {
  const numbers = new Map();
  return Array.from(labels, (label) => {
    if (!numbers.has(label)) numbers.set(label, numbers.size);
    return numbers.get(label);
  });
}

// ---- one layer ----------------------------------------------------------------------------------------

class Layer {
  constructor(raw, index) {
    Object.assign(this, { raw, index, name: raw.name, order: raw.order, size: raw.order.length });
    const E = this.size;
    this.position = new Int32Array(E);
    this.order.forEach((expert, i) => { this.position[expert] = i; });
    this.count = Array.from({ length: E }, (_, e) => sum(raw.usage.map((domain) => domain[e])));
    const total = sum(this.count) || 1;
    this.usage = this.count.map((c) => c / total);
    let top = 0;
    this.heights = raw.heights.map((h) => (top = Math.max(top, h))); // monotone, as cuts take joins in order
    this.top = top || 1;
    // Every node of the tree covers a run of neighbours: its first and last position, height and middle.
    this.nodes = this.order.map((_, e) => ({ low: this.position[e], high: this.position[e], height: 0, x: this.position[e] + 0.5 }));
    raw.joins.forEach(([a, b], t) => {
      const [p, q] = [this.nodes[a], this.nodes[b]];
      this.nodes.push({ low: Math.min(p.low, q.low), high: Math.max(p.high, q.high), height: this.heights[t], x: (p.x + q.x) / 2, a, b });
    });
    this.error = raw.lost.map((lost) => (lost === null || !raw.size ? null : Math.sqrt(Math.max(0, lost) / raw.size)));
    this.start = raw.entropy[E - 1];
  }

  get distances() { return (this._distances ??= unpack(this.raw.distances)); }
  get pairs() { return this._pairs === undefined ? (this._pairs = unpack(this.raw.pairs)) : this._pairs; }
  get sorted() { return (this._sorted ??= Float32Array.from(this.distances).sort()); }

  at(i, j) { // where a pair stands among condensed distances
    const [a, b] = i < j ? [i, j] : [j, i];
    return a * this.size - (a * (a + 1)) / 2 + b - a - 1;
  }

  distance(i, j) { return i === j ? 0 : this.distances[this.at(i, j)]; }
  members(node) { return this.order.slice(this.nodes[node].low, this.nodes[node].high + 1); }
  domainsOf(e) {
    return this.raw.usage.map((domain) => domain[e] / (this.count[e] || 1));
  }

  cut(groups) { // labels after the first E − groups joins
    const E = this.size, node = Array.from({ length: E }, (_, e) => e), label = node.slice();
    const parent = node.slice();
    for (let t = 0; t < E - groups; t++) {
      const [a, b] = this.raw.joins[t].map((n) => node[n]);
      node.push(Math.min(a, b));
      parent[Math.max(a, b)] = Math.min(a, b);
    }
    for (let e = 0; e < E; e++) label[e] = parent[e] === e ? e : label[parent[e]];
    return byFirstAppearance(label);
  }

  groupsAt(height) {
    let joined = 0;
    while (joined < this.heights.length && this.heights[joined] <= height) joined++;
    return this.size - joined;
  }

  midHeight(groups) { // midway between the joins below and above the cut
    const below = groups < this.size ? this.heights[this.size - groups - 1] : 0;
    const above = groups > 1 ? this.heights[this.size - groups] : this.top * 1.05;
    return (below + above) / 2;
  }

  costs(labels, groups) { // of any grouping, from pairs
    const E = this.size, size = new Array(groups).fill(0), weight = size.slice(), mass = size.slice(), within = size.slice();
    for (let e = 0; e < E; e++) {
      size[labels[e]]++; weight[labels[e]] += this.usage[e]; mass[labels[e]] += this.raw.mass[e];
    }
    let at = 0;
    for (let i = 0; i < E; i++) for (let j = i + 1; j < E; j++, at++) {
      if (this.pairs && labels[i] === labels[j]) within[labels[i]] += this.usage[i] * this.usage[j] * this.pairs[at] ** 2;
    }
    const lost = sum(within.map((value, g) => (weight[g] > 0 ? value / weight[g] : 0)));
    return {
      error: this.pairs && this.raw.size ? Math.sqrt(lost / this.raw.size) : null,
      moved: sum(labels.map((g, e) => (size[g] > 1 ? this.raw.mass[e] : 0))),
      entropy: -sum(mass.map((m) => (m > 0 ? m * Math.log(m) : 0))),
    };
  }

  weights(labels, groups) { // each expert's share of its group by usage; equal shares where it is unused
    const total = new Array(groups).fill(0), size = total.slice();
    labels.forEach((g, e) => { total[g] += this.count[e]; size[g]++; });
    return labels.map((g, e) => (total[g] > 0 ? this.count[e] / total[g] : 1 / size[g]));
  }
}

// ---- the decision: an immutable cut per layer, with undo ----------------------------------------------

const freshCut = (groups) => ({ cut: groups, hand: null, apart: [], locked: false });

const SOLVED = new WeakMap();
function solved(layer, state) { // groups of one layer's state and what they cost
  if (SOLVED.has(state)) return SOLVED.get(state);
  let labels = state.hand ?? layer.cut(state.cut);
  if (!state.hand && state.apart.length) {
    labels = labels.slice();
    state.apart.forEach((e, i) => { labels[e] = layer.size + i; });
    labels = byFirstAppearance(labels);
  }
  const groups = Math.max(...labels) + 1, sizes = new Array(groups).fill(0), plain = !state.hand && !state.apart.length;
  labels.forEach((g) => sizes[g]++);
  const costs = plain
    ? { error: layer.error[groups - 1], moved: layer.raw.moved[groups - 1], entropy: layer.raw.entropy[groups - 1] }
    : layer.costs(labels, groups);
  const result = { labels, groups, sizes, plain, saved: (layer.size - groups) * layer.raw.bytes, ...costs };
  let next = 0; // colours along the order of the leaves, so that neighbours differ
  result.colours = new Array(groups).fill(null);
  layer.order.forEach((e) => {
    const g = labels[e];
    if (result.colours[g] === null) result.colours[g] = sizes[g] > 1 ? GROUPS[next++ % GROUPS.length] : ALONE;
  });
  SOLVED.set(state, result);
  return result;
}

function cutTo(layer, state, groups) { // the finest cut that leaves at most so many groups, experts apart included
  let cut = clamp(groups, 1, layer.size);
  const trial = (n) => ({ ...state, cut: n, hand: null });
  while (cut > 1 && solved(layer, trial(cut)).groups > groups) cut--;
  return trial(cut);
}

function totals(layers, states) {
  const all = layers.map((layer, i) => solved(layer, states[i]));
  const errors = all.map((s) => s.error);
  return {
    groups: sum(all.map((s) => s.groups)),
    error: errors.includes(null) ? null : Math.sqrt(sum(errors.map((e) => e * e)) / all.length),
    moved: sum(all.map((s) => s.moved)) / all.length,
    saved: sum(all.map((s) => s.saved)),
    share: 1 - sum(all.map((s) => s.groups)) / sum(layers.map((l) => l.size)),
    entropy: sum(all.map((s) => s.entropy)) / all.length,
    start: sum(layers.map((l) => l.start)) / layers.length,
  };
}

function slopes(layer) { // squared error that each join adds, on the lower convex hull over the numbers of groups
  const E = layer.size, squares = layer.error.map((e) => (e ?? 0) ** 2), blocks = [];
  for (let t = 0; t < E - 1; t++) {
    blocks.push([squares[E - t - 2] - squares[E - t - 1], 1]);
    while (blocks.length > 1 && blocks.at(-2)[0] >= blocks.at(-1)[0]) {
      const [b, n] = blocks.pop(), [a, m] = blocks.pop();
      blocks.push([(a * m + b * n) / (m + n), m + n]);
    }
  }
  return blocks.flatMap(([slope, n]) => new Array(n).fill(slope));
}

function cheapest(layers, free, total) { // the cheapest joins of all layers, as methods.budgets.by_merge_cost makes them
  const counts = new Map(free.map((i) => [i, layers[i].size]));
  const joins = free.flatMap((i) => slopes(layers[i]).map((slope, t) => [slope, i, t])).sort((a, b) => a[0] - b[0] || a[1] - b[1] || a[2] - b[2]);
  let surplus = sum([...counts.values()]) - total;
  for (const [, i] of joins) if (surplus > 0 && counts.get(i) > 1) { counts.set(i, counts.get(i) - 1); surplus--; }
  const even = evenly(free, total), lost = (some) => sum(free.map((i) => (layers[i].error[some.get(i) - 1] ?? 0) ** 2));
  return free.every((i) => even.get(i) <= layers[i].size) && lost(even) < lost(counts) ? even : counts;
}

function evenly(free, total) {
  return new Map(free.map((i, k) => [i, Math.floor(total / free.length) + (k < total % free.length ? 1 : 0)]));
}

// ---- two pens: the same drawing on a canvas and as SVG -----------------------------------------------

class CanvasPen {
  constructor(context) { this.c = context; }
  rect(x, y, w, h, { fill, stroke, width = 1 }) {
    if (fill) { this.c.fillStyle = fill; this.c.fillRect(x, y, w, h); }
    if (stroke) { this.c.strokeStyle = stroke; this.c.lineWidth = width; this.c.strokeRect(x, y, w, h); }
  }
  lines(lines, { stroke, width = 1, dash = [] }) {
    const c = this.c;
    c.strokeStyle = stroke; c.lineWidth = width; c.setLineDash(dash); c.beginPath();
    for (const line of lines) for (let i = 0; i < line.length; i += 2) i ? c.lineTo(line[i], line[i + 1]) : c.moveTo(line[i], line[i + 1]);
    c.stroke(); c.setLineDash([]);
  }
  circle(x, y, r, { fill, stroke, width = 1 }) {
    const c = this.c;
    c.beginPath(); c.arc(x, y, r, 0, 2 * Math.PI);
    if (fill) { c.fillStyle = fill; c.fill(); }
    if (stroke) { c.strokeStyle = stroke; c.lineWidth = width; c.stroke(); }
  }
  text(x, y, text, { fill, size = 10.5, align = "center", base = "middle", turned = false, bold = false }) {
    const c = this.c;
    c.font = `${bold ? "bold " : ""}${size}px ${FONT}`; c.fillStyle = fill; c.textAlign = align; c.textBaseline = base;
    if (!turned) { c.fillText(text, x, y); return; }
    c.save(); c.translate(x, y); c.rotate(-Math.PI / 2); c.fillText(text, 0, 0); c.restore();
  }
  image(image, from, x, y, w, h) {
    this.c.imageSmoothingEnabled = w * (window.devicePixelRatio || 1) < from[2];
    this.c.drawImage(image, ...from, x, y, w, h);
  }
  clipped(x, y, w, h, draw) {
    this.c.save(); this.c.beginPath(); this.c.rect(x, y, w, h); this.c.clip(); draw(); this.c.restore();
  }
}

class SvgPen {
  constructor() { this.parts = []; this.clips = 0; }
  static look({ fill, stroke, width = 1, dash = [] }) {
    return `fill="${fill || "none"}"` + (stroke ? ` stroke="${stroke}" stroke-width="${width}"` : "") + (dash.length ? ` stroke-dasharray="${dash}"` : "");
  }
  rect(x, y, w, h, look) { this.parts.push(`<rect x="${x}" y="${y}" width="${Math.max(0, w)}" height="${Math.max(0, h)}" ${SvgPen.look(look)}/>`); }
  lines(lines, look) {
    const d = lines.map((l) => l.reduce((text, v, i) => text + (i % 2 ? `,${v.toFixed(2)}` : ` ${i ? "L" : "M"}${v.toFixed(2)}`), "")).join("");
    if (d) this.parts.push(`<path d="${d.trim()}" ${SvgPen.look(look)}/>`);
  }
  circle(x, y, r, look) { this.parts.push(`<circle cx="${x}" cy="${y}" r="${r}" ${SvgPen.look(look)}/>`); }
  text(x, y, text, { fill, size = 10.5, align = "center", base = "middle", turned = false, bold = false }) {
    const anchor = { left: "start", right: "end", center: "middle" }[align], shift = { middle: 0.35, top: 0.8, bottom: -0.2 }[base] * size;
    const safe = String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;");
    const place = turned ? `transform="translate(${x + shift},${y}) rotate(-90)"` : `x="${x}" y="${y + shift}"`;
    this.parts.push(`<text ${place} font-size="${size}" text-anchor="${anchor}" fill="${fill}"${bold ? ' font-weight="bold"' : ""}>${safe}</text>`);
  }
  image(image, from, x, y, w, h) {
    const part = document.createElement("canvas");
    [part.width, part.height] = [Math.max(1, Math.round(from[2])), Math.max(1, Math.round(from[3]))];
    part.getContext("2d").drawImage(image, ...from, 0, 0, part.width, part.height);
    this.parts.push(`<image x="${x}" y="${y}" width="${w}" height="${h}" preserveAspectRatio="none" style="image-rendering:pixelated" href="${part.toDataURL()}"/>`);
  }
  clipped(x, y, w, h, draw) {
    const id = `clip${++this.clips}`;
    this.parts.push(`<clipPath id="${id}"><rect x="${x}" y="${y}" width="${w}" height="${h}"/></clipPath><g clip-path="url(#${id})">`);
    draw(); this.parts.push("</g>");
  }
  moved(x, y, draw) { this.parts.push(`<g transform="translate(${x},${y})">`); draw(); this.parts.push("</g>"); }
}

// ---- page elements ------------------------------------------------------------------------------------

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (value !== false && value !== null) element.setAttribute(key, value === true ? "" : value);
  }
  element.append(...children);
  return element;
}

function download(name, content, type) {
  const link = make("a", { href: typeof content === "string" && content.startsWith("data:") ? content : URL.createObjectURL(new Blob([content], { type })), download: name });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

// ---- the view -----------------------------------------------------------------------------------------

const KEYS = [
  ["↑ ↓", "on the tree: one group fewer or more; Page Up/Down: a sixteenth; Home/End: one group, or all apart"],
  ["← →", "on the tree: select the previous or next expert; on the heatmap, with ↑ ↓: move from cell to cell"],
  ["Enter", "select the cell; Escape: select nothing"],
  ["+ − 0", "zoom in, out, show all; Shift with arrows: pan"],
  ["[ ]", "previous, next layer; on the strip of layers ↑ ↓ and ← → do the same and cut"],
  ["F", "fold the selected branch into one group, or open it"],
  ["M S A", "merge the selected groups, split the selected group, keep the selected experts apart"],
  ["L B", "lock or unlock the layer; keep this plan as B, to compare with"],
  ["Ctrl Z, Ctrl Y", "undo, redo"],
];

class View {
  constructor(root, data, host) {
    Object.assign(this, { root, data, host, dirty: {}, frames: [], selection: [], cursor: null, hover: null });
    this.layers = data.layers.map((raw, i) => new Layer(raw, i));
    this.layer = clamp(host.layer ?? 0, 0, this.layers.length - 1);
    this.states = this.layers.map((layer, i) => freshCut(clamp(data.start[i], 1, layer.size)));
    if (host.groups?.length === this.layers.length) this.states = this.fromLabels(host.groups);
    Object.assign(this, { past: [], future: [], other: null, heightMode: "auto", colourMode: "linear", shared: false });
    this.window = { x: 0, y: 0, span: this.now.size };
    this.tables = { distances: table256(DISTANCES), costs: table256(COSTS) };
    this.build();
    this.watch();
    this.touch("layout");
  }

  get now() { return this.layers[this.layer]; }
  get state() { return this.states[this.layer]; }
  get solved() { return solved(this.now, this.state); }

  fromLabels(groups) { // states of plans that come from outside; a plain cut is known as one
    return this.layers.map((layer, i) => {
      const labels = byFirstAppearance(groups[i]), count = Math.max(...labels) + 1, cut = layer.cut(count);
      const plain = cut.every((label, e) => label === labels[e]);
      return { ...freshCut(count), hand: plain ? null : labels };
    });
  }

  // -- page

  build() {
    const { root } = this, button = (text, action, title) => make("button", { type: "button", title, onclick: () => action() }, text);
    const choice = (label, options, action) => {
      const select = make("select", { "aria-label": label, onchange: (e) => action(e.target.value) }, ...options.map(([value, text]) => make("option", { value }, text)));
      return make("label", {}, label, select);
    };
    root.classList.add("hcs");
    root.dataset.lmSuppressShortcuts = "true"; // JupyterLab keeps its own keys to itself
    root.setAttribute("role", "group");
    root.setAttribute("aria-label", `Experts of ${this.data.title}`);
    const last = this.layers.length - 1, average = Math.round(sum(this.states.map((s, i) => solved(this.layers[i], s).groups)) / this.layers.length);
    this.layerInput = make("input", { type: "number", min: 0, max: last, value: this.layer, "aria-label": "layer", onchange: (e) => this.show(Number(e.target.value)) });
    this.countInput = make("input", { type: "number", min: 1, max: this.now.size, "aria-label": "experts kept in this layer", onchange: (e) => this.cut(Number(e.target.value)) });
    this.budget = make("input", { type: "number", min: 1, max: Math.min(...this.layers.map((l) => l.size)), value: average, "aria-label": "experts per layer on average" });
    this.lockBox = make("input", { type: "checkbox", "aria-label": "lock this layer", onchange: () => this.lock() });
    this.search = make("input", { type: "search", placeholder: "expert", "aria-label": "find an expert by number", oninput: (e) => this.find(e.target.value) });
    this.undoButton = button("Undo", () => this.undo(), "Ctrl Z");
    this.redoButton = button("Redo", () => this.redo(), "Ctrl Y");
    const open = make("input", { type: "file", accept: ".json", hidden: true, onchange: (e) => this.open(e.target) });
    const bar = make("div", { class: "bar" },
      make("span", {}, button("‹", () => this.show(this.layer - 1), "previous layer"), make("label", {}, "Layer", this.layerInput), `of 0–${last}`, button("›", () => this.show(this.layer + 1), "next layer")),
      make("label", {}, "Experts kept", this.countInput), make("label", {}, this.lockBox, "lock"),
      make("span", {}, this.undoButton, this.redoButton),
      make("label", {}, "Find", this.search),
      choice("Heights", [["auto", "automatic"], ["linear", "linear"], ["log", "logarithmic"], ["rank", "by rank"]], (v) => { this.heightMode = v; this.touch("base"); }),
      choice("Colours", [["linear", "linear, robust"], ["log", "logarithmic"], ["rank", "by rank"]], (v) => { this.colourMode = v; this.touch("heat"); }),
      choice("Scale", [["own", "of this layer"], ["all", "of all layers"]], (v) => { this.shared = v === "all"; this.touch("heat"); }),
      button("?", () => this.help.showModal(), "Keys"));
    const plan = make("div", { class: "bar" },
      make("span", {}, make("label", {}, "All layers: on average", this.budget), button("Evenly", () => this.spread(false), "the same number in every layer that is not locked"), button("By cost", () => this.spread(true), "the cheapest joins of all layers that are not locked")),
      make("span", {}, button("Keep as B", () => this.keep(), "compare with this plan"), (this.swapButton = button("Swap A and B", () => this.swap(), "show the other plan"))),
      make("span", {}, button("Save plan", () => this.save(), "JSON for hcsmoe merge --plan"), button("Open plan", () => open.click()), open),
      make("span", {}, ...[["SVG", "svg"], ["PNG", "png"], ["CSV", "csv"]].map(([text, kind]) => button(text, () => this.export(kind), `export as ${text}`))));
    const plot = (name) => {
      const box = make("div", { class: "plot" });
      box.base = make("canvas", { "aria-hidden": "true" });
      box.over = make("canvas", { "aria-hidden": "true", "data-panel": name });
      box.append(box.base, box.over);
      return box;
    };
    const region = (role, label) => make("div", { class: "region", tabindex: 0, role, "aria-label": label });
    this.figure = plot("figure");
    this.strip = plot("strip");
    this.treeRegion = region("slider", "cut of the merge tree: experts kept");
    this.treeRegion.setAttribute("aria-orientation", "vertical");
    this.heatRegion = region("application", "distances between experts; arrows move from cell to cell");
    this.stripRegion = region("slider", "all layers: up and down choose a layer, left and right cut it");
    this.figure.append(this.treeRegion, this.heatRegion);
    this.strip.append(this.stripRegion);
    this.numbers = make("table", { "aria-label": "what the cut costs" });
    this.pick = make("div", { class: "pick" });
    this.noteLine = make("div", { class: "note", role: "status" });
    this.spoken = make("div", { class: "spoken", "aria-live": "polite" });
    this.tip = make("div", { class: "tip", hidden: true });
    this.help = make("dialog", { "aria-label": "keys" }, make("h3", {}, "Keys"),
      make("table", {}, ...KEYS.map(([keys, text]) => make("tr", {}, make("th", {}, make("kbd", {}, keys)), Object.assign(make("td", {}, text), { style: "white-space:normal;text-align:left" })))),
      make("form", { method: "dialog" }, make("button", {}, "Close")));
    root.replaceChildren(bar, plan, this.noteLine, make("div", { class: "panels" }, this.figure,
      make("div", {}, make("div", { class: "panel" }, this.numbers), make("div", { class: "panel" }, this.pick), this.strip)), this.spoken, this.tip, this.help);
  }

  watch() {
    const on = (target, name, action, options) => target.addEventListener(name, action, options);
    this.resizer = new ResizeObserver(() => this.touch("layout"));
    this.resizer.observe(this.figure);
    this.resizer.observe(this.strip);
    const recolour = () => this.touch("layout");
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", recolour);
    this.themes = new MutationObserver(recolour);
    this.themes.observe(document.body, { attributes: true, attributeFilter: ["data-jp-theme-name", "data-jp-theme-light", "class"] });
    on(this.figure, "pointermove", (e) => this.move(e));
    on(this.figure, "pointerdown", (e) => this.press(e));
    on(this.figure, "pointerup", (e) => this.release(e));
    on(this.figure, "pointercancel", () => { this.drag = null; });
    on(this.figure, "pointerleave", () => { if (!this.drag) { this.hover = null; this.tip.hidden = true; this.touch("over"); } });
    on(this.figure, "dblclick", (e) => this.twice(e));
    on(this.figure, "wheel", (e) => this.wheel(e), { passive: false });
    on(this.strip, "pointermove", (e) => this.moveStrip(e));
    on(this.strip, "pointerdown", (e) => { this.strip.setPointerCapture(e.pointerId); this.stripRegion.focus({ preventScroll: true }); this.stripDrag = this.states; this.dragStrip(e); });
    on(this.strip, "pointerup", () => { this.commit(this.stripDrag); this.stripDrag = null; });
    on(this.strip, "pointerleave", () => { this.tip.hidden = true; });
    on(this.root, "keydown", (e) => this.key(e));
  }

  destroy() {
    this.resizer.disconnect();
    this.themes.disconnect();
  }

  // -- frames: everything that is drawn is drawn in one requestAnimationFrame

  touch(what) {
    this.dirty[what] = true;
    this.waiting ??= requestAnimationFrame((time) => this.frame(time));
  }

  frame(time) {
    const started = performance.now(), { dirty } = this;
    this.waiting = null;
    this.dirty = {};
    if (dirty.layout) this.layout();
    if (this.pointer) this.follow();
    if (dirty.layout || dirty.heat) this.paintHeat();
    if (dirty.layout || dirty.heat || dirty.base) this.paint(this.figure.base, (pen) => this.drawBase(pen));
    this.paint(this.figure.over, (pen) => this.drawOver(pen));
    if (dirty.layout || dirty.strip) this.paint(this.strip.base, (pen) => this.drawStrip(pen));
    this.paint(this.strip.over, (pen) => this.drawStripOver(pen));
    this.tell(dirty);
    this.frames.push([time, performance.now() - started]);
    if (this.frames.length > 2000) this.frames.splice(0, 1000);
  }

  paint(canvas, draw) {
    const scale = window.devicePixelRatio || 1, context = canvas.getContext("2d");
    context.setTransform(scale, 0, 0, scale, 0, 0);
    context.clearRect(0, 0, canvas.width, canvas.height);
    draw(new CanvasPen(context));
  }

  layout() {
    const style = getComputedStyle(this.root), probe = document.createElement("canvas").getContext("2d");
    probe.fillStyle = style.backgroundColor;
    probe.fillRect(0, 0, 1, 1);
    const [r, g, b] = probe.getImageData(0, 0, 1, 1).data;
    this.root.classList.toggle("dark", 0.3 * r + 0.59 * g + 0.11 * b < 110);
    const variable = (name) => getComputedStyle(this.root).getPropertyValue(name).trim();
    this.colours = Object.fromEntries(["bg", "fg", "muted", "line", "field", "accent"].map((n) => [n, variable(`--${n}`)]));
    const w = Math.max(260, this.figure.clientWidth), left = 58, side = Math.min(w - left - 12, 640, Math.max(440, 0.64 * window.innerHeight));
    const tree = { x: left, y: 10, w: side, h: clamp(0.34 * side, 110, 210) };
    const heat = { x: left, y: tree.y + tree.h + 34, w: side, h: side };
    const usage = { x: left, y: heat.y + side + 8, w: side, h: 46 };
    const many = this.data.domains.length > 1;
    const domains = { x: left, y: usage.y + usage.h + 5, w: side, h: many ? 12 * this.data.domains.length : 0 };
    this.box = { tree, heat, usage, domains, legend: domains.y + domains.h + 12 };
    this.size(this.figure, w, this.box.legend + 38 + (many ? 30 : 0));
    const across = Math.max(260, this.strip.clientWidth), rows = this.layers.length, row = clamp(Math.floor(440 / rows), 6, 24);
    this.box.strip = { x: 34, y: 20, w: across - 46, h: rows * row, row };
    this.size(this.strip, across, rows * row + 76);
    const place = (element, box) => Object.assign(element.style, { left: `${box.x}px`, top: `${box.y}px`, width: `${box.w}px`, height: `${box.h}px` });
    place(this.treeRegion, tree);
    place(this.heatRegion, heat);
    place(this.stripRegion, this.box.strip);
  }

  size(plot, width, height) {
    const scale = window.devicePixelRatio || 1;
    plot.style.height = `${height}px`;
    plot.extent = [width, height];
    for (const canvas of [plot.base, plot.over]) {
      const [w, h] = [Math.round(width * scale), Math.round(height * scale)];
      if (canvas.width !== w || canvas.height !== h) [canvas.width, canvas.height] = [w, h];
      Object.assign(canvas.style, { width: `${width}px`, height: `${height}px` });
    }
  }

  // -- scales

  get levels() { // of each node, from 0 to 1, on the axis of heights as it is shown
    const layer = this.now, key = this.heightMode;
    layer.levelCache ??= {};
    return (layer.levelCache[key] ??= this.makeLevels(layer, key));
  }

  makeLevels(layer, key) {
    const E = layer.size, heights = layer.heights, positive = heights.filter((h) => h > 0);
    const flat = E > 3 && (heights[Math.floor(0.9 * (E - 2))] < 0.4 * layer.top || heights[E >> 1] < 0.2 * layer.top);
    const mode = key === "auto" ? (flat ? "log" : "linear") : key;
    const low = positive.length ? Math.max(positive[0], positive[positive.length >> 1] / 60) * 0.85 : 1, top = layer.top * 1.04;
    const level = { linear: (h) => h / top, log: (h) => (h <= low ? 0.012 : 0.012 + (0.988 * Math.log(h / low)) / Math.log(top / low)), rank: (_, t) => (t + 1) / E }[mode];
    const values = [...new Array(E).fill(0), ...heights.map(level)];
    return { mode, values, level, joins: values.slice(E) };
  }

  midLevel(groups) {
    const { joins } = this.levels, E = this.now.size;
    const below = groups < E ? joins[E - groups - 1] : 0, above = groups > 1 ? joins[E - groups] : 1.0;
    return (below + above) / 2;
  }

  treeX(position) { return this.box.tree.x + ((position - this.window.x) / this.window.span) * this.box.tree.w; }
  heatY(position) { return this.box.heat.y + ((position - this.window.y) / this.window.span) * this.box.heat.h; }
  treeY(level) { return this.box.tree.y + (1 - level) * this.box.tree.h; }

  get pooled() { // a sample of all layers' distances
    if (!this._pooled) {
      const parts = this.layers.flatMap((layer) => {
        const step = Math.max(1, Math.floor(layer.sorted.length / 1000));
        return Array.from(layer.sorted).filter((_, i) => i % step === 0);
      });
      this._pooled = Float32Array.from(parts).sort();
    }
    return this._pooled;
  }

  scale() { // of the heatmap: share of the colour map for a distance, and what the legend says
    const sorted = this.shared ? this.pooled : this.now.sorted, n = sorted.length;
    const at = (q) => sorted[Math.min(n - 1, Math.floor(q * n))] ?? 0, quartile = 2 * at(0.75);
    const outlying = quartile > 0 && quartile < at(0.98), high = (outlying ? quartile : at(0.98)) || at(1) || 1; // a few outliers leave the rest its contrast
    const upTo = outlying ? "twice the upper quartile" : "the 98th percentile", largest = n ? sorted[n - 1] : 0;
    const of = this.shared ? "of all layers" : "of this layer";
    if (this.colourMode === "rank") {
      const rank = (d) => { let low = 0, up = n; while (low < up) { const m = (low + up) >> 1; if (sorted[m] < d) low = m + 1; else up = m; } return low / (n || 1); };
      return { share: rank, ends: ["most similar", "least similar"], text: `rank among the distances ${of}` };
    }
    if (this.colourMode === "log") {
      const low = at(0.02) || high / 1000;
      return { share: (d) => Math.log(Math.max(d, low) / low) / Math.log(high / low || 2), ends: [short(low), short(high)], text: `logarithmic, from the 2nd percentile to ${upTo} ${of}; largest ${short(largest)}` };
    }
    return { share: (d) => d / high, ends: ["0", short(high)], text: `up to ${upTo} ${of}; largest ${short(largest)}` };
  }

  // -- drawing

  paintHeat() {
    const layer = this.now, E = layer.size, image = new ImageData(E, E), { share, ...legend } = this.scale();
    this.legend = legend;
    for (let i = 0; i < E; i++) for (let j = 0; j < E; j++) {
      const t = i === j ? 0 : share(layer.distance(layer.order[i], layer.order[j])), at = 4 * (i * E + j);
      const colour = this.tables.distances[clamp(Math.round(255 * t), 0, 255)];
      [image.data[at], image.data[at + 1], image.data[at + 2], image.data[at + 3]] = [...colour, 255];
    }
    this.heat ??= document.createElement("canvas");
    [this.heat.width, this.heat.height] = [E, E];
    this.heat.getContext("2d").putImageData(image, 0, 0);
  }

  drawBase(pen) {
    const { box, window: win, now: layer, colours: c } = this, E = layer.size;
    pen.clipped(box.heat.x, box.heat.y, box.heat.w, box.heat.h, () => pen.image(this.heat, [win.x, win.y, win.span, win.span], box.heat.x, box.heat.y, box.heat.w, box.heat.h));
    this.drawAxis(pen);
    const cell = box.heat.w / win.span, step = Math.max(1, Math.ceil(11.5 / cell)), turned = cell * step < 8 + 6.2 * String(E - 1).length;
    for (let i = Math.ceil(win.x / step) * step; i < Math.min(E, win.x + win.span); i += step) {
      const x = this.treeX(i + 0.5);
      if (x > box.heat.x && x < box.heat.x + box.heat.w) pen.text(x, box.tree.y + box.tree.h + (turned ? 24 : 14), layer.order[i], { fill: c.muted, size: 10, turned, align: turned ? "left" : "center" });
    }
    for (let i = Math.ceil(win.y / step) * step; i < Math.min(E, win.y + win.span); i += step) {
      const y = this.heatY(i + 0.5);
      if (y > box.heat.y && y < box.heat.y + box.heat.h) pen.text(box.heat.x - 11, y, layer.order[i], { fill: c.muted, size: 10, align: "right" });
    }
    const most = Math.max(...layer.usage), mark = box.usage.y + box.usage.h * (1 - 1 / (E * most));
    pen.text(box.usage.x - 6, box.usage.y + 5, percent(most), { fill: c.muted, size: 10, align: "right" });
    pen.text(box.usage.x - 6, box.usage.y + box.usage.h / 2 + 6, "tokens", { fill: c.muted, size: 10, align: "right" });
    pen.lines([[box.usage.x, mark, box.usage.x + box.usage.w, mark]], { stroke: c.muted, dash: [2, 3] });
    if (box.domains.h) this.drawDomains(pen);
    this.drawLegend(pen);
  }

  drawAxis(pen) {
    const { box, colours: c } = this, { mode, level } = this.levels, layer = this.now, x = box.tree.x - 4;
    pen.lines([[x, box.tree.y, x, box.tree.y + box.tree.h]], { stroke: c.line });
    let ticks = [];
    if (mode === "rank") ticks = [0.25, 0.5, 0.75, 1].map((q) => { const t = Math.max(0, Math.round(q * layer.size) - 1); return [level(0, Math.min(t, layer.size - 2)), `${layer.size - t - 1}`]; });
    else {
      const rough = layer.top / 4, base = 10 ** Math.floor(Math.log10(rough)), step = [1, 2, 5, 10].map((k) => k * base).find((s) => s >= rough) ?? base;
      const values = mode === "linear" ? [0, 1, 2, 3, 4].map((k) => k * step) : [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1].map((k) => k * 10 ** Math.ceil(Math.log10(layer.top)));
      ticks = values.filter((v) => v <= layer.top * 1.03 && (mode === "linear" || level(v) > 0.03)).map((v) => [mode === "linear" ? v / (layer.top * 1.04) : level(v), short(v)]);
    }
    let free = Infinity;
    for (const [value, text] of ticks.sort((a, b) => a[0] - b[0])) {
      const y = this.treeY(value);
      if (free - y < 12) continue;
      pen.lines([[x - 3, y, x, y]], { stroke: c.line });
      pen.text(x - 5, y, text, { fill: c.muted, size: 10, align: "right" });
      free = y;
    }
    const name = { linear: "height of join", log: "height, log", rank: "groups left" }[mode];
    pen.text(8, box.tree.y + box.tree.h / 2, name, { fill: c.muted, size: 10, turned: true });
  }

  drawDomains(pen) {
    const { box, window: win, now: layer, colours: c } = this, cell = box.domains.w / win.span;
    const shares = layer.order.map((e) => layer.domainsOf(e)), top = this.domainTop = Math.max(...shares.flat(), 1e-9);
    pen.clipped(box.domains.x, box.domains.y, box.domains.w, box.domains.h, () => {
      for (let i = Math.floor(win.x); i < Math.min(layer.size, win.x + win.span); i++) shares[i].forEach((share, d) => {
        const colour = this.tables.costs[Math.round((255 * share) / top)];
        pen.rect(this.treeX(i), box.domains.y + 12 * d, cell + 0.4, 11.5, { fill: `rgb(${colour})` });
      });
    });
    this.data.domains.forEach((name, d) => pen.text(box.domains.x - 6, box.domains.y + 12 * d + 6, name.length > 9 ? `${name.slice(0, 8)}…` : name, { fill: c.muted, size: 10, align: "right" }));
  }

  colourBar(pen, x, y, width, table, ends, text) {
    const n = 64, c = this.colours;
    for (let i = 0; i < n; i++) pen.rect(x + (i * width) / n, y, width / n + 0.5, 9, { fill: `rgb(${table[Math.round((255 * i) / (n - 1))]})` });
    pen.rect(x, y, width, 9, { stroke: c.line });
    pen.text(x - 5, y + 4.5, ends[0], { fill: c.muted, size: 10, align: "right" });
    pen.text(x + width + 5, y + 4.5, `${ends[1]}   ${text}`, { fill: c.muted, size: 10, align: "left" });
  }

  drawLegend(pen) {
    const { box, data, colours: c, legend } = this, y = box.legend, ranked = this.colourMode === "rank", start = box.heat.x + (ranked ? 30 : 0);
    pen.text(box.heat.x, y + 4, data.label, { fill: c.fg, size: 11, align: "left" });
    this.colourBar(pen, start, y + 16, 90, this.tables.distances, legend.ends, legend.text);
    if (box.domains.h) this.colourBar(pen, box.heat.x, y + 42, 90, this.tables.costs, ["0", percent(this.domainTop, 0)], "of the expert's tokens, by domain");
  }

  uniform(labels) { // group of each node whose experts are all in one, else −1
    const node = Array.from(labels);
    for (const [a, b] of this.now.raw.joins) node.push(node[a] === node[b] ? node[a] : -1);
    return node;
  }

  drawTree(pen, { labels, colours, sizes }) {
    const layer = this.now, E = layer.size, values = this.levels.values, group = this.uniform(labels), lines = new Map();
    const first = this.window.x - 1, last = this.window.x + this.window.span + 1;
    const picked = new Set(this.selection), thick = [];
    for (let t = 0; t < E - 1; t++) {
      const n = E + t, [a, b] = layer.raw.joins[t], p = layer.nodes[a], q = layer.nodes[b];
      if (layer.nodes[n].high < first || layer.nodes[n].low > last) continue;
      const colour = group[n] >= 0 && sizes[group[n]] > 1 ? colours[group[n]] : this.colours.fg;
      const y = this.treeY(values[n]), [xa, xb] = [this.treeX(p.x), this.treeX(q.x)];
      const line = [xa, this.treeY(values[a]), xa, y, xb, y, xb, this.treeY(values[b])];
      if (!lines.has(colour)) lines.set(colour, []);
      lines.get(colour).push(line);
      if (picked.size > 1 && layer.nodes[n].high - layer.nodes[n].low < picked.size && layer.members(n).every((e) => picked.has(e))) thick.push(line);
    }
    const width = this.box.tree.w / this.window.span > 4 ? 1.4 : 1;
    for (const [stroke, some] of lines) pen.lines(some, { stroke, width });
    if (thick.length) pen.lines(thick, { stroke: this.colours.accent, width: 2.6 });
  }

  drawOver(pen) {
    const { box, window: win, now: layer, colours: c, solved: s } = this;
    pen.clipped(box.tree.x - 1, box.tree.y - 8, box.tree.w + 2, box.tree.h + 10, () => {
      this.drawTree(pen, s);
      if (this.other) this.drawCut(pen, this.midLevel(solved(layer, this.other[this.layer]).groups), c.muted, [2, 3], null);
    });
    if (!this.state.hand) {
      const level = this.cutLevel ?? this.midLevel(this.state.cut);
      this.drawCut(pen, level, c.accent, [6, 4], `${s.groups}`);
    } else pen.text(box.tree.x + box.tree.w, box.tree.y + 2, `${s.groups} groups, made by hand`, { fill: c.accent, align: "right", bold: true });
    this.drawGroups(pen, s);
    this.drawUsage(pen, s);
    this.drawSelection(pen);
    if (this.brush) pen.rect(...this.brush, { stroke: c.accent, width: 1.5 });
    if (this.hover?.cell) {
      const [i, j] = this.hover.cell, cell = box.heat.w / win.span;
      pen.rect(this.treeX(j), this.heatY(i), cell, cell, { stroke: "#ffffff", width: 2.5 });
      pen.rect(this.treeX(j), this.heatY(i), cell, cell, { stroke: c.accent, width: 1.2 });
      this.tag(pen, j, true);
      this.tag(pen, i, false);
    } else if (this.hover?.expert !== undefined) this.tag(pen, layer.position[this.hover.expert], true);
  }

  drawCut(pen, level, stroke, dash, text) {
    const { tree } = this.box, y = this.treeY(level);
    pen.lines([[tree.x, y, tree.x + tree.w, y]], { stroke, width: 1.6, dash });
    if (text === null) { pen.text(tree.x + 3, y - 6, "B", { fill: stroke, align: "left", bold: true }); return; }
    const width = 10 + 7 * text.length;
    pen.rect(tree.x + tree.w - width, y - 8, width, 16, { fill: stroke });
    pen.text(tree.x + tree.w - width / 2, y + 0.5, text, { fill: this.colours.bg, size: 11.5, bold: true });
  }

  runs(positions) { // [first, one past the last] of neighbours
    const runs = [];
    for (const p of positions) if (runs.length && runs.at(-1)[1] === p) runs.at(-1)[1]++; else runs.push([p, p + 1]);
    return runs;
  }

  drawGroups(pen, { labels, colours, sizes }) {
    const { box, window: win, now: layer } = this, cell = box.heat.w / win.span, groups = new Map();
    layer.order.forEach((e, i) => { if (!groups.has(labels[e])) groups.set(labels[e], []); groups.get(labels[e]).push(i); });
    pen.clipped(box.heat.x - 8, box.heat.y - 8, box.heat.w + 9, box.heat.h + 9, () => {
      for (const [g, positions] of groups) {
        const runs = this.runs(positions), look = { stroke: colours[g], width: clamp(cell / 3, 1, 2) };
        for (const [a, b] of runs) {
          pen.rect(this.treeX(a), box.heat.y - 7, (b - a) * cell - (cell > 3 ? 0.7 : 0), 5, { fill: colours[g] });
          pen.rect(box.heat.x - 7, this.heatY(a), 5, (b - a) * cell - (cell > 3 ? 0.7 : 0), { fill: colours[g] });
        }
        if (sizes[g] > 1 && cell >= 2.2) for (const [a, b] of runs) for (const [p, q] of runs) pen.rect(this.treeX(p), this.heatY(a), (q - p) * cell, (b - a) * cell, look);
      }
      pen.rect(box.heat.x - 8, box.heat.y - 8, 8, 8, { fill: this.colours.bg });
    });
  }

  drawUsage(pen, { labels, colours }) {
    const { box, window: win, now: layer, colours: c } = this, cell = box.usage.w / win.span, most = Math.max(...layer.usage) || 1;
    const others = this.data.against?.layers[this.layer].usage;
    pen.clipped(box.usage.x, box.usage.y - 1, box.usage.w, box.usage.h + 2, () => {
      for (let i = Math.floor(win.x); i < Math.min(layer.size, win.x + win.span); i++) {
        const e = layer.order[i], h = (box.usage.h * layer.usage[e]) / most, gap = cell > 4 ? 0.12 * cell : 0;
        pen.rect(this.treeX(i) + gap, box.usage.y + box.usage.h - h, cell - 2 * gap, h, { fill: colours[labels[e]] });
        if (others) { const y = box.usage.y + box.usage.h * (1 - Math.min(1, others[e] / most)); pen.lines([[this.treeX(i), y, this.treeX(i) + cell, y]], { stroke: c.fg, width: 1.3 }); }
      }
    });
  }

  drawSelection(pen) {
    const { box, window: win, now: layer, colours: c } = this, cell = box.heat.w / win.span;
    if (!this.selection.length) return;
    const positions = this.selection.map((e) => layer.position[e]).sort((a, b) => a - b);
    pen.clipped(box.heat.x, box.heat.y, box.heat.w, box.usage.y + box.usage.h + box.domains.h + 6 - box.heat.y, () => {
      const bottom = box.domains.h ? box.domains.y + box.domains.h : box.usage.y + box.usage.h, lines = [];
      for (const [a, b] of this.runs(positions)) {
        for (const p of [a, b]) lines.push([this.treeX(p), box.heat.y, this.treeX(p), bottom], [box.heat.x, this.heatY(p), box.heat.x + box.heat.w, this.heatY(p)]);
      }
      pen.lines(lines, { stroke: "#ffffff", width: 2.2 });
      pen.lines(lines, { stroke: c.accent, width: 1.3 });
    });
    const free = { true: -Infinity, false: -Infinity }; // numbers that would cover each other are left out
    for (const p of positions) for (const [top, at, need] of [[true, this.treeX(p + 0.5), 10 + 7 * String(layer.size - 1).length], [false, this.heatY(p + 0.5), 17]]) {
      if (at - free[top] >= need) { this.tag(pen, p, top); free[top] = at; }
    }
  }

  tag(pen, position, top) { // an expert's number, legible whatever lies below it
    const { box, now: layer, colours: c } = this, text = String(layer.order[position]), width = 6 + 7 * text.length;
    const [x, y] = top ? [this.treeX(position + 0.5), box.tree.y + box.tree.h + 14] : [box.heat.x - 10 - width / 2, this.heatY(position + 0.5)];
    if (top ? x < box.heat.x || x > box.heat.x + box.heat.w : y < box.heat.y || y > box.heat.y + box.heat.h) return;
    pen.rect(x - width / 2, y - 8, width, 16, { fill: c.accent });
    pen.text(x, y + 0.5, text, { fill: c.bg, size: 11, bold: true });
  }

  drawStrip(pen) {
    const { layers, colours: c, box: { strip } } = this, most = Math.max(...layers.map((l) => l.size)), rows = layers.length;
    const errors = layers.flatMap((l) => l.error).filter((e) => e !== null).sort((a, b) => a - b), top = errors[Math.floor(0.98 * errors.length)] || 1;
    const image = new ImageData(most, rows);
    layers.forEach((layer, i) => layer.error.forEach((error, r) => {
      const colour = this.tables.costs[clamp(Math.round((255 * (error ?? 0)) / top), 0, 255)];
      image.data.set([...colour, 255], 4 * (i * most + r));
    }));
    const canvas = document.createElement("canvas");
    [canvas.width, canvas.height] = [most, rows];
    canvas.getContext("2d").putImageData(image, 0, 0);
    pen.image(canvas, [0, 0, most, rows], strip.x, strip.y, strip.w, strip.h);
    pen.text(0, 8, "All layers: what every cut costs", { fill: c.fg, size: 12, align: "left", bold: true });
    const every = Math.ceil(13 / strip.row);
    for (let i = 0; i < rows; i += every) pen.text(strip.x - 6, strip.y + (i + 0.5) * strip.row, i, { fill: c.muted, size: 10, align: "right" });
    for (const q of [0, 0.25, 0.5, 0.75, 1]) { const r = Math.max(1, Math.round(q * most)); pen.text(strip.x + ((r - 0.5) / most) * strip.w, strip.y + strip.h + 9, r, { fill: c.muted, size: 10 }); }
    pen.text(strip.x + strip.w / 2, strip.y + strip.h + 23, "experts kept", { fill: c.muted, size: 10.5 });
    this.colourBar(pen, strip.x + 8, strip.y + strip.h + 36, 90, this.tables.costs, ["0", short(top)], this.data.error);
  }

  drawStripOver(pen) {
    const { layers, colours: c, box: { strip } } = this, most = Math.max(...layers.map((l) => l.size)), r = clamp(strip.row / 2 - 1, 2.2, 4.5);
    const place = (groups, i) => [strip.x + ((groups - 0.5) / most) * strip.w, strip.y + (i + 0.5) * strip.row];
    const trace = (states, look) => pen.lines([states.flatMap((state, i) => place(solved(layers[i], state).groups, i))], look);
    if (this.other) {
      trace(this.other, { stroke: "#ffffff", width: 2.6 });
      trace(this.other, { stroke: "#555555", width: 1.3, dash: [3, 3] });
    }
    trace(this.states, { stroke: "#ffffff", width: 2.8 });
    trace(this.states, { stroke: "#0173b2", width: 1.6 });
    this.states.forEach((state, i) => {
      const [x, y] = place(solved(layers[i], state).groups, i), look = { fill: state.locked ? "#222222" : "#0173b2", stroke: "#ffffff", width: 1 };
      if (state.locked) pen.rect(x - r, y - r, 2 * r, 2 * r, look);
      else pen.circle(x, y, r, look);
    });
    const y = strip.y + this.layer * strip.row;
    pen.rect(strip.x - 1.5, y - 0.5, strip.w + 3, strip.row + 1, { stroke: c.accent, width: 2 });
    pen.circle(...place(this.solved.groups, this.layer), r + 1.5, { fill: c.accent, stroke: "#ffffff", width: 1.2 });
    pen.lines([[strip.x - 5, y + strip.row / 2, strip.x, y + strip.row / 2]], { stroke: c.accent, width: 3 });
  }

  // -- what is told in words and numbers

  tell(dirty) {
    const s = this.solved, layer = this.now, all = totals(this.layers, this.states);
    const b = this.other && solved(layer, this.other[this.layer]), both = this.other && totals(this.layers, this.other);
    const error = (x) => (x === null ? "unknown" : x.toFixed(3));
    const mine = (v) => [`${v.groups} of ${layer.size}`, error(v.error), percent(v.moved), `${layer.start.toFixed(2)} → ${v.entropy.toFixed(2)}`, this.savedText(v.saved, 1 - v.groups / layer.size)];
    const total = (v) => [`${v.groups}`, error(v.error), percent(v.moved), `${v.start.toFixed(2)} → ${v.entropy.toFixed(2)}`, this.savedText(v.saved, v.share)];
    const names = ["experts kept", this.data.error, "routing mass moved", "router entropy, nats", "saved"];
    const columns = [[`layer ${this.layer}`, mine(s)], ...(b ? [["B", mine(b)]] : []), ["all layers", total(all)], ...(both ? [["B", total(both)]] : [])];
    const key = columns.map((c) => c[0]).join("|");
    if (this.numbersKey !== key) { // rows are made once; a frame of a drag only writes texts
      this.numbersKey = key;
      this.numbers.replaceChildren(make("thead", {}, make("tr", {}, make("th", {}, "A: this plan"), ...columns.map(([name]) => make("th", { scope: "col" }, name)))),
        make("tbody", {}, ...names.map((name) => make("tr", {}, make("th", { scope: "row" }, name), ...columns.map(([title]) => make("td", { class: title === "B" ? "" : "now" }))))));
    }
    const rows = this.numbers.tBodies[0].rows;
    columns.forEach(([, values], c) => values.forEach((text, r) => { const cell = rows[r].cells[c + 1]; if (cell.textContent !== text) cell.textContent = text; }));
    const write = (input, value) => { if (document.activeElement !== input && input.value !== String(value)) input.value = value; };
    write(this.layerInput, this.layer);
    write(this.countInput, s.groups);
    this.countInput.max = layer.size;
    this.lockBox.checked = this.state.locked;
    this.undoButton.disabled = !this.past.length;
    this.redoButton.disabled = !this.future.length;
    this.swapButton.disabled = !this.other;
    const aria = { valuemin: 1, valuemax: layer.size, valuenow: s.groups, valuetext: `${s.groups} of ${layer.size} experts kept in layer ${this.layer}, predicted error ${error(s.error)}, ${percent(s.moved)} of the routing mass moved` };
    for (const region of [this.treeRegion, this.stripRegion]) for (const [name, value] of Object.entries(aria)) region.setAttribute(`aria-${name}`, value);
    const shown = `${this.layer}|${this.selection}|${this.other ? 1 : 0}`;
    if (!this.drag && (dirty.pick || this.pickKey !== shown || this.pickState !== this.state)) { this.pickKey = shown; this.pickState = this.state; this.showPick(); }
  }

  savedText(saved, share) { return saved ? `${bytes(saved)} (${percent(share, 0)})` : percent(share, 0); }
  note(text) { this.noteLine.textContent = text; }
  say(text) { this.spoken.textContent = text; }

  domainText(e) {
    const shares = this.now.domainsOf(e);
    if (this.data.domains.length < 2) return "";
    if (!this.now.count[e]) return "\nno tokens were routed to it";
    return `\n${this.data.domains.map((name, d) => [shares[d], name]).sort((a, b) => b[0] - a[0]).slice(0, 4).map(([share, name]) => `${name} ${percent(share, 0)}`).join(", ")}`;
  }

  groupText(e) {
    const { labels, sizes } = this.solved, g = labels[e];
    return sizes[g] > 1 ? `group ${g} (${sizes[g]} experts)` : `group ${g} (alone)`;
  }

  expertText(e) {
    const layer = this.now;
    return `expert ${e}, ${this.groupText(e)}\n${percent(layer.usage[e], 2)} of tokens, ${percent(layer.raw.mass[e], 2)} of routing mass${this.domainText(e)}`;
  }

  cellText(row, column) {
    const layer = this.now, [i, j] = [layer.order[row], layer.order[column]];
    if (i === j) return this.expertText(i);
    const { labels } = this.solved;
    const groups = labels[i] === labels[j] ? `both in ${this.groupText(i)}` : `groups ${labels[i]} and ${labels[j]}`;
    return `experts ${i} and ${j}\ndistance ${short(layer.distance(i, j))}\n${groups}\n${percent(layer.usage[i], 2)} and ${percent(layer.usage[j], 2)} of tokens${[i, j].map((e) => this.domainText(e).replace("\n", `\n${e}: `)).join("")}`;
  }

  nodeText(n) {
    const layer = this.now, node = layer.nodes[n], size = node.high - node.low + 1;
    const names = layer.members(n).slice(0, 14).join(", ");
    return `branch of ${size} experts: ${names}${size > 14 ? ", …" : ""}\njoined at height ${short(node.height)}\nclick to select, double click to fold or open`;
  }

  showPick() {
    const { selection, now: layer, solved: s } = this, button = (text, action, title) => make("button", { type: "button", title, onclick: () => action() }, text);
    if (!selection.length) {
      this.pick.replaceChildren(make("h3", {}, "Nothing selected"), make("p", { class: "muted" }, "Drag the line in the tree to cut. Click an expert, a branch or a group; Shift adds to the selection; drag over the heatmap to select many."));
      return;
    }
    const groups = [...new Set(selection.map((e) => s.labels[e]))], usage = sum(selection.map((e) => layer.usage[e]));
    let inside = 0, pairs = 0;
    for (let i = 0; i < selection.length; i++) for (let j = 0; j < i; j++) { inside += layer.distance(selection[i], selection[j]); pairs++; }
    const shown = selection.slice(0, 40).join(", ") + (selection.length > 40 ? `, … (${selection.length})` : "");
    const facts = [selection.length === 1 ? this.expertText(selection[0]).split("\n").slice(1).join("; ") : `${percent(usage, 1)} of tokens; mean distance ${short(inside / pairs)}; in ${groups.length} group${groups.length > 1 ? "s" : ""}`];
    const near = selection.length === 1 ? layer.order.filter((e) => e !== selection[0]).sort((a, b) => layer.distance(selection[0], a) - layer.distance(selection[0], b)).slice(0, 5) : [];
    if (near.length) facts.push(`nearest: ${near.map((e) => `${e} (${short(layer.distance(selection[0], e))})`).join(", ")}`);
    const apart = selection.every((e) => s.sizes[s.labels[e]] === 1);
    this.pick.replaceChildren(make("h3", {}, selection.length === 1 ? `Expert ${shown}, ${this.groupText(selection[0])}` : `Experts ${shown}`), ...facts.map((text) => make("p", {}, text)),
      make("div", { class: "bar" },
        ...(groups.length > 1 ? [button("Merge groups", () => this.merge(), "M: the groups of all that is selected become one"), button("Fold", () => this.fold(), "F: what is selected becomes one group")] : []),
        ...(groups.length === 1 && s.sizes[groups[0]] > 1 ? [button("Select group", () => this.select(layer.order.filter((e) => s.labels[e] === groups[0]))), button("Split group", () => this.split(), "S")] : []),
        ...(this.state.apart.some((e) => selection.includes(e)) ? [button("No longer apart", () => this.keepApart(false))] : apart ? [] : [button("Keep apart", () => this.keepApart(true), "A")]),
        button("Deselect", () => this.select([]), "Escape")));
  }

  // -- changes

  change(state, what = "over") { // of the shown layer, one step of undo
    if (this.state.locked) { this.note(`Layer ${this.layer} is locked; unlock it to change it.`); return; }
    const before = this.states;
    this.states = before.map((old, i) => (i === this.layer ? state : old));
    this.commit(before);
    this.touch(what);
  }

  commit(before) {
    if (!before || before === this.states) return;
    this.past.push(before);
    if (this.past.length > 500) this.past.shift();
    this.future = [];
    this.cutLevel = null;
    this.publish();
    this.touch("over");
  }

  publish() {
    this.host.onGroups?.(this.layers.map((layer, i) => solved(layer, this.states[i]).labels));
  }

  step(from, to, word) {
    if (!from.length) return;
    to.push(this.states);
    this.states = from.pop();
    this.cutLevel = null;
    this.note(word);
    this.publish();
    this.touch("over");
  }

  undo() { this.step(this.past, this.future, "Undone."); }
  redo() { this.step(this.future, this.past, "Done again."); }

  cut(groups) {
    if (!Number.isFinite(groups)) return;
    this.change(cutTo(this.now, this.state, Math.round(groups)));
    const s = this.solved;
    this.say(`${s.groups} of ${this.now.size} experts, predicted error ${s.error === null ? "unknown" : s.error.toFixed(3)}`);
  }

  regroup(change, word) {
    const labels = this.solved.labels.slice();
    change(labels);
    const hand = byFirstAppearance(labels);
    this.change({ ...this.state, hand, cut: Math.max(...hand) + 1 });
    if (!this.state.locked) this.note(`${word} Moving the cut replaces groups made by hand; Undo brings them back.`);
  }

  merge() {
    const groups = new Set(this.selection.map((e) => this.solved.labels[e])), first = Math.min(...groups);
    if (groups.size > 1) this.regroup((labels) => labels.forEach((g, e) => { if (groups.has(g)) labels[e] = first; }), "Merged.");
  }

  fold(members = this.selection) { // into one group; or open the group that it is, at its highest join
    const s = this.solved, whole = members.length && members.every((e) => s.labels[e] === s.labels[members[0]]) && s.sizes[s.labels[members[0]]] === members.length;
    if (whole) this.split(members);
    else if (members.length > 1) this.regroup((labels) => members.forEach((e) => { labels[e] = this.now.size; }), "Folded.");
  }

  split(members = this.selection) {
    const { labels } = this.solved, group = members.length ? labels[members[0]] : -1, layer = this.now;
    if (group < 0 || this.solved.sizes[group] < 2) return;
    const inside = (n) => layer.members(n).filter((e) => labels[e] === group);
    for (let t = 0; t < layer.raw.joins.length; t++) {
      const [a, b] = layer.raw.joins[t], size = this.solved.sizes[group];
      const left = inside(a), right = inside(b);
      if (left.length && right.length && left.length + right.length === size) {
        this.regroup((all) => right.forEach((e) => { all[e] = layer.size; }), "Split.");
        return;
      }
    }
  }

  keepApart(apart) {
    const rest = this.state.apart.filter((e) => !this.selection.includes(e)), chosen = apart ? [...rest, ...this.selection] : rest;
    let { hand } = this.state;
    if (hand && apart) { hand = hand.slice(); this.selection.forEach((e, i) => { hand[e] = this.now.size + i; }); hand = byFirstAppearance(hand); }
    this.change({ ...this.state, apart: chosen, hand });
  }

  lock() {
    const before = this.states;
    this.states = before.map((old, i) => (i === this.layer ? { ...old, locked: !old.locked } : old));
    this.commit(before);
    this.note(this.state.locked ? `Layer ${this.layer} is locked: neither cuts nor budgets change it.` : `Layer ${this.layer} is unlocked.`);
  }

  spread(byCost) {
    const per = Math.round(Number(this.budget.value)), free = this.layers.map((_, i) => i).filter((i) => !this.states[i].locked), before = this.states;
    const least = Math.min(...this.layers.map((l) => l.size));
    if (!(per >= 1 && per <= least)) { this.note(`Experts per layer must be from 1 to ${least}; not ${this.budget.value}.`); return; }
    if (byCost && this.layers.some((l) => l.error.includes(null))) { this.note("These statistics predict no error; spread evenly instead."); return; }
    const fixed = sum(before.map((state, i) => (state.locked ? solved(this.layers[i], state).groups : 0)));
    const total = per * this.layers.length, rest = total - fixed;
    if (rest < free.length) { this.note(`Locked layers keep ${fixed} experts of ${total} already; unlock one or keep more.`); return; }
    const counts = byCost ? cheapest(this.layers, free, rest) : evenly(free, rest);
    this.states = before.map((old, i) => (old.locked ? old : cutTo(this.layers[i], old, Math.min(counts.get(i), this.layers[i].size))));
    this.commit(before);
    const { groups, error } = totals(this.layers, this.states);
    this.note(`${groups} experts in all${error === null ? "" : `, predicted error ${error.toFixed(3)} (root mean square over layers)`}.`);
  }

  keep() {
    this.other = this.states;
    this.note("Kept as B: grey lines and the columns B. Go on with A, the plan in colour.");
    this.touch("pick");
  }

  swap() {
    const before = this.states;
    [this.states, this.other] = [this.other, before];
    this.commit(before);
  }

  show(index) {
    if (!Number.isFinite(index)) return;
    const next = clamp(Math.round(index), 0, this.layers.length - 1);
    if (next === this.layer) { this.touch("over"); return; }
    Object.assign(this, { layer: next, selection: [], hover: null, cursor: null, cutLevel: null });
    this.window = { x: 0, y: 0, span: this.now.size };
    this.tip.hidden = true;
    this.host.onLayer?.(next);
    this.host.onSelect?.([]);
    this.say(`layer ${next}`);
    this.touch("heat");
  }

  select(experts, add = false) {
    this.selection = [...new Set(add ? [...this.selection, ...experts] : experts)];
    this.host.onSelect?.(this.selection);
    if (experts.length) this.say(experts.length === 1 ? this.expertText(experts[0]) : `${this.selection.length} experts selected`);
    this.touch("pick");
  }

  find(text) {
    const numbers = text.split(/[\s,]+/).filter(Boolean).map(Number).filter((e) => Number.isInteger(e) && e >= 0 && e < this.now.size);
    if (text.trim() && !numbers.length) { this.note(`Layer ${this.layer} has experts 0 to ${this.now.size - 1}; not ${text}.`); return; }
    this.note("");
    this.select(numbers);
    const p = numbers.length ? this.now.position[numbers[0]] : 0;
    if (numbers.length && this.window.span < this.now.size && (p < this.window.x || p >= this.window.x + this.window.span)) this.zoom(1, p + 0.5, p + 0.5);
  }

  zoom(factor, x, y) { // about a position, which stays where it is; factor 1 centres it
    const E = this.now.size, { window: win } = this, span = clamp(win.span / factor, Math.min(6, E), E);
    const from = (low, p) => clamp(factor === 1 ? p - span / 2 : p - ((p - low) * span) / win.span, 0, E - span);
    this.window = { x: from(win.x, x), y: from(win.y, y), span };
    this.touch("base");
  }

  pan(dx, dy) {
    const E = this.now.size, { window: win } = this;
    this.window = { ...win, x: clamp(win.x + dx, 0, E - win.span), y: clamp(win.y + dy, 0, E - win.span) };
    this.touch("base");
  }

  // -- mouse

  at(e, plot) {
    const frame = plot.getBoundingClientRect();
    return [e.clientX - frame.left, e.clientY - frame.top];
  }

  part(x, y) {
    const inside = (b, margin = 0) => x >= b.x && x < b.x + b.w && y >= b.y - margin && y < b.y + b.h + margin;
    const { tree, heat, usage, domains } = this.box;
    if (inside(heat)) return "heat";
    if (inside(tree, 4)) return "tree";
    if (x >= tree.x && x < tree.x + tree.w && y > tree.y + tree.h && y < heat.y) return "label";
    if (inside(usage) || (domains.h && inside(domains))) return "usage";
    return x > heat.x - 40 && x < heat.x && y >= heat.y && y < heat.y + heat.h ? "row" : null;
  }

  positionAt(x, box, low) { return low + (x / box) * this.window.span; }

  spot(x, y) { // what lies below a point: a cell, an expert or a node
    const part = this.part(x, y), { heat } = this.box, E = this.now.size, whole = (p) => clamp(Math.floor(p), 0, E - 1);
    const column = whole(this.positionAt(x - heat.x, heat.w, this.window.x)), row = whole(this.positionAt(y - heat.y, heat.h, this.window.y));
    if (part === "heat") return { part, cell: [row, column] };
    if (part === "usage" || part === "label") return { part, expert: this.now.order[column] };
    if (part === "row") return { part, expert: this.now.order[row] };
    if (part === "tree") { const node = this.nodeAt(x, y); return { part, node }; }
    return { part };
  }

  nodeAt(x, y) {
    const layer = this.now, E = layer.size, values = this.levels.values;
    let best = null, nearest = 6;
    for (let t = E - 2; t >= 0; t--) {
      const [a, b] = layer.raw.joins[t].map((n) => [this.treeX(layer.nodes[n].x), this.treeY(values[n])]), top = this.treeY(values[E + t]);
      const [left, right] = [Math.min(a[0], b[0]), Math.max(a[0], b[0])];
      const bar = Math.hypot(Math.max(left - x, 0, x - right), y - top);
      if (bar < nearest) [best, nearest] = [E + t, bar];
      for (const [i, [px, py]] of [a, b].entries()) {
        const leg = Math.hypot(x - px, Math.max(top - y, 0, y - py));
        if (leg < nearest) [best, nearest] = [layer.raw.joins[t][i], leg];
      }
    }
    return best;
  }

  move(e) { // only noted here: what follows from it is worked out once per frame
    this.pointer = [...this.at(e, this.figure), e.clientX, e.clientY];
    this.touch("over");
  }

  follow() {
    const [x, y, clientX, clientY] = this.pointer, { drag } = this;
    this.pointer = null;
    if (!drag) {
      this.hover = this.spot(x, y);
      const { cell, expert, node } = this.hover;
      this.showTip(cell ? this.cellText(...cell) : expert !== undefined ? this.expertText(expert) : node !== null && node !== undefined ? (node < this.now.size ? this.expertText(node) : this.nodeText(node)) : "", clientX, clientY);
      this.figure.style.cursor = this.hover.part === "tree" && Math.abs(y - this.treeY(this.midLevel(this.state.cut))) < 8 ? "ns-resize" : this.hover.part === "heat" ? "crosshair" : "";
      return;
    }
    drag.moved ||= Math.hypot(x - drag.x, y - drag.y) > 3;
    if (!drag.moved) return;
    if (drag.part === "tree") this.dragCut(y);
    else if (drag.pan) {
      const cell = this.box.heat.w / this.window.span;
      this.pan((drag.lastX - x) / cell, (drag.lastY - y) / cell);
      this.dirty = {}; // drawn in this very frame
      this.paint(this.figure.base, (pen) => this.drawBase(pen));
    } else if (drag.part === "heat") this.brush = [Math.min(x, drag.x), Math.min(y, drag.y), Math.abs(x - drag.x), Math.abs(y - drag.y)];
    [drag.lastX, drag.lastY] = [x, y];
  }

  dragCut(y) {
    if (this.state.locked) { this.note(`Layer ${this.layer} is locked; unlock it to change it.`); return; }
    const { tree } = this.box, level = clamp(1 - (y - tree.y) / tree.h, 0, 1), E = this.now.size;
    const { joins } = this.levels;
    let joined = 0;
    while (joined < E - 1 && joins[joined] <= level) joined++;
    this.cutLevel = level;
    if (this.state.cut !== E - joined || this.state.hand) {
      const next = { ...this.state, cut: E - joined, hand: null };
      this.states = this.states.map((old, i) => (i === this.layer ? next : old));
    }
  }

  press(e) {
    if (e.button) return;
    const [x, y] = this.at(e, this.figure), part = this.part(x, y);
    this.figure.setPointerCapture(e.pointerId);
    (part === "tree" ? this.treeRegion : this.heatRegion).focus({ preventScroll: true });
    this.drag = { x, y, lastX: x, lastY: y, part, before: this.states, add: e.shiftKey, pan: part === "heat" && this.window.span < this.now.size && !e.shiftKey };
    this.tip.hidden = true;
    e.preventDefault();
  }

  release(e) {
    const { drag } = this, [x, y] = this.at(e, this.figure);
    if (!drag) return;
    if (drag.moved && drag.part === "tree") { this.dragCut(y); this.commit(drag.before); this.cutLevel = null; }
    else if (this.brush) this.select(this.brushed(), drag.add);
    else if (!drag.moved) this.click(this.spot(x, y), y, drag.add);
    [this.drag, this.brush] = [null, null];
    this.touch("over");
  }

  brushed() {
    const [x, y, w, h] = this.brush, { heat } = this.box, chosen = new Set();
    const range = (low, from, size, side) => [this.positionAt(from, side, low), this.positionAt(from + size, side, low)];
    for (const [a, b] of [range(this.window.x, x - heat.x, w, heat.w), range(this.window.y, y - heat.y, h, heat.h)]) {
      for (let p = Math.max(0, Math.floor(a)); p < Math.min(this.now.size, Math.ceil(b)); p++) chosen.add(this.now.order[p]);
    }
    return [...chosen];
  }

  click({ cell, expert, node, part }, y, add) {
    const layer = this.now, { labels } = this.solved;
    if (cell) {
      const [i, j] = cell.map((p) => layer.order[p]);
      this.cursor = cell;
      this.select(i !== j && labels[i] === labels[j] ? layer.order.filter((e) => labels[e] === labels[i]) : [i, j], add);
    } else if (expert !== undefined) this.select([expert], add);
    else if (node !== null && node !== undefined) this.select(node < layer.size ? [node] : layer.members(node), add);
    else if (part === "tree") { const before = this.states; this.dragCut(y); this.commit(before); this.cutLevel = null; }
    else this.select([]);
  }

  twice(e) {
    const [x, y] = this.at(e, this.figure), { node, cell } = this.spot(x, y), layer = this.now;
    if (node >= layer.size) this.fold(layer.members(node));
    else if (cell) this.zoom(2, cell[1] + 0.5, cell[0] + 0.5);
  }

  wheel(e) { // zooms where the heatmap has the focus, or with Ctrl; else the page scrolls
    if (!e.ctrlKey && !e.metaKey && document.activeElement !== this.heatRegion) return;
    const [x, y] = this.at(e, this.figure), { heat } = this.box;
    e.preventDefault();
    this.zoom(Math.exp(-e.deltaY / 400), this.positionAt(x - heat.x, heat.w, this.window.x), this.positionAt(clamp(y - heat.y, 0, heat.h), heat.h, this.window.y));
  }

  stripSpot(e) {
    const [x, y] = this.at(e, this.strip), { strip } = this.box, index = clamp(Math.floor((y - strip.y) / strip.row), 0, this.layers.length - 1);
    const most = Math.max(...this.layers.map((l) => l.size));
    return [index, clamp(Math.ceil(((x - strip.x) / strip.w) * most), 1, this.layers[index].size), y >= strip.y && y < strip.y + strip.h && x >= strip.x - 34];
  }

  moveStrip(e) {
    if (this.stripDrag) { this.dragStrip(e); return; }
    const [index, groups, inside] = this.stripSpot(e), layer = this.layers[index];
    const error = layer.error[groups - 1];
    this.showTip(inside ? `layer ${index}: ${layer.name}\n${groups} of ${layer.size} experts kept\n${this.data.error} ${short(error)}\n${percent(layer.raw.moved[groups - 1])} of the routing mass moved\n${this.savedText((layer.size - groups) * layer.raw.bytes, 1 - groups / layer.size)} saved` : "", e.clientX, e.clientY);
  }

  dragStrip(e) {
    const [index, groups, inside] = this.stripSpot(e);
    if (!inside && !this.stripRow) return;
    if (e.type === "pointerdown") { this.stripRow = true; this.tip.hidden = true; this.show(index); }
    const [x] = this.at(e, this.strip);
    if (x < this.box.strip.x) return; // on the numbers of the layers: only choose
    if (this.state.locked) { this.note(`Layer ${this.layer} is locked; unlock it to change it.`); return; }
    const next = cutTo(this.now, this.state, clamp(groups, 1, this.now.size));
    this.states = this.states.map((old, i) => (i === this.layer ? next : old));
    this.touch("over");
  }

  showTip(text, clientX, clientY) {
    this.tip.hidden = !text;
    if (!text) return;
    if (this.tip.textContent !== text) this.tip.textContent = text;
    const frame = this.root.getBoundingClientRect(), width = Math.min(300, this.tip.offsetWidth), height = this.tip.offsetHeight;
    const x = clientX - frame.left + 16, y = clientY - frame.top + 18;
    this.tip.style.left = `${x + width > frame.width ? Math.max(0, x - width - 32) : x}px`;
    this.tip.style.top = `${clientY + height + 24 > window.innerHeight ? y - height - 34 : y}px`;
  }

  // -- keyboard

  key(e) {
    if (this.help.open) return;
    const typing = e.target.matches("input:not([type=checkbox]), select, textarea"), control = e.ctrlKey || e.metaKey;
    if (typing && !(control && "zy".includes(e.key.toLowerCase()) && e.target.type !== "search")) { e.stopPropagation(); return; }
    const region = { [true]: "", [e.target === this.treeRegion]: "tree", [e.target === this.heatRegion]: "heat", [e.target === this.stripRegion]: "strip" }.true;
    const done = control ? this.controlKey(e) : this.arrowKey(e, region) || this.letterKey(e, region);
    if (done) { e.preventDefault(); e.stopPropagation(); }
  }

  controlKey(e) {
    const key = e.key.toLowerCase();
    if (key === "z" && !e.shiftKey) this.undo();
    else if (key === "y" || key === "z") this.redo();
    else return false;
    return true;
  }

  arrowKey(e, region) {
    const step = { ArrowUp: [0, -1], ArrowDown: [0, 1], ArrowLeft: [-1, 0], ArrowRight: [1, 0] }[e.key], E = this.now.size, { groups } = this.solved, page = Math.max(1, Math.round(E / 16));
    if (!region) return false;
    if (step && e.shiftKey) { this.pan((step[0] * this.window.span) / 8, (step[1] * this.window.span) / 8); return true; }
    const jump = { PageUp: groups - page, PageDown: groups + page, Home: 1, End: E }[e.key];
    if (jump !== undefined) { this.cut(clamp(jump, 1, E)); return true; }
    if (!step) return false;
    if (region === "tree" && step[1]) this.cut(clamp(groups + step[1], 1, E));
    else if (region === "strip" && step[0]) this.cut(clamp(groups + step[0], 1, E));
    else if (region === "strip") this.show(this.layer + step[1]);
    else if (region === "tree") { const p = this.selection.length ? this.now.position[this.selection[0]] + step[0] : 0; this.select([this.now.order[clamp(p, 0, E - 1)]]); }
    else {
      const [row, column] = this.cursor ?? [0, 0];
      this.cursor = this.cursor ? [clamp(row + step[1], 0, E - 1), clamp(column + step[0], 0, E - 1)] : [0, Math.min(1, E - 1)];
      this.hover = { part: "heat", cell: this.cursor };
      this.say(this.cellText(...this.cursor));
      const frame = this.figure.getBoundingClientRect();
      this.showTip(this.cellText(...this.cursor), frame.left + this.treeX(this.cursor[1] + 0.5), frame.top + this.heatY(this.cursor[0] + 0.5));
      this.touch("over");
    }
    return true;
  }

  letterKey(e, region) {
    const middle = [this.window.x + this.window.span / 2, this.window.y + this.window.span / 2];
    const actions = {
      "[": () => this.show(this.layer - 1), "]": () => this.show(this.layer + 1), l: () => this.lock(), b: () => this.keep(),
      f: () => this.fold(), m: () => this.merge(), s: () => this.split(), a: () => this.selection.length && this.keepApart(true),
      "+": () => this.zoom(1.5, ...middle), "=": () => this.zoom(1.5, ...middle), "-": () => this.zoom(1 / 1.5, ...middle), 0: () => this.zoom(1e-9, ...middle),
      Escape: () => { this.tip.hidden = true; this.hover = null; this.select([]); }, "?": () => this.help.showModal(),
    };
    if (e.key === "Enter" && region === "heat" && this.cursor) { this.click({ cell: this.cursor }, 0, e.shiftKey); return true; }
    const action = actions[e.key.length === 1 ? e.key.toLowerCase() : e.key];
    if (!action || e.altKey) return false;
    action();
    return true;
  }

  // -- files

  plan() {
    const { plan } = this.data, all = this.layers.map((layer, i) => solved(layer, this.states[i]));
    const settings = { ...plan.settings, experts: all.map((s) => s.groups) };
    if (all.some((s) => !s.plain)) settings.edited = true;
    const layers = this.layers.map((layer, i) => ({ name: layer.name, labels: all[i].labels, weights: layer.weights(all[i].labels, all[i].groups), combine: this.data.combine }));
    return { ...plan, layers, settings };
  }

  fileName(end) { return `${(this.data.title || "plan").replace(/[^\w.-]+/g, "-")}${end}`; }

  save() {
    const name = this.fileName("-plan.json");
    download(name, JSON.stringify(this.plan(), null, 1), "application/json");
    this.note(`Saved as ${name}; hcsmoe merge MODEL --plan ${name} --out FOLDER`);
  }

  async open(input) {
    const [file] = input.files;
    if (!file) return;
    try {
      const layers = new Map(JSON.parse(await file.text()).layers.map((layer) => [layer.name, layer.labels]));
      const groups = this.layers.map((layer) => {
        const labels = layers.get(layer.name);
        if (labels?.length !== layer.size || Math.min(...labels) < 0) throw new Error(`it has no groups of the ${layer.size} experts of ${layer.name}`);
        return labels;
      });
      const before = this.states;
      this.states = this.fromLabels(groups);
      this.commit(before);
      this.note(`Opened ${file.name}.`);
    } catch (error) { this.note(`${file.name} is no plan for this model: ${error.message}.`); }
    input.value = "";
  }

  export(kind) {
    if (kind === "csv") { download(this.fileName(".csv"), this.csv(), "text/csv"); return; }
    this.hover = null;
    const [w, h] = this.figure.extent, [sw, sh] = this.strip.extent, c = this.colours, width = w + sw + 36, height = Math.max(h, sh) + 30;
    const s = this.solved, title = `${this.data.title}, MoE layer ${this.layer}: ${s.groups} of ${this.now.size} experts kept`;
    const drawAll = (pen, moved) => {
      pen.rect(0, 0, width, height, { fill: c.bg });
      pen.text(12, 16, title, { fill: c.fg, size: 14, align: "left", bold: true });
      moved(6, 30, () => { this.drawBase(pen); this.drawOver(pen); });
      moved(w + 24, 30, () => { this.drawStrip(pen); this.drawStripOver(pen); });
    };
    if (kind === "svg") {
      const pen = new SvgPen();
      drawAll(pen, (x, y, draw) => pen.moved(x, y, draw));
      download(this.fileName(".svg"), `<svg xmlns="http://www.w3.org/2000/svg" width="${width}" height="${height}" viewBox="0 0 ${width} ${height}" font-family="system-ui, sans-serif" role="img"><title>${title.replace(/&/g, "&amp;").replace(/</g, "&lt;")}</title>${pen.parts.join("\n")}</svg>`, "image/svg+xml");
      return;
    }
    const canvas = document.createElement("canvas"), context = canvas.getContext("2d");
    [canvas.width, canvas.height] = [2 * width, 2 * height];
    context.scale(2, 2);
    drawAll(new CanvasPen(context), (x, y, draw) => { context.save(); context.translate(x, y); draw(); context.restore(); });
    download(this.fileName(".png"), canvas.toDataURL("image/png"), "image/png");
  }

  csv() {
    const quote = (text) => (/[",\n]/.test(text) ? `"${text.replace(/"/g, '""')}"` : text);
    const rows = [["layer", "name", "expert", "position", "group", "weight", "usage", "routing mass", ...this.data.domains.map((d) => `share of ${d}`)]];
    this.layers.forEach((layer, i) => {
      const { labels, groups } = solved(layer, this.states[i]), weights = layer.weights(labels, groups);
      for (let e = 0; e < layer.size; e++) rows.push([i, layer.name, e, layer.position[e], labels[e], weights[e], layer.usage[e], layer.raw.mass[e], ...layer.domainsOf(e)]);
    });
    return rows.map((row) => row.map((value) => quote(String(value))).join(",")).join("\n") + "\n";
  }
}

/**
 * Draw the view into an element.
 *
 * @param root an element, which becomes the view
 * @param data of hcsmoe_core.ui.viewdata.view_data
 * @param host what the surroundings give and want to know: layer, groups; onLayer, onGroups, onSelect
 */
// Not named render: anywidget would take a named export of that name for its own.
export function mount(root, data, host = {}) {
  return new View(root, data, host);
}

export default {
  render({ model, el }) { // anywidget
    const root = document.createElement("div");
    el.append(root);
    const put = (name, value) => { model.set(name, value); model.save_changes(); };
    const host = { layer: model.get("layer"), groups: model.get("groups"), onLayer: (v) => put("layer", v), onGroups: (v) => put("groups", v), onSelect: (v) => put("selected", v) };
    const view = new View(root, model.get("data"), host), same = (a, b) => JSON.stringify(a) === JSON.stringify(b);
    const layer = () => view.show(model.get("layer"));
    const selected = () => { if (!same(model.get("selected"), view.selection)) view.select(model.get("selected")); };
    const groups = () => {
      if (same(model.get("groups"), view.layers.map((one, i) => solved(one, view.states[i]).labels))) return;
      const before = view.states;
      view.states = view.fromLabels(model.get("groups"));
      view.past.push(before);
      view.touch("pick");
    };
    model.on("change:layer", layer);
    model.on("change:selected", selected);
    model.on("change:groups", groups);
    return () => { model.off("change:layer", layer); model.off("change:selected", selected); model.off("change:groups", groups); view.destroy(); };
  },
};
