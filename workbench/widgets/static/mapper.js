/* The key mapper: the model's names and the file's face to face. What is open comes first, then each rule with its keys.
 *
 * `report` and `tree` come once; `rows` is what an edit may change; the numbers in both are the kernel's. Ids on the grid: a row of the
 * model, a row of the file, then a group, then a node of the model's tree. Every command carries the rows that it means.
 */

function labelled(className, role, label) {
  const node = element("div", className);
  node.setAttribute("role", role);
  if (label) node.setAttribute("aria-label", label);
  return node;
}

class KeyMapper {
  constructor(model, el) {
    this.picksGroups = true;
    this.model = model;
    this.report = readReport(model);
    this.frame = new Frame(model, el, this.report);
    this.frame.root.classList.add("wb-mapper");
    this.groupAt = this.report.name.length;
    this.readTree();
    this.grid = new Grid("key map", this);
    this.grid.root.addEventListener("keydown", (event) => this.key(event));
    this.chips = this.report.kinds.map((kind) => Object.assign(action("", "wb-chip", () => this.flip(kind.id)), { title: kind.note }));
    const chips = labelled("wb-chips", "group", "kinds shown");
    chips.append(...this.chips);
    this.modes = ["rules", "tree"].map((mode) => action(mode, "wb-toggle", () => this.frame.change({ mode })));
    const switcher = element("div", "wb-switch");
    switcher.append(...this.modes);
    this.bar = filterBar((filter) => this.frame.change({ filter, open: {} }), chips, switcher);
    this.bar.input.addEventListener("keydown", (event) => this.leaveFilter(event));
    this.coverage = element("div", "wb-coverage");
    this.covered = labelled("wb-covered", "img", "");
    this.coverText = labelled("wb-cover-text", "status", "");
    [this.undo, this.apply] = ["undo", "apply"].map((command) => action(command, "wb-button", () => this.frame.send(command)));
    this.undo.title = "take the last change back (u)";
    this.coverage.append(this.covered, this.coverText, this.undo, this.apply);
    this.listing = element("div", "wb-about");
    this.frame.middle.append(this.bar.node, this.coverage, this.grid.root, this.listing);
    this.frame.watch("tree", () => this.readTree(), false);
    this.frame.watch("rows", () => this.readKeys());
    this.frame.watch("state", () => this.draw(), false);
    this.frame.watch("detail", () => this.drawChoices());
    this.frame.watch("listing", () => this.drawListing());
  }

  destroy() { this.grid.destroy(); this.frame.destroy(); }

  /** The model's tree, which comes when it is first asked for. */
  readTree() {
    this.nodes = { parent: [], row: [], ...readReport(this.model, "tree") };
    const { parent, row } = this.nodes;
    this.children = parent.map(() => []);
    this.roots = [];
    this.nodeOf = new Int32Array(this.report.models);
    parent.forEach((up, node) => {
      (up < 0 ? this.roots : this.children[up]).push(node);
      if (row[node] >= 0) this.nodeOf[row[node]] = node;
    });
  }

  readKeys() {
    this.keys = readReport(this.model, "rows");
    this.nodeAt = this.groupAt + this.keys.groups.length;
    this.members = this.keys.groups.map(() => []);
    for (let row = 0; row < this.report.models; row += 1) this.members[this.keys.group[row]].push(row);
    for (const row of this.keys.unused) this.members[this.keys.group[row]].push(row);
    this.draw();
  }

  draw() {
    const state = this.frame.state;
    this.state = state;
    this.chosen = new Set(state.selected);
    this.tree = state.mode === "tree" && this.keys.facing.length > 0;
    const pattern = compileFilter(state.filter);
    const kinds = new Set(state.kinds);
    const matches = (row) => !pattern || pattern.test(this.report.name[row]) || pattern.test(this.sourceName(row));
    const shown = (row) => pattern !== undefined && kinds.has(this.kind(row).id) && matches(row);
    this.forced = state.filter !== "";
    const rows = new Uint8Array(this.report.name.length);
    let count = 0;
    for (const members of this.members) for (const row of members) if (shown(row)) count += rows[row] = 1;
    const total = this.report.models + this.keys.unused.length;
    const isCode = state.pane === "code";
    for (const node of [this.grid.root, this.bar.node, this.coverage]) node.hidden = isCode;
    this.listing.hidden = !isCode;
    this.frame.drawRail(this.report.rail, state.pane, (pane) => this.frame.change({ pane }));
    this.drawBar(state, kinds, pattern === undefined ? "not a pattern" : `${formatCell("count", count)} of ${formatCell("count", total)}`);
    const items = this.tree ? this.treeItems(rows) : [];
    this.members.forEach((_, group) => this.tree && this.keys.groups[group].id !== "unused" ? 0 : this.groupItems(items, group, rows));
    this.frame.fitRows(isCode ? 99 : total + this.keys.groups.length);
    this.grid.setColumns(this.report.columns.filter((column) => this.tree || !column.tree), state.sort);
    this.grid.setItems(items, { tree: true, empty: total ? "no name is of these kinds and matches the filter" : "neither side holds a tensor" });
    const only = state.selected.length === 1 ? state.selected[0] : -1;
    if (only !== this.only) this.grid.moveTo(only); // the kernel may have gone on to the next open name
    this.only = only;
  }

