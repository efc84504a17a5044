/* The explorer: the tensors of one checkpoint as a tree or a table. */

const PREFIX = "section:";

class Explorer {
  constructor(model, el) {
    this.model = model;
    this.report = readReport(model);
    this.frame = new Frame(model, el, this.report);
    this.names = this.report.data.name;
    this.total = this.names.length;
    this.statistics = {};
    this.prepareTree();
    this.grid = new Grid("tensors", this);
    this.modes = ["tree", "table"].map((mode) => action(mode, "wb-toggle", () => this.frame.change({ mode })));
    const switcher = element("div", "wb-switch");
    switcher.append(...this.modes);
    const measure = action("statistics", "wb-button", () => this.frame.send("statistics"));
    measure.title = "mean, spread, zeros and NaN of every tensor that the filter shows";
    this.bar = filterBar((filter) => this.frame.change({ filter, closed: [] }), measure, switcher);
    this.bar.input.addEventListener("keydown", (event) => this.leaveFilter(event));
    this.about = element("div", "wb-about");
    this.frame.middle.append(this.bar.node, this.grid.root, this.about);
    this.frame.watch("state", () => this.draw(), false);
    this.frame.watch("statistics", () => this.readStatistics());
  }

  destroy() {
    this.grid.destroy();
    this.frame.destroy();
  }

  prepareTree() {
    const { parent, row } = this.report.tree;
    this.children = parent.map(() => []);
    this.roots = [];
    this.nodeOf = new Int32Array(this.total);
    parent.forEach((up, node) => {
      (up < 0 ? this.roots : this.children[up]).push(node);
      if (row[node] >= 0) this.nodeOf[row[node]] = node;
    });
    this.defaultOpen = this.openByDefault();
  }

  /** Groups that start open: level by level while no more than about thirty rows show. */
  openByDefault() {
    const open = [];
    let level = this.roots;
    let shown = level.length;
    for (;;) {
      const groups = level.filter((node) => this.children[node].length);
      const next = groups.flatMap((node) => this.children[node]);
      shown += next.length;
      if (!groups.length || shown > 30) return open;
      open.push(...groups);
      level = next;
    }
  }

  readStatistics() {
    this.statistics = this.model.get("statistics");
    this.draw();
  }

  get columns() {
    const extra = Object.keys(this.statistics).length ? this.report.measured : [];
    const single = this.report.dtypes.length === 1;
    const own = this.report.columns.filter((column) => (this.tree || !column.tree) && !(extra.length && single && column.id === "dtype"));
    return [...own, ...extra];
  }

  /** What the state leaves visible; recomputed whole, which takes some milliseconds for 50,000 names. */
  draw() {
    const state = this.frame.state;
    this.state = state;
    this.tree = state.mode === "tree";
    this.chosen = new Set(state.selected);
    this.opened = new Set(state.expanded === null ? this.defaultOpen : state.expanded);
    const matches = this.matching(state);
    const items = this.tree ? this.treeItems(matches) : this.tableItems(matches);
    this.drawBar(state);
    this.frame.drawRail(this.report.rail, state.pane, (pane) => this.frame.change({ pane }));
    const isAbout = state.pane === "metadata";
    this.grid.root.hidden = this.bar.node.hidden = isAbout;
    this.about.hidden = !isAbout;
    if (isAbout) this.about.replaceChildren(this.frame.facts(this.report.metadata));
    this.grid.setColumns(this.columns, state.sort);
    this.grid.setItems(items, { tree: this.tree, empty: this.total ? "no name matches the filter" : "this checkpoint holds no tensors" });
  }

  drawBar(state) {
    if (document.activeElement !== this.bar.input && this.bar.input.value !== state.filter) this.bar.input.value = state.filter;
    this.modes.forEach((button) => button.setAttribute("aria-pressed", String(button.textContent === state.mode)));
    const shown = this.shown.toLocaleString("en-US");
    const total = this.within.toLocaleString("en-US");
    this.bar.count.textContent = this.invalid ? "not a pattern" : `${shown} of ${total}`;
  }

  matching({ filter, pane }) {
    const pattern = compileFilter(filter);
    this.invalid = pattern === undefined;
    const prefix = pane.startsWith(PREFIX) ? `${pane.slice(PREFIX.length)}.` : "";
    const matches = new Uint8Array(this.total);
    this.shown = this.within = 0;
    for (let row = 0; row < this.total; row += 1) {
      const name = this.names[row];
      if (prefix && !name.startsWith(prefix)) continue;
      this.within += 1;
      if (this.invalid || (pattern && !pattern.test(prefix ? name.slice(prefix.length) : name))) continue;
      matches[row] = 1;
      this.shown += 1;
    }
    return matches;
  }

  tableItems(matches) {
    const items = [];
    for (let row = 0; row < this.total; row += 1) if (matches[row]) items.push(this.nodeOf[row]);
    return this.sorted(items);
  }

