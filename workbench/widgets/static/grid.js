/* A virtual grid: about thirty absolutely placed rows over one tall sizer, whatever the number of rows.
 *
 * The grid knows nothing of checkpoints. Its owner gives `columns`, an array of item ids, and a `source`:
 *   cell(id, column) -> string            text of one cell; in a column with `cut` a long one loses its middle
 *   share(id) -> number or null           length of the bar, 0 to 1
 *   level(id) -> int                      depth in a tree, 0 for a table
 *   open(id) -> true | false | null       null: no children
 *   parent(id) -> id or -1
 *   selected(id) -> bool
 *   pick(id, how)                         how: "one" | "toggle" | "range"
 *   toggle(id)                            open or close
 *   sort(columnId)
 *   search()                              the person asked for the filter
 *   picksGroups                           true: a click on a group picks it, and only its triangle opens and closes it
 * Text enters the page through textContent alone.
 */
const ROW_HEIGHT = 24;
const OVERSCAN = 4;
const GAP = 10;
const NAME_WIDTH = 170;

function element(tag, className, text) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
}

function action(label, className, run) {
  const node = element("button", className, label);
  node.type = "button";
  node.addEventListener("click", run);
  return node;
}

/** A long name cut in the middle, where names differ least. */
function cut(text, width) {
  if (text.length <= width || width < 3) return text;
  const head = Math.floor((width - 1) / 4);
  return text.slice(0, head) + "…" + text.slice(text.length - (width - 1 - head));
}

/** A `lead` column is drawn before the name, which stays first for those who listen. */
function cellClass(column) {
  return `wb-cell${column.right ? " wb-right" : ""}${column.lead ? " wb-lead" : ""}`;
}

let gridCount = 0;

class Grid {
  constructor(label, source) {
    this.source = source;
    this.items = [];
    this.columns = [];
    this.active = 0;
    this.rows = [];
    this.frame = 0;
    this.id = `wb-grid-${++gridCount}`;
    this.root = element("div", "wb-grid");
    this.root.setAttribute("aria-label", label);
    this.root.tabIndex = 0;
    this.header = element("div", "wb-grid-head");
    this.header.setAttribute("role", "row");
    this.header.setAttribute("aria-rowindex", "1");
    this.scroller = element("div", "wb-grid-scroll");
    this.scroller.setAttribute("role", "rowgroup");
    this.sizer = element("div", "wb-grid-sizer");
    this.sizer.setAttribute("role", "presentation");
    this.empty = element("div", "wb-grid-empty");
    this.ruler = element("span", "wb-ruler", "0000000000");
    this.scroller.append(this.sizer, this.empty);
    this.root.append(this.header, this.scroller, this.ruler);
    this.scroller.addEventListener("scroll", () => this.schedule());
    this.root.addEventListener("keydown", (event) => this.key(event));
    this.sizer.addEventListener("click", (event) => this.click(event));
    this.resize = new ResizeObserver(() => {
      this.fit();
      this.schedule();
    });
    this.resize.observe(this.scroller);
  }

  destroy() {
    this.resize.disconnect();
    cancelAnimationFrame(this.frame);
  }

  /** New columns: heading buttons that sort, and a template that aligns every row with them. */
  setColumns(columns, order) {
    this.allColumns = columns;
    this.order = order;
    this.fit();
  }

  /** Where names would have too little room, columns with the highest `drop` go first. */
  fit() {
    if (!this.allColumns) return;
    const width = this.root.clientWidth;
    let columns = this.allColumns;
    const least = (column) => column.least || parseInt(column.width, 10) || NAME_WIDTH;
    const room = () => width - columns.slice(1).reduce((sum, column) => sum + least(column) + GAP, 32);
    while (width && room() < (columns[0].least || NAME_WIDTH) && columns.some((column) => column.drop)) {
      const next = Math.max(...columns.map((column) => column.drop || 0));
      columns = columns.filter((column) => column.drop !== next);
    }
    const ids = columns.map((column) => column.id).join(" ");
    if (ids !== this.ids) this.rebuild(columns, ids);
    for (const node of this.header.children) {
      const mine = this.order.length && this.order[0] === node.dataset.column;
      node.setAttribute("aria-sort", !mine ? "none" : this.order[1] > 0 ? "ascending" : "descending");
      node.lastChild.textContent = node.dataset.title + (!mine ? "" : this.order[1] > 0 ? " ▴" : " ▾");
    }
  }

