/* The Netron view: netron's own page in a frame, handed the model's bytes; or the summary where no server has that page. */

class NetronView {
  constructor(model, el) {
    this.model = model;
    this.report = readReport(model);
    this.frame = new Frame(model, el, this.report);
    this.frame.root.classList.add("wb-netron");
    this.why = element("p", "wb-why");
    this.why.setAttribute("role", "status");
    this.summary = element("div", "wb-about");
    this.summary.append(...this.report.tables.map(drawTable));
    this.frame.middle.append(this.why, this.summary);
    this.received = (message, buffers) => this.save(message, buffers);
    model.on("msg:custom", this.received);
    this.frame.watch("state", () => this.draw());
    this.start();
  }

  destroy() {
    this.gone = true;
    this.model.off("msg:custom", this.received);
    if (this.page) this.page.destroy();
    this.frame.destroy();
  }

  async start() {
    if (!this.report.refused) this.page = new NetronPage(this.frame.middle, this.report.file, this.model.get("shown"));
    const why = this.report.refused || (await this.page.opened);
    if (this.gone) return;
    if (why) this.why.textContent = `${why} The summary stands here; the download opens in any Netron.`;
    this.draw();
  }

  draw() {
    const isGraph = this.frame.state.pane === "graph";
    this.frame.drawRail(this.report.rail, this.frame.state.pane, (pane) => this.frame.change({ pane }));
    const page = this.page && this.page.node;
    const showsPage = Boolean(page) && isGraph;
    if (page) page.hidden = !showsPage;
    this.summary.hidden = showsPage;
    this.why.hidden = !isGraph || !this.why.textContent;
  }

  save(message, buffers) {
    if (message.download === undefined) return;
    const link = element("a");
    link.href = URL.createObjectURL(new Blob([buffers[0]], { type: "application/octet-stream" }));
    link.download = message.download;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60000);
  }
}

export default {
  render({ model, el }) {
    const view = new NetronView(model, el);
    return () => view.destroy();
  },
};
