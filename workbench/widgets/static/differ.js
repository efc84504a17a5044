/* The differ: what changed between two checkpoints, most changed first. */

class Differ {
  constructor(model, el) {
    this.model = model;
    this.report = readReport(model);
    this.frame = new Frame(model, el, this.report);
    this.names = this.report.data.name;
    this.grid = new Grid("differences", this);
    this.chips = this.report.kinds.map((kind) => {
      const chip = action(`${kind.mark}${kind.count.toLocaleString("en-US")}${kind.unit}`, "wb-chip", () => this.flip(kind.id));
      chip.dataset.kind = kind.id;
      chip.title = kind.note;
      chip.setAttribute("aria-label", `${kind.count} ${kind.id}`);
      return chip;
    });
    const group = element("div", "wb-chips");
    group.setAttribute("role", "group");
    group.setAttribute("aria-label", "kinds shown");
    group.append(...this.chips);
    this.bar = filterBar((filter) => this.frame.change({ filter }), group);
    this.bar.input.addEventListener("keydown", (event) => this.leaveFilter(event));
    this.figure = element("div", "wb-about");
    this.frame.middle.append(this.bar.node, this.grid.root, this.figure);
    this.frame.watch("state", () => this.draw());
    this.frame.watch("figure", () => this.drawFigure());
  }

  destroy() {
    this.grid.destroy();
    this.frame.destroy();
  }

  draw() {
    const state = this.frame.state;
    this.state = state;
    this.chosen = new Set(state.selected);
    const kinds = new Set(state.kinds);
    const pattern = compileFilter(state.filter);
    const items = [];
    let ofKinds = 0;
    this.names.forEach((name, row) => {
      const shown = kinds.has(this.report.kinds[this.report.data.kind[row]].id);
      if (shown) ofKinds += 1;
      if (shown && pattern !== undefined && (!pattern || pattern.test(name))) items.push(row);
    });
    const isFigure = state.pane === "layers";
    this.grid.root.hidden = this.bar.node.hidden = isFigure;
    this.figure.hidden = !isFigure;
    this.frame.fitRows(isFigure ? this.names.length + 20 : ofKinds);
    this.frame.drawRail(this.report.rail, state.pane, (pane) => this.frame.change({ pane }));
    for (const chip of this.chips) chip.setAttribute("aria-pressed", String(kinds.has(chip.dataset.kind)));
    if (document.activeElement !== this.bar.input && this.bar.input.value !== state.filter) this.bar.input.value = state.filter;
    const counts = `${items.length.toLocaleString("en-US")} of ${this.names.length.toLocaleString("en-US")}`;
    this.bar.count.textContent = pattern === undefined ? "not a pattern" : counts;
    this.grid.setColumns(this.report.columns, state.sort);
    this.grid.setItems(this.sorted(items), { tree: false, empty: ofKinds ? "no name matches the filter" : this.nothing() });
  }

  /** Said where no row is of the chosen kinds: the finding, and the action that shows the rows that there are. */
  nothing() {
    const present = this.report.kinds.filter((kind) => kind.count);
    if (!present.length) return this.report.nothing;
    const marks = present.map((kind) => `${kind.mark}${kind.count.toLocaleString("en-US")}${kind.unit}`).join(" ");
    const show = () => this.frame.change({ kinds: [...new Set([...this.state.kinds, ...present.map((kind) => kind.id)])] });
    return [element("span", "", this.report.nothing), action(`show ${marks}`, "wb-button", show)];
  }

  drawFigure() {
    const { source, alt } = this.model.get("figure");
    const image = element("img", "wb-figure");
    if (!source) {
      this.figure.replaceChildren(element("p", "wb-note", alt || "drawing…"));
      return;
    }
    image.src = source;
    image.alt = alt;
    this.figure.replaceChildren(image);
  }

  sorted(rows) {
    if (!this.state.sort.length) return rows;
    const [id, direction] = this.state.sort;
    const values = this.report.data[id];
    const key = (row) => (Array.isArray(values[row]) ? values[row].reduce((a, b) => a * b, 1) : values[row]);
    return rows.sort((a, b) => {
      const x = key(a);
      const y = key(b);
      if (x === y) return a - b;
      if (x === null || y === null) return x === null ? 1 : -1;
      return (x < y ? -1 : 1) * direction;
    });
  }

  cell(row, column) {
    if (column.id === "kind") return this.report.kinds[this.report.data.kind[row]].mark;
    return formatCell(column.kind, this.report.data[column.id][row]);
  }

  share() {
    return null;
  }

  level() {
    return 0;
  }

  parent() {
    return -1;
  }

  open() {
    return null;
  }

  selected(row) {
    return this.chosen.has(row);
  }

  pick(row, how) {
    if (how === "toggle") {
      const kept = this.state.selected.filter((other) => other !== row);
      this.frame.change({ selected: kept.length < this.state.selected.length ? kept : [...kept, row] });
    } else {
      this.frame.change({ selected: [row] });
    }
  }

  toggle() {}

  flip(kind) {
    const kinds = this.state.kinds.filter((other) => other !== kind);
    this.frame.change({ kinds: kinds.length < this.state.kinds.length ? kinds : [...kinds, kind] });
  }

  sort(id) {
    const [current, direction] = this.state.sort;
    const first = id === "name" ? 1 : -1;
    this.frame.change({ sort: current !== id ? [id, first] : direction === first ? [id, -direction] : [] });
  }

  search() {
    this.bar.input.focus();
    this.bar.input.select();
  }

  leaveFilter(event) {
    if (event.key !== "ArrowDown" && event.key !== "Enter" && event.key !== "Escape") return;
    event.preventDefault();
    if (event.key === "Escape") {
      this.bar.input.value = "";
      this.frame.change({ filter: "" });
    }
    this.grid.root.focus();
  }
}

export default {
  render({ model, el }) {
    const view = new Differ(model, el);
    return () => view.destroy();
  },
};