  drawBar(state, kinds, count) {
    if (document.activeElement !== this.bar.input && this.bar.input.value !== state.filter) this.bar.input.value = state.filter;
    this.bar.count.textContent = count;
    this.modes.forEach((button) => button.setAttribute("aria-pressed", String(button.textContent === state.mode)));
    this.chips.forEach((chip, i) => {
      const { id, mark } = this.report.kinds[i];
      const number = formatCell("count", this.keys.counts[i]);
      chip.textContent = `${mark}${number}`;
      chip.setAttribute("aria-label", `${number} ${id}`);
      chip.setAttribute("aria-pressed", String(kinds.has(id)));
    });
    const { text, parts } = this.keys.coverage;
    Object.assign(this.coverText, { textContent: text, title: text });
    this.covered.setAttribute("aria-label", `filled: ${text}`);
    this.covered.replaceChildren(...parts.map(([kind, share]) => {
      const part = element("div", `wb-part wb-part-${kind}`);
      part.style.width = `${100 * share}%`;
      part.title = `${kind}: ${formatCell("percent", share)} of the parameters`;
      return part;
    }));
    this.undo.disabled = !this.keys.past;
    this.apply.disabled = !this.keys.ok;
    this.apply.title = this.keys.ok ? "mapper.checkpoint: the file's tensors under the model's names" : "off while a name is open";
  }

  groupItems(items, group, rows) {
    const members = this.sorted(this.members[group].filter((row) => rows[row]));
    if (!members.length) return;
    items.push(this.groupAt + group);
    if (this.open(this.groupAt + group)) for (const row of members) items.push(row);
  }

  /** Visible nodes in order; a filter opens every group that holds a match. */
  treeItems(rows) {
    const { parent, row } = this.nodes;
    const alive = new Uint8Array(parent.length);
    for (let node = parent.length - 1; node >= 0; node -= 1) {
      if (row[node] >= 0 && rows[row[node]]) alive[node] = 1;
      if (alive[node] && parent[node] >= 0) alive[parent[node]] = 1;
    }
    const items = [];
    const pending = this.inOrder(this.roots);
    while (pending.length) {
      const node = pending.pop();
      if (!alive[node]) continue;
      items.push(row[node] >= 0 ? row[node] : this.nodeAt + node);
      if (row[node] < 0 && this.open(this.nodeAt + node)) pending.push(...this.inOrder(this.children[node]));
    }
    return items;
  }

  /** Siblings as a stack: those with something open come off it first, in the model's order. */
  inOrder(nodes) {
    const { row } = this.nodes;
    const isOpen = (node) => (row[node] < 0 ? this.keys.facing[node][2] : this.keys.groups[this.keys.group[row[node]]].kind) < 2;
    return [...nodes.filter(isOpen), ...nodes.filter((node) => !isOpen(node))].reverse();
  }

  sorted(rows) {
    if (!this.state.sort.length) return rows;
    const [id, direction] = this.state.sort;
    const key = (row) => (id === "nbytes" ? this.report.nbytes[row] : this.cell(row, { id, kind: "text" }));
    const keys = new Map(rows.map((row) => [row, key(row)]));
    return rows.sort((a, b) => {
      const [x, y] = [keys.get(a), keys.get(b)];
      return x === y ? a - b : (x === null || x < y ? -1 : 1) * direction;
    });
  }

  kind(row) {
    return this.report.kinds[this.keys.groups[this.keys.group[row]].kind];
  }

  sourceName(row) {
    const source = row < this.report.models ? this.keys.source[row] : row;
    return typeof source === "number" ? this.report.name[source] : source;
  }

