/* The one frame of every view: title, rail, middle, panel, foot.
 *
 * It draws what the synced traits say: `report` (shipped once), `detail` (the right panel), `job` (what is running), `code` (the
 * lines of Python so far) and `error`. `state` is what the person has set; the frame hands it on and never computes a number.
 */

const UNITS = ["kB", "MB", "GB", "TB"];
const DASH = "–";

function formatBytes(value) {
  if (Math.abs(value) < 1000) return `${Math.trunc(value)} B`;
  let unit = -1;
  do {
    value /= 1000;
    unit += 1;
  } while (Math.abs(value) >= 999.5 && unit < UNITS.length - 1);
  return `${Math.abs(value) < 999.5 ? significant(value, 3) : value.toFixed(0)} ${UNITS[unit]}`;
}

/** Like Python's "%.{digits}g". */
function significant(value, digits) {
  if (!Number.isFinite(value)) return Number.isNaN(value) ? "nan" : value > 0 ? "inf" : "-inf";
  if (value === 0) return Object.is(value, -0) ? "-0" : "0";
  const [mantissa, exponent] = halfToEven(value, digits).split("e");
  const power = Number(exponent);
  const trim = (text) => (text.includes(".") ? text.replace(/\.?0+$/, "") : text);
  if (power < -4 || power >= digits) {
    return `${trim(mantissa)}e${power < 0 ? "-" : "+"}${String(Math.abs(power)).padStart(2, "0")}`;
  }
  return trim(Number(`${mantissa}e${exponent}`).toFixed(Math.max(0, digits - 1 - power)));
}

/** toExponential rounds an exact half up; Python rounds it to the even digit. */
function halfToEven(value, digits) {
  const rounded = value.toExponential(digits - 1);
  const [exact, exponent] = value.toExponential(60).split("e");
  const kept = exact.length - 61 + digits;
  if (!/^50*$/.test(exact.slice(kept)) || "13579".includes(exact[kept - 1])) return rounded;
  return `${exact.slice(0, kept)}e${exponent}`;
}

function formatCell(kind, value) {
  if (value === null || value === undefined) return DASH;
  if (kind === "shape") return `[${value.join(", ")}]`;
  if (kind === "bytes") return formatBytes(value);
  if (kind === "count") return value.toLocaleString("en-US");
  if (kind === "number") return typeof value === "number" ? significant(value, 4) : String(value);
  if (kind === "percent") return `${significant(100 * value, 3)} %`;
  return String(value);
}

/** The core's patterns: * any run, ? one character, {0-11} a range, re: a regular expression; anything else is a part of a name. */
function compileFilter(text) {
  if (!text) return null;
  if (text.startsWith("re:")) {
    try {
      return new RegExp(`^(?:${text.slice(3)})$`, "s");
    } catch {
      return undefined;
    }
  }
  if (!/[*?]|\{\d+-\d+\}/.test(text)) return { test: (name) => name.includes(text) };
  const pattern = text.replace(/\{(\d+)-(\d+)\}|[\s\S]/g, (part, low, high) => {
    if (low !== undefined && Number(high) - Number(low) > 100000) return "(?!)";
    if (low !== undefined) return `(?:${Array.from({ length: Math.max(0, high - low + 1) }, (_, i) => Number(low) + i).join("|")})`;
    return part === "*" ? ".*" : part === "?" ? "." : part.replace(/[\\^$.|+()[\]{}/-]/, "\\$&");
  });
  const whole = new RegExp(`^${pattern}$`, "s");
  return { test: (name) => name === text || whole.test(name) };
}

function debounced(run, wait) {
  let timer = 0;
  let pending = null;
  const later = (...values) => {
    clearTimeout(timer);
    pending = values;
    timer = setTimeout(later.flush, wait);
  };
  later.flush = () => {
    clearTimeout(timer);
    const values = pending;
    pending = null;
    if (values) run(...values);
  };
  return later;
}

function readReport(model, trait = "report") {
  const value = model.get(trait);
  const bytes = value instanceof DataView ? new Uint8Array(value.buffer, value.byteOffset, value.byteLength) : value;
  return JSON.parse(new TextDecoder().decode(bytes));
}

