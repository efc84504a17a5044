/* The compressor: schemes and globs, the frontier with its handle, a row per tensor, and the file that comes of it.
 *
 * Ids on the grid are rows of the plan. The kernel plans and predicts; here points become places, and nothing else is computed.
 */

const [HIGH, EDGE] = [96, 8]; // of the drawing, in pixels

class Compressor {
  constructor(model, el) {
    this.model = model;
    this.report = readReport(model);
    this.frame = new Frame(model, el, this.report);
    this.frame.root.classList.add("wb-compressor");
    this.grid = new Grid("tensors", this);
    this.bar = filterBar((filter) => this.frame.change({ filter }), action("leave as it is", "wb-button wb-leave", () => this.frame.send("leave")));
    this.leave = this.bar.node.querySelector(".wb-leave");
    this.leave.title = "exclude the selected tensors and measure again";
    this.form = this.buildForm();
    this.curve = this.buildCurve();
    this.frame.middle.append(this.form, this.curve, this.bar.node, this.grid.root);
    this.frame.watch("rows", () => this.readRows(), false);
    this.frame.watch("curve", () => this.drawCurve(), false);
    this.frame.watch("sizes", () => this.drawSizes(), false);
    this.frame.watch("job", () => this.drawVerbs(), false);
    this.frame.watch("state", () => this.draw(), false);
    this.readRows();
    this.drawCurve();
  }

  destroy() {
    this.resize.disconnect();
    this.grid.destroy();
    this.frame.destroy();
  }

  get state() { return this.frame.state; }

  // the form

  buildForm() {
    const form = element("div", "wb-form");
    this.boxes = new Map();
    const group = element("div", "wb-checks");
    group.setAttribute("role", "group");
    group.setAttribute("aria-label", "schemes");
    for (const scheme of this.report.schemes) {
      const node = element("label", "wb-check");
      const input = Object.assign(element("input"), { type: "checkbox" });
      node.append(input, element("span", "", scheme));
      this.boxes.set(scheme, input);
      group.append(node);
    }
    this.measure = action("Measure", "wb-button wb-primary", () => this.frame.send("measure", this.values()));
    form.append(formLine("try", [group, this.measure]));
    this.names = this.text("names", "all matrices, or globs such as *.attn.*");
    this.exclude = this.text("exclude", "globs of what stays, e.g. lm_head.*");
    form.append(formLine("names", [this.names, element("span", "wb-hint", "exclude"), this.exclude]));
    return form;
  }

  text(key, placeholder) {
    return Object.assign(element("input", "wb-filter"), { type: "text", placeholder, spellcheck: false, ariaLabel: key });
  }

  values() {
    const schemes = [...this.boxes].filter(([, input]) => input.checked).map(([scheme]) => scheme);
    return { schemes, names: this.names.value, exclude: this.exclude.value };
  }

  // the frontier, its handle, and the bars of bytes

  buildCurve() {
    const node = element("div", "wb-frontier");
    this.drawing = shape("svg", { role: "img" });
    this.resize = new ResizeObserver(() => this.drawCurve());
    this.resize.observe(this.drawing);
    this.handle = Object.assign(element("input", "wb-handle"), { type: "range", min: 0, step: 1, ariaLabel: "budget" });
    const moved = debounced((point) => this.frame.change({ point }), 120);
    this.handle.addEventListener("input", () => {
      this.drawHandle(Number(this.handle.value));
      moved(Number(this.handle.value));
    });
    this.handle.addEventListener("change", moved.flush);
    this.told = element("div", "wb-budget");
    this.told.setAttribute("role", "status");
    this.bars = element("div", "wb-bytes");
    this.path = this.text("path", "smaller.safetensors");
    this.save = action("Save", "wb-button wb-primary", () => this.frame.send("save", { path: this.path.value }));
    this.score = action("Score before and after", "wb-button", () => this.frame.send("evaluate"));
    this.score.hidden = !this.report.score;
    const verbs = element("div", "wb-save-line");
    verbs.append(this.path, this.save, this.score);
    node.append(this.drawing, this.handle, this.told, this.bars, verbs);
    return node;
  }

  drawCurve() {
    const { points = [], marks = [], measure = "" } = this.model.get("curve");
    this.points = points;
    this.curve.hidden = !points.length;
    const all = [...points, ...marks.map(([, size, error]) => [size, error])];
    const [left, right] = range(all.map(([size]) => size));
    const [low, high] = range(all.filter(([, error]) => error > 0).map(([, error]) => Math.log(error)));
    const wide = this.drawing.clientWidth || 400;
    this.at = ([size, error]) => [
      EDGE + ((size - left) / (right - left)) * (wide - 2 * EDGE),
      error > 0 ? EDGE + ((high - Math.log(error)) / (high - low)) * (HIGH - 3 * EDGE) : HIGH - EDGE, // what costs nothing stands below all
    ];
    const line = shape("polyline", { points: points.map((point) => this.at(point).join(",")).join(" "), class: "wb-curve-line" });
    const others = marks.map(([name, size, error]) => {
      const [x, y] = this.at([size, error]);
      const mark = shape("path", { d: `M${x - 4},${y - 4}l8,8m0,-8l-8,8`, class: "wb-curve-mark" });
      mark.append(Object.assign(shape("title", {}), { textContent: `${name} everywhere: ${formatBytes(size)}, ${significant(error, 3)}` }));
      return mark;
    });
    this.dot = shape("circle", { r: 5, class: "wb-curve-dot" });
    this.drawing.replaceChildren(line, ...others, this.dot);
    this.drawing.setAttribute("aria-label", `${measure} by bytes; crosses: one scheme everywhere`);
    this.handle.max = String(Math.max(0, points.length - 1));
    this.draw();
  }