  cell(id, column) {
    if (id >= this.nodeAt) return this.nodeCell(id - this.nodeAt, column);
    if (id >= this.groupAt) return this.groupCell(this.keys.groups[id - this.groupAt], column);
    const isFile = id >= this.report.models;
    if (column.id === "kind") return this.kind(id).mark;
    if (column.id === "source") return this.tree && !isFile ? this.within(this.nodes.parent[this.nodeOf[id]], this.sourceName(id)) : this.sourceName(id);
    if (column.id === "name") return isFile ? "" : this.tree ? this.nodes.label[this.nodeOf[id]] : this.report.name[id];
    if (column.id === "rule") return isFile || this.keys.groups[this.keys.group[id]].kind < 2 ? "" : this.keys.groups[this.keys.group[id]].label;
    return formatCell(column.kind, this.report[column.id][id]);
  }

  groupCell(group, column) {
    return { name: group.label, kind: this.report.kinds[group.kind].mark, source: group.about, form: group.count }[column.id] || "";
  }

  nodeCell(node, column) {
    if (column.id === "name") return this.nodes.label[node];
    if (column.id === "nbytes") return formatCell("bytes", this.nodes.nbytes[node]);
    const [source, form, kind] = this.keys.facing[node];
    return { source: this.within(this.nodes.parent[node], source), form, kind: this.report.kinds[kind].mark }[column.id] || "";
  }

  /** A source as its own tree would show it: without what the group above it begins with. */
  within(parent, source) {
    const above = parent < 0 ? "" : this.keys.facing[parent][0].slice(0, -1);
    return above && source.startsWith(above) ? source.slice(above.length) : source;
  }

  share() { return null; }

  level(id) {
    if (id >= this.nodeAt) return this.nodes.depth[id - this.nodeAt];
    if (id >= this.groupAt) return 0;
    return this.tree && id < this.report.models ? this.nodes.depth[this.nodeOf[id]] : 1;
  }

  parent(id) {
    if (id >= this.groupAt && id < this.nodeAt) return -1;
    if (id < this.groupAt && !(this.tree && id < this.report.models)) return this.groupAt + this.keys.group[id];
    const up = this.nodes.parent[id >= this.nodeAt ? id - this.nodeAt : this.nodeOf[id]];
    return up < 0 ? -1 : this.nodeAt + up;
  }

  /** How the state remembers that a person opened or closed it. */
  handle(id) {
    return id >= this.nodeAt ? `node ${id - this.nodeAt}` : this.keys.groups[id - this.groupAt].id;
  }

  open(id) {
    if (id < this.groupAt) return null;
    const told = this.state.open[this.handle(id)];
    if (told !== undefined) return told;
    return this.forced || (id >= this.nodeAt ? this.keys.facing[id - this.nodeAt][3] : this.keys.groups[id - this.groupAt].open);
  }

  leaves(id) {
    const out = id < this.groupAt ? [id] : [];
    const pending = id < this.groupAt ? [] : [id - this.nodeAt];
    for (let node = pending.pop(); node !== undefined; node = pending.pop()) {
      if (this.nodes.row[node] >= 0) out.push(this.nodes.row[node]);
      pending.push(...this.children[node]);
    }
    return out;
  }

  isGroup(id) { return id >= this.groupAt && id < this.nodeAt; }

  selected(id) {
    if (this.isGroup(id)) return this.state.group === this.handle(id);
    if (!this.chosen.size || this.state.group) return false;
    return this.leaves(id).every((row) => this.chosen.has(row));
  }

  /** Picking a closed group opens it; a rule is picked whole, so that it can be accepted or rejected. */
  pick(id, how) {
    const open = id < this.groupAt || this.open(id) ? this.state.open : { ...this.state.open, [this.handle(id)]: true };
    if (this.isGroup(id)) return this.frame.change({ open, group: this.handle(id), selected: [] });
    const rows = this.leaves(id);
    let selected = rows;
    if (how === "toggle") {
      const mine = new Set(rows);
      const kept = this.state.selected.filter((row) => !mine.has(row));
      selected = rows.every((row) => this.chosen.has(row)) ? kept : [...kept, ...rows];
    } else if (how === "range") {
      const [from, to] = [Math.max(0, this.grid.items.indexOf(this.anchor)), this.grid.items.indexOf(id)];
      selected = this.grid.items.slice(Math.min(from, to), Math.max(from, to) + 1).filter((item) => item < this.groupAt);
    }
    if (how !== "range") this.anchor = id;
    return this.frame.change({ open, group: "", selected });
  }