  rebuild(columns, ids) {
    this.ids = ids;
    this.columns = columns;
    const shown = [...columns.filter((column) => column.lead), ...columns.filter((column) => !column.lead)];
    this.root.style.setProperty("--wb-columns", shown.map((column) => column.width).join(" "));
    for (const row of this.rows) row.node.remove();
    this.rows = [];
    this.header.replaceChildren(...columns.map((column) => this.heading(column)));
  }

  heading(column) {
    const node = element("div", cellClass(column));
    node.setAttribute("role", "columnheader");
    node.dataset.column = column.id;
    node.dataset.title = column.title;
    const button = action(column.title, "wb-sort", () => this.source.sort(column.id));
    button.tabIndex = -1;
    if (column.note) button.title = column.note;
    node.append(button);
    return node;
  }

  setItems(items, { tree, empty }) {
    const before = this.items[this.active];
    this.items = items;
    this.tree = tree;
    const kept = before === undefined ? -1 : items.indexOf(before);
    this.active = kept >= 0 ? kept : Math.min(this.active, Math.max(items.length - 1, 0));
    this.root.setAttribute("role", tree ? "treegrid" : "grid");
    this.root.setAttribute("aria-rowcount", String(items.length + 1));
    this.root.setAttribute("aria-multiselectable", "true");
    this.sizer.style.height = `${items.length * ROW_HEIGHT}px`;
    this.empty.replaceChildren(...(items.length ? [] : [empty].flat()));
    this.paint();
  }

  schedule() {
    if (!this.frame) this.frame = requestAnimationFrame(() => this.paint());
  }

  paint() {
    cancelAnimationFrame(this.frame);
    this.frame = 0;
    const height = this.scroller.clientHeight || 20 * ROW_HEIGHT;
    const first = Math.max(0, Math.floor(this.scroller.scrollTop / ROW_HEIGHT) - OVERSCAN);
    const last = Math.min(this.items.length, Math.ceil((this.scroller.scrollTop + height) / ROW_HEIGHT) + OVERSCAN);
    const name = this.header.firstChild;
    const character = this.ruler.offsetWidth / 10 || 7;
    this.characters = Math.floor(((name ? name.clientWidth : 200) - (this.tree ? 30 : 0)) / character);
    this.limits = this.columns.map((column, i) => (column.cut ? Math.floor(this.header.children[i].clientWidth / character) : Infinity));
    while (this.rows.length < last - first) this.rows.push(this.newRow());
    this.rows.forEach((row, i) => (first + i < last ? this.fill(row, first + i) : this.hide(row)));
    const active = this.items.length ? `${this.id}-${this.active}` : "";
    const shown = this.active >= first && this.active < last;
    if (active && shown) this.root.setAttribute("aria-activedescendant", active);
    else this.root.removeAttribute("aria-activedescendant");
  }

  newRow() {
    const node = element("div", "wb-grid-row");
    node.setAttribute("role", "row");
    const cells = this.columns.map((column) => {
      const cell = element("div", cellClass(column));
      cell.setAttribute("role", "gridcell");
      node.append(cell);
      return cell;
    });
    const twisty = element("span", "wb-twisty");
    const label = element("span", "wb-label");
    cells[0].append(twisty, label);
    const bars = cells.map((cell, i) => (this.columns[i].bar ? cell.appendChild(element("div", "wb-bar")) : null));
    this.sizer.append(node);
    return { node, cells, twisty, label, bars };
  }

  hide(row) {
    row.node.style.display = "none";
    row.node.removeAttribute("id");
  }