  drawHandle(index) {
    const point = this.points[index];
    if (!point) return;
    const [x, y] = this.at(point);
    this.dot.setAttribute("cx", String(x));
    this.dot.setAttribute("cy", String(y));
    const whole = this.points[this.points.length - 1][0];
    this.told.textContent = `${point[2]} · ${significant((100 * point[0]) / whole, 3)} % · ${this.model.get("curve").measure} ${significant(point[1], 3)}`;
    this.handle.setAttribute("aria-valuetext", this.told.textContent);
  }

  drawSizes() {
    const { bars = [], scores = [] } = this.model.get("sizes");
    const most = Math.max(1, ...bars.map(([, size]) => size || 0));
    const lines = bars.map(([what, size, words]) => {
      const line = element("div", "wb-byte-line");
      const bar = element("div", "wb-byte-bar");
      bar.style.width = `${size === null ? 0 : (60 * size) / most}%`;
      line.append(element("span", "wb-hint", what), bar, element("span", "wb-words", words));
      return line;
    });
    const told = scores.length ? [element("div", "wb-scores", `score ${scores[0]} → ${scores[1]}`)] : [];
    this.bars.replaceChildren(...lines, ...told);
  }

  drawVerbs() {
    const busy = Boolean(this.model.get("job").label);
    for (const verb of [this.measure, this.save, this.score]) verb.disabled = busy;
    this.leave.disabled = busy || !this.state.selected.length;
  }

  // the rows

  readRows() {
    this.data = readReport(this.model, "rows");
    this.draw();
  }

  draw() {
    const { state } = this;
    if (!this.data || !this.points) return;
    for (const [scheme, input] of this.boxes) if (document.activeElement !== input) input.checked = state.schemes.includes(scheme);
    for (const key of ["names", "exclude", "path"]) if (document.activeElement !== this[key]) this[key].value = state[key];
    if (document.activeElement !== this.handle) this.handle.value = String(state.point);
    if (document.activeElement !== this.bar.input && this.bar.input.value !== state.filter) this.bar.input.value = state.filter;
    this.drawHandle(state.point);
    this.drawSizes();
    this.chosen = new Set(state.selected);
    const pattern = compileFilter(state.filter);
    const shown = this.data.name.map((_, row) => row).filter((row) => pattern !== undefined && (!pattern || pattern.test(this.data.name[row])));
    const counts = `${shown.length.toLocaleString("en-US")} of ${this.data.name.length.toLocaleString("en-US")}`;
    this.bar.count.textContent = pattern === undefined ? "not a pattern" : counts;
    this.bar.node.hidden = this.grid.root.hidden = !this.data.name.length;
    this.frame.fitRows(this.data.name.length ? this.data.name.length + 9 : 2);
    this.grid.setColumns(this.report.columns, state.sort);
    this.grid.setItems(this.sorted(shown), { tree: false, empty: "no name matches the filter" });
    this.drawVerbs();
  }

  sorted(rows) {
    if (!this.state.sort.length) return rows;
    const [id, direction] = this.state.sort;
    const values = this.data[id];
    return rows.sort((a, b) => {
      if (values[a] === values[b]) return a - b;
      if (values[a] === null || values[b] === null) return values[a] === null ? 1 : -1;
      return (values[a] < values[b] ? -1 : 1) * direction;
    });
  }

  cell(row, column) { return formatCell(column.kind, this.data[column.id][row]); }
  share(row) { return this.data.error[row] || null; }
  level() { return 0; }
  open() { return null; }
  parent() { return -1; }
  selected(row) { return this.chosen.has(row); }
  toggle() {}

  pick(row, how) {
    const kept = this.state.selected.filter((other) => other !== row);
    const toggled = kept.length < this.state.selected.length ? kept : [...kept, row];
    this.frame.change({ selected: how === "toggle" ? toggled : [row] });
  }

  sort(id) {
    const [current, direction] = this.state.sort;
    const first = id === "name" || id === "scheme" ? 1 : -1;
    this.frame.change({ sort: current !== id ? [id, first] : direction === first ? [id, -direction] : [] });
  }

  search() {
    this.bar.input.focus();
    this.bar.input.select();
  }
}

function shape(tag, attributes) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, String(value));
  return node;
}

function range(values) {
  const [low, high] = [Math.min(...values), Math.max(...values)];
  return high > low ? [low, high] : [low - 1, low + 1]; // of nothing: [Infinity, -Infinity] becomes no number, and no point is drawn
}

export default {
  render({ model, el }) {
    const view = new Compressor(model, el);
    return () => view.destroy();
  },
};
