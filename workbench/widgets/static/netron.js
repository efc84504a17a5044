/* The Netron view: netron's own page in a frame, handed the model's bytes; or the summary where no server has that page.
 *
 * The page is asked for where this notebook's own server is and nowhere else. It may run its scripts and save a picture; it can open no
 * window and lead this page nowhere.
 */

const SERVED = "X-Workbench-Netron";
const PATIENCE = 600; // times 50 ms until netron has started

/** Where Netron is served, or why it is not. */
async function findNetron() {
  const config = document.getElementById("jupyter-config-data");
  const base = (config && JSON.parse(config.textContent).baseUrl) || document.body.dataset.baseUrl;
  if (!base) return { why: "This page does not come from a Jupyter server, so Netron cannot be shown in it." };
  const address = new URL(`${base.replace(/\/*$/, "/")}wb-netron/`, window.location.href);
  const off = { why: "Netron is not shown: this server runs without the extension workbench.widgets.netron_server." };
  if (address.origin !== window.location.origin) return off;
  try {
    const answer = await fetch(address, { method: "HEAD", credentials: "same-origin", redirect: "manual" });
    const reason = answer.headers.get("X-Workbench-Reason");
    if (reason) return { why: `Netron is not shown: ${reason}.` };
    return answer.ok && answer.headers.has(SERVED) ? { address: address.href } : off;
  } catch {
    return off;
  }
}

class NetronView {
  constructor(model, el) {
    this.model = model;
    this.report = readReport(model);
    this.frame = new Frame(model, el, this.report);
    this.frame.root.classList.add("wb-netron");
    this.why = element("p", "wb-why");
    this.why.setAttribute("role", "status");
    this.summary = element("div", "wb-about");
    this.summary.append(...this.report.tables.map((table) => this.table(table)));
    this.frame.middle.append(this.why, this.summary);
    this.received = (message, buffers) => this.save(message, buffers);
    model.on("msg:custom", this.received);
    this.frame.watch("state", () => this.draw());
    this.start();
  }

  destroy() {
    this.gone = true;
    this.model.off("msg:custom", this.received);
    this.frame.destroy();
  }

  async start() {
    const found = this.report.refused ? { why: this.report.refused } : await findNetron();
    if (this.gone) return;
    if (found.address) this.openPage(found.address);
    else this.why.textContent = `${found.why} The summary stands here; the download opens in any Netron.`;
    this.draw();
  }

  draw() {
    const isGraph = this.frame.state.pane === "graph";
    this.frame.drawRail(this.report.rail, this.frame.state.pane, (pane) => this.frame.change({ pane }));
    const showsPage = Boolean(this.page) && isGraph;
    if (this.page) this.page.hidden = !showsPage;
    this.summary.hidden = showsPage;
    this.why.hidden = !isGraph || !this.why.textContent;
  }

  openPage(address) {
    this.page = element("iframe", "wb-page");
    this.page.title = `Netron: ${this.report.file}`;
    this.page.setAttribute("sandbox", "allow-scripts allow-same-origin allow-downloads");
    this.page.addEventListener("load", () => this.hand(0));
    this.page.src = address;
    this.frame.middle.append(this.page);
  }

  /** Give the bytes to netron's own file input, as soon as netron listens to it. */
  hand(tries) {
    if (this.gone) return;
    const page = this.page.contentDocument;
    const input = page && page.getElementById("open-file-dialog");
    const { classList } = (page && page.body) || {};
    if (!input || !classList.contains("welcome") || classList.contains("spinner")) {
      if (tries < PATIENCE) setTimeout(() => this.hand(tries + 1), 50);
      return;
    }
    const bytes = this.model.get("shown");
    const { DataTransfer, Event } = this.page.contentWindow;
    const transfer = new DataTransfer();
    transfer.items.add(new File([bytes], this.report.file));
    input.files = transfer.files;
    input.dispatchEvent(new Event("change"));
  }

  save(message, buffers) {
    if (message.download === undefined) return;
    const link = element("a");
    link.href = URL.createObjectURL(new Blob([buffers[0]], { type: "application/octet-stream" }));
    link.download = message.download;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60000);
  }

  table({ title, columns, rows, empty, more }) {
    const node = element("table", "wb-table");
    node.append(element("caption", "", title));
    if (!rows.length) node.append(this.row("td", [empty], [{ kind: "text" }]));
    else node.append(this.row("th", columns.map((column) => column.title), columns, true));
    node.append(...rows.map((row) => this.row("td", row, columns)));
    if (more) node.append(this.row("td", [`… ${formatCell("count", more)} more`], [{ kind: "text" }]));
    return node;
  }

  row(tag, cells, columns, isHead = false) {
    const node = element("tr");
    node.append(
      ...cells.map((value, i) => {
        const cell = element(tag, columns[i].right ? "wb-right" : "");
        const text = isHead ? value : formatCell(columns[i].kind, value);
        const inner = element("bdi", "", cut(text, 64));
        inner.title = text;
        cell.append(inner);
        return cell;
      }),
    );
    return node;
  }
}

export default {
  render({ model, el }) {
    const view = new NetronView(model, el);
    return () => view.destroy();
  },
};