  fill(row, index) {
    const id = this.items[index];
    const open = this.source.open(id);
    const level = this.source.level(id);
    row.node.style.display = "";
    row.node.style.transform = `translateY(${index * ROW_HEIGHT}px)`;
    row.node.id = `${this.id}-${index}`;
    row.node.dataset.index = String(index);
    row.node.setAttribute("aria-rowindex", String(index + 2));
    row.node.setAttribute("aria-selected", String(this.source.selected(id)));
    row.node.classList.toggle("wb-active", index === this.active);
    row.node.classList.toggle("wb-group", open !== null);
    if (this.tree) row.node.setAttribute("aria-level", String(level + 1));
    else row.node.removeAttribute("aria-level");
    if (open === null) row.node.removeAttribute("aria-expanded");
    else row.node.setAttribute("aria-expanded", String(open));
    row.twisty.textContent = open === null ? "" : open ? "▾" : "▸";
    row.twisty.style.marginLeft = `${level * 14}px`;
    row.twisty.style.display = this.tree ? "" : "none";
    this.columns.forEach((column, i) => {
      if (column.bar) {
        const share = this.source.share(id);
        row.bars[i].style.width = share === null ? "0" : `${Math.max(1, 100 * share)}%`;
        return;
      }
      const text = this.source.cell(id, column);
      const shown = cut(text, i === 0 ? this.characters - 2 * level : open === null ? this.limits[i] : Infinity);
      const target = i === 0 ? row.label : row.cells[i];
      if (target.textContent !== shown) target.textContent = shown;
      row.cells[i].title = i === 0 || text.length > 12 ? text : "";
    });
  }

  click(event) {
    const node = event.target.closest(".wb-grid-row");
    if (!node) return;
    this.active = Number(node.dataset.index);
    const id = this.items[this.active];
    const how = event.shiftKey ? "range" : event.ctrlKey || event.metaKey ? "toggle" : "one";
    this.root.focus({ preventScroll: true });
    const toggles = !this.source.picksGroups || event.target.classList.contains("wb-twisty");
    if (this.source.open(id) !== null && how === "one" && toggles) this.source.toggle(id);
    else this.source.pick(id, how);
    this.schedule();
  }

  move(index) {
    this.active = Math.max(0, Math.min(this.items.length - 1, index));
    const top = this.active * ROW_HEIGHT;
    const height = this.scroller.clientHeight;
    if (top < this.scroller.scrollTop) this.scroller.scrollTop = top;
    if (top + ROW_HEIGHT > this.scroller.scrollTop + height) this.scroller.scrollTop = top + ROW_HEIGHT - height;
    this.paint();
  }

  key(event) {
    if (event.altKey || ((event.ctrlKey || event.metaKey) && event.key !== " ")) return;
    if (event.key === "/") {
      this.source.search();
    } else if (!this.items.length || !this.step(event)) {
      return;
    }
    event.preventDefault();
    event.stopPropagation();
  }

  step(event) {
    const id = this.items[this.active];
    const page = Math.max(1, Math.floor(this.scroller.clientHeight / ROW_HEIGHT) - 1);
    const to = {
      ArrowDown: this.active + 1, ArrowUp: this.active - 1, Home: 0, End: this.items.length - 1,
      PageDown: this.active + page, PageUp: this.active - page,
    }[event.key];
    const open = this.source.open(id);
    if (to !== undefined) {
      this.move(to);
      if (event.shiftKey) this.source.pick(this.items[this.active], "range");
    } else if (event.key === "ArrowRight") {
      if (open === false) this.source.toggle(id);
      else if (open === true) this.move(this.active + 1);
    } else if (event.key === "ArrowLeft") {
      if (open === true) this.source.toggle(id);
      else this.moveTo(this.source.parent(id));
    } else if (event.key === "Enter") {
      if (open !== null && !this.source.picksGroups) this.source.toggle(id);
      else this.source.pick(id, "one");
    } else if (event.key === " ") {
      this.source.pick(id, "toggle");
    } else {
      return false;
    }
    return true;
  }

  moveTo(id) {
    const index = id < 0 ? -1 : this.items.indexOf(id);
    if (index >= 0) this.move(index);
  }
}
