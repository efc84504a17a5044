/* The exporter: a form, one row per target, and what came of it: the report, the figures, the graph.
 *
 * Ids on the grid are targets. The kernel ships words and numbers; what the form holds travels with the command that means it.
 */

const TYPED = " typed"; // no name begins with a space

class Field {
  /** A list of the notebook's variables; its last entry opens a line for what is typed instead. */
  constructor(view, key, { empty, other, placeholder }) {
    Object.assign(this, { view, key, empty, other, typing: false, drawn: "" });
    this.select = element("select", "wb-choice");
    this.select.setAttribute("aria-label", key);
    this.input = Object.assign(element("input", "wb-filter"), { type: "text", placeholder, spellcheck: false, ariaLabel: `${key}: ${other}` });
    this.select.addEventListener("change", () => this.pick());
    this.changed = debounced(() => view.frame.change({ [key]: this.input.value }), 150);
    this.input.addEventListener("input", this.changed);
    this.input.addEventListener("blur", this.changed.flush);
    this.nodes = [this.select, this.input];
  }

  pick() {
    this.typing = this.select.value === TYPED;
    this.view.frame.change({ [this.key]: this.typing ? this.input.value : this.select.value });
    this.draw();
  }

  get value() {
    return this.select.value === TYPED ? this.input.value : this.select.value;
  }

  draw() {
    const offers = this.view.model.get("offers")[`${this.key.replace(/s$/, "")}s`] || [];
    const current = this.view.frame.state[this.key];
    const told = JSON.stringify(offers);
    if (told !== this.drawn) {
      const entries = [["", this.empty], ...offers.map(([name, note]) => [name, `${cut(name, 32)} · ${cut(note, 56)}`]), [TYPED, `${this.other} …`]];
      this.select.replaceChildren(...entries.map(([value, text]) => Object.assign(element("option", "", text), { value })));
      this.drawn = told;
    }
    const known = current === "" || offers.some(([name]) => name === current);
    const typed = !known || (this.typing && (current === "" || document.activeElement === this.input));
    this.select.value = typed ? TYPED : current;
    this.input.hidden = !typed;
    if (typed && document.activeElement !== this.input && this.input.value !== current) this.input.value = current;
  }
}

class Exporter {
  constructor(model, el) {
    this.model = model;
    this.frame = new Frame(model, el, readReport(model));
    this.frame.root.classList.add("wb-exporter");
    this.grid = new Grid("targets", this);
    this.grid.root.addEventListener("keydown", (event) => this.key(event));
    this.form = this.buildForm();
    this.panes = Object.fromEntries(["advice", "report", "parity", "graph"].map((pane) => [pane, element("div", "wb-about")]));
    this.panes.graph.className = "wb-graph";
    this.frame.middle.append(this.form, this.grid.root, ...Object.values(this.panes));
    this.frame.watch("report", () => this.readReport(), false);
    this.frame.watch("offers", () => this.fields.forEach((field) => field.draw()), false);
    this.frame.watch("rows", () => this.drawRows(), false);
    this.frame.watch("job", () => this.drawStatus(), false);
    this.frame.watch("detail", () => this.drawDetail());
    this.frame.watch("guide", () => this.drawGuide());
    this.frame.watch("sections", () => this.drawSections());
    this.frame.watch("figures", () => this.drawFigures());
    this.frame.watch("graph", () => this.closeGraph(), false);
    this.frame.watch("state", () => this.draw());
  }

  destroy() {
    this.closeGraph(true);
    this.grid.destroy();
    this.frame.destroy();
  }

  get report() { return this.frame.report; }

  readReport() {
    this.frame.report = readReport(this.model);
    this.frame.drawTitle();
    this.frame.root.setAttribute("aria-label", `workbench exporter: ${this.report.title.name}`);
    this.draw();
  }