  toggle(id) { this.frame.change({ open: { ...this.state.open, [this.handle(id)]: !this.open(id) } }); }

  flip(kind) {
    const kinds = this.state.kinds.filter((other) => other !== kind);
    this.frame.change({ kinds: kinds.length < this.state.kinds.length ? kinds : [...kinds, kind] });
  }

  sort(id) {
    const [current, direction] = this.state.sort;
    this.frame.change({ sort: current !== id ? [id, 1] : direction > 0 ? [id, -1] : [] });
  }

  ask(command, values = {}) {
    this.frame.send(command, { group: this.state.group, selected: this.state.selected, ...values });
    this.grid.root.focus({ preventScroll: true });
  }

  key(event) {
    const command = { a: "accept", r: "reject", u: "undo", e: "edit" }[event.key];
    if (!command || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    event.stopPropagation();
    if (command === "edit") this.search(this.frame.panel.querySelector("input") || null);
    else this.ask(command);
  }

  search(input = this.bar.input) {
    if (input) input.select();
  }

  leaveFilter(event) {
    if (!["ArrowDown", "Enter", "Escape"].includes(event.key)) return;
    event.preventDefault();
    if (event.key === "Escape") {
      this.bar.input.value = "";
      this.frame.change({ filter: "", open: {} });
    }
    this.grid.root.focus();
  }

  /** Below what the frame says of the selected: what comes next, accept and reject, and the names that fit. */
  drawChoices() {
    const { verbs = [], picker, next } = this.model.get("detail");
    const parts = next ? [element("p", "wb-note", next)] : [];
    if (verbs.length) {
      const line = element("div", "wb-verbs");
      const button = ([label, command]) => Object.assign(action(label, "wb-button", () => this.ask(command)), { title: `key ${command[0]}` });
      line.append(...verbs.map(button));
      parts.push(line);
    }
    if (picker) parts.push(...this.pickerParts(picker));
    this.frame.panel.append(...parts);
  }

  pickerParts({ label, what, rows }) {
    const given = { type: "search", placeholder: what, spellcheck: false, ariaLabel: what, title: "type to narrow, Enter takes the name (e)" };
    const input = Object.assign(element("input", "wb-filter"), given);
    const list = labelled("wb-picks", "group", label);
    const width = Math.max(20, Math.floor((this.frame.panel.clientWidth - 48) / 7.3));
    const draw = () => {
      const pattern = compileFilter(input.value);
      const left = pattern === undefined ? [] : rows.filter(([, name]) => !pattern || pattern.test(name));
      list.replaceChildren(...left.map(([row, name, note]) => {
        const button = action("", "wb-pick", () => this.ask("accept", { choice: row }));
        button.append(element("bdi", "", cut(name, width)), element("span", "wb-hint", cut(note, width + 4)));
        button.title = note ? `${name}: ${note}` : name;
        button.disabled = row < 0;
        return button;
      }));
      return left;
    };
    input.addEventListener("input", draw);
    input.addEventListener("keydown", (event) => {
      if (event.key === "Escape") this.grid.root.focus();
      if (event.key === "ArrowDown" && list.firstChild) list.firstChild.focus();
      if (event.key !== "Enter" || !input.value) return;
      const left = draw();
      this.ask("accept", { choice: left.length === 1 && left[0][0] >= 0 ? left[0][0] : input.value });
    });
    list.addEventListener("keydown", (event) => {
      const to = { ArrowDown: event.target.nextSibling, ArrowUp: event.target.previousSibling || input, Escape: this.grid.root }[event.key];
      if (to === undefined) return;
      event.preventDefault();
      if (to) to.focus();
    });
    draw();
    return [element("div", "wb-pick-label", label), input, list];
  }

  drawListing() {
    const { text = "", more = "" } = this.model.get("listing");
    const block = element("pre", "wb-listing");
    const code = block.appendChild(element("code", "", text));
    const button = action("copy", "wb-button", async () => {
      await copyText(text, code);
      button.textContent = "copied";
    });
    const head = element("div", "wb-listing-head");
    head.append(element("span", "wb-hint", more || "The same without this library; `checkpoint` is what torch.load gives."), button);
    this.listing.replaceChildren(head, block);
  }
}

export default {
  render({ model, el }) {
    const view = new KeyMapper(model, el);
    return () => view.destroy();
  },
};