class Frame {
  constructor(model, el, report) {
    this.model = model;
    this.report = report;
    this.showLog = false;
    this.root = element("div", "wb-frame");
    // Lab gives a key to its own shortcuts unless the very element that has the focus says no: "b" would insert a cell.
    this.root.addEventListener("focusin", (event) => event.target.setAttribute("data-lm-suppress-shortcuts", "true"));
    this.root.setAttribute("role", "group");
    this.root.setAttribute("aria-label", `workbench ${report.view}: ${report.title.name}`);
    this.title = element("div", "wb-title");
    this.findings = element("div", "wb-findings");
    this.body = element("div", "wb-body");
    this.rail = element("nav", "wb-rail");
    this.rail.setAttribute("aria-label", "where you are");
    this.middle = element("div", "wb-middle");
    this.panel = element("aside", "wb-panel");
    this.panel.setAttribute("aria-label", "selected");
    this.foot = element("div", "wb-foot");
    this.body.append(this.rail, this.middle, this.panel);
    this.root.append(this.title, this.findings, this.body, this.foot);
    el.append(this.root);
    this.watches = [];
    this.resize = new ResizeObserver(() => this.fitRail());
    this.resize.observe(this.rail);
    this.drawTitle();
    this.watch("detail", () => this.drawPanel());
    for (const trait of ["job", "code", "error"]) this.watch(trait, () => this.drawFoot(), trait === "error");
  }

  watch(trait, run, now = true) {
    this.model.on(`change:${trait}`, run);
    this.watches.push([`change:${trait}`, run]);
    if (now) run();
  }

  destroy() {
    this.resize.disconnect();
    for (const [event, run] of this.watches) this.model.off(event, run);
  }

  get state() {
    return this.model.get("state");
  }

  change(values) {
    this.model.set("state", { ...this.state, ...values });
    this.model.save_changes();
  }

  send(command, values = {}) {
    this.model.send({ command, ...values });
  }

  drawTitle() {
    const { title, findings } = this.report;
    const name = element("bdi", "wb-open", cut(title.name, 48));
    name.title = title.name;
    this.title.replaceChildren(name, element("span", "wb-parts", title.parts.join(" · ")));
    if (findings.length) {
      const text = `⚠ ${findings.length} finding${findings.length === 1 ? "" : "s"}`;
      const danger = findings.some((finding) => finding.severity === "danger");
      const button = action(text, danger ? "wb-flag wb-is-danger" : "wb-flag", () => this.toggleFindings(button));
      this.title.append(button);
      this.findings.replaceChildren(...findings.map((finding) => this.finding(finding)));
      this.findings.hidden = !danger;
      button.setAttribute("aria-expanded", String(danger));
    } else {
      this.findings.hidden = true;
    }
    const log = action("show code", "wb-quiet-button", () => {
      this.showLog = !this.showLog;
      log.setAttribute("aria-expanded", String(this.showLog));
      this.drawFoot();
    });
    log.setAttribute("aria-expanded", String(this.showLog));
    this.title.append(log);
  }

  toggleFindings(button) {
    this.findings.hidden = !this.findings.hidden;
    button.setAttribute("aria-expanded", String(!this.findings.hidden));
  }

  finding(finding) {
    const node = element("div", `wb-finding wb-${finding.severity}`);
    const mark = finding.severity === "info" ? "·" : "⚠";
    node.append(element("div", "", `${mark} ${finding.message}`));
    if (finding.hint) node.append(element("div", "wb-hint", finding.hint));
    return node;
  }

  /** Where one can go: `items` are {id, label, count}; the current one is marked by a dot and by aria-current. */
  drawRail(items, current, go) {
    this.rail.replaceChildren(
      ...items.map((item) => {
        const node = action("", "wb-rail-item", () => go(item.id));
        const label = element("bdi", "wb-rail-label", item.label);
        label.dataset.whole = item.label;
        label.title = item.note ? `${item.label}: ${item.note}` : item.label;
        node.append(label, element("span", "wb-count", item.count === null ? "" : item.count.toLocaleString("en-US")));
        if (item.id === current) node.setAttribute("aria-current", "true");
        return node;
      }),
    );
    this.fitRail();
  }

  /** Labels that the rail has no room for are cut in the middle. */
  fitRail() {
    for (const label of this.rail.querySelectorAll(".wb-rail-label")) {
      const { whole } = label.dataset;
      let length = whole.length;
      label.textContent = whole;
      while (label.scrollWidth > label.clientWidth && length > 3) label.textContent = cut(whole, --length);
    }
  }

  /** As low as so many rows, within the bounds of the style sheet. */
  fitRows(count) {
    this.root.style.setProperty("--wb-rows", String(count));
  }

  drawPanel() {
    const detail = this.model.get("detail");
    const parts = [];
    if (detail.heading) {
      const heading = element("h4", "wb-heading");
      const name = element("bdi", "", detail.heading);
      name.title = detail.heading;
      heading.append(name);
      parts.push(heading);
    }
    if (detail.note) parts.push(element("p", detail.locked ? "wb-note wb-locked" : "wb-note", detail.note));
    if (detail.facts) parts.push(this.facts(detail.facts));
    if (detail.image) {
      const image = element("img", "wb-figure");
      image.src = detail.image;
      image.alt = detail.alt || "";
      parts.push(image);
    }
    for (const item of detail.actions || []) {
      parts.push(action(item.label, "wb-button", () => this.send(item.command)));
    }
    if (detail.more) parts.push(this.facts(detail.more));
    this.panel.replaceChildren(...parts);
  }