  buildForm() {
    const form = element("div", "wb-form");
    this.fields = [
      new Field(this, "model", { empty: "choose a model", other: "module:function", placeholder: "package.module:function" }),
      new Field(this, "inputs", { empty: "choose example inputs", other: "shapes, or several", placeholder: "1x3x32x32 or int64[2,16] < 100" }),
    ];
    for (const field of this.fields) form.append(formLine(field.key, field.nodes));
    const box = (label, run) => {
      const node = element("label", "wb-check");
      const input = Object.assign(element("input"), { type: "checkbox" });
      input.addEventListener("change", () => run(input.checked));
      node.append(input, element("span", "", label));
      return [node, input];
    };
    this.boxes = new Map();
    const targets = this.report.targets.map(({ id, use }) => {
      const [node, input] = box(id, () => this.frame.change({ targets: this.targets() }));
      node.title = use;
      this.boxes.set(id, input);
      return node;
    });
    const group = element("div", "wb-checks");
    group.setAttribute("role", "group");
    group.setAttribute("aria-label", "targets");
    group.append(...targets);
    const [any, dynamic] = box("any batch size", (value) => this.frame.change({ dynamic: value }));
    any.title = "leave the first axis of the inputs free";
    this.dynamic = dynamic;
    const text = (key, label, placeholder) => {
      const input = Object.assign(element("input", `wb-filter wb-${key}`), { type: "text", placeholder, spellcheck: false, ariaLabel: label });
      const changed = debounced(() => this.frame.change({ [key]: input.value }), 150);
      input.addEventListener("input", changed);
      input.addEventListener("blur", changed.flush);
      return input;
    };
    this.opset = text("opset", "ONNX opset", "auto");
    this.folder = text("folder", "folder", "exported");
    const opset = element("label", "wb-check");
    opset.append(element("span", "", "opset"), this.opset);
    form.append(formLine("to", [group, any, opset]));
    this.start = action("Export", "wb-button wb-primary", () => this.frame.send("export", this.values()));
    this.status = element("span", "wb-hint wb-status");
    this.status.setAttribute("role", "status");
    form.append(formLine("folder", [this.folder, this.start, this.status]));
    const look = (event) => form.contains(event.relatedTarget) || this.frame.send("look");
    form.addEventListener("focusin", look);
    form.addEventListener("pointerenter", look);
    return form;
  }

  targets() {
    return [...this.boxes].filter(([, input]) => input.checked).map(([id]) => id);
  }

  values() {
    const [model, inputs] = this.fields.map((field) => field.value);
    return { model, inputs, targets: this.targets(), folder: this.folder.value, dynamic: this.dynamic.checked, opset: this.opset.value };
  }

  draw() {
    const { state } = this.frame;
    this.frame.drawRail(this.report.rail, state.pane, (pane) => this.frame.change({ pane }));
    this.form.hidden = this.grid.root.hidden = state.pane !== "export";
    for (const [pane, node] of Object.entries(this.panes)) node.hidden = pane !== state.pane;
    for (const field of this.fields) field.draw();
    for (const [id, input] of this.boxes) input.checked = state.targets.includes(id);
    this.dynamic.checked = state.dynamic;
    for (const key of ["folder", "opset"]) if (document.activeElement !== this[key]) this[key].value = state[key];
    this.drawRows();
    this.frame.root.classList.toggle("wb-is-form", state.pane === "export");
    if (state.pane === "graph") this.openGraph();
  }

  drawStatus() {
    const job = this.model.get("job");
    this.start.disabled = Boolean(job.label);
    const text = job.label ? job.text : this.report.done;
    if (this.status.textContent !== text) this.status.textContent = text;
  }

  drawRows() {
    this.rows = new Map(this.model.get("rows").map((row) => [row.target, row]));
    this.grid.setColumns(this.report.columns, []);
    this.grid.setItems([...this.rows.keys()], { tree: false, empty: "tick a target above" });
    this.drawStatus();
  }

  cell(id, column) {
    const text = this.rows.get(id)[column.id];
    return text === undefined ? DASH : text;
  }

  share() { return null; }
  level() { return 0; }
  open() { return null; }
  parent() { return -1; }
  selected(id) { return this.frame.state.target === id; }
  pick(id, how) { this.frame.change({ target: how === "toggle" && this.selected(id) ? "" : id }); }
  toggle() {}
  sort() {}
  search() { this.fields[0].select.focus(); }