  /** Visible nodes in order. A filter opens every group that holds a match, so that matches are never hidden. */
  treeItems(matches) {
    const { parent, row } = this.report.tree;
    const some = this.shown < this.total;
    const alive = new Uint8Array(parent.length);
    for (let node = parent.length - 1; node >= 0; node -= 1) {
      if (row[node] >= 0 && matches[row[node]]) alive[node] = 1;
      if (alive[node] && parent[node] >= 0) alive[parent[node]] = 1;
    }
    this.forced = some && this.state.filter !== "";
    const items = [];
    const pending = this.sorted(this.roots.slice()).reverse();
    while (pending.length) {
      const node = pending.pop();
      if (!alive[node]) continue;
      items.push(node);
      if (this.children[node].length && this.open(node)) pending.push(...this.sorted(this.children[node].slice()).reverse());
    }
    return items;
  }

  sorted(nodes) {
    if (!this.state.sort.length) return nodes;
    const [id, direction] = this.state.sort;
    const keys = new Map(nodes.map((node) => [node, this.key(node, id)]));
    return nodes.sort((a, b) => {
      const x = keys.get(a);
      const y = keys.get(b);
      if (x === y) return a - b;
      if (x === null || y === null) return x === null ? 1 : -1;
      return (x < y ? -1 : 1) * direction;
    });
  }

  key(node, id) {
    const value = this.value(node, id);
    if (value === null || value === undefined) return null;
    if (Array.isArray(value)) return value.reduce((a, b) => a * b, 1);
    return value;
  }

  value(node, id) {
    const { tree, data } = this.report;
    const row = tree.row[node];
    if (id === "name") return this.tree ? tree.label[node] : this.names[row];
    if (id === "count") return row < 0 ? tree.count[node] : null;
    if (id === "nbytes") return tree.nbytes[node];
    if (row < 0) return null;
    if (id === "dtype") return this.report.dtypes[data.dtype[row]];
    if (id === "shape") return this.report.shapes[data.shape[row]];
    if (data[id]) return data[id][row];
    const measured = this.statistics[id];
    return measured && measured[row] !== undefined ? measured[row] : null;
  }

  cell(node, column) {
    const value = this.value(node, column.id);
    const isGroup = this.report.tree.row[node] < 0;
    if (value === null && (isGroup || column.id === "count")) return "";
    return formatCell(column.kind, value);
  }

  share(node) {
    return this.report.nbytes ? this.report.tree.nbytes[node] / this.report.nbytes : null;
  }

  level(node) {
    return this.tree ? this.report.tree.depth[node] : 0;
  }

  parent(node) {
    return this.tree ? this.report.tree.parent[node] : -1;
  }

  open(node) {
    if (!this.tree || this.report.tree.row[node] >= 0) return null;
    return this.forced ? !this.state.closed.includes(node) : this.opened.has(node);
  }

  leaves(node) {
    const out = [];
    const pending = [node];
    while (pending.length) {
      const next = pending.pop();
      if (this.report.tree.row[next] >= 0) out.push(this.report.tree.row[next]);
      pending.push(...this.children[next]);
    }
    return out;
  }

  selected(node) {
    const row = this.report.tree.row[node];
    if (row >= 0) return this.chosen.has(row);
    return this.chosen.size > 0 && this.leaves(node).every((leaf) => this.chosen.has(leaf));
  }

  pick(node, how) {
    const rows = this.leaves(node);
    let selected;
    if (how === "one") {
      selected = rows;
    } else if (how === "toggle") {
      const all = rows.every((row) => this.chosen.has(row));
      const kept = this.state.selected.filter((row) => !rows.includes(row));
      selected = all ? kept : [...kept, ...rows];
    } else {
      const from = Math.max(0, this.grid.items.indexOf(this.anchor));
      const to = this.grid.items.indexOf(node);
      const range = this.grid.items.slice(Math.min(from, to), Math.max(from, to) + 1);
      selected = [...new Set(range.flatMap((item) => (this.report.tree.row[item] >= 0 ? [this.report.tree.row[item]] : [])))];
    }
    if (how !== "range") this.anchor = node;
    this.frame.change({ selected });
  }

  toggle(node) {
    if (this.forced) {
      const closed = this.state.closed.filter((other) => other !== node);
      this.frame.change({ closed: closed.length < this.state.closed.length ? closed : [...closed, node] });
      return;
    }
    if (!this.opened.delete(node)) this.opened.add(node);
    this.frame.change({ expanded: [...this.opened] });
  }

  sort(id) {
    const [current, direction] = this.state.sort;
    this.frame.change({ sort: current !== id ? [id, id === "name" ? 1 : -1] : direction === (id === "name" ? 1 : -1) ? [id, -direction] : [] });
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
      this.frame.change({ filter: "", closed: [] });
    }
    this.grid.root.focus();
  }
}

export default {
  render({ model, el }) {
    const view = new Explorer(model, el);
    return () => view.destroy();
  },
};