  facts(facts) {
    const list = element("dl", "wb-facts");
    for (const [label, value] of facts) {
      const text = element("dd", "", value);
      text.title = value;
      const pair = element("div", label.length > 10 ? "wb-fact wb-long" : "wb-fact");
      pair.append(element("dt", "", label), text);
      list.append(pair);
    }
    return list;
  }

  drawFoot() {
    const parts = [];
    const { message, hint } = this.model.get("error");
    if (message) {
      const node = element("div", "wb-error");
      node.setAttribute("role", "alert");
      node.append(element("div", "", `⚠ ${message}`));
      if (hint) node.append(element("div", "wb-hint", hint));
      parts.push(node);
    }
    const job = this.model.get("job");
    if (job.label) parts.push(this.jobLine(job));
    const code = this.model.get("code");
    const shown = this.showLog ? code : code.slice(-1);
    for (const line of shown) parts.push(this.codeLine(line));
    this.foot.replaceChildren(...parts);
  }

  jobLine(job) {
    const node = element("div", "wb-job");
    const bar = element("progress", "wb-progress");
    bar.setAttribute("aria-label", job.label);
    if (job.fraction !== null) bar.value = job.fraction;
    node.append(bar, element("span", "", job.text), action("cancel", "wb-button", () => this.send("cancel")));
    node.append(element("span", "wb-memory", job.memory));
    return node;
  }

  codeLine(line) {
    const node = element("div", "wb-code");
    const code = element("code", "", line);
    const button = action("copy", "wb-quiet-button", async () => {
      await copyText(line, code);
      button.textContent = "copied";
    });
    node.append(element("span", "wb-prompt", "›"), code, button);
    return node;
  }
}

/** Pages that are not served over https have no clipboard interface; there the line is selected, ready to be copied. */
async function copyText(text, node) {
  if (navigator.clipboard && window.isSecureContext) {
    await navigator.clipboard.writeText(text);
    return;
  }
  const range = document.createRange();
  range.selectNodeContents(node);
  const selection = window.getSelection();
  selection.removeAllRanges();
  selection.addRange(range);
}

/** The line above every table: a filter, how many rows it leaves, and what the view adds. What was typed counts before anything else is pressed. */
function filterBar(onInput, ...others) {
  const node = element("div", "wb-bar-line");
  const input = element("input", "wb-filter");
  input.type = "search";
  input.placeholder = "filter, e.g. layers.*.weight";
  input.setAttribute("aria-label", "filter");
  input.spellcheck = false;
  const changed = debounced(onInput, 70);
  input.addEventListener("input", () => changed(input.value));
  node.addEventListener("pointerdown", (event) => event.target === input || changed.flush());
  input.addEventListener("blur", changed.flush);
  const count = element("span", "wb-shown");
  count.setAttribute("role", "status");
  node.append(input, count, ...others);
  return { node, input, count };
}

/** A line of a form: its name at the left, and the controls. */
function formLine(label, nodes) {
  const node = element("div", "wb-form-line");
  const name = element("span", "wb-form-label", label);
  name.setAttribute("aria-hidden", "true"); // every control has a name of its own
  node.append(name, ...nodes);
  return node;
}

/** A table of the core, every cell already in words. */
function drawTable({ title, columns, rows, needs, empty, more }) {
  const node = element("table", needs ? `wb-table wb-needs-${needs}` : "wb-table");
  const head = element("thead");
  const line = (tag, cells) => {
    const row = element("tr");
    row.append(...cells.map((text, i) => {
      const { right, wraps, note } = cells.length === columns.length ? columns[i] : { wraps: true };
      const cell = element(tag, right ? "wb-right" : wraps && text.length > 24 ? "wb-text" : "");
      if (needs && tag === "td" && i && columns[i].title) cell.dataset.of = columns[i].title;
      const inner = element("bdi", "", wraps ? text : cut(text, 48));
      inner.title = (tag === "th" && note) || text;
      cell.append(inner);
      return cell;
    }));
    return row;
  };
  node.append(element("caption", "", title));
  head.append(line("th", columns.map((column) => column.title)));
  if (rows.length) node.append(head, ...rows.map((row) => line("td", row)));
  else node.append(line("td", [empty]));
  if (more) node.append(line("td", [`… ${formatCell("count", more)} more`]));
  return node;
}