  key(event) {
    const command = { g: "graph", c: "compare" }[event.key];
    const offered = (this.model.get("detail").verbs || []).some(([, verb]) => verb === command);
    if (!offered || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    event.stopPropagation();
    this.ask(command);
  }

  ask(command) { this.frame.send(command, { target: this.frame.state.target }); }

  /** Below what the frame says of the selected: the cure, what can be done with it, what was noticed, and the exporter's own words. */
  drawDetail() {
    const { next, verbs = [], remarks = [], own } = this.model.get("detail");
    const head = next ? [element("p", "wb-next", next)] : [];
    const parts = remarks.map((remark) => element("p", "wb-note", remark));
    if (verbs.length) {
      const line = element("div", "wb-verbs");
      const button = ([label, command]) => Object.assign(action(label, "wb-button", () => this.ask(command)), { title: command === "choose" ? "" : `key ${command[0]}` });
      line.append(...verbs.map(button));
      head.push(line);
    }
    this.frame.panel.querySelector(".wb-heading").after(...[this.frame.panel.querySelector(".wb-note"), ...head].filter(Boolean));
    if (own) {
      const fold = element("details", "wb-own");
      fold.append(element("summary", "", "the exporter's own words"), element("pre", "wb-listing", own));
      parts.push(fold);
    }
    this.frame.panel.append(...parts);
  }

  drawGuide() {
    const { questions = [], headline, tables = [], source } = this.model.get("guide");
    const focused = document.activeElement && document.activeElement.dataset ? document.activeElement.dataset.option : "";
    const list = element("div", "wb-questions");
    list.setAttribute("role", "group");
    list.setAttribute("aria-label", "questions; every yes counts");
    list.append(...questions.map(([option, question, yes]) => {
      const node = element("label", "wb-check");
      const input = Object.assign(element("input"), { type: "checkbox", checked: yes });
      input.dataset.option = option;
      input.addEventListener("change", () => {
        const others = this.frame.state.answers.filter((other) => other !== option);
        this.frame.change({ answers: input.checked ? [...others, option] : others });
      });
      node.append(input, element("span", "", question));
      return node;
    }));
    const parts = [element("p", "wb-hint", "Tick what is so. Every yes counts; where no file serves all, the upper ones weigh more."), list];
    if (headline) parts.push(Object.assign(element("p", "wb-finding-line", headline), { role: "status" }));
    if (source) parts.push(this.image({ source, alt: headline }));
    this.panes.advice.replaceChildren(...parts, ...tables.map(drawTable));
    const again = focused && list.querySelector(`[data-option="${focused}"]`);
    if (again) again.focus();
  }

  image({ source, alt }) {
    return Object.assign(element("img", "wb-figure"), { src: source, alt });
  }

  drawSections() {
    const { tables = [], usage = [] } = readReport(this.model, "sections");
    if (!tables.length) return this.panes.report.replaceChildren(element("p", "wb-hint", "Nothing is exported yet. Here the report will stand: what was made, how it was checked, and how far it is from the model."));
    const code = usage.flatMap(([target, text]) => [element("h4", "wb-usage", `${target} without the workbench`), element("pre", "wb-listing", text)]);
    const save = action("save as one page", "wb-button wb-save", () => this.frame.send("save"));
    return this.panes.report.replaceChildren(save, ...tables.map(drawTable), ...code);
  }

  drawFigures() {
    const { images = [], note = "Nothing is exported yet. Here each file's answers will stand against the model's." } = this.model.get("figures");
    this.panes.parity.replaceChildren(...(note ? [element("p", "wb-hint", note)] : []), ...images.map((image) => this.image(image)));
  }

  closeGraph(gone = false) {
    if (this.page) this.page.destroy();
    this.page = null;
    this.panes.graph.replaceChildren();
    if (!gone && this.frame.state.pane === "graph") this.openGraph();
  }

  /** Netron starts when its pane is first seen: it lays out by the room that it has. */
  async openGraph() {
    if (this.page) return;
    const { file, note, tables } = this.model.get("graph");
    const box = this.panes.graph;
    const say = (text) => box.replaceChildren(element("p", "wb-why", text));
    if (!file) return say("No file is made yet. Here Netron will show its graph.");
    say(note ? `${file}. ${note}` : file);
    const bytes = this.model.get("shown");
    const page = (this.page = bytes.byteLength ? new NetronPage(box, file, bytes) : { opened: Promise.resolve(note), destroy() {} });
    const why = await page.opened;
    if (why && this.page === page) {
      const summary = element("div", "wb-about");
      summary.append(...tables.map(drawTable));
      say(`${why} The summary of ${file} stands here.`);
      box.append(summary);
    }
  }
}

export default {
  render({ model, el }) {
    const view = new Exporter(model, el);
    return () => view.destroy();
  },
};
